"""Callbacks beside the planner: Lightning's own, and those that people write."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import callbacks as plc
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.robustness.job import WIDTH, Net, Rows, Training, job

LIGHTNING = "Lightning's callbacks"
OWN = "callbacks with state of their own"


class Validated(Net):
    """Validates, and logs what callbacks monitor."""

    lr = 1e-3

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val", self(batch).mean())

    def val_dataloader(self) -> Any:
        return DataLoader(Rows(8), batch_size=4)


def beside(name: str, make: Callable[[], Any], kind: str = LIGHTNING, samples: Any = "same", **settings: Any) -> None:
    def training() -> Training:
        made = make()
        return Training(
            Validated(), callbacks=made if isinstance(made, list) else [made], settings=copy.deepcopy(settings)
        )

    job(kind, samples, name=name)(training)


CHECKPOINTS = {"enable_checkpointing": True}
beside("early_stopping", lambda: plc.EarlyStopping("val", patience=5))
beside("early_stopping_on_training", lambda: plc.EarlyStopping("loss", check_on_train_epoch_end=True))
beside("model_checkpoint", lambda: plc.ModelCheckpoint("c", monitor="val", save_top_k=2, save_last=True), **CHECKPOINTS)
beside("checkpoint_every_steps", lambda: plc.ModelCheckpoint("c", every_n_train_steps=2, save_top_k=-1), **CHECKPOINTS)
beside("accumulation_scheduler", lambda: plc.GradientAccumulationScheduler({0: 2, 1: 1}))
beside("weight_averaging_by_swa", lambda: plc.StochasticWeightAveraging(1e-2, swa_epoch_start=1))
beside("weight_averaging_by_ema", lambda: plc.EMAWeightAveraging(decay=0.9))
beside("learning_rate_monitor", lambda: plc.LearningRateMonitor("step"), logger=CSVLogger("logs"))
beside("device_stats", plc.DeviceStatsMonitor, logger=CSVLogger("logs"))
beside("model_summary", lambda: plc.ModelSummary(2), enable_model_summary=True)
beside("progress_bar", lambda: plc.TQDMProgressBar(2), enable_progress_bar=True)
beside("rich_progress_bar", plc.RichProgressBar, enable_progress_bar=True)
beside("timer", lambda: plc.Timer(duration="00:01:00:00"))
beside("lambda_callback", lambda: plc.LambdaCallback(on_train_start=lambda trainer, module: module.train()))
beside("model_pruning", lambda: plc.ModelPruning("random_unstructured", use_global_unstructured=False, amount=0.5))
beside("learning_rate_finder", lambda: plc.LearningRateFinder(num_training_steps=3), samples="more")
beside("batch_size_finder", lambda: plc.BatchSizeFinder(max_trials=2), samples="more", accelerator="gpu")
beside("on_exception_checkpoint", lambda: plc.OnExceptionCheckpoint("e"), **CHECKPOINTS)
beside(
    "throughput",
    lambda: plc.ThroughputMonitor(batch_size_fn=len, window_size=2),
    logger=CSVLogger("logs"),
    log_every_n_steps=1,
)


@job(LIGHTNING)
def backbone_finetuning() -> Any:
    class Backbone(Validated):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))

        def forward(self, x: Any) -> Any:
            return super().forward(self.backbone(x))

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=1e-3)

    return Training(Backbone(), callbacks=[plc.BackboneFinetuning(unfreeze_backbone_at_epoch=1)])


@job(LIGHTNING)
def own_finetuning() -> Any:
    class Finetuning(plc.BaseFinetuning):
        def freeze_before_training(self, module: Any) -> None:
            self.freeze(module.body)

        def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.body, optimizer, lr=1e-4)

    class Filtered(Validated):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(filter(lambda p: p.requires_grad, self.parameters()), lr=1e-3)

    return Training(Filtered(), callbacks=[Finetuning()])


@job(LIGHTNING)
def callbacks_of_the_module() -> Any:
    class Configures(Validated):
        def configure_callbacks(self) -> Any:
            return [plc.EarlyStopping("val"), plc.ModelCheckpoint("c", monitor="val")]

    return Training(Configures(), settings=CHECKPOINTS)


# ----------------------------------------------------------------------------------------------------------- own


class Average(pl.Callback):
    """A moving average of the weights, swapped in for validation."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.average = copy.deepcopy(pl_module.state_dict())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for name, value in pl_module.state_dict().items():
            self.average[name].lerp_(value, 0.1)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.kept = copy.deepcopy(pl_module.state_dict())
        pl_module.load_state_dict(self.average)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.load_state_dict(self.kept)


