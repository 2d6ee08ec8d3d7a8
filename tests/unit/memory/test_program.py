"""Sizes as polynomials of the batch size: exact through the traced sizes, and an error where traces disagree."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_memplan.cuda.kernel_sizes import kernel_bytes
from lightning_memplan.errors import TraceError
from lightning_memplan.memory.events import FREE, Event, Trace
from lightning_memplan.memory.program import Polynomial, extended, interleaved, scale

POINTS = (2, 3, 5)


@given(st.lists(st.integers(-(10**12), 10**12), min_size=1, max_size=3), st.integers(1, 10**5))
def test_a_polynomial_of_at_most_the_second_degree_is_found_exactly(coefficients, batch_size):
    def value(x):
        return sum(c * x**k for k, c in enumerate(coefficients))

    found = Polynomial.through(POINTS, [value(x) for x in POINTS])
    assert found.at(batch_size) == value(batch_size)
    while len(coefficients) > 1 and coefficients[-1] == 0:
        coefficients.pop()
    assert found.degree == len(coefficients) - 1


@given(st.tuples(*[st.integers(0, 10**15)] * 3))
def test_it_goes_through_every_point(values):
    found = Polynomial.through(POINTS, values)
    assert tuple(found.at(x) for x in POINTS) == values


def test_the_lowest_degree_is_taken():
    assert Polynomial.through(POINTS, (7, 7, 7)) == Polynomial((7,))
    assert Polynomial.through(POINTS, (5, 7, 11)).degree == 1  # 2x + 1
    assert Polynomial.through(POINTS, (4, 9, 25)).degree == 2  # x²


def test_fractions_are_exact_and_rounded_down():
    # through (2, 1), (4, 2): x / 2, which at 5 is 2.5
    half = Polynomial.through((2, 4), (1, 2))
    assert (half.at(10**15), half.at(5)) == (5 * 10**14, 2)


def test_one_point_is_a_constant():
    assert Polynomial.through((1,), (42,)).at(1000) == 42


def trace(batch_size, *sizes, step=1, **labels):
    """Blocks 0, 1, ... of these sizes, then freed in order."""
    made = [Event(k, size, step=step, **labels) for k, size in enumerate(sizes)]
    return Trace(batch_size, (*made, *(Event(k, -1, step=step) for k in range(len(sizes)))))


def test_events_are_scaled_one_by_one():
    # a weight of 100 bytes, a feature map of 40 bytes a sample, a table of x² · 4
    program = scale([trace(x, 100, 40 * x, 4 * x * x) for x in POINTS])
    assert program.at(10) == [(0, 100, 0), (1, 400, 0), (2, 400, 0), (0, -1, 0), (1, -1, 0), (2, -1, 0)]
    assert program.batch_sizes == POINTS


def test_equal_columns_share_an_entry():
    program = scale([trace(x, *[40 * x] * 50, *[8] * 50) for x in POINTS])
    assert len(program.table) == 2


def test_a_size_never_is_negative():
    # 10 - 2x: 6, 4, 0, and below zero from there on
    assert scale([trace(x, 10 - 2 * x) for x in POINTS]).at(100)[0] == (0, 0, 0)


def test_a_kernel_is_asked_again():
    # 3 rows of as many numbers as samples, rounded up to 128, of 4 bytes: 3 · 128 · 4 at each batch size that was
    # traced, 3 · 256 · 4 at 129 and 3 · 512 · 4 at 512, which is no polynomial of theirs
    def rule(x):
        return ("rounded_rows", 3, x, 128, 4)

    assert [kernel_bytes(rule(x)) for x in POINTS] == [1536] * 3
    program = scale([Trace(x, (Event(0, 1536, rule=rule(x)), Event(0, -1))) for x in POINTS])
    assert [program.at(x)[0][1] for x in (128, 129, 512)] == [1536, 3072, 6144]


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=20), st.integers(1, 9999))
def test_a_program_is_what_a_trace_at_that_size_would_be(lines, batch_size):
    program = scale([trace(x, *(a + b * x for a, b in lines)) for x in POINTS])
    wanted = trace(batch_size, *(a + b * batch_size for a, b in lines))
    assert program.at(batch_size) == [(e.block, e.size, e.stream) for e in wanted.events]


def test_where_the_steps_and_their_phases_begin():
    steps, phases = (0, 0, 1, 1, 1, 2), ("setup", "setup", "forward", "forward", "backward", "backward")
    events = [Event(k, 8, phase, step) for k, (step, phase) in enumerate(zip(steps, phases, strict=True))]
    program = scale([Trace(2, tuple(events))])
    assert program.steps() == (0, 2, 5, 6)
    assert program.phases() == (0, 2, 4, 5, 6)


# --------------------------------------------------------------------------------------------------------- disagreement


def test_traces_with_other_numbers_of_events_are_rejected():
    with pytest.raises(TraceError, match=r"the step has 6 events at batch size 5 and 4 at 2; a plan for other"):
        scale([trace(2, 1, 2), trace(3, 1, 2), Trace(5, (*trace(5, 1, 2).events, Event(9, 8), Event(9, -1)))])


def test_an_event_that_differs_is_named():
    usual = trace(2, 8, 8)
    other = Trace(3, (usual.events[0], Event(0, -1, "backward", op="aten.mm", path="net.head"), *usual.events[2:]))
    with pytest.raises(
        TraceError,
        match=r"something else at batch size 3 than at 2: aten\.mm in 'net\.head' in its backward phase",
    ):
        scale([usual, other])


def test_traces_with_other_kernels_are_rejected():
    said = r"something else at batch size 3 than at 2: aten\.sum in its "  # where no module is known, none is named
    with pytest.raises(TraceError, match=said) as caught:
        scale([trace(2, 8, rule=("reduction", 1), op="aten.sum"), trace(3, 8, rule=("sort", 1), op="aten.sum")])
    assert caught.value.reason == "sizes_differ"


@pytest.mark.parametrize("sizes", [(), (2, 2), (2, 3, 2)])
def test_traces_of_different_sizes_are_needed(sizes):
    with pytest.raises(ValueError, match=r"traces of different batch sizes are needed, not of \["):
        scale([trace(x, 8) for x in sizes])


def step_events(step, batch, weight, *, temporary=None, phase="forward"):
    """An activation and a gradient; at the end of the step an optimizer's block, of the weight's size."""
    at = 3 * (step - 1)
    return (
        Event(at, 4 * batch, phase, step, "activations", op="relu"),
        Event(at + 1, weight if temporary is None else temporary, "backward", step, "gradients", op="mm"),
        Event(at, -1, "backward", step),
        Event(at + 2, weight, "optimizer", step, "temporaries", op="sqrt"),
        Event(at + 2, -1, "optimizer", step),
        Event(at + 1, -1, "optimizer", step),
    )


def test_later_steps_take_the_sizes_of_the_first():
    whole = Trace(2, (*step_events(1, 2, 100), *step_events(2, 2, 100), *step_events(3, 2, 100)))
    begun = Trace(5, step_events(1, 5, 100))
    # 4 · 5 bytes of activations in every step, weights as they were.
    assert [e.size for e in extended(whole, begun).events if e.size >= 0] == [20, 100, 100] * 3
    assert extended(whole, begun).events[6:] == (*step_events(2, 5, 100), *step_events(3, 5, 100))


def test_steps_that_are_not_alike_are_not_extended():
    begun = Trace(5, step_events(1, 5, 100))
    larger = Trace(2, (*step_events(1, 2, 100), *step_events(2, 2, 100, temporary=7)))
    assert extended(larger, begun) is None  # the second step's gradient is another
    more = Trace(2, (*step_events(1, 2, 100), *step_events(2, 2, 100), Event(9, 8, "forward", 2, "activations")))
    assert extended(more, begun) is None  # the second step has another activation
    assert extended(Trace(2, step_events(1, 2, 100)[:3]), begun) is None  # the first step is another


def test_later_steps_that_take_turns_take_the_sizes_of_one_like_them():
    kinds = [100, 100, 60]  # the third step of each three has another gradient
    whole = Trace(2, tuple(e for n in range(1, 7) for e in step_events(n, 2, kinds[(n - 1) % 3])), period=3)
    begun = Trace(5, tuple(e for n in range(1, 4) for e in step_events(n, 5, kinds[n - 1])))
    sizes = [e.size for e in extended(whole, begun).events if e.size >= 0]
    assert sizes == [20, 100, 100, 20, 100, 100, 20, 60, 60] * 2
    assert extended(whole, Trace(5, begun.events[: 2 * 6])) is None  # the third kind is not there


@pytest.mark.parametrize("category", ["other", "workspaces", "communication"])
def test_what_is_made_once_has_no_counterpart(category):
    scaler = Event(99, 4, "backward", 1, category)
    whole = Trace(2, (scaler, *step_events(1, 2, 100), *step_events(2, 2, 100)))
    begun = Trace(3, (scaler, *step_events(1, 3, 100)))
    assert [e.size for e in extended(whole, begun).events if e.size >= 0] == [4, 12, 100, 100, 12, 100, 100]


def test_an_optimizers_first_step_may_be_another():
    # it makes its state, of the weight's size, which later steps find
    state = Event(98, 100, "optimizer", 1, "optimizer")
    whole = Trace(2, (*step_events(1, 2, 100), state, *step_events(2, 2, 100)))
    begun = Trace(5, (*step_events(1, 5, 100), state))
    assert [e.size for e in extended(whole, begun).events if e.size >= 0] == [20, 100, 100, 100, 20, 100, 100]


def test_a_later_step_is_like_the_one_at_its_place_in_the_accumulation():
    # the first of two batches has 8 bytes a sample, the second 16 whatever the batch: alike at 2 samples, not at 5
    def batches(samples, count):
        sizes = (8 * samples, 16)
        made = (
            (Event(n, sizes[(n - 1) % 2], step=n, category="batch"), Event(n, -1, step=n)) for n in range(1, count + 1)
        )
        return Trace(samples, tuple(event for pair in made for event in pair), microbatches=2)

    found = extended(batches(2, 6), batches(5, 2))
    assert [e.size for e in found.events if e.size >= 0] == [40, 16] * 3


# --------------------------------------------------------------------------------------------------- steps to come


def steps(*sizes):
    """Setup, then steps that make a gradient, and free the last one's when a batch is there."""
    events = [Event(0, 100)]
    for n, size in enumerate(sizes, 1):
        batch = Event(10 * n, size, "batch", n), Event(10 * n, -1, "backward", n)
        old = [Event(10 * (n - 1) + 1, -1, "forward", n)] if n > 1 else []
        events += [batch[0], *old, Event(10 * n + 1, 7, "backward", n), batch[1]]
    return Trace(2, tuple(events))


