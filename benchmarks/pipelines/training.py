"""The module of a pipeline, what holds its batch size, and its Trainer."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor, nn

from benchmarks.pipelines.choose import WIDTH, Pipeline, parse
from benchmarks.pipelines.datasets import numbers_in, rows_of
from benchmarks.pipelines.loaders import loader_of, validation_loader_of
from benchmarks.robustness.job import Job, Training

WIDE = 2**19  #: values that a large network makes of each: 16 MiB a sample in each tensor, some 40 samples in 2 GiB


class Net(pl.LightningModule):
    """Notes which samples arrive in ``training_step``, in the list that a callback begins for each batch."""

    def __init__(self, p: Pipeline) -> None:
        super().__init__()
        self.p, self.arrived = p, None
        self.state: Tensor | None = None  #: of the samples at the same places of earlier batches
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.normalize = nn.BatchNorm1d(WIDTH) if p.module == "batch_norm" else nn.Identity()
        self.scale = nn.Parameter(torch.ones(WIDE)) if p.memory == "large" else None
        self.automatic_optimization = p.module != "manual"

    def begin(self, batch: Any) -> list[int]:
        self.arrived: list[int] | None = []
        return self.arrived

    def loss(self, batch: Any) -> Tensor:
        return torch.stack([self(rows).square().mean() for rows in rows_of(batch)]).sum()

    def forward(self, rows: Tensor) -> Tensor:
        rows = rows.mean(1) if rows.dim() == 3 else rows
        hidden = self.normalize(self.body(rows)).relu()
        if self.scale is not None:
            hidden = (hidden[..., None] * self.scale).relu().mean(-1)
        return self.head(hidden)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.arrived is not None:
            on_host = move_data_to_device(batch, torch.device("cpu"))  # where a null GPU's values can be looked at
            self.arrived.extend(number for rows in rows_of(on_host) for number in numbers_in(rows))
        return self.loss(batch) + self.of_full_batches(rows_of(batch)[0])

    def of_full_batches(self, rows: Tensor) -> Any:
        """Return a term of the loss that not every number of samples can have."""
        if self.p.module == "fixed":
            return (rows.reshape(len(rows), -1)[:, :1] + rows.new_ones(self.p.batch_size, 1)).mean()
        if self.p.module == "halves":
            return (self(rows[0::2]) - self(rows[1::2])).square().mean()
        if self.p.module == "carries":
            hidden = self.body(rows)
            self.state = hidden.detach() if self.state is None else (self.state + hidden).detach()
            return self.state.mean()
        return 0.0

    def on_train_epoch_start(self) -> None:
        self.state = None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Manual(Net):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class FromIterator(Net):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(self.transfer_batch_to_device(batch, self.device, 0), batch_idx)


# ------------------------------------------------------------------------------------ what holds the batch size
class Data(pl.LightningDataModule):
    """Holds it as an attribute or hyperparameter, or not at all."""

    def __init__(self, p: Pipeline) -> None:
        super().__init__()
        self.p = p
        if p.holder == "datamodule":
            self.batch_size = p.batch_size
        if p.holder == "datamodule_hparams":
            self.save_hyperparameters({"batch_size": p.batch_size})
        if p.holder == "made_in_setup":
            self.batch_size = p.batch_size

    def setup(self, stage: str) -> None:
        if self.p.holder == "made_in_setup":
            self.loader = loader_of(self.p, self.batch_size)

    def train_dataloader(self) -> Any:
        return self.loader if self.p.holder == "made_in_setup" else loader_of(self.p, size_of(self, self.p))


class ValidatingData(Data):
    def val_dataloader(self) -> Any:
        return validation_loader_of(self.p)


WITH_DATAMODULE = ("datamodule", "datamodule_hparams", "fixed_datamodule", "made_in_setup")


def size_of(owner: Any, p: Pipeline) -> int:
    """Return the batch size that an owner holds."""
    if p.holder in ("hparams", "datamodule_hparams"):
        return int(owner.hparams.batch_size)
    if p.holder == "ratio":
        return int(owner.batch_size // 2)
    return int(getattr(owner, "batch_size", p.batch_size))


def module_of(p: Pipeline) -> Net:
    """Return the module, which makes the loader where nothing else does."""
    base = {"manual": Manual, "iterator": FromIterator}.get(p.module, Net)
    if p.holder not in (*WITH_DATAMODULE, "passed", "attribute_passed"):

        class Loading(base):  # type: ignore[misc, valid-type]
            loader: Any = None

            def train_dataloader(self) -> Any:
                return loader_of(self.p, size_of(self, self.p)) if self.loader is None else self.loader

        base = Loading
    module = base(p)
    if p.holder == "kept_loader":
        module.loader = loader_of(p, p.batch_size)
    if p.holder in ("attribute", "attribute_passed", "ratio", "kept_loader"):
        module.batch_size = p.batch_size * (2 if p.holder == "ratio" else 1)
    if p.holder == "hparams":
        module.save_hyperparameters({"batch_size": p.batch_size})
    return module


# ------------------------------------------------------------------------------------------------------------ a job
def settings_of(p: Pipeline) -> dict[str, Any]:
    """Return the flags of the Trainer."""
    stop = {
        "epochs": {"max_epochs": 2},
        "steps": {"max_epochs": -1, "max_steps": 5},
        "either": {"max_epochs": 3, "max_steps": 4},
    }[p.stop]
    return {
        **stop,
        "accumulate_grad_batches": p.accumulate,
        "limit_train_batches": p.limit,
        "val_check_interval": p.interval,
        "overfit_batches": p.overfit,
        "num_sanity_val_steps": p.sanity,
        "reload_dataloaders_every_n_epochs": p.reload,
        "check_val_every_n_epoch": p.every,
        "gradient_clip_val": p.clip or None,
        "precision": p.precision,
    }


def training_of(p: Pipeline) -> Training:
    module, data, val = module_of(p), None, None
    if p.holder in WITH_DATAMODULE:
        data = ValidatingData(p) if p.validates else Data(p)
    else:
        data = loader_of(p, p.batch_size) if p.holder in ("passed", "attribute_passed") else None
        val = validation_loader_of(p) if p.validates else None
    return Training(module, data, val, settings=settings_of(p), count=module.begin)


def job_of(text: str) -> Job:
    """Return the pipeline of a description as a job of ``benchmarks.robustness``, by the name of its description."""
    return Job(text, "pipeline", lambda: training_of(parse(text)))
