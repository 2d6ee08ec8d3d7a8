"""Plans that all ranks agree on and that real steps confirm; on the null GPU, on cards that are not what they say."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lightning_memplan as mp
from lightning_memplan.errors import PlanningFailedError, StoppedByRankError
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.memory.events import Event, Trace
from lightning_memplan.memory.program import scale
from lightning_memplan.planning import proposal
from lightning_memplan.planning.limits import Limits
from lightning_memplan.planning.plan import make_plan
from lightning_memplan.planning.predictor import OneEstimate
from lightning_memplan.planning.proposal import (
    Proposal,
    RankResult,
    confirmed,
    on_all_ranks,
    on_each_rank,
    see_failures,
)
from lightning_memplan.probe.probe import TrialPeaks
from tests.paths import PROGRAMS

CARD = mp.Device("a card", total=2**30, index=0)
NET = torch.nn.Linear(1, 1000)


class Session:
    """A session whose trials are what the test says."""

    index = 0

    def __init__(self, trial, limits, module_is_on_gpu=False):
        self.trial, self.limits, self.module_is_on_gpu = trial, limits, module_is_on_gpu
        self.predictor = OneEstimate(mp.estimate(NET, torch.zeros(4, 1), method="formula"))
        self.estimate_at = self.predictor.estimate_at
        self.retraced = []

    def plan(self, limits=None, *, retrace=True):
        plan = make_plan(self.predictor, CARD, limits or self.limits, retrace=retrace)
        if retrace:
            self.retraced.append(plan.batch_size)
        return plan


def draft(trial=None, module_is_on_gpu=False, **limits):
    session = Session(trial, Limits(**{"max_batch_size": 100, **limits}), module_is_on_gpu)
    return Proposal(session.plan(), session)


def runs(most):
    """Real steps that run with at most so many samples; ``sizes`` are those that were tried."""

    def tried(plan):
        sizes.append(plan.batch_size)
        ran = plan.batch_size <= most
        return TrialPeaks(plan.peak_allocated, plan.peak_reserved, missing=0 if ran else 2**10)

    sizes = []
    return tried, sizes


def test_what_runs_is_confirmed():
    tried, sizes = runs(100)
    found = confirmed(draft(tried), strict=False).plan
    assert (found.batch_size, found.confirmed, found.notes, sizes) == (100, found.peak_reserved, (), [100])


def test_what_does_not_run_shrinks_until_it_does():
    # a 32nd of the peak less, then a 16th, then an 8th; as many samples less, and one for what no sample takes
    tried, sizes = runs(90)
    found = confirmed(draft(tried), strict=False).plan
    assert sizes == [100, 96, 89] == [100, 100 * 31 // 32, 96 * 15 // 16 - 1]
    assert (found.batch_size, found.limited_by, found.confirmed) == (89, "memory", found.peak_reserved)
    assert found.notes == (
        "shrunk from 100 to 96: real steps of 100 ran out of memory",
        "shrunk from 96 to 89: real steps of 96 ran out of memory",
    )


def test_after_three_shrinks_the_size_is_halved_until_it_runs():
    # 77 // 2 = 38, 38 // 2 = 19, 19 // 2 = 9
    tried, sizes = runs(10)
    found = confirmed(draft(tried), strict=False).plan
    assert sizes == [100, 96, 89, 77, 38, 19, 9]
    assert (found.batch_size, found.limited_by) == (9, "memory")


def test_a_smallest_size_that_does_not_run_raises():
    tried, sizes = runs(0)
    with pytest.raises(mp.DoesNotFitError, match=r"real steps of batch size 1 ran out of memory on a card") as caught:
        confirmed(draft(tried), strict=False)
    assert sizes == [100, 96, 89, 77, 38, 19, 9, 4, 2, 1]
    assert caught.value.needed == caught.value.available + 2**10
    assert caught.value.tried


def test_the_smallest_size_that_is_allowed_is_tried_last():
    # 100, 96 and 89 do not run; a size of 77 is not allowed, and of at least 80 in multiples of 4 the smallest is 80
    tried, sizes = runs(82)
    found = confirmed(draft(tried, min_batch_size=78, multiple_of=4), strict=False).plan
    assert sizes == [100, 96, 88, 80]
    assert (found.batch_size, found.limited_by, found.confirmed) == (80, "memory", found.peak_reserved)
    # it is tried although its prediction is above what was there, and nothing smaller after it
    tried, sizes = runs(79)
    with pytest.raises(mp.DoesNotFitError, match="real steps of batch size 80 ran out of memory"):
        confirmed(draft(tried, min_batch_size=78, multiple_of=4), strict=False)
    assert sizes == [100, 96, 88, 80]


def test_a_plan_that_shrinks_keeps_what_was_noted():
    tried, _ = runs(97)
    found = confirmed(draft(tried).noted("a note"), strict=False).plan
    assert found.notes == ("a note", "shrunk from 100 to 96: real steps of 100 ran out of memory")


def test_steps_that_fail_otherwise_leave_the_plan_and_give_their_memory_back(monkeypatch):
    def fails(plan):
        raise KeyError("theirs")

    gone = []
    monkeypatch.setattr(proposal, "give_back", gone.append)
    traced = draft(fails)
    traced = replace(traced, plan=replace(traced.plan, method="trace"))
    found = confirmed(traced, strict=False).plan
    (note,) = found.notes
    assert note.startswith("not confirmed by real steps, which failed on a copy: ")
    assert "KeyError" in note
    assert (found.batch_size, found.confirmed, gone) == (100, None, [torch.device("cuda", 0)])
    with pytest.raises(KeyError, match="theirs"):
        confirmed(draft(fails), strict=True)


def test_a_formula_alone_sets_no_size_at_which_real_steps_failed():
    def fails(plan):
        raise KeyError("theirs")

    with pytest.raises(PlanningFailedError, match="only the formula gives a batch size, and no real step confirms it"):
        confirmed(draft(fails), strict=False, is_fatal=lambda error: False)


def test_no_real_steps_run_beside_a_module_that_is_on_the_gpu():
    tried, sizes = runs(0)
    found = confirmed(draft(tried, module_is_on_gpu=True), strict=False).plan
    assert (found.batch_size, found.confirmed, sizes) == (100, None, [])
    assert found.notes == ("not confirmed by real steps: the module is on the GPU already, beside a copy of it",)


def test_a_single_sample_does_not_shrink():
    tried, sizes = runs(0)
    with pytest.raises(mp.DoesNotFitError, match="real steps of batch size 1 ran out of memory"):
        confirmed(draft(tried).at(1), strict=False)
    assert sizes == [1]


def test_a_card_that_fails_raises(monkeypatch):
    def fails(plan):
        raise torch.AcceleratorError("device-side assert triggered")

    with pytest.raises(torch.AcceleratorError, match="device-side assert triggered"):
        confirmed(draft(fails), strict=False)


def ranks(monkeypatch, *others):
    """Another rank, which says these sizes one after another."""
    said = iter(others)

    def over_ranks(word):
        size = next(said)
        return [word, RankResult("other", size, reason="" if size else "ValueError: theirs")]

    monkeypatch.setattr(proposal, "over_ranks", over_ranks)


def test_the_smallest_of_all_ranks_is_confirmed_by_all(monkeypatch):
    ranks(monkeypatch, 60, 60)
    tried, sizes = runs(100)
    found = confirmed(on_all_ranks(lambda: draft(tried)), strict=False).plan
    assert (found.batch_size, sizes) == (60, [60])
    assert found.peak_reserved == draft().estimate.peak(60)
    assert found.notes == ("rank 1 (other) decides for all: here alone the batch size would be 100",)


def test_the_rank_that_decides_says_what_limits_the_size(monkeypatch):
    monkeypatch.setattr(proposal, "over_ranks", lambda word: [word, RankResult("other", 60, "dataset")])
    assert on_all_ranks(draft).plan.limited_by == "dataset"
    monkeypatch.setattr(proposal, "over_ranks", lambda word: [word, RankResult("other", 101, "dataset")])
    assert on_all_ranks(draft).plan == draft().plan
    said = []
    monkeypatch.setattr(proposal, "over_ranks", lambda word: said.append(word) or [word])
    assert on_all_ranks(draft).plan == draft().plan
    assert said == [RankResult("a card", 100, draft().plan.limited_by)]


def test_where_another_rank_shrinks_this_one_tries_again(monkeypatch):
    ranks(monkeypatch, 50, 50)
    tried, sizes = runs(100)
    found = confirmed(draft(tried), strict=False).plan
    assert (found.batch_size, sizes) == (50, [100, 50])
    assert found.confirmed == found.peak_reserved == draft().estimate.peak(50)


def test_where_one_rank_cannot_plan_all_raise(monkeypatch):
    ranks(monkeypatch, 0)
    with pytest.raises(PlanningFailedError, match=r"^rank 1: ValueError: theirs$"):
        on_all_ranks(draft)

    def fails():
        raise KeyError("mine")

    ranks(monkeypatch, 7)
    with pytest.raises(KeyError, match="mine"):
        on_all_ranks(fails)


def test_what_is_kept_must_fit():
    kept = draft().kept(500).plan
    assert (kept.batch_size, kept.limited_by, kept.peak_reserved) == (500, "checkpoint", draft().estimate.peak(500))
    with pytest.raises(mp.DoesNotFitError, match="the checkpoint's batch size 999999 cannot be kept; resume='plan'"):
        draft().kept(999_999)


def test_a_kept_size_needs_no_margin_and_no_samples():
    # Half of the GPU is the budget, which 60 MB of weights at four states nearly fill: 13 samples fit the GPU alone
    tight = draft(max_batch_size=None, multiple_of=8, samples=16)
    fits = tight.session.estimate_at(13).peak(13)
    tight = replace(tight, session=Session(None, replace(tight.session.limits, budget=fits - 1)))
    with pytest.raises(mp.DoesNotFitError):
        tight.session.plan(tight.session.limits.exactly(13))
    kept = tight.kept(13).plan
    assert (kept.batch_size, kept.limited_by, kept.budget) == (13, "checkpoint", CARD.capacity)
    assert tight.kept(17).plan.batch_size == 17  # more samples than a rank has, and no multiple of 8


def test_a_kept_size_is_not_traced_again_and_keeps_the_notes_of_the_plan():
    found = draft().noted("a note")
    assert found.session.retraced == [100]
    kept = found.kept(50)
    assert found.session.retraced == [100]
    assert kept.plan.notes == found.plan.notes == (*draft().plan.notes, "a note")
    assert kept.session is found.session


def test_a_kept_size_that_does_not_fit_says_what_is_needed():
    with pytest.raises(mp.DoesNotFitError) as caught:
        draft().kept(999_999)
    assert caught.value.needed == draft().estimate.peak(999_999) > caught.value.available == CARD.capacity


@pytest.mark.parametrize(("size", "kept"), [(20, True), (24, True), (16, False), (60, True), (240, False)])
def test_a_kept_size_divides_the_effective_batch_size(size, kept):
    # 240 samples on two ranks: 20 · 2 · 6 and 24 · 2 · 5, but 16 · 2 is no divisor, nor is 240 · 2
    found = draft(effective_batch_size=240, ranks=2)
    after = found.kept(size).plan
    if kept:
        assert (after.batch_size, after.accumulate_grad_batches) == (size, 120 // size)
        assert after.notes == found.plan.notes
    else:
        note = f"the checkpoint's batch size {size} does not divide the effective batch size: not kept"
        assert after == replace(found.plan, notes=(*found.plan.notes, note))


@pytest.mark.parametrize("limits", [{}, {"effective_batch_size": 240, "ranks": 2}, {"effective_batch_size": 90}])
def test_a_proposal_at_another_size_is_the_plan_of_that_size(limits):
    found = draft(**limits)
    at = found.at(30).plan
    alone = found.session.plan(found.session.limits.exactly(30))
    assert at == replace(alone, limited_by=found.plan.limited_by, notes=found.plan.notes)
    # 240 samples on two ranks are 4 batches of 30 on each, where 60 were planned twice; 90 on one are 3
    assert at.accumulate_grad_batches == {None: 1, 240: 4, 90: 3}[limits.get("effective_batch_size")]


def test_another_size_is_not_confirmed_by_steps_of_the_first():
    found = draft()
    found = replace(found, plan=replace(found.plan, confirmed=2**20, accumulate_grad_batches=7))
    assert found.at(100) is found
    assert found.at(99).plan.confirmed is None
    assert found.at(99).plan.accumulate_grad_batches == 7  # the Trainer's own, which nobody asked to change


# --------------------------------------------------------------------------------------------------- smaller proposals

MiB = 2**20


class Steps(Session):
    """A session that keeps what is asked of it, of a step that takes 1 MiB a sample and frees 600 MiB before."""

    def __init__(self, trial=None, limits=None, fails=0):
        super().__init__(trial, limits or Limits(0.0))
        events = (Event(0, 600 * MiB, "setup"), Event(0, -1, "setup"))
        traces = [Trace(n, (*events, Event(1, n * MiB, "forward", 1))) for n in (2, 3, 5)]
        self.predictor = OneEstimate(Estimate("trace", self.predictor.estimate.formula, scale(traces)))
        self.estimate_at, self.asked, self.fails = self.sized, [], fails

    def sized(self, batch_size):
        assert batch_size > 0
        return self.predictor.estimate_at(batch_size)

    def plan(self, limits=None, *, retrace=True):
        self.asked.append(limits)
        if len(self.asked) <= self.fails:
            raise mp.DoesNotFitError("not this one", needed=2, available=1)
        return super().plan(limits, retrace=retrace)


def test_a_smaller_size_is_searched_below_the_one_that_did_not_run():
    limits = Limits(0.25, min_batch_size=3, multiple_of=2)
    least = replace(limits.exactly(4), budget=sys.maxsize)  # whatever it needs: it is tried
    half = replace(limits, max_batch_size=5, budget=sys.maxsize)
    assert list(proposal._smaller(limits, 10, 7, 500)) == [replace(limits, max_batch_size=7, budget=500), half, least]
    assert list(proposal._smaller(limits, 10, 1, 500)) == [replace(limits, max_batch_size=1, budget=500), half, least]
    assert list(proposal._smaller(limits, 10, 0, 500)) == [half, least]
    assert list(proposal._smaller(limits, 7, 0, 500)) == [least]  # half of it is below the smallest
    assert list(proposal._smaller(limits, 4, 0, 500)) == []
    assert list(proposal._smaller(replace(limits, budget=9), 10, 0, 500)) == [half, least]


@pytest.mark.parametrize(
    ("attempt", "missing", "budget", "most"),
    [
        (0, 1, 992 * 31 // 32, 961),  # a 32nd less
        (1, 1, 992 * 15 // 16, 930),  # twice that
        (2, 1, 992 * 7 // 8, 868),
        (0, 124 * MiB, 868, 868),  # what was missing
        (3, 1, 992, 496),  # half, within all that was planned
    ],
)
def test_the_budget_shrinks_by_what_was_missing_and_then_the_size_is_halved(attempt, missing, budget, most):
    session = Steps()
    first = Proposal(session.plan(Limits(0.0, max_batch_size=992)), session)
    assert first.plan.peak_reserved == 992 * MiB
    session.asked.clear()
    found = proposal._shrunk(first, TrialPeaks(992 * MiB, 992 * MiB, missing), attempt)
    assert session.asked == [replace(session.limits, max_batch_size=most, budget=budget * MiB)]
    assert found.plan.batch_size <= most


def test_a_size_shrinks_by_one_sample_at_least():
    # with a base of 600 MiB a 32nd of the bytes is more than all samples: by their share 10 become 9
    session = Steps()
    first = Proposal(session.plan(Limits(0.0, max_batch_size=10)), session)
    first = replace(first, plan=replace(first.plan, peak_reserved=31))  # so small that a 32nd is nothing
    session.asked.clear()
    proposal._shrunk(first, TrialPeaks(31, 31, 0), 0)
    assert [limits.max_batch_size for limits in session.asked] == [9, 5]  # 31 bytes hold nothing: half


def test_the_smallest_size_is_tried_where_no_other_fits():
    session = Steps(fails=3)
    first = Proposal(Steps().plan(Limits(0.0, max_batch_size=992)), session)
    with pytest.raises(mp.DoesNotFitError, match=r"^real steps of batch size 992 ran out of memory on a card"):
        proposal._shrunk(first, TrialPeaks(900 * MiB, 900 * MiB, 100 * MiB), 0)
    for fails, size in ((1, 496), (2, 1)):  # half of 992, then the smallest
        session = Steps(fails=fails)
        found = proposal._shrunk(replace(first, session=session), TrialPeaks(900 * MiB, 900 * MiB, 100 * MiB), 0)
        assert found.plan.batch_size == size


def test_a_proposal_at_another_size_keeps_to_the_gpu():
    # of 1300 MiB 600 are idle: 700 samples fit in 1024 MiB
    session = Steps()
    first = Proposal(session.plan(Limits(0.0, max_batch_size=800)), session)
    assert first.estimate.peak(700) == 1300 * MiB
    found = first.at(700).plan
    assert (found.peak_reserved, found.methods["trace"]) == (700 * MiB, 700 * MiB)
    assert found.reserved_range == (700 * MiB,) * 3
    assert found.phase == "forward"
    whole = replace(first, plan=replace(first.plan, effective_batch_size=1400, accumulate_grad_batches=1))
    assert type(whole.at(700).plan.accumulate_grad_batches) is int


def test_the_phase_of_the_peak_is_that_of_the_other_size():
    # the optimizer's 100 MiB are more than a few samples' maps, of 1 MiB each
    session = Steps()
    optimizer = (Event(0, 100 * MiB, "optimizer", 1), Event(0, -1, "optimizer", 1))
    traces = [Trace(n, (*optimizer, Event(1, n * MiB, "forward", 2))) for n in (2, 3, 5)]
    session.predictor = OneEstimate(Estimate("trace", session.predictor.estimate.formula, scale(traces)))
    first = Proposal(session.plan(Limits(0.0, max_batch_size=800)), session)
    assert (first.plan.phase, first.at(101).plan.phase, first.at(99).plan.phase) == ("forward", "forward", "optimizer")


# ---------------------------------------------------------------------------------------------------- why a rank failed


def test_one_rank_alone_is_not_numbered():
    with pytest.raises(PlanningFailedError, match=r"^no room$"):
        see_failures([RankResult(reason="no room")])
    with pytest.raises(PlanningFailedError, match=r"^rank 0: no room; rank 2: no memory$"):
        see_failures([RankResult(reason="no room"), RankResult(), RankResult(reason="no memory")])
    with pytest.raises(StoppedByRankError, match=r"^there is no batch size for all 2 ranks; rank 1: no room$"):
        see_failures([RankResult(), RankResult(reason="no room", fatal=True)])
    see_failures([RankResult(), RankResult()])


def test_whether_an_error_is_fatal_is_asked_of_the_error_itself():
    error, asked = KeyError("mine"), []

    def fails(*arguments):
        raise error

    def is_fatal(found):
        asked.append(found)
        return False

    with pytest.raises(PlanningFailedError, match=r"^what: KeyError: 'mine'") as caught:
        on_each_rank(fails, fails, is_fatal, "what: ")
    assert caught.value.__cause__ is error
    with pytest.raises(PlanningFailedError, match="KeyError: 'mine'"):
        on_all_ranks(fails, is_fatal)
    with pytest.raises(PlanningFailedError, match="KeyError: 'mine'"):
        confirmed(draft(fails), strict=True, is_fatal=is_fatal)
    assert asked == [error] * 3


def test_steps_that_fail_are_real_ones():
    def fails(plan):
        raise KeyError("mine")

    traced = draft(fails)
    traced = replace(traced, plan=replace(traced.plan, method="trace"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proposal, "give_back", lambda device: None)
        (note,) = confirmed(traced, strict=False).plan.notes
    assert "which failed on a copy: the step failed in real steps (KeyError: 'mine')" in note


def test_memory_is_given_back_on_the_gpu_of_the_session(monkeypatch):
    def fails(plan):
        raise KeyError("mine")

    gone = []
    monkeypatch.setattr(proposal, "give_back", gone.append)
    found = draft(fails)
    found.session.index = 3
    confirmed(replace(found, plan=replace(found.plan, method="trace")), strict=False)
    assert gone == [torch.device("cuda", 3)]


# ------------------------------------------------------------------------------------------------- on the null GPU


@pytest.fixture(scope="module")
def shown(nullgpu):
    source = str(Path(mp.__file__).parents[1])
    script = str(PROGRAMS / "confirm_cases.py")
    done = nullgpu([sys.executable, script], PYTHONPATH=source, NULLGPU_MEMORY=3 * 10**9)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("SHOWN "))
    return json.loads(line[6:])


@pytest.mark.parametrize("name", ["fits", "accumulated", "twice the card", "no handle"])
def test_real_steps_take_what_training_takes(shown, name):
    found = shown[name]
    assert found["confirmed"] == found["reserved"]
    assert found["confirmed"] == pytest.approx(found["predicted"], rel=0.01)
    assert found["unchanged"]
    assert found["steps"] == 3


def test_two_steps_of_the_size_are_run(shown):
    assert shown["fits"]["copies"] == [512, 512]
    # the largest divisor of 1200 up to 512, three batches of which are a step
    assert (shown["accumulated"]["parts"], shown["accumulated"]["copies"]) == (3, [400] * 6)


def test_steps_that_take_turns_are_all_run_and_each_is_predicted(shown):
    found = shown["in turn"]
    # eight steps, twice three and how the next begins; two of them are of the wide network, which writes nothing down
    assert found["copies"] == [512] * 6
    assert found["confirmed"] == found["reserved"] == found["predicted"]
    assert found["off"] == [[0, 0]] * 10


def test_a_card_with_half_of_what_it_says(shown):
    found = shown["twice the card"]
    large, *others = found["copies"]
    assert others == [found["batch_size"]] * 2
    assert 0.7 * 3e9 < found["reserved"] < 3e9  # found at once, and most of what there is
    assert found["notes"] == [f"shrunk from {large} to {others[0]}: real steps of {large} ran out of memory"]
    assert found["limited_by"] == "memory"


def test_a_library_that_cannot_allocate(shown):
    found = shown["no handle"]  # over 100 samples
    assert found["copies"][-1] == found["batch_size"] <= 100
    assert len(found["notes"]) <= 3


def test_memory_that_is_never_enough(shown):
    assert "DoesNotFitError: real steps of batch size" in shown["never"]["error"]
    assert shown["never"]["batch_size"] == 2  # as it was


def test_another_error_of_the_copy(shown):
    (note,) = shown["mistake"]["notes"]
    assert "not confirmed by real steps, which failed on a copy: " in note
    assert "KeyError" in note
    assert "confirm_cases.py" in note
    assert (shown["mistake"]["steps"], shown["mistake"]["unchanged"]) == (3, True)
    strict = shown["mistake, strict"]
    assert strict["error"] == 'KeyError: "a mistake of the user\'s"'
    assert strict["lines"][-1] == 'raise KeyError("a mistake of the user\'s")'


@pytest.mark.parametrize("name", ["another card", "not asked", "on the card"])
def test_what_is_not_confirmed(shown, name):
    found = shown[name]
    assert (found["confirmed"], found["copies"]) == (None, [])
    noted = ["not confirmed by real steps: the module is on the GPU already, beside a copy of it"]
    assert found["notes"] == (noted if name == "on the card" else [])
