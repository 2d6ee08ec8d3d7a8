"""Join traces of a few batch sizes into one program of any batch size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from math import lcm
from typing import NamedTuple

from lightning_memplan.cuda.kernel_sizes import kernel_bytes
from lightning_memplan.cuda.workspaces import Choice
from lightning_memplan.errors import TraceError
from lightning_memplan.memory.events import EMPTY, FREE, Event, Trace


@dataclass(frozen=True, slots=True)
class Polynomial:
    """Exact values at any batch size: ``sum(c · batch_size**k) / divisor``, rounded down.

    >>> Polynomial.through((2, 3, 5), (108, 112, 120)).at(10)
    140
    >>> Polynomial.through((2, 3, 5), (4, 9, 25)).degree
    2
    """

    coefficients: tuple[int, ...]
    divisor: int = 1

    @classmethod
    def through(cls, points: Sequence[int], values: Sequence[int]) -> Polynomial:
        """Return the polynomial of the lowest degree through all points."""
        if len(set(values)) == 1:
            return cls((values[0],))
        for degree in range(1, len(points)):
            coefficients = _interpolate(points[: degree + 1], values[: degree + 1])
            if all(_evaluate(coefficients, x) == y for x, y in zip(points, values, strict=True)):
                break
        divisor = lcm(*(c.denominator for c in coefficients))
        return cls(tuple(int(c * divisor) for c in coefficients), divisor)

    @property
    def degree(self) -> int:
        return len(self.coefficients) - 1

    def at(self, batch_size: int) -> int:
        total = 0
        for c in reversed(self.coefficients):
            total = total * batch_size + c
        return total // self.divisor


def _interpolate(points: Sequence[int], values: Sequence[int]) -> list[Fraction]:
    """Return the coefficients, lowest first, by Newton's divided differences."""
    differences = [Fraction(v) for v in values]
    for k in range(1, len(points)):
        for i in range(len(points) - 1, k - 1, -1):
            differences[i] = (differences[i] - differences[i - 1]) / (points[i] - points[i - k])
    coefficients = [Fraction(0)] * len(points)
    for k in reversed(range(len(points))):  # Horner: multiply by (x - points[k]), add the next difference
        for i in range(len(points) - 1, 0, -1):
            coefficients[i] = coefficients[i - 1] - points[k] * coefficients[i]
        coefficients[0] = differences[k] - points[k] * coefficients[0]
    return coefficients


def _evaluate(coefficients: Sequence[Fraction], x: int) -> Fraction:
    total = Fraction(0)
    for c in reversed(coefficients):
        total = total * x + c
    return total


class Kernel(NamedTuple):
    """A kernel whose size is not a polynomial of the batch size, with polynomials as arguments.

    >>> Kernel("rounded_rows", (Polynomial((0, 1)), *(Polynomial((n,)) for n in (100, 128, 4)))).at(3)
    1536
    """

    name: str
    arguments: tuple[Polynomial, ...]

    def at(self, batch_size: int, workspaces: Choice = "low") -> int:
        if self.name == CONVOLUTION and workspaces == "low":
            return 0  # without evaluating its many arguments: a search asks for this most often
        return kernel_bytes((self.name, *(argument.at(batch_size) for argument in self.arguments)), workspaces)


CONVOLUTION = "convolution"  #: the kernel whose workspace is known by a range only


