"""A predicted snapshot: PyTorch's own readers take it, and a real one on the null GPU has the same shape and bytes."""

from __future__ import annotations

import json
import pickle
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.cuda import _memory_viz

import lightning_memplan as mp
from lightning_memplan.memory.allocator import replay
from lightning_memplan.memory.allocator_settings import AllocatorSettings
from lightning_memplan.memory.events import Event
from lightning_memplan.memory.heap import Move
from lightning_memplan.memory.snapshot import make_snapshot

MiB = 2**20
BATCH = 64


def net():
    return nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Sequential(nn.Linear(1024, 10)))


@pytest.fixture(scope="module")
def estimate():
    return mp.estimate(net(), torch.zeros(4, 1024), optimizer=lambda p: torch.optim.Adam(p))


@pytest.fixture(scope="module")
def snapshot(estimate):
    return estimate.snapshot(BATCH)


def test_torchs_own_readers_take_it(estimate, tmp_path):
    estimate.save_snapshot(tmp_path / "predicted.pickle", batch_size=BATCH)
    with (tmp_path / "predicted.pickle").open("rb") as file:
        data = pickle.load(file)
    taken = estimate.replay(BATCH)
    summary = _memory_viz.segsum(data)  # it checks that blocks add up to their segments
    assert f"total_reserved: {taken.reserved / MiB:.1f}MiB" in summary
    assert _memory_viz.trace(data).count("cudaMalloc(") == taken.segments
    for plot in (_memory_viz.trace_plot, _memory_viz.segment_plot):
        assert "MemoryViz.js" in plot(data)
    flames = _memory_viz.memory(data, format_flamegraph=lambda lines: lines)
    assert "memplan:0:parameters;setup:0:setup;module:0:2;2:0:0" in flames


def test_its_bytes_are_the_replays(estimate, snapshot):
    taken = estimate.replay(BATCH)
    segments, trace = snapshot["segments"], snapshot["device_traces"][0]
    assert sum(segment["total_size"] for segment in segments) == taken.reserved
    assert sum(segment["allocated_size"] for segment in segments) == taken.allocated
    reserved = peak = 0
    for entry in trace:
        reserved += {"segment_alloc": 1, "segment_free": -1}.get(entry["action"], 0) * entry["size"]
        peak = max(peak, reserved)
    assert peak == taken.peak_reserved


def test_it_says_what_a_block_is_for(snapshot):
    names = [
        [frame["name"] for frame in entry["frames"]]
        for entry in snapshot["device_traces"][0]
        if entry["action"] == "alloc" and entry["category"] == "temporaries" and entry["frames"][0]["filename"] == "2.0"
    ]
    assert names[0] == ["aten.addmm.default", "0", "2", "forward", "temporaries"]
    phases = [note["name"] for note in snapshot["external_annotations"] if note["stage"] == "START"]
    assert phases[:4] == ["setup", "step 1 batch", "step 1 forward", "step 1 backward"]


def test_it_ends_where_memory_runs_out(estimate):
    trace = estimate.snapshot(BATCH, capacity=26 * MiB)["device_traces"][0]
    # a segment of 2 MiB and one of 20, in which the second of cuBLAS's workspaces finds no room
    assert (trace[-1]["action"], trace[-1]["size"], trace[-1]["device_free"]) == ("oom", 8519680, 4 * MiB)
    assert estimate.replay(BATCH, 26 * MiB).out_of_memory == trace[-1]["time_us"]


def test_expandable_segments_that_are_given_back_in_parts():
    settings = AllocatorSettings(expandable_segments=True)
    # 30 MiB and 30 MiB; the first is freed, and given back for 50 MiB more on a card of 100 MiB
    program = [(1, 30 * MiB, 0), (2, 30 * MiB, 0), (1, -1, 0), (3, 50 * MiB, 0)]
    journal: list[Move] = []
    taken = replay(program, 100 * MiB, settings, journal=journal)
    assert {move.action for move in journal} >= {"segment_map", "segment_unmap"}
    found = make_snapshot([Event(block, size) for block, size, _ in program], program, journal, settings)
    assert sum(segment["total_size"] for segment in found["segments"]) == taken.reserved
    assert all(segment["is_expandable"] for segment in found["segments"])
    _memory_viz.segsum(found)


def made(program, settings=AllocatorSettings()):  # noqa: B008 - frozen
    """The snapshot of a program whose blocks of up to 1 MiB are parameters, and all others activations of a step."""
    events = [
        Event(block, size, "setup", 0, "parameters", "layer.weight", "", stream)
        if size <= MiB
        else Event(block, size, "forward", 1, "activations", "layer", "mm", stream)
        for block, size, stream in program
    ]
    journal: list[Move] = []
    replay(program, settings=settings, journal=journal)
    return make_snapshot(events, program, journal, settings)


def test_each_segment_has_its_blocks_in_order():
    found = made([(0, 600, 0), (1, 700, 0), (2, 30 * MiB, 7), (3, 11 * MiB, 7), (0, -1, 0)])
    small, large, own = found["segments"]
    assert [(block["size"], block["requested_size"], block["state"]) for block in small["blocks"]] == [
        (1024, 0, "inactive"),
        (1024, 700, "active_allocated"),
        (2 * MiB - 2048, 0, "inactive"),
    ]
    assert [block["address"] - small["address"] for block in small["blocks"]] == [0, 1024, 2048]
    kinds = [(one["total_size"], one["allocated_size"], one["requested_size"], one["stream"]) for one in (large, own)]
    # 11 MiB leave 1 of 12, which is not split off
    assert kinds == [(30 * MiB, 30 * MiB, 30 * MiB, 7), (12 * MiB, 12 * MiB, 11 * MiB, 7)]
    for segment, kind in ((small, "small"), (large, "large"), (own, "large")):
        assert segment["active_size"] == segment["allocated_size"]
        assert (segment["segment_type"], segment["is_expandable"], segment["frames"]) == (kind, False, [])
        assert (segment["device"], segment["segment_pool_id"]) == (0, (0, 0))


