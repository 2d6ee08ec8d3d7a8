"""Read the events of a real GPU from the history of PyTorch's allocator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from lightning_memplan.memory.events import EMPTY, FREE, Category, Event, Phase
from lightning_memplan.step.context import EventContext

_MAX_ENTRIES = 10**7


MARK_BYTES = 331  # a prime: no tensor of a step is likely to have it at the address of the very next mark


class GpuContext(EventContext):
    """The place of a step on a real GPU that nothing records."""

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()


class Mark(NamedTuple):
    """A block of ``MARK_BYTES`` in the allocator's history, and where the step is from there on.

    ``run`` is 0 before the first batch size's steps, -1 between those of two, and else the batch size's number.
    """

    address: int
    run: int
    phase: Phase
    step: int
    category: Category
    path: str
    emptied: bool = False  #: the cache was emptied here


class MarkingContext(GpuContext):
    """The place of a step. Each move marks the allocator's history with a block that is allocated and freed."""

    def __init__(self, device: torch.device) -> None:
        self.run = 0
        self.marks: list[Mark] = []
        self._device = device
        self._mark()

    def update(
        self,
        *,
        phase: Phase | None = None,
        category: Category | None = None,
        path: str | None = None,
        step: int | None = None,
        stream: int | None = None,
    ) -> None:
        super().update(phase=phase, category=category, path=path, step=step, stream=stream)
        self._mark()

    def begin_run(self, number: int) -> None:
        """Count what follows to the run of that number; to none with -1."""
        self.run = number
        self._mark()

    def empty_cache(self) -> None:
        super().empty_cache()
        self._mark(emptied=True)

    def _mark(self, *, emptied: bool = False) -> None:
        address = torch.cuda.caching_allocator_alloc(MARK_BYTES, self._device, 0)
        torch.cuda.caching_allocator_delete(address)
        self.marks.append(Mark(address, self.run, self.phase, self.step, self.category, self.path, emptied))


@dataclass(frozen=True)
class RecordedRuns:
    """The events of several runs, and those of the setup before, which all runs have in common."""

    setup: list[Event] = field(default_factory=list)
    runs: dict[int, list[Event]] = field(default_factory=dict)

    def events(self, run: int) -> list[Event]:
        """Return the events of a run from its setup on."""
        return self.setup + self.runs.get(run, [])


class AllocatorHistory:
    """The history of the allocator since recording began, with the context that marks it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.context = MarkingContext(device)

    def read(self) -> RecordedRuns:
        history = torch.cuda.memory._snapshot(self._device)["device_traces"][self._device.index]
        return runs_of(history, self.context.marks)

    def events(self, run: int) -> list[Event]:
        """Return the events so far of a run."""
        return self.read().events(run)


@contextmanager
def recording(device: torch.device) -> Iterator[AllocatorHistory]:
    """Record the allocator's history."""
    record = torch.cuda.memory._record_memory_history
    record("all", context=None, max_entries=_MAX_ENTRIES)
    try:
        yield AllocatorHistory(device)
    finally:
        record(None)


def records_already() -> bool:
    """Tell whether somebody has the allocator record its history."""
    return torch.cuda.is_initialized() and bool(torch._C._cuda_isHistoryEnabled())


def runs_of(history: Sequence[Mapping[str, Any]], marks: Sequence[Mark]) -> RecordedRuns:
    """Turn the allocator's history into events.

    An entry belongs where the last mark before it says, whichever thread it comes from. A block counts as free when
    its free is requested: when a stream is done with it (``free_completed``) depends on time, and differs from one
    batch size to another. Frees of blocks from before the recording are left out.
    """
    found = RecordedRuns()
    blocks: dict[int, tuple[int, int]] = {}  # address -> run and block
    streams: dict[int, int] = {0: 0}  # in the order of their first blocks: each replica may make its own
    following = iter(marks)
    mark: Mark = next(following)
    upcoming: Mark | None = mark
    events = found.setup
    count = 0
    for entry in history:
        address, action = entry["addr"], entry["action"]
        if action == "alloc" and upcoming is not None and (address, entry["size"]) == (upcoming.address, MARK_BYTES):
            mark, upcoming = upcoming, next(following, None)
            events = found.setup if mark.run == 0 else found.runs.setdefault(mark.run, [])
            if mark.emptied:
                events.append(Event(-1, EMPTY, mark.phase, mark.step))
        elif action == "alloc":
            stream = streams.setdefault(entry["stream"], len(streams))
            blocks[address] = mark.run, count
            events.append(Event(count, entry["size"], mark.phase, mark.step, mark.category, mark.path, stream=stream))
            count += 1
        elif action == "free_requested" and address in blocks:
            run, block = blocks.pop(address)
            if run in (0, mark.run):
                events.append(Event(block, FREE, mark.phase, mark.step))
    return found
