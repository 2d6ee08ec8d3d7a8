"""Make a ``TrainingJob`` (module, data, settings) from a user's arguments or from a Trainer."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from math import lcm
from typing import Any, get_args

import torch
from torch import nn

from lightning_memplan.checks import Method, check_choice, check_count
from lightning_memplan.data.holders import DEFAULT_NAME, hold_batch_size
from lightning_memplan.data.loaders import dataset_size, unit_of
from lightning_memplan.data.samples import SAMPLE_SIZE, Samples, Which, check_sample, read_samples
from lightning_memplan.data.streams import most_of_a_stream, note_on_stream, unsized_loaders
from lightning_memplan.devices.catalogue import gpu
from lightning_memplan.devices.detect import cpu_device, detect_devices
from lightning_memplan.errors import TraceError
from lightning_memplan.lightning.compat import (
    as_lightning_module,
    is_datamodule,
    is_lightning_module,
    is_overridden,
    misconfiguration,
)
from lightning_memplan.lightning.data_source import Phase, loader_source, loaders_are_made
from lightning_memplan.lightning.trainer import cuda_index, divides_samples, parallel_named, trainer_settings
from lightning_memplan.planning.limits import Limits
from lightning_memplan.planning.replicas import Replicas
from lightning_memplan.probe.probe import can_probe
from lightning_memplan.settings import StepSettings, parse_precision
from lightning_memplan.step.begun import Begun
from lightning_memplan.step.lazy import has_lazy_layers
from lightning_memplan.step.setup import MakeOptimizer, TrainingSetup
from lightning_memplan.step.strategies.fsdp import named_ignored
from lightning_memplan.trace.tracer import Beginning
from lightning_memplan.types import Device, Plan


@dataclass(frozen=True)
class Sampling:
    """Which samples of a dataset batches are made of: its first few, or copies of the largest of ``count`` samples.

    ``"auto"`` looks at more than the first few where these differ in size.

    >>> Sampling("largest", count=16).which
    'largest'
    """

    which: Which = "auto"
    count: int = SAMPLE_SIZE

    def __post_init__(self) -> None:
        check_sample(self.which, self.count)


WhichSamples = Which


def sampling_of(samples: WhichSamples) -> Sampling:
    """Return the sampling that an argument asks for.

    >>> sampling_of("largest").which
    'largest'

    Raises:
        ValueError: it is unknown.
    """
    check_choice("samples", samples, get_args(WhichSamples))
    return Sampling(samples)


@dataclass(frozen=True)
class DataSource:
    """Source of batches: a batch, a loader, or a collection of loaders. Samples are read once, and kept.

    >>> import torch
    >>> DataSource(torch.zeros(4, 3)).samples.make(2).shape
    torch.Size([2, 3])
    """

    data: Any
    sampling: Sampling = Sampling()

    divided: bool = True  #: Lightning divides the samples among the ranks

    @cached_property
    def samples(self) -> Samples:
        """Samples of which batches of any size are made."""
        return read_samples(self.data, self.sampling.which, self.sampling.count)

    @property
    def size(self) -> int | None:
        """Number of samples that a batch can have; None where it is not known, or where ``data`` is a batch."""
        return self.samples_of_a_rank(1)

    @property
    def batch_size(self) -> int | None:
        """Batch size that the loaders are set to now."""
        return unit_of(self.data)

    @property
    def own_size(self) -> int | None:
        """Number of samples that a batch has now; None where it is not known, or where ``data`` is a batch."""
        return self.samples.own

    def samples_of_a_rank(self, ranks: int) -> int | None:
        """Return the number of samples that each rank is given, rounded up as DistributedSampler does.

        >>> import torch
        >>> DataSource(torch.utils.data.DataLoader(range(21))).samples_of_a_rank(2)
        11
        """
        return dataset_size(self.data, ranks if self.divided else 1)

    def within(self, limits: Limits, ranks: int) -> Limits:
        """Return the limits with those of the data: how many samples there are, and which batch sizes can be had.

        >>> import torch
        >>> DataSource(torch.utils.data.DataLoader(range(21))).within(Limits(max_batch_size=64), 2).largest
        11
        """
        samples, limits = self.samples, replace(limits, ranks=ranks)
        if samples.fixed is not None:
            return limits.exactly(samples.fixed)
        known = [size for size in (self.samples_of_a_rank(ranks), samples.count) if size is not None]
        most = min(known) if known else most_of_a_stream(self.data, samples, limits.max_batch_size)
        return replace(limits, samples=most, multiple_of=lcm(limits.multiple_of, samples.accepts))

    def explained(self, plan: Plan) -> Plan:
        """Return the plan with what the data say of its limit: the only size that can be had, or a length unknown."""
        if self.samples.fixed is not None:
            return replace(plan, limited_by="dataset")
        if plan.limited_by != "dataset" or not unsized_loaders(self.data, self.samples):
            return plan
        return replace(plan, notes=(*plan.notes, note_on_stream(self.data, plan.batch_size)))


@dataclass(frozen=True)
class TrainingJob:
    """A module, its data, and the settings of its training.

    ``datamodule`` is the one whose hooks a batch passes; ``stage`` is the argument of the module's ``setup``, which is
    not called where it is None. ``batch_size_name`` names the attribute or hyperparameter that holds the batch size.
    Jobs that differ in settings share the ``replicas`` of the module.

    >>> import torch
    >>> job = training_job(torch.nn.Linear(8, 8), torch.zeros(4, 8), Training(accumulate_grad_batches=2))
    >>> job.name, job.ranks, job.settings.accumulate_grad_batches
    ('Linear', 1, 2)
    """

    module: nn.Module
    source: DataSource
    settings: StepSettings
    device: Device
    trainer: Any = None
    datamodule: Any = None
    optimizer: MakeOptimizer | None = None
    stage: str | None = None
    method: Method = "auto"
    batch_size_name: str = DEFAULT_NAME
    replicas: Replicas = field(default_factory=Replicas, compare=False, repr=False)

    @property
    def name(self) -> str:
        """Class of the module."""
        return type(self.module).__name__

    @property
    def ranks(self) -> int:
        """Number of processes that train together, a GPU each."""
        if self.trainer is not None:
            return int(self.trainer.world_size)
        return 1 if self.settings.parallel is None else self.settings.parallel.ranks

    @property
    def nccl(self) -> int:
        """Bytes of the GPU that are left to NCCL, beside the allocator, where several ranks train together."""
        return nccl_allowance(self.settings, self.device)

    @property
    def setup(self) -> TrainingSetup:
        """All that the steps of the job need beside a batch and a device."""
        return self._setup_of(self.begun())

    def _setup_of(self, module: nn.Module) -> TrainingSetup:
        return TrainingSetup(
            module,
            self.settings,
            self.trainer,
            self.datamodule,
            self.optimizer,
            self.source.data if self.trainer is not None else None,
            self.batch_size_name,
        )

    def accumulating(self, microbatches: int) -> TrainingJob:
        """Return the same job with another number of batches in each optimizer step."""
        return replace(self, settings=replace(self.settings, accumulate_grad_batches=microbatches))

    @property
    def is_probed(self) -> bool:
        """True where ``method`` runs steps on the GPU.

        ``"auto"`` does where only this process would wait for them. A strategy that shards parameters is not probed:
        each rank would make a copy of all of them. Nor is an unknown strategy: its ranks may wait for one another.
        """
        if self.method == "probe":
            return True
        parallel = self.settings.parallel
        if parallel is not None:
            alone = parallel.ranks == 1 or parallel.kind == "ddp"
        else:
            initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
            alone = not initialized or torch.distributed.get_world_size() == 1
        here = self.device.kind == "cuda" and self.device.index is not None
        return self.method == "auto" and here and alone and can_probe()

    def begun(self) -> nn.Module:
        """Return the module as it is when training begins: after ``setup`` and ``configure_model``, on a replica.

        It has real tensors where steps run on the GPU, and fake ones where they are only traced.
        """
        found = self.replicas.set_up(self.module, self.settings, self.trainer, self.stage, real=self.is_probed)
        if self.source.data is None or not has_lazy_layers(found):  # without data, it is asked for its loaders
            return found
        return self.replicas.initialized(self._setup_of(self.module), self.stage, self.source)

    def beginning(self) -> Beginning | None:
        """Return the module at its first step, on fake tensors, of which all runs train copies.

        Raises:
            TraceError: a hook needs what a fake tensor cannot give.
        """
        return self.replicas.beginning(self.setup)

    def begun_replica(self) -> Begun | None:
        """Return the module at its first step, None where each run has to call the hooks before it."""
        try:
            found = self.beginning()
        except TraceError:
            return None
        return None if found is None else found.begun


@dataclass(frozen=True)
class Training:
    """Settings of training, as a user gives them; see ``estimate`` for each field.

    >>> Training(precision="16-mixed", devices=2).accumulate_grad_batches
    1
    """

    precision: str | int | None = None
    optimizer: MakeOptimizer | None = None
    trainer: Any = None
    gradient_clip_val: float | None = None
    accumulate_grad_batches: int = 1
    devices: int = 1
    strategy: Any = None


def training_job(
    module: nn.Module,
    batch: Any,
    how: Training | None = None,
    *,
    device: Device | str | None = None,
    samples: WhichSamples = "auto",
    assume_default: bool = True,
    method: Method = "auto",
) -> TrainingJob:
    """Return the job that a user's arguments describe.

    Kernels are chosen for the compute capability of ``device``; without a device for that of the first GPU here, unless
    ``assume_default`` is False.

    Raises:
        TypeError, ValueError: an argument is wrong in itself.
    """
    how, sampling = how or Training(), sampling_of(samples)
    module = as_lightning_module(module)
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a LightningModule or another nn.Module, not {module!r}")
    if isinstance(how.optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer is a function that makes one from parameters, such as partial(torch.optim.SGD, lr=0.1), not a "
            f"{type(how.optimizer).__name__} that is made already"
        )
    if how.optimizer is not None and is_lightning_module(module) and is_overridden("configure_optimizers", module):
        raise ValueError("a LightningModule makes its optimizers in configure_optimizers: leave optimizer=None")
    settings = StepSettings() if how.trainer is None else trainer_settings(how.trainer)
    if how.precision is not None:
        settings = replace(settings, precision=parse_precision(how.precision))
    if how.gradient_clip_val is not None:
        settings = replace(settings, gradient_clip_val=how.gradient_clip_val)
    if how.accumulate_grad_batches != 1:
        check_count("accumulate_grad_batches", how.accumulate_grad_batches)
        settings = replace(settings, accumulate_grad_batches=how.accumulate_grad_batches)
    check_count("devices", how.devices)
    if how.devices > 1 or how.strategy is not None:
        if how.trainer is not None:
            raise ValueError("a Trainer has its own devices and strategy: leave devices and strategy out")
        parallel = parallel_named(how.strategy, how.devices)
        if parallel is not None and parallel.kind == "model_parallel" and not is_overridden("configure_model", module):
            raise ValueError(
                f"with ModelParallelStrategy (fsdp2) a module shards itself, and {type(module).__name__} has no "
                "configure_model that does: add one that calls fully_shard, or use strategy='fsdp'"
            )
        settings = replace(settings, parallel=parallel)
    named = named_device(device)
    found = named or default_device()
    assumed = found if assume_default else named
    if assumed is not None and assumed.capability is not None:
        settings = replace(settings, capability=assumed.capability)
    settings = replace(settings, parallel=named_ignored(settings.parallel, module))
    data, datamodule = _data_of(batch, how.trainer)
    source = DataSource(data, sampling)
    return TrainingJob(module, source, settings, found, how.trainer, datamodule, how.optimizer, method=method)


def job_of_trainer(
    trainer: Any,
    module: nn.Module,
    stage: str,
    device: Device,
    sampling: Sampling = Sampling(),
    method: Method = "auto",
    batch_size_name: str = DEFAULT_NAME,
) -> TrainingJob:
    """Return the job of a Trainer's ``fit`` or ``test``, on the loaders that it was given or that a hook makes.

    Hooks that make loaders are called on copies: the user's objects stay as they are.
    """
    settings = trainer_settings(trainer, device.capability)
    settings = replace(settings, parallel=named_ignored(settings.parallel, module))
    datamodule = copy.copy(trainer.datamodule)
    job = TrainingJob(
        module,
        DataSource(None),
        settings,
        device,
        trainer,
        datamodule,
        stage=stage,
        method=method,
        batch_size_name=batch_size_name,
    )
    return replace(job, source=source_of_trainer(job, "test" if stage == "test" else "train", sampling))


def source_of_trainer(job: TrainingJob, phase: Phase, sampling: Sampling) -> DataSource:
    """Return the loaders that a job's Trainer has for a phase."""
    divided = divides_samples(job.trainer)
    return DataSource(loader_source(job.trainer, job.begun, job.datamodule, phase), sampling, divided)


