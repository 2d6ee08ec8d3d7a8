"""Batch sizes that fit and that the step refuses, or at which it does something else: traced at that very size."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import lightning_memplan as mp
from lightning_memplan.cli.main import main
from lightning_memplan.data.samples import Samples, read_samples
from lightning_memplan.errors import MemplanError
from lightning_memplan.memory import program
from lightning_memplan.memory.allocator import replay
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.memory.events import Event, Trace
from lightning_memplan.memory.formula import Formula
from lightning_memplan.memory.program import scale
from lightning_memplan.memory.search import SearchResult
from lightning_memplan.planning import retrace
from lightning_memplan.planning.job import training_job
from lightning_memplan.planning.limits import Limits
from lightning_memplan.planning.predictor import OneEstimate
from lightning_memplan.planning.retrace import accepted_size, batches_of_many, is_of_many, retrace_at
from lightning_memplan.step.setup import TrainingSetup
from lightning_memplan.trace.tracer import TraceResult, trace_steps
from tests.paths import PROGRAMS
from tests.programs.retrace_cases import (
    WIDTH,
    Does,
    at_most_1000,
    by_eights,
    by_sixtyfours,
    in_quarters,
    in_thirds,
    into_a_queue,
    twice_if_many,
)

CARD = mp.Device("a card", total=2**27)
BATCH = torch.zeros(4, WIDTH)
FORMULA = Formula((), 1000, 900, 10, 45)


def planned(step, **limits):
    return mp.plan(Does(step), BATCH, device=CARD, method="trace", **limits)


@pytest.mark.parametrize(
    ("step", "limits", "size", "error"),
    [
        # of 3 · 4 MiB for weights and Adam's moments, 16 MiB for the queue, the rest for batches of 4 KiB a sample
        (by_eights, {"max_batch_size": 1003}, 1000, "AssertionError: a batch is of eights"),
        (by_eights, {"max_batch_size": 1003, "multiple_of": 3}, 984, "AssertionError: a batch is of eights"),
        (by_eights, {"effective_batch_size": 3000, "max_batch_size": 750}, 600, "AssertionError: a batch is of eights"),
        (in_thirds, {"max_batch_size": 1003}, 1002, "RuntimeError: shape '[3, -1, 1024]' is invalid for input of"),
        (into_a_queue, {"max_batch_size": 1003}, 512, "AssertionError: no message"),
        # 992 runs, 1008 does not, and no more than a 32nd is open
        (at_most_1000, {}, 992, "AssertionError: no message"),
    ],
)
def test_the_largest_batch_size_that_the_step_takes_is_planned(step, limits, size, error):
    found = planned(step, **limits)
    assert (found.batch_size, found.limited_by) == (size, "step")
    (note,) = (note for note in found.notes if "the step refuses them" in note)
    assert error in note
    assert "retrace_cases.py" in note
    assert note.endswith(f": {size} is the largest of those tried that suits it")
    assert "limited by the step itself" in mp.plan_table(found)


def test_a_step_that_takes_the_size_is_planned_as_it_was():
    found = planned(by_eights, max_batch_size=1000)
    assert (found.batch_size, found.limited_by) == (1000, "max_batch_size")
    assert not any("refuses" in note for note in found.notes)


def test_a_limit_that_leaves_no_size_that_the_step_takes():
    with pytest.raises(
        MemplanError, match=r"1003 samples fit, and the step refuses them \(.*a batch is of eights.*\); no"
    ):
        planned(by_eights, min_batch_size=1001, max_batch_size=1003)


@pytest.mark.parametrize("step", [by_sixtyfours, twice_if_many, in_quarters])
def test_a_step_that_does_something_else_at_a_size_is_known_there(step):
    module, size = Does(step), 1003
    found = mp.estimate(module, BATCH, method="trace")
    known = retrace_at(found, size, training_job(module, BATCH))
    (trace,) = trace_steps(TrainingSetup(module), read_samples(BATCH).batches((size,))).traces
    whole = replay([(event.block, event.size, event.stream) for event in trace.events])
    assert known.peak_allocated(size) == whole.peak_allocated
    assert known.peak_allocated(size) != found.peak_allocated(size)
    assert sum(known.breakdown(size).values()) == known.peak_allocated(size)
    assert max(known.phases(size).values()) == known.peak_allocated(size)
    assert known.peak(size - 1) == found.peak(size - 1)


def test_a_size_that_takes_more_than_expected_is_not_planned():
    found = planned(twice_if_many)
    assert (found.batch_size > 500, found.limited_by) == (True, "memory")
    assert found.peak_reserved <= found.budget
    assert "samples were expected to fit, and a trace of so many takes more memory than" in found.notes[-1]


def test_an_error_that_no_size_avoids_is_the_steps_own():
    with pytest.raises(mp.TraceError, match="cannot be traced: the step failed in a trace"):
        planned(lambda module, x: module.net(x[:, :3]).mean())


# ------------------------------------------------------------------------------------------- how many samples are tried

MiB = 2**20


class Small(pl.LightningModule):
    """``step(module, x)`` is its loss; a sample has 16 numbers, which are 64 bytes."""

    def __init__(self, step=lambda module, x: module.net(x).sum()):
        super().__init__()
        self.net, self.step = nn.Linear(16, 16), step

    def training_step(self, batch, batch_idx):
        return self.step(self, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


SAMPLES = torch.zeros(4, 16)


@pytest.fixture
def host(monkeypatch):
    """Give the host a number of bytes."""

    def of(total):
        monkeypatch.setattr(retrace, "cpu_device", lambda: mp.Device("host", total=total, kind="cpu"))

    return of


def small(step=None, **changes):
    module = Small() if step is None else Small(step)
    job = training_job(module, SAMPLES, device=CARD)
    return replace(job, **changes), mp.estimate(module, SAMPLES, method="trace", device=CARD)


def untraced():
    """Return a job, and an estimate that no trace made."""
    return training_job(Small(), SAMPLES, device=CARD), Estimate("trace", FORMULA, a_program((2, 3, 5)))


def test_many_samples_are_tried_where_a_quarter_of_the_host_holds_all_their_batches(host):
    samples = read_samples(SAMPLES)
    host(4 * (32 + 64 + 128) * 64)
    assert [(size, len(batch)) for size, batch in batches_of_many(samples, (32, 64, 128))] == [
        (32, 32),
        (64, 64),
        (128, 128),
    ]
    host(4 * (32 + 64 + 128) * 64 - 1)
    with pytest.raises(mp.TraceError, match=r"^128 samples take too much of the host's memory to try them$") as caught:
        batches_of_many(samples, (32, 64, 128))
    assert caught.value.reason == "too_large"


def test_samples_that_come_by_threes_take_three_times_as_much(host):
    samples = replace(read_samples(SAMPLES), multiple=3)
    host(3 * 4 * 4 * 64)
    assert [size for size, _ in batches_of_many(samples, (4,))] == [12]
    host(3 * 4 * 4 * 64 - 1)
    with pytest.raises(mp.TraceError, match="4 samples take too much"):
        batches_of_many(samples, (4,))


def test_what_the_samples_of_a_batch_share_counts_with_each(host):
    samples = read_samples({"rows": SAMPLES, "table": torch.zeros(1000)})
    host(4 * 4 * (64 + 4000))
    assert [size for size, _ in batches_of_many(samples, (4,))] == [4]
    host(4 * 4 * (64 + 4000) - 1)
    with pytest.raises(mp.TraceError, match="4 samples take too much"):
        batches_of_many(samples, (4,))


def a_program(sizes, each=8):
    return scale([Trace(n, (Event(0, each * n, "forward", 1),)) for n in sizes])


@pytest.mark.parametrize(
    ("sizes", "multiple", "many"),
    [
        ((2, 3, 5), 1, False),
        ((32, 64, 128), 1, True),
        ((60, 120, 240), 1, True),
        ((32, 64), 1, False),
        ((64, 128, 256), 2, True),
        ((32, 64, 128), 2, False),
    ],
)
def test_an_estimate_from_many_samples_is_known_by_its_sizes(sizes, multiple, many):
    samples = replace(read_samples(SAMPLES), multiple=multiple)
    traced = Estimate("trace", FORMULA, a_program(sizes))
    assert is_of_many(traced, samples) is many
    probed = Estimate("probe", FORMULA, a_program((1, 2)), alternatives=(traced,))
    assert is_of_many(probed, samples) is many  # by the trace beside it
    assert not is_of_many(Estimate("formula", FORMULA), samples)


# ----------------------------------------------------------------------------------------------- what stays as it is


def refused(*arguments, **named):
    pytest.fail("nothing is traced")


def test_an_estimate_that_no_trace_can_better_stays(monkeypatch):
    job, found = untraced()
    monkeypatch.setattr(retrace, "trace_steps", refused)
    for stays in (Estimate("formula", FORMULA), replace(found, loops=True)):
        assert retrace_at(stays, 7, job) is stays
    assert retrace_at(found, 3, job) is found  # a size that was traced


@pytest.mark.parametrize(("size", "traced"), [(2**22, True), (2**22 + 1, False)])
def test_a_step_of_few_samples_is_traced_again_up_to_256_mib(monkeypatch, size, traced):
    job, found = untraced()
    asked = []
    monkeypatch.setattr(Samples, "batch", lambda self, size: torch.zeros(min(size, 9), 16))
    monkeypatch.setattr(retrace, "trace_steps", lambda setup, batches, **how: asked.append(batches[0][0]) or 1 / 0)
    if traced:  # 2**22 samples of 64 bytes are 2**28
        with pytest.raises(ZeroDivisionError):
            retrace_at(found, size, job)
        assert asked == [size]
    else:
        assert retrace_at(found, size, job) is found
        assert not asked


def test_a_step_that_refuses_few_samples_is_traced_again_in_a_quarter_of_the_host(host):
    def many(module, x):
        assert len(x) >= 30
        return module.net(x).sum()

    job, found = small(many)
    assert found.program.batch_sizes == (32, 64, 128)
    host(4 * 300 * 64 - 1)
    unseen = retrace_at(found, 300, job)
    text = "300 samples take too much of the host's memory to see whether the step refuses them"
    assert unseen == replace(found, notes=(*found.notes, text))
    assert retrace_at(unseen, 300, job) == unseen  # said once
    host(4 * 300 * 64)
    assert retrace_at(found, 300, job) is found  # the step does the same


def test_a_batch_that_takes_too_long_to_make_is_noted(monkeypatch):
    def too_long(size):
        raise mp.TraceError("it takes too long", reason="too_large")

    job, found = untraced()
    samples = job.source.samples
    object.__setattr__(samples, "make", lambda size: too_long(size) if size > 5 else torch.zeros(size, 16))
    noted = retrace_at(found, 7, job)
    text = "the step was not traced at the batch size that is planned: it takes too long"
    assert noted == replace(found, notes=(*found.notes, text))


@pytest.mark.parametrize(("reason", "raises"), [("refused", True), ("data_dependent", True), ("failed", False)])
def test_a_step_that_fails_at_the_size_refuses_it_or_is_noted(monkeypatch, reason, raises):
    job, found = untraced()

    def fails(*arguments, **named):
        raise mp.TraceError("the step fails", reason=reason)

    monkeypatch.setattr(retrace, "trace_steps", fails)
    if raises:
        with pytest.raises(mp.TraceError, match=r"^the step fails$"):
            retrace_at(found, 7, job)
    else:
        text = "what the step does with 7 samples could not be traced: the step fails"
        assert retrace_at(found, 7, job) == replace(found, notes=(*found.notes, text))


# ---------------------------------------------------------------------------------------------------- what is traced


def asked_of(monkeypatch):
    """Note how steps are traced, and trace them."""
    asked = []

    def noted(setup, batches, *, steps=None, graphs=None, beginning=None):
        asked.append((setup, [(size, len(batch)) for size, batch in batches], steps, graphs.lower_bound, beginning))
        return trace_steps(setup, batches, steps=steps, graphs=graphs, beginning=beginning)

    monkeypatch.setattr(retrace, "trace_steps", noted)
    return asked


def test_a_step_that_does_the_same_is_traced_once_and_its_first_step_alone(monkeypatch):
    job, found = small()
    asked = asked_of(monkeypatch)
    assert retrace_at(found, 7, job) is found
    assert asked == [(job.setup, [(7, 7)], 1, False, job.beginning())]


def test_a_step_that_does_something_else_is_traced_to_its_end(monkeypatch):
    job, found = small(lambda module, x: module.net(torch.cat([x, x]) if len(x) > 6 else x).sum())
    asked = asked_of(monkeypatch)
    known = retrace_at(found, 7, job)
    assert [steps for _, _, steps, *_ in asked] == [1, None]
    assert list(known.exact) == [7]
    (own,) = (known.at(7),)
    assert (own.program.batch_sizes, own.least, own.notes) == ((7,), None, found.notes)
    assert known.program is found.program
    more = retrace_at(known, 8, job)  # what is known of one size stays where another is traced
    assert list(more.exact) == [7, 8]
    assert more.exact[7] is own


@pytest.mark.parametrize(("times", "exact"), [(1, []), (2, [7])])
def test_a_step_that_differs_in_its_workspaces_alone_does_something_else(monkeypatch, times, exact):
    """Another convolution of as many values, for which cuDNN may take a workspace of twice the size."""

    def convolves(size, times):
        return Trace(size, (Event(0, 0, "forward", 1, rule=("convolution", times * size)),))

    monkeypatch.setattr(program, "kernel_bytes", lambda rule, workspaces: rule[1] if workspaces == "high" else 0)
    monkeypatch.setattr(retrace, "trace_steps", lambda *arguments, **named: TraceResult((convolves(7, times),)))
    found = Estimate("trace", FORMULA, scale([convolves(size, 1) for size in (2, 3, 5)]))
    job = training_job(Small(), SAMPLES, device=CARD)
    assert list(retrace_at(found, 7, job).exact) == exact


def test_a_probed_estimate_stays_and_what_the_step_refuses_is_raised():
    job, traced = small(lambda module, x: module.net(torch.cat([x, x]) if len(x) > 6 else x).sum())
    probed = Estimate("probe", FORMULA, a_program((1, 2)), alternatives=(traced,))
    assert retrace_at(probed, 7, job) is probed  # the probe has seen the step, and its own program is another
    job, traced = small(lambda module, x: module.net(x).sum() / (1 if len(x) < 6 else [][1]))
    with pytest.raises(mp.TraceError, match="list index out of range"):
        retrace_at(replace(probed, alternatives=(traced,)), 8, job)


def test_both_bounds_of_a_compiled_step_are_traced(monkeypatch):
    asked = []

    def trace_steps(setup, batches, *, steps=None, graphs=None, beginning=None):
        # nine bytes a sample at the upper bound and six at the lower, where eight and five are expected
        asked.append((steps, graphs.lower_bound))
        size = batches[0][0]
        event = Event(0, (6 if graphs.lower_bound else 9) * size, "forward", 1 if steps else 2)
        return TraceResult((Trace(size, (event,)),))

    monkeypatch.setattr(retrace, "trace_steps", trace_steps)
    monkeypatch.setattr(retrace, "extended", lambda whole, begun: None)  # the first step tells too little
    job = training_job(Small(), SAMPLES, device=CARD)
    known = retrace_at(Estimate("trace", FORMULA, a_program((2, 3, 5)), least=a_program((2, 3), each=5)), 7, job)
    # the upper bound is traced first, and then the lower
    assert asked == [(1, False), (None, False), (1, True), (None, True)]
    own = known.at(7)
    assert [program.at(7)[0][1] for program in (own.program, own.least)] == [9 * 7, 6 * 7]


# --------------------------------------------------------------------------------------------- which size is accepted


class Predicts(OneEstimate):
    """Samples take 1 MiB each; sizes are refused, or ``grown`` to more when they are traced again."""

    def __init__(self, suits=lambda size: True, grown=(), batch_sizes=(2, 3, 5)):
        traces = [Trace(n, (Event(0, n * MiB, "forward", 1),)) for n in batch_sizes]
        super().__init__(Estimate("trace", FORMULA, scale(traces)))
        vars(self).update(suits=suits, grown=grown, asked=[])

    def retrace(self, batch_size):
        self.asked.append(batch_size)
        if not self.suits(batch_size):
            raise mp.TraceError(f"not {batch_size}", reason="refused")
        if batch_size in self.grown:
            trace = Trace(batch_size, (Event(0, self.grown[batch_size] * MiB, "forward", 1),))
            exact = {**self.estimate.exact, batch_size: Estimate("trace", FORMULA, scale([trace]))}
            object.__setattr__(self, "estimate", replace(self.estimate, exact=exact))


def accepted(predictor, size=100, limited_by="dataset", **limits):
    return accepted_size(SearchResult(size, limited_by, 1), predictor, CARD, Limits(0.0, **limits))


def test_a_size_that_suits_is_accepted_as_it_was_found():
    text = (
        "the step does something else at the batch size that is planned: it is traced at that very size, and more "
        "may fit"
    )
    assert accepted(Predicts()) == (100, "dataset", ())
    assert accepted(Predicts(grown={100: 101})) == (
        100,
        "dataset",
        (text,),
    )


def test_the_next_smaller_size_that_suits_is_accepted_and_the_refusal_noted():
    predictor = Predicts(suits=lambda size: size != 100)
    text = "100 samples fit, and the step refuses them (not 100): 98 is the largest of those tried that suits it"
    assert accepted(predictor) == (98, "step", (text,))
    assert predictor.asked == [100, 96, 98]  # 96 of 32 parts; no more than a 32nd is open then


def test_a_size_that_takes_more_when_it_is_traced_is_not_accepted():
    # the GPU has 128 MiB: 100 samples would take 129
    text = (
        "100 samples were expected to fit, and a trace of so many takes more memory than those of others let expect: "
        "98 is the largest of those tried that suits it"
    )
    assert accepted(Predicts(grown={100: 129})) == (98, "dataset", (text,))
    assert accepted(Predicts(grown={100: 128}))[0] == 100
    # of a smaller budget all must fit in that
    assert accepted(Predicts(grown={100: 111}), budget=110 * MiB)[0] == 98
    assert accepted(Predicts(grown={100: 110}), budget=110 * MiB)[0] == 100


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({}, "100 samples fit, and the step refuses them (not 100)"),
        ({"min_batch_size": 100}, "100 samples fit, and the step refuses them (not 100)"),
    ],
)
def test_a_step_that_accepts_no_size_says_why(limits, text):
    with pytest.raises(MemplanError) as caught:
        accepted(Predicts(suits=lambda size: False), **limits)
    assert str(caught.value) == f"{text}; no smaller batch size that is allowed was found to suit it"


@pytest.mark.parametrize(
    ("suits", "limits", "size"),
    [
        (lambda size: size < 50, {}, 49),
        (lambda size: size < 50, {"multiple_of": 20}, 40),
        (lambda size: size % 24 == 0 or size == 5, {"min_batch_size": 6}, 96),
        (lambda size: size < 70, {"effective_batch_size": 600}, 60),  # 75 and 100 divide it too
        (lambda size: size < 70, {"effective_batch_size": 600, "ranks": 2}, 60),
        (lambda size: size < 59, {"effective_batch_size": 600, "ranks": 3}, 50),  # 200 a rank: 40, 50, 100
        (lambda size: size < 70, {"effective_batch_size": 600, "min_batch_size": 70}, None),
    ],
)
def test_a_smaller_size_is_within_the_limits(suits, limits, size):
    if size is None:
        with pytest.raises(MemplanError, match="no smaller batch size that is allowed"):
            accepted(Predicts(suits), **limits)
    else:
        assert accepted(Predicts(suits), **limits)[:2] == (size, "step")


def test_sizes_like_those_that_were_traced_are_tried():
    """Of the multiples of 32 the largest below 200 is 192; multiples of 7 and powers of two are tried beside."""
    predictor = Predicts(lambda size: size % 7 == 0, batch_sizes=(7, 14, 21))
    assert accepted(predictor, size=100)[0] == 98
    assert 98 in predictor.asked
    formula = OneEstimate(Estimate("formula", FORMULA))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OneEstimate, "retrace", lambda self, size: Predicts(lambda n: n < 9).retrace(size))
        assert accepted(formula, size=10)[:2] == (8, "step")


def test_check_refuses_what_the_step_refuses(monkeypatch, capsys):
    monkeypatch.syspath_prepend(PROGRAMS)
    check = "check retrace_cases:of_eights --input 1024 --gpu T4 --method trace --batch-size".split()
    assert main([*check, "64"]) == 0
    assert "fits on T4 at batch size 64" in capsys.readouterr().out
    assert main([*check, "65"]) == 2
    assert "65 samples fit, and the step refuses them (" in capsys.readouterr().err


def test_what_is_set_trains_on_the_null_gpu(nullgpu):
    """512 MiB, of which a context takes 64: 448 MiB, and 5 % are left free."""
    done = nullgpu([sys.executable, str(PROGRAMS / "retrace_cases.py")], NULLGPU_MEMORY=2**29, NULLGPU_CONTEXT=2**26)
    shown = json.loads(done.stdout.strip().splitlines()[-1])
    for found in shown.values():
        assert found["measured"] == found["predicted"]
    sizes = {name: found["batch_size"] for name, found in shown.items()}
    assert sizes["by_eights trace"] % 8 == sizes["in_thirds trace"] % 3 == 0
    assert sizes["into_a_queue trace"] == sizes["into_a_queue auto"] == 4096
    assert 1000 * 31 / 32 <= sizes["at_most_1000 trace"] <= 1000
    used = [found["used"] for name, found in shown.items() if found["limited_by"] == "memory" and "sixty" not in name]
    assert len(used) == 4
    assert min(used) > 0.95
