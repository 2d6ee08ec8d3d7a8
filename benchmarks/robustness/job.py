"""Describe a job: a module, its data, and how a Trainer trains it; and the network and rows that most jobs share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_memplan import Device

WIDTH, ROWS, BATCH_SIZE = 16, 24, 4

#: samples of an epoch with the planner, beside those without: the same number, at least as many, or any number
Samples = Literal["same", "more", "any"]


class Rows(Dataset):
    """Rows of ones."""

    def __init__(self, count: int = ROWS, width: int = WIDTH) -> None:
        self.count, self.width = count, width

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return torch.ones(self.width)


class Bare(pl.LightningModule):
    """Two layers, with no loader of its own, and no attribute that keeps the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Net(Bare):
    """The same network; it keeps the batch size and makes the loader."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = BATCH_SIZE

    def train_dataloader(self) -> Any:
        return DataLoader(Rows(), batch_size=self.batch_size)


def loader(dataset: Any = None, batch_size: int = BATCH_SIZE, **options: Any) -> DataLoader[Any]:
    return DataLoader(Rows() if dataset is None else dataset, batch_size=batch_size, **options)


#: Trains on the CPU and plans for a GPU: where shapes depend on values, which a null GPU does not have
ON_CPU: dict[str, Any] = {
    "settings": {"accelerator": "cpu"},
    "options": {"device": Device("a card", total=2**31), "apply": True},
}

Run = Callable[[Sequence[pl.Callback]], pl.Trainer]  #: train with these callbacks more


@dataclass
class Training:
    """One training: two epochs of ``module``, on loaders (or a datamodule) that are passed or on the module's own.

    ``fit`` replaces the call of ``trainer.fit``; ``run`` replaces the Trainer too. ``count`` returns the number of
    samples of a batch, or what else is to be noted of it.
    """

    module: pl.LightningModule | None = None
    data: Any = None
    val: Any = None
    callbacks: Sequence[pl.Callback] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)  #: what the planner is told
    fit: Callable[[pl.Trainer, Training], None] | None = None
    run: Run | None = None
    count: Callable[[Any], Any] | None = None

    def train(self, more: Sequence[pl.Callback] = ()) -> pl.Trainer:
        if self.run is not None:
            return self.run(more)
        trainer = self.trainer(more)
        (self.fit or fit)(trainer, self)
        return trainer

    def trainer(self, more: Sequence[pl.Callback] = ()) -> pl.Trainer:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        few = {"max_epochs": 2, "num_sanity_val_steps": 0, "enable_model_summary": False}
        settings = {"accelerator": "gpu", "devices": 1, **quiet, **few, **self.settings}
        return pl.Trainer(callbacks=[*self.callbacks, *more], **settings)


def fit(trainer: pl.Trainer, training: Training, **options: Any) -> None:
    module, data = training.module, training.data
    assert module is not None
    if isinstance(data, pl.LightningDataModule):
        trainer.fit(module, datamodule=data, **options)
    else:
        trainer.fit(module, data, training.val, **options)


@dataclass(frozen=True)
class Job:
    name: str
    kind: str
    make: Callable[[], Training]
    samples: Samples = "same"
    alone: bool = False  #: in a process of its own: it leaves state behind
    limit: str = ""  #: why it may fail: what docs/never_worse.md names as outside a replica


JOBS: dict[str, Job] = {}


def job(
    kind: str, samples: Samples = "same", *, alone: bool = False, name: str = "", limit: str = ""
) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a function that makes a ``Training``, or the module alone, as the job of its name."""

    def register(make: Callable[[], Any]) -> Callable[[], Any]:
        def training() -> Training:
            made = make()
            return made if isinstance(made, Training) else Training(made)

        own = name or make.__name__
        if own in JOBS:
            raise ValueError(f"two jobs are named {own}")
        JOBS[own] = Job(own, kind, training, samples, alone, limit)
        return make

    return register
