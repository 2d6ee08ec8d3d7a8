"""One fit on the CPU, planned for a GPU that is described: what is proposed, set, announced and forecast."""

from __future__ import annotations

from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

import lightning_memplan as mp
from lightning_memplan.monitor.history import append
from lightning_memplan.monitor.meter import Forecast
from lightning_memplan.planning import fit as fitting
from lightning_memplan.planning.fit import FitOptions, FitPlanner
from lightning_memplan.planning.limits import Limits
from lightning_memplan.planning.session import Allocated
from lightning_memplan.step.patch import patched
from lightning_memplan.types import RunRecord

CARD = mp.Device("a card", total=2**30)
SAMPLES = 60


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(100, 100)
        self.sizes = []

    def training_step(self, batch, batch_idx):
        self.sizes.append(len(batch))
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(pl.LightningDataModule):
    def __init__(self, batch_size=4, rows=SAMPLES):
        super().__init__()
        self.batch_size, self.rows = batch_size, rows

    def train_dataloader(self):
        return DataLoader(torch.ones(self.rows, 100), batch_size=self.batch_size)


class Plans(pl.Callback):
    """Plan at setup, and run ``then`` with the planner."""

    def __init__(self, options, then=None):
        self.options, self.then, self.shown = options, then, []
        self.planner = None

    def announce(self, plan, lesson, val_plan, val_size):
        self.shown.append((plan, val_plan, val_size))
        return []

    def setup(self, trainer, module, stage):
        self.planner = FitPlanner(trainer, module, self.options)
        with patched(fitting, "plan_texts", self.announce):
            self.planner.run()
        if self.then is not None:
            self.then(self)

    def keep(self, batch_size):
        with patched(fitting, "plan_texts", self.announce):
            self.planner.keep(batch_size)


def fit(plans, data=None, **settings):
    module, data = Net(), data or Data()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        **{"max_epochs": 1, "accelerator": "cpu", "enable_model_summary": False, **quiet, **settings}, callbacks=[plans]
    )
    trainer.fit(module, datamodule=data)
    return module, data, trainer


def options(applies=True, method="formula", **limits):
    return FitOptions(Limits(**{"max_batch_size": 20, **limits}), method=method, device=CARD, applies=applies)


def test_a_plan_is_set_and_announced():
    plans = Plans(options())
    module, data, trainer = fit(plans)
    planner = plans.planner
    assert (planner.plan.batch_size, data.batch_size, module.sizes) == (20, 20, [20] * 3)
    assert plans.shown == [(planner.plan, None, 0)]
    assert (planner.planned_size, planner.hyperparameters()) == (20, {"batch_size": 20})
    assert (trainer.accumulate_grad_batches, planner.accumulated, planner.val_plan) == (1, 1, None)
    assert planner.estimate.peak(20) == planner.plan.peak_reserved
    assert planner.structure
    planner.release()
    assert planner.planned_size is None  # no other can be set in its place


def test_a_plan_that_is_not_set_changes_nothing():
    plans = Plans(options(applies=False))
    module, data, _ = fit(plans)
    planner = plans.planner
    assert (planner.plan.batch_size, data.batch_size, module.sizes) == (20, 4, [4] * 15)
    assert (planner.planned_size, planner.hyperparameters(), planner.place) == (None, {}, None)


def test_an_effective_batch_size_is_set_by_accumulation():
    # 48 samples a step: the largest divisor up to 20 is 16, three batches of which are a step
    plans = Plans(options(effective_batch_size=48))
    module, _, trainer = fit(plans)
    planner = plans.planner
    assert (planner.plan.batch_size, planner.plan.accumulate_grad_batches) == (16, 3)
    assert (trainer.accumulate_grad_batches, planner.accumulated, module.sizes) == (3, 3, [16, 16, 16, 12])
    whole = {"batch_size": 16, "accumulate_grad_batches": 3, "effective_batch_size": 48}
    assert planner.hyperparameters() == whole


def test_what_an_earlier_plan_accumulates_is_no_obstacle():
    def again(plans):
        trainer, planner = plans.planner._trainer, plans.planner
        second = FitPlanner(trainer, planner._module, plans.options, planner.accumulated)
        second.run()
        plans.second = second

    plans = Plans(options(effective_batch_size=48), again)
    _, _, trainer = fit(plans)
    assert plans.second.plan.accumulate_grad_batches == trainer.accumulate_grad_batches == 3
    with pytest.raises(MisconfigurationException, match="accumulate_grad_batches"):  # the user's own is one
        fit(Plans(options(effective_batch_size=48)), accumulate_grad_batches=2)


