"""``estimate`` and ``plan``: what they take, what they refuse, and that they agree with one another."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

import lightning_memplan as mp
from lightning_memplan.devices.catalogue import gpus
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.memory.events import Event, Trace
from lightning_memplan.memory.formula import Formula
from lightning_memplan.memory.program import scale
from lightning_memplan.planning import api, predict, session
from lightning_memplan.planning import job as planning_job
from lightning_memplan.planning.limits import Limits
from lightning_memplan.settings import NCCL
from lightning_memplan.trace import tracer
from tests.paths import PROGRAMS
from tests.programs.lengths_cases import Attention, tokens

MiB = 2**20
CARD = mp.Device("a card", total=256 * MiB, context=56 * MiB)


def net():
    return nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()

    def training_step(self, batch, batch_idx):
        return self.net(batch).sum()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class Data(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.batch_size, self.calls = 4, ()

    def prepare_data(self):
        self.calls += ("prepare_data",)

    def setup(self, stage):
        self.calls += (stage,)
        self.dataset = torch.zeros(300, 1024)

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=self.batch_size)


@pytest.fixture(scope="module")
def estimate():
    return mp.estimate(Module(), torch.zeros(4, 1024))


# ------------------------------------------------------------------------------------------------------------ estimate


def test_every_source_of_a_batch_gives_the_same():
    loader = DataLoader(torch.zeros(300, 1024), batch_size=4)
    peaks = {mp.estimate(Module(), source).peak_allocated(64) for source in (torch.zeros(4, 1024), loader, Data())}
    assert len(peaks) == 1


def test_it_grows_with_the_batch(estimate):
    # Adam: 4 times 1024 · 1024 weights of 4 bytes are 16 MiB, whatever the batch
    assert estimate.peak_allocated(1) > 16 * MiB
    # a sample is 4 KiB of input, 4 KiB each after the layer and the activation, and the like on the way back
    assert 8 * 1024 <= (estimate.peak_allocated(20000) - estimate.peak_allocated(10000)) / 10000 <= 24 * 1024


def test_a_trainers_settings_are_used_and_arguments_override_them():
    trainer = pl.Trainer(accelerator="cpu", precision="bf16-true", logger=False, enable_checkpointing=False)
    by_trainer = mp.estimate(Module(), torch.zeros(4, 1024), trainer=trainer)
    assert by_trainer.peak(64) == mp.estimate(Module(), torch.zeros(4, 1024), precision="bf16-true").peak(64)
    over = mp.estimate(Module(), torch.zeros(4, 1024), trainer=trainer, precision="32-true")
    assert over.peak(64) > by_trainer.peak(64)


def test_accumulation_takes_memory(estimate):
    accumulated = mp.estimate(Module(), torch.zeros(4, 1024), accumulate_grad_batches=2)
    # the second batch's backward pass runs beside the gradients of the first: at most 4 MiB more, and less where the
    # optimizer's step is what takes the most
    more = accumulated.peak_allocated(64) - estimate.peak_allocated(64)
    assert 0 < more <= 4 * MiB + MiB // 8


def test_clipping_is_traced(estimate):
    clipped = mp.estimate(Module(), torch.zeros(4, 1024), gradient_clip_val=1.0)
    assert len(clipped.program.events) > len(estimate.program.events)
    assert clipped.peak_allocated(64) >= estimate.peak_allocated(64)


def test_a_module_without_layers_is_traced():
    class Bare(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1024, 10))

        def training_step(self, batch, batch_idx):
            return (batch @ self.weight).square().sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    found = mp.estimate(Bare(), torch.zeros(4, 1024), method="trace")
    assert found.method == "trace"
    assert found.peak_allocated(64) > 2 * 4 * 1024 * 10 + 64 * 4096  # weights, gradients, batch


def test_the_plain_modules_optimizer(estimate):
    plain = mp.estimate(net(), torch.zeros(4, 1024), optimizer=lambda p: torch.optim.Adam(p))
    assert plain.peak_allocated(64) == pytest.approx(estimate.peak_allocated(64), rel=0.01)
    without = mp.estimate(net(), torch.zeros(4, 1024))
    assert "optimizer" not in without.breakdown(64)
    assert plain.breakdown(64)["optimizer"] >= 8 * MiB  # the moments: twice 4 MiB


def test_the_users_objects_are_left_alone():
    module, data = Module(), Data()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state = torch.get_rng_state()
    mp.plan(module, data, device=CARD)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert (data.batch_size, data.calls, hasattr(data, "dataset")) == (4, (), False)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"method": "guess"}, ValueError, "method is one of 'auto', 'trace', 'formula'.*, not 'guess'"),
        ({"precision": "8-bit"}, ValueError, "precision '8-bit' cannot be planned for: use one of 32-true, 64-true"),
        ({"device": "RTX 3091"}, ValueError, "'RTX 3091' is not in the catalogue of GPUs: near are"),
        ({"device": 3}, TypeError, "device is the name of a GPU or a Device, not 3"),
        ({"accumulate_grad_batches": 0}, ValueError, "accumulate_grad_batches is an int of at least 1, not 0"),
        ({"optimizer": torch.optim.Adam}, ValueError, "a LightningModule makes its optimizers in configure_optimizers"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_rejected(arguments, kind, text):
    with pytest.raises(kind, match=text):
        mp.estimate(Module(), torch.zeros(4, 1024), **arguments)


def test_what_is_no_module():
    with pytest.raises(TypeError, match=r"module is a LightningModule or another nn\.Module, not 'resnet50'"):
        mp.estimate("resnet50", torch.zeros(4, 1024))


def test_a_step_that_needs_values():
    class Reads(Module):
        def training_step(self, batch, batch_idx):
            out = self.net(batch)
            return out[: out.argmax().item()].sum()

    with pytest.raises(
        mp.TraceError, match=r"Reads cannot be traced: the step needs the value of a tensor .*test_api.py:"
    ):
        mp.estimate(Reads(), torch.zeros(4, 1024), method="trace")
    found = mp.estimate(Reads(), torch.zeros(4, 1024))
    assert found.method == "formula"
    assert found.notes[0].startswith("planned by the formula, since the step cannot be traced: ")
    assert found.notes[1:] == ("the formula counts the layers that ran before the step stopped",)  # why is said once


# ------------------------------------------------------------------------------------------------------- which method

GPU = mp.Device("a card that is here", total=2**34, index=0)


@pytest.fixture
def probed(monkeypatch):
    """A GPU that can be probed, on which a step does what the test says."""

    def does(what):
        def probe_steps(setup, sample, index, *, capacity, largest, begun):
            assert capacity == GPU.capacity
            if isinstance(what, Exception):
                raise what
            result = tracer.trace_counted(setup, sample())
            return result.traces, result.formula

        monkeypatch.setattr(planning_job, "can_probe", lambda: True)
        monkeypatch.setattr(predict, "probe_steps", probe_steps)

    return does


class TakesEight(nn.Module):
    """A step that refuses every batch size but one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1024, 1024)

    def forward(self, batch):
        assert len(batch) == 8, "a batch has eight rows"
        return self.layer(batch)


