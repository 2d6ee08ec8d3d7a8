"""A session: what is left of the device, a rank's share of the samples, estimates that are made once."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

import lightning_memplan as mp
from lightning_memplan.planning import session as sessions
from lightning_memplan.planning.job import Training, training_job
from lightning_memplan.planning.limits import Limits
from lightning_memplan.planning.session import Allocated, PlanningSession, allocated_on, plan_each

MiB, GiB = 2**20, 2**30
NET = torch.nn.Linear(100, 100)
BATCH = torch.zeros(4, 100)
CARD = mp.Device("a card", total=GiB, capability=(8, 6))


def session(batch=BATCH, limits=None, method="formula", how=None, **arguments):
    job = training_job(NET, batch, how or Training(), device=CARD)
    return PlanningSession(job, limits or Limits(), method, **arguments)


def test_a_plan_leaves_what_this_process_nccl_and_callbacks_take():
    alone = session()
    assert (alone.device.capacity, alone.already_allocated) == (CARD.capacity, 0)
    held = session(allocated=Allocated(module_bytes=2 * MiB, other_bytes=3 * MiB), extra_bytes=5 * MiB)
    assert held.already_allocated == 8 * MiB  # the module's own bytes are in its estimate
    assert held.device.capacity == CARD.capacity - 8 * MiB
    assert held.module_is_on_gpu
    assert not alone.module_is_on_gpu
    ranks = session(how=Training(devices=2))
    assert ranks.job.nccl > 0
    assert ranks.device.capacity == CARD.capacity - ranks.job.nccl
    assert ranks.plan(Limits(max_batch_size=8)).nccl == ranks.job.nccl


@pytest.mark.parametrize(("devices", "share"), [(1, 21), (2, 11), (4, 6)])
def test_a_rank_plans_for_its_share_of_the_samples_rounded_up(devices, share):
    found = session(DataLoader(torch.zeros(21, 100)), how=Training(devices=devices))
    assert (found.limits.samples, found.limits.ranks) == (share, devices)
    plan = found.plan()
    assert (plan.batch_size, plan.limited_by) == (share, "dataset")


def test_a_batch_has_no_length_that_limits_it():
    assert session().limits.samples is None


def test_an_estimate_is_made_once_for_each_number_of_microbatches(monkeypatch):
    made = []
    predict = sessions.predict
    monkeypatch.setattr(
        sessions,
        "predict",
        lambda job, largest: made.append((job.settings.accumulate_grad_batches, largest)) or predict(job, largest),
    )
    whole = session(limits=Limits(effective_batch_size=24, max_batch_size=99))
    # 24 samples at once need no accumulation; any smaller size is in the middle of one, for which three batches stand
    for size in (24, 12, 8, 24, 6):
        whole.estimate_at(size)
    assert made == [(1, 99), (3, 99)]
    made.clear()
    trained = session(how=Training(accumulate_grad_batches=5))
    for size in (24, 12):
        trained.estimate_at(size)
    assert made == [(5, None)]
    assert trained.plan(Limits(max_batch_size=8)).accumulate_grad_batches == 5


def test_a_checked_size_is_planned_whatever_the_size_of_the_dataset():
    found = session(DataLoader(torch.zeros(21, 100)))
    assert found.check(50).batch_size == 50
    with pytest.raises(mp.DoesNotFitError, match="at batch size 99999999"):
        found.check(99_999_999)


def test_a_size_is_traced_again_only_where_that_is_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(sessions, "retrace_at", lambda found, size, job: asked.append(size) or found)
    found = session(method="trace", limits=Limits(max_batch_size=50))
    assert found.propose().plan.batch_size == 50
    assert asked == [50]
    found.plan(Limits(max_batch_size=40), retrace=False)
    assert asked == [50]


def test_advice_is_for_the_largest_size_that_fits_unless_one_is_named(monkeypatch):
    asked = []
    monkeypatch.setattr(sessions, "advise_job", lambda job, *arguments: asked.append(arguments[1:]) or ())
    found = session(DataLoader(torch.zeros(21, 100)), limits=Limits(0.25))
    budget = int(CARD.capacity * 0.75)
    found.advice()
    found.advice(7)
    assert asked == [(21, budget, CARD.capacity), (7, budget, CARD.capacity)]


def test_nothing_is_allocated_where_cuda_is_not_used():
    assert allocated_on(None, NET) == allocated_on(0, NET) == Allocated(0, 0)


def test_gpus_are_planned_from_the_smallest_on_and_traced_once_for_each_capability(monkeypatch):
    made = []
    predict = sessions.predict
    monkeypatch.setattr(sessions, "predict", lambda job: made.append(job.settings.capability) or predict(job))
    gpus = [
        mp.Device("large", total=4 * GiB, capability=(9, 0)),
        mp.Device("small", total=GiB, capability=(8, 6)),
        mp.Device("middle", total=2 * GiB, capability=(8, 6)),
        mp.Device("tiny", total=2**16, capability=(8, 6)),
    ]
    job = training_job(NET, DataLoader(torch.zeros(10**7, 1).expand(10**7, 100)), device=CARD)
    found = plan_each(job, gpus, Limits(), "formula")
    assert [device.name for device, _ in found] == ["tiny", "small", "middle", "large"]
    none, *sizes = (size for _, size in found)
    assert none == 0
    assert sizes == sorted(set(sizes))
    assert sorted(made) == [(8, 6), (9, 0)]


def test_gpus_of_ranks_are_planned_with_room_for_nccl():
    ranks = training_job(NET, BATCH, Training(devices=2), device=CARD)
    ((_, size),) = plan_each(ranks, [CARD], Limits(), "formula")
    smaller = mp.Device("less", total=CARD.capacity - ranks.nccl, capability=(8, 6))
    alone = training_job(NET, BATCH, device=CARD)
    assert size == pytest.approx(plan_each(alone, [smaller], Limits(), "formula")[0][1], rel=0.001)
