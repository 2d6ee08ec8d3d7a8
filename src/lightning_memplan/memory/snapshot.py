"""Write a prediction in the form of ``torch.cuda.memory._dump_snapshot``, for PyTorch's memory viewer.

https://pytorch.org/memory_viz opens the file, and so does ``python -m torch.cuda._memory_viz``. In place of a real
snapshot's stack, this one has, from within: the operator, the modules around it, the step's phase, and the block's
category. Times are the events' numbers.

Source: torch/csrc/cuda/memory_snapshot.cpp and torch/cuda/memory.py, torch 2.14.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from lightning_memplan.memory.events import Event
from lightning_memplan.memory.heap import SMALL

if TYPE_CHECKING:
    from lightning_memplan.memory.allocator_settings import AllocatorSettings
    from lightning_memplan.memory.heap import Move


_BASE = 0x7F00_0000_0000  # where a real process's addresses lie: the viewer's numbers are exact up to 2**53


class Frame(TypedDict):
    """One line of a stack."""

    filename: str
    line: int
    name: str


class _Entry(TypedDict, total=False):
    addr: int  # all but "oom"
    compile_context: str  # all but "oom"
    category: str  # "alloc"
    pool_id: tuple[int, int]  # all but "oom"
    device_free: int  # "oom"


class Entry(_Entry):
    """One move of the allocator."""

    action: str
    size: int
    stream: int
    time_us: int
    user_metadata: str
    frames: list[Frame]


class Block(TypedDict):
    """A block in use, or a free one."""

    address: int
    size: int
    requested_size: int
    state: str
    frames: list[Frame]


class Segment(TypedDict):
    """A segment, with the blocks that fill it."""

    device: int
    address: int
    total_size: int
    allocated_size: int
    active_size: int
    requested_size: int
    stream: int
    segment_type: str
    segment_pool_id: tuple[int, int]
    is_expandable: bool
    frames: list[Frame]
    blocks: list[Block]


class Annotation(TypedDict):
    """The beginning or the end of a phase."""

    stage: str
    name: str
    device: int
    time_us: int


class Snapshot(TypedDict):
    """The content of a snapshot's file."""

    segments: list[Segment]
    device_traces: list[list[Entry]]
    allocator_settings: dict[str, object]
    external_annotations: list[Annotation]
    host_segments: list[object]
    host_traces: list[object]


def make_snapshot(
    events: Sequence[Event],
    program: Sequence[tuple[int, int, int]],
    journal: Sequence[Move],
    settings: AllocatorSettings,
    capacity: int | None = None,
) -> Snapshot:
    """Return the snapshot of ``program``, whose entries are those of ``events`` and whose replay left ``journal``.

    If the replay ran out of memory under its ``capacity`` (bytes), the last entry says so, as on a real GPU.

    >>> from lightning_memplan.memory.allocator_settings import AllocatorSettings
    >>> from lightning_memplan.memory.heap import Move
    >>> event = Event(0, 600, "setup", category="parameters", path="layer.weight", op="")
    >>> journal = [Move("segment_alloc", 0, 2**21), Move("alloc", 0, 1024)]
    >>> found = make_snapshot([event], [(0, 600, 0)], journal, AllocatorSettings())
    >>> [entry["action"] for entry in found["device_traces"][0]]
    ['segment_alloc', 'alloc']
    >>> [(block["state"], block["size"]) for block in found["segments"][0]["blocks"]]
    [('active_allocated', 1024), ('inactive', 2096128)]
    """
    shift = _BASE - min((move.address for move in journal), default=0)
    blocks: dict[int, Block] = {}  # in use, by address
    mapped: dict[int, _Mapped] = {}  # segments, or mapped parts of expandable ones, by address
    trace: list[Entry] = []
    requested: dict[int, int] = {}
    at = 0  # the program's entry
    for action, address, size in journal:
        if action == "empty":
            at += 1
            continue
        address += shift
        event, (block, request, _) = events[at], program[at]
        entry = _entry(action, address, size, at, event)
        if action not in ("alloc", "free"):
            trace.append(entry)
            _change_segments(mapped, entry, small=request <= SMALL)
            continue
        at += 1
        if action == "alloc":
            requested[block] = request
            if not request:
                continue
            trace.append({**entry, "size": request, "category": event.category})
            state, frames = "active_allocated", entry["frames"]
            blocks[address] = {
                "address": address,
                "size": size,
                "requested_size": request,
                "state": state,
                "frames": frames,
            }
        elif request := requested.pop(block):
            trace += [{**entry, "action": f"free_{when}", "size": request} for when in ("requested", "completed")]
            del blocks[address]
    if at < len(program):
        free = (capacity or 0) - sum(segment.end - start for start, segment in mapped.items())
        trace.append(_out_of_memory(program[at][1], at, events[at], free))
    return {
        "segments": _segments(mapped, blocks, settings.expandable_segments),
        "device_traces": [trace],
        "allocator_settings": _settings(settings),
        "external_annotations": list(_annotations(events[:at])),
        "host_segments": [],
        "host_traces": [],
    }


