"""Shard parameters with torch's own FullyShardedDataParallel, around a replica of the module."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import nn

from lightning_memplan.errors import TraceError
from lightning_memplan.memory.events import Event
from lightning_memplan.settings import Parallel, Precision
from lightning_memplan.step.context import EventContext, in_place_of
from lightning_memplan.step.fake_cuda import FakeDeviceModule
from lightning_memplan.units import format_bytes

#: In which FSDP gathers parameters, reduces gradients and keeps buffers (FSDPPrecision.mixed_precision_config)
_DTYPES = {
    "32-true": torch.float32,
    "16-mixed": torch.float16,
    "16-true": torch.float16,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
}


def fully_sharded(
    twin: nn.Module,
    parallel: Parallel,
    device: torch.device,
    mark: EventContext,
    precision: Precision,
    groups: tuple[Any, Any],
) -> nn.Module | None:
    """``twin``, whose parameters are on the host, wrapped as FSDPStrategy wraps it: unit by unit moved and sharded.

    None where its own ``configure_model`` has wrapped some layers: then these are all that is. ``groups`` are the ranks
    over which a hybrid strategy shards, and those that hold the same shard.

    Raises:
        TraceError: an argument of the strategy whose memory is not modelled; says which.
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

    _check(parallel.arguments)
    if precision not in _DTYPES:
        raise TraceError(f"FSDP does not train in precision {precision!r}")
    mark.category = "parameters"
    arguments, dtype = dict(parallel.arguments), _DTYPES[precision]
    if arguments.get("mixed_precision") is None:
        arguments["mixed_precision"] = MixedPrecision(param_dtype=dtype, reduce_dtype=dtype, buffer_dtype=dtype)
    if "HYBRID" in str(arguments.get("sharding_strategy")):
        arguments["process_group"] = groups
    for name in _IGNORED:
        ignored = [_of(twin, one, name) for one in arguments.get(name) or ()]
        for one in ignored:  # FSDP leaves it where it is, which is the card if training is to run
            for tensor in (one,) if isinstance(one, nn.Parameter) else (*one.parameters(), *one.buffers()):
                tensor.data = tensor.data.to(device)
        if ignored:
            arguments[name] = ignored
    units = sorted((*module.__dict__[_UNIT], path) for path, module in twin.named_modules() if _UNIT in module.__dict__)
    wrapper = None if units else FullyShardedDataParallel(twin, device_id=device, **arguments)
    for _, own, path in units:
        parent, _, name = path.rpartition(".")
        unit = FullyShardedDataParallel(twin.get_submodule(path), device_id=device, **arguments | own)
        setattr(twin.get_submodule(parent), name, unit)
    if parallel.checkpointing:
        apply_activation_checkpointing(wrapper or twin, **parallel.checkpointing)
    return wrapper


def waiting(parallel: Parallel, events: Sequence[Event]) -> tuple[str, ...]:
    """A note on what a card may reserve more than a trace, in which no stream waits for another.

    What several streams use is free only when all are done with it (``record_stream``), and the host may be two units
    ahead of the card (``_limiter_utils.py``): then two units' parameters, and their gradients, are held twice.
    """
    if parallel.kind != "fsdp" or parallel.ranks == 1:
        return ()
    if not parallel.arguments.get("limit_all_gathers", True):
        return ("with limit_all_gathers=False nothing limits what FSDP reserves where the host runs ahead of the card",)
    largest = max((e.size for e in events if e.category == "communication" and e.stream), default=0)
    return (f"where the host runs ahead of the card, FSDP may reserve up to {format_bytes(4 * largest)} more",)


@contextmanager
def noted_units() -> Iterator[None]:
    """``configure_model`` may make layers and ``wrap`` them: which, and in which order, is noted on them."""
    from torch.distributed.fsdp.wrap import enable_wrap

    numbers = count()

    def note(module: nn.Module, **own: Any) -> nn.Module:
        module.__dict__[_UNIT] = next(numbers), own
        return module

    with enable_wrap(wrapper_cls=note):
        yield


_UNIT = "_memplan_unit"  # a module's attribute: when it was wrapped, and with what of its own


def named_ignored(parallel: Parallel | None, module: nn.Module) -> Parallel | None:
    """What FSDP is to ignore, by its names in the module: a copy has its own."""
    if parallel is None or parallel.kind != "fsdp":
        return parallel
    names: dict[int, str] = {id(one): path for path, one in (*module.named_modules(), *module.named_parameters())}
    arguments = dict(parallel.arguments)
    for name in _IGNORED:
        if arguments.get(name):
            arguments[name] = tuple(names.get(id(one), one) for one in arguments[name])
    return replace(parallel, arguments=arguments)


_IGNORED = ("ignored_modules", "ignored_states")


def _of(twin: nn.Module, path: Any, argument: str) -> Any:
    if not isinstance(path, str):
        raise TraceError(f"FSDPStrategy({argument}=...) names what is not in {type(twin).__name__}: plan without it")
    owner, _, name = path.rpartition(".")
    return getattr(twin.get_submodule(owner), name)


def begin(wrapper: nn.Module) -> None:
    """What a wrapper does once, when its first forward pass begins: it tries out what it gathers parameters into."""
    from torch.distributed.fsdp import FullyShardedDataParallel, _runtime_utils

    if isinstance(wrapper, FullyShardedDataParallel):
        _runtime_utils._lazy_init(wrapper, wrapper)


def _check(arguments: Mapping[str, Any]) -> None:
    """Raise TraceError where FSDP would talk to some of the ranks, as only a group of the user's says."""
    if arguments.get("process_group"):
        raise TraceError("the memory of FSDPStrategy(process_group=...) is not modelled: plan without it")


@contextmanager
def let_go(device: torch.device) -> Iterator[None]:
    """Let nothing hold the wrapper afterwards: autograd's thread keeps the last backward pass, with FSDP's callback at
    its end, until it is given another (torch/csrc/autograd/engine.cpp, ``Engine::thread_main``)."""
    try:
        yield
    finally:
        with torch.enable_grad(), suppress(torch.OutOfMemoryError):
            torch.zeros((), device=device, requires_grad=True).backward()


# ----------------------------------------------------------------------------------------- streams that are only noted
@contextmanager
def noted_streams(device: torch.device, mark: EventContext) -> Iterator[None]:
    """FSDP takes ``device`` for a card: what it allocates on a stream is marked with the stream's number."""
    from torch.distributed.fsdp import _common_utils

    card = FakeDeviceModule(device, mark)
    with ExitStack() as stack:
        stack.enter_context(in_place_of(_common_utils._FSDPDeviceHandle, "from_device", classmethod(lambda *_: card)))
        for module in _FSDP2:
            stack.enter_context(in_place_of(importlib.import_module(module), "_get_device_handle", lambda _: card))
        first = importlib.import_module(_FSDP2[0])
        stack.enter_context(in_place_of(first, "_get_device_from_mesh", lambda _: device))
        yield


_FSDP2 = tuple(
    f"torch.distributed.fsdp._fully_shard.{name}"
    for name in ("_fully_shard", "_fsdp_collectives", "_fsdp_init", "_fsdp_param_group", "_fsdp_state")
)
