"""``estimate`` and ``plan``: composition only."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import nn

from lightning_memplan._advice import Job, advise_job
from lightning_memplan._suited import MANY, OF_FEW, EstimateAt, Estimates, is_of_many, of_many, suited, traced_at
from lightning_memplan.checks import Method, check_count, check_margin, check_method
from lightning_memplan.data.loaders import dataset_size
from lightning_memplan.data.samples import SAMPLE_SIZE, Samples, Which, check_sample, read_samples
from lightning_memplan.devices.catalogue import gpu, gpus
from lightning_memplan.devices.detect import cpu_device, detect_devices
from lightning_memplan.errors import DoesNotFitError, TraceError, explain
from lightning_memplan.lightning.compat import as_lightning_module, is_datamodule, is_lightning_module, is_overridden
from lightning_memplan.lightning.trainer import check_accumulation, parallel_named, trainer_settings
from lightning_memplan.memory.allocator_settings import AllocatorSettings
from lightning_memplan.memory.estimate import Estimate, largest_on_card
from lightning_memplan.memory.loops import TURNS, scaled
from lightning_memplan.memory.program import interleaved, scale
from lightning_memplan.memory.search import largest_fitting
from lightning_memplan.probe.probe import SIZES, can_probe, probe_steps
from lightning_memplan.report.plans import advice_lines, does_not_fit_message
from lightning_memplan.settings import NCCL, StepSettings, parse_precision
from lightning_memplan.step.compiled_regions import COMPILED_SIZES, compiled_parts
from lightning_memplan.step.runner import MakeOptimizer
from lightning_memplan.step.strategies.fsdp import named_ignored
from lightning_memplan.trace.compiled import FUSED, Graphs
from lightning_memplan.trace.tracer import (
    prepared,
    run_formula,
    trace_counted,
    trace_steps,
    trace_test,
    trace_validation,
)
from lightning_memplan.types import Advice, Device, Length, Lengths, Plan

#: What a step raises where something is not there yet: a copy's trainer has no loops and no logger, and the hooks and
#: callbacks that come before the first batch have not run. It need not be an error of training's.
_OF_A_COPY = (AttributeError, TypeError, KeyError)


#: The part of what the card can give that a plan leaves free by default: for cuDNN's workspaces, which no one knows
#: before they are asked for, and for what the driver rounds up.
MARGIN = 0.05


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
    sample: Which = "first",
    sample_size: int = SAMPLE_SIZE,
    max_batch_size: int | None = None,
) -> Estimate:
    """What training ``module`` takes, at any batch size, without running it on a GPU.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Flatten())
    >>> est = estimate(net, torch.zeros(4, 3, 32, 32))
    >>> est.method, est.phase(batch_size=64)
    ('trace', 'backward')

    Args:
        module: a LightningModule, whose ``training_step`` and ``configure_optimizers`` are run on fake tensors, or any
            module, whose forward is run on the batch and whose outputs' sum (or the ``loss`` it returns) is the loss.
        batch: what the user's dataloader yields, its first dimension the batch; or a DataLoader, a collection of them,
            or a LightningDataModule.
        method: ``"probe"`` runs the step on the GPU, ``"trace"`` on fake tensors, ``"formula"`` adds
            up feature maps. ``"auto"`` traces, and probes too where the device is a GPU of this machine: the estimate
            is the probe's if a large batch ran, else that of the two by which fewer samples fit, and ``methods`` tells
            what each says. Where neither can be had it is the formula's.
        precision: a Trainer's ``precision``; ``"32-true"`` where nothing is said.
        optimizer: for a module that is no LightningModule: makes its optimizer from its parameters.
        trainer: a Trainer, from which precision, clipping and accumulation are taken.
        device: the card to plan for, by which kernels are chosen (compute capability); ``"RTX 3090"``, or a ``Device``.
        gradient_clip_val: as a Trainer's.
        accumulate_grad_batches: as a Trainer's.
        devices: how many cards train together, without a Trainer; the estimate is of each, and so is the batch size.
        strategy: how they do: ``"ddp"`` where nothing is said, ``"fsdp"``, ``"fsdp2"`` for a module that calls
            ``fully_shard`` in ``configure_model``, or one of Lightning's strategies
            (``FSDPStrategy(auto_wrap_policy={Block})``).
        sample: which samples of a loader's dataset batches are made of: ``"first"``, its first five, or ``"largest"``,
            copies of the largest of ``sample_size`` that are spread over it (where samples differ in size: texts,
            graphs, boxes).
        sample_size: how many samples ``"largest"`` looks at.
        max_batch_size: the largest batch size that will be asked for, where that is known: no larger batch is probed,
            and what a probe of that one sees holds for it.

    Raises:
        TraceError: ``method="trace"`` and the step cannot be traced: says what it needs, and at which line; or
            ``method="probe"`` and it cannot be probed. What the step itself raises in a probe is raised unchanged;
            ``"auto"`` goes on to the trace where that may be the copy's doing (AttributeError, TypeError, KeyError).
        ValueError: an argument that is wrong in itself.
    """
    check_method(method)
    check_sample(sample, sample_size)
    if max_batch_size is not None:
        check_count("max_batch_size", max_batch_size)
    module = as_lightning_module(module)
    source, settings, job = resolve_step(
        module,
        batch,
        precision,
        optimizer,
        trainer,
        device,
        gradient_clip_val,
        accumulate_grad_batches,
        devices,
        strategy,
    )
    options: dict[str, Any] = {"sample": sample, "sample_size": sample_size, "largest": max_batch_size}
    return estimate_step(module, source, settings, method=method, **options, **job)


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
    source, datamodule = _source(batch, trainer)
    return source, settings, {"device": card, "trainer": trainer, "datamodule": datamodule, "optimizer": optimizer}


def estimate_step(
    module: nn.Module,
    source: Any,
    settings: StepSettings,
    *,
    method: Method = "auto",
    device: Device | None = None,
    trainer: Any = None,
    datamodule: Any = None,
    optimizer: MakeOptimizer | None = None,
    stage: str | None = None,
    sample: Which = "first",
    sample_size: int = SAMPLE_SIZE,
    largest: int | None = None,
) -> Estimate:
    """``estimate`` with every setting in hand; ``stage`` names what ``setup`` is called with, on a copy.

    No batch of more than ``largest`` samples is probed.
    """
    samples = read_samples(source, sample, sample_size)
    common: dict[str, Any] = {"trainer": trainer, "datamodule": datamodule, "optimizer": optimizer}
    probed, why_not, refused = None, "", None
    if method == "probe" or (method == "auto" and _can_be_probed(device, settings)):
        try:
            index, capacity = _probed_index(device), (device or default_device()).capacity
            where: dict[str, Any] = {"capacity": capacity, "largest": largest, "stage": stage}
            traces, formula = probe_steps(module, samples.for_the_card, settings, index, **where, **common)
            program, more = scaled(traces)
            notes = traces[0].notes + more + samples.notes
            probed = Estimate("probe", formula, program, _allocator(), notes, turns=bool(more))
        except (TraceError, *_OF_A_COPY) as error:
            if method == "probe":
                raise
            why_not = str(error) if isinstance(error, TraceError) else explain(error, "a probe")
        except OF_FEW as error:
            if method == "probe":
                raise
            refused, why_not = error, explain(error, "a probe")
    if probed is not None and method == "probe":
        return probed
    module = prepared(module, settings, trainer=trainer, stage=stage)
    traced = _traced(module, samples, settings, method, common)
    if refused is not None and not is_of_many(traced, samples):  # no size suits it: the step is wrong in itself
        raise refused
    if probed is None:
        notes = (f"not planned by a probe: {why_not}",) if why_not else ()
        return replace(traced, notes=notes + traced.notes)
    if traced.method != "trace":
        return probed
    first, second = probed, traced
    if probed.largest_seen <= max(SIZES[0]):  # what kernels a large batch takes only the trace knows
        first, second = _tightest_first((probed, traced), device or default_device())
    return replace(first, others=(second,), notes=tuple(dict.fromkeys(probed.notes + traced.notes)))


def _tightest_first(found: Sequence[Estimate], device: Device) -> list[Estimate]:
    """Estimates of the same step, the one with which the fewest samples fit on the card first.

    A probe of a few samples does not see the kernels that are chosen for many, nor a trace what cuDNN takes for itself:
    what is too small is the error that stops a training.
    """

    def largest(estimate: Estimate) -> int:
        near = estimate.near(device.capacity)
        fits = partial(estimate.fits, capacity=device.capacity)
        return largest_fitting(fits, max_batch_size=2**30, near=near).batch_size

    return sorted(found, key=largest)


def _traced(
    module: nn.Module, samples: Samples, settings: StepSettings, method: Method, common: Mapping[str, Any]
) -> Estimate:
    """By trace, or by the formula where ``method`` says so, or leaves it open and the step cannot be traced."""
    batches = samples.batches(COMPILED_SIZES) if compiled_parts(module) else samples.batches()
    notes: tuple[str, ...] = ()
    reason = ""
    if method != "formula":
        try:
            graphs, least = Graphs(), None
            try:
                traces, formula = trace_counted(module, batches, settings, graphs=graphs, **common)
                program, more = scaled(traces)
            except TraceError as unlike:
                if not isinstance(unlike.__cause__, (type(None), *OF_FEW)):
                    raise
                for sizes in MANY:
                    with suppress(TraceError):
                        batches = of_many(samples, sizes)
                        traces, formula = trace_counted(module, batches, settings, graphs=graphs, **common)
                        program, more = scaled(traces)
                        break
                else:
                    raise
                more = (*more, f"the step does something else with few samples: planned from {sizes[0]} and more")
            notes = traces[0].notes + more + samples.notes
            if FUSED in notes:
                graphs.least = True
                least, _ = scaled(trace_steps(module, batches, settings, graphs=graphs, **common))
            return Estimate("trace", formula, program, _allocator(), notes, least=least, turns=TURNS in more)
        except TraceError as error:
            if method == "trace":
                raise TraceError(f"{type(module).__name__} cannot be traced: {error}") from error
            reason = f": {error}"
            notes = (f"planned by the formula, since the step cannot be traced{reason}",)
    formula, more = run_formula(module, batches[0], settings, **common)
    more = tuple(note.removesuffix(reason) for note in more)  # it is said once
    return Estimate("formula", formula, None, _allocator(), notes + more + samples.notes)


def estimate_validation(
    training: Estimate,
    batch_size: int,
    module: nn.Module,
    source: Any,
    validated: Any,
    settings: StepSettings,
    *,
    trainer: Any = None,
    datamodule: Any = None,
    stage: str | None = None,
    sample: Which = "first",
    sample_size: int = SAMPLE_SIZE,
    own: int | None = None,
) -> Estimate:
    """What training at a batch size takes with validation in between, at any batch size of validation.

    ``training`` is the estimate of training on ``source``, with a program; ``validated`` is what validation reads.
    Where more than sizes differs from one batch size to another (a sliding window takes more turns), the estimate is of
    validation's ``own`` batch size alone, the only one among its program's.

    Raises:
        TraceError: a step cannot be traced.
    """
    if training.program is None:
        raise TraceError("training is planned by the formula, which knows no order of events")
    (_, first), *_ = read_samples(source, sample, sample_size).batches()
    samples = read_samples(validated, sample, sample_size)
    module = prepared(module, settings, trainer=trainer, stage=stage)
    traced = partial(trace_validation, module, first, settings=settings, trainer=trainer, datamodule=datamodule)
    traces = traced(samples.batches())
    try:
        program = scale(traces)
    except TraceError:
        if own is None:
            raise
        traces = traced([(own, samples.make(own))])
        program = scale(traces)
    return Estimate(
        training.method,
        training.formula,
        interleaved(training.program, batch_size, program),
        training.settings,
        traces[0].notes + samples.notes,
    )


def estimate_test(
    module: nn.Module,
    source: Any,
    settings: StepSettings,
    *,
    trainer: Any = None,
    datamodule: Any = None,
    stage: str | None = None,
    sample: Which = "first",
    sample_size: int = SAMPLE_SIZE,
) -> Estimate:
    """What a test on ``source`` takes, at any batch size.

    Raises:
        TraceError: the step cannot be traced.
    """
    samples = read_samples(source, sample, sample_size)
    begun = prepared(module, settings, trainer=trainer, stage=stage)
    try:
        traces, formula = trace_test(begun, samples.batches(), settings, trainer=trainer, datamodule=datamodule)
    except TraceError as error:
        raise TraceError(f"a test of {type(module).__name__} cannot be traced: {error}") from error
    program, more = scaled(traces)
    notes = traces[0].notes + more + samples.notes
    return Estimate("trace", formula, program, _allocator(), notes, turns=bool(more))


def _allocator() -> AllocatorSettings:
    """How this torch's allocator works: 2.14's ``BlockComparatorSizeCounterAddress`` was ``BlockComparatorSize``, by
    address, in 2.11 (symbols of libc10_cuda.so)."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return replace(AllocatorSettings.from_environment(os.environ), by_address=version < (2, 14))


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
    sample: Which = "first",
    sample_size: int = SAMPLE_SIZE,
    effective_batch_size: int | None = None,
) -> Plan:
    """The largest batch size with which ``module`` trains on ``device``.

    >>> import torch
    >>> card, net = Device("a small card", total=2**30), torch.nn.Linear(1000, 1000)
    >>> found = plan(net, torch.zeros(4, 1000), device=card, max_batch_size=256)
    >>> found.batch_size, found.limited_by
    (256, 'max_batch_size')
    >>> found = plan(net, torch.zeros(4, 1000), device=card, max_batch_size=256, effective_batch_size=768)
    >>> found.batch_size, found.accumulate_grad_batches
    (256, 3)

    Args:
        module: as for ``estimate``, and so are ``batch``, ``method`` and what follows it.
        device: a card by name (``"RTX 3090"``) or as a ``Device``; the first one found where nothing is said, and the
            host's memory where there is none.
        margin: the part of the device's capacity that is left free, from 0 up to but not including 1.
        min_batch_size: the smallest batch size allowed.
        max_batch_size: the largest allowed; a dataset's length is a limit too, where ``batch`` is a loader.
        multiple_of: what the batch size must be a multiple of.
        effective_batch_size: samples that the optimizer is to see a step, on all of the Trainer's devices together:
            finds the largest batch size that divides them and fits, and the number of batches to accumulate.

    Raises:
        DoesNotFitError: not even the smallest batch size fits; ``needed`` and ``available`` are its bytes.
        MisconfigurationException: ``effective_batch_size``, where something else decides how much is accumulated.
    """
    check_margin(margin)
    check_method(method)
    check_sample(sample, sample_size)
    card = named_device(device) or default_device()
    parts, ranks = accumulate_grad_batches, getattr(trainer, "world_size", devices)
    module = as_lightning_module(module)
    source, how, job = resolve_step(
        module, batch, precision, optimizer, trainer, card, gradient_clip_val, parts, devices, strategy
    )
    nccl = nccl_allowance(how, card)
    sampled: dict[str, Any] = {"sample": sample, "sample_size": sample_size}
    if trainer is not None and parts == 1:
        parts = trainer.accumulate_grad_batches
    if effective_batch_size is not None:
        check_count("effective_batch_size", effective_batch_size)
        check_accumulation(effective_batch_size, module, trainer, parts, ranks)

    samples = samples_of_a_rank(dataset_size(source), ranks)
    most = min((size for size in (max_batch_size, samples) if size is not None), default=None)

    def estimated(parts: int) -> Estimate:
        accumulating = replace(how, accumulate_grad_batches=parts)
        return estimate_step(module, source, accumulating, method=method, largest=most, **sampled, **job)

    def traced(found: Estimate, size: int, parts: int) -> Estimate:
        accumulating = replace(how, accumulate_grad_batches=parts)
        return traced_at(found, size, module, source, accumulating, **sampled, **job)

    estimate_at = Estimates(estimated, traced, parts, effective_batch_size, ranks)
    return plan_estimate(
        estimate_at,
        replace(card, context=card.context + nccl),
        nccl=nccl,
        margin=margin,
        min_batch_size=min_batch_size,
        max_batch_size=max_batch_size,
        multiple_of=multiple_of,
        samples=samples,
        accumulate_grad_batches=parts,
        effective_batch_size=effective_batch_size,
        ranks=ranks,
        model=type(module).__name__,
        advised=advised_step(module, source, how, **sampled, **job),
        trace=estimate_at.trace,
    )


