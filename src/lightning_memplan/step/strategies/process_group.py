"""A fake process group: collectives that allocate as NCCL's do and talk to nobody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

_NAME = "memplan"  # of the backend: torch knows a backend "fake", which answers in other ways


@contextmanager
def fake_ranks(count: int, rank: int = 0, backend: str = "nccl") -> Iterator[None]:
    """Make this process one rank of ``count`` for ``torch.distributed``; its collectives reach no other process.

    The default group that there was, if any, is restored afterwards. Nothing in the user's code can make other ranks
    wait. ``backend`` names what would move the tensors.
    """
    world = torch.distributed.distributed_c10d._world
    before, group = world.default_pg, fake_group(rank, count, backend)
    world.default_pg = group
    world.pg_map[group] = (backend, None)  # type: ignore[assignment]
    world.pg_group_ranks[group] = {rank: rank for rank in range(count)}
    try:
        yield
    finally:
        world.default_pg = before
        del world.pg_map[group], world.pg_group_ranks[group]


def fake_group(rank: int, size: int, backend: str) -> FakeProcessGroup:
    """Return a group of ``size`` ranks, of which this process is ``rank``."""
    group = FakeProcessGroup(rank, size)  # type: ignore[call-arg]
    group.backend = backend
    return group


class FakeProcessGroup(torch.distributed.ProcessGroup):
    """A group in which every rank has the tensors of this one: what is gathered are copies of its own.

    With gloo, gathering and scattering go through a copy of the whole on the GPU. Source: ``_allgather_base`` and
    ``reduce_scatter_tensor_coalesced`` in torch/csrc/distributed/c10d/ProcessGroupGloo.cpp (2.14).
    """

    backend = "nccl"
    group_name: Any = _NAME

    def _copy(self, whole: Any) -> None:
        """Allocate gloo's copy, which is freed when the collective is done."""
        if self.backend == "gloo":
            tensors = tree_leaves(whole)
            torch.empty(sum(tensor.numel() for tensor in tensors), dtype=tensors[0].dtype, device=tensors[0].device)

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        return _NAME  # for "nccl", DistributedDataParallel would ask NCCL itself

    def allreduce(self, tensors: Any, *_: Any) -> Any:
        return _done(tensors)

    reduce = broadcast = allreduce  # type: ignore[assignment]

    def allgather(self, outputs: Any, inputs: Any, *_: Any) -> Any:
        self._copy(outputs)
        for gathered, own in zip(outputs, inputs, strict=True):
            for output in gathered:
                _fill(output, own)
        return _done(outputs)

    def gather(self, outputs: Any, inputs: Any, *_: Any) -> Any:
        return self.allgather(outputs, inputs[: len(outputs)])

    def alltoall(self, outputs: Any, inputs: Any, *_: Any) -> Any:
        for output, own in zip(outputs, inputs, strict=True):
            _fill(output, own)
        return _done(outputs)

    def reduce_scatter(self, outputs: Any, inputs: Any, *_: Any) -> Any:
        own = [shards[self.rank()] for shards in inputs]
        return self.alltoall(outputs[: len(own)], own)

    scatter = reduce_scatter  # type: ignore[assignment] # its inputs are on one rank only

    def _allgather_base(self, output: Any, own: Any, *_: Any) -> Any:
        self._copy(output)
        _fill(output, own)
        return _done([output])

    alltoall_base = all_to_all_single = _allgather_base  # type: ignore[assignment]

    def _reduce_scatter_base(self, output: Any, whole: Any, *_: Any) -> Any:
        self._copy(whole)
        _fill(output, whole)
        return _done([output])

    # names since torch 2.14
    all_gather_single = _allgather_base  # type: ignore[assignment]
    reduce_scatter_single = _reduce_scatter_base  # type: ignore[assignment]

    def barrier(self, *_: Any, **__: Any) -> Any:
        return _done([])

    monitored_barrier = barrier


def _fill(output: torch.Tensor, own: torch.Tensor) -> None:
    """Repeat ``own`` in ``output``, as values that a step can use (indices, say), unseen by autograd."""
    count = min(output.numel(), own.numel())
    if not count or not (output.is_contiguous() and own.is_contiguous()):
        return
    with torch.no_grad(), torch.autograd.grad_mode._unsafe_preserve_version_counter(output):
        whole = output.view(-1)
        for begin in range(0, output.numel(), count):
            place = whole[begin : begin + count]
            place.copy_(own.detach().view(-1)[: place.numel()])


def _done(tensors: Any) -> Any:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(tensors)
    return torch._C._distributed_c10d._create_work_from_future(future)
