"""What is trained, on which data, and how."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_memplan.checks import check_count
from lightning_memplan.devices.catalogue import gpu
from lightning_memplan.devices.detect import cpu_device, detect_devices
from lightning_memplan.lightning.compat import is_datamodule, is_lightning_module, is_overridden
from lightning_memplan.lightning.trainer import parallel_named, trainer_settings
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.memory.loops import scaled
from lightning_memplan.settings import StepSettings, parse_precision
from lightning_memplan.step.setup import MakeOptimizer
from lightning_memplan.step.strategies.fsdp import named_ignored
from lightning_memplan.trace.tracer import prepared, trace_steps
from lightning_memplan.types import Device


@dataclass(frozen=True)
class Job:
    """A training step as it is: what ``trace_steps`` takes, and the estimate that came of it."""

    found: Estimate
    module: nn.Module
    batches: Sequence[tuple[int, Any]]
    settings: StepSettings
    trainer: Any = None
    datamodule: Any = None
    optimizer: MakeOptimizer | None = None
    stage: str | None = None

    def again(self, **changes: Any) -> Estimate:
        """The estimate with some of these changed."""
        job = replace(self, **changes)
        common = {"trainer": job.trainer, "datamodule": job.datamodule, "optimizer": job.optimizer}
        module = prepared(job.module, job.settings, trainer=job.trainer, stage=job.stage)
        program, _ = scaled(trace_steps(module, job.batches, job.settings, **common))
        return replace(self.found, program=program, _replays={})


def resolve_step(
    module: nn.Module,
    batch: Any,
    precision: str | int | None,
    optimizer: MakeOptimizer | None,
    trainer: Any,
    device: Device | str | None,
    gradient_clip_val: float | None,
    accumulate_grad_batches: int,
    devices: int = 1,
    strategy: Any = None,
) -> tuple[Any, StepSettings, dict[str, Any]]:
    """What ``estimate_step`` takes, from what the user passed: where samples come from, the settings, and the rest."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a LightningModule or another nn.Module, not {module!r}")
    if optimizer is not None and is_lightning_module(module) and is_overridden("configure_optimizers", module):
        raise ValueError("a LightningModule makes its optimizers in configure_optimizers: leave optimizer=None")
    settings = StepSettings() if trainer is None else trainer_settings(trainer)
    if precision is not None:
        settings = replace(settings, precision=parse_precision(precision))
    if gradient_clip_val is not None:
        settings = replace(settings, gradient_clip_val=gradient_clip_val)
    if accumulate_grad_batches != 1:
        check_count("accumulate_grad_batches", accumulate_grad_batches)
        settings = replace(settings, accumulate_grad_batches=accumulate_grad_batches)
    check_count("devices", devices)
    if devices > 1 or strategy is not None:
        if trainer is not None:
            raise ValueError("a Trainer has its own devices and strategy: leave devices and strategy out")
        parallel = parallel_named(strategy, devices)
        if parallel is not None and parallel.kind == "model_parallel" and not is_overridden("configure_model", module):
            raise ValueError(
                f"with ModelParallelStrategy (fsdp2) a module shards itself, and {type(module).__name__} has no "
                "configure_model that does: add one that calls fully_shard, or use strategy='fsdp'"
            )
        settings = replace(settings, parallel=parallel)
    card = named_device(device)
    if card is not None and card.capability is not None:
        settings = replace(settings, capability=card.capability)
    settings = replace(settings, parallel=named_ignored(settings.parallel, module))
    source, datamodule = data_source_of(batch, trainer)
    return source, settings, {"device": card, "trainer": trainer, "datamodule": datamodule, "optimizer": optimizer}


def nccl_allowance(settings: StepSettings, device: Device) -> int:
    """Bytes of the card that are left to NCCL, which it takes beside the allocator, where there are several ranks."""
    return 0 if settings.parallel is None or device.kind != "cuda" else settings.parallel.nccl


def ranks(trainer: Any = None, devices: int = 1, strategy: Any = None, **_: Any) -> StepSettings:
    """Of the settings of ``estimate``, those that say how several cards train together."""
    if trainer is not None:
        return trainer_settings(trainer)
    return StepSettings(parallel=parallel_named(strategy, devices))


def samples_of_a_rank(samples: int | None, ranks: int) -> int | None:
    """How many samples each of the ranks is given of a dataset, rounded up as DistributedSampler does.

    >>> samples_of_a_rank(21, 2), samples_of_a_rank(None, 2)
    (11, None)
    """
    return None if samples is None else -(-samples // ranks)


def named_device(device: Device | str | None) -> Device | None:
    """A device that was named, or described by hand."""
    if device is None or isinstance(device, Device):
        return device
    if isinstance(device, str):
        return gpu(device)
    raise TypeError(f"device is the name of a card or a Device, not {device!r}")


def default_device() -> Device:
    """The first CUDA device that this process can use, else the host's memory."""
    devices: Sequence[Device] = detect_devices()
    return devices[0] if devices else cpu_device()


def data_source_of(batch: Any, trainer: Any) -> tuple[Any, Any]:
    """Where samples come from, and the datamodule whose hooks a batch passes.

    A datamodule is prepared and set up on a shallow copy, so that the user's own stays as it is.
    """
    if not is_datamodule(batch):
        return batch, getattr(trainer, "datamodule", None)
    datamodule = copy.copy(batch)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule.train_dataloader(), datamodule
