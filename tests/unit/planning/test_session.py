"""A session: what is left of the device, a rank's share of the samples, estimates that are made once."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

import lightning_memplan as mp
from lightning_memplan.planning import session as sessions
from lightning_memplan.planning.job import Training, training_job
from lightning_memplan.planning.limits import Limits
from lightning_memplan.planning.session import (
    Allocated,
    PlanningSession,
    allocated_on,
    check_effective_batch_size,
    plan_each,
)
from lightning_memplan.settings import NCCL

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


def test_a_session_plans_by_its_own_method():
    found = session(method="formula")
    assert (found.job.method, found.name, found.index) == ("formula", "Linear", 0)
    assert found.propose().plan.method == "formula"
    proposal = found.propose()
    assert proposal.session is found
    assert session(allocated=Allocated(module_bytes=1)).module_is_on_gpu


@pytest.mark.parametrize(("device", "index"), [("cpu", 0), ("cuda", 0), ("cuda:3", 3)])
def test_a_session_runs_on_the_gpu_of_its_trainer(device, index):
    found = session()
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
    found.job = replace(found.job, trainer=trainer)
    assert found.index == index


def test_each_accumulation_is_traced_again_by_itself(monkeypatch):
    asked = []
    again = mp.estimate(NET, BATCH, method="formula")

    def retrace_at(found, size, job):
        asked.append((found, size, job.settings.accumulate_grad_batches))
        return again

    monkeypatch.setattr(sessions, "retrace_at", retrace_at)
    # on two ranks 24 samples are 12 each at once, and 6 each in two parts
    found = session(limits=Limits(effective_batch_size=24), how=Training(devices=2))
    once, twice = found.estimate_at(12), found.estimate_at(6)
    found.retrace(12)
    found.retrace(6)
    assert asked == [(once, 12, 1), (twice, 6, 3)]
    assert found.estimate_at(12) is found.estimate_at(6) is again


def test_a_checked_size_is_the_largest_that_is_probed(monkeypatch):
    asked = []
    predict = sessions.predict
    monkeypatch.setattr(sessions, "predict", lambda job, largest: asked.append(largest) or predict(job, largest))
    session().check(50)
    assert asked == [50]


def test_where_not_one_sample_fits_advice_is_for_one(monkeypatch):
    asked = []
    monkeypatch.setattr(sessions, "advise_job", lambda job, *arguments: asked.append((job, *arguments)) or ("advice",))
    found = PlanningSession(training_job(NET, BATCH, device=mp.Device("tiny", total=1)), Limits(), "formula")
    assert found.advice() == ("advice",)
    assert asked == [(found.job, found.estimate(1), 1, 0, 1)]


def test_gpus_without_a_capability_are_planned_for_the_kernels_of_the_job(monkeypatch):
    made = []
    predict = sessions.predict
    monkeypatch.setattr(sessions, "predict", lambda job: made.append(job) or predict(job))
    job = training_job(NET, BATCH, Training(accumulate_grad_batches=2), device=CARD)
    job = replace(job, settings=replace(job.settings, capability=(7, 0)))
    plan_each(job, [mp.Device("one", total=GiB), mp.Device("two", total=GiB, capability=(9, 0))], Limits(), "formula")
    assert [one.settings for one in made] == [job.settings, replace(job.settings, capability=(9, 0))]
    assert [one.device.capability for one in made] == [None, (9, 0)]
    assert [one.method for one in made] == ["formula", "formula"]


def test_gpus_have_all_samples_of_the_dataset_and_all_of_their_memory():
    loader = training_job(NET, DataLoader(torch.zeros(21, 100)), device=CARD)
    assert plan_each(loader, [CARD], Limits(), "formula") == ((CARD, 21),)
    job = training_job(NET, BATCH, device=CARD)
    found = sessions.predict(replace(job, method="formula"))
    exact = mp.Device("exact", total=found.peak(77), capability=(8, 6))
    less = mp.Device("less", total=found.peak(77) - 1, capability=(8, 6))
    assert plan_each(job, [exact, less], Limits(0.0), "formula") == ((less, 76), (exact, 77))
    # of a GPU on which NCCL takes all, none fits
    none = mp.Device("none", total=NCCL - 1, capability=(8, 6))
    assert plan_each(training_job(NET, BATCH, Training(devices=2)), [none], Limits(), "formula") == ((none, 0),)


def test_only_an_effective_batch_size_decides_what_is_accumulated():
    class Manual(pl.LightningModule):
        automatic_optimization = False

    schedules = pl.callbacks.GradientAccumulationScheduler({0: 2})
    trainer = pl.Trainer(accelerator="cpu", callbacks=[schedules], logger=False, enable_checkpointing=False)
    whole = Limits(effective_batch_size=24)
    for job, text in (
        (training_job(Manual(), BATCH, device=CARD), "with manual optimization it is training_step that decides"),
        (training_job(NET, BATCH, Training(trainer=trainer), device=CARD), "so does the callback GradientAccumulation"),
        (training_job(NET, BATCH, Training(accumulate_grad_batches=2), device=CARD), "and it is 2 already"),
        (training_job(NET, BATCH, Training(devices=5), device=CARD), "no equal share for each of 5 processes"),
    ):
        with pytest.raises(MisconfigurationException, match=text):
            check_effective_batch_size(job, whole)
        check_effective_batch_size(job, Limits())


class OnGpu:
    """A tensor of so many bytes at an address of a GPU."""

    def __init__(self, address, size, index=1, grad=None):
        self.device, self.grad = torch.device("cuda", index), grad
        self.data_ptr = lambda: address
        self.untyped_storage = lambda: SimpleNamespace(nbytes=lambda: size)


def test_what_is_allocated_is_the_modules_or_others(monkeypatch):
    weight = OnGpu(1000, 400, grad=OnGpu(2000, 40))
    tied, elsewhere = OnGpu(1000, 400), OnGpu(5000, 7, index=0)
    module = SimpleNamespace(
        parameters=lambda: iter([weight, tied, elsewhere]), buffers=lambda: iter([OnGpu(3000, 4), torch.zeros(9)])
    )
    allocated = {1: 1444, 0: 5}
    monkeypatch.setattr(torch.cuda, "memory_allocated", allocated.__getitem__)
    assert allocated_on(1, module) == Allocated(0, 0)  # before CUDA is initialized nothing is on a GPU
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert allocated_on(1, module) == Allocated(444, 1000)  # 400, 40 and 4; a storage once
    assert allocated_on(0, module) == Allocated(7, 0)  # and never less than nothing of others
    assert allocated_on(None, module) == Allocated(0, 0)


# --------------------------------------------------------------------------------------------------------- real steps


@pytest.mark.parametrize(("recorded", "steps"), [(None, 2), (1, 2), (3, 2), (4, 4), (8, 8)])
def test_real_steps_of_a_plan_are_two_or_all_that_take_turns(monkeypatch, recorded, steps):
    asked = []
    monkeypatch.setattr(sessions, "try_step", lambda *arguments, **named: asked.append((arguments, named)) or "peaks")
    found = session(batch=DataLoader(torch.zeros(99, 100), batch_size=2), method="trace", extra_bytes=5)
    found.job = replace(found.job, trainer=None)
    program = None if recorded is None else SimpleNamespace(recorded=lambda: recorded)
    sizes = []
    monkeypatch.setattr(found, "estimate_at", lambda size: sizes.append(size) or SimpleNamespace(program=program))
    plan = SimpleNamespace(batch_size=7, accumulate_grad_batches=4)
    assert found.trial(plan) == "peaks"
    ((setup, (size, batch), index), named) = asked[0]
    assert (setup, size, batch.shape, index) == (found.job.accumulating(4).setup, 7, (7, 100), 0)
    assert named == {"extra_bytes": 5, "steps": steps, "begun": found.job.accumulating(4).begun_replica()}
    assert sizes == [7]


def test_real_steps_begin_where_the_hooks_before_them_have_run(monkeypatch):
    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(100, 100)

        def training_step(self, batch, batch_idx):
            return self.net(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    begun = []
    monkeypatch.setattr(sessions, "try_step", lambda *arguments, **named: begun.append(named["begun"]))
    found = PlanningSession(training_job(Net(), BATCH, device=CARD), Limits(), "trace")
    found.trial(SimpleNamespace(batch_size=7, accumulate_grad_batches=1))
    assert begun[0] is found.job.begun_replica()
    assert begun[0] is not None
