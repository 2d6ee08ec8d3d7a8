"""A training that runs out of memory ends with the user's own error, and a note of what took it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import lightning_memplan as mp
from lightning_memplan.planning.shortage import _beside_the_plan, _frames, _innermost, _shapes
from lightning_memplan.report.shortage import Shortage, shortage_text
from tests.paths import PROGRAMS, ROOT

GIB = 2**30


def test_only_what_is_known_is_said() -> None:
    assert shortage_text(Shortage("validation")) == "MemoryPlanner: out of memory in validation"
    text = shortage_text(Shortage("step 3", lost=2**20, grown=2**20))  # a MiB is nothing
    assert text == "MemoryPlanner: out of memory in step 3"


def test_all_that_is_known_is_said_in_80_columns() -> None:
    text = shortage_text(
        Shortage(
            "the backward phase of step 12",
            "encoder.layers.3.attention (MultiheadAttention)",
            ", ".join(["(96, 3, 224, 224) float32"] * 6),
            96,
            predicted=3 * GIB,
            planned=64,
            planned_bytes=2 * GIB,
            times=1.5,
            owners=[("activations of " + "encoder." * 20, GIB)],
            others=GIB,
            lost=GIB // 2,
            grown=GIB // 4,
            fits=80,
            saved=GIB // 2,
        )
    )
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    for part in (
        "out of memory in the backward phase of step 12, in encoder.layers.3.attention (MultiheadAttention)",
        "batch size 96 needs 3.00 GiB; 64 were planned, which need 2.00 GiB",
        "its samples have 1.5 times the bytes of those that were planned with: samples='largest' plans for the",
        "or pass max_batch_size=64",  # 96 / 1.5
        "other processes hold 1.00 GiB of the GPU",
        "512.00 MiB that were free when it was planned are held by others, or outside torch",
        "256.00 MiB more are left at the end of a step than after the first ones",
        "1.00 GiB activations of encoder.encoder.",
        "batch size 80 fits in what is there, and needs 512.00 MiB less",
    ):
        assert part in words


def test_a_batch_is_shown_by_its_tensors() -> None:
    x = torch.zeros(2, 3)
    assert _shapes({"x": x, "again": x, "name": "a"}) == "(2, 3) float32"
    assert _shapes([torch.zeros(1)] + [torch.zeros(n) for n in range(8)]).endswith("(4,) float32, and 3 more")


def test_the_innermost_part_that_ran_is_named() -> None:
    class Fails(nn.Module):
        def forward(self, x: Any) -> Any:
            raise RuntimeError

    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Fails()))
    with pytest.raises(RuntimeError) as caught:
        module(torch.zeros(1, 2))
    frames = list(_frames(caught.value))
    assert _innermost(frames, module) == "1.0 (Fails)"
    assert _innermost(frames, module[1][0]) == ""


class Fits:
    """An estimate of samples of 100 bytes, a MiB of memory each."""

    formula = SimpleNamespace(input_bytes=100)

    def peak(self, batch_size: int, capacity: int | None = None) -> int:
        return batch_size * 2**20

    def fits(self, batch_size: int, capacity: int, workspaces: str = "low") -> bool:
        return self.peak(batch_size) <= capacity

    def at(self, batch_size: int) -> Any:
        return SimpleNamespace(replayer=None)

    program, has_workspaces = None, False


@pytest.mark.parametrize(
    ("numbers", "capacity", "found"),
    [
        (25, 64, {}),  # 25 numbers of 4 bytes are 100
        (26, 64, {}),  # 4 % more
        (27, 64, {"times": 1.08}),
        (50, 8, {"times": 2.0}),  # and not the smaller size, whose samples are larger too
        (25, 8, {"fits": 8, "saved": 8 * 2**20}),  # 16 of 16 samples would need 16 MiB
    ],
)
def test_a_batch_is_compared_with_what_was_planned(numbers: int, capacity: int, found: dict[str, Any]) -> None:
    plan: Any = SimpleNamespace(batch_size=32, device=mp.Device("here", total=GIB), needed=32 * 2**20, peak_reserved=1)
    shown = _beside_the_plan(plan, Fits(), torch.zeros(16, numbers), 16, capacity * 2**20)  # type: ignore[arg-type]
    assert {name: shown.get(name) for name in ("times", "fits", "saved") if name in shown} == found
    assert (shown["batch_size"], shown["predicted"], shown["planned_bytes"]) == (16, 16 * 2**20, 32 * 2**20)


@pytest.fixture(scope="module")
def notes(nullgpu: Any) -> Any:
    path = f"{Path(mp.__file__).parents[1]}:{ROOT}"
    done = nullgpu(
        [sys.executable, PROGRAMS / "shortage_cases.py"],
        PYTHONPATH=path,
        NULLGPU_MEMORY=2 * GIB,
        NULLGPU_CONTEXT=100 * 2**20,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        # 256 texts of 4,096 tokens in place of 64
        ("larger samples", ["batch: (256, 4096, 64) float32, (256,) int64", "64 times the bytes", "max_batch_size=4"]),
        ("kept", ["more are left at the end of a step than after the first ones"]),
        ("too large", ["batch size 1952 needs", "; 2048 were planned", "activations of net.0"]),  # 4,000 - 2,048
        ("validation", ["out of memory in validation", "batch: (4, 400000, 64) float32"]),
    ],
)
def test_an_error_of_memory_keeps_its_type_and_text_and_gets_a_note(notes: Any, kind: str, said: list[str]) -> None:
    found = notes[kind]
    assert found["type"] == "OutOfMemoryError"
    assert found["text"].startswith("CUDA out of memory. Tried to allocate")
    if sys.version_info < (3, 11):
        return
    (text,) = found["notes"]
    assert text.startswith("MemoryPlanner: out of memory in ")
    assert max(map(len, text.splitlines())) <= 80
    for part in said:
        assert part in " ".join(text.split())
