"""Shard layers over a mesh of ranks, as ``configure_model`` says: tensor parallelism and ``fully_shard``."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_memplan.settings import Precision
from lightning_memplan.step.backend import StepBackend
from lightning_memplan.step.strategies.process_group import fake_group
from lightning_memplan.step.strategies.sharding import ShardingStrategy

_DIMENSIONS = ("data_parallel", "tensor_parallel")  # of ModelParallelStrategy's mesh


class ModelParallelStrategy(ShardingStrategy):
    """Let ``configure_model`` shard the replica's layers over a mesh, then give them memory."""

    calls_configure_model = True

    def _enter(self, stack: ExitStack, backend: StepBackend) -> None:
        stack.callback(_forget_mesh)
        super()._enter(stack, backend)

    def wrap(self, replica: Any, backend: StepBackend, precision: Precision) -> None:
        parts, ranks = self.parallel.tensor_parallel, self.parallel.ranks
        places = zip(divmod(self.parallel.rank, parts), (ranks // parts, parts), strict=True)
        groups: list[Any] = [fake_group(place, size, self.parallel.backend) for place, size in places]
        with backend.context.within("parameters"):
            for group, name in zip(groups, _DIMENSIONS, strict=True):
                group.group_name = _registered(name)
                torch._C._distributed_c10d._register_process_group(group.group_name, group)
            mesh = torch.arange(ranks).view(-1, parts)
            replica._device_mesh = DeviceMesh.from_group(groups, backend.device.type, mesh, mesh_dim_names=_DIMENSIONS)
            with torch.device("meta"):
                replica.configure_model()
            replica.to_empty(device=backend.device)

    def make_layers(self, replica: nn.Module, backend: StepBackend, precision: Precision) -> None:
        """Call ``configure_model`` with a mesh of a single rank, and undo the sharding: no parameter is distributed
        afterwards, and no hook of torch's is left."""
        self.wrap(replica, backend, precision)
        for module in replica.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    if str(hook.__module__).startswith("torch.distributed."):
                        del hooks[key]
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(local_part(parameter.detach()), parameter.requires_grad)


def _registered(dimension: str) -> str:
    """Return the name under which torch finds the group of a dimension of the mesh."""
    return f"memplan {dimension}"


def _forget_mesh() -> None:
    for name in _DIMENSIONS:
        with suppress(RuntimeError):  # ``wrap`` was not reached
            torch._C._distributed_c10d._unregister_process_group(_registered(name))  # type: ignore[arg-type]


def local_part(value: Any) -> Any:
    """Return this rank's part of a distributed tensor, and anything else as it is."""
    return value.to_local() if isinstance(value, torch.Tensor) and hasattr(value, "to_local") else value