@dataclass(frozen=True)
class Program:
    """The events of a run at any batch size.

    ``events`` are those of the first trace, for their labels. ``sizes`` has for every event the index of its size in
    ``(EMPTY, FREE, *table)``.
    """

    events: tuple[Event, ...]
    sizes: tuple[int, ...]
    table: tuple[Polynomial | Kernel, ...]
    batch_sizes: tuple[int, ...]
    microbatches: int = 1  #: batches that are accumulated for one optimizer step; each is a step of the program
    period: int = 0  #: steps after which they are alike again, 0 where that is not known

    @property
    def has_workspaces(self) -> bool:
        """True if the step has convolutions, whose workspaces are known by a range only."""
        return any(isinstance(entry, Kernel) and entry.name == CONVOLUTION for entry in self.table)

    def at(self, batch_size: int, workspaces: Choice = "low") -> list[tuple[int, int, int]]:
        """Return ``(block, size, stream)`` of every event, as the allocator's replay takes them.

        ``workspaces`` chooses how much convolutions take (see ``cuda.workspaces``); ``"low"`` is nothing.
        """
        values = (EMPTY, FREE, *self._values(batch_size, workspaces))
        return [(e.block, values[k], e.stream) for e, k in zip(self.events, self.sizes, strict=True)]

    def _values(self, batch_size: int, workspaces: Choice) -> Iterator[int]:
        for entry in self.table:
            if isinstance(entry, Kernel):
                yield entry.at(batch_size, workspaces)
            else:
                yield max(0, entry.at(batch_size))

    def peak_live_bytes(self, batch_size: int, workspaces: Choice = "low") -> int:
        """Return the most bytes in use at once, each request rounded up to 512: no allocator reserves less.

        Much quicker than a replay.

        >>> program = scale([Trace(n, (Event(0, 512 * n), Event(1, 100), Event(0, -1), Event(2, 1))) for n in (2, 3)])
        >>> program.peak_live_bytes(10)  # 5120 + 512
        5632
        """
        taken = [size + 511 & -512 for size in self._values(batch_size, workspaces)]
        changes = (*taken, 0, 0, *(-size for size in reversed(taken)))
        return max(accumulate(map(changes.__getitem__, self._changes)), default=0)

    @cached_property
    def _changes(self) -> tuple[int, ...]:
        """For every event the table's index ``k`` of the bytes that it adds, or ``~k`` of the bytes that it returns.

        An event that does neither has the index past the table.
        """
        nothing = len(self.table)
        made: dict[int, int] = {}
        changes = []
        for event, k in zip(self.events, self.sizes, strict=True):
            if k > 1:
                made[event.block] = k - 2
            changes.append(k - 2 if k > 1 else ~made.get(event.block, nothing) if k else nothing)
        return tuple(changes)

    def steps(self) -> tuple[int, ...]:
        """Return the index at which each step begins, and one past the end."""
        starts = [i for i, e in enumerate(self.events) if i == 0 or e.step != self.events[i - 1].step]
        return (*starts, len(self.events))

    def phases(self) -> tuple[int, ...]:
        """Return the index at which each phase of each step begins, and one past the end."""
        keys = [(e.step, e.phase) for e in self.events]
        return (*(i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]), len(keys))

    def recorded(self) -> int:
        """Return the number of optimizer steps."""
        return max((event.step for event in self.events), default=0) // self.microbatches

    def at_steady_state(self, times: int = 3) -> Program:
        """Repeat the last optimizer step ``times`` more times if it is like the one before; else return the program.

        Where steps alternate (``period``), repeat the last of their cycles.

        Each step finds other free blocks than the one before, until it leaves what it found: that three steps fit does
        not say that a fourth does, nor how much it takes.

        >>> step = [(Event(n, 8, step=n), Event(n - 1, -1, step=n)) for n in (1, 2, 3)]
        >>> program = scale([Trace(2, (Event(0, 8), *(event for both in step for event in both)))])
        >>> [(event.block, event.is_free) for event in program.at_steady_state(1).events[-4:]]
        [(3, False), (2, True), (4, False), (3, True)]
        """
        starts = [i for i in self.steps() if i == len(self.events) or self.events[i].step > 0]
        cycle = self.period or self.microbatches
        if 2 * cycle >= len(starts):
            return self
        before, begin = starts[-1 - 2 * cycle], starts[-1 - cycle]
        last, previous = self.events[begin:], self.events[before:begin]
        made = {e.block: place for place, e in enumerate(last) if e.size >= 0}
        earlier = {e.block: place for place, e in enumerate(previous) if e.size >= 0}
        frees = [e.block for e in last if e.is_free]
        if self.sizes[begin:] != self.sizes[before:begin] or any(b not in made and b not in earlier for b in frees):
            return self
        events, free = list(self.events), 1 + max(e.block for e in self.events)
        blocks = {place: block for block, place in made.items()}  # of the newest step, by their place in it
        for later in range(cycle, (times + 1) * cycle, cycle):
            newer = {place: free + number for number, place in enumerate(blocks)}
            free += len(newer)
            for event in last:
                place = made.get(event.block)
                block = event.block
                if block >= 0:
                    block = blocks[earlier[block]] if place is None else newer[place]
                events.append(event._replace(block=block, step=event.step + later))
            blocks = newer
        return replace(self, events=tuple(events), sizes=self.sizes + self.sizes[begin:] * times)


