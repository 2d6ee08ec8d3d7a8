"""Memory that rises from step to step is told from what is made once."""

from __future__ import annotations

import pytest

from lightning_memplan.memory.events import FREE, Event, Trace
from lightning_memplan.memory.growth import rise
from lightning_memplan.memory.program import scale


def risen(*left: int, **program: int) -> int:
    """Return the rise of steps that each leave so many bytes, beside 4,096 that they free."""
    events = [Event(0, 8192, "setup")]
    for step, size in enumerate(left, 1):
        events += [Event(10 * step, 4096, step=step), Event(10 * step, FREE, step=step)]
        if size > 0:
            events.append(Event(10 * step + 1, size, step=step))
        elif size < 0:  # of an earlier step
            events.append(Event(10 * (step + size) + 1, FREE, step=step))
    return rise(scale([Trace(2, tuple(events), **program)]), batch_size=2)


@pytest.mark.parametrize(
    ("left", "bytes_"),
    [
        ((512, 512, 512), 512),
        ((0, 512, 512), 512),
        ((512, 100, 1000), 512),  # a block of 100 bytes takes 512
        ((0, 0, 512), 0),  # once
        ((512, 512, 0), 0),
        ((512, 512, -1), 0),  # the block of the step before
        ((512, 512), 0),  # two steps tell nothing: the first may make what stays
        ((), 0),
    ],
)
def test_what_the_last_two_steps_leave_is_a_rise(left: tuple[int, ...], bytes_: int) -> None:
    assert risen(*left) == bytes_


def test_of_accumulated_batches_the_optimizer_steps_are_compared() -> None:
    # two batches a step: 1,024 bytes a step are 512 a batch
    assert risen(0, 0, 1024, 0, 1024, 0, microbatches=2) == 512
    assert risen(4096, 0, 0, 0, 0, 0, microbatches=2) == 0


def test_of_steps_that_take_turns_the_cycles_are_compared() -> None:
    assert risen(0, 0, 1024, 512, 1024, 512, 1024, 512, period=2) == 768
    assert risen(1024, -1, 1024, -1, 1024, -1, period=2) == 0
