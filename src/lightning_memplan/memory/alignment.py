"""Align traces of several batch sizes that differ in their workspaces, so that each event has a size at each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate, chain, groupby

from lightning_memplan.memory.allocator import replay
from lightning_memplan.memory.events import FREE, Event, Trace
from lightning_memplan.memory.program import Polynomial


def prime_up_to(number: int) -> int:
    """Return the largest prime that is not above ``number``, 0 if there is none.

    >>> prime_up_to(100), prime_up_to(1)
    (97, 0)
    """
    return next((n for n in range(number, 1, -1) if all(n % k for k in range(2, math.isqrt(n) + 1))), 0)


def doubled(trace: Trace, few: Sequence[Trace]) -> Trace:
    """Return the trace that is to be expected of twice as many samples.

    A block grows with the batch if traces of few samples have none of its size, or if it is a multiple of a prime
    number of samples.

    >>> large = Trace(7, (Event(0, 700), Event(1, 1000), Event(2, 65)))
    >>> [event.size for event in doubled(large, [Trace(2, (Event(0, 200), Event(1, 1000)))]).events]
    [1400, 1000, 130]
    """
    size, prime = trace.batch_size, prime_up_to(trace.batch_size)
    fixed = set.intersection(*({event.size for event in one.events} for one in few))
    grown = (
        event._replace(size=2 * event.size)
        if event.size > 0 and (event.size not in fixed or (size == prime and event.size % prime == 0))
        else event
        for event in trace.events
    )
    return replace(trace, batch_size=2 * size, events=tuple(grown))


def expected_to_fit(traces: Sequence[Trace], capacity: int) -> int:
    """Return the largest batch size that fits in ``capacity`` bytes if all but workspaces grows as in these traces.

    >>> grown = [Trace(n, (Event(0, 2**20), Event(1, n * 2**20), Event(2, 7), Event(2, -1))) for n in (2, 4)]
    >>> expected_to_fit(grown, 101 * 2**20)
    100
    """
    peaks = []
    for trace in (traces[0], traces[-1]):
        events, _ = _without_workspaces(_renumbered(trace.events))
        peaks.append(replay([(e.block, e.size, e.stream) for e in events]).peak_allocated)
    growth = Fraction(peaks[1] - peaks[0], max(1, traces[-1].batch_size - traces[0].batch_size))
    if growth <= 0:
        return 0
    return max(0, int((capacity - peaks[0]) / growth) + traces[0].batch_size)


# -------------------------------------------------------------------------------------------------- different sizes
def aligned(traces: Sequence[Trace]) -> list[Trace] | None:
    """Give traces that differ only in workspaces the same events; return None if they differ in more.

    A library may choose another algorithm at another batch size, and take another workspace, or none. Where traces
    differ in such blocks (freed before anything else happens), each place has the largest workspace that was taken
    there. Sizes that do not grow as a tensor's do are interpolated between those measured (``kernel_sizes.measured``).

    >>> a = Trace(2, (Event(0, 100), Event(1, 64), Event(1, -1)))
    >>> b = Trace(3, (Event(0, 150),))
    >>> [[event.size for event in trace.events] for trace in aligned([a, b])]
    [[100, 64, -1], [150, 0, -1]]
    >>> aligned([a, b])[1].events[1].rule
    ('measured', 3, 2, 64, 3, 0)
    """
    points = [trace.batch_size for trace in traces]
    columns = [_renumbered(trace.events) for trace in traces]
    if len(set(map(_shape, columns))) > 1:
        split = [_without_workspaces(events) for events in columns]
        if len({_shape(events) for events, _ in split}) > 1:
            return None
        seen_at: dict[int, list[list[Event]]] = {}
        for _, found in split:
            for place, events in found.items():
                seen_at.setdefault(place, []).append(events)
        alike = {p: some[0] for p, some in seen_at.items() if len({_shape(_renumbered(one)) for one in some}) == 1}
        columns = [
            _with_workspaces(
                left,
                {
                    p: found.get(p) or _none(alike[p]) if p in alike else _as_one(found.get(p, ()), (*left, last)[p])
                    for p in seen_at
                },
            )
            for (left, found), (*_, last) in zip(split, columns, strict=True)
        ]
    rows = [tuple(event.size for event in row) for row in zip(*columns, strict=True)]
    seen = {row: tuple(chain(*zip(points, row, strict=True))) for row in set(rows) if not _grows(points, row)}
    return [
        replace(
            trace,
            events=tuple(
                event._replace(rule=("measured", trace.batch_size, *seen[row])) if row in seen else event
                for event, row in zip(column, rows, strict=True)
            ),
        )
        for trace, column in zip(traces, columns, strict=True)
    ]


def _shape(events: Sequence[Event]) -> tuple[tuple[int, bool, int], ...]:
    return tuple((e.block, e.is_free, e.stream) for e in events)


def _renumbered(events: Sequence[Event]) -> tuple[Event, ...]:
    numbers: dict[int, int] = {}
    return tuple(Event(numbers.setdefault(e[0], len(numbers)), *e[1:]) for e in events)


def _without_workspaces(events: Sequence[Event]) -> tuple[tuple[Event, ...], dict[int, list[Event]]]:
    """Part the events from workspaces, which are freed before anything else happens; these by the place they precede.

    Blocks that live within a workspace's life go with it.
    """
    left: list[Event] = []
    found: dict[int, list[Event]] = {}
    for event in _latest_freed_first(events):
        if event.is_free and left and left[-1].block == event.block and not left[-1].is_free:
            place = len(left) - 1
            within = found.pop(place + 1, [])
            found.setdefault(place, []).extend((left.pop(), *within, event))
        else:
            left.append(event)
    return _renumbered(left), found


def _none(like: Sequence[Event]) -> list[Event]:
    """Return the same workspaces, of no bytes."""
    return [event if event.is_free else event._replace(size=0, rule=()) for event in like]


def _as_one(events: Sequence[Event], following: Event) -> list[Event]:
    """Merge workspaces into one, of the most bytes that they take at once; they come before the event ``following``."""
    sizes = {event.block: event.size for event in events if not event.is_free}
    most = max(accumulate(sizes[event.block] * (-1 if event.is_free else 1) for event in events), default=0)
    taken = (*events, following)[0]._replace(block=0, size=most, category="workspaces", op="")
    return [taken, taken._replace(size=FREE)]


def _latest_freed_first(events: Sequence[Event]) -> Iterator[Event]:
    """Sort each run of frees as blocks on a stack are freed, which changes no peak."""
    made = {event.block: number for number, event in enumerate(events) if not event.is_free}
    for free, group in groupby(events, lambda event: event.is_free):
        run = list(group)
        yield from sorted(run, key=lambda event: -made.get(event.block, -1)) if free else run


def _with_workspaces(events: Sequence[Event], workspaces: Mapping[int, Sequence[Event]]) -> tuple[Event, ...]:
    """Insert the events of workspaces before their places."""
    result: list[Event] = []
    for place in range(len(events) + 1):
        inserted = workspaces.get(place, ())
        result += [one._replace(block=(place, one.block)) for one in inserted]  # type: ignore[arg-type]
        result += events[place : place + 1]
    return _renumbered(result)


def _grows(points: Sequence[int], sizes: Sequence[int]) -> bool:
    """Return True if sizes grow with the batch as a tensor's bytes do.

    A tensor's bytes are a polynomial without negative or fractional coefficients, or that of all pairs of two samples.
    A workspace's may be anything, and a parabola through them would say nothing of a batch a hundred times as large.
    """
    if len(set(sizes)) == 1:
        return True
    polynomial = Polynomial.through(points, sizes)
    constant, *growing = polynomial.coefficients
    if polynomial.degree == 1:
        return growing[0] > 0
    whole = all(c % polynomial.divisor == 0 for c in polynomial.coefficients)
    pairs = (constant, growing[0]) == (0, -growing[1])
    return polynomial.degree == 2 and whole and (min(constant, *growing) >= 0 or pairs)
