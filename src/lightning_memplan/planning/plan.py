"""Search the largest batch size under a budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_memplan.checks import check_margin
from lightning_memplan.data.samples import SAMPLE_SIZE, Which, read_samples
from lightning_memplan.devices.catalogue import gpus
from lightning_memplan.errors import DoesNotFitError
from lightning_memplan.memory.estimate import Estimate, largest_on_card
from lightning_memplan.planning.advice import advise_job
from lightning_memplan.planning.job import Job
from lightning_memplan.planning.retrace import EstimateAt, retrace
from lightning_memplan.report.plans import advice_lines, does_not_fit_message
from lightning_memplan.settings import StepSettings
from lightning_memplan.step.setup import MakeOptimizer
from lightning_memplan.types import Advice, Device, Plan

#: The part of what the card can give that a plan leaves free by default: for cuDNN's workspaces, which no one knows
#: before they are asked for, and for what the driver rounds up.
MARGIN = 0.05


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
        size, limited_by, notes = retrace(search, estimate_at, trace, budget, device.capacity, **within)
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
