"""Batch sizes of validation and tests: what they leave beside training, and that all ranks have the same."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_memplan as mp
from lightning_memplan.errors import PlanningFailedError
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.memory.events import Event, Trace
from lightning_memplan.memory.formula import Formula
from lightning_memplan.memory.program import scale
from lightning_memplan.planning import evaluation, proposal
from lightning_memplan.planning.evaluation import agreed_plan, most_beside_validation, plan_test, plan_validation
from lightning_memplan.planning.job import DataSource, Training, training_job
from lightning_memplan.planning.limits import Limits
from lightning_memplan.planning.proposal import RankResult
from lightning_memplan.planning.session import PlanningSession
from lightning_memplan.settings import NCCL

MiB, GiB = 2**20, 2**30
CARD = mp.Device("a card", total=GiB, context=24 * MiB)  # 1000 MiB for training
FORMULA = Formula((), 1000, 900, 10, 45)


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 8)

    def training_step(self, batch, batch_idx):
        return self.net(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.net(batch)

    def test_step(self, batch, batch_idx):
        self.net(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def each_a_mib(sizes=(2, 3, 5)):
    return Estimate("trace", FORMULA, scale([Trace(n, (Event(0, n * MiB, "forward", 1),)) for n in sizes]))


def session(limits=None, **how: Any) -> PlanningSession:
    job = training_job(Net(), torch.zeros(4, 8), Training(**how), device=CARD, method="trace")
    return PlanningSession(job, limits or Limits(), "trace")


@pytest.fixture
def predicted(monkeypatch):
    """Predict 1 MiB a sample for validation and tests; the list has what was asked."""
    asked = []

    def of(estimate):
        def traced(job, validation):
            def beside(training, batch_size):
                asked.append((job, training, batch_size, validation))
                return estimate

            return SimpleNamespace(beside=beside, program=estimate.program)

        monkeypatch.setattr(evaluation, "trace_of_validation", traced)
        monkeypatch.setattr(evaluation, "predict_test", lambda *given: asked.append(given) or estimate)
        return asked

    of(each_a_mib())
    return of


def validation_of(count, **arguments):
    return DataSource(DataLoader(torch.zeros(count, 8), **arguments))


def test_validation_is_predicted_beside_training_at_its_size(predicted):
    asked, run, found = predicted(each_a_mib()), session(), validation_of(5000)
    plan = plan_validation(run, SimpleNamespace(batch_size=7), found)
    assert asked == [(run.job, run.estimate_at(7), 7, found)]
    assert (plan.batch_size, plan.limited_by, plan.device) == (950, "memory", run.device)


@pytest.mark.parametrize(
    ("limits", "count", "devices", "size", "limited_by"),
    [
        ({"margin": 0.5}, 5000, 1, 500, "memory"),
        ({"max_batch_size": 64}, 5000, 1, 64, "max_batch_size"),
        ({"multiple_of": 100}, 5000, 1, 900, "memory"),
        ({"min_batch_size": 99}, 50, 1, 50, "dataset"),  # of validation fewer may be had
        ({}, 51, 2, 26, "dataset"),  # of each rank
        ({"effective_batch_size": 7000, "max_batch_size": 700}, 5000, 1, 700, "max_batch_size"),  # training's alone
    ],
)
def test_validation_has_the_limits_of_training_and_samples_of_its_own(
    predicted, limits, count, devices, size, limited_by
):
    run = session(Limits(**limits), devices=devices)
    plan = plan_validation(run, SimpleNamespace(batch_size=7), validation_of(count))
    assert (plan.batch_size, plan.limited_by) == (size, limited_by)
    assert plan.accumulate_grad_batches == 1
    assert plan.nccl == (NCCL if devices > 1 else 0)


def test_validation_that_is_known_at_its_own_size_alone_stays_there(predicted):
    predicted(each_a_mib((6,)))
    plan = plan_validation(session(), SimpleNamespace(batch_size=7), validation_of(50, batch_size=6))
    assert plan.batch_size == 6
    predicted(each_a_mib((2, 3, 6)))
    assert plan_validation(session(), SimpleNamespace(batch_size=7), validation_of(50, batch_size=6)).batch_size == 50


@pytest.mark.parametrize(
    ("most", "share", "limits", "count", "found"),
    [
        # 950 MiB of 1,000 are the budget, and a sample of validation takes one
        (500, 1, {}, 5000, 500),
        (2000, 1, {}, 5000, 950),
        (2000, 2, {}, 5000, 475),
        (2000, Fraction(1, 4), {}, 5000, 2000),  # 500 of validation
        (2000, 3, {"multiple_of": 50}, 5000, 300),  # 950 / 3 = 316
        (2000, 1, {}, 900, 2000),  # it has no more samples
        (2000, 1, {"min_batch_size": 951}, 5000, 0),
        (2000, 1, {"margin": 0.5}, 5000, 500),
    ],
)
def test_the_largest_size_beside_which_validation_fits(predicted, most, share, limits, count, found):
    asked, run = predicted(each_a_mib()), session(Limits(**limits))
    assert most_beside_validation(run, most, validation_of(count), Fraction(share)) == found
    assert asked[0][2] == most  # often it fits
    assert len(asked) < 20


def test_validation_that_is_known_at_one_size_says_nothing_of_others(predicted):
    predicted(each_a_mib((6,)))
    with pytest.raises(mp.TraceError, match="its events depend on the batch size, and are known at its own alone"):
        most_beside_validation(session(), 9, validation_of(50), Fraction(1))


def test_validation_that_does_not_fit_is_named(predicted):
    with pytest.raises(mp.DoesNotFitError, match=r"^Net in validation does not fit on a card at batch size 1"):
        plan_validation(session(Limits(budget=1, margin=0.9999)), SimpleNamespace(batch_size=7), validation_of(9))


def test_a_test_is_planned_with_nothing_beside_it(predicted):
    asked = predicted(each_a_mib())
    job = training_job(Net(), DataLoader(torch.zeros(5001, 8)), Training(devices=2), device=CARD)
    plan = plan_test(job, CARD, Limits(0.5))
    assert asked == [(job,)]
    assert (plan.batch_size, plan.device, plan.nccl) == (500, CARD, 0)
    assert plan_test(job, CARD, Limits(effective_batch_size=None)).batch_size == 950
    few = replace(job, source=validation_of(51))
    assert (plan_test(few, CARD, Limits()).batch_size, plan_test(few, CARD, Limits()).limited_by) == (26, "dataset")
    with pytest.raises(mp.DoesNotFitError, match=r"^Net in a test does not fit on a card at batch size 1"):
        plan_test(job, mp.Device("a card", total=MiB // 2), Limits())


# ------------------------------------------------------------------------------------------------------------ all ranks


@pytest.fixture
def ranks(monkeypatch):
    """Other ranks, with these results; the list tells what they were told."""
    told = []

    def others(*results):
        monkeypatch.setattr(proposal, "over_ranks", lambda result: told.append(result) or [result, *results])
        return told

    return others


def test_the_smallest_size_of_all_ranks_is_agreed_on(ranks):
    plan = SimpleNamespace(batch_size=20)
    told = ranks(RankResult(batch_size=30))
    assert agreed_plan(lambda: plan, "validation") == (plan, 20)
    ranks(RankResult(batch_size=10))
    assert agreed_plan(lambda: plan, "validation") == (plan, 10)
    assert told == [RankResult(batch_size=20)] * 2


def fails():
    raise mp.TraceError("it reads a value", reason="data_dependent")


def test_a_step_that_cannot_be_traced_has_another_size_and_a_warning(ranks):
    told = ranks(RankResult(batch_size=30))
    text = "MemoryPlanner: validation gets training's batch size, since it cannot be traced: it reads a value"
    with pytest.warns(UserWarning, match=f"^{text}$"):
        assert agreed_plan(fails, "validation", otherwise=12) == (None, 12)
    assert told == [RankResult(batch_size=12)]


def test_a_test_that_cannot_be_traced_has_no_size(ranks):
    told = ranks()
    with pytest.raises(mp.TraceError, match=r"^it reads a value$"):
        agreed_plan(fails, "a test")
    assert [(result.reason, result.fatal) for result in told] == [("a test: it reads a value", True)]
    with pytest.raises(PlanningFailedError, match="a test: it reads a value"):
        agreed_plan(fails, "a test", is_fatal=lambda error: False)
