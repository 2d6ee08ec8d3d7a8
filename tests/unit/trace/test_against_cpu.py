"""The recorder against a real step on the CPU: every byte that torch's profiler saw allocated and freed there.

No rule of CUDA's is used here: this checks that fake tensors live and die when real ones do.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from lightning_memplan.cuda.rule_set import Rules
from lightning_memplan.step.fake_cuda import DEVICE
from lightning_memplan.trace.detached import detached_copy
from lightning_memplan.trace.recorder import Recorder


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.relu(self.a(x)))


def mlp() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512), nn.Tanh()), torch.randn(256, 512)


def residual() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(*[Residual(512) for _ in range(6)]), torch.randn(512, 512)


def in_place() -> tuple[nn.Module, torch.Tensor]:
    net = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(inplace=True), nn.Linear(1024, 1024), nn.Sigmoid(), nn.Flatten())
    return net, torch.randn(512, 512)


def pooled() -> tuple[nn.Module, torch.Tensor]:
    net = nn.Sequential(
        nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2048, 8)
    )
    return net, torch.randn(32, 8, 64, 64)


def step(net: nn.Module, x: torch.Tensor) -> None:
    net(x).square().mean().backward()
    torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, foreach=False).step()


def profiled_peak(net: nn.Module, x: torch.Tensor) -> int:
    """The largest sum of bytes that the step had allocated and not yet freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as run:
        step(net, x)
    changes = [e.nbytes() for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    return peak(changes)


def recorded_peak(net: nn.Module, x: torch.Tensor) -> int:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin = detached_copy(net, mode)
    recorder = Recorder(mode, Rules())
    with recorder:
        for tensor in (*twin.parameters(), *twin.buffers()):
            recorder.adopt(tensor)
        moved = x.to(DEVICE)
        recorder.events.clear()
        step(twin, moved)
        recorder.stop()
    sizes = {event.block: event.size for event in recorder.events if not event.is_free}
    return peak([-sizes.get(event.block, 0) if event.is_free else event.size for event in recorder.events])


def peak(changes: list[int]) -> int:
    largest = now = 0
    for change in changes:
        now += change
        largest = max(largest, now)
    return largest


@pytest.mark.parametrize("make", [mlp, residual, in_place, pooled])
def test_the_peak_of_a_recorded_step_is_that_of_a_real_one(make):
    torch.manual_seed(0)
    net, x = make()
    real, recorded = profiled_peak(net, x), recorded_peak(net, x)
    assert real > 2**20
    assert abs(recorded / real - 1) < 0.02