@pytest.mark.parametrize(
    "data",
    [torch.zeros(8, 1024), [torch.zeros(8, 1024)] * 3, DataLoader([torch.zeros(8, 1024)] * 3, batch_size=None)],
    ids=["a batch", "batches", "a dataset of batches"],
)
def test_a_step_that_takes_its_own_batch_size_alone_is_planned_at_that_size(data):
    plan = mp.plan(TakesEight(), data, device="T4")
    assert (plan.batch_size, plan.limited_by, plan.method) == (8, "step", "trace")
    assert plan.notes[0].startswith("the step takes its own batch size 8 alone (")
    exactly = mp.plan(nn.Linear(1024, 1024), torch.zeros(8, 1024), device="T4", min_batch_size=8, max_batch_size=8)
    assert plan.peak_reserved == exactly.peak_reserved
    with pytest.raises(ValueError, match=r"takes batch size 8 alone, which .* max_batch_size=4, .* do not allow"):
        mp.plan(TakesEight(), torch.zeros(8, 1024), device="T4", max_batch_size=4)


def test_a_probe_that_is_refused_leaves_the_trace_of_the_users_own_batch(probed):
    probed(AssertionError("a batch has eight rows"))
    plan = mp.plan(TakesEight(), torch.zeros(8, 1024), device=GPU)
    assert (plan.batch_size, plan.limited_by) == (8, "step")
    assert plan.notes[0].startswith("not planned by a probe: the step failed in a probe (AssertionError: a batch has")