def scale(traces: Sequence[Trace]) -> Program:
    """Join traces of the same step at different batch sizes into one program.

    Raises:
        TraceError: the traces have different events: the step does something else at another batch size.
        ValueError: there is no trace, or two are of the same batch size.
    """
    points = tuple(trace.batch_size for trace in traces)
    if not points or len(set(points)) != len(points):
        raise ValueError(f"traces of different batch sizes are needed, not of {list(points)}")
    columns = [trace.events for trace in traces]
    _same_events(columns, points)
    entries: dict[object, int] = {}
    table: list[Polynomial | Kernel] = []
    sizes = []
    for events in zip(*columns, strict=True):
        first = events[0]
        if first.size < 0:
            sizes.append((EMPTY, FREE).index(first.size))
            continue
        key = tuple(e.rule or e.size for e in events)
        place = entries.get(key)
        if place is None:
            if first.rule:
                arguments = zip(*(e.rule[1:] for e in events), strict=True)
                polynomials = tuple(Polynomial.through(points, values) for values in arguments)
                table.append(Kernel(str(first.rule[0]), polynomials))
            else:
                table.append(Polynomial.through(points, [e.size for e in events]))
            place = entries[key] = len(table) + 1
        sizes.append(place)
    return Program(columns[0], tuple(sizes), tuple(table), points, traces[0].microbatches, traces[0].period)


def interleaved(training: Program, batch_size: int, validation: Program) -> Program:
    """Return training at one batch size with validation in between, as a program of validation's batch size.

    Validation is the last step of its program. It runs before the first step of training, as Lightning's sanity check
    does, and again before the last one: training then finds what validation left in the allocator's cache. Gradients
    that validation frees when it begins are not there while it runs.

    >>> training = scale([Trace(n, (Event(0, 8, step=1), Event(0, -1, step=1), Event(0, 8, step=2))) for n in (2, 3)])
    >>> validation = scale([Trace(n, (Event(5, 4 * n, step=7), Event(5, -1, step=7))) for n in (2, 3)])
    >>> interleaved(training, 2, validation).at(10)  # of block, size and stream
    [(1, 40, 0), (1, -1, 0), (0, 8, 0), (0, -1, 0), (2, 40, 0), (2, -1, 0), (0, 8, 0)]
    """
    table = list(validation.table)
    places: dict[int, int] = {}
    sized: list[tuple[Event, int]] = []
    for event, (_, size, _) in zip(training.events, training.at(batch_size), strict=True):
        if size >= 0 and size not in places:
            table.append(Polynomial((size,)))
            places[size] = len(table) + 1
        sized.append((event, places[size] if size >= 0 else (EMPTY, FREE).index(size)))
    step = [
        (e, k) for e, k in zip(validation.events, validation.sizes, strict=True) if e.step == validation.events[-1].step
    ]
    numbers = {event.block: number for number, event in enumerate(e for e, _ in step if not e.is_free)}
    free = 1 + max(event.block for event in training.events)

    def run(nth: int) -> list[tuple[Event, int]]:
        """Return validation's ``nth`` run, without frees of earlier blocks; no training step has its step number."""
        first = free + nth * len(numbers)
        return [(e._replace(block=first + numbers[e.block], step=-1), k) for e, k in step if e.block in numbers]

    begun = next(place for place, event in enumerate(training.events) if event.step)
    last = training.steps()[-2]
    old = _gradients(training.events[:last]) if _zeroes_gradients(validation.events) else set()
    zeroed = [(e, k) for e, k in sized[last:] if e.is_free and e.block in old]
    rest = [(e, k) for e, k in sized[last:] if not (e.is_free and e.block in old)]
    whole = (*sized[:begun], *run(0), *sized[begun:last], *zeroed, *run(1), *rest)
    events, sizes = tuple(e for e, _ in whole), tuple(k for _, k in whole)
    return Program(events, sizes, tuple(table), validation.batch_sizes, training.microbatches, training.period)


