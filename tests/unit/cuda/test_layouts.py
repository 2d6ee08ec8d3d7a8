"""Operators on tensors of every layout, and random networks, against the null GPU."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pytest
import torch

from lightning_memplan.cuda.layout import elementwise_strides
from tests.paths import ROOT

#: Cases in which the engine casts a gradient, and frees the one before it a moment earlier than on a GPU
FREED_EARLY = ("logits weighted none", "logits positive none", "logits of learned labels none")


def _rows(nullgpu: Any, *program: str, timeout: float) -> list[Any]:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = nullgpu(
        [sys.executable, "-W", "ignore", "-m", *program], PYTHONPATH=path, NULLGPU_MEMORY=2**43, timeout=timeout
    )
    lines = (line.removeprefix("RESULT ") for line in done.stdout.splitlines())
    return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.further)])
def test_operators_allocate_and_lay_out_what_the_null_gpu_says_in_every_layout(nullgpu, every):
    """Blocks and strides of each operator, forward and backward (``layout_cases.py``)."""
    *wrong, last = _rows(nullgpu, "tests.programs.layout_cases", f"--every={every}", timeout=600)
    assert [row for row in wrong if not row["case"].startswith(FREED_EARLY)] == []
    assert last["compared"] > 3000 // every


@pytest.mark.slow
def test_random_networks_are_predicted_to_the_byte(nullgpu):
    """Traced at batch sizes 2, 3 and 5, and trained at 150 to 600 samples, in all precisions."""
    seeds = [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13]
    rows = _rows(nullgpu, "benchmarks.accuracy.random_networks", "--whole", "--worker", *map(str, seeds), timeout=600)
    assert len(rows) > 3  # a network with a random state of cuDNN's ends the process
    assert [row for row in rows if row.get("errors") != [0.0, 0.0]] == []


def _strides_of_sum(a: torch.Tensor, b: torch.Tensor) -> tuple[int, ...]:
    return (a + b).stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elementwise_strides_are_those_of_a_cpu_kernel(dtype):
    """torch's CPU kernels lay their results out by the same TensorIterator."""
    whole = torch.zeros(3, 4, 5, 6, dtype=dtype)
    made = [
        whole,
        whole.contiguous(memory_format=torch.channels_last),
        torch.zeros(3, 6, 5, 4, dtype=dtype).transpose(1, 3),
        torch.zeros(3, 4, 6, 5, dtype=dtype).transpose(2, 3),
        torch.zeros(3, 1, 5, 6, dtype=dtype).expand(3, 4, 5, 6),
        torch.zeros(3, 4, 5, 8, dtype=dtype)[..., 1:-1],
        torch.zeros(3, 4, 5, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)[..., 1:-1],
        torch.zeros(3, 4, 5, 1, dtype=dtype),
        torch.zeros(4, 1, 1, dtype=dtype),
        torch.zeros(6, 5, dtype=dtype).t(),
    ]
    for a in made:
        for b in made:
            shape = torch.broadcast_shapes(a.shape, b.shape)
            assert elementwise_strides(shape, [a, b]) == _strides_of_sum(a, b), (a.stride(), b.stride())