def test_a_kept_size_is_set_in_place_of_the_planned_one():
    plans = Plans(options(), lambda plans: plans.keep(6))
    module, data, _ = fit(plans)
    planner = plans.planner
    assert (planner.plan.batch_size, planner.plan.limited_by, data.batch_size) == (6, "checkpoint", 6)
    assert module.sizes == [6] * 10
    assert [plan.batch_size for plan, *_ in plans.shown] == [20, 6]
    assert planner.planned_size == 20  # what was proposed


def test_a_kept_size_that_does_not_fit_leaves_what_was_planned():
    def keep(plans):
        with pytest.raises(mp.DoesNotFitError):
            plans.keep(10**7)

    plans = Plans(options(), keep)
    module, *_ = fit(plans)
    assert (plans.planner.plan.batch_size, set(module.sizes)) == (20, {20})


def test_a_forecast_is_of_the_planned_size_or_of_another():
    plans = Plans(options(method="trace"))
    fit(plans)
    planner = plans.planner
    for asked, size in ((None, 20), (7, 7)):
        found = planner.forecast(asked)
        assert found.replayed == planner.estimate.step_peaks(size, CARD.capacity)
        assert (found.accumulate, found.already_allocated) == (1, 0)
    assert FitPlanner(planner._trainer, planner._module, plans.options).forecast() == Forecast(())


def test_a_forecast_accumulates_as_the_plan_does():
    plans = Plans(options(method="trace", effective_batch_size=48))
    fit(plans)
    assert plans.planner.forecast().accumulate == 3


def test_bytes_that_are_allocated_already_are_left_out_of_the_plan_and_in_the_forecast(monkeypatch):
    monkeypatch.setattr(fitting, "allocated_on", lambda index, module: Allocated(other_bytes=2**20))
    plans = Plans(options())
    fit(plans)
    planner = plans.planner
    assert planner.already_allocated == planner.forecast().already_allocated == 2**20
    assert planner.plan.device.capacity == CARD.capacity - 2**20
    assert planner.forecast().at(0).allocated == planner.estimate.step_peaks(20, CARD.capacity)[0].allocated + 2**20


def record(structure, **changes):
    run = RunRecord(structure, "Net", "a card", CARD.total, CARD.capacity, "formula", 12, {}, {})
    return replace(run, **changes)


def test_a_size_that_once_ran_out_of_memory_is_not_planned_again(tmp_path):
    first = Plans(options())
    fit(first)
    structure, path = first.planner.structure, tmp_path / "runs.jsonl"
    append(record(structure, outcome="out of memory", predicted={"failed": (1, CARD.capacity)}), path)
    learned = Plans(replace(options(), history=path, learns_margin=True))
    fit(learned)
    assert (learned.planner.plan.batch_size, learned.planner.lesson.failed) == (11, 12)
    assert learned.planner.plan.margin == learned.planner.lesson.margin > 0
    # with a margin of the user's own, history decides nothing
    named = Plans(replace(options(margin=0.25), history=path))
    fit(named)
    assert (named.planner.plan.batch_size, named.planner.plan.margin) == (20, 0.25)
    # nor does it for other settings of the same module
    other = Plans(replace(options(), history=path, learns_margin=True))
    fit(other, precision="bf16-mixed")
    assert other.planner.structure != structure
    assert other.planner.plan.batch_size == 20


def test_real_steps_need_a_gpu():
    with pytest.raises(
        Exception, match=r"^confirm=True runs real steps on a CUDA device, and the Trainer runs on cpu$"
    ):
        fit(Plans(replace(options(), confirm=True)))


def test_a_failure_of_what_is_announced_leaves_everything_as_it_was():
    class Fails(Plans):
        def announce(self, *shown):
            raise RuntimeError("no text")

    plans, data = Fails(options(effective_batch_size=48)), Data()
    with pytest.raises(RuntimeError, match="no text"):
        fit(plans, data)
    assert (data.batch_size, plans.planner._trainer.accumulate_grad_batches) == (4, 1)
    assert plans.planner.plan is None
