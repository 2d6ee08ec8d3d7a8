"""Plans that all ranks agree on and that real steps confirm; on the null GPU, on cards that are not what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import lightning_memplan as mp
from lightning_memplan.errors import PlanningFailedError
from lightning_memplan.planning import proposal
from lightning_memplan.planning.limits import Limits
from lightning_memplan.planning.plan import make_plan
from lightning_memplan.planning.predictor import OneEstimate
from lightning_memplan.planning.proposal import Proposal, RankResult, confirmed, on_all_ranks
from lightning_memplan.probe.probe import TrialPeaks
from tests.paths import PROGRAMS

CARD = mp.Device("a card", total=2**30, index=0)
NET = torch.nn.Linear(1, 1000)


class Session:
    """A session whose trials are what the test says."""

    limits, index = Limits(max_batch_size=100), 0

    def __init__(self, trial, module_is_on_gpu=False):
        self.trial, self.module_is_on_gpu = trial, module_is_on_gpu
        self.predictor = OneEstimate(mp.estimate(NET, torch.zeros(4, 1), method="formula"))
        self.estimate_at = self.predictor.estimate_at

    def plan(self, limits=None, *, retrace=True):
        return make_plan(self.predictor, CARD, limits or self.limits, retrace=retrace)


def draft(trial=None):
    session = Session(trial)
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
    noted = ["not confirmed by real steps: the module is on the card already, beside a copy of it"]
    assert found["notes"] == (noted if name == "on the card" else [])
