"""The replayed allocator against PyTorch's own, which runs on the null GPU: equal to the byte."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest

from lightning_memplan.memory.allocator import replay
from lightning_memplan.memory.allocator_settings import AllocatorSettings

MiB = 2**20
CARD = 2000 * MiB

# Set one after another in one process. Torch keeps expandable_segments, max_non_split_rounding_mb and
# large_segment_size_mb until they are set anew: the first is, and the other two come last.
SETTINGS = [
    "",
    "expandable_segments:True",
    "max_split_size_mb:32",
    "expandable_segments:True,max_split_size_mb:32",
    "roundup_power2_divisions:[1:4,8:8,64:1,>:2]",
    "max_split_size_mb:24,garbage_collection_threshold:0.8",
    "garbage_collection_threshold:0.6",
    "max_split_size_mb:20,max_non_split_rounding_mb:40",
    "roundup_power2_divisions:8,large_segment_size_mb:32",
]

# Runs programs through the real allocator. A capacity is made by taking the rest of the card away beforehand.
RUN_PROGRAMS = """
import ctypes, json, sys, torch

job = json.load(open(sys.argv[1]))
torch.empty(1, device="cuda")
torch.cuda.empty_cache()
cuda = ctypes.CDLL(None)
raw_alloc = torch._C._cuda_cudaCachingAllocator_raw_alloc
raw_delete = torch._C._cuda_cudaCachingAllocator_raw_delete
side = [torch.cuda.Stream() for _ in range(2)]
streams = [0, *(stream.cuda_stream for stream in side)]
results = []
for text, program, capacity, fraction, marks in job:
    torch._C._accelerator_setAllocatorSettings(text if "expandable" in text else "expandable_segments:False," + text)
    taken = ctypes.c_void_p()
    rest = torch.cuda.mem_get_info()[0] - capacity
    if rest:
        assert cuda.cudaMalloc(ctypes.byref(taken), ctypes.c_size_t(rest)) == 0
    torch.cuda.set_per_process_memory_fraction(1.0 if fraction is None else fraction)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_accumulated_memory_stats()
    before = torch.cuda.memory_stats()
    live, out_of_memory, peaks = {}, None, []
    for index, (block, size, stream) in enumerate(program):
        for mark in marks:
            if mark == index:
                peaks.append((torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()))
                torch.cuda.reset_peak_memory_stats()
        if size < 0:
            if address := live.pop(block):
                raw_delete(address)
        elif size:
            try:
                live[block] = raw_alloc(size, streams[stream])
            except torch.OutOfMemoryError:
                out_of_memory = index
                break
        else:
            live[block] = 0
    peaks.append((torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()))
    after = torch.cuda.memory_stats()
    results.append(
        dict(
            peak_allocated=max(allocated for allocated, _ in peaks),
            peak_reserved=max(reserved for _, reserved in peaks),
            allocated=torch.cuda.memory_allocated(),
            reserved=torch.cuda.memory_reserved(),
            out_of_memory=out_of_memory,
            retries=after["num_alloc_retries"] - before["num_alloc_retries"],
            segments=after["num_device_alloc"] - before["num_device_alloc"],
            peaks=peaks,
        )
    )
    for address in live.values():
        if address:
            raw_delete(address)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == 0
    if taken:
        cuda.cudaFree(taken)
json.dump(results, sys.stdout)
"""

# One training step after another, of which the allocator itself records every event; then what it counted.
RUN_STEPS = """
import json, sys, torch

torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=10**6)
kind, batch_size, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if kind == "convolutions":
    import torchvision
    model = torchvision.models.resnet18()
    def batch():
        return torch.randn(batch_size, 3, 224, 224, device="cuda")
else:
    layer = torch.nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    def batch():
        return torch.randn(batch_size, 128, 256, device="cuda")
model = model.cuda().train()
optimizer = torch.optim.AdamW(model.parameters())
try:
    for _ in range(steps):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = model(batch()).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
except torch.OutOfMemoryError:
    pass
