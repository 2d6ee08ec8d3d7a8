"""Find changes that save memory: each is made on a copy, and its whole step is traced."""

from __future__ import annotations

from lightning_memplan.errors import TraceError
from lightning_memplan.planning.changes import DoesNotApplyError, changes, largest, sharding_changes
from lightning_memplan.planning.job import Job
from lightning_memplan.types import Advice

WORTH = 0.01  #: of the peak: what saves less is no advice


def advise_job(job: Job, batch_size: int, budget: int, capacity: int | None = None) -> tuple[Advice, ...]:
    """What saves at least a hundredth of the peak at ``batch_size``; nothing where there is no trace.

    The best first, and last what changes the samples. With the ``capacity`` of the card (bytes), of which a plan uses
    the ``budget``, each says the largest batch size that would then fit.
    """
    if job.found.method != "trace":
        return ()
    before = job.found.peak(batch_size)
    advice = []
    for change in (*changes(job, batch_size), *sharding_changes(job, batch_size, budget)):
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
