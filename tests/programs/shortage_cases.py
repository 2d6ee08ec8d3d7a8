"""Trainings that run out of memory on the null GPU: prints a JSON object of their notes (see test_shortage.py)."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightning_memplan as mp
from lightning_memplan.planning import shortage

MiB = 2**20


class Texts(Dataset[torch.Tensor]):
    """4,000 texts of 64 tokens; those from ``long`` on have 4,096."""

    def __init__(self, long: int = 4000) -> None:
        self.long = long

    def __len__(self) -> int:
        return 4000

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(64 if index < self.long else 4096, 64)


def pad(texts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([len(text) for text in texts])
    return {"x": nn.utils.rnn.pad_sequence(texts, batch_first=True), "lengths": lengths}


class Net(pl.LightningModule):
    """Keeps ``kept`` bytes in each step; takes ``taken`` more in the second."""

    def __init__(self, kept: int = 0, taken: int = 0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        self.kept, self.taken, self.tensors = kept, taken, list[Any]()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if isinstance(self.trainer, pl.Trainer):  # and not while it is planned
            if self.kept:
                self.tensors.append(torch.zeros(self.kept // 4, device=self.device))
            if self.taken and batch_idx == 1:
                self.tensors.append(torch.zeros(self.taken // 4, device=self.device))
        return self.net(batch["x"]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch["x"])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


def loader(long: int = 4000) -> Any:
    return DataLoader(Texts(long), batch_size=8, collate_fn=pad)


def notes(net: Net, train: Any, val: Any = None, **options: Any) -> dict[str, Any]:
    """Return the type, text and notes of the error that training ends with."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    planner = mp.MemoryPlanner(**options)
    trainer = pl.Trainer(
        accelerator="gpu", devices=1, max_epochs=1, enable_model_summary=False, **quiet, callbacks=[planner]
    )
    try:
        trainer.fit(net, train, val)
    except Exception as error:  # noqa: BLE001 - whatever its type, it is shown
        found = {"type": type(error).__name__, "text": str(error), "notes": list(getattr(error, "__notes__", ()))}
    else:
        found = {"type": "", "text": "", "notes": []}
    net.tensors.clear()
    trainer.fit_loop = None  # type: ignore[assignment]  # which holds the failed batch
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    shortage.OWNERS = 3
    found = {
        "larger samples": notes(Net(), loader(3000), samples="first", max_batch_size=256),
        "kept": notes(Net(kept=100 * MiB), loader(), max_batch_size=256),
        "too large": notes(Net(taken=1700 * MiB), loader(), max_batch_size=2048),
        "validation": notes(
            Net(), loader(), DataLoader([torch.zeros(400000, 64)] * 4, 16, collate_fn=pad), max_batch_size=64
        ),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