def write_snapshot(path: str | os.PathLike[str], snapshot: Snapshot) -> None:
    """Pickle a snapshot, as ``torch.cuda.memory._dump_snapshot`` does."""
    with Path(path).open("wb") as file:
        pickle.dump(snapshot, file)


def _entry(action: str, address: int, size: int, time: int, event: Event) -> Entry:
    return {
        "action": action,
        "addr": address,
        "size": size,
        "stream": int(event.stream),  # readers of the file need not have our enum
        "time_us": time,
        "compile_context": "N/A",
        "user_metadata": event.category,
        "frames": _frames(event),
        "pool_id": (0, 0),
    }


def _out_of_memory(size: int, time: int, event: Event, free: int) -> Entry:
    return {
        "action": "oom",
        "size": size,
        "device_free": free,
        "stream": int(event.stream),
        "time_us": time,
        "frames": _frames(event),
        "user_metadata": event.category,
    }


def _frames(event: Event) -> list[Frame]:
    parts = event.path.split(".") if event.path else []
    frames = [(event.path or "module", event.op or event.category)]
    frames += [(".".join(parts[:depth]) or "module", part) for depth, part in reversed(list(enumerate(parts)))]
    frames += [(f"step {event.step}" if event.step else "setup", event.phase), ("memplan", event.category)]
    return [{"filename": filename, "line": 0, "name": name} for filename, name in frames]


@dataclass
class _Mapped:
    """A segment, or a mapped part of an expandable one."""

    end: int
    stream: int
    small: bool


def _change_segments(mapped: dict[int, _Mapped], entry: Entry, *, small: bool) -> None:
    """Add or remove what the GPU provided or got back: segments, or parts of expandable ones, which grow together."""
    start, end = entry["addr"], entry["addr"] + entry["size"]
    if entry["action"] in ("segment_alloc", "segment_map"):
        new = _Mapped(end, entry["stream"], small)
        if end in mapped:
            new.end = mapped.pop(end).end
        before = next((segment for segment in mapped.values() if segment.end == start), None)
        if before is None:
            mapped[start] = new
        else:
            before.end = new.end
        return
    within = max(address for address in mapped if address <= start)
    segment = mapped.pop(within)
    if within < start:
        mapped[within] = _Mapped(start, segment.stream, segment.small)
    if end < segment.end:
        mapped[end] = segment


def _segments(mapped: Mapping[int, _Mapped], blocks: Mapping[int, Block], expandable: bool) -> list[Segment]:
    starts = sorted(blocks)
    found: list[Segment] = []
    k = 0
    for address, segment in sorted(mapped.items(), key=lambda item: item[0]):
        inside: list[Block] = []
        place, end = address, segment.end
        while place < end:
            nearest = starts[k] if k < len(starts) and starts[k] < end else end
            if place == nearest:
                inside.append(blocks[place])
                k += 1
            else:
                inside.append(_free(place, nearest - place))
            place += inside[-1]["size"]
        active = [block for block in inside if block["state"] != "inactive"]
        used = sum(block["size"] for block in active)
        found.append(
            {
                "device": 0,
                "address": address,
                "total_size": end - address,
                "allocated_size": used,
                "active_size": used,
                "requested_size": sum(block["requested_size"] for block in active),
                "stream": segment.stream,
                "segment_type": "small" if segment.small else "large",
                "segment_pool_id": (0, 0),
                "is_expandable": expandable,
                "frames": [],
                "blocks": inside,
            }
        )
    return found


def _free(address: int, size: int) -> Block:
    return {"address": address, "size": size, "requested_size": 0, "state": "inactive", "frames": []}


def _annotations(events: Sequence[Event]) -> Iterator[Annotation]:
    """Yield where each phase of each step begins and ends."""
    spans = groupby(enumerate(events), key=lambda item: (item[1].step, item[1].phase))
    for (step, phase), items in spans:
        places = [place for place, _ in items]
        name = f"step {step} {phase}" if step else phase
        for stage, place in (("START", places[0]), ("END", places[-1])):
            yield {"stage": stage, "name": name, "device": 0, "time_us": place}


def _settings(settings: AllocatorSettings) -> dict[str, object]:
    divisions = settings.roundup_power2_divisions or (0,) * 16
    return {
        "PYTORCH_CUDA_ALLOC_CONF": "",
        "max_split_size": -1 if settings.max_split_size is None else settings.max_split_size,
        "garbage_collection_threshold": settings.garbage_collection_threshold,
        "expandable_segments": settings.expandable_segments,
        "roundup_power2_divisions": {str(2**k): parts for k, parts in enumerate(divisions)},
    }