def test_each_move_is_an_entry():
    found = made([(0, 600, 0), (1, 30 * MiB, 0), (1, -1, 0)])
    trace = found["device_traces"][0]
    assert [(entry["action"], entry["size"], entry["time_us"]) for entry in trace] == [
        ("segment_alloc", 2 * MiB, 0),
        ("alloc", 600, 0),
        ("segment_alloc", 30 * MiB, 1),
        ("alloc", 30 * MiB, 1),
        ("free_requested", 30 * MiB, 2),
        ("free_completed", 30 * MiB, 2),
    ]
    assert trace[1]["addr"] == trace[0]["addr"] == found["segments"][0]["address"]
    assert [frame["name"] for frame in trace[3]["frames"]] == ["mm", "layer", "forward", "activations"]
    assert [(note["stage"], note["name"], note["time_us"]) for note in found["external_annotations"]] == [
        ("START", "setup", 0),
        ("END", "setup", 0),
        ("START", "step 1 forward", 1),
        ("END", "step 1 forward", 1),
        ("START", "setup", 2),
        ("END", "setup", 2),
    ]


def test_what_is_unmapped_parts_an_expandable_segment_until_it_is_mapped_again():
    settings = AllocatorSettings(expandable_segments=True)
    program = [*((block, 30 * MiB, 7) for block in range(3)), (1, -1, 7), (9, -2, 7)]
    first, second = made(program, settings)["segments"]
    # 100 MiB in granules of 20: of those from 30 to 60 one granule lies wholly within, from 40 to 60
    assert [one["total_size"] for one in (first, second)] == [40 * MiB, 40 * MiB]
    assert second["address"] - first["address"] == 60 * MiB
    for segment in (first, second):
        assert (segment["stream"], segment["segment_type"], segment["is_expandable"]) == (7, "large", True)
        assert [block["size"] for block in segment["blocks"]] == [30 * MiB, 10 * MiB]
    (whole,) = made([*program, (3, 25 * MiB, 7)], settings)["segments"]
    assert [block["size"] // MiB for block in whole["blocks"]] == [30, 25, 5, 30, 10]
    assert whole["segment_type"] == "large"


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        (AllocatorSettings(), {}),
        (AllocatorSettings(max_split_size=32 * MiB), {"max_split_size": 32 * MiB}),
        (AllocatorSettings(expandable_segments=True), {"expandable_segments": True}),
        (AllocatorSettings(garbage_collection_threshold=0.5), {"garbage_collection_threshold": 0.5}),
        (
            AllocatorSettings(roundup_power2_divisions=(1, *(4,) * 15)),
            {"roundup_power2_divisions": {"1": 1} | {str(2**k): 4 for k in range(1, 16)}},
        ),
    ],
)
def test_the_allocators_settings_are_as_torch_writes_them(settings, changed):
    assert made([(0, 600, 0)], settings)["allocator_settings"] == {
        "PYTORCH_CUDA_ALLOC_CONF": "",
        "max_split_size": -1,
        "garbage_collection_threshold": 0.0,
        "expandable_segments": False,
        "roundup_power2_divisions": {str(2**k): 0 for k in range(16)},
        **changed,
    }


def test_the_formula_has_none(tmp_path):
    by_formula = mp.estimate(net(), torch.zeros(4, 1024), method="formula")
    with pytest.raises(ValueError, match="the formula has no events to replay: ask for method='trace'"):
        by_formula.save_snapshot(tmp_path / "none.pickle", batch_size=BATCH)


REAL = """
import json, torch
from torch import nn
torch.cuda.memory._record_memory_history(max_entries=10**6)
net = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Sequential(nn.Linear(1024, 10))).cuda()
optimizer = torch.optim.Adam(net.parameters())
batch = torch.zeros(64, 1024)
for step in range(3):  # in Lightning's order
    moved = batch.cuda()
    loss = net(moved).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    del loss, moved
print(json.dumps(torch.cuda.memory._snapshot()))
"""


def test_a_real_one_has_the_same_keys_and_bytes(nullgpu, snapshot):
    real = json.loads(nullgpu([sys.executable, "-c", REAL]).stdout)
    assert snapshot.keys() == real.keys()

    def keys(entries):
        return {frozenset(entry) - {"category"} for entry in entries}

    ours, theirs = snapshot["device_traces"][0], real["device_traces"][0]
    assert keys(ours) == keys(theirs)
    assert keys(snapshot["segments"]) == keys(real["segments"])
    for found in (snapshot, real):
        found["blocks"] = [block for segment in found["segments"] for block in segment["blocks"]]
    assert keys(snapshot["blocks"]) == keys(real["blocks"])
    assert keys(snapshot["external_annotations"]) == keys(real["external_annotations"])
    assert keys(ours[0]["frames"]) == keys(theirs[0]["frames"])

    def sizes(trace, action):
        return Counter(entry["size"] for entry in trace if entry["action"] == action)

    assert sizes(ours, "segment_alloc") == sizes(theirs, "segment_alloc")
    large = {size: count for size, count in sizes(theirs, "alloc").items() if size >= 2**16}
    assert {size: count for size, count in sizes(ours, "alloc").items() if size >= 2**16} == large