def test_auto_probes_a_card_of_this_machine_and_traces_too(probed):
    probed("a step")
    plan = mp.plan(Module(), torch.zeros(4, 1024), device=GPU)
    assert plan.method == "probe"
    peak = plan.peak_reserved
    assert plan.methods == {"probe": peak, "trace": peak, "formula": plan.formula_peak}
    assert plan.notes == ()
    rows = [line.split()[0] for line in mp.plan_table(plan).splitlines()]
    assert rows[-3:] == ["probe", "trace", "formula"]
    elsewhere = mp.plan(Module(), torch.zeros(4, 1024), device=CARD)
    assert list(elsewhere.methods) == ["trace", "formula"]


# ------------------------------------------------------------------------------------- what an argument is passed on as


@pytest.fixture
def jobs(monkeypatch):
    """The jobs, limits and methods of which a session is made, and what it is asked for; nothing is planned."""
    made = []

    class Session:
        def __init__(self, job, limits, method):
            made.append((job, limits, method))

        def plan(self):
            return "a plan"

        def check(self, batch_size):
            return "a check", batch_size

        def advice(self, batch_size):
            return "advice", batch_size

    def predicts(job, largest):
        made.append((job, largest))
        return "an estimate"

    def plans_each(job, cards, limits, method):
        made.append((job, cards, limits, method))
        return "cards"

    monkeypatch.setattr(api, "PlanningSession", Session)
    monkeypatch.setattr(api, "predict", predicts)
    monkeypatch.setattr(api, "plan_each", plans_each)
    return made


BATCH = torch.zeros(4, 1024)
ADAM = partial(torch.optim.Adam, lr=0.1)
#: A setting of training of each kind, none of them the default
HOW = {
    "precision": "16-mixed",
    "optimizer": ADAM,
    "gradient_clip_val": 0.5,
    "accumulate_grad_batches": 3,
    "devices": 2,
    "strategy": "fsdp",
    "samples": "first",
}
LIMITS = {"margin": 0.25, "min_batch_size": 2, "max_batch_size": 12, "multiple_of": 2}


@pytest.mark.parametrize("function", ["estimate", "plan", "check", "advise", "cards_for"])
def test_every_setting_of_training_is_passed_on(jobs, function):
    module = net()
    more = (8,) if function == "check" else ()
    device = {} if function == "cards_for" else {"device": CARD_80}
    getattr(api, function)(module, BATCH, *more, **HOW, **device)
    job, settings = jobs[0][0], jobs[0][0].settings
    assert (job.module, job.source.data, job.source.sampling.which, job.optimizer) == (module, BATCH, "first", ADAM)
    assert (settings.precision, settings.gradient_clip_val, settings.accumulate_grad_batches) == ("16-mixed", 0.5, 3)
    assert (settings.parallel.kind, settings.parallel.ranks) == ("fsdp", 2)
    if device:
        assert (job.device, settings.capability) == (CARD_80, (8, 0))
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    getattr(api, function)(module, BATCH, *more, trainer=trainer)
    assert jobs[1][0].trainer is trainer
    assert jobs[1][0].source.sampling.which == "auto"


CARD_80 = mp.Device("a card", total=2**30, capability=(8, 0))