def _gradients(events: Sequence[Event]) -> set[int]:
    return {e.block for e in events if e.category == "gradients" and not e.is_free}


def _zeroes_gradients(validation: Sequence[Event]) -> bool:
    """Return True if the last step frees gradients, which are an earlier step's."""
    gradients, last = _gradients(validation), validation[-1].step
    return any(e.step == last and e.is_free and e.block in gradients for e in validation)


def extended(whole: Trace, begun: Trace) -> Trace | None:
    """Extend a trace of the first steps at another batch size to as many steps as ``whole`` has.

    ``begun`` has the first step (or as many as are accumulated, or one of each kind where steps alternate). Forward and
    backward passes of a later step request what one of these did at the same place, so they have its sizes; an
    optimizer's requests do not depend on the batch. Return None where the steps of ``whole`` are not so alike.

    >>> def step(number, size):
    ...     return Event(number, size, step=number, category="batch"), Event(number, -1, step=number)
    >>> whole = Trace(2, (*step(1, 8), *step(2, 8)))
    >>> [event.size for event in extended(whole, Trace(5, step(1, 20))).events]
    [20, -1, 20, -1]
    """
    count = len(begun.events)
    first, later = whole.events[:count], whole.events[count:]
    if len(first) < count or any(_key(a)[:-1] != _key(b)[:-1] for a, b in zip(first, begun.events, strict=True)):
        return None
    known = max(event.step for event in begun.events)
    places: dict[tuple[int, str], list[int]] = {}
    for place, event in enumerate(whole.events):
        if event.size >= 0 and event.step and event.category not in _MADE_ONCE:
            places.setdefault((event.step, event.phase), []).append(place)
    keys = {where: [_key(whole.events[place])[1:] for place in here] for where, here in places.items()}
    like: dict[int, Event] = {}
    for (step, phase), here in places.items():
        if step <= known or phase == "optimizer":
            continue
        nearest = sorted(range(1, known + 1), key=lambda first: (step - first) % known)
        alike = next((first for first in nearest if keys.get((first, phase), []) == keys[step, phase]), None)
        if alike is None:
            return None
        like.update({a: begun.events[b] for a, b in zip(here, places[alike, phase], strict=True)})
    sized = (
        event._replace(size=like[place].size, rule=like[place].rule) if place in like else event
        for place, event in enumerate(later, count)
    )
    return replace(begun, events=(*begun.events, *sized))


_MADE_ONCE = ("other", "workspaces", "communication")  # a gradient scaler's scalars, cuBLAS's workspaces, buckets


def _key(event: Event) -> tuple[object, ...]:
    return event.block, event.stream, event.op, event.path, event.size < 0, event.rule[:1], event.rule or event.size


def _same_events(columns: Sequence[Sequence[Event]], points: Sequence[int]) -> None:
    first = columns[0]
    for events, size in zip(columns[1:], points[1:], strict=True):
        for a, b in zip(first, events, strict=False):
            if a.block != b.block or min(a.size, 0) != min(b.size, 0) or a.rule[:1] != b.rule[:1]:
                where = f" in {b.path!r}" if b.path else ""
                raise TraceError(
                    f"the step does something else at batch size {size} than at {points[0]}: {b.op or 'a free'}{where} "
                    f"in its {b.phase} phase; a plan for other batch sizes cannot be made from such traces",
                    reason="sizes_differ",
                )
        if len(first) != len(events):
            raise TraceError(
                f"the step has {len(events)} events at batch size {size} and {len(first)} at {points[0]}; "
                "a plan for other batch sizes cannot be made from such traces",
                reason="sizes_differ",
            )
