"""Search the largest batch size under a budget, and make a plan of it."""

from __future__ import annotations

from lightning_memplan.devices.catalogue import gpus
from lightning_memplan.errors import DoesNotFitError, UnmetDemandError
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.memory.fitting import largest_on_device
from lightning_memplan.memory.growth import rise
from lightning_memplan.memory.search import SearchResult, SizeLimits
from lightning_memplan.planning.limits import Limits
from lightning_memplan.planning.predictor import OneEstimate, Predictor
from lightning_memplan.planning.retrace import accepted_size
from lightning_memplan.report.plans import advice_lines, does_not_fit_message
from lightning_memplan.types import Device, Plan
from lightning_memplan.units import MiB, format_bytes

#: Bytes a batch from which on a rise is said: a metric's scalars are less
LEAST_RISE = MiB // 16

#: Batches from which on a rise is left to be measured
MANY_BATCHES = 10_000


def make_plan(
    predictor: Predictor,
    device: Device,
    limits: Limits,
    *,
    nccl: int = 0,
    accumulate_grad_batches: int = 1,
    retrace: bool = True,
) -> Plan:
    """Return the plan with the largest batch size that fits on ``device`` within ``limits``.

    With ``retrace`` the step is traced at exactly the size that is found; where it refuses that, a smaller one is
    looked for.

    Raises:
        DoesNotFitError: not even the smallest batch size fits.
        MemplanError: the step refuses all allowed batch sizes that fit.
        ValueError: the limits leave no batch size.
    """
    budget, only = limits.budget_of(device), predictor.estimate_at(limits.share or limits.smallest).only_at
    if only is not None:
        limits = _only(limits, only)
    search, smallest = _search(predictor, device, limits)
    if not search.batch_size:
        raise _does_not_fit(predictor, device, limits, smallest, nccl)
    size, limited_by, notes = search.batch_size, search.limited_by, tuple[str, ...]()
    if only is not None:
        limited_by = "step"
    elif retrace:
        size, limited_by, notes = accepted_size(search, predictor, device, limits)
    found, ranks, whole = predictor.estimate_at(size), limits.ranks, limits.effective_batch_size
    return Plan(
        batch_size=size,
        device=device,
        budget=budget,
        margin=limits.margin,
        limited_by=limited_by,
        method=found.method,
        peak_reserved=found.peak(size, device.capacity),
        peak_allocated=found.peak_allocated(size),
        formula_peak=found.formula.memory(size),
        methods=found.methods(size, device.capacity),
        phase=found.phase(size),
        breakdown=found.breakdown(size),
        accumulate_grad_batches=accumulate_grad_batches if whole is None else whole // (size * ranks),
        notes=(*found.notes, *notes, *growth_notes(found, size, device.capacity)),
        effective_batch_size=whole,
        needed=needed_bytes(found, size, budget, device.capacity),
        reserved_range=found.reserved_range(size, device.capacity),
        nccl=nccl,
    )


def growth_notes(estimate: Estimate, batch_size: int, capacity: int) -> tuple[str, ...]:
    """Say by how much memory rises in each batch, if it does, and for how many batches it fits."""
    rate = 0 if estimate.program is None else rise(estimate.program, batch_size)
    if rate < LEAST_RISE:
        return ()
    fit = max(0, capacity - estimate.peak(batch_size, capacity)) // rate
    if fit > MANY_BATCHES:
        return ()
    text = (
        f"memory rises by {format_bytes(rate)} a batch: batch size {batch_size} fits for about {fit} batches. "
        "Something keeps tensors from step to step, such as a list of losses that were not detached"
    )
    return (text,)


def needed_bytes(estimate: Estimate, batch_size: int, budget: int, capacity: int) -> int:
    """Return the peak bytes that an allocator reserves which has no more than the budget: it keeps less in its cache.

    ``estimate`` fits in the budget; where it does not, return what it reserves in ``capacity``.
    """
    peak = estimate.peak(batch_size, capacity)
    return estimate.peak(batch_size, budget) if peak > budget and estimate.fits(batch_size, budget) else peak


def _only(limits: Limits, batch_size: int) -> Limits:
    """Return limits that allow the one batch size that a step takes.

    Raises:
        ValueError: the limits do not allow it.
    """
    least, most = limits.min_batch_size, limits.max_batch_size
    if not least <= batch_size <= (most or batch_size) or batch_size % limits.multiple_of:
        raise ValueError(
            f"the step takes batch size {batch_size} alone, which min_batch_size={limits.min_batch_size}, "
            f"max_batch_size={most}, multiple_of={limits.multiple_of} do not allow"
        )
    return limits.exactly(batch_size)


def largest_batch_size(estimate: Estimate, device: Device, limits: Limits) -> int:
    """Return the largest batch size at which an estimate fits; 0 where the smallest does not."""
    return _search(OneEstimate(estimate), device, limits)[0].batch_size


def _search(predictor: Predictor, device: Device, limits: Limits) -> tuple[SearchResult, int]:
    """Return what was found, and the smallest batch size that was asked for."""
    share, samples = limits.share, limits.samples
    if share is not None and samples is not None and samples < share:
        raise UnmetDemandError(
            f"effective_batch_size={limits.effective_batch_size} is {share} samples a step on each device, and the "
            f"dataset has {samples} for each: no step of the optimizer would see that many"
        )
    asked: list[int] = []

    def allowed(batch_size: int) -> bool:
        asked.append(batch_size)
        return limits.failed is None or batch_size < limits.failed or batch_size == limits.smallest

    sizes = SizeLimits(limits.min_batch_size, limits.max_batch_size, samples, limits.multiple_of)
    budget, capacity = limits.budget_of(device), device.capacity
    try:
        found = largest_on_device(predictor.estimate_at, budget, capacity, sizes, share=share, allowed=allowed)
    except ValueError as error:
        if limits.effective_batch_size is not None or limits.min_batch_size > 1:
            raise UnmetDemandError(str(error)) from error
        raise
    return found, min(asked)


def _does_not_fit(predictor: Predictor, device: Device, limits: Limits, batch_size: int, nccl: int) -> DoesNotFitError:
    budget, found = limits.budget_of(device), predictor.estimate_at(batch_size)
    row = found.row(batch_size)
    message = does_not_fit_message(
        row,
        budget,
        device,
        model=predictor.name,
        suggestions=advice_lines(predictor.advise(found, batch_size, budget), budget),
        card=_smallest_gpu(row.peak_reserved, limits.margin, nccl) if device.kind == "cuda" else None,
    )
    return DoesNotFitError(message, needed=row.peak_reserved, available=budget)


def _smallest_gpu(needed: int, margin: float, nccl: int) -> Device | None:
    """Return the smallest GPU of the catalogue that has enough memory, whichever kernels it would choose."""
    enough = (gpu for gpu in gpus() if int((gpu.capacity - nccl) * (1 - margin)) >= needed)
    return min(enough, key=lambda gpu: gpu.capacity, default=None)
