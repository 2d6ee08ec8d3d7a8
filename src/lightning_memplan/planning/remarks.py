"""Say what a batch size makes of a training, beside its memory."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

from lightning_memplan.data.loaders import batches_of_epoch
from lightning_memplan.planning.apply import batches_taken, ranks_of
from lightning_memplan.types import Device, Plan
from lightning_memplan.units import format_bytes

#: Optimizer steps of an epoch below which a larger batch size is advised against
FEW_STEPS = 20

#: How many times the user's batch size may be taken without advice
MANY_TIMES = 8


def few_steps(trainer: Any, source: Any, batch_size: int, own: int) -> str:
    """Return one line of advice where a batch size leaves few optimizer steps, or is far from the user's ``own``.

    Return "" where it does not: with ``FEW_STEPS`` steps an epoch or more, and at most ``MANY_TIMES`` the user's size.
    """

    def steps(size: int) -> int | None:
        count = batches_of_epoch(source, size, ranks_of(trainer))
        return None if count is None else -(-batches_taken(trainer, count) // trainer.accumulate_grad_batches)

    before, after = steps(own), steps(batch_size)
    few = after is not None and before is not None and after < min(FEW_STEPS, before)
    many = batch_size > MANY_TIMES * own
    if not (few or many):
        return ""
    told = [f"is {batch_size / own:.3g} times yours ({own})"] if many else []
    if few:
        told.append(f"leaves {after} optimizer {'step' if after == 1 else 'steps'} an epoch in place of {before}")
    within = range(own, max(own, min(batch_size - 1, MANY_TIMES * own)) + 1)
    enough = bisect_left(within, x=True, key=lambda size: (steps(size) or FEW_STEPS) < FEW_STEPS)  # larger: fewer steps
    largest = within[max(0, enough - 1)]
    whole = own * trainer.accumulate_grad_batches * trainer.world_size
    return (
        f"batch size {batch_size} {', and '.join(told)}. To stay closer to your training pass "
        f"max_batch_size={largest}, or effective_batch_size={whole} to keep its optimizer steps; else raise the "
        "learning rate"
    )


def smaller_gpu(plan: Plan, here: Device) -> list[str]:
    """Return a warning where a batch size was planned for a GPU with more memory than the one that trains.

    >>> card = Device("RTX 3090", total=24 * 2**30)
    >>> plan = Plan(batch_size=64, device=card, budget=23 * 2**30, margin=0.05, limited_by="memory", method="trace",
    ...             peak_reserved=22 * 2**30, peak_allocated=20 * 2**30, formula_peak=2**30)
    >>> print(*smaller_gpu(plan, Device("Tesla T4", total=15 * 2**30)))
    batch size 64 is planned for RTX 3090 (24.00 GiB), and set here on Tesla T4 (15.00 GiB): it reserves 22.00 GiB ...
    >>> smaller_gpu(plan, card)
    []
    """
    if here.total >= plan.device.total:
        return []
    then = "may run out of memory" if plan.peak_reserved > here.capacity else "fits"
    text = (
        f"batch size {plan.batch_size} is planned for {plan.device.name} ({format_bytes(plan.device.total)}), and set "
        f"here on {here.name} ({format_bytes(here.total)}): it reserves {format_bytes(plan.peak_reserved)} and {then}. "
        "Leave device out to plan for the GPU that trains"
    )
    return [text]
