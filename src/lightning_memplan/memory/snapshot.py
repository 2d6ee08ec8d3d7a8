"""A prediction in the form of ``torch.cuda.memory._dump_snapshot``, for PyTorch's memory viewer.

https://pytorch.org/memory_viz opens the file, and so does ``python -m torch.cuda._memory_viz``. Where a real snapshot
has the stack of the call, this one has, from within: the operator, the modules around it, the step's phase, and what
the block is for. Times are the events' numbers.

Source: torch/csrc/cuda/memory_snapshot.cpp and torch/cuda/memory.py, torch 2.14.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lightning_memplan.memory.events import Event

if TYPE_CHECKING:
    from lightning_memplan.memory.allocator import Move
    from lightning_memplan.memory.allocator_settings import AllocatorSettings


_BASE = 0x7F00_0000_0000  # where a real process's addresses lie: the viewer's numbers are exact up to 2**53


Entry = dict[str, Any]


def make_snapshot(
    events: Sequence[Event],
    program: Sequence[tuple[int, int, int]],
    journal: Sequence[Move],
    settings: AllocatorSettings,
    capacity: int | None = None,
) -> dict[str, Any]:
    """The snapshot of ``program``, whose entries are those of ``events`` and whose replay left ``journal``.

    Where the replay ran out of memory under its ``capacity`` (bytes) the last entry says so, as on a real card.

    >>> from lightning_memplan.memory.allocator import Move
    >>> from lightning_memplan.memory.allocator_settings import AllocatorSettings
    >>> event = Event(0, 600, "setup", category="parameters", path="layer.weight", op="")
    >>> journal = [Move("segment_alloc", 0, 2**21), Move("alloc", 0, 1024)]
    >>> found = make_snapshot([event], [(0, 600, 0)], journal, AllocatorSettings())
    >>> [entry["action"] for entry in found["device_traces"][0]]
    ['segment_alloc', 'alloc']
    >>> [(block["state"], block["size"]) for block in found["segments"][0]["blocks"]]
    [('active_allocated', 1024), ('inactive', 2096128)]
    """
    shift = _BASE - min((move.address for move in journal), default=0)
    blocks: dict[int, Entry] = {}  # in use, by address
    mapped: dict[int, Entry] = {}  # segments, or mapped parts of expandable ones, by address
    trace: list[Entry] = []
    requested: dict[int, int] = {}
    at = 0  # the program's entry
    for action, address, size in journal:
        if action == "empty":
            at += 1
            continue
        address += shift
        event, (block, request, stream) = events[at], program[at]
        entry = {
            "action": action,
            "addr": address,
            "size": size,
            "stream": int(stream),  # readers of a pickled file do not know ours
            "time_us": at,
            "compile_context": "N/A",
            "user_metadata": event.category,
            "frames": _frames(event),
            "pool_id": (0, 0),
        }
        if action not in ("alloc", "free"):
            trace.append(entry)
            _change_segments(mapped, entry, small=_is_small(request))
            continue
        at += 1
        if action == "alloc":
            requested[block] = request
            if not request:
                continue
            trace.append(entry | {"size": request, "category": event.category})
            blocks[address] = {
                "address": address,
                "size": size,
                "requested_size": request,
                "state": "active_allocated",
                "frames": entry["frames"],
            }
        elif request := requested.pop(block):
            trace += [entry | {"action": f"free_{when}", "size": request} for when in ("requested", "completed")]
            del blocks[address]
    if at < len(program):
        free = (capacity or 0) - sum(segment["end"] - start for start, segment in mapped.items())
        failed = {
            "action": "oom",
            "size": program[at][1],
            "device_free": free,
            "stream": int(program[at][2]),
            "time_us": at,
        }
        trace.append(failed | {"frames": _frames(events[at]), "user_metadata": events[at].category})
    return {
        "segments": _segments(mapped, blocks, settings.expandable_segments),
        "device_traces": [trace],
        "allocator_settings": _settings(settings),
        "external_annotations": list(_annotations(events[:at])),
        "host_segments": [],
        "host_traces": [],
    }


def _is_small(request: int) -> bool:
    return request <= 2**20


def _frames(event: Event) -> list[Entry]:
    parts = event.path.split(".") if event.path else []
    frames = [(event.path or "module", event.op or event.category)]
    frames += [(".".join(parts[:depth]) or "module", part) for depth, part in reversed(list(enumerate(parts)))]
    frames += [(f"step {event.step}" if event.step else "setup", event.phase), ("memplan", event.category)]
    return [{"filename": filename, "line": 0, "name": name} for filename, name in frames]


def _change_segments(mapped: dict[int, Entry], entry: Entry, *, small: bool) -> None:
    """What the card gave or was given back: whole segments, or parts of expandable ones, which grow together."""
    start, end = entry["addr"], entry["addr"] + entry["size"]
    if entry["action"] in ("segment_alloc", "segment_map"):
        new = {"end": end, "stream": entry["stream"], "small": small}
        if end in mapped:
            new["end"] = mapped.pop(end)["end"]
        before = next((segment for segment in mapped.values() if segment["end"] == start), None)
        if before is None:
            mapped[start] = new
        else:
            before["end"] = new["end"]
        return
    within = max(address for address in mapped if address <= start)
    segment = mapped.pop(within)
    if within < start:
        mapped[within] = segment | {"end": start}
    if end < segment["end"]:
        mapped[end] = segment


def _segments(mapped: Mapping[int, Entry], blocks: Mapping[int, Entry], expandable: bool) -> list[Entry]:
    starts = sorted(blocks)
    found, k = [], 0
    for address, segment in sorted(mapped.items()):
        inside: list[Entry] = []
        place, end = address, segment["end"]
        while place < end:
            nearest = starts[k] if k < len(starts) and starts[k] < end else end
            if place == nearest:
                inside.append(blocks[place])
                k += 1
            else:
                free = {"requested_size": 0, "state": "inactive", "frames": []}
                inside.append({"address": place, "size": nearest - place, **free})
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
                "stream": segment["stream"],
                "segment_type": "small" if segment["small"] else "large",
                "segment_pool_id": (0, 0),
                "is_expandable": expandable,
                "frames": [],
                "blocks": inside,
            }
        )
    return found


def _annotations(events: Sequence[Event]) -> Iterator[Entry]:
    """Where each phase of each step begins and ends."""
    spans = groupby(enumerate(events), key=lambda item: (item[1].step, item[1].phase))
    for (step, phase), items in spans:
        places = [place for place, _ in items]
        name = f"step {step} {phase}" if step else phase
        for stage, place in (("START", places[0]), ("END", places[-1])):
            yield {"stage": stage, "name": name, "device": 0, "time_us": place}


def _settings(settings: AllocatorSettings) -> Entry:
    divisions = settings.roundup_power2_divisions or (0,) * 16
    return {
        "PYTORCH_CUDA_ALLOC_CONF": "",
        "max_split_size": -1 if settings.max_split_size is None else settings.max_split_size,
        "garbage_collection_threshold": settings.garbage_collection_threshold,
        "expandable_segments": settings.expandable_segments,
        "roundup_power2_divisions": {str(2**k): parts for k, parts in enumerate(divisions)},
    }
