"""Shard parameters with torch's own FullyShardedDataParallel, around a replica of the module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import nn

from lightning_memplan.errors import TraceError
from lightning_memplan.memory.events import Event
from lightning_memplan.settings import Parallel, Precision
from lightning_memplan.step.backend import StepBackend
from lightning_memplan.step.strategies.process_group import FakeProcessGroup, fake_group
from lightning_memplan.step.strategies.sharding import ShardingStrategy
from lightning_memplan.units import format_bytes

#: Type in which FSDP gathers parameters, reduces gradients and keeps buffers (FSDPPrecision.mixed_precision_config)
_DTYPES = {
    "32-true": torch.float32,
    "16-mixed": torch.float16,
    "16-true": torch.float16,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
}


class FSDPStrategy(ShardingStrategy):
    """Wrap the replica in ``FullyShardedDataParallel``, which moves and shards it unit by unit.

    A replica whose ``configure_model`` has wrapped some layers is wrapped in these alone, and not as a whole.
    """

    caches_casts = True  # FSDPPrecision.forward_context

    def note_units(self) -> AbstractContextManager[None]:
        return _noted_units()

    def wrap(self, replica: nn.Module, backend: StepBackend, precision: Precision) -> None:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
        from torch.distributed.fsdp import FullyShardedDataParallel

        with backend.context.within("parameters"):
            arguments = self._arguments(replica, backend.device, precision)
            units = sorted(
                (*module.__dict__[_UNIT], path) for path, module in replica.named_modules() if _UNIT in module.__dict__
            )
            if not units:
                self.wrapper = FullyShardedDataParallel(replica, device_id=backend.device, **arguments)
            for _, own, path in units:
                parent, _, name = path.rpartition(".")
                layer = replica.get_submodule(path)
                unit = FullyShardedDataParallel(layer, device_id=backend.device, **arguments | own)
                setattr(replica.get_submodule(parent), name, unit)
            if self.parallel.checkpointing:
                apply_activation_checkpointing(self.wrapper or replica, **self.parallel.checkpointing)

    def _arguments(self, replica: nn.Module, device: torch.device, precision: Precision) -> dict[str, Any]:
        """Complete the strategy's arguments as Lightning does, and move what FSDP ignores."""
        from torch.distributed.fsdp import MixedPrecision

        arguments = dict(self.parallel.arguments)
        if arguments.get("process_group"):  # only the user's group says to which ranks FSDP would talk
            raise TraceError("the memory of FSDPStrategy(process_group=...) is not modelled: plan without it")
        if precision not in _DTYPES:
            raise TraceError(f"FSDP does not train in precision {precision!r}")
        dtype = _DTYPES[precision]
        if arguments.get("mixed_precision") is None:
            arguments["mixed_precision"] = MixedPrecision(param_dtype=dtype, reduce_dtype=dtype, buffer_dtype=dtype)
        if "HYBRID" in str(arguments.get("sharding_strategy")):
            arguments["process_group"] = self._hybrid_groups()
        for name in _IGNORED:
            ignored = [_named(replica, one, name) for one in arguments.get(name) or ()]
            for one in ignored:  # FSDP leaves it where it is: training needs it on the GPU
                for tensor in (one,) if isinstance(one, nn.Parameter) else (*one.parameters(), *one.buffers()):
                    tensor.data = tensor.data.to(device)
            if ignored:
                arguments[name] = ignored
        return arguments

    def _hybrid_groups(self) -> tuple[FakeProcessGroup, FakeProcessGroup]:
        """Return the ranks over which a hybrid strategy shards, and the ranks that hold the same shard."""
        parallel = self.parallel
        shards = parallel.shard_ranks or parallel.ranks
        copy, place = divmod(parallel.rank, shards)
        return (
            fake_group(place, shards, parallel.backend),
            fake_group(copy, parallel.ranks // shards, parallel.backend),
        )

    def _begin_forward(self) -> None:
        """Try out the storage into which parameters are gathered, as FSDP's first forward pass does."""
        from torch.distributed.fsdp import FullyShardedDataParallel, _runtime_utils

        if isinstance(self.wrapper, FullyShardedDataParallel):
            _runtime_utils._lazy_init(self.wrapper, self.wrapper)

    def notes(self, events: Sequence[Event]) -> tuple[str, ...]:
        """Say how much more a GPU may reserve than a trace, in which no stream waits for another.

        A block that several streams use is free only when all are done with it (``record_stream``), and the host may
        be two units ahead of the GPU (``_limiter_utils.py``): then the parameters of two units, and their gradients,
        are held twice.
        """
        if self.parallel.ranks == 1:
            return ()
        if not self.parallel.arguments.get("limit_all_gathers", True):
            return (
                "with limit_all_gathers=False nothing limits what FSDP reserves where the host runs ahead of the GPU",
            )
        largest = max((e.size for e in events if e.category == "communication" and e.stream), default=0)
        return (f"where the host runs ahead of the GPU, FSDP may reserve up to {format_bytes(4 * largest)} more",)


@contextmanager
def _noted_units() -> Iterator[None]:
    """Let ``wrap``, which a ``configure_model`` may call, note its layers and their order instead of wrapping them."""
    from torch.distributed.fsdp.wrap import enable_wrap

    numbers = count()

    def note(module: nn.Module, **own: Any) -> nn.Module:
        module.__dict__[_UNIT] = next(numbers), own
        return module

    with enable_wrap(wrapper_cls=note):
        yield


_UNIT = "_memplan_unit"  # attribute of a module: its place in the order of wrapping, and its own arguments


def named_ignored(parallel: Parallel | None, module: nn.Module) -> Parallel | None:
    """Name what FSDP is to ignore by its path in the module: a replica has modules and parameters of its own."""
    if parallel is None or parallel.kind != "fsdp":
        return parallel
    names: dict[int, str] = {id(one): path for path, one in (*module.named_modules(), *module.named_parameters())}
    arguments = dict(parallel.arguments)
    for name in _IGNORED:
        if arguments.get(name):
            arguments[name] = tuple(names.get(id(one), one) for one in arguments[name])
    return replace(parallel, arguments=arguments)


_IGNORED = ("ignored_modules", "ignored_states")


def _named(replica: nn.Module, path: Any, argument: str) -> Any:
    if not isinstance(path, str):
        raise TraceError(f"FSDPStrategy({argument}=...) names what is not in {type(replica).__name__}: plan without it")
    owner, _, name = path.rpartition(".")
    return getattr(replica.get_submodule(owner), name)