def test_limits_and_methods_are_passed_on(jobs):
    asked = (net(), BATCH)
    assert mp.estimate(*asked, method="trace", max_batch_size=12) == "an estimate"
    assert (jobs[-1][0].method, jobs[-1][1]) == ("trace", 12)
    mp.estimate(*asked)
    assert (jobs[-1][0].method, jobs[-1][1]) == ("auto", None)
    assert mp.plan(*asked, method="formula", effective_batch_size=24, **LIMITS) == "a plan"
    assert jobs[-1][1:] == (Limits(0.25, 2, 12, 2, 24), "formula")
    mp.plan(*asked)
    assert jobs[-1][1:] == (Limits(), "auto")
    assert api.check(*asked, 8, margin=0.25, method="trace") == ("a check", 8)
    assert jobs[-1][1:] == (Limits(0.25), "trace")
    api.check(*asked, 8)
    assert jobs[-1][1:] == (Limits(), "auto")
    assert mp.advise(*asked, batch_size=7, margin=0.25) == ("advice", 7)
    assert jobs[-1][1:] == (Limits(0.25), "trace")
    assert mp.advise(*asked) == ("advice", None)
    assert jobs[-1][1:] == (Limits(), "trace")
    assert mp.cards_for(*asked, cards=[CARD], method="trace", **LIMITS) == "cards"
    assert jobs[-1][1:] == ([CARD], Limits(0.25, 2, 12, 2), "trace")
    mp.cards_for(*asked)
    assert jobs[-1][1:] == (gpus(), Limits(), "auto")


def test_without_a_device_kernels_are_those_of_no_gpu_here_unless_a_plan_needs_one(jobs, monkeypatch):
    here = mp.Device("here", total=2**34, index=0, capability=(9, 0))
    monkeypatch.setattr(planning_job, "detect_devices", lambda: (here,))
    for function, capability in ((mp.estimate, (8, 6)), (mp.cards_for, (8, 6)), (mp.plan, (9, 0)), (mp.advise, (9, 0))):
        function(net(), BATCH)
        assert jobs[-1][0].settings.capability == capability