stats = torch.cuda.memory_stats()
counted = dict(
    peak_allocated=stats["allocated_bytes.all.peak"],
    peak_reserved=stats["reserved_bytes.all.peak"],
    retries=stats["num_alloc_retries"],
    segments=stats["num_device_alloc"],
)
history = torch.cuda.memory._snapshot()["device_traces"][0]
events = [(event["action"], event.get("addr", 0), event["size"], event["stream"]) for event in history]
json.dump((counted, events), sys.stdout)
"""


def random_program(source: random.Random) -> list[tuple[int, int, int]]:
    """Allocations and frees of one mix of sizes; some mixes have many blocks of one size, or sizes at a rule's edge."""
    favourites = [source.randrange(1, 60 * MiB) for _ in range(4)] + [source.randrange(1, 2 * MiB) for _ in range(3)]
    edges = [512, MiB, 2 * MiB, 10 * MiB, 20 * MiB, 21 * MiB, 24 * MiB, 32 * MiB, 64 * MiB]
    steps = [0, 0, -1, 1, -512, 512, 513, -MiB, MiB]
    mixes: list[Callable[[], int]] = [
        lambda: source.randrange(0, MiB + 1),
        lambda: source.randrange(MiB, 12 * MiB),
        lambda: source.randrange(8 * MiB, 80 * MiB),
        lambda: source.choice(favourites),
        lambda: max(0, source.choice(edges) + source.choice(steps)),
    ]
    mixes.append(lambda: source.choice(mixes[:5])())
    size = source.choice(mixes)
    streams = source.choice([[0], [0], [0, 1, 2]])
    growth = source.uniform(0.5, 0.8)
    program: list[tuple[int, int, int]] = []
    live: list[int] = []
    for block in range(source.choice([30, 80, 200, 300])):
        while live and source.random() > growth:
            program.append((live.pop(source.randrange(len(live))), -1, 0))
        if source.random() < 0.01:
            program += [(freed, -1, 0) for freed in live]
            live.clear()
        program.append((block, size(), source.choice(streams)))
        live.append(block)
    return program


def differences(expected: dict[str, Any], program: list[tuple[int, int, int]], **arguments: Any) -> dict[str, Any]:
    got = replay(program, **arguments)
    return {name: (getattr(got, name), value) for name, value in expected.items() if getattr(got, name) != value}


Job = tuple[str, list[tuple[int, int, int]], int, "float | None", list[int]]


@pytest.fixture(scope="module")
def real(nullgpu: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Job, dict[str, Any]]]:
    """A thousand random programs, and what the real allocator counted of each."""
    source = random.Random(0)
    jobs: list[Job] = []
    for text in SETTINGS:
        for _ in range(112):
            program = random_program(source)
            limited = "garbage" in text
            capacity = CARD if limited else source.choice([60, 100, 200, 400, 800, 2000]) * MiB
            fraction = source.choice([0.03, 0.1, 0.2, 0.4]) if limited else None
            jobs.append((text, program, capacity, fraction, sorted(source.sample(range(len(program)), 3))))
    file = tmp_path_factory.mktemp("allocator") / "jobs.json"
    file.write_text(json.dumps(jobs))
    done = nullgpu([sys.executable, "-c", RUN_PROGRAMS, str(file)], NULLGPU_MEMORY=CARD, NULLGPU_CONTEXT=0)
    return list(zip(jobs, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("text", SETTINGS)
def test_equals_the_real_allocator(text: str, real: list[tuple[Job, dict[str, Any]]]) -> None:
    ours = [(job, expected) for job, expected in real if job[0] == text]
    assert len(ours) == 112
    assert sum(expected["retries"] for _, expected in ours) > 20  # the programs do fill the card
    assert sum(expected["out_of_memory"] is not None for _, expected in ours) > 20
    for (_, program, capacity, fraction, marks), expected in ours:
        expected["peaks"] = tuple(map(tuple, expected["peaks"]))
        assert not differences(
            expected,
            program,
            capacity=capacity,
            settings=AllocatorSettings.from_text(text),
            fraction=None if fraction is None else int(fraction * CARD),
            marks=marks,
            total=CARD,
        )


@pytest.mark.parametrize(
    ("kind", "batch_size", "memory", "text"),
    [
        ("convolutions", 16, 2000 * MiB, ""),
        ("convolutions", 16, 470 * MiB, ""),  # full: cached segments go back
        ("attention", 32, 2000 * MiB, "expandable_segments:True"),
    ],
)
def test_equals_recorded_training_steps(
    kind: str, batch_size: int, memory: int, text: str, nullgpu: Callable[..., Any]
) -> None:
    if kind == "convolutions":
        pytest.importorskip("torchvision")
    done = nullgpu(
        [sys.executable, "-W", "ignore", "-c", RUN_STEPS, kind, batch_size, 2],
        NULLGPU_MEMORY=memory,
        NULLGPU_CONTEXT=0,
        PYTORCH_CUDA_ALLOC_CONF=text,
    )
    counted, events = json.loads(done.stdout)
    program: list[tuple[int, int, int]] = []
    blocks: dict[int, int] = {}
    for action, address, size, stream in events:
        if action == "alloc":
            blocks[address] = len(program)
            program.append((blocks[address], size, stream))
        elif action == "free_completed":
            program.append((blocks.pop(address), -1, stream))
    assert len(program) > 500
    assert not differences(counted, program, capacity=memory, settings=AllocatorSettings.from_text(text))
