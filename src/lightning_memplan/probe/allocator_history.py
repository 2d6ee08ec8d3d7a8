"""Read the events of a real GPU from ``torch.cuda.memory``'s history."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lightning_memplan.memory.events import EMPTY, FREE, Category, Event, Phase

_MOST_EVENTS = 10**7


# -------------------------------------------------------------------------------------------------------- recording
@dataclass
class Place:
    """Where a step is. ``run`` counts the batch sizes: 0 is before the first one's steps, -1 between two."""

    phase: Phase = "setup"
    category: Category = "other"
    path: str = ""
    step: int = 0
    run: int = 0
    stream: int = 0  # the allocator's history knows it

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def label(self, tensor: Any, category: Category) -> None:
        """The allocator's history tells no tensor from another."""


class _Mark(Place):
    """Where a step is, marked in the allocator's history: by a block of ``_MARK`` bytes that is taken and given back.

    ``labels`` has the address of each such block, and where the step is from there on.
    """

    def __init__(self, device: torch.device) -> None:
        self.__dict__.update(labels=[], device=device)
        super().__init__()

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value
        address = torch.cuda.caching_allocator_alloc(_MARK, self.device, 0)
        torch.cuda.caching_allocator_delete(address)
        self.labels.append((address, (self.run, self.phase, self.step, self.category, self.path)))

    def empty_cache(self) -> None:
        super().empty_cache()
        self.path = _EMPTIED
        self.path = ""

    device: torch.device
    labels: list[_Label]


_Label = tuple[int, tuple[int, Phase, int, Category, str]]


_EMPTIED = "(the cache was emptied)"  # the path of a mark that says so


_MARK = 331  # bytes: a prime, which no tensor of the step is likely to have at the place of the very next mark


@contextmanager
def recording(device: torch.device) -> Iterator[tuple[_Mark, Callable[[], _Recorded]]]:
    """The allocator's history from here on: what marks the places in it, and what gives its events."""
    record = torch.cuda.memory._record_memory_history
    record("all", context=None, max_entries=_MOST_EVENTS)
    try:
        mark = _Mark(device)
        yield mark, lambda: _events(torch.cuda.memory._snapshot(device)["device_traces"][device.index], mark.labels)
    finally:
        record(None)


def records_already() -> bool:
    return torch.cuda.is_initialized() and bool(torch._C._cuda_isHistoryEnabled())


_Recorded = Callable[[int], list[Event]]


def recorded_by(events: Callable[[], _Recorded], number: int) -> list[Event]:
    return events()(number)


def _events(history: Sequence[Mapping[str, Any]], labels: Sequence[_Label]) -> _Recorded:
    """The allocator's history as events: gives those of a run, which begin with the setup that all have in common.

    An entry's label is that of the last mark before it, whichever thread it is of. A block is free when that is asked
    for: when a stream is done with it (``free_completed``) is a matter of time, which is another one at another batch
    size. What was there before is no one's here.
    """
    events: dict[int, list[Event]] = {0: []}
    blocks: dict[int, tuple[int, int]] = {}  # address -> run and block
    streams: dict[int, int] = {0: 0}  # in the order in which they are met: a copy may make its own
    marks = iter(labels)
    mark, label = next(marks)
    run, phase, step, category, path = label
    count = 0
    for entry in history:
        address = entry["addr"]
        if entry["action"] == "alloc" and (address, entry["size"]) == (mark, _MARK):
            run, phase, step, category, path = label
            mark, label = next(marks, (-1, label))
            if path == _EMPTIED:
                events.setdefault(run, []).append(Event(-1, EMPTY, phase, step))
        elif entry["action"] == "alloc":
            stream = streams.setdefault(entry["stream"], len(streams))
            blocks[address] = run, count
            event = Event(count, entry["size"], phase, step, category, path, stream=stream)
            events.setdefault(run, []).append(event)
            count += 1
        elif entry["action"] == "free_requested" and address in blocks:
            made, block = blocks.pop(address)
            if made in (0, run):
                events.setdefault(run, []).append(Event(block, FREE, phase, step))
    return lambda run: events[0] + events.get(run, [])
