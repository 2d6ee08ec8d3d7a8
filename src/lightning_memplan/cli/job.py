"""Make the job that a command line describes, and ask the package about it."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_memplan.checks import Method
from lightning_memplan.cli.output import UsageError
from lightning_memplan.cli.targets import find, make, parse_pair
from lightning_memplan.devices.catalogue import gpu
from lightning_memplan.lightning.config_file import read_cli_config
from lightning_memplan.lightning.trainer import sharding
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.planning.job import Training, TrainingJob, WhichSamples, default_device, training_job
from lightning_memplan.planning.limits import Limits
from lightning_memplan.planning.predict import predict
from lightning_memplan.planning.session import PlanningSession, check_effective_batch_size, plan_each
from lightning_memplan.step.setup import MakeOptimizer
from lightning_memplan.types import Advice, Device, Plan
from lightning_memplan.units import MiB, parse_bytes

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """A module, what it is trained on, and how.

    >>> job = Job(nn.Linear(1000, 1000), torch.zeros(4, 1000), Training(precision="bf16-true"))
    >>> job.plan(gpu("T4"), Limits(max_batch_size=64)).batch_size
    64
    """

    module: nn.Module
    batch: Any
    training: Training = field(default_factory=Training)
    method: Method = "auto"
    samples: WhichSamples = "auto"

    @property
    def name(self) -> str:
        """The class of the module."""
        return type(self.module).__name__

    def on(self, device: Device | None) -> TrainingJob:
        """Return the job on a device; without one kernels are chosen for the default compute capability."""
        return training_job(
            self.module,
            self.batch,
            self.training,
            device=device,
            samples=self.samples,
            assume_default=False,
            method=self.method,
        )

    def estimate(self, device: Device | None) -> Estimate:
        """Estimate what training needs."""
        return predict(self.on(device))

    def plan(self, device: Device, limits: Limits) -> Plan:
        """Plan the largest batch size that fits."""
        job = self.on(device)
        check_effective_batch_size(job, limits)
        return PlanningSession(job, limits, self.method).plan()

    def check(self, device: Device, batch_size: int, margin: float) -> Plan:
        """Plan for this batch size alone, whatever the size of the dataset.

        Raises:
            DoesNotFitError: it does not fit.
        """
        return PlanningSession(self.on(device), Limits(margin), self.method).check(batch_size)

    def advise(self, device: Device, batch_size: int | None, margin: float) -> tuple[Advice, ...]:
        """Advise on changes that save memory at a batch size; without one at the largest that fits."""
        return PlanningSession(self.on(device), Limits(margin), "trace").advice(batch_size)

    def plan_each(self, devices: Sequence[Device], limits: Limits) -> tuple[tuple[Device, int], ...]:
        """Return each device with the largest batch size that fits on it (0: none fits), the smallest device first."""
        return plan_each(self.on(None), devices, limits, self.method)


# --- what a command line describes
def make_job(args: argparse.Namespace) -> Job:
    """Make the job that a command line names; what the user's own code prints goes to standard error.

    Raises:
        UsageError: it names no module or no data, or something that cannot be made.
    """
    with redirect_stdout(sys.stderr):
        job = _from_config(args) if args.config else _from_target(args)
    if not isinstance(job.module, nn.Module):
        raise UsageError(
            f"{args.target} made {job.module!r}: it must be, or make, a LightningModule or another nn.Module"
        )
    if job.batch is None:
        raise UsageError(
            "nothing says what is trained on: name it by --data package.module:DataModule or --input 3x224x224"
        )
    set_by_file = job.training
    training = Training(
        precision=_first(args.precision, set_by_file.precision),
        optimizer=_optimizer(args),
        gradient_clip_val=_first(args.gradient_clip_val, set_by_file.gradient_clip_val),
        accumulate_grad_batches=_first(args.accumulate_grad_batches, set_by_file.accumulate_grad_batches),
        devices=_first(args.devices, set_by_file.devices),
        strategy=_first(_strategy(args, job.module), set_by_file.strategy),
    )
    return replace(job, training=training, method=args.method or "auto", samples=args.samples or "auto")


def device_of(args: argparse.Namespace) -> Device:
    """Return the device that a command line names, else the first CUDA device of this machine, else its host.

    Raises:
        UsageError: ``--gpu`` is not in the catalogue, or ``--memory`` has no unit.
    """
    return named_device(args) or default_device()


def named_device(args: argparse.Namespace) -> Device | None:
    """Return the device that a command line names; None where it names none.

    Raises:
        UsageError: ``--gpu`` is not in the catalogue, or ``--memory`` has no unit.
    """
    if args.memory:
        if (total := parse_bytes(args.memory)) < MiB:
            raise UsageError(f"--memory {args.memory} are {total} bytes: write a unit, such as --memory 24GiB")
        return Device(f"a GPU of {args.memory}", total=total)
    if args.gpu:
        try:
            return gpu(args.gpu)
        except ValueError as error:
            text = str(error).partition("; gpus()")[0]
            raise UsageError(f"{text}; memplan gpus lists it, and --memory 24GiB stands for any GPU") from error
    return None


def _from_target(args: argparse.Namespace) -> Job:
    if not args.target:
        raise UsageError(
            "nothing to plan: name it as package.module:Name or script.py:name, or by --config config.yaml"
        )
    module = make(args.target, args.arg, "--arg")
    batch = make(args.data, args.data_arg, "--data-arg") if args.data else None
    return Job(module, _plain_batch(args.input, args.labels) if args.input is not None else batch)


def _from_config(args: argparse.Namespace) -> Job:
    if not Path(args.config).is_file():
        raise UsageError(f"there is no file {args.config!r}: --config is a LightningCLI's YAML")
    model = find(args.target) if args.target else None
    data = find(args.data) if args.data else None
    module, datamodule, trainer = read_cli_config(args.config, model, data)
    batch = _plain_batch(args.input, args.labels) if args.input is not None else datamodule
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes")
    count = len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) and devices > 0 else 1

    def setting(name: str) -> Any:
        return None if trainer.get(name) == "auto" else trainer.get(name)

    training = Training(
        precision=setting("precision"),
        gradient_clip_val=setting("gradient_clip_val"),
        accumulate_grad_batches=_first(setting("accumulate_grad_batches"), 1),
        devices=count * (nodes or 1),
        strategy=setting("strategy"),
    )
    return Job(module, batch, training)


def _first(value: T | None, otherwise: T) -> T:
    return otherwise if value is None else value


def _plain_batch(text: str, labels: str | None) -> Any:
    """Return two samples of a shape such as ``3x224x224`` or ``512:int64``, with integer labels where asked for."""
    shape, _, kind = text.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"{kind!r} is no type of tensor: write --input {shape}:int64, or another of torch's")
    inputs = torch.zeros(2, *_shape(shape, "--input"), dtype=dtype)
    return inputs if labels is None else (inputs, torch.zeros(2, *_shape(labels, "--labels"), dtype=torch.int64))


def _shape(text: str, option: str) -> list[int]:
    sizes = text.split("x") if text else []
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise UsageError(f"{text!r} is no shape: write one sample's, such as {option} 3x224x224")
    return [int(size) for size in sizes]


def _optimizer(args: argparse.Namespace) -> MakeOptimizer | None:
    if args.optimizer is None:
        return None
    found = getattr(torch.optim, args.optimizer, None)
    if not isinstance(found, type) or not issubclass(found, torch.optim.Optimizer):
        raise UsageError(
            f"torch.optim has no optimizer {args.optimizer!r}: AdamW, SGD, ... (upper and lower case matter)"
        )
    return partial(found, **{"lr": 1e-3, **dict(parse_pair(pair, "--optimizer-arg") for pair in args.optimizer_arg)})


def _strategy(args: argparse.Namespace, module: nn.Module) -> Any:
    """Return a strategy's name, or the strategy that a target makes; with ``--wrap`` FSDP with these units."""
    if args.wrap:
        if args.strategy not in (None, "fsdp"):
            raise UsageError(f"--wrap names the units of --strategy fsdp, not of {args.strategy}: leave one out")
        kinds = {type(layer).__name__: type(layer) for layer in module.modules()}
        unknown = [name for name in args.wrap if name not in kinds]
        if unknown:
            near = difflib.get_close_matches(unknown[0], kinds, n=3, cutoff=0.4) or sorted(kinds)[:8]
            raise UsageError(f"{type(module).__name__} has no layer of class {unknown[0]!r}: try {', '.join(near)}")
        return sharding(kinds[name] for name in args.wrap)
    return make(args.strategy, (), "") if args.strategy and ":" in args.strategy else args.strategy