def nccl_allowance(settings: StepSettings, device: Device) -> int:
    """Bytes of the card that are left to NCCL, which it takes beside the allocator, where there are several ranks."""
    return 0 if settings.parallel is None or device.kind != "cuda" else settings.parallel.nccl


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
    sample: Which = "first",
    sample_size: int = SAMPLE_SIZE,
) -> tuple[Advice, ...]:
    """What would take less memory, the most saving change first.

    Each change (half precision, gradient checkpointing of repeated blocks, a fused optimizer, accumulation, expandable
    segments, ...) is made on a copy, and its whole step traced: no figure is a rule of thumb. What saves less than a
    hundredth of the peak is left out. FSDP on 2, 4 or 8 cards, the fewest that do, is advised where the batch then fits
    on each and did not, or where it saves a tenth.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.GELU(), torch.nn.Linear(256, 256))
    >>> card = Device("a small card", total=2**28)
    >>> best, *_ = advise(net, torch.zeros(4, 256), batch_size=8192, device=card)
    >>> best.change, best.saved > 0
    ("precision='bf16-true'", True)

    Args:
        module: as for ``estimate``, and so are ``batch``, ``precision`` and what follows it.
        batch_size: the one to save memory at; the largest that fits on ``device`` where nothing is said.
        device: as for ``plan``; each advice says the largest batch size that would then fit on it.
        margin: as for ``plan``.

    Raises:
        TraceError: the step cannot be traced.
    """
    check_margin(margin)
    card = named_device(device) or default_device()
    module = as_lightning_module(module)
    source, settings, job = resolve_step(
        module,
        batch,
        precision,
        optimizer,
        trainer,
        card,
        gradient_clip_val,
        accumulate_grad_batches,
        devices,
        strategy,
    )
    card = replace(card, context=card.context + nccl_allowance(settings, card))
    options: dict[str, Any] = {"sample": sample, "sample_size": sample_size}
    found = estimate_step(module, source, settings, method="trace", **options, **job)
    budget = int(card.capacity * (1 - margin))
    if batch_size is None:
        limits: dict[str, Any] = {"dataset_size": dataset_size(source)}
        batch_size = largest_on_card(lambda _: found, budget, card.capacity, **limits).batch_size
    advised = advised_step(module, source, settings, capacity=card.capacity, **options, **job)
    return advised(found, batch_size or 1, budget)


