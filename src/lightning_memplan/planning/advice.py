"""Find changes that save memory: each is made on a copy, and its whole step is traced."""

from __future__ import annotations

from dataclasses import replace

from lightning_memplan.errors import TraceError
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.planning.changes import DoesNotApplyError, TracedJob, changes, largest, sharding_changes
from lightning_memplan.planning.job import TrainingJob
from lightning_memplan.types import Advice

#: Fraction of the peak that a change must save to be advised
WORTH = 0.01


def advise_job(
    job: TrainingJob, estimate: Estimate, batch_size: int, budget: int, capacity: int | None = None
) -> tuple[Advice, ...]:
    """Return the changes that save at least a hundredth of the peak at ``batch_size``, the most saving change first.

    Changes of the samples come last. Without a trace in the ``estimate`` there is no advice. With the ``capacity`` of
    the GPU (bytes), of which a plan uses the ``budget``, each advice has the largest batch size that would then fit.
    """
    if estimate.method != "trace":
        return ()
    traced = TracedJob(replace(job, method="trace"), estimate, job.source.samples.batches())
    before = estimate.peak(batch_size)
    advice = []
    for change in (*changes(traced, batch_size), *sharding_changes(traced, batch_size, budget)):
        try:
            after = change.make()
        except (TraceError, DoesNotApplyError):
            continue
        size = batch_size // change.parts
        saved = before - after.peak(size)
        if saved < WORTH * before:
            continue
        advice.append((saved, change, size, after))
    advice.sort(key=lambda item: (item[1].kind == "samples", -item[0]))
    return tuple(
        Advice(
            kind=change.kind,
            change=change.text,
            cost=change.cost,
            batch_size=size,
            saved=saved,
            peak_reserved=after.peak(size),
            peak_allocated=after.peak_allocated(size),
            largest_batch_size=None
            if capacity is None
            else largest(after, budget - change.nccl, capacity - change.nccl),
            nccl=change.nccl,
        )
        for saved, change, size, after in advice
    )
