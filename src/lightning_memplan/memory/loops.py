"""Handle steps that loop over their samples, whose event count grows linearly with the batch size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from fractions import Fraction
from itertools import chain, groupby, pairwise
from typing import NamedTuple

from lightning_memplan.errors import TraceError
from lightning_memplan.memory.events import FREE, Event, Stream, Trace
from lightning_memplan.memory.program import Program, scale

LOOPS = "the step loops over its samples: what it does for each is planned for as if it shared no segment with the rest"


def scale_with_loops(traces: Sequence[Trace]) -> tuple[Program, tuple[str, ...]]:
    """Join traces into one program, of a step that loops over its samples as well; and return notes on it.

    Raises:
        TraceError: the step does something else at another batch size, and is no such loop.
    """
    try:
        return scale(traces), ()
    except TraceError:
        if not is_loop(traces):
            raise
    return scale(merge_loops(traces)), (LOOPS,)


def is_loop(traces: Sequence[Trace]) -> bool:
    """Return True if the number of events grows linearly with the batch size.

    >>> event = Event(0, 8)
    >>> [is_loop([Trace(n, (event,) * (4 + many * n)) for n in (2, 3, 5)]) for many in (0, 1, 2)]
    [False, True, True]
    """
    slopes = {Fraction(len(b.events) - len(a.events), b.batch_size - a.batch_size) for a, b in pairwise(traces)}
    return len(slopes) == 1 and min(slopes) > 0


def merge_loops(traces: Sequence[Trace]) -> list[Trace]:
    """Give the traces of a step that loops over its samples the same events.

    Below, an iteration requests 8 bytes for its result and 512 for a temporary; all results are freed at the end.
    Results are merged into one block, of 512 bytes each, since no allocator gives less; the last one's temporary is in
    all traces.

    >>> def step(samples):
    ...     turns = ((Event(2 * n, 8), Event(2 * n + 1, 512, op="mm"), Event(2 * n + 1, -1)) for n in range(samples))
    ...     frees = (Event(2 * n, -1) for n in range(samples))
    ...     return Trace(samples, (*(event for turn in turns for event in turn), *frees))
    >>> for trace in merge_loops([step(1), step(2), step(3)]):
    ...     print([event.size for event in trace.events])
    [512, 512, -1, -1]
    [1024, 512, -1, -1]
    [1536, 512, -1, -1]
    """
    columns, points = [trace.events for trace in traces], [trace.batch_size for trace in traces]
    rows = _common(columns, points)
    rests = [_rest(events, [row[k] for row in rows]) for k, events in enumerate(columns)]
    places = {gap: event for rest in rests for gap, event in rest.places.items()}
    labels = {spell: event for rest in rests for spell, event in rest.largest.items()}
    begun: dict[int, list[_Spell]] = {}
    ended: dict[int, list[_Spell]] = {}
    for spell in sorted(labels):
        begun.setdefault(spell.made, []).append(spell)
        ended.setdefault(spell.freed, []).append(spell)
    free = 1 + max(event.block for event in columns[0])
    names: list[_Spell | int] = [*sorted(labels), *places]
    numbers = {one: free + number for number, one in enumerate(names)}
    grows = {gap for gap, (before, _, after) in rests[-1].live.items() if after > before}

    def made(of: _Spell | int, label: Event, sizes: Sequence[int], k: int) -> Event:
        rule: tuple[str | int, ...] = ()
        if not _is_line(points, sizes):  # the first trace may have no events but the common ones: the others tell
            rule = ("measured", points[k], *chain(*zip(points[-2:], sizes[-2:], strict=True)))
        return label._replace(block=numbers[of], size=sizes[k], rule=rule, stream=Stream.LOOPS)

    def beside(gap: int, k: int) -> Iterator[Event]:
        """Yield one block for those that come and go: on top of the bytes live after the gap, or before it."""
        if gap in places:
            live = [rest.live.get(gap, (0, 0, 0)) for rest in rests]
            most = [one[1] - one[2 if gap in grows else 0] for one in live]
            if any(most):
                yield made(gap, places[gap], most, k)
                yield places[gap]._replace(block=numbers[gap], size=FREE, rule=(), stream=Stream.LOOPS)

    def whole(k: int) -> Iterator[Event]:
        for gap in range(len(rows) + 1):
            if gap not in grows:
                yield from beside(gap, k)
            for spell in ended.get(gap, ()):
                yield places[gap]._replace(block=numbers[spell], size=FREE, rule=(), stream=Stream.LOOPS)
            for spell in begun.get(gap, ()):
                yield made(spell, labels[spell], [rest.sizes.get(spell, 0) for rest in rests], k)
            if gap in grows:
                yield from beside(gap, k)
            if gap < len(rows):
                yield columns[k][rows[gap][k]]._replace(block=columns[0][rows[gap][0]].block)

    return [replace(trace, events=tuple(whole(k))) for k, trace in enumerate(traces)]


class _Spell(NamedTuple):
    """The lifetime of blocks: the common events before which they are made, and before which they are freed."""

    made: int
    freed: int


class _Rest(NamedTuple):
    """The events of one trace that not all have, by the common event (the gap) before which they come."""

    sizes: dict[_Spell, int]  #: bytes of blocks that outlive their gap
    largest: dict[_Spell, Event]  #: the event that makes the largest of these blocks
    places: dict[int, Event]  #: the largest block made in a gap, or else the last one freed there
    live: dict[int, tuple[int, int, int]]  #: bytes at a gap's beginning, at most and at its end


def _rest(events: Sequence[Event], common: Sequence[int]) -> _Rest:
    rest, known = _Rest({}, {}, {}, {}), set(common)
    own = [(bisect_left(common, place), event) for place, event in enumerate(events) if place not in known]
    ends = {event.block: gap for gap, event in own if event.is_free}
    live: dict[int, int] = {}
    now = 0
    for gap, here in groupby(own, lambda one: one[0]):
        before = most = now
        for _, event in here:
            if event.size >= rest.places.get(gap, event).size:
                rest.places[gap] = event
            if event.is_free:
                now -= live.pop(event.block, 0)
                continue
            live[event.block] = size = event.size + 511 & -512
            now += size
            most = max(most, now)
            spell = _Spell(gap, ends.get(event.block, len(common) + 1))
            if spell.freed > gap:
                rest.sizes[spell] = rest.sizes.get(spell, 0) + size
                if event.size >= rest.largest.get(spell, event).size:
                    rest.largest[spell] = event
        rest.live[gap] = before, most, now
    return rest


def _common(columns: Sequence[Sequence[Event]], points: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the places of events that all traces have, a row for each: both of a block's events, or neither."""
    first, *rest = columns
    places = [_matched(first, events) for events in rest]
    rows = {a: (a, *(own[a] for own in places)) for a in range(len(first)) if all(a in own for own in places)}
    begins = [{event.block: place for place, event in enumerate(events) if event.size >= 0} for events in columns]
    ends = [{event.block: place for place, event in enumerate(events) if event.is_free} for events in columns]

    def stays(row: tuple[int, ...]) -> bool:
        events = [events[place] for events, place in zip(columns, row, strict=True)]
        if events[0].size < FREE:  # the cache is emptied
            return True
        begin = tuple(own[event.block] for own, event in zip(begins, events, strict=True))
        end = tuple(own.get(event.block, -1) for own, event in zip(ends, events, strict=True))
        if rows.get(begin[0]) != begin or (max(end) >= 0 and rows.get(end[0]) != end):
            return False
        taken = [events[place] for events, place in zip(columns, begin, strict=True)]
        return bool(taken[0].rule) or _is_line(points, [event.size for event in taken])

    return [row for row in rows.values() if stays(row)]


