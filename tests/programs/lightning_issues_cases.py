"""Lightning's BatchSizeFinder and MemoryPlanner on one card: prints a JSON object of what each did, on the null GPU."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BatchSizeFinder
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightning_memplan as mp


class Series(Dataset[Any]):
    """Many series, of which the last fifth is four times as long as the others."""

    def __init__(self, longest: int) -> None:
        self.longest = longest

    def __len__(self) -> int:
        return 5_000

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.ones(self.longest if index >= 4_000 else 64, 1)


def padded(series: list[torch.Tensor]) -> torch.Tensor:
    return nn.utils.rnn.pad_sequence(series, batch_first=True)


class Reader(pl.LightningModule):
    def __init__(self, longest: int = 64) -> None:
        super().__init__()
        self.batch_size, self.longest, self.seen = 2, longest, []
        self.net = nn.Sequential(nn.Linear(1, 2048), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if isinstance(self.trainer, pl.Trainer):  # no copy
            self.seen.append(list(batch.shape[:2]))
        return self.net(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())

    def train_dataloader(self) -> Any:
        return DataLoader(Series(self.longest), batch_size=self.batch_size, collate_fn=padded)


def fit(module: Reader, callback: Any) -> dict[str, Any]:
    torch.cuda.empty_cache()
    refused = torch.cuda.memory_stats().get("num_ooms", 0)
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    error = ""
    try:
        trainer.fit(module)
    except torch.OutOfMemoryError as failed:
        error = type(failed).__name__
    refused = torch.cuda.memory_stats()["num_ooms"] - refused
    return {"batch_size": module.batch_size, "seen": module.seen, "error": error, "refused": refused}


def main() -> None:
    warnings.simplefilter("ignore")
    shown = {
        "finder, of the first": fit(Reader(256), BatchSizeFinder(max_val=2**20)),
        "planner, of the largest": fit(Reader(256), mp.MemoryPlanner(samples="largest")),
        "finder, up to max_val": fit(Reader(), BatchSizeFinder(max_val=2_048)),
        "finder, in one trial": fit(Reader(), BatchSizeFinder(max_trials=1, init_val=4_096, max_val=2**20)),
        "planner": fit(Reader(), mp.MemoryPlanner()),
    }
    print("SHOWN", json.dumps(shown))


if __name__ == "__main__":
    main()
