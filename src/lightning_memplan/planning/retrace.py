"""Check that the step accepts the chosen batch size by tracing it at exactly that size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

from lightning_memplan.cuda.workspaces import Choice
from lightning_memplan.data.batches import sample_bytes
from lightning_memplan.data.samples import Samples
from lightning_memplan.devices.detect import cpu_device
from lightning_memplan.errors import MemplanError, TraceError, TraceReason
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.memory.events import Trace
from lightning_memplan.memory.fitting import largest_on_device
from lightning_memplan.memory.program import extended, scale
from lightning_memplan.memory.search import LimitedBy, SearchResult, SizeLimits, largest_suited
from lightning_memplan.planning.job import TrainingJob
from lightning_memplan.planning.limits import Limits
from lightning_memplan.planning.predictor import Predictor
from lightning_memplan.trace.compiled import Graphs
from lightning_memplan.trace.tracer import trace_steps
from lightning_memplan.types import Device

#: Batch sizes of traces where a step refuses few samples, or does something else with them: 32 to 128 have 2 to 32
#: equal parts, 60 to 240 have 2 to 6, 10, 12, 15, 20, 30 and 60
MANY = ((32, 64, 128), (60, 120, 240))

#: Reasons of a step that refuses a batch
_REFUSED: tuple[TraceReason, ...] = ("refused", "data_dependent")

#: Reasons for which a step that is not traced with few samples may be traced with more
MAY_TAKE_MORE: tuple[TraceReason, ...] = (*_REFUSED, "sizes_differ", "no_loss")

#: Bytes of a batch that is made to retrace a step, where nothing suggests that the step may refuse it
CHEAP = 2**28


def batches_of_many(samples: Samples, sizes: Sequence[int]) -> list[tuple[int, Any]]:
    """Return large batches, for a step that cuts its batch into parts.

    Raises:
        TraceError: the batches would take more than a quarter of the host's memory.
    """
    if sum(sizes) * _bytes_of_one(samples) > cpu_device().capacity // 4:
        raise TraceError(f"{sizes[-1]} samples take too much of the host's memory to try them", reason="too_large")
    return samples.batches(sizes)


def is_of_many(found: Estimate, samples: Samples) -> bool:
    """Return True for an estimate from traces of ``MANY`` samples."""
    sizes = () if found.traced is None or found.traced.program is None else found.traced.program.batch_sizes
    return any(sizes == tuple(size * samples.multiple for size in many) for many in MANY)


def _bytes_of_one(samples: Samples) -> int:
    size, batch = samples.batches((1,))[0]
    return samples.multiple * sample_bytes(batch, size)


def retrace_at(found: Estimate, batch_size: int, job: TrainingJob) -> Estimate:
    """Return the estimate of a job, with the program of its step at exactly ``batch_size`` where that differs.

    The estimate stays as it is where no trace is part of it, where a batch takes too much of the host's memory, and
    where the step loops over its samples.

    Raises:
        TraceError: the step refuses a batch of that size; says by which error, and at which line.
    """
    traced = found.traced
    if traced is None or traced.program is None or traced.loops or batch_size in traced.program.batch_sizes:
        return found
    samples = job.source.samples
    many = is_of_many(found, samples)
    if batch_size * _bytes_of_one(samples) > (cpu_device().capacity // 4 if many else CHEAP):
        unseen = f"{batch_size} samples take too much of the host's memory to see whether the step refuses them"
        return _noted(found, unseen) if many else found
    try:
        batches, graphs = [(batch_size, samples.batch(batch_size))], Graphs()
    except TraceError as error:  # too many to collate
        return _noted(found, f"the step was not traced at the batch size that is planned: {error}")
    again = partial(trace_steps, job.setup, batches, graphs=graphs, beginning=job.beginning())
    before = [program for program in (traced.program, traced.least) if program is not None]
    after = []
    try:
        for program in before:
            (begun,) = again(steps=1).traces
            whole = extended(Trace(program.batch_sizes[0], program.events), begun)
            after.append(scale([whole or again().traces[0]]))
            graphs.lower_bound = True
    except TraceError as error:
        if error.reason in _REFUSED:
            raise
        return _noted(found, f"what the step does with {batch_size} samples could not be traced: {error}")
    ends = [[program.at(batch_size, choice) for choice in get_args(Choice)] for program in (*before, *after)]
    if ends[: len(before)] == ends[len(before) :] or found is not traced:
        return found
    own = replace(found, program=after[0], least=after[1] if traced.least else None)
    return replace(found, exact={**found.exact, batch_size: own})


def _noted(found: Estimate, text: str) -> Estimate:
    return replace(found, notes=tuple(dict.fromkeys((*found.notes, text))))


def accepted_size(
    search: SearchResult, predictor: Predictor, device: Device, limits: Limits
) -> tuple[int, LimitedBy, tuple[str, ...]]:
    """Return the batch size that was found, or the largest below it that the step accepts and that fits when retraced.

    Beside it stand what limits it, and the notes that explain it.

    Raises:
        MemplanError: the step accepts no allowed batch size; says why it refuses the one that was found.
    """
    budget = limits.budget_of(device)

    def accepts(batch_size: int) -> bool:
        """Check that the step accepts a batch size and fits; keep the text of its refusal."""
        try:
            predictor.retrace(batch_size)
        except TraceError as error:
            refusals[batch_size] = str(error)
            return False
        exactly = SizeLimits(min_batch_size=batch_size, max_batch_size=batch_size)
        found = largest_on_device(predictor.estimate_at, budget, device.capacity, exactly)
        return bool(found.batch_size)

    size, limited_by = search.batch_size, search.limited_by
    refusals: dict[int, str] = {}
    if accepts(size):
        return size, limited_by, (_EXACT,) if size in predictor.estimate_at(size).exact else ()
    traced = predictor.estimate_at(size).traced
    smaller = largest_suited(
        accepts,
        size,
        min_batch_size=limits.min_batch_size,
        multiple_of=limits.multiple_of,
        like=1 if traced is None or traced.program is None else min(traced.program.batch_sizes),
        whole=limits.share,
    )
    what = f"{size} samples were expected to fit, and {_TOO_LARGE}"
    if size in refusals:
        limited_by, what = "step", f"{size} samples fit, and the step refuses them ({refusals[size]})"
    if not smaller:
        raise MemplanError(f"{what}; no smaller batch size that is allowed was found to suit it")
    return smaller, limited_by, (f"{what}: {smaller} is the largest of those tried that suits it",)


_TOO_LARGE = "a trace of so many takes more memory than those of others let expect"
_EXACT = (
    "the step does something else at the batch size that is planned: it is traced at that very size, and more may fit"
)
