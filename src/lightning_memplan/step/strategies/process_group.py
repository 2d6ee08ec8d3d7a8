"""A fake process group: collectives that allocate as NCCL's do and talk to nobody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


# --------------------------------------------------------------------------------------------- ranks that say nothing
@contextmanager
def fake_ranks(count: int, rank: int = 0, backend: str = "nccl") -> Iterator[None]:
    """Whatever is asked of ``torch.distributed`` inside is answered as by one rank of ``count``, and reaches no one.

    The group that is there, if any, is put back afterwards. Nothing of the user's code can make other ranks wait.
    ``backend`` names what would move the tensors.
    """
    world = torch.distributed.distributed_c10d._world
    before, group = world.default_pg, FakeProcessGroup(rank, count)  # type: ignore[call-arg]
    group.backend = backend
    world.default_pg = group
    world.pg_map[group] = (backend, None)  # type: ignore[assignment]
    world.pg_group_ranks[group] = {rank: rank for rank in range(count)}
    try:
        yield
    finally:
        world.default_pg = before
        del world.pg_map[group], world.pg_group_ranks[group]


class FakeProcessGroup(torch.distributed.ProcessGroup):
    """A group in which all ranks have what this one has: tensors are gathered from copies of its own.

    Gathering and scattering go through a copy of all of it on the card with gloo. Source: ``_allgather_base`` and
    ``reduce_scatter_tensor_coalesced`` in torch/csrc/distributed/c10d/ProcessGroupGloo.cpp (2.14).
    """

    backend = "nccl"
    group_name: Any = "silent"

    def _copy(self, whole: Any) -> None:
        """A copy that is gone when the collective is done."""
        if self.backend == "gloo":
            tensors = tree_leaves(whole)
            torch.empty(sum(tensor.numel() for tensor in tensors), dtype=tensors[0].dtype, device=tensors[0].device)

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        return "silent"  # DistributedDataParallel would ask NCCL itself

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
        own = [parts[self.rank()] for parts in inputs]
        return self.alltoall(outputs[: len(own)], own)

    scatter = reduce_scatter  # type: ignore[assignment] # which has inputs on one rank only

    def _allgather_base(self, output: Any, own: Any, *_: Any) -> Any:
        self._copy(output)
        _fill(output, own)
        return _done([output])

    alltoall_base = all_to_all_single = _allgather_base  # type: ignore[assignment]

    def _reduce_scatter_base(self, output: Any, whole: Any, *_: Any) -> Any:
        self._copy(whole)
        _fill(output, whole)
        return _done([output])

    # their names from 2.14 on
    all_gather_single = _allgather_base  # type: ignore[assignment]
    reduce_scatter_single = _reduce_scatter_base  # type: ignore[assignment]

    def barrier(self, *_: Any, **__: Any) -> Any:
        return _done([])

    monitored_barrier = barrier


def _fill(output: torch.Tensor, own: torch.Tensor) -> None:
    """Give ``output`` values that a step can do with (indices, say), as often as there is room; autograd sees none."""
    count = min(output.numel(), own.numel())
    if not count or not (output.is_contiguous() and own.is_contiguous()):
        return
    with torch.no_grad(), torch.autograd.grad_mode._unsafe_preserve_version_counter(output):
        whole = output.view(-1)
        for begin in range(0, output.numel(), count):
            part = whole[begin : begin + count]
            part.copy_(own.detach().view(-1)[: part.numel()])


def _done(tensors: Any) -> Any:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(tensors)
    return torch._C._distributed_c10d._create_work_from_future(future)
