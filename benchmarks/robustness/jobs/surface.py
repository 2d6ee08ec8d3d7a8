"""Steps and hooks that read the batch size, and the Trainer's public surface."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from benchmarks.robustness.job import BATCH_SIZE, WIDTH, Bare, Net, Rows, Training, job, loader

SIZES = "steps that read the batch size"
TRAINER = "steps that read the Trainer"


class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = BATCH_SIZE) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return DataLoader(Rows(), batch_size=self.batch_size, drop_last=True)


@job(SIZES, "any")
def reads_batch_size() -> Any:
    class Reads(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch.view(self.batch_size, WIDTH)).mean()

        def train_dataloader(self) -> Any:
            return DataLoader(Rows(), batch_size=self.batch_size, drop_last=True)

    return Reads()


@job(SIZES, "any")
def reads_hparams_batch_size() -> Any:
    class Reads(Bare):
        def __init__(self, batch_size: int = BATCH_SIZE) -> None:
            super().__init__()
            self.save_hyperparameters()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch.view(self.hparams.batch_size, WIDTH)).mean()

        def train_dataloader(self) -> Any:
            return DataLoader(Rows(), batch_size=self.hparams.batch_size, drop_last=True)

    return Reads()


@job(SIZES, "any")
def reads_datamodule_batch_size() -> Any:
    class Reads(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch.view(self.trainer.datamodule.batch_size, WIDTH)).mean()

    return Training(Reads(), Data())


@job(SIZES, "any")
def reads_datamodule_hparams() -> Any:
    class Hyper(Data):
        def train_dataloader(self) -> Any:
            return DataLoader(Rows(), batch_size=self.hparams.batch_size, drop_last=True)

    class Reads(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch.view(self.trainer.datamodule.hparams["batch_size"], WIDTH)).mean()

    return Training(Reads(), Hyper())


@job(SIZES, "any")
def reads_loader_batch_size() -> Any:
    class Reads(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch.view(self.trainer.train_dataloader.batch_size, WIDTH)).mean()

    return Training(Reads(), loader(drop_last=True))


@job(SIZES, "any")
def checks_batch_against_batch_size() -> Any:
    class Checks(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch.shape[0] != self.batch_size:
                raise ValueError(f"a batch of {batch.shape[0]}, not {self.batch_size}")
            return super().training_step(batch, batch_idx)

        def train_dataloader(self) -> Any:
            return DataLoader(Rows(), batch_size=self.batch_size, drop_last=True)

    return Checks()


@job(SIZES, "any")
def recurrent_state_of_the_batch_size() -> Any:
    """Truncated backpropagation: the state of one batch is the start of the next."""

    class State(Net):
        def __init__(self) -> None:
            super().__init__()
            self.cell = torch.nn.GRUCell(WIDTH, WIDTH)

        def on_train_epoch_start(self) -> None:
            self.state = torch.zeros(self.batch_size, WIDTH, device=self.device)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.state = self.cell(batch, self.state.detach())
            return self.head(self.state).mean()

        def train_dataloader(self) -> Any:
            return DataLoader(Rows(), batch_size=self.batch_size, drop_last=True)

    return State()


@job(SIZES, "any")
def buffer_of_the_batch_size() -> Any:
    """Contrastive losses keep a mask of n x n for the batch size that they are made with."""

    class Mask(Net):
        def on_fit_start(self) -> None:
            self.mask = torch.eye(self.batch_size, device=self.device, dtype=torch.bool)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            z = self(batch)
            return (z @ z.T).masked_fill(self.mask, 0.0).logsumexp(1).mean()

        def train_dataloader(self) -> Any:
            return DataLoader(Rows(), batch_size=self.batch_size, drop_last=True)

    return Mask()


@job(SIZES)
def logs_with_batch_size() -> Any:
    class Logs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, batch_size=self.batch_size, on_epoch=True, sync_dist=True)
            return loss

    return Logs()


@job(SIZES)
def size_in_a_nested_config() -> Any:
    class Config(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.cfg = types.SimpleNamespace(data=types.SimpleNamespace(batch_size=BATCH_SIZE), lr=1e-3)

        def train_dataloader(self) -> Any:
            return DataLoader(Rows(), batch_size=self.cfg.data.batch_size)

    return Config()


@job(SIZES, "any")
def asserts_that_nothing_remains() -> Any:
    class Asserts(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert len(batch) % 2 == 0, "pairs"
            a, b = batch.chunk(2)
            return (self(a) - self(b)).square().mean()

        def train_dataloader(self) -> Any:
            return DataLoader(Rows(), batch_size=self.batch_size, drop_last=True)

    return Training(Asserts(), options={"multiple_of": 2})


# ------------------------------------------------------------------------------------------- the Trainer's surface


class Reads(Net):
    """Reads something of the Trainer in each step."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self.read = read

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.read(self.trainer)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val", self(batch).mean())

    def val_dataloader(self) -> Any:
        return DataLoader(Rows(), batch_size=BATCH_SIZE)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def reads(name: str, read: Callable[[Any], Any], **training: Any) -> None:
    job(TRAINER, name=name)(lambda: Training(Reads(read), **{k: make() for k, make in training.items()}))