def share_of_validation(job: TrainingJob, validation: DataSource, own: int) -> Fraction | None:
    """Return validation's samples for each sample of training, where both follow the same attribute; None if not.

    Its loaders are made once more, by a copy of whatever makes them that holds twice the batch size ``own``.
    """
    if not loaders_are_made(job.trainer, "val") or validation.batch_size is None:
        return None

    def twice(owner: Any) -> None:
        hold_batch_size(job.batch_size_name, 2 * own, own, owner)

    try:
        twofold = unit_of(loader_source(job.trainer, job.begun, job.datamodule, "val", twice))
    except Exception:  # noqa: BLE001 - whatever the user's hook raises
        return None
    if twofold is None or twofold == validation.batch_size:
        return None
    return max(Fraction(validation.batch_size, own), Fraction(twofold, 2 * own))


def nccl_allowance(settings: StepSettings, device: Device) -> int:
    """Return the bytes of a GPU that are left to NCCL, which allocates beside the caching allocator."""
    return 0 if settings.parallel is None or device.kind != "cuda" else settings.parallel.nccl


def named_device(device: Device | str | None) -> Device | None:
    """Return a device that was named or described by hand; None where nothing was.

    Raises:
        TypeError, ValueError: it is neither, or there is no GPU of that name.
    """
    if device is None or isinstance(device, Device):
        return device
    if isinstance(device, str):
        return gpu(device)
    raise TypeError(f"device is the name of a GPU or a Device, not {device!r}")


def default_device() -> Device:
    """Return the first CUDA device that this process can use, else the host's memory."""
    return next(iter(detect_devices()), None) or cpu_device()


def device_of_trainer(trainer: Any) -> Device:
    """Return the device on which a Trainer runs.

    Raises:
        MisconfigurationException: it runs on a CUDA device that is not among those found.
    """
    index = cuda_index(trainer)
    if index is None:
        return cpu_device()
    devices = detect_devices()
    for device in devices:
        if device.index == index:
            return device
    raise misconfiguration(f"the Trainer runs on cuda:{index}, and the devices found are {devices}")


def _data_of(batch: Any, trainer: Any) -> tuple[Any, Any]:
    """Return where batches come from, and the datamodule whose hooks they pass.

    A datamodule is prepared and set up on a shallow copy: the user's own stays as it is.
    """
    if not is_datamodule(batch):
        return batch, getattr(trainer, "datamodule", None)
    datamodule = copy.copy(batch)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule.train_dataloader(), datamodule