@pytest.mark.parametrize(
    ("function", "arguments", "text"),
    [
        (mp.estimate, {"max_batch_size": 0}, "max_batch_size is an int of at least 1, not 0"),
        (mp.plan, {"method": "guess"}, "method is one of 'auto', 'trace', 'formula', 'probe', not 'guess'"),
        (mp.plan, {"min_batch_size": 0}, "min_batch_size is an int of at least 1, not 0"),
        (api.check, {"batch_size": 0}, "batch_size is an int of at least 1, not 0"),
        (api.check, {"batch_size": 8, "method": "guess"}, "method is one of 'auto'"),
        (mp.cards_for, {"method": "guess"}, "method is one of 'auto'"),
        (mp.advise, {"margin": 1}, "margin is the part of the device's memory"),
        (mp.plan, {"effective_batch_size": 9, "devices": 2}, "effective_batch_size=9 has no equal share for each of 2"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_arguments_are_checked_before_anything_is_planned(jobs, function, arguments, text):
    with pytest.raises((ValueError, MisconfigurationException), match=f"^{text}"):
        function(net(), BATCH, **arguments)
    assert jobs == []


def test_a_curve_passes_its_settings_on(monkeypatch):
    asked = []

    def estimates(module, batch, **settings):
        asked.append((module, batch.shape, settings))
        return one_mib_a_sample

    traces = [Trace(n, (Event(0, n * MiB, "forward", 1),)) for n in (2, 3, 5)]
    one_mib_a_sample = Estimate("trace", Formula((), 0, 0, 0, 0), scale(traces))
    monkeypatch.setattr(api, "estimate", estimates)
    how = {name: value for name, value in HOW.items() if name != "samples"}
    card = mp.Device("a card", total=2**30, context=2**20 * 24, capability=(8, 0))
    found = mp.plan_lengths(
        net(), lambda length: torch.zeros(2, length), [32, 16, 32], device=card, margin=0.5, max_batch_size=9999, **how
    )
    planned_for = replace(card, context=card.context + NCCL)
    assert [shape for _, shape, _ in asked] == [(2, 16), (2, 32)]  # each once, the shortest first
    assert asked[0][2] == {"method": "trace", "device": planned_for, **how}
    # half of 1000 MiB less NCCL's 667.6 are 166 samples
    assert found.budget == int((1000 * MiB - NCCL) * 0.5)
    assert [(row.batch_size, row.limited_by) for row in found.rows] == [(166, "memory")] * 2
    assert found.device == planned_for
    few = mp.plan_lengths(net(), lambda length: torch.zeros(2, length), [16], device=card, max_batch_size=3)
    assert (few.rows[0].batch_size, few.rows[0].limited_by, few.device) == (3, "max_batch_size", card)
    named = mp.plan_lengths(net(), lambda length: torch.zeros(2, length), [16], device="T4")
    assert (named.device, named.budget) == (mp.gpu("T4"), int(mp.gpu("T4").capacity * 0.95))
    here = mp.Device("here", total=2**34, index=0)
    monkeypatch.setattr(planning_job, "detect_devices", lambda: (here,))
    assert mp.plan_lengths(net(), lambda length: torch.zeros(2, length), [16]).device == here


def test_a_trainers_ranks_leave_room_for_nccl_at_each_length(monkeypatch):
    traces = [Trace(n, (Event(0, n * MiB, "forward", 1),)) for n in (2, 3, 5)]
    monkeypatch.setattr(
        api, "estimate", lambda *arguments, **how: Estimate("trace", Formula((), 0, 0, 0, 0), scale(traces))
    )
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    monkeypatch.setattr(trainer.strategy, "_process_group_backend", "nccl", raising=False)
    monkeypatch.setattr(trainer.strategy, "_get_process_group_backend", lambda: "nccl")
    card = mp.Device("a card", total=2**30)
    found = mp.plan_lengths(net(), lambda length: torch.zeros(2, length), [16], device=card, trainer=trainer)
    assert found.device.capacity == card.capacity - NCCL


# ---------------------------------------------------------------------------------------------------------------- plan


def test_a_plan_fits_and_the_next_size_does_not(estimate):
    plan = mp.plan(Module(), torch.zeros(4, 1024), device=CARD)
    assert plan.budget == int(200 * MiB * (1 - plan.margin))
    assert estimate.fits(plan.batch_size, plan.budget)
    assert not estimate.fits(plan.batch_size + 1, plan.budget)
    assert plan.limited_by == "memory"
    assert plan.peak_reserved <= CARD.capacity
    assert plan.peak_allocated == estimate.peak_allocated(plan.batch_size) == sum(plan.breakdown.values())
    assert plan.formula_peak == estimate.formula.memory(plan.batch_size)
    assert plan.phase == estimate.phase(plan.batch_size)


def test_a_plan_names_the_limit_that_decided():
    loader = DataLoader(torch.zeros(300, 1024), batch_size=4)
    by_dataset = mp.plan(Module(), loader, device=CARD)
    assert (by_dataset.batch_size, by_dataset.limited_by) == (300, "dataset")
    by_limit = mp.plan(Module(), loader, device=CARD, max_batch_size=100, multiple_of=8)
    assert (by_limit.batch_size, by_limit.limited_by) == (96, "max_batch_size")


def test_an_effective_batch_size_is_accumulated(estimate):
    free = mp.plan(Module(), torch.zeros(4, 1024), device=CARD).batch_size  # without accumulation, over 8000
    accumulated = mp.estimate(Module(), torch.zeros(4, 1024), accumulate_grad_batches=3)
    plan = mp.plan(Module(), torch.zeros(4, 1024), device=CARD, effective_batch_size=2**14)
    assert 2**12 < free < 2**14
    assert (plan.batch_size * plan.accumulate_grad_batches, plan.limited_by) == (2**14, "memory")
    assert accumulated.fits(plan.batch_size, plan.budget)
    assert not accumulated.fits(2 * plan.batch_size, plan.budget)  # the next larger divisor
    assert plan.peak_allocated == accumulated.peak_allocated(plan.batch_size)
    whole = mp.plan(Module(), torch.zeros(4, 1024), device=CARD, effective_batch_size=free)  # fits at once
    assert (whole.batch_size, whole.accumulate_grad_batches) == (free, 1)
    assert whole.limited_by == "effective_batch_size"
    assert whole.peak_reserved == estimate.peak(free, CARD.capacity)


def test_an_effective_batch_size_with_a_trainer():
    two = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    plan = mp.plan(
        Module(), torch.zeros(4, 1024), device=CARD, trainer=two, effective_batch_size=600, max_batch_size=99
    )
    assert (plan.batch_size, plan.accumulate_grad_batches) == (75, 4)  # 75 · 4 · 2 = 600, and 300 / 3 = 100 is over 99
    with pytest.raises(MisconfigurationException, match="effective_batch_size=601 has no equal share for each of 2"):
        mp.plan(Module(), torch.zeros(4, 1024), device=CARD, trainer=two, effective_batch_size=601)
    with pytest.raises(MisconfigurationException, match="and it is 4 already: leave one out"):
        mp.plan(Module(), torch.zeros(4, 1024), device=CARD, effective_batch_size=600, accumulate_grad_batches=4)
    with pytest.raises(ValueError, match="effective_batch_size is an int of at least 1, not 0"):
        mp.plan(Module(), torch.zeros(4, 1024), device=CARD, effective_batch_size=0)
    with pytest.raises(ValueError, match=r"effective_batch_size=600 is 600 samples a step .* has 300 for each"):
        mp.plan(Module(), DataLoader(torch.zeros(300, 1024)), device=CARD, effective_batch_size=600)


def test_a_trainers_accumulation_is_in_the_plan(estimate):
    trainer = pl.Trainer(accelerator="cpu", accumulate_grad_batches=4, logger=False, enable_checkpointing=False)
    plan = mp.plan(Module(), torch.zeros(4, 1024), device=CARD, trainer=trainer)
    assert plan.accumulate_grad_batches == 4
    assert plan.batch_size < mp.plan(Module(), torch.zeros(4, 1024), device=CARD).batch_size


def test_a_larger_margin_is_a_smaller_batch():
    batch = torch.zeros(4, 1024)
    sizes = [mp.plan(Module(), batch, device=CARD, margin=margin).batch_size for margin in (0, 0.3, 0.6)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


@pytest.mark.parametrize("margin", [-0.01, 1, 2, "0.1", None, False])
def test_a_margin_that_is_no_part(margin):
    with pytest.raises(
        ValueError, match="margin is the part of the device's memory to leave free, at least 0 and below 1"
    ):
        mp.plan(Module(), torch.zeros(4, 1024), device=CARD, margin=margin)


def test_a_plan_that_does_not_fit_is_an_error_with_what_is_lacking(monkeypatch):
    monkeypatch.setattr(session, "advise_job", lambda *arguments: ())  # see test_advice.py
    # Adam needs 16 MiB for the weights alone, and two more of gradients and the optimizer's temporaries
    small = mp.Device("a small card", total=16 * MiB)
    with pytest.raises(
        mp.DoesNotFitError, match="Module does not fit on a small card at batch size 1: it lacks"
    ) as caught:
        mp.plan(Module(), torch.zeros(4, 1024), device=small, margin=0)
    assert caught.value.available == 16 * MiB < caught.value.needed
    with pytest.raises(mp.DoesNotFitError, match="at batch size 4096: it lacks"):
        mp.plan(Module(), torch.zeros(4, 1024), device=mp.Device("card", total=48 * MiB), min_batch_size=4096)


def test_a_plan_by_the_formula_is_its_arithmetic():
    plan = mp.plan(net(), torch.zeros(4, 1024), device=CARD, method="formula")
    # params = grads = 4 · (1024 · 1024 + 1024 + 1024 · 10 + 10); I1 = 4096; Ii = 4096 (linear), 4096 (ReLU), 40
    fixed, sample = 2 * 4 * (1024 * 1024 + 1024 + 10240 + 10), 4096 + 2 * (4096 + 4096 + 40)
    assert plan.batch_size == (plan.budget - fixed) // sample
    assert plan.peak_reserved == plan.formula_peak == fixed + plan.batch_size * sample
    assert plan.method == "formula"


# ------------------------------------------------------------------------------------------------------------- lengths


def test_a_curve_over_lengths():
    card = mp.Device("a card", total=1024 * MiB)
    found = mp.plan_lengths(Attention(), tokens, [1024, 256, 4096, 256], device=card, margin=0.1)
    assert [row.length for row in found.rows] == [256, 1024, 4096]
    assert (found.device, found.budget) == (card, int(0.9 * card.capacity))
    for row in found.rows:
        estimate = mp.estimate(Attention(), tokens(row.length), method="trace", device=card)
        assert estimate.fits(row.batch_size, found.budget)
        assert not estimate.fits(row.batch_size + 1, found.budget)
        assert row.peak == estimate.peak(row.batch_size, card.capacity) <= found.budget
        assert (row.limited_by, row.tokens) == ("memory", row.length * row.batch_size)
        # of a sample at least its scores, their softmax and the gradient of one are alive at once: 12 · length² bytes
        assert row.batch_size <= found.budget // (12 * row.length**2)
    # tokens are fewer the longer they are: 4 times the length is 16 times the scores
    assert [row.tokens for row in found.rows] == sorted((row.tokens for row in found.rows), reverse=True)
    assert found.token_budget == found.rows[-1].tokens
    assert all(found.token_budget // row.length <= row.batch_size for row in found.rows)


def test_a_length_of_which_no_sample_fits():
    # of 8192 tokens the scores alone are 4 · 8192² bytes = 256 MiB
    short, long = mp.plan_lengths(Attention(), tokens, [128, 8192], device=CARD).rows
    assert short.batch_size > 0
    assert (long.batch_size, long.tokens, long.limited_by) == (0, 0, "memory")
    assert long.peak > 256 * MiB
    assert mp.Lengths((short, long), CARD, CARD.capacity).token_budget == 0


def test_a_largest_batch_size_is_no_limit_of_tokens():
    found = mp.plan_lengths(Attention(), tokens, [64, 2048], device=CARD, max_batch_size=16)
    short, long = found.rows
    assert (short.batch_size, short.limited_by, short.tokens) == (16, "max_batch_size", 1024)
    assert (long.limited_by, found.token_budget) == ("memory", long.tokens)
    assert long.tokens > short.tokens
    alone = mp.plan_lengths(Attention(), tokens, [64, 128], device=CARD, max_batch_size=16)
    assert alone.token_budget == 16 * 128  # at most 16 samples of either are within it


def test_room_for_nccl_at_each_length():
    card = mp.Device("a card", total=2**30)
    (one,) = mp.plan_lengths(Attention(), tokens, [1024], device=card).rows
    found = mp.plan_lengths(Attention(), tokens, [1024], device=card, devices=2)
    assert found.device.capacity == card.capacity - 700_000_000
    assert found.rows[0].batch_size < one.batch_size
    gloo = pl.strategies.DDPStrategy(process_group_backend="gloo")
    assert mp.plan_lengths(Attention(), tokens, [1024], device=card, devices=2, strategy=gloo).device == card


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"lengths": []}, ValueError, r"lengths is empty: name at least the longest, as in \[128, 512, 2048\]"),
        ({"lengths": [128, 0]}, ValueError, "a length is an int of at least 1, not 0"),
        ({"lengths": [128.0]}, ValueError, r"a length is an int of at least 1, not 128\.0"),
        (
            {"make_batch": torch.zeros(2, 8)},
            TypeError,
            r"make_batch makes a batch of a length \(make_batch\(512\)\): not",
        ),
        ({"margin": 1}, ValueError, "margin is the part of the device's memory to leave free"),
        ({"method": "formula"}, ValueError, "plan_lengths plans each length by its trace: leave method out"),
    ],
    ids=str,
)
def test_wrong_lengths_are_rejected(arguments, kind, text):
    with pytest.raises(kind, match=text):
        mp.plan_lengths(Attention(), **{"make_batch": tokens, "lengths": [128], "device": CARD, **arguments})


def test_a_step_that_cannot_be_traced_has_no_curve():
    class Reads(Attention):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * self.head.bias.detach().numpy().sum()

    with pytest.raises(mp.TraceError, match="Reads cannot be traced: "):
        mp.plan_lengths(Reads(), tokens, [128], device=CARD)


def test_a_curve_is_what_the_null_gpu_trains(nullgpu):
    source, script = Path(mp.__file__).parents[1], PROGRAMS / "lengths_cases.py"
    done = nullgpu([sys.executable, script], PYTHONPATH=source, NULLGPU_MEMORY=2**31)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("SHOWN "))
    shown = json.loads(line[6:])
    for point in shown["curve"]:  # the shortest and the longest, without a margin
        assert point["reserved"] == pytest.approx(point["predicted"], rel=0.005)
        assert point["with 5 % more"] is None
    # batches of all lengths in turn: by the budget; of each row's own size, whose blocks fit no other row's
    assert 0 < shown["by the budget"] <= shown["capacity"]
    assert shown["own sizes"] is None
    assert 0 < shown["own sizes, growing segments"] <= shown["capacity"]
