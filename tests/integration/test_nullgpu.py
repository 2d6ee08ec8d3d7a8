"""The null GPU itself: what programs of other projects need of it."""

from __future__ import annotations

import sys
from typing import Any

KERNELS = """
import torch
x = torch.ones(3, device="cuda", requires_grad=True)
for kernel in (torch.lgamma, torch.erfinv, torch.special.i0):
    kernel(x).sum().backward()
print("ran")
"""

VALUES = """
import torch
print(torch.tensor([5]).cuda().item(), torch.tensor([True]).cuda().item())
"""


def test_kernels_that_torch_compiles_at_run_time_run(nullgpu: Any) -> None:
    assert nullgpu([sys.executable, "-c", KERNELS]).stdout == "ran\n"


def test_values_are_kept_up_to_a_size(nullgpu: Any) -> None:
    """A bool is one byte, an int64 eight."""
    assert nullgpu([sys.executable, "-c", VALUES]).stdout == "5 True\n"
    assert nullgpu([sys.executable, "-c", VALUES], NULLGPU_KEPT=1).stdout == "0 True\n"
