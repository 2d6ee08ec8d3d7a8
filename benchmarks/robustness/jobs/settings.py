"""Flags of the Trainer, and what is done before and after a fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from benchmarks.robustness.job import Net, Rows, Training, fit, job

FLAGS = "flags of the Trainer"
PRECISION = "precisions"
RUNS = "several runs: fit, test, validate, resume"


class Tested(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val", self(batch).mean())

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("test", self(batch).mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch)

    def val_dataloader(self) -> Any:
        return DataLoader(Rows(12), batch_size=4)

    test_dataloader = predict_dataloader = val_dataloader


def flags(name: str, kind: str = FLAGS, samples: Any = "same", **settings: Any) -> None:
    job(kind, samples, name=name)(lambda: Training(Tested(), settings=copy.deepcopy(settings)))


flags("barebones", barebones=True, logger=None, enable_checkpointing=None)
flags("overfit_batches", overfit_batches=2, samples="any")
flags("overfit_a_part", overfit_batches=0.5, samples="any")
flags("limit_train_batches", limit_train_batches=3, samples="any")
flags("limit_train_part", limit_train_batches=0.5, samples="any")
flags("limit_train_to_none", limit_train_batches=0)
flags("limit_val_batches", limit_val_batches=0)
flags("max_steps", max_steps=7, samples="any")
flags("max_time", max_time={"minutes": 10})
flags("min_epochs_and_steps", min_epochs=1, min_steps=2)
flags("no_epochs", max_epochs=0)
flags("one_epoch_in_minus_one_epochs", max_epochs=-1, max_steps=4, samples="any")
flags("val_check_interval", val_check_interval=2)
flags("val_check_part", val_check_interval=0.5)
flags("val_check_longer_than_the_epoch", val_check_interval=9, check_val_every_n_epoch=None)
flags("validates_every_second_epoch", check_val_every_n_epoch=2)
flags("reload_every_epoch", reload_dataloaders_every_n_epochs=1)
flags("sanity_check", num_sanity_val_steps=2)
flags("sanity_check_of_everything", num_sanity_val_steps=-1)
flags("detect_anomaly", detect_anomaly=True)
flags("deterministic", deterministic=True)
flags("deterministic_by_warning", deterministic="warn", benchmark=True)
flags("simple_profiler", profiler="simple")
flags("advanced_profiler", profiler="advanced")
flags("accumulate", accumulate_grad_batches=2)
flags("accumulate_more_than_the_epoch", accumulate_grad_batches=8)
flags("fast_dev_run", fast_dev_run=True, samples="any")
flags("logger_of_every_step", logger=True, log_every_n_steps=1)
flags("several_loggers", logger=[CSVLogger("a"), TensorBoardLogger("b")], log_every_n_steps=1)
flags("checkpoints", enable_checkpointing=True)
flags("no_distributed_sampler", use_distributed_sampler=False, sync_batchnorm=True)
flags("inference_mode_off", inference_mode=False)
flags("model_summary_and_progress", enable_model_summary=True, enable_progress_bar=True)
flags("one_device_by_strategy", strategy="ddp")
flags("device_by_index", devices=[0], strategy="auto")
flags("on_the_cpu", accelerator="cpu")
flags("default_folder", default_root_dir="elsewhere", logger=True)

flags("half_mixed", PRECISION, precision="16-mixed")
flags("bfloat16_mixed", PRECISION, precision="bf16-mixed")
flags("half_true", PRECISION, precision="16-true")
flags("bfloat16_true", PRECISION, precision="bf16-true")
flags("half_mixed_with_clipping", PRECISION, precision="16-mixed", gradient_clip_val=1.0, accumulate_grad_batches=2)


@job(PRECISION)
def own_grad_scaler() -> Any:
    from pytorch_lightning.plugins import MixedPrecision

    plugin = MixedPrecision("16-mixed", "cuda", scaler=torch.amp.GradScaler("cuda", init_scale=8.0))
    return Training(Tested(), settings={"plugins": [plugin]})


@job(PRECISION)
def matmul_precision_and_tf32() -> Any:
    class High(Tested):
        def on_fit_start(self) -> None:
            torch.set_float32_matmul_precision("high")

        def on_fit_end(self) -> None:
            torch.set_float32_matmul_precision("highest")

    return High()


@job(PRECISION)
def float64_loss_in_half() -> Any:
    class Mixed(Tested):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with torch.autocast("cuda", enabled=False):
                return self.head(self.body(batch).float()).double().square().mean().float()

    return Training(Mixed(), settings={"precision": "bf16-mixed"})


# ---------------------------------------------------------------------------------------------------------- runs


def afresh(module: Any, more: Any, **settings: Any) -> pl.Trainer:
    return Training(module, settings=settings).trainer(more)


@job(RUNS, "any")
def fitted_twice() -> Any:
    def twice(trainer: Any, training: Any) -> None:
        fit(trainer, training)
        trainer.fit_loop.max_epochs = 4
        fit(trainer, training)

    return Training(Tested(), fit=twice)


@job(RUNS)
def fitted_by_two_trainers() -> Any:
    def run(more: Any) -> Any:
        module = Tested()
        for _ in range(2):
            trainer = afresh(module, more)
            trainer.fit(module)
        return trainer

    return Training(run=run)


@job(RUNS)
def two_modules_one_trainer() -> Any:
    def both(trainer: Any, training: Any) -> None:
        trainer.fit(Tested())
        trainer.fit_loop.max_epochs = 4
        trainer.fit(Net())

    return Training(Tested(), fit=both)


@job(RUNS)
def tested_first() -> Any:
    def run(trainer: Any, training: Any) -> None:
        trainer.test(training.module, verbose=False)
        trainer.validate(training.module, verbose=False)
        fit(trainer, training)
        trainer.test(training.module, verbose=False)
        trainer.predict(training.module)

    return Training(Tested(), fit=run)


@job(RUNS)
def validates_in_a_hook() -> Any:
    class Validates(Tested):
        def on_train_start(self) -> None:
            self.trainer.validate_loop.run if self.trainer.state.fn == "fit" else None  # noqa: B018

    return Validates()


@job(RUNS, "more")
def resumes_a_checkpoint() -> Any:
    def run(trainer: Any, training: Any) -> None:
        first = Tested()
        writer = Training(first, settings={"max_epochs": 1}).trainer()
        writer.fit(first)
        writer.save_checkpoint("first.ckpt")
        fit(trainer, training, ckpt_path="first.ckpt", weights_only=False)

    return Training(Tested(), fit=run)


@job(RUNS, "any")
def resumes_in_the_middle_of_an_epoch() -> Any:
    def run(trainer: Any, training: Any) -> None:
        first = Tested()
        writer = Training(first, settings={"max_steps": 3}).trainer()
        writer.fit(first)
        writer.save_checkpoint("first.ckpt")
        fit(trainer, training, ckpt_path="first.ckpt", weights_only=False)

    return Training(Tested(), fit=run)


@job(RUNS)
def resumes_its_own_checkpoint() -> Any:
    def run(more: Any) -> Any:
        for epochs in (1, 2):
            module = Tested()
            trainer = afresh(module, more, max_epochs=epochs, enable_checkpointing=True, default_root_dir="runs")
            trainer.fit(module, ckpt_path="last.ckpt" if Path("last.ckpt").exists() else None, weights_only=False)
            trainer.save_checkpoint("last.ckpt")
        return trainer

    return Training(run=run)


@job(RUNS)
def weights_loaded_before_training() -> Any:
    torch.save({"state_dict": Tested().state_dict()}, "weights.ckpt")
    module = Tested()
    module.load_state_dict(torch.load("weights.ckpt")["state_dict"])
    return module


@job(RUNS, "any")
def grid_of_learning_rates() -> Any:
    def run(more: Any) -> Any:
        for lr in (0.1, 0.01):
            module = Tested()
            module.configure_optimizers = lambda m=module, lr=lr: torch.optim.SGD(m.parameters(), lr=lr)
            trainer = afresh(module, more)
            trainer.fit(module)
        return trainer

    return Training(run=run)


@job(RUNS)
def cross_validation() -> Any:
    def run(more: Any) -> Any:
        for fold in range(3):
            module = Tested()
            trainer = afresh(module, more)
            trainer.fit(module, DataLoader(Rows(16 + fold), batch_size=4))
        return trainer

    return Training(run=run)


@job(RUNS)
def trained_inside_a_function_with_no_gradient() -> Any:
    def run(trainer: Any, training: Any) -> None:
        with torch.no_grad(), torch.enable_grad():
            fit(trainer, training)

    return Training(Tested(), fit=run)


@job(RUNS)
def module_is_on_the_gpu_already() -> Any:
    return Tested().cuda()


@job(RUNS)
def module_was_trained_by_hand_before() -> Any:
    module = Tested()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.ones(4, 16)).mean().backward()
    optimizer.step()
    return module


@job(RUNS)
def module_is_in_evaluation_mode() -> Any:
    return Tested().eval()


@job(RUNS)
def from_the_command_line() -> Any:
    from pytorch_lightning.cli import LightningCLI

    def run(more: Any) -> Any:
        defaults = Training(settings={"callbacks": list(more)})
        settings = {"accelerator": "gpu", "devices": 1, "max_epochs": 2, "logger": False, "enable_progress_bar": False}
        del defaults
        return LightningCLI(
            Tested,
            args=["fit"],
            save_config_callback=None,
            trainer_defaults={**settings, "callbacks": list(more), "enable_checkpointing": False},
        ).trainer

    return Training(run=run)


@job(RUNS)
def other_distribution() -> Any:
    import lightning.pytorch as lp

    class Other(lp.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(16, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def run(more: Any) -> Any:
        ours = [each for each in more if isinstance(each, lp.Callback)]
        trainer = lp.Trainer(
            accelerator="gpu", devices=1, max_epochs=2, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=ours,
        )  # fmt: skip
        trainer.fit(Other(), DataLoader(Rows(), batch_size=4))
        return trainer

    return Training(run=run)
