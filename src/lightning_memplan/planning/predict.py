"""Predict a job's memory by trace, probe or formula."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_memplan.data.batches import batch_size_of
from lightning_memplan.data.samples import Samples
from lightning_memplan.errors import REFUSALS, TraceError, explain, located
from lightning_memplan.memory.allocator_settings import AllocatorSettings
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.memory.fitting import start_near
from lightning_memplan.memory.loops import scale_with_loops
from lightning_memplan.memory.program import Program, interleaved, scale
from lightning_memplan.memory.search import SizeLimits, largest_fitting
from lightning_memplan.planning.job import DataSource, TrainingJob
from lightning_memplan.planning.retrace import MANY, MAY_TAKE_MORE, batches_of_many, is_of_many
from lightning_memplan.probe.out_of_memory import gpu_failed
from lightning_memplan.probe.probe import SIZES, probe_steps
from lightning_memplan.step.compiled_regions import COMPILED_SIZES, compiled_parts
from lightning_memplan.trace.compiled import Graphs
from lightning_memplan.trace.tracer import run_formula, trace_counted, trace_steps, trace_test, trace_validation
from lightning_memplan.types import Device

#: Errors of a step on a replica where something is not there yet: its trainer has no loops and no logger, and the hooks
#: and callbacks that come before the first batch have not run. Training itself need not raise them.
_OF_A_REPLICA = (AttributeError, TypeError, KeyError)


def predict(job: TrainingJob, largest: int | None = None) -> Estimate:
    """Return the estimate of a job's step. No batch of more than ``largest`` samples is probed.

    ``"auto"`` falls from one way to the next where it fails: probe, trace, a trace of the user's own batch alone, the
    formula. The estimate's notes say why.

    Raises:
        TraceError: the step cannot be traced or probed, by the method that was asked for, or by none.
    """
    probed, why_not, refused = None, "", None
    if job.is_probed:
        try:
            probed = _probed(job, largest)
        except (TraceError, *_OF_A_REPLICA) as error:
            if job.method == "probe":
                raise
            why_not = str(error) if isinstance(error, TraceError) else explain(error, "a probe")
        except REFUSALS as error:
            if job.method == "probe" or gpu_failed(error):
                raise
            refused, why_not = error, explain(error, "a probe")
    if probed is not None and job.method == "probe":
        return probed
    try:
        traced = _traced(job)
    except Exception as error:
        if probed is None and why_not and isinstance(error, TraceError):
            raise TraceError(f"{error}; not probed: {why_not}", reason=error.reason) from error
        if probed is None or job.method != "auto":
            raise
        return replace(probed, notes=(*probed.notes, f"not traced: {located(error)}"))
    suits = traced.only_at is not None or is_of_many(traced, job.source.samples)
    if refused is not None and not suits:  # the step is wrong, whatever the batch size
        raise refused
    if probed is None:
        notes = (f"not planned by a probe: {why_not}",) if why_not else ()
        return replace(traced, notes=notes + traced.notes)
    if traced.method != "trace" or traced.only_at is not None:
        return probed
    first, second = probed, traced
    if probed.largest_seen <= max(SIZES[0]):  # only the trace knows which kernels a large batch gets
        first, second = _tightest_first((probed, traced), job.device)
    return replace(first, alternatives=(second,), notes=tuple(dict.fromkeys(probed.notes + traced.notes)))


def _probed(job: TrainingJob, largest: int | None) -> Estimate:
    if job.device.kind != "cuda" or job.device.index is None:
        raise ValueError(
            f"a probe runs on a CUDA device of this machine, not on {job.device.name!r}: use method='trace'"
        )
    samples, setup = job.source.samples, job.setup
    if job.replicas.why_not_real:
        raise TraceError(job.replicas.why_not_real, reason="failed")
    traces, formula = probe_steps(
        setup,
        samples.for_the_card,
        job.device.index,
        capacity=job.device.capacity,
        largest=largest,
        begun=job.begun_replica(),
    )
    program, more = scale_with_loops(traces)
    notes = traces[0].notes + more + samples.notes
    return Estimate("probe", formula, program, _allocator(), notes, loops=bool(more))


def _tightest_first(found: Sequence[Estimate], device: Device) -> list[Estimate]:
    """Sort estimates of the same step: the one with which the fewest samples fit on the GPU comes first.

    A probe of a few samples does not see the kernels that are chosen for many, nor a trace the workspaces of cuDNN.
    Training stops where an estimate is too small.
    """

    def largest(estimate: Estimate) -> int:
        near = start_near(estimate, device.capacity)
        fits = partial(estimate.fits, capacity=device.capacity)
        return largest_fitting(fits, SizeLimits(max_batch_size=2**30), near).batch_size

    return sorted(found, key=largest)


def _traced(job: TrainingJob) -> Estimate:
    """Return the estimate by trace, or by the formula: where the method says so, or ``auto`` cannot trace the step."""
    notes: tuple[str, ...] = ()
    known = ""
    if job.method != "formula":
        try:
            return _by_trace(job)
        except TraceError as error:
            if job.method == "trace":
                text = f"{job.name} cannot be traced: {error}"
                raise TraceError(text, reason=error.reason) from error
            known = str(error)
            if (own := _by_own_batch(job, known)) is not None:
                return own
            notes = (f"planned by the formula, since the step cannot be traced: {known}",)
    samples = job.source.samples
    try:
        beginning = job.beginning()
    except TraceError:  # its layers can be counted all the same
        beginning = None
    counted = run_formula(job.setup, _batches(samples, job.begun())[0], beginning)
    return Estimate("formula", counted.formula, None, _allocator(), notes + counted.notes(known) + samples.notes)


def _by_own_batch(job: TrainingJob, known: str) -> Estimate | None:
    """Return the estimate of a step that takes no other batch size than the user's own, None if it refuses that too.

    It holds at this size alone.
    """
    try:
        samples, size = job.source.samples, job.source.own_size or batch_size_of(job.source.data)
        result = trace_counted(job.setup, [(size, samples.make(size))], beginning=job.beginning())
        program = scale(result.traces)
    except Exception:  # noqa: BLE001 - the batch and the step are the user's; why the step is not traced is known
        return None
    note = f"the step takes its own batch size {size} alone ({known}): it stays"
    return Estimate("trace", result.formula, program, _allocator(), (note, *result.notes, *samples.notes), only_at=size)


def _batches(samples: Samples, module: nn.Module) -> list[tuple[int, Any]]:
    return samples.batches(COMPILED_SIZES) if compiled_parts(module) else samples.batches()


def _by_trace(job: TrainingJob) -> Estimate:
    samples, graphs, setup, beginning = job.source.samples, Graphs(), job.setup, job.beginning()
    batches = _batches(samples, setup.module)
    counted = partial(trace_counted, setup, graphs=graphs, beginning=beginning)
    more: tuple[str, ...] = ()
    try:
        result = counted(batches)
        program, looped = scale_with_loops(result.traces)
    except TraceError as unlike:
        if unlike.reason not in MAY_TAKE_MORE:
            raise
        for sizes in MANY:
            with suppress(TraceError):
                batches = batches_of_many(samples, sizes)
                result = counted(batches)
                program, looped = scale_with_loops(result.traces)
                break
        else:
            raise
        more = (f"the step does something else with few samples: planned from {sizes[0]} and more",)
    least = None
    if result.fused:
        graphs.lower_bound = True
        lower = trace_steps(setup, batches, graphs=graphs, beginning=beginning)
        least, _ = scale_with_loops(lower.traces)
    notes = result.notes + looped + more + samples.notes
    return Estimate("trace", result.formula, program, _allocator(), notes, least=least, loops=bool(looped))


@dataclass(frozen=True)
class Validation:
    """A step of validation, at any batch size, as it runs between steps of training."""

    program: Program
    notes: tuple[str, ...] = ()

    def beside(self, training: Estimate, batch_size: int) -> Estimate:
        """Return what training at ``batch_size`` needs with validation in between, at any batch size of validation.

        Raises:
            TraceError: ``training`` is an estimate by the formula, which knows no order of events.
        """
        if training.program is None:
            raise TraceError("training is planned by the formula, which knows no order of events")
        return Estimate(
            training.method,
            training.formula,
            interleaved(training.program, batch_size, self.program),
            training.settings,
            self.notes,
        )


def trace_of_validation(job: TrainingJob, validation: DataSource) -> Validation:
    """Trace validation after a step of training; ``validation`` has its batches.

    Where more than sizes differs from one batch size to another (a sliding window has more positions), the program is
    of validation's own batch size alone, the only one among its ``batch_sizes``.

    Raises:
        TraceError: a step cannot be traced.
    """
    (_, first), *_ = job.source.samples.batches()
    samples, own = validation.samples, validation.batch_size
    traced = partial(trace_validation, job.setup, first, beginning=job.beginning())
    result = traced(samples.batches())
    try:
        program = scale(result.traces)
    except TraceError:
        if own is None:
            raise
        result = traced([(own, samples.batch(own))])
        program = scale(result.traces)
    return Validation(program, result.notes + samples.notes)


def predict_test(job: TrainingJob) -> Estimate:
    """Return what a test needs at any batch size; ``job.source`` has its batches.

    Raises:
        TraceError: the step cannot be traced.
    """
    samples = job.source.samples
    try:
        result = trace_test(job.setup, samples.batches())
    except TraceError as error:
        raise TraceError(f"a test of {job.name} cannot be traced: {error}", reason=error.reason) from error
    program, more = scale_with_loops(result.traces)
    notes = result.notes + more + samples.notes
    return Estimate("trace", result.formula, program, _allocator(), notes, loops=bool(more))


def _allocator() -> AllocatorSettings:
    """Return the settings of this torch's allocator.

    Blocks of one size are ordered by address before torch 2.14: ``BlockComparatorSizeCounterAddress`` of 2.14 was
    ``BlockComparatorSize`` in 2.11 (symbols of libc10_cuda.so).
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return replace(AllocatorSettings.from_environment(os.environ), by_address=version < (2, 14))
