"""Share what strategies have in common that shard parameters."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch

from lightning_memplan.step.backend import StepBackend
from lightning_memplan.step.fake_cuda import FakeDeviceModule
from lightning_memplan.step.patch import patched
from lightning_memplan.step.strategies.base import ParallelStrategy


class ShardingStrategy(ParallelStrategy):
    """Give each rank a part of the parameters. The wrapper moves them to the device."""

    remakes_parameters = True

    def _enter(self, stack: ExitStack, backend: StepBackend) -> None:
        stack.enter_context(_let_go(backend.device) if backend.is_gpu else _fake_streams(backend))


@contextmanager
def _let_go(device: torch.device) -> Iterator[None]:
    """Run an empty backward pass at the end, so that autograd's thread drops the wrapper.

    That thread keeps the last backward pass, with FSDP's callback at its end, until it is given another
    (torch/csrc/autograd/engine.cpp, ``Engine::thread_main``).
    """
    try:
        yield
    finally:
        with torch.enable_grad(), suppress(torch.OutOfMemoryError):
            torch.zeros((), device=device, requires_grad=True).backward()


@contextmanager
def _fake_streams(backend: StepBackend) -> Iterator[None]:
    """Let FSDP take the fake device for a GPU: what it allocates on a stream is recorded with the stream's number."""
    from torch.distributed.fsdp import _common_utils

    cuda = FakeDeviceModule(backend.device, backend.context)
    with ExitStack() as stack:
        stack.enter_context(patched(_common_utils._FSDPDeviceHandle, "from_device", classmethod(lambda *_: cuda)))
        for module in _FULLY_SHARD:
            stack.enter_context(patched(importlib.import_module(module), "_get_device_handle", lambda _: cuda))
        first = importlib.import_module(_FULLY_SHARD[0])
        stack.enter_context(patched(first, "_get_device_from_mesh", lambda _: backend.device))
        yield


_FULLY_SHARD = tuple(
    f"torch.distributed.fsdp._fully_shard.{name}"
    for name in ("_fully_shard", "_fsdp_collectives", "_fsdp_init", "_fsdp_param_group", "_fsdp_state")
)