reads("reads_train_dataloader", lambda t: 1 / len(t.train_dataloader))
reads("reads_dataset_of_loader", lambda t: t.train_dataloader.dataset[0].sum())
reads("reads_val_dataloaders", lambda t: 1 / len(t.val_dataloaders))
reads("reads_lr_scheduler_configs", lambda t: 1 / t.lr_scheduler_configs[0].frequency)
reads("reads_last_lr", lambda t: t.lr_scheduler_configs[0].scheduler.get_last_lr()[0] / 2)
reads("reads_num_training_batches", lambda t: t.global_step / t.num_training_batches)
reads("reads_num_val_batches", lambda t: t.num_val_batches[0] + 1)
reads("reads_estimated_stepping_batches", lambda t: t.global_step / t.estimated_stepping_batches)
reads("reads_max_epochs", lambda t: t.current_epoch / t.max_epochs)
reads("reads_optimizers", lambda t: t.optimizers[0].param_groups[0]["lr"] / 2)
reads("reads_strategy", lambda t: t.strategy.root_device.type.upper() + t.strategy.model.__class__.__name__)
reads("reads_trainer_model", lambda t: next(t.model.parameters()).device.type.upper())
reads("reads_lightning_module", lambda t: t.lightning_module.current_epoch + 1)
reads("reads_fit_loop", lambda t: t.fit_loop.epoch_loop.batch_idx + t.fit_loop.epoch_loop.batch_progress.current.ready)
reads("reads_is_last_batch", lambda t: int(t.is_last_batch) + int(t.fit_loop.epoch_loop.batch_progress.is_last_batch))
reads("reads_callback_metrics", lambda t: t.callback_metrics.get("val", torch.tensor(0.0)).item())
reads("reads_state", lambda t: (t.state.fn.value.upper(), t.state.stage.value.upper(), 1 / t.training))
reads("reads_precision", lambda t: (t.precision.upper(), t.accumulate_grad_batches + 1, t.gradient_clip_val))
reads("reads_devices", lambda t: (t.num_devices + t.num_nodes + t.global_rank, t.device_ids[0] + 1, t.world_size))
reads("reads_root_folder", lambda t: Path(t.default_root_dir) / "a")
reads("reads_limits", lambda t: (t.limit_train_batches + 1, t.check_val_every_n_epoch + 1, t.val_check_batch + 1))
reads("reads_interrupted_and_stops", lambda t: t.interrupted or t.should_stop)
reads("prints_and_profiles", lambda t: (t.print("a step"), t.profiler.profile("a").__enter__()))
reads("reads_progress_bar_metrics", lambda t: (dict(t.progress_bar_metrics), dict(t.logged_metrics), t.log_dir))
reads("reads_enable_validation", lambda t: (t.enable_validation and 1, t.evaluating, t.sanity_checking))
reads(
    "reads_csv_logger",
    lambda t: (t.logger.log_dir.upper(), t.loggers[0].name.upper(), t.logger.version + 1, t.log_dir.upper()),
    settings=lambda: {"logger": CSVLogger("logs")},
)
reads(
    "reads_tensorboard_experiment",
    lambda t: t.logger.experiment.add_histogram("w", torch.ones(3), t.global_step),
    settings=lambda: {"logger": TensorBoardLogger("logs")},
)
reads(
    "reads_checkpoint_callback",
    lambda t: (t.checkpoint_callback.best_model_path.upper(), t.checkpoint_callback.save_top_k + 1),
    settings=lambda: {"enable_checkpointing": True, "logger": CSVLogger("logs")},
)
reads(
    "reads_callbacks",
    lambda t: next(c for c in t.callbacks if isinstance(c, ModelCheckpoint)).every_n_epochs,
    callbacks=lambda: [ModelCheckpoint("checkpoints")],
    settings=lambda: {"enable_checkpointing": True},
)
reads(
    "reads_learning_rate_monitor",
    lambda t: next(c for c in t.callbacks if isinstance(c, LearningRateMonitor)).logging_interval.upper(),
    callbacks=lambda: [LearningRateMonitor("step")],
    settings=lambda: {"logger": CSVLogger("logs")},
)


@job(TRAINER)
def stops_through_the_trainer() -> Any:
    class Stops(Net):
        def on_train_epoch_end(self) -> None:
            self.trainer.should_stop = self.current_epoch == 1

    return Stops()


@job(TRAINER)
def reads_data_through_the_trainer() -> Any:
    class Class(Data):
        weights = torch.ones(3)

        def setup(self, stage: str) -> None:
            self.mean = torch.zeros(WIDTH)

    class Weights(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            data = self.trainer.datamodule
            return (self(batch - data.mean.to(batch)) * data.weights.to(batch)).square().mean()

    return Training(Weights(), Class())


@job(TRAINER)
def schedules_by_own_modules_properties() -> Any:
    class Own(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            warm = min(1.0, (self.global_step + 1) / 3) * (self.current_epoch + 1) * (self.global_rank + 1)
            lr = self.optimizers().param_groups[0]["lr"]
            self.lr_schedulers().get_last_lr()
            return super().training_step(batch, batch_idx) * warm * lr

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    return Own()


@job(TRAINER)
def optimizer_over_trainer_model() -> Any:
    class Template(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.trainer.model.parameters())

    return Template()


@job(TRAINER)
def optimizer_over_strategy_model() -> Any:
    class Template(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.trainer.strategy.model.parameters())
            total = self.trainer.estimated_stepping_batches
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total)}

    return Template()


@job(TRAINER)
def optimizer_over_lightning_module() -> Any:
    class Template(Net):
        def configure_optimizers(self) -> Any:
            groups = [{"params": [p], "lr": 1e-3} for p in self.trainer.lightning_module.parameters()]
            return torch.optim.AdamW(groups)

    return Template()
