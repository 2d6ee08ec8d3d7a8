"""Predict a job's memory by trace, probe or formula."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_memplan.checks import Method
from lightning_memplan.data.samples import SAMPLE_SIZE, Samples, Which, read_samples
from lightning_memplan.errors import TraceError, explain
from lightning_memplan.memory.allocator_settings import AllocatorSettings
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.memory.loops import TURNS, scaled
from lightning_memplan.memory.program import interleaved, scale
from lightning_memplan.memory.search import largest_fitting
from lightning_memplan.planning.job import default_device
from lightning_memplan.planning.retrace import MANY, OF_FEW, is_of_many, of_many
from lightning_memplan.probe.probe import SIZES, can_probe, probe_steps
from lightning_memplan.settings import StepSettings
from lightning_memplan.step.compiled_regions import COMPILED_SIZES, compiled_parts
from lightning_memplan.step.setup import MakeOptimizer, TrainingSetup
from lightning_memplan.trace.compiled import FUSED, Graphs
from lightning_memplan.trace.tracer import (
    prepared,
    run_formula,
    trace_counted,
    trace_steps,
    trace_test,
    trace_validation,
)
from lightning_memplan.types import Device

#: What a step raises where something is not there yet: a copy's trainer has no loops and no logger, and the hooks and
#: callbacks that come before the first batch have not run. It need not be an error of training's.
_OF_A_COPY = (AttributeError, TypeError, KeyError)


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
            setup = TrainingSetup(module, settings, trainer, datamodule, optimizer, stage)
            traces, formula = probe_steps(setup, samples.for_the_card, index, capacity=capacity, largest=largest)
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
