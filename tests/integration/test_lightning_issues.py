"""Lightning's issues, by their numbers (docs/lightning_issues.md): what BatchSizeFinder does, and MemoryPlanner.

Checked with pytorch-lightning 2.6: where a later one mends an issue, the half of its test that shows BatchSizeFinder
fails, and the table is to be changed.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BatchSizeFinder
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

import lightning_memplan as mp
from lightning_memplan.lightning.trainer import averaging_bytes
from lightning_memplan.probe.out_of_memory import ran_out_of_memory
from tests.paths import PROGRAMS, ROOT

CARD = mp.Device("a card", total=2**30)


class Net(pl.LightningModule):
    """A module and its data: ``seen`` are the batch sizes of steps, ``fails`` is what a step does."""

    def __init__(self, fails: Any = lambda size: None, batch_size: int = 3) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 3)
        self.fails, self.batch_size = fails, batch_size
        self.seen: list[int] = []
        self.validated: list[int] = []
        self.settings: list[tuple[Any, ...]] = []
        self.files: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if isinstance(self.trainer, pl.Trainer):  # no copy
            self.seen.append(len(batch))
            self.settings.append(settings_of(self.trainer))
            self.files += os.listdir()
        self.fails(len(batch))
        return self.layer(batch).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(len(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(100, 8), batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(torch.ones(100, 8), batch_size=self.batch_size)


def settings_of(trainer: pl.Trainer) -> tuple[Any, ...]:
    steps = trainer.fit_loop.epoch_loop.max_steps
    return trainer.limit_train_batches, trainer.limit_val_batches, steps, len(trainer.callbacks)


def out_of_memory_over(most: int, text: str = "CUDA out of memory.") -> Any:
    def fails(size: int) -> None:
        if size > most:
            raise RuntimeError(text)

    return fails


def planner_of(**kwargs: Any) -> mp.MemoryPlanner:
    return mp.MemoryPlanner(
        **{"apply": True, "on_error": "raise", "device": CARD, "method": "trace", "max_batch_size": 40, **kwargs}
    )


def fit(module: Net, *callbacks: Any, data: Any = None, **settings: Any) -> pl.Trainer:
    """One epoch, on the CPU."""
    common = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    common |= {"accelerator": "cpu", "logger": False, "max_epochs": 1, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(callbacks=list(callbacks), **{**common, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data)
    return trainer


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gc.freeze()  # the finder collects garbage at each trial, which takes half a second in a process of many tests
    yield tmp_path
    gc.unfreeze()


def test_20994_19789_distributed_strategies():
    """Two ranks train with what the planner sets in test_ddp.py."""
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    with pytest.raises(MisconfigurationException, match="not supported with distributed strategies"):
        BatchSizeFinder().setup(trainer, Net(), "fit")


def test_11604_loaders_passed_to_fit():
    loader = DataLoader(torch.ones(100, 8), batch_size=3)
    with pytest.raises(MisconfigurationException, match="cannot be used with dataloaders passed directly"):
        fit(Net(), BatchSizeFinder(), data=loader)
    module = Net()
    fit(module, planner_of(), data=loader)
    assert (module.seen, loader.batch_size) == ([40, 40, 20], 3)


def test_13856_files(folder):
    module = Net(out_of_memory_over(0))
    with pytest.raises(ValueError, match="batch_size should be a positive integer value, but got batch_size=0"):
        fit(module, BatchSizeFinder())
    (left,) = os.listdir(folder)
    assert left.startswith(".scale_batch_size_")
    (folder / left).unlink()

    module = Net()
    fit(module, BatchSizeFinder())
    assert module.files  # while it measures

    module = Net(out_of_memory_over(0))
    with pytest.raises(mp.TraceError, match=r"the step failed in a trace \(RuntimeError: CUDA out of memory\.\)"):
        fit(module, planner_of())
    module = Net()
    fit(module, planner_of())
    assert module.files == os.listdir(folder) == []


def test_18426_more_samples_than_the_dataset_has():
    module = Net()
    fit(module, finder := BatchSizeFinder())
    assert (finder.optimal_batch_size, module.batch_size, max(module.seen)) == (128, 128, 100)
    module, planner = Net(), planner_of(max_batch_size=None)
    fit(module, planner)
    assert (module.batch_size, planner.plan.limited_by, module.seen) == (100, "dataset", [100])


@pytest.fixture(scope="module")
def shown(nullgpu):
    source, script = str(Path(mp.__file__).parents[1]), str(PROGRAMS / "lightning_issues_cases.py")
    done = nullgpu([sys.executable, script], PYTHONPATH=source, NULLGPU_MEMORY=3 * 10**9)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("SHOWN "))
    return json.loads(line[6:])


@pytest.mark.slow
def test_8028_9625_20231_20447_21154_memory_runs_out_after_it_succeeded(shown):
    """At a size of which three steps had run, and at two that were never run: at ``max_val`` and at ``max_trials``."""
    for name, size, runs in (("of the first", 1024, 5), ("up to max_val", 2048, 1), ("in one trial", 4096, 1)):
        found = shown[f"finder, {name}"]
        assert (found["batch_size"], found["error"]) == (size, "OutOfMemoryError")
        assert [seen for seen, _ in found["seen"]].count(size) == runs  # the last is training's own
    for name in ("planner, of the largest", "planner"):
        found = shown[name]
        assert (found["error"], found["refused"]) == ("", 0)  # nor was the allocator refused memory on the way
        assert sum(size for size, _ in found["seen"]) == 5_000
    assert shown["planner, of the largest"]["seen"][-2] == [shown["planner, of the largest"]["batch_size"], 256]


def test_a_size_that_it_never_ran():
    """Also where it doubles up to ``max_val``, halves at ``max_trials``, or begins: with the user's own size."""
    module = Net()
    fit(module, BatchSizeFinder(max_val=8))
    assert module.batch_size == 8
    assert module.seen[:6] == [3, 3, 3, 4, 4, 4]  # the user's size in the place of 2; and then 8 is training's own
    assert module.seen[6:] == [8] * 12 + [4]
    module = Net(out_of_memory_over(10))
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        fit(module, BatchSizeFinder(max_trials=2, init_val=64))
    assert module.seen == [3, 3, 3, 100, 100]  # the size that it set had run out of memory before


