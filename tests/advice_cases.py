"""Networks and what is advised of them, done for real on a GPU: ``python advice_cases.py`` prints the bytes as JSON.

Run by ``test_advice.py`` on the null GPU; it runs on a real one as well.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Attends(nn.Module):
    """A transformer's block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mixes = nn.LayerNorm(width), nn.MultiheadAttention(width, 4, batch_first=True)
        self.out = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        x = x + self.mixes(y, y, y, need_weights=False)[0]
        return x + self.out(x)


class Convolves(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm, self.act = nn.BatchNorm2d(width), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x + self.two(self.act(self.norm(self.one(x)))))


def transformer() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), *(Attends(128) for _ in range(2)), nn.Linear(128, 8))


def residual() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Sequential(*(Convolves(32) for _ in range(2))))


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(512, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 8))


#: what makes the network, a sample's shape, the batch size, and half precision: bfloat16's convolutions are not cuDNN's
#: on the null GPU
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, torch.dtype]] = {
    "transformer": (transformer, (96, 64), 64, torch.bfloat16),
    "residual": (residual, (3, 64, 64), 32, torch.float16),
    "wide": (wide, (512,), 64, torch.bfloat16),
}


def adamw(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, **options)


def with_checkpoints(net: nn.Module) -> None:
    for block in net.modules():
        if isinstance(block, (Attends, Convolves)):
            block.forward = partial(checkpoint, partial(type(block).forward, block), use_reentrant=False)


def peaks(
    case: str,
    *,
    optimizer: Callable[..., torch.optim.Optimizer] = adamw,
    mixed: bool = False,
    true: bool = False,
    change: Callable[[nn.Module], None] = lambda net: None,
    parts: int = 1,
) -> tuple[int, int]:
    """Peak bytes allocated and reserved of three optimizer steps, in Lightning's order."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    make, shape, size, half = CASES[case]
    dtype = half if true else torch.float32
    net = make().to("cuda", dtype)
    change(net)
    made = optimizer(net.parameters())
    for index in range(3 * parts):
        moved = torch.zeros(size // parts, *shape, dtype=dtype).cuda()
        with torch.autocast("cuda", dtype=half, enabled=mixed, cache_enabled=False):
            loss = net(moved).sum()
        loss = loss / parts
        if index % parts == 0:
            made.zero_grad()
        loss.backward()
        if index % parts == parts - 1:
            made.step()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


CHANGES: dict[str, dict[str, Any]] = {
    "": {},
    "mixed": {"mixed": True},
    "true": {"true": True},
    "torch.utils.checkpoint": {"change": with_checkpoints},
    "the optimizer with fused=True": {"optimizer": partial(adamw, fused=True)},
    "the optimizer with foreach=False": {"optimizer": partial(adamw, foreach=False)},
    "torch.optim.SGD without momentum": {"optimizer": partial(torch.optim.SGD, lr=1e-3)},
    "accumulate_grad_batches=2": {"parts": 2},
}


def main() -> None:
    found = {case: {name: peaks(case, **how) for name, how in CHANGES.items()} for case in CASES}
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    for case, measured in found.items():
        measured["PYTORCH_CUDA_ALLOC_CONF"] = peaks(case)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
