"""What a strategy wraps around a module that several processes train together: its memory is the wrapper's own.

The real wrapper runs around a copy of the module, in a group of ranks that says nothing: every collective is done as
soon as it is asked for, and moves no byte. So buckets, their sizes, their order and the moment at which they are
rebuilt are those of torch's own code, on fake tensors in a trace and on the GPU in a probe, and one process is enough.

Source: torch/nn/parallel/distributed.py and torch/csrc/distributed/c10d/reducer.cpp (torch 2.13 to 2.15);
pytorch_lightning/strategies/ddp.py (2.6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_memplan._types import Category, Parallel

#: The stream beside the default one on which Lightning makes DistributedDataParallel, as events number it
SIDE_STREAM = 1


class Mark(Protocol):
    """What is told which kind of memory is taken from here on, and on which stream."""

    category: Category
    stream: int


def wrapped(twin: nn.Module, parallel: Parallel, device: torch.device, mark: Mark) -> nn.Module:
    """``twin``, wrapped as the strategy wraps it; in ``silent_ranks`` only."""
    real = device.type == "cuda"
    category, mark.category = mark.category, "communication"
    arguments = dict(parallel.arguments)
    mark.stream = SIDE_STREAM  # Lightning makes it under a stream of its own, whose cache serves no other
    with torch.cuda.stream(torch.cuda.Stream()) if real else nullcontext():
        if arguments.pop("init_sync", True):  # by hand: fake tensors have no values that ranks could compare before
            _broadcast_states(twin)
        wrapper = DistributedDataParallel(twin, [device] if real else None, init_sync=False, **arguments)
    mark.stream = 0
    if parallel.hook is not None:
        wrapper.register_comm_hook(*parallel.hook)
    mark.category = category
    return wrapper


def _broadcast_states(twin: nn.Module) -> None:
    """Parameters and buffers go to all ranks in copies of at most 250 MiB (DistributedDataParallel's ``__init__``)."""
    states = [tensor.detach() for tensor in (*twin.parameters(), *twin.buffers())]
    if states:
        group = torch.distributed.distributed_c10d._get_default_group()
        torch.distributed._broadcast_coalesced(group, states, 250 * 2**20, 0)  # type: ignore[attr-defined]


def through(wrapper: nn.Module, twin: nn.Module, step: Callable[..., Any], moved: Any) -> Any:
    """Run a step of ``twin`` through its wrapper's forward, as Lightning redirects ``training_step``."""
    own = twin.__dict__.get("forward")

    def forward(*args: Any) -> Any:
        del twin.__dict__["forward"]
        if own is not None:
            twin.__dict__["forward"] = own
        return step(*args)

    twin.__dict__["forward"] = forward
    return wrapper(moved)


def without_reduction(wrapper: nn.Module | None) -> AbstractContextManager[Any]:
    """A batch whose gradients are only added up: nothing is reduced."""
    return nullcontext() if wrapper is None else wrapper.no_sync()  # type: ignore[operator]


# --------------------------------------------------------------------------------------------- ranks that say nothing


@contextmanager
def silent_ranks(count: int) -> Iterator[None]:
    """Whatever is asked of ``torch.distributed`` inside is answered as by rank 0 of ``count``, and reaches no one.

    The group that is there, if any, is put back afterwards. Nothing of the user's code can make other ranks wait.
    """
    world = torch.distributed.distributed_c10d._world
    before, group = world.default_pg, _Silent(0, count)  # type: ignore[call-arg]
    world.default_pg = group
    world.pg_map[group] = ("silent", None)  # type: ignore[assignment]
    world.pg_group_ranks[group] = {rank: rank for rank in range(count)}
    try:
        yield
    finally:
        world.default_pg = before
        del world.pg_map[group], world.pg_group_ranks[group]


class _Silent(torch.distributed.ProcessGroup):
    """A group whose collectives leave the tensors as they are."""

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        return "silent"

    def allreduce(self, tensors: Any, *_: Any) -> Any:
        return _done(tensors)

    def broadcast(self, tensors: Any, *_: Any) -> Any:
        return _done(tensors)

    def allgather(self, outputs: Any, *_: Any) -> Any:
        return _done(outputs)

    def _allgather_base(self, output: Any, *_: Any) -> Any:
        return _done([output])

    def _reduce_scatter_base(self, output: Any, *_: Any) -> Any:
        return _done([output])

    def barrier(self, *_: Any, **__: Any) -> Any:
        return _done([])


def _done(tensors: Any) -> Any:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(tensors)
    return torch._C._distributed_c10d._create_work_from_future(future)
