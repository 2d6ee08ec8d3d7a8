"""Wrap a replica as a strategy does: DDP, FSDP, tensor parallelism, DeepSpeed."""

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

from lightning_memplan.errors import TraceError
from lightning_memplan.memory.events import Stream
from lightning_memplan.settings import Parallel, Precision
from lightning_memplan.step.context import EventContext, in_place_of
from lightning_memplan.step.strategies.deepspeed import silent_engine
from lightning_memplan.step.strategies.fsdp import begin, fully_sharded, let_go, noted_streams
from lightning_memplan.step.strategies.process_group import FakeProcessGroup, fake_ranks


@contextmanager
def ranks_of(parallel: Parallel | None, device: torch.device, mark: EventContext) -> Iterator[None]:
    """Where steps of what a strategy wraps can run in one process; nothing changes where it wraps nothing."""
    with ExitStack() as stack:
        if parallel is not None:
            stack.enter_context(fake_ranks(parallel.ranks, parallel.rank, parallel.backend))
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
            groups = FakeProcessGroup(place, shards), FakeProcessGroup(copies, parallel.ranks // shards)  # type: ignore[call-arg]
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
    groups: list[Any] = [FakeProcessGroup(rank, size) for rank, size in places]  # type: ignore[call-arg]
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
    mark.stream = Stream.STRATEGY  # Lightning makes it under a stream of its own, whose cache serves no other
    with torch.cuda.stream(torch.cuda.Stream()) if real else nullcontext():
        if arguments.pop("init_sync", True):  # by hand: fake tensors have no values that ranks could compare before
            _broadcast_states(twin)
        wrapper = DistributedDataParallel(twin, [device] if real else None, init_sync=False, **arguments)
    mark.stream = Stream.DEFAULT
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
