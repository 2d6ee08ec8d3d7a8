"""Detect steps that alternate (a GAN's generator in every fifth batch), and decide how many to record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from lightning_memplan.memory.events import Event

MOST = 18  #: the most steps to record: cycles of up to eight are seen whole


_NOT_OF_A_STEP = ("other", "workspaces", "communication")  # made once, or when others are ready


def shapes(events: Sequence[Event]) -> tuple[Hashable, ...]:
    """Return for each step the blocks that one of its phases makes and another frees: mostly those saved for backward.

    Blocks that are made once, and metrics or pictures that are logged at times, do not count.

    >>> def step(number, *sizes):
    ...     made = [Event(n, size, "forward", number, "activations") for n, size in enumerate(sizes)]
    ...     return [*made, *(Event(event.block, -1, "backward", number) for event in made)]
    >>> first, second, third = shapes([*step(1, 8, 16), *step(2, 8), *step(3, 8, 16)])
    >>> first == third != second
    True
    """
    made: dict[int, Event] = {}
    found: dict[int, Counter[Hashable]] = {}
    for event in events:
        if not event.is_free:
            made[event.block] = event
            continue
        own = made.get(event.block, event)
        if own.step == event.step and own.phase != event.phase and own.category not in _NOT_OF_A_STEP:
            found.setdefault(event.step, Counter())[own.phase, own.op, own.path, own.size, event.phase] += 1
    last = max((event.step for event in events), default=0)
    return tuple(frozenset(found.get(step, Counter()).items()) for step in range(1, last + 1))


def period(steps: Sequence[Hashable]) -> int:
    """Return the steps after which they are alike again, from the first on; 0 if no cycle was seen twice.

    >>> period("AAA"), period("ABAB"), period("BAABAAB"), period("BAAA")
    (1, 2, 3, 0)
    """
    alike = (n for n in range(1, len(steps) // 2 + 1) if all(a == b for a, b in zip(steps, steps[n:], strict=False)))
    return next(alike, 0)


def is_enough(steps: Sequence[Hashable]) -> bool:
    """Return True if a cycle ran with the state that the one before it left, and the next one has begun.

    >>> [is_enough(steps) for steps in ("AA", "AAA", "AAB", "ABABAB", "BAAAABAAAA", "BAAAABAAAABA")]
    [False, True, False, True, False, True]
    """
    cycle = period(steps)
    return bool(cycle) and len(steps) >= 2 * cycle + min(cycle, 2)


def until_all_were_seen(steps: Sequence[Hashable]) -> int:
    """Return the number of steps until every kind of step was there.

    >>> until_all_were_seen("AAA"), until_all_were_seen("BAABAA"), until_all_were_seen("AABAAB")
    (1, 2, 3)
    """
    return 1 + max(map(steps.index, steps))