class AddsHead(pl.Callback):
    """Gives the module a part that the step needs."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.extra = nn.Linear(3, 2)


class Freezes(pl.Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.body.requires_grad_(trainer.current_epoch > 0)


class Counts(pl.Callback):
    """Counts, and asserts that training alone calls it."""

    def __init__(self) -> None:
        self.steps = self.starts = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.starts += 1
        assert self.starts == 1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert self.steps == trainer.global_step

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1

    def state_dict(self) -> Any:
        return {"steps": self.steps}


class ChangesBatch(pl.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        batch.mul_(0.5)


class ReadsGradients(pl.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for name, p in pl_module.named_parameters():
            trainer.logger.experiment.add_histogram(name, p.grad, trainer.global_step)


class WritesPredictions(pl.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        with Path("losses.txt").open("a") as file:
            file.write(f"{float(outputs['loss'])}\n")


class KeepsTrainer(pl.Callback):
    """Keeps the Trainer and the module, as reporters do."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.trainer, self.module, self.lock = trainer, pl_module, __import__("threading").Lock()
        pl_module.reporter = self


class ReplacesLayer(pl.Callback):
    """Swaps a layer for another before training, as adapters and quantizers do."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            pl_module.body.weight.copy_(torch.eye(WIDTH))
        pl_module.body.register_forward_hook(lambda module, args, out: out + 0.0)


beside("moving_average_of_weights", Average, OWN)
beside("adds_a_part_to_the_module", AddsHead, OWN)
beside("freezes_by_epoch", Freezes, OWN)
beside("counts_and_asserts", Counts, OWN)
beside("changes_the_batch_in_place", ChangesBatch, OWN)
beside("histograms_of_gradients", ReadsGradients, OWN, logger=TensorBoardLogger("logs"))
beside("writes_losses", WritesPredictions, OWN)
beside("keeps_the_trainer_on_the_module", KeepsTrainer, OWN)
beside("hooks_a_layer_at_the_start", ReplacesLayer, OWN)
beside("several_at_once", lambda: [Average(), Counts(), plc.EarlyStopping("val"), WritesPredictions()], OWN)


@job(OWN)
def callback_makes_a_layer_that_the_step_uses() -> Any:
    class Uses(Validated):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.extra(self(batch)).mean()

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("val", self.extra(self(batch)).mean())

    return Training(Uses(), callbacks=[AddsHead()])


@job(OWN)
def callback_gives_an_attribute_at_the_start() -> Any:
    class Gives(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.scale = 0.5

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.temperature = 1.0 + trainer.current_epoch

    class Uses(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * self.scale / self.temperature

    return Training(Uses(), callbacks=[Gives()])


@job(OWN)
def callback_finishes_the_batch() -> Any:
    class Finishes(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            batch["y"] = batch["x"].sum(1)

    class Dicts(Rows):
        def __getitem__(self, index: int) -> Any:
            return {"x": torch.ones(WIDTH)}

    class Uses(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self(batch["x"]).mean(1) - batch["y"]).square().mean()

        def train_dataloader(self) -> Any:
            return DataLoader(Dicts(), batch_size=self.batch_size)

    return Training(Uses(), callbacks=[Finishes()])
