"""The one event type: a block of device memory, allocated or freed, and a trace of such events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from operator import attrgetter, itemgetter
from typing import Any, Literal, NamedTuple


def labelled(events: Sequence[Event]) -> tuple[Event, ...]:
    """Events with their final categories, operators as text, and a phase's frees in a row in the order of their blocks.

    Where many blocks die at once (autocast's cache of weights, a graph), their order means nothing to the allocator,
    and may differ between batch sizes.

    What the backward pass makes and the optimizer's step still finds is a gradient; what a forward pass makes and frees
    itself is a temporary; what an optimizer's step makes and leaves is its state.
    """
    freed: dict[int, Event] = {e.block: e for e in events if e.is_free}
    names: dict[Any, str] = {}
    result = []
    for e in events:
        category = e.category
        if not e.is_free and e.step:
            end = freed.get(e.block)
            same_phase = end is not None and (end.step, end.phase) == (e.step, e.phase)
            if category == "activations" and same_phase:
                category = "temporaries"
            elif e.phase == "backward" and category == "temporaries" and not same_phase:
                category = "gradients"
            elif e.phase == "optimizer" and category in ("optimizer", "temporaries"):
                category = "temporaries" if end is not None else "optimizer"
        op = names.get(e.op)
        if op is None:
            op = names[e.op] = "" if e.op is None else str(e.op)
        result.append(Event(*e[:4], category, e.path, op, *e[7:]))
    runs = groupby(result, attrgetter("is_free", "step", "phase"))
    return tuple(chain.from_iterable(_run(kind[0], run) for kind, run in runs))


def _run(free: bool, events: Iterator[Event]) -> Iterable[Event]:
    return sorted(events, key=itemgetter(0)) if free else events


Phase = Literal["setup", "batch", "forward", "backward", "optimizer"]


Category = Literal[
    "parameters",
    "buffers",
    "gradients",
    "optimizer",
    "batch",
    "activations",
    "temporaries",
    "workspaces",
    "communication",
    "other",
]


FREE = -1


EMPTY = -2


class Event(NamedTuple):
    """One block of device memory, allocated or freed.

    ``size`` is the bytes that were asked for, ``FREE`` where the block is freed, or ``EMPTY`` where all that is cached
    goes back to the card (``torch.cuda.empty_cache``; no block is meant). ``step`` is 0 before training, 1 in the first
    step. ``path`` is the module's dotted name and ``op`` the operator, where they are known. ``rule`` is a
    kernel's name and arguments (see ``cuda.kernel_sizes``) where the size is not a polynomial of the batch size.

    >>> Event(block=7, size=2048, phase="forward", category="activations", path="layer1.0", op="aten.relu").is_free
    False
    >>> Event(block=7, size=-1, phase="backward").is_free
    True
    """

    block: int
    size: int
    phase: Phase = "forward"
    step: int = 0
    category: Category = "other"
    path: str = ""
    op: str = ""
    stream: int = 0
    rule: tuple[str | int, ...] = ()

    @property
    def is_free(self) -> bool:
        return self.size == FREE


@dataclass(frozen=True, slots=True)
class Trace:
    """The events of a run's beginning (setup, then whole training steps) at one batch size.

    >>> Trace(batch_size=2, events=(Event(0, 4096, "setup", category="parameters"),)).batch_size
    2
    """

    batch_size: int
    events: tuple[Event, ...]
    notes: tuple[str, ...] = ()
    parts: int = 1  #: how many of its steps, each of a batch, make one of the optimizer's
    period: int = 0  #: steps after which they are alike again, 0 where that is not known