def test_the_last_step_goes_on_as_it_was():
    program = scale([steps(8, 8, 8)])
    more = program.at_steady_state(2)
    kinds = [(e.block, size) for e, (_, size, _) in zip(more.events, more.at(2), strict=True)]
    assert kinds[: len(program.events)] == [
        (e.block, size) for e, (_, size, _) in zip(program.events, program.at(2), strict=True)
    ]
    # a new batch; the gradient that was the newest goes; a new gradient; the batch goes: twice
    new = kinds[len(program.events) :]
    (batch, _), _, (gradient, _), _ = new[:4]
    assert new[:4] == [(batch, 8), (31, -1), (gradient, 7), (batch, -1)]
    assert new[5] == (gradient, -1)
    blocks = [block for block, size in kinds if size >= 0]
    assert len(blocks) == len(set(blocks))


def test_steps_that_take_turns_go_on_in_turn():
    in_turn = replace(steps(8, 9, 8, 9, 8, 9), period=2)
    more = scale([in_turn]).at_steady_state(2)
    assert [size for _, size, _ in more.at(2) if size in (8, 9)] == [8, 9] * 5  # six steps, and two cycles more
    assert scale([replace(in_turn, period=0)]).at_steady_state().recorded() == 6  # the last two are not alike


@pytest.mark.parametrize("sizes", [(8, 8), (8, 9, 10), ()])
def test_steps_that_are_not_alike_are_not_gone_on_with(sizes):
    program = scale([steps(*sizes)])
    assert program.at_steady_state() is program