def _matched(first: Sequence[Event], other: Sequence[Event]) -> dict[int, int]:
    """Match events of ``first`` with those of the same operator and module in ``other``, in order, by place."""
    matched = {}
    for a, b in zip(_phases(first), _phases(other), strict=False):
        found = SequenceMatcher(None, _keys(first, a), _keys(other, b), autojunk=False).get_matching_blocks()
        for i, j, count in found:
            matched.update({a.start + i + n: b.start + j + n for n in range(count)})
    return matched


def _phases(events: Sequence[Event]) -> Iterator[range]:
    keys = [(event.step, event.phase) for event in events]
    starts = [place for place, key in enumerate(keys) if not place or key != keys[place - 1]]
    return (range(*both) for both in pairwise([*starts, len(events)]))


def _keys(events: Sequence[Event], places: range) -> list[Hashable]:
    made = {event.block: _what(event) for event in events if event.size >= 0}
    return [
        (event.size < 0, event.step, event.phase, made.get(event.block)) for event in events[places.start : places.stop]
    ]


def _what(event: Event) -> Hashable:
    return event.category, event.op, event.path, event.stream, event.rule[:1]


def _is_line(points: Sequence[int], sizes: Sequence[int]) -> bool:
    both = zip(pairwise(points), pairwise(sizes), strict=True)
    slopes = {Fraction(d - c, b - a) for (a, b), (c, d) in both}
    return len(slopes) == 1 and min(slopes) >= 0
