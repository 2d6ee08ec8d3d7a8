"""Replicate a module on every rank with torch's own DistributedDataParallel."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_memplan.memory.events import Category, Stream
from lightning_memplan.settings import Precision
from lightning_memplan.step.backend import StepBackend
from lightning_memplan.step.strategies.base import ParallelStrategy


class DDPStrategy(ParallelStrategy):
    """Wrap the replica in ``DistributedDataParallel``."""

    around_forward: Category | None = "communication"

    def wrap(self, replica: nn.Module, backend: StepBackend, precision: Precision) -> None:
        context, arguments = backend.context, dict(self.parallel.arguments)
        with context.within("communication"):
            # Lightning wraps it under a stream of its own, whose cache serves no other
            real_stream = torch.cuda.stream(torch.cuda.Stream()) if backend.is_gpu else nullcontext()
            with context.on_stream(Stream.STRATEGY), real_stream:
                if arguments.pop("init_sync", True):  # DDP's own would compare values, which fake tensors do not have
                    _broadcast_states(replica)
                devices = [backend.device] if backend.is_gpu else None
                self.wrapper = DistributedDataParallel(replica, devices, init_sync=False, **arguments)
            if self.parallel.hook is not None:
                self.wrapper.register_comm_hook(*self.parallel.hook)


def _broadcast_states(replica: nn.Module) -> None:
    """Send parameters and buffers to all ranks, in copies of at most 250 MiB, as DistributedDataParallel does."""
    states = [tensor.detach() for tensor in (*replica.parameters(), *replica.buffers())]
    if states:
        group = torch.distributed.distributed_c10d._get_default_group()
        torch.distributed._broadcast_coalesced(group, states, 250 * 2**20, 0)  # type: ignore[attr-defined]