def test_steps_that_free_blocks_older_than_the_step_before_are_not_gone_on_with():
    # each step frees the block of two steps before, or that of the one before, which alone can be repeated
    def stepped(back):
        pairs = ((Event(n, 8, step=n), Event(n - back, -1, step=n)) for n in range(1, 5))
        return scale([Trace(2, (Event(0, 8), Event(-1, 8), *(event for pair in pairs for event in pair)))])

    assert stepped(2).at_steady_state() == stepped(2)
    assert stepped(1).at_steady_state().recorded() == 4 + 3


def test_live_bytes_are_those_of_blocks_in_use_rounded_up():
    # 100 and 300 bytes a sample: 1024 + 3072 at 10, until the first is freed, and 1024 come for the 513
    events = [
        (Event(0, 100 * x), Event(1, 300 * x), Event(0, -1), Event(2, 513), Event(3, 0), Event(1, -1)) for x in POINTS
    ]
    program = scale([Trace(x, own) for x, own in zip(POINTS, events, strict=True)])
    assert program.peak_live_bytes(10) == 1024 + 3072
    assert program.peak_live_bytes(1) == 512 + 1024  # 100 and 300 each take 512; with the first freed, 512 + 1024
    assert scale([Trace(2, ())]).peak_live_bytes(10) == 0


def test_gradients_that_validation_lets_go_of_are_gone_in_it():
    def gradient(step, block):
        return Event(block, 8, "backward", step, "gradients")

    training = scale([Trace(2, (gradient(1, 0), Event(0, FREE, step=2), gradient(2, 1)))])
    zeroes = (gradient(1, 0), Event(0, FREE, step=2), Event(5, 4, step=2))
    keeps = (gradient(1, 0), Event(5, 4, step=2))
    # the sanity check's 4 bytes, a step's gradient; then 4 bytes after it is freed, or before, and the next gradient
    freed = [(size, block) for block, size, _ in interleaved(training, 2, scale([Trace(3, zeroes)])).at(3)]
    assert freed == [(4, 2), (8, 0), (-1, 0), (4, 3), (8, 1)]
    kept = [(size, block) for block, size, _ in interleaved(training, 2, scale([Trace(3, keeps)])).at(3)]
    assert kept == [(4, 2), (8, 0), (4, 3), (-1, 0), (8, 1)]
