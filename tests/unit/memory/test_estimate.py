"""An estimate made by hand, from events whose sum can be done in one's head."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_memplan.cuda.cudnn_process import FORWARD, MOVED
from lightning_memplan.cuda.workspaces import taken
from lightning_memplan.memory.allocator_settings import AllocatorSettings
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.memory.events import Event, Trace
from lightning_memplan.memory.fitting import start_near
from lightning_memplan.memory.formula import Formula
from lightning_memplan.memory.program import scale
from lightning_memplan.memory.search import largest_fitting
from lightning_memplan.memory.structure import structure_of
from lightning_memplan.types import Layer

MiB = 2**20
POINTS = (2, 3, 5)
CHOICES = ("expected", "high")
ROWS = (Layer("conv", "Conv2d", 10, 40, 40, (4, 4), 45),)
FORMULA = Formula(ROWS, parameter_bytes=1000, gradient_bytes=900, input_bytes=10, feature_bytes=45)


def steps_of(x: int) -> tuple[Event, ...]:
    """Two steps of a network with 4 MiB of weights, a map of x MiB, a gradient and, from the first step on, a state."""

    def event(block: int, size: int, phase: str, step: int, category: str = "other") -> Event:
        return Event(block, size, phase, step, category)

    return (
        event(0, 4 * MiB, "setup", 0, "parameters"),
        event(1, x * MiB, "forward", 1, "activations"),  # 4 + x
        event(2, 4 * MiB, "backward", 1, "gradients"),  # 8 + x
        event(1, -1, "backward", 1),
        event(3, 8 * MiB, "optimizer", 1, "optimizer"),  # 16
        event(4, x * MiB, "forward", 2, "activations"),  # 16 + x: the peak
        event(2, -1, "forward", 2),
        event(5, 4 * MiB, "backward", 2, "gradients"),  # 16 + x again
        event(4, -1, "backward", 2),
    )


@pytest.fixture(scope="module")
def traced() -> Estimate:
    return Estimate("trace", FORMULA, scale([Trace(x, steps_of(x)) for x in POINTS]))


@pytest.fixture
def by_formula() -> Estimate:
    return Estimate("formula", FORMULA, notes=("planned by the formula",))


# ------------------------------------------------------------------------------------------------------------ a trace


@pytest.mark.parametrize("batch_size", [1, 12, 100])
def test_the_peak_of_what_is_allocated(traced, batch_size):
    assert traced.peak_allocated(batch_size) == (16 + batch_size) * MiB


def test_of_a_compiled_step_both_ends_are_known(traced):
    least = scale([Trace(x, steps_of(x)[:2]) for x in POINTS])
    compiled = replace(traced, least=least)
    # at 12, parameters and activations: 4 + 12 at least. At most 16 + 12, of four blocks of more than a MiB, each of
    # which the allocator may leave up to one MiB larger
    assert compiled.allocated_range(12) == (16 * MiB, (28 + 4) * MiB)
    # both are cut out of one segment of 20 MiB; the peak is the upper end
    assert compiled.reserved_range(12) == (20 * MiB, traced.peak(12), traced.peak(12))
    assert traced.allocated_range(12) == (28 * MiB, 28 * MiB)


def test_the_upper_bound_has_a_mebibyte_for_each_block_of_more_than_one():
    # of 1 MiB, a byte more, and 3 MiB: two may be left a MiB larger
    sizes = (MiB, MiB + 1, 3 * MiB)
    program = scale([Trace(2, tuple(Event(k, size) for k, size in enumerate(sizes)))])
    estimate = Estimate("trace", FORMULA, program, least=program)
    assert estimate.allocated_range(2) == (5 * MiB + 512, 5 * MiB + 512 + 2 * MiB)


def test_under_a_capacity_idle_segments_are_released():
    # 30 MiB, and when they are freed 40: with ample memory both are reserved
    events = (Event(0, 30 * MiB, step=1), Event(0, -1, step=1), Event(1, 40 * MiB, step=1))
    estimate = Estimate("trace", FORMULA, scale([Trace(2, events)]))
    assert (estimate.peak(2), estimate.peak(2, 50 * MiB)) == (70 * MiB, 40 * MiB)
    assert (estimate.steps(2)[0][1], estimate.steps(2, 50 * MiB)[0][1]) == (70 * MiB, 40 * MiB)
    assert estimate.reserved_range(2, 50 * MiB) == (40 * MiB,) * 3
    assert estimate.methods(2, 50 * MiB)["trace"] == estimate.row(2, 50 * MiB).peak_reserved == 40 * MiB


def test_workspaces_widen_the_range_up_to_the_capacity():
    # 64 images of 56 · 56 through 3 · 3 filters, in layouts between which cuDNN copies: nothing, some, or the most
    def convolution(n):
        return ("convolution", 0, 86, FORWARD, 2, 0, MOVED, n, 64, 64, 1, 56, 56, 56, 56, 3, 3, 1, 1, 1, 1, 1, 1)

    weights = Event(0, 10 * MiB, "setup", 0)
    traces = [Trace(n, (weights, Event(1, 0, step=1, rule=convolution(n)), Event(1, -1, step=1))) for n in POINTS]
    estimate = Estimate("trace", FORMULA, scale(traces))
    # beside 10 MiB of weights, a segment of the workspace's size rounded up to 2 MiB
    expected, high = (10 * MiB + -(-taken(choice, *convolution(64)[1:]) // (2 * MiB)) * 2 * MiB for choice in CHOICES)
    assert 10 * MiB < expected < high
    assert estimate.reserved_range(64) == (10 * MiB, expected, high)
    assert estimate.reserved_range(64, high) == (10 * MiB, expected, high)
    assert estimate.reserved_range(64, high - 1) == (10 * MiB, expected, high - 1)  # no more than there is
    assert estimate.reserved_range(64, expected - 1) == (10 * MiB, expected - 1, expected - 1)


def test_what_is_reserved_is_in_segments(traced):
    # at 12: requests of 1 to 10 MiB are cut out of segments of 20 MiB. The first step's 4 + 12 + 4 fill one, where the
    # optimizer's 8 take the map's place; the second step's map needs a segment of its own: 20 + 12
    assert traced.peak(12) == 32 * MiB
    assert traced.peak(12) >= traced.peak_allocated(12) == 28 * MiB


def test_each_step_has_its_own_peak(traced):
    first, second = traced.steps(12)
    assert (first[0], second[0]) == (max(8 + 12, 16) * MiB, (16 + 12) * MiB)
    assert (first[1], second[1]) == (20 * MiB, 32 * MiB)


@given(batch_size=st.integers(1, 2000))
def test_the_parts_add_up_to_the_peak(traced, batch_size):
    parts = traced.breakdown(batch_size)
    assert sum(parts.values()) == traced.peak_allocated(batch_size)
    assert list(parts.values()) == sorted(parts.values(), reverse=True)
    assert parts["activations"] == batch_size * MiB
    assert (parts["parameters"], parts["gradients"], parts["optimizer"]) == (4 * MiB, 4 * MiB, 8 * MiB)


def test_what_the_allocator_rounds_up_is_a_part():
    # 600 bytes are given 1024, twice
    events = (Event(0, 600, "setup", 0, "parameters"), Event(1, 600, "forward", 1, "activations"))
    estimate = Estimate("trace", FORMULA, scale([Trace(2, events)]))
    assert estimate.breakdown(2) == {"rounding": 848, "parameters": 600, "activations": 600}


def test_the_phase_of_the_peak(traced):
    assert traced.phase(12) == "forward"  # of the second step, beside old gradients and the optimizer's state
    late = Event(9, 10**9, "optimizer", 2)
    estimate = Estimate("trace", FORMULA, scale([Trace(x, (*steps_of(x), late)) for x in POINTS]))
    assert estimate.phase(12) == "optimizer"


@given(batch_size=st.integers(1, 300))
def test_it_fits_in_what_it_reserves_and_not_in_less_than_it_holds(traced, batch_size):
    assert traced.fits(batch_size, traced.peak(batch_size))
    assert not traced.fits(batch_size, traced.peak_allocated(batch_size) - 1)


@given(capacity=st.integers(0, 2**32))
def test_a_size_is_near_the_largest_that_fits_and_not_below_it(traced, capacity):
    near = start_near(traced, capacity)
    assert near is not None
    assert largest_fitting(lambda size: traced.fits(size, capacity)).batch_size <= near
    assert traced.peak_allocated(near + 1) > capacity  # wherever its blocks lie


def test_no_size_is_near_where_none_is_known(by_formula):
    assert start_near(by_formula, 10**9) is None
    fixed = Estimate("trace", FORMULA, scale([Trace(x, (Event(0, 100),)) for x in POINTS]))
    assert start_near(fixed, 10**9) is None  # every size fits
    assert start_near(fixed, 10) == 0


def test_idle_segments_are_released_under_a_capacity():
    # 30 MiB are freed before 40 are requested: 70 in segments, but 40 on a GPU of 45, which has given back the 30
    events = Event(0, 30 * MiB, step=1), Event(0, -1, step=1), Event(1, 40 * MiB, step=1)
    estimate = Estimate("trace", FORMULA, scale([Trace(2, events)]))
    assert (estimate.peak(2), estimate.peak(2, 70 * MiB), estimate.peak(2, 45 * MiB)) == (70 * MiB, 70 * MiB, 40 * MiB)
    assert estimate.peak_allocated(2) == 40 * MiB
    assert estimate.fits(2, 40 * MiB)
    assert not estimate.fits(2, 40 * MiB - 1)


def test_a_replay_is_made_once(traced):
    assert traced.replay(17, 10**9) is traced.replay(17, 10**9)
    assert traced.replay(17, 10**9) is not traced.replay(17)


def test_replays_are_kept_with_the_program_and_its_settings_alone(traced):
    noted = replace(traced, notes=("noted",))
    assert noted.replay(17) is traced.replay(17)
    other = replace(traced, program=scale([Trace(x, steps_of(2 * x)) for x in POINTS]))
    assert other.peak_allocated(17) == (16 + 34) * MiB
    # 4 + 4 + 8 are in a segment of 20 MiB, and 17 in one of 18. An expandable one has 4, 17, 4 in the first step; then
    # 8 where the 17 were, and the next 17 beyond, up to 4 + 17 + 4 + 17 = 42: 60 in granules of 20
    expandable = replace(traced, settings=AllocatorSettings(expandable_segments=True))
    assert (traced.peak(17), expandable.peak(17)) == (38 * MiB, 60 * MiB)
    assert replace(traced, program=None, method="formula").peak(8) == 2700


def test_what_was_traced_at_a_batch_size_is_said_of_it(traced):
    # a map of 2 x MiB at batch size 12 alone: (16 + 24) MiB there
    own = replace(traced, program=scale([Trace(12, steps_of(24))]))
    found = replace(traced, exact={12: own})
    assert (found.peak_allocated(12), found.peak_allocated(13)) == (40 * MiB, 29 * MiB)
    assert (found.breakdown(12)["activations"], found.breakdown(13)["activations"]) == (24 * MiB, 13 * MiB)
    assert found.peak(12) == own.peak(12) != traced.peak(12)
    assert found.steps(12) == own.steps(12)
    assert found.allocated_range(12) == (40 * MiB, 40 * MiB)
    assert found.fits(12, own.peak(12))
    assert not found.fits(12, 40 * MiB - 1)
    assert traced.fits(12, 40 * MiB - 1)


def test_segments_of_a_loop_are_known_by_a_range(traced):
    # the low end is what is allocated: 16 + 12 of 32 MiB in segments
    assert replace(traced, loops=True).reserved_range(12) == (28 * MiB, 32 * MiB, 32 * MiB)
    assert traced.reserved_range(12) == (32 * MiB,) * 3


def test_the_structure_is_that_of_layers_events_and_settings(traced, by_formula):
    # sizes do not count; phases, categories, operators and the method do, and so does each setting
    larger = replace(traced, program=scale([Trace(x, steps_of(7 * x)) for x in POINTS]))
    shorter = replace(traced, program=scale([Trace(x, steps_of(x)[:-1]) for x in POINTS]))
    assert structure_of(traced) == structure_of(larger)
    different = traced, shorter, by_formula, replace(traced, method="probe")
    assert len({structure_of(estimate) for estimate in different}) == 4
    assert len({structure_of(traced, *settings) for settings in ((), ("16-mixed",), ("16-mixed", 2))}) == 3


# --------------------------------------------------------------------------------------------------------- the formula


def test_the_formula_alone(by_formula):
    # 1000 + 900 + 8 · (10 + 2 · 45)
    assert by_formula.peak(8) == by_formula.peak(8, 10**9) == by_formula.peak_allocated(8) == 2700
    assert by_formula.steps(8) == ((2700, 2700),)
    assert by_formula.phase(8) == "backward"
    assert by_formula.breakdown(8) == {"parameters": 1000, "gradients": 900, "activations": 720, "batch": 80}
    assert sum(by_formula.breakdown(8).values()) == 2700


def test_what_fits_by_the_formula(by_formula):
    assert by_formula.fits(8, 2700)
    assert not by_formula.fits(8, 2699)


def test_the_formula_has_nothing_to_replay(by_formula):
    with pytest.raises(ValueError, match="the formula has no events to replay: ask for method='trace'"):
        by_formula.replay(8)


# ---------------------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("kind", ["traced", "by_formula"])
@pytest.mark.parametrize("ask", ["peak", "peak_allocated", "phase", "breakdown", "steps"])
@pytest.mark.parametrize("batch_size", [0, -1, 1.0, "2", True, None])
def test_a_batch_size_that_is_none(request, kind, ask, batch_size):
    with pytest.raises(ValueError, match=f"a batch size is an int of at least 1, not {batch_size!r}"):
        getattr(request.getfixturevalue(kind), ask)(batch_size)


def test_the_rows_are_the_formulas(traced, by_formula):
    assert traced.layers == by_formula.layers == ROWS


def test_it_cannot_be_changed(traced):
    with pytest.raises(dataclasses.FrozenInstanceError):
        traced.method = "formula"


def test_one_sample_tells_nothing_of_more():
    probed = Estimate("probe", FORMULA, scale([Trace(1, steps_of(1))]))
    assert probed.peak_allocated(1) == 17 * MiB  # 16 + 1
    assert probed.fits(1, 100 * MiB)
    assert not probed.fits(2, 100 * MiB)  # two samples did not run
    with pytest.raises(ValueError, match="nothing is known of batch size 2: a probe of 2 samples ran out of memory"):
        probed.peak(2)