def test_memory_that_a_single_sample_lacks():
    with pytest.raises(ValueError, match="batch_size should be a positive integer value"):
        fit(Net(out_of_memory_over(0)), BatchSizeFinder())
    with pytest.raises(mp.DoesNotFitError, match="Net does not fit on a card at batch size 1"):
        fit(Net(), planner_of(device=mp.Device("a card", total=1)))


def test_6819_cublas_status_alloc_failed():
    text = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_ALLOC_FAILED") as caught:
        fit(Net(out_of_memory_over(10, text)), BatchSizeFinder())
    assert ran_out_of_memory(caught.value)  # and the plan shrinks: test_a_library_that_cannot_allocate


class Sizes(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.batch_size, self.val_size = 2, 3

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(100, 8), batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(torch.ones(100, 8), batch_size=self.val_size)


def test_20562_9219_9832_validation_has_its_own_size():
    data = Sizes()
    fit(Net(), BatchSizeFinder(), data=data)
    assert (data.batch_size, data.val_size) == (128, 3)
    data, module = Sizes(), Net()
    fit(module, planner_of(batch_arg_name={"val": "val_size"}, effective_batch_size=20), data=data)
    assert (data.batch_size, data.val_size, module.validated) == (20, 40, [40, 40, 20])


def test_17393_accumulation():
    trainer = fit(Net(), BatchSizeFinder(max_val=16))
    assert trainer.accumulate_grad_batches == 1
    trainer = fit(module := Net(), planner_of(max_batch_size=16, effective_batch_size=50))
    assert (module.batch_size, trainer.accumulate_grad_batches, trainer.global_step) == (10, 5, 2)


def test_18834_settings_of_the_trainer():
    """Limits, also ``limit_val_batches=0``, and callbacks, averaged weights among them, while it measures."""
    set_by_the_user = {"limit_train_batches": 2, "limit_val_batches": 0, "max_steps": 50}
    trainer = fit(module := Net(), BatchSizeFinder(), **set_by_the_user)
    asked_for = (2, 0, 50, len(trainer.callbacks))
    assert set(module.settings) == {asked_for, (1.0, 3, 3, 0)}
    assert module.validated != []
    trainer = fit(module := Net(), planner_of(), **set_by_the_user)
    assert set(module.settings) == {asked_for}
    assert module.validated == []


def test_callbacks_are_counted():
    """The finder measures without them; a copy of the weights is part of a plan."""
    average = pl.callbacks.EMAWeightAveraging(device="cuda")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[average])
    assert averaging_bytes(trainer, Net) == 4 * (8 * 3 + 3)


def test_a_schedule_is_that_of_the_size():
    """OneCycleLR over all steps: of the size of before, or of the size that was found."""

    class Cycles(Net):
        def configure_optimizers(self) -> Any:
            optimizer, total = super().configure_optimizers(), self.trainer.estimated_stepping_batches
            self.cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1, total_steps=total)
            return [optimizer], [{"scheduler": self.cycle, "interval": "step"}]

    trainer = fit(module := Cycles(), BatchSizeFinder())
    assert (module.cycle.total_steps, trainer.global_step) == (34, 1)  # 100 samples, 3 at a time, and all at once
    trainer = fit(module := Cycles(), planner_of())
    assert module.cycle.total_steps == trainer.global_step == 3


def test_the_random_state_is_left():
    def drawn(*callbacks: Any) -> tuple[float, float]:
        class Draws(Net):
            def on_train_start(self) -> None:
                self.drawn = torch.rand(()).item(), random.random()

        class Data(Sizes):
            def train_dataloader(self) -> Any:
                return DataLoader(torch.ones(100, 8), batch_size=self.batch_size, shuffle=True)

        pl.seed_everything(1, verbose=False)
        fit(module := Draws(), *callbacks, data=Data())
        return module.drawn

    plain = drawn()
    assert drawn(BatchSizeFinder()) != plain
    assert drawn(planner_of()) == plain


def test_an_answer_before_the_run():
    """pytorch/rfcs#108 and pytorch/pytorch#114934: the finder trains to know; a plan is of a card that is not here."""
    module = Net()
    fit(module, BatchSizeFinder(max_val=16), limit_train_batches=1)
    assert len(module.seen) > 1
    module = Net()
    plan = mp.plan(module, module.train_dataloader(), device="T4")
    assert (plan.batch_size, plan.device.name, module.seen) == (100, "T4", [])


def test_the_table_names_tests_that_there_are():
    table = (ROOT / "docs" / "lightning_issues.md").read_text()
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 10
    for issue, *_, tests in rows:
        assert "::" in tests, issue
        for name in (part.strip(" `") for part in tests.split(",")):
            file, _, test = name.partition("::")
            (path,) = (ROOT / "tests").rglob(file)
            assert f"def {test}(" in path.read_text(), name
