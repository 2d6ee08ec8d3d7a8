"""What a strategy wraps around a module that several processes train together: its memory is the wrapper's own.

DistributedDataParallel is here, what shards parameters in ``_shards``, DeepSpeed's engine in ``_deepspeed``.

The real wrapper runs around a copy of the module, in a group of ranks that says nothing: every collective is done as
soon as it is asked for, and moves no byte. So buckets, their sizes, their order and the moment at which they are
rebuilt are those of torch's own code, on fake tensors in a trace and on the GPU in a probe, and one process is enough.

Source: torch/nn/parallel/distributed.py and torch/csrc/distributed/c10d/reducer.cpp (torch 2.13 to 2.15);
pytorch_lightning/strategies/ddp.py (2.6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional
from torch.nn.modules._functions import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from lightning_memplan._deepspeed import silent_engine
from lightning_memplan._shards import begin, fully_sharded, let_go, noted_streams
from lightning_memplan.errors import TraceError
from lightning_memplan.settings import Parallel, Precision
from lightning_memplan.step.context import EventContext, in_place_of

#: The stream beside the default one on which Lightning makes DistributedDataParallel, as events number it
SIDE_STREAM = 1


@contextmanager
def ranks_of(parallel: Parallel | None, device: torch.device, mark: EventContext) -> Iterator[None]:
    """Where steps of what a strategy wraps can run in one process; nothing changes where it wraps nothing."""
    with ExitStack() as stack:
        if parallel is not None:
            stack.enter_context(silent_ranks(parallel.ranks, parallel.rank, parallel.backend))
            if device.type != "cuda":
                stack.enter_context(in_place_of(nn.SyncBatchNorm, "forward", _synchronized(mark)))
                stack.enter_context(in_place_of(DistributedDataParallel, "_passing_sync_batchnorm_handle", _nothing))
            if parallel.kind == "model_parallel":
                stack.callback(_forget_mesh)
            if parallel.kind == "deepspeed":
                stack.enter_context(silent_engine(device, mark))
            if parallel.shards and device.type == "cuda":
                stack.enter_context(let_go(device))
            elif parallel.shards:
                stack.enter_context(noted_streams(device, mark))
        yield


def wrapped(
    twin: nn.Module, parallel: Parallel, device: torch.device, mark: EventContext, precision: Precision
) -> nn.Module | None:
    """``twin``, wrapped as the strategy wraps it, None where it is changed in its place; in ``ranks_of`` only.

    Raises:
        TraceError: the strategy's memory is not modelled.
    """
    if parallel.kind == "other":
        raise TraceError(
            f"what {parallel.name} keeps on each of {parallel.ranks} cards is not modelled; what DDP, FSDP and "
            "DeepSpeed keep is"
        )
    category = mark.category
    try:
        if parallel.kind == "ddp":
            return _replicated(twin, parallel, device, mark)
        if parallel.kind == "fsdp":
            shards = parallel.shard_ranks or parallel.ranks
            copies, place = divmod(parallel.rank, shards)
            groups = _Silent(place, shards), _Silent(copies, parallel.ranks // shards)  # type: ignore[call-arg]
            for group in groups:
                group.backend = parallel.backend
            return fully_sharded(twin, parallel, device, mark, precision, groups)
        _parallelized(twin, parallel, device, mark)
        return None
    finally:
        mark.category = category


def _parallelized(twin: Any, parallel: Parallel, device: torch.device, mark: EventContext) -> None:
    """As ModelParallelStrategy does: ``configure_model`` shards layers over a mesh, then they are given memory."""
    mark.category = "parameters"
    parts, whole = parallel.tensor_parallel, parallel.ranks
    places = zip(divmod(parallel.rank, parts), (whole // parts, parts), strict=True)
    groups: list[Any] = [_Silent(rank, size) for rank, size in places]  # type: ignore[call-arg]
    for group, name in zip(groups, _DIMENSIONS, strict=True):
        group.backend, group.group_name = parallel.backend, f"silent {name}"
        torch._C._distributed_c10d._register_process_group(group.group_name, group)
    ranks = torch.arange(whole).view(-1, parts)
    mesh = DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=_DIMENSIONS)
    twin._device_mesh = mesh
    with torch.device("meta"):
        twin.configure_model()
    twin.to_empty(device=device)


_DIMENSIONS = ("data_parallel", "tensor_parallel")  # of ModelParallelStrategy's mesh


def _forget_mesh() -> None:
    for name in _DIMENSIONS:
        with suppress(RuntimeError):  # the strategy had not come to it
            torch._C._distributed_c10d._unregister_process_group(f"silent {name}")  # type: ignore[arg-type]


def _replicated(twin: nn.Module, parallel: Parallel, device: torch.device, mark: EventContext) -> nn.Module:
    real = device.type == "cuda"
    mark.category = "communication"
    arguments = dict(parallel.arguments)
    mark.stream = SIDE_STREAM  # Lightning makes it under a stream of its own, whose cache serves no other
    with torch.cuda.stream(torch.cuda.Stream()) if real else nullcontext():
        if arguments.pop("init_sync", True):  # by hand: fake tensors have no values that ranks could compare before
            _broadcast_states(twin)
        wrapper = DistributedDataParallel(twin, [device] if real else None, init_sync=False, **arguments)
    mark.stream = 0
    if parallel.hook is not None:
        wrapper.register_comm_hook(*parallel.hook)
    return wrapper


def _broadcast_states(twin: nn.Module) -> None:
    """Parameters and buffers go to all ranks in copies of at most 250 MiB (DistributedDataParallel's ``__init__``)."""
    states = [tensor.detach() for tensor in (*twin.parameters(), *twin.buffers())]
    if states:
        group = torch.distributed.distributed_c10d._get_default_group()
        torch.distributed._broadcast_coalesced(group, states, 250 * 2**20, 0)  # type: ignore[attr-defined]


def _synchronized(mark: Any) -> Callable[[nn.SyncBatchNorm, torch.Tensor], torch.Tensor]:
    """``SyncBatchNorm.forward``, which would refuse a traced tensor, since it is on no card: its part with memory.

    Source: torch/nn/modules/batchnorm.py (2.11 to 2.14).
    """

    def forward(norm: nn.SyncBatchNorm, input: torch.Tensor) -> torch.Tensor:
        kept = not norm.training or norm.track_running_stats
        mean, var = (norm.running_mean, norm.running_var) if kept else (None, None)
        ranks, factor, selected = torch.distributed.get_world_size(), norm.momentum or 0.0, mark.lengths_taken
        if not norm.training or ranks == 1:
            training = norm.training or mean is None
            return functional.batch_norm(input, mean, var, norm.weight, norm.bias, training, factor, norm.eps)
        group = torch.distributed.group.WORLD
        out = SyncBatchNorm.apply(input, norm.weight, norm.bias, mean, var, norm.eps, factor, group, ranks)
        mark.lengths_taken = selected  # of the ranks, those that have samples are selected: all
        return out  # type: ignore[no-any-return]

    return forward


def _nothing(*_: Any) -> None:
    """DistributedDataParallel asks whether all is on a card where there are such layers."""


def local(value: Any) -> Any:
    """What of a distributed tensor is on this rank; anything else is itself."""
    return value.to_local() if isinstance(value, torch.Tensor) and hasattr(value, "to_local") else value


def unparallelized(twin: nn.Module) -> None:
    """Undo what ``configure_model`` did with a mesh of a single rank: plain parameters, and no hook of torch's."""
    for module in twin.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if str(hook.__module__).startswith("torch.distributed.")]:
                del hooks[key]
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(local(parameter.detach()), parameter.requires_grad)


