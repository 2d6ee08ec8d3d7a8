"""Training steps of every signature and every return value; logging; metrics."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from benchmarks.robustness.job import Bare, Net, Rows, Training, job, loader

SIGNATURES = "signatures and return values of the step"
METRICS = "metrics and logging"


@job(SIGNATURES)
def without_batch_idx() -> Any:
    class Short(Net):
        def training_step(self, batch: Any) -> Any:
            return self(batch).mean()

    return Short()


@job(SIGNATURES, "any")
def takes_dataloader_iter() -> Any:
    class Takes(Bare):
        def training_step(self, dataloader_iter: Any) -> Any:
            batch, _, _ = next(dataloader_iter)
            return self(batch.to(self.device)).mean()

    return Training(Takes(), loader(), count=lambda batch: 0)


@job(SIGNATURES)
def with_keyword_arguments() -> Any:
    class Keywords(Net):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            return self(args[0]).mean()

    return Keywords()


@job(SIGNATURES)
def returns_none_at_times() -> Any:
    class Nothing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 3 == 1 else self(batch).mean()

    return Nothing()


@job(SIGNATURES)
def returns_none_first() -> Any:
    class Nothing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if self.global_step == 0 and batch_idx == 0 else self(batch).mean()

    return Nothing()


@job(SIGNATURES)
def returns_none_always() -> Any:
    class Nothing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self(batch)

    return Nothing()


@job(SIGNATURES)
def returns_a_dictionary() -> Any:
    class Dictionary(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            out = self(batch)
            return {"loss": out.mean(), "out": out.detach(), "text": ["a"] * len(batch), "none": None}

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert len(outputs["out"]) == len(batch)

    return Dictionary()


@job(SIGNATURES, "any")
def skips_epochs_by_minus_one() -> Any:
    class Skips(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if self.current_epoch == 1 and batch_idx == 0 else None

    return Skips()


@job(SIGNATURES, "any")
def skips_the_rest_from_the_start() -> Any:
    class Skips(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1

    return Skips()


@job(SIGNATURES)
def loss_of_one_element() -> Any:
    class One(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch).mean().reshape(1)

    return One()


@job(SIGNATURES)
def step_is_a_function_attribute() -> Any:
    net = Net()
    plain = Net.training_step

    class Assigned(Net):
        training_step = lambda self, batch, batch_idx: plain(self, batch, batch_idx) * 2  # noqa: E731

    del net
    return Assigned()


@job(SIGNATURES)
def step_in_a_mixin_with_decorators() -> Any:
    import functools

    def timed(function: Any) -> Any:
        @functools.wraps(function)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            return function(self, *args, **kwargs)

        return call

    class Mixin:
        @timed
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.shared_step(batch, "train")  # type: ignore[attr-defined]

    class Mixed(Mixin, Net):
        def shared_step(self, batch: Any, stage: str) -> Any:
            loss = self(batch).mean()
            self.log(f"{stage}/loss", loss, prog_bar=True)
            return loss

    return Mixed()


@job(SIGNATURES)
def loss_through_forward_of_a_wrapped_module() -> Any:
    class Outer(Net):
        """A LightningModule inside another one."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = Bare()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.inner.training_step(batch, batch_idx)

    return Outer()


