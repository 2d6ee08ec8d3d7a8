"""The one event type: a block of GPU memory that is allocated or freed, and a trace of such events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum, unique
from itertools import chain, groupby
from operator import attrgetter, itemgetter
from typing import Literal, NamedTuple

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


@unique
class Stream(IntEnum):
    """Streams, and what is planned for as if it had a stream of its own: blocks of two streams share no segment.

    A strategy numbers its streams from ``STRATEGY`` on, and the user's step those that it makes after ``STEP``.

    >>> Stream.STRATEGY < Stream.STEP < Stream.LOOPS < Stream.COMPILED < Stream.TRIALS
    True
    """

    DEFAULT = 0
    STRATEGY = 1  #: DDP's, on which Lightning wraps the module; the first of FSDP's, which it communicates on
    STEP = 2**10  #: the user's step numbers its own from the next one on
    LOOPS = 2**14  #: blocks of a loop over samples, merged into one for each place
    COMPILED = 2**15  #: blocks of a graph that ``torch.compile`` compiles
    TRIALS = 2**16  #: blocks that fill the GPU's L2 cache before a compiled kernel is tried out

    @property
    def keeps_segments(self) -> bool:
        """True where idle segments stay on a full GPU: a kernel that is compiled later is tried out as well."""
        return self is Stream.TRIALS


class Event(NamedTuple):
    """One block of GPU memory, allocated or freed.

    ``size`` is the number of bytes requested, ``FREE`` where the block is freed, or ``EMPTY`` where the allocator
    returns its whole cache to the GPU (``torch.cuda.empty_cache``, of no block in particular). ``step`` is 0 before
    training, 1 in the first step. ``path`` is the module's dotted name and ``op`` the operator, where they are known.
    ``rule`` is a kernel's name and arguments (see ``cuda.kernel_sizes``) where the size is not a polynomial of the
    batch size.

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
    stream: int = Stream.DEFAULT.value
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
    microbatches: int = 1  #: batches that are accumulated for one optimizer step; each is a step of the trace
    period: int = 0  #: steps after which they are alike again, 0 where that is not known


def labelled(events: Sequence[Event]) -> tuple[Event, ...]:
    """Return events with final categories, operators as text, and consecutive frees of a phase in order of block.

    Where many blocks die at once (autocast's cache of weights, a graph), their order means nothing to the allocator,
    and may differ between batch sizes.

    A block of the backward pass that the optimizer's step still finds is a gradient; one that a forward pass makes and
    frees itself is a temporary; one that an optimizer's step makes and leaves is its state.

    >>> made = [Event(n, 8, phase, 1, "temporaries") for n, phase in enumerate(("forward", "backward", "optimizer"))]
    >>> frees = Event(1, FREE, "optimizer", 1), Event(0, FREE, "optimizer", 1)
    >>> [(event.block, event.category) for event in labelled([*made, *frees])][:3]
    [(0, 'temporaries'), (1, 'gradients'), (2, 'optimizer')]
    >>> [event.block for event in labelled([*made, *frees]) if event.is_free]
    [0, 1]
    """
    freed: dict[int, Event] = {e.block: e for e in events if e.is_free}
    names: dict[object, str] = {}
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
    return tuple(chain.from_iterable(_in_order(kind[0], run) for kind, run in runs))


def _in_order(free: bool, events: Iterator[Event]) -> Iterable[Event]:
    return sorted(events, key=itemgetter(0)) if free else events