def through(wrapper: nn.Module, twin: nn.Module, step: Callable[..., Any], moved: Any, mark: EventContext) -> Any:
    """Run a step of ``twin`` through its wrapper's forward, as Lightning redirects ``training_step``."""
    own, category = twin.__dict__.get("forward"), mark.category

    def forward(*args: Any) -> Any:
        del twin.__dict__["forward"]
        if own is not None:
            twin.__dict__["forward"] = own
        mark.category = category
        try:
            return step(*args)
        finally:
            mark.category = around

    twin.__dict__["forward"] = forward
    mark.category = "communication"
    begin(wrapper)
    around = mark.category = "communication" if isinstance(wrapper, DistributedDataParallel) else category
    try:
        return wrapper(moved)
    finally:
        mark.category = category


def without_reduction(wrapper: nn.Module | None) -> AbstractContextManager[Any]:
    """A batch whose gradients are only added up: nothing is reduced (``ParallelStrategy.block_backward_sync``)."""
    return nullcontext() if wrapper is None else wrapper.no_sync()  # type: ignore[operator]


# --------------------------------------------------------------------------------------------- ranks that say nothing
@contextmanager
def silent_ranks(count: int, rank: int = 0, backend: str = "nccl") -> Iterator[None]:
    """Whatever is asked of ``torch.distributed`` inside is answered as by one rank of ``count``, and reaches no one.

    The group that is there, if any, is put back afterwards. Nothing of the user's code can make other ranks wait.
    ``backend`` names what would move the tensors.
    """
    world = torch.distributed.distributed_c10d._world
    before, group = world.default_pg, _Silent(rank, count)  # type: ignore[call-arg]
    group.backend = backend
    world.default_pg = group
    world.pg_map[group] = (backend, None)  # type: ignore[assignment]
    world.pg_group_ranks[group] = {rank: rank for rank in range(count)}
    try:
        yield
    finally:
        world.default_pg = before
        del world.pg_map[group], world.pg_group_ranks[group]


class _Silent(torch.distributed.ProcessGroup):
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