@job(SIGNATURES)
def several_losses_by_turns() -> Any:
    class Turns(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            out = self(batch)
            return out.mean() if batch_idx % 2 else out.square().mean() + self.body(batch).abs().mean()

    return Turns()


@job(SIGNATURES)
def curriculum_grows_with_epochs() -> Any:
    class Grows(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            length = 2 + 2 * self.current_epoch
            return self(batch[:, None].expand(-1, length, -1)).mean()

    return Grows()


@job(SIGNATURES)
def unfreezes_in_the_second_epoch() -> Any:
    class Unfreezes(Net):
        def on_train_epoch_start(self) -> None:
            self.body.requires_grad_(self.current_epoch > 0)

    return Unfreezes()


@job(SIGNATURES)
def example_input_and_graph() -> Any:
    class Example(Net):
        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = torch.ones(2, 16)

    logger = TensorBoardLogger("logs", log_graph=True)
    return Training(Example(), settings={"logger": logger, "enable_model_summary": True})


# ------------------------------------------------------------------------------------------------------- metrics


class Classes(Net):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(3)
        self.losses = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits, labels = self(batch), batch.sum(1).long() % 3
        loss = nn.functional.cross_entropy(logits, labels)
        self.accuracy(logits, labels)
        self.losses.update(loss)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("losses", self.losses.compute())
        self.losses.reset()


@job(METRICS)
def torchmetrics_logged() -> Any:
    return Training(Classes(), settings={"logger": CSVLogger("logs"), "log_every_n_steps": 1})


@job(METRICS)
def torchmetrics_collection() -> Any:
    class Collected(Classes):
        def __init__(self) -> None:
            super().__init__()
            kept = MetricCollection({"a": MulticlassAccuracy(3), "m": MulticlassF1Score(3)})
            self.metrics = nn.ModuleDict({"t": kept.clone(prefix="train/"), "v": kept.clone(prefix="val/")})

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.metrics["t"].update(self(batch), batch.sum(1).long() % 3)
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            self.metrics["t"].compute()
            self.metrics["t"].reset()

    return Collected()


@job(METRICS)
def metric_in_a_plain_list() -> Any:
    class Listed(Classes):
        def __init__(self) -> None:
            super().__init__()
            self.plain = [MeanMetric()]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.plain[0].update(loss.detach().cpu())
            return loss

    return Listed()


@job(METRICS)
def metric_that_keeps_all_outputs() -> Any:
    class Keeps(Net):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[Any] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            out = self(batch)
            self.kept.append(out.detach())
            return out.mean()

        def on_train_epoch_end(self) -> None:
            self.log("mean", torch.cat(self.kept).mean())
            self.kept.clear()

    return Keeps()


@job(METRICS)
def logs_everything() -> Any:
    class Logs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self(batch).mean()
            self.log("a", loss, on_step=True, on_epoch=True, reduce_fx="max", prog_bar=True, logger=True)
            self.log_dict({"b": loss.item(), "c": 1.0}, batch_size=len(batch))
            self.print("a step")
            self.logger.log_metrics({"d": 1.0}, self.global_step)
            self.logger.experiment.add_text("text", "a", self.global_step)
            self.log("g", self.all_gather(loss).mean())
            return loss

    return Training(Logs(), settings={"logger": TensorBoardLogger("logs"), "log_every_n_steps": 1})


@job(METRICS)
def logs_figures() -> Any:
    class Figures(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            import matplotlib.pyplot as plt

            figure, axes = plt.subplots()
            axes.plot(batch[0].cpu().numpy())
            self.logger.experiment.add_figure("batch", figure, self.global_step)

    return Training(Figures(), settings={"logger": TensorBoardLogger("logs")})


@job(METRICS)
def own_logger() -> Any:
    class Own(pl.loggers.logger.Logger):
        name, version = "own", 0

        def __init__(self) -> None:
            super().__init__()
            self.rows: list[Any] = []

        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            self.rows.append((step, dict(metrics)))

        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
            self.params = params

    return Training(Classes(), settings={"logger": Own(), "log_every_n_steps": 1})


@job(METRICS)
def reads_what_the_logger_keeps() -> Any:
    class Reads(Classes):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert Path(self.logger.log_dir).name.startswith("version")
            assert Path(self.trainer.log_dir or ".").exists() or self.global_step == 0
            return super().training_step(batch, batch_idx)

    from pathlib import Path

    return Training(Reads(), settings={"logger": CSVLogger("logs")})


@job(METRICS)
def hyperparameters_with_a_function() -> Any:
    class Hyper(Bare):
        def __init__(self, loss: Any, batch_size: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return loader(Rows(), self.hparams.batch_size)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.hparams.loss(self(batch))

    return Training(Hyper(torch.mean), settings={"logger": CSVLogger("logs")})