def advised_step(
    module: nn.Module,
    source: Any,
    settings: StepSettings,
    *,
    capacity: int | None = None,
    device: Device | None = None,
    trainer: Any = None,
    datamodule: Any = None,
    optimizer: MakeOptimizer | None = None,
    stage: str | None = None,
    sample: Which = "first",
    sample_size: int = SAMPLE_SIZE,
) -> Advised:
    """What advises on an estimate that ``estimate_step`` made of the same; nothing is done before it is asked.

    With the ``capacity`` of a card each advice says the largest batch size that would then fit on it.
    """

    def advised(found: Estimate, batch_size: int, budget: int) -> tuple[Advice, ...]:
        batches = read_samples(source, sample, sample_size).batches()
        job = Job(found, module, batches, settings, trainer, datamodule, optimizer, stage)
        return advise_job(job, batch_size, budget, capacity)

    return advised


def cards_for(
    module: nn.Module,
    batch: Any,
    *,
    cards: Sequence[Device] | None = None,
    margin: float = MARGIN,
    min_batch_size: int = 1,
    max_batch_size: int | None = None,
    multiple_of: int = 1,
    **settings: Any,
) -> tuple[tuple[Device, int], ...]:
    """Each card of the catalogue with the largest batch size that fits on it (0: none does), the smallest card first.

    >>> import torch
    >>> net, some = torch.nn.Linear(1000, 1000), [gpu("T4"), gpu("RTX 3090")]
    >>> [(card.name, size) for card, size in cards_for(net, torch.zeros(4, 1000), cards=some, max_batch_size=512)]
    [('T4', 512), ('RTX 3090', 512)]

    Args:
        module: as for ``estimate``, and so are ``batch`` and ``settings``.
        cards: those to look at, in place of ``gpus()``.
        margin: as for ``plan``, and so are the limits of the batch size.
    """
    check_margin(margin)
    source, _ = _source(batch, settings.get("trainer"))
    nccl = NCCL if settings.get("devices", 1) > 1 else 0
    limits: dict[str, Any] = {
        "min_batch_size": min_batch_size,
        "max_batch_size": max_batch_size,
        "multiple_of": multiple_of,
        "dataset_size": dataset_size(source),
    }

    @cache
    def estimated(capability: tuple[int, int] | None) -> Estimate:
        card = Device("a card", total=1, capability=capability)  # kernels are chosen by it, whatever the memory
        return estimate(module, batch, device=card, **settings)

    @cache
    def largest(capability: tuple[int, int] | None, capacity: int) -> int:
        found = estimated(capability)
        return largest_on_card(lambda _: found, int(capacity * (1 - margin)), capacity, **limits).batch_size

    ordered = sorted(gpus() if cards is None else cards, key=lambda card: card.capacity)
    return tuple((card, largest(card.capability, max(0, card.capacity - nccl))) for card in ordered)


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
    """The largest batch size at each length of samples, and the most tokens of a batch that fit at all of them.

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
    nccl = nccl_allowance(_ranks(**settings), card)
    card = replace(card, context=card.context + nccl)

    def row(length: int) -> Length:
        found = estimate(module, make_batch(length), method="trace", device=card, **settings)
        try:
            plan = plan_estimate(lambda _: found, card, margin=margin, max_batch_size=max_batch_size, nccl=nccl)
        except DoesNotFitError as error:
            return Length(length, 0, error.needed, "memory")
        limited_by: Literal["memory", "max_batch_size"] = "memory" if plan.limited_by == "memory" else "max_batch_size"
        return Length(length, plan.batch_size, plan.predicted_peak, limited_by)

    return Lengths(tuple(map(row, sorted(set(asked)))), card, int(card.capacity * (1 - margin)))


def _ranks(trainer: Any = None, devices: int = 1, strategy: Any = None, **_: Any) -> StepSettings:
    """Of the settings of ``estimate``, those that say how several cards train together."""
    if trainer is not None:
        return trainer_settings(trainer)
    return StepSettings(parallel=parallel_named(strategy, devices))


Advised = Callable[[Estimate, int, int], tuple[Advice, ...]]


def plan_estimate(
    estimate_at: EstimateAt,
    device: Device,
    *,
    margin: float = MARGIN,
    min_batch_size: int = 1,
    max_batch_size: int | None = None,
    multiple_of: int = 1,
    samples: int | None = None,
    accumulate_grad_batches: int = 1,
    effective_batch_size: int | None = None,
    ranks: int = 1,
    budget: int | None = None,
    failed: int | None = None,
    model: str = "the model",
    advised: Advised | None = None,
    nccl: int = 0,
    trace: Callable[[int], None] | None = None,
) -> Plan:
    """The plan that follows from the estimate at each batch size; ``budget`` stands in for what the margin leaves.

    From ``failed`` on no batch size is chosen, but the smallest allowed: an earlier run was refused memory there.
    ``advised`` is asked what would help, where nothing fits. ``trace`` is called with the batch size that is found:
    where it raises, or the estimate then says that it does not fit, a smaller one is looked for.

    Raises:
        DoesNotFitError: not even the smallest batch size fits.
        MemplanError: the step refuses all allowed batch sizes that fit.
    """
    check_margin(margin)
    budget = int(device.capacity * (1 - margin)) if budget is None else budget
    asked: list[int] = []

    def allowed(batch_size: int) -> bool:
        asked.append(batch_size)
        return failed is None or batch_size < failed or batch_size == min(asked)

    limits: dict[str, Any] = {
        "min_batch_size": min_batch_size,
        "max_batch_size": max_batch_size,
        "dataset_size": samples,
        "multiple_of": multiple_of,
    }
    share = None if effective_batch_size is None else effective_batch_size // ranks
    if share is not None and samples is not None and samples < share:
        raise ValueError(
            f"effective_batch_size={effective_batch_size} is {share} samples a step on each device, and the "
            f"dataset has {samples} for each: no step of the optimizer would see that many"
        )
    search = largest_on_card(estimate_at, budget, device.capacity, share=share, allowed=allowed, **limits)
    if not search.batch_size:
        smallest = min(asked)
        found = estimate_at(smallest)
        needed = found.peak(smallest)
        message = does_not_fit_message(
            needed=needed,
            available=budget,
            device=device,
            model=model,
            batch_size=smallest,
            phase=found.phase(smallest),
            breakdown=found.breakdown(smallest),
            suggestions=() if advised is None else advice_lines(advised(found, smallest, budget), budget),
            card=_smallest_card(needed, margin, nccl) if device.kind == "cuda" else None,
        )
        raise DoesNotFitError(message, needed=needed, available=budget)
    size, limited_by, notes = search.batch_size, search.limited_by, tuple[str, ...]()
    if trace is not None:
        within: dict[str, Any] = {"min_batch_size": min_batch_size, "multiple_of": multiple_of, "whole": share}
        size, limited_by, notes = suited(search, estimate_at, trace, budget, device.capacity, **within)
    found = estimate_at(size)
    parts = accumulate_grad_batches if effective_batch_size is None else effective_batch_size // (size * ranks)
    return Plan(
        batch_size=size,
        device=device,
        budget=budget,
        margin=margin,
        limited_by=limited_by,
        method=found.method,
        predicted_peak=found.peak(size, device.capacity),
        predicted_allocated=found.peak_allocated(size),
        formula_peak=found.formula.memory(size),
        methods=found.methods(size, device.capacity),
        phase=found.phase(size),
        breakdown=found.breakdown(size),
        accumulate_grad_batches=parts,
        notes=(*found.notes, *notes),
        effective_batch_size=effective_batch_size,
        reserved_range=found.reserved_range(size, device.capacity),
        nccl=nccl,
    )


def _smallest_card(needed: int, margin: float, nccl: int) -> Device | None:
    """The smallest of the catalogue whose memory is enough; kernels, which differ from card to card, are left out."""
    enough = (card for card in gpus() if int((card.capacity - nccl) * (1 - margin)) >= needed)
    return min(enough, key=lambda card: card.capacity, default=None)


def samples_of_a_rank(samples: int | None, ranks: int) -> int | None:
    """How many samples each of the ranks is given of a dataset, rounded up as DistributedSampler does.

    >>> samples_of_a_rank(21, 2), samples_of_a_rank(None, 2)
    (11, None)
    """
    return None if samples is None else -(-samples // ranks)


def _probed_index(device: Device | None) -> int:
    device = device or default_device()
    if device.kind != "cuda" or device.index is None:
        raise ValueError(f"a probe runs on a CUDA device of this machine, not on {device.name!r}: use method='trace'")
    return device.index


def _can_be_probed(device: Device | None, settings: StepSettings) -> bool:
    """Whether ``auto`` probes. What shards parameters does not: each rank would make a copy of all of them.

    Nor do ranks whose strategy is not known: their steps may wait for one another.
    """
    device, parallel = device or default_device(), settings.parallel
    if parallel is not None:
        alone = parallel.ranks == 1 or parallel.kind == "ddp"
    else:
        initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
        alone = not initialized or torch.distributed.get_world_size() == 1
    return device.kind == "cuda" and device.index is not None and alone and can_probe()


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


def _source(batch: Any, trainer: Any) -> tuple[Any, Any]:
    """Where samples come from, and the datamodule whose hooks a batch passes.

    A datamodule is prepared and set up on a shallow copy, so that the user's own stays as it is.
    """
    if not is_datamodule(batch):
        return batch, getattr(trainer, "datamodule", None)
    datamodule = copy.copy(batch)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule.train_dataloader(), datamodule
