"""Plans of an estimate that is taken at its word: every field, every limit, and what is said where none fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

import lightning_memplan as mp
from lightning_memplan.errors import UnmetDemandError
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.memory.events import Event, Trace
from lightning_memplan.memory.formula import Formula
from lightning_memplan.memory.program import scale
from lightning_memplan.planning import plan as planning
from lightning_memplan.planning.limits import Limits
from lightning_memplan.planning.plan import largest_batch_size, make_plan
from lightning_memplan.planning.predictor import OneEstimate

MiB, GiB = 2**20, 2**30
FORMULA = Formula((), parameter_bytes=1000, gradient_bytes=900, input_bytes=10, feature_bytes=45)
#: 10 MiB of weights, and a map of 1 MiB a sample
ESTIMATE = Estimate(
    "trace",
    FORMULA,
    scale([Trace(n, (Event(0, 10 * MiB, "setup"), Event(1, n * MiB, "forward", 1))) for n in (2, 3, 5)]),
    notes=("a note",),
)
CARD = mp.Device("a card", total=GiB, context=24 * MiB)  # 1000 MiB for training


class Asked(OneEstimate):
    """A predictor that keeps the sizes at which the step was traced again."""

    def __init__(self, estimate=ESTIMATE, name="Net"):
        super().__init__(estimate, name)
        object.__setattr__(self, "retraced", [])

    def retrace(self, batch_size):
        self.retraced.append(batch_size)


def plan(limits=None, predictor=None, **arguments):
    return make_plan(predictor or Asked(), CARD, limits or Limits(), **arguments)


def test_a_plan_has_what_its_estimate_predicts():
    found = plan(nccl=7)
    # 95 % of 1000 MiB are 950, of which 10 are weights
    assert (found.batch_size, found.budget, found.margin, found.limited_by) == (940, 950 * MiB, 0.05, "memory")
    assert (found.method, found.notes, found.nccl, found.device) == ("trace", ("a note",), 7, CARD)
    assert (found.peak_reserved, found.peak_allocated) == (950 * MiB, 950 * MiB)
    assert found.formula_peak == FORMULA.memory(940)
    assert found.methods == {"trace": 950 * MiB, "formula": FORMULA.memory(940)}
    assert (found.phase, found.breakdown) == ("forward", ESTIMATE.breakdown(940))
    assert found.reserved_range == (950 * MiB,) * 3
    assert (found.accumulate_grad_batches, found.effective_batch_size, found.confirmed) == (1, None, None)


def test_a_plan_is_traced_again_at_its_size_unless_it_is_known_to_run():
    for retrace in (True, False):
        predictor = Asked()
        assert plan(predictor=predictor, retrace=retrace).batch_size == 940
        assert predictor.retraced == [940] * retrace


@pytest.mark.parametrize(
    ("limits", "size", "limited_by"),
    [
        ({"margin": 0.5}, 490, "memory"),
        ({"margin": 0.0}, 990, "memory"),
        ({"budget": 100 * MiB}, 90, "memory"),
        ({"max_batch_size": 64}, 64, "max_batch_size"),
        ({"samples": 50}, 50, "dataset"),
        ({"multiple_of": 100}, 900, "memory"),
        ({"min_batch_size": 940}, 940, "memory"),
        ({"effective_batch_size": 1600}, 800, "memory"),
        ({"effective_batch_size": 1600, "ranks": 4}, 400, "effective_batch_size"),
        ({"failed": 100}, 99, "memory"),
        ({"failed": 100, "multiple_of": 8}, 96, "memory"),
        ({"failed": 100, "min_batch_size": 100}, 100, "memory"),  # the smallest that is allowed is tried again
        ({"failed": 100, "min_batch_size": 200}, 200, "memory"),
        ({"failed": 1000}, 940, "memory"),
    ],
    ids=str,
)
def test_every_limit_is_kept(limits, size, limited_by):
    found = plan(Limits(**limits))
    assert (found.batch_size, found.limited_by) == (size, limited_by)
    assert largest_batch_size(ESTIMATE, CARD, Limits(**limits)) == size


def test_the_effective_batch_size_is_accumulated_over_ranks():
    # 1600 samples on two ranks are 800 each at once; on one in two parts
    for ranks, size, parts in ((1, 800, 2), (2, 800, 1), (4, 400, 1)):
        found = plan(Limits(effective_batch_size=1600, ranks=ranks), accumulate_grad_batches=5)
        assert (found.batch_size, found.accumulate_grad_batches) == (size, parts)
        assert found.effective_batch_size == 1600
    assert plan(accumulate_grad_batches=5).accumulate_grad_batches == 5


def test_a_step_of_more_samples_than_there_are_is_refused():
    said = r"^effective_batch_size=1600 is 800 samples a step on each device, and the dataset has 799 for each: no step"
    with pytest.raises(UnmetDemandError, match=said):
        plan(Limits(effective_batch_size=1600, ranks=2, samples=799))
    assert plan(Limits(effective_batch_size=1600, ranks=2, samples=800)).batch_size == 800


def test_a_demand_that_leaves_no_size_is_told_from_a_dataset_that_does():
    with pytest.raises(UnmetDemandError, match="no batch size divides 1600"):
        plan(Limits(effective_batch_size=1600, multiple_of=7))
    with pytest.raises(UnmetDemandError, match="no batch size is at least 60"):
        plan(Limits(min_batch_size=60, samples=50))
    with pytest.raises(ValueError, match="no batch size is at least 1, at most 50") as caught:
        plan(Limits(multiple_of=64, samples=50))
    assert not isinstance(caught.value, UnmetDemandError)  # nobody asked for it: it is the dataset's


def test_what_does_not_fit_says_what_it_lacks_and_which_gpu_has_it():
    weights = replace(
        ESTIMATE,
        program=scale([Trace(n, (Event(0, 14 * GiB, "setup"), Event(1, n * MiB, step=1))) for n in (2, 3)]),
    )
    with pytest.raises(mp.DoesNotFitError) as caught:
        plan(Limits(min_batch_size=3, multiple_of=2), Asked(weights, "Wide"), nccl=GiB)
    error, text = caught.value, str(caught.value)
    # at 4 samples, the smallest, 14 GiB and a segment of 20 MiB
    assert (error.needed, error.available) == (14 * GiB + 20 * MiB, 950 * MiB)
    assert text.startswith("Wide does not fit on a card at batch size 4: it lacks ")
    # a T4 has 15 GiB less its context and NCCL's GiB, of which 95 % are not enough: the next larger is named
    named = [gpu for gpu in mp.gpus() if gpu.name in text]
    (smallest,) = named
    enough = [gpu for gpu in mp.gpus() if int((gpu.capacity - GiB) * 0.95) >= error.needed]
    assert smallest.capacity == min(gpu.capacity for gpu in enough)


def test_a_machine_without_gpus_is_told_of_none():
    host = mp.Device("the host", total=GiB, kind="cpu")
    weights = replace(ESTIMATE, program=scale([Trace(n, (Event(0, 14 * GiB), Event(1, n * MiB))) for n in (2, 3)]))
    with pytest.raises(mp.DoesNotFitError) as caught:
        make_plan(Asked(weights), host, Limits())
    assert "smallest card" not in str(caught.value)


def test_the_changes_that_would_help_are_asked_at_the_smallest_size():
    class Advises(Asked):
        def advise(self, estimate, batch_size, budget):
            asked.append((estimate, batch_size, budget))
            return ()

    asked = []
    with pytest.raises(mp.DoesNotFitError):
        plan(Limits(budget=5 * MiB, min_batch_size=3), Advises())
    assert asked == [(ESTIMATE, 3, 5 * MiB)]


def test_idle_segments_are_given_back_before_the_gpu_is_full():
    # 600 MiB are freed before a map of 1 MiB a sample: 700 samples do not fit beside them
    events = (Event(0, 600 * MiB, "setup"), Event(0, -1, "setup"))
    found = replace(ESTIMATE, program=scale([Trace(n, (*events, Event(1, n * MiB, "forward", 1))) for n in (2, 3, 5)]))
    assert found.peak(700) == 1300 * MiB
    planned = plan(Limits(0.0, max_batch_size=700), Asked(found))
    assert planned.peak_reserved == 700 * MiB
    assert planned.methods["trace"] == 700 * MiB
    assert planned.reserved_range == (700 * MiB,) * 3


def test_a_step_that_takes_one_size_is_planned_there():
    only = replace(ESTIMATE, only_at=7)
    predictor = Asked(only)
    found = plan(Limits(0.0, min_batch_size=2, max_batch_size=64, samples=5), predictor)
    assert (found.batch_size, found.limited_by, predictor.retraced) == (7, "step", [])
    assert plan(Limits(min_batch_size=7, max_batch_size=7, multiple_of=7), Asked(only)).batch_size == 7
    for limits in ({"min_batch_size": 8}, {"max_batch_size": 6}, {"multiple_of": 2}):
        with pytest.raises(
            ValueError, match=r"^the step takes batch size 7 alone, which min_batch_size=.* do not allow$"
        ):
            plan(Limits(**limits), Asked(only))


@pytest.mark.parametrize(
    ("limits", "size"),
    [({}, 1), ({"min_batch_size": 5, "multiple_of": 4}, 8), ({"effective_batch_size": 1600, "ranks": 2}, 800)],
)
def test_whether_one_size_alone_runs_is_asked_at_the_smallest_or_at_the_whole(limits, size):
    class Sizes(Asked):
        def estimate_at(self, batch_size):
            asked.append(batch_size)
            return super().estimate_at(batch_size)

    asked = []
    plan(Limits(**limits), Sizes())
    assert asked[0] == size


def test_a_demand_of_two_samples_is_one():
    with pytest.raises(UnmetDemandError, match="no batch size is at least 2, at most 1"):
        plan(Limits(min_batch_size=2, samples=1))


def test_advice_says_whether_it_suffices():
    class Advises(Asked):
        def estimate_at(self, batch_size):
            asked.append(batch_size)
            return super().estimate_at(batch_size)

        def advise(self, estimate, batch_size, budget):
            return (mp.Advice("layout", "do it", "none", batch_size, 9 * MiB, 5 * MiB, 5 * MiB),)

    asked = []
    for budget, text in ((5 * MiB, "which fits"), (4 * MiB, "which still lacks")):
        with pytest.raises(mp.DoesNotFitError, match=text):
            plan(Limits(budget=budget, min_batch_size=3), Advises())
    assert asked[-1] == 3  # the smallest that is allowed


def test_a_gpu_that_has_just_enough_is_named_and_none_where_none_has(monkeypatch):
    gpus = [mp.Device("ample", total=4 * GiB), mp.Device("just enough", total=2 * GiB + 7), mp.Device("few", total=GiB)]
    monkeypatch.setattr(planning, "gpus", lambda: gpus)
    # of 2 GiB beside NCCL's 7 bytes half is left free
    assert planning._smallest_gpu(GiB, 0.5, 7).name == "just enough"
    assert planning._smallest_gpu(GiB + 1, 0.5, 7).name == "ample"
    assert planning._smallest_gpu(4 * GiB, 0.5, 7) is None
