"""Functions of the package: ``estimate``, ``plan``, ``advise``, ``cards_for``, ``plan_lengths``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from lightning_memplan.checks import Method, check_count, check_margin, check_method
from lightning_memplan.devices.catalogue import gpus
from lightning_memplan.errors import DoesNotFitError
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.planning.job import (
    Training,
    WhichSamples,
    default_device,
    named_device,
    nccl_allowance,
    training_job,
)
from lightning_memplan.planning.limits import Limits
from lightning_memplan.planning.plan import make_plan
from lightning_memplan.planning.predict import predict
from lightning_memplan.planning.predictor import OneEstimate
from lightning_memplan.planning.session import PlanningSession, check_effective_batch_size, plan_each
from lightning_memplan.settings import MARGIN
from lightning_memplan.step.setup import MakeOptimizer
from lightning_memplan.types import Advice, Device, Length, Lengths, Plan


def estimate(
    module: nn.Module,
    batch: Any,
    *,
    method: Method = "auto",
    precision: str | int | None = None,
    optimizer: MakeOptimizer | None = None,
    trainer: Any = None,
    device: Device | str | None = None,
    gradient_clip_val: float | None = None,
    accumulate_grad_batches: int = 1,
    devices: int = 1,
    strategy: Any = None,
    samples: WhichSamples = "auto",
    max_batch_size: int | None = None,
) -> Estimate:
    """Estimate the memory that training ``module`` needs, at any batch size, without running it on a GPU.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Flatten())
    >>> est = estimate(net, torch.zeros(4, 3, 32, 32))
    >>> est.method, est.phase(batch_size=64)
    ('trace', 'backward')

    Args:
        module: A LightningModule, whose ``training_step`` and ``configure_optimizers`` run; or any module, which is run
            on the batch, and whose loss is the ``loss`` that it returns or the sum of its outputs.
        batch: A batch as the data loader yields it, its first dimension the batch; or a DataLoader, a collection of
            DataLoaders, or a LightningDataModule.
        method: How to predict. ``"probe"`` runs the step on the GPU, ``"trace"`` runs it on fake tensors, ``"formula"``
            adds up feature maps. ``"auto"`` traces, and probes too where the device is a GPU of this machine. Its
            estimate is the probe's if a large batch ran, else the one by which fewer samples fit, and the formula's
            where neither can be had; ``methods`` has all of them.
        precision: A Trainer's ``precision``; ``"32-true"`` by default.
        optimizer: Function that makes the optimizer from parameters, for a module that is no LightningModule.
        trainer: A Trainer, from which precision, clipping and accumulation are taken.
        device: GPU to plan for, whose compute capability chooses the kernels: ``"RTX 3090"``, or a ``Device``.
        gradient_clip_val: A Trainer's ``gradient_clip_val``.
        accumulate_grad_batches: A Trainer's ``accumulate_grad_batches``.
        devices: Number of GPUs that train together, without a Trainer; estimate and batch size are of each.
        strategy: How they train together: ``"ddp"`` (the default), ``"fsdp"``, ``"fsdp2"`` for a module that calls
            ``fully_shard`` in ``configure_model``, or one of Lightning's strategies
            (``FSDPStrategy(auto_wrap_policy={Block})``).
        samples: Samples of a loader's dataset that batches are made of: the first five (``"first"``), or copies of the
            largest of 64 that are spread over it (``"largest"``; ``"auto"`` where the first five differ in size).
        max_batch_size: Largest batch size of interest. No larger batch is probed.

    Raises:
        TraceError: The step cannot be traced with ``method="trace"``, or probed with ``method="probe"``; says what it
            needs, and at which line. An error of the step itself in a probe is raised unchanged; ``"auto"`` goes on to
            the trace where the replica may have caused it (AttributeError, TypeError, KeyError).
        ValueError: An argument is wrong in itself.
    """
    check_method(method)
    if max_batch_size is not None:
        check_count("max_batch_size", max_batch_size)
    how = Training(precision, optimizer, trainer, gradient_clip_val, accumulate_grad_batches, devices, strategy)
    job = training_job(
        module,
        batch,
        how,
        device=device,
        samples=samples,
        assume_default=False,
        method=method,
    )
    return predict(job, max_batch_size)


def plan(
    module: nn.Module,
    batch: Any,
    *,
    device: Device | str | None = None,
    margin: float = MARGIN,
    min_batch_size: int = 1,
    max_batch_size: int | None = None,
    multiple_of: int = 1,
    method: Method = "auto",
    precision: str | int | None = None,
    optimizer: MakeOptimizer | None = None,
    trainer: Any = None,
    gradient_clip_val: float | None = None,
    accumulate_grad_batches: int = 1,
    devices: int = 1,
    strategy: Any = None,
    samples: WhichSamples = "auto",
    effective_batch_size: int | None = None,
) -> Plan:
    """Find the largest batch size with which ``module`` trains on ``device``.

    >>> import torch
    >>> card, net = Device("a small card", total=2**30), torch.nn.Linear(1000, 1000)
    >>> found = plan(net, torch.zeros(4, 1000), device=card, max_batch_size=256)
    >>> found.batch_size, found.limited_by
    (256, 'max_batch_size')
    >>> found = plan(net, torch.zeros(4, 1000), device=card, max_batch_size=256, effective_batch_size=768)
    >>> found.batch_size, found.accumulate_grad_batches
    (256, 3)

    Args:
        module: See ``estimate``, also for ``batch``, ``method`` and the arguments after it.
        device: GPU by name (``"RTX 3090"``) or as a ``Device``; by default the first GPU found, and the host's memory
            where there is none.
        margin: Fraction of the device's capacity to leave free, in ``[0, 1)``.
        min_batch_size: Smallest batch size allowed.
        max_batch_size: Largest batch size allowed; the length of a loader's dataset is a limit too.
        multiple_of: Number of which the batch size must be a multiple.
        effective_batch_size: Samples that one optimizer step sees, on all devices together. The plan has the largest
            batch size that divides it and fits, and the number of batches to accumulate.

    Raises:
        DoesNotFitError: Not even the smallest batch size fits; ``needed`` and ``available`` are its bytes.
        UnmetDemandError: No batch size meets ``effective_batch_size`` or ``min_batch_size``.
        MisconfigurationException: ``effective_batch_size``, where something else decides how much is accumulated.
    """
    check_method(method)
    limits = Limits(margin, min_batch_size, max_batch_size, multiple_of, effective_batch_size)
    how = Training(precision, optimizer, trainer, gradient_clip_val, accumulate_grad_batches, devices, strategy)
    job = training_job(
        module,
        batch,
        how,
        device=device,
        samples=samples,
    )
    check_effective_batch_size(job, limits)
    return PlanningSession(job, limits, method).plan()


def check(
    module: nn.Module,
    batch: Any,
    batch_size: int,
    *,
    device: Device | str | None = None,
    margin: float = MARGIN,
    method: Method = "auto",
    samples: WhichSamples = "auto",
    **settings: Any,
) -> Plan:
    """Return the plan of one given batch size: does it fit?

    >>> import torch
    >>> check(torch.nn.Linear(1000, 1000), torch.zeros(4, 1000), 64, device="T4").batch_size
    64

    Args:
        module: as for ``estimate``, and so are ``batch``, ``method`` and ``settings``.
        batch_size: the one to check.
        device: as for ``plan``, and so is ``margin``.

    Raises:
        DoesNotFitError: it does not fit; says what it needs, and what would save memory.
        MemplanError: the step refuses it.
    """
    check_method(method)
    check_count("batch_size", batch_size)
    job = training_job(module, batch, Training(**settings), device=device, samples=samples)
    return PlanningSession(job, Limits(margin), method).check(batch_size)


def advise(
    module: nn.Module,
    batch: Any,
    *,
    batch_size: int | None = None,
    device: Device | str | None = None,
    margin: float = MARGIN,
    precision: str | int | None = None,
    optimizer: MakeOptimizer | None = None,
    trainer: Any = None,
    gradient_clip_val: float | None = None,
    accumulate_grad_batches: int = 1,
    devices: int = 1,
    strategy: Any = None,
    samples: WhichSamples = "auto",
) -> tuple[Advice, ...]:
    """Find changes that save memory, the most saving first.

    Each change (half precision, gradient checkpointing of repeated blocks, a fused optimizer, accumulation, expandable
    segments, ...) is made on a replica, and its whole step is traced: no figure is a rule of thumb. A change that saves
    less than a hundredth of the peak is left out. FSDP on the fewest of 2, 4 or 8 GPUs is advised where the batch fits
    only then, or where it saves a tenth.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.GELU(), torch.nn.Linear(256, 256))
    >>> card = Device("a small card", total=2**28)
    >>> best, *_ = advise(net, torch.zeros(4, 256), batch_size=8192, device=card)
    >>> best.change, best.saved > 0
    ("precision='bf16-true'", True)

    Args:
        module: See ``estimate``, also for ``batch``, ``precision`` and the arguments after it.
        batch_size: Batch size at which to save memory; by default the largest that fits on ``device``.
        device: See ``plan``. Each advice has the largest batch size that would then fit on it.
        margin: See ``plan``.

    Raises:
        TraceError: the step cannot be traced.
    """
    limits = Limits(margin)
    how = Training(precision, optimizer, trainer, gradient_clip_val, accumulate_grad_batches, devices, strategy)
    job = training_job(
        module,
        batch,
        how,
        device=device,
        samples=samples,
    )
    return PlanningSession(job, limits, "trace").advice(batch_size)


def cards_for(
    module: nn.Module,
    batch: Any,
    *,
    cards: Sequence[Device] | None = None,
    margin: float = MARGIN,
    min_batch_size: int = 1,
    max_batch_size: int | None = None,
    multiple_of: int = 1,
    method: Method = "auto",
    samples: WhichSamples = "auto",
    **settings: Any,
) -> tuple[tuple[Device, int], ...]:
    """Find the largest batch size that fits on each GPU of the catalogue (0: none does), the smallest GPU first.

    >>> import torch
    >>> net, some = torch.nn.Linear(1000, 1000), [device for device in gpus() if device.name in ("T4", "RTX 3090")]
    >>> [(card.name, size) for card, size in cards_for(net, torch.zeros(4, 1000), cards=some, max_batch_size=512)]
    [('T4', 512), ('RTX 3090', 512)]

    Args:
        module: as for ``estimate``, and so are ``batch`` and ``settings``.
        cards: GPUs to look at, in place of ``gpus()``.
        margin: as for ``plan``, and so are the limits of the batch size.
    """
    check_method(method)
    limits = Limits(margin, min_batch_size, max_batch_size, multiple_of)
    job = training_job(module, batch, Training(**settings), samples=samples, assume_default=False)
    return plan_each(job, gpus() if cards is None else cards, limits, method)


def plan_lengths(
    module: nn.Module,
    make_batch: Callable[[int], Any],
    lengths: Iterable[int],
    *,
    device: Device | str | None = None,
    margin: float = MARGIN,
    max_batch_size: int | None = None,
    **settings: Any,
) -> Lengths:
    """Find the largest batch size at each length of samples, and the most tokens of a batch that fit at all of them.

    >>> import torch
    >>> net = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
    >>> card = Device("a small card", total=2**28)
    >>> found = plan_lengths(net, lambda length: torch.zeros(2, length, 64), [128, 256], device=card)
    >>> [row.length for row in found.rows], found.token_budget == min(row.tokens for row in found.rows)
    ([128, 256], True)

    Each length is traced by itself, in steps that all have it. A batch sampler that pads samples to one of the lengths
    can take ``found.token_budget // length`` of them: no more than that row's ``batch_size``. Where batches of each
    row's own ``batch_size`` come in turn, blocks that one leaves cached may be too small for the next: let segments
    grow then (``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True``, which is planned with).

    Args:
        module: as for ``estimate``, and so are ``settings``.
        make_batch: ``make_batch(512)`` makes what the dataloader yields for a few samples of that length.
        lengths: those that samples are padded to, in tokens; of pictures of several scales, their pixels.
        device: as for ``plan``, and so is ``margin``.
        max_batch_size: the largest batch size at any length, where short samples would make too large a batch.

    Raises:
        TraceError: a step cannot be traced. The formula does not stand in, since it does not count attention.
        ValueError: an argument that is wrong in itself.
    """
    check_margin(margin)
    if not callable(make_batch):
        raise TypeError(f"make_batch makes a batch of a length (make_batch(512)): not {make_batch!r}")
    asked = list(lengths)
    for length in asked:
        check_count("a length", length)
    if not asked:
        raise ValueError("lengths is empty: name at least the longest, as in [128, 512, 2048]")
    if "method" in settings:
        raise ValueError("plan_lengths plans each length by its trace: leave method out")
    card = named_device(device) or default_device()
    shared = {name: settings[name] for name in ("trainer", "devices", "strategy") if name in settings}
    nccl = nccl_allowance(training_job(module, None, Training(**shared)).settings, card)
    card = replace(card, context=card.context + nccl)
    limits = Limits(margin, max_batch_size=max_batch_size)

    def row(length: int) -> Length:
        found = estimate(module, make_batch(length), method="trace", device=card, **settings)
        try:
            plan = make_plan(OneEstimate(found), card, limits, nccl=nccl)
        except DoesNotFitError as error:
            return Length(length, 0, error.needed, "memory")
        limited_by: Literal["memory", "max_batch_size"] = "memory" if plan.limited_by == "memory" else "max_batch_size"
        return Length(length, plan.batch_size, plan.peak_reserved, limited_by)

    return Lengths(tuple(map(row, sorted(set(asked)))), card, limits.budget_of(card))
