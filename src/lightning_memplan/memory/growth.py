"""Detect memory that rises from step to step in a recorded program."""

from __future__ import annotations

from lightning_memplan.memory.program import Program


def rise(program: Program, batch_size: int) -> int:
    """Return the bytes by which each batch leaves more allocated than the one before; 0 where none does.

    The last steps must do so twice: what is made once, by the first step or the second, is no rise.

    >>> from lightning_memplan.memory.events import Event, Trace
    >>> from lightning_memplan.memory.program import scale
    >>> steps = [(Event(n, 4096, step=n), Event(10 + n, 1024, step=n), Event(n, -1, step=n)) for n in (1, 2, 3)]
    >>> rise(scale([Trace(2, tuple(event for step in steps for event in step))]), batch_size=2)
    1024
    """
    live: dict[int, int] = {}
    allocated, floors, step = 0, list[int](), 0
    for event, (block, size, _) in zip(program.events, program.at(batch_size), strict=True):
        if event.step != step:
            floors, step = [*floors, allocated] if step else floors, event.step
        if size >= 0:
            live[block] = size + 511 & -512
            allocated += live[block]
        else:
            allocated -= live.pop(block, 0)
    floors.append(allocated)
    cycle = program.period or program.microbatches
    if len(floors) <= 2 * cycle:
        return 0
    last, before = floors[-1] - floors[-1 - cycle], floors[-1 - cycle] - floors[-1 - 2 * cycle]
    return max(0, min(last, before)) // cycle
