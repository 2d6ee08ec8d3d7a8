"""Trainings whose validation follows their batch size, on the null GPU: prints a JSON object (see test_stages.py)."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightning_memplan as mp


class Images(Dataset[torch.Tensor]):
    def __init__(self, count: int, side: int) -> None:
        self.count, self.side = count, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(3, self.side, self.side)


class Net(pl.LightningModule):
    """A small CNN; validation also runs ``heads`` more layers on its features."""

    def __init__(self, heads: int = 0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
        self.heads = nn.ModuleList(nn.Conv2d(32, 32, 1) for _ in range(heads))
        self.sizes: dict[str, set[int]] = {"train": set(), "val": set()}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.sizes["train"].add(len(batch))
        return self.net(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.sizes["val"].add(len(batch))
        features = self.net(batch)
        kept = [head(features) for head in self.heads]
        self.log("loss", sum(each.mean() for each in kept) if kept else features.mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


class Data(pl.LightningDataModule):
    """Both loaders have ``batch_size``; validation ``times`` as much, or ``fixed``."""

    def __init__(self, side: int = 64, count: int = 4000, times: int = 1, fixed: int = 0) -> None:
        super().__init__()
        self.batch_size = 4
        self.side, self.count, self.times, self.fixed = side, count, times, fixed

    def train_dataloader(self) -> Any:
        return DataLoader(Images(4000, 64), batch_size=self.batch_size, drop_last=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Images(self.count, self.side), batch_size=self.fixed or self.times * self.batch_size)


class Held(Data):
    """Keeps it among its hyperparameters alone."""

    def __init__(self) -> None:
        super().__init__(side=256)
        del self.batch_size
        self.save_hyperparameters({"batch_size": 4})

    def train_dataloader(self) -> Any:
        return DataLoader(Images(4000, 64), batch_size=self.hparams["batch_size"], drop_last=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Images(4000, 256), batch_size=self.hparams["batch_size"])


#: module, data, and settings of the Trainer
CASES: dict[str, Callable[[], tuple[Net, Data, dict[str, Any]]]] = {
    "larger images": lambda: (Net(), Data(side=256), {}),
    "larger images, in hyperparameters": lambda: (Net(), Held(), {}),
    "larger images, without a sanity check": lambda: (Net(), Data(side=256), {"num_sanity_val_steps": 0}),
    "more heads": lambda: (Net(heads=12), Data(), {}),
    "eight times the batch": lambda: (Net(), Data(times=8), {}),
    "few of them": lambda: (Net(), Data(side=256, count=10), {}),
    "of their own size": lambda: (Net(), Data(side=256, fixed=4), {}),
    "the same images": lambda: (Net(), Data(), {}),
    "larger images, without validation": lambda: (Net(), Data(side=512), {"limit_val_batches": 0}),
}


def trained(net: Net, data: Data, settings: dict[str, Any]) -> dict[str, Any]:
    planner = mp.MemoryPlanner(margin=0.02)
    trainer = pl.Trainer(
        **{"limit_train_batches": 3, "limit_val_batches": 2, "max_epochs": 2, **settings},
        accelerator="gpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[planner],
    )
    trainer.fit(net, datamodule=data)
    assert planner.plan is not None
    return {
        "planned": planner.plan.batch_size,
        "limited_by": planner.plan.limited_by,
        "notes": list(planner.plan.notes),
        "budget": planner.plan.budget,
        "train": sorted(net.sizes["train"]),
        "val": sorted(net.sizes["val"]),
        "reserved": max([*(m.reserved for m in planner.measurements), *(v.reserved for v in planner.validations)]),
        "errors": max(abs(m.error_percent) for m in planner.measurements),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    found = {}
    for name, make in CASES.items():
        found[name] = trained(*make())
        torch.cuda.empty_cache()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
