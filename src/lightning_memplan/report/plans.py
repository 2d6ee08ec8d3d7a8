"""Plans, estimates, devices and advice as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning_memplan.report.text import (
    WIDTH,
    breakdown_rows,
    draw_bar,
    format_row,
    largest_parts,
    percent,
    shorten_end,
    table,
    wrap,
)
from lightning_memplan.types import Advice, Device, EstimateRow, Plan
from lightning_memplan.units import format_bytes

#: What kept the batch size from being larger, by ``Plan.limited_by``
LIMITS = {
    "memory": "limited by memory",
    "max_batch_size": "limited by max_batch_size",
    "dataset": "limited by the dataset",
    "effective_batch_size": "all of the effective batch size",
    "step": "limited by the step itself",
    "validation": "limited by memory in validation",
    "checkpoint": "kept from the checkpoint",
}

_METHODS = {
    "probe": "real steps on the GPU",
    "trace": "a step on fake tensors",
    "formula": "params + grads + bs x (I1 + 2 x sum Ii)",
}


# --- the plan
def plan_table(plan: Plan, rows: Iterable[tuple[str, str]] = ()) -> str:
    """Return a plan as a short table; ``rows`` adds lines of a label and a text.

    >>> card = Device("NVIDIA GeForce RTX 3090", total=25446711296, context=480 * 2**20)
    >>> plan = Plan(batch_size=24, device=card, budget=23 * 2**30, margin=0.02, limited_by="memory", method="trace",
    ...             peak_reserved=22 * 2**30, peak_allocated=20 * 2**30, formula_peak=30 * 2**30,
    ...             phase="backward", breakdown={"activations": 15 * 2**30, "gradients": 5 * 2**30},
    ...             methods={"trace": 22 * 2**30, "formula": 30 * 2**30})
    >>> print(plan_table(plan))
    memory plan for NVIDIA GeForce RTX 3090
      GPU              23.70 GiB   23.23 GiB for training
      batch size              24   limited by memory
      needed           22.00 GiB   of a budget of 23.00 GiB, margin 2.0 %
      peak reserved    22.00 GiB    93 % of the GPU  [###################.]
      peak allocated   20.00 GiB    84 % of the GPU, in the backward phase
        activations    15.00 GiB    75 %  ###############
        gradients       5.00 GiB    25 %  #####
      trace            22.00 GiB   a step on fake tensors
      formula          30.00 GiB   params + grads + bs x (I1 + 2 x sum Ii)
    """
    total, where = plan.device.total, _gpu_or_machine(plan.device)
    room = f"{format_bytes(plan.device.capacity)} for training"
    lines = [shorten_end(f"memory plan for {plan.device.name}", WIDTH), format_row(where, format_bytes(total), room)]
    if plan.nccl:
        lines.append(format_row("  NCCL", format_bytes(plan.nccl), "left to it beside the allocator: an allowance"))
    lines += _batch_size_rows(plan)
    bar = draw_bar(plan.peak_reserved, total, fill=".")
    reserved = f"{percent(plan.peak_reserved, total)} of the {where}  [{bar}]"
    needed = plan.needed or plan.peak_reserved
    budget = f"of a budget of {format_bytes(plan.budget)}, margin {100 * plan.margin:.1f} %"
    lines.append(format_row("needed", format_bytes(needed), budget))
    lines.append(format_row("peak reserved", format_bytes(plan.peak_reserved), reserved))
    if plan.peak_reserved > needed:
        kept = format_bytes(plan.peak_reserved - needed)
        lines.append(format_row("  of it cache", kept, "kept as long as there is room for it"))
    lines += _reserved_rows(plan)
    phase = f", in the {plan.phase} phase" if plan.phase else ""
    allocated = f"{percent(plan.peak_allocated, total)} of the {where}{phase}"
    lines.append(format_row("peak allocated", format_bytes(plan.peak_allocated), allocated))
    lines += breakdown_rows(plan.breakdown)
    for method, peak in (plan.methods or {"formula": plan.formula_peak}).items():
        lines.append(format_row(method, format_bytes(peak), _METHODS[method]))
    for label, text in rows:
        lines += wrap(text, f"  {label:<17}")
    for note in plan.notes:
        lines += wrap(note, "  note: ")
    return "\n".join(lines)


def _batch_size_rows(plan: Plan) -> list[str]:
    """Return the batch size with its limit, and how the effective batch size comes together if one was asked for."""
    parts, whole = plan.accumulate_grad_batches, plan.effective_batch_size
    limit = LIMITS[plan.limited_by]
    if whole is None:
        accumulated = f"; {parts} batches a step" if parts > 1 else ""
        return [format_row("batch size", str(plan.batch_size), limit + accumulated)]
    devices = whole // (plan.batch_size * parts)
    each = f" on each of {devices} devices" if devices > 1 else ""
    text = f"{parts} {'batches' if parts > 1 else 'batch'} of {plan.batch_size}{each}"
    return [
        format_row("batch size", str(plan.batch_size), limit),
        format_row("samples a step", str(whole), text),
    ]


def _reserved_rows(plan: Plan) -> list[str]:
    """Return the range of the reserved peak where only a range is known, and what real steps reserved."""
    lines, bounds = [], plan.reserved_range
    if bounds is not None and bounds.high > plan.peak_reserved:
        text = f"expected of its workspaces, {format_bytes(bounds.high)} at most"
        lines.append(format_row("  with cuDNN", format_bytes(bounds.expected), text))
    if bounds is not None and bounds.low < plan.peak_reserved:
        text = "reserved in any case; planned for the most that there may be"
        lines.append(format_row("  at least", format_bytes(bounds.low), text))
    if plan.confirmed is not None:
        text = "reserved by real steps of this batch size"
        lines.append(format_row("  confirmed", format_bytes(plan.confirmed), text))
    return lines


def plan_texts(plan: Plan, lesson: str, val_plan: Plan | None, val_size: int) -> list[str]:
    """Return all that is printed of a plan: its table with what earlier runs teach, and validation's batch size if any.

    >>> card = Device("my card", total=2**35)
    >>> plan = Plan(batch_size=8, device=card, budget=2**34, margin=0.5, limited_by="memory", method="trace",
    ...             peak_reserved=2**32, peak_allocated=2**31, formula_peak=2**31)
    >>> plan_texts(plan, "", None, 4)[1]
    "MemoryPlanner: validation's batch size is 4"
    """
    table = plan_table(plan, [("earlier runs", lesson)] if lesson else ())
    return [table, validation_text(val_size, plan, val_plan)] if val_size else [table]


def validation_text(batch_size: int, training: Plan, both: Plan | None) -> str:
    """Return validation's batch size, and which of the two has the peak; ``both`` plans a validation within training.

    >>> from dataclasses import replace
    >>> card = Device("my card", total=2**35)
    >>> plan = Plan(batch_size=8, device=card, budget=2**34, margin=0.5, limited_by="memory", method="trace",
    ...             peak_reserved=2**32, peak_allocated=2**31, formula_peak=2**31)
    >>> both = replace(plan, batch_size=4, peak_allocated=3 * 2**31, peak_reserved=2**33)
    >>> validation_text(4, plan, both)
    "MemoryPlanner: validation's batch size is 4; peak of both, in validation: 6.00 GiB allocated, 8.00 GiB reserved"
    """
    text = f"MemoryPlanner: validation's batch size is {batch_size}"
    if both is None or both.batch_size != batch_size:
        return text
    which = "validation" if both.peak_allocated > training.peak_allocated else "training"
    allocated, reserved = format_bytes(both.peak_allocated), format_bytes(both.peak_reserved)
    return f"{text}; peak of both, in {which}: {allocated} allocated, {reserved} reserved"


def does_not_fit_message(
    row: EstimateRow,
    available: int,
    device: Device,
    *,
    model: str = "the model",
    suggestions: Sequence[str] = (),
    card: Device | None = None,
) -> str:
    """Say how much a batch size needs and the device has, which parts are largest, and which changes would help.

    ``suggestions`` are the changes, the best first; ``card`` is the smallest GPU of the catalogue with enough memory.

    >>> from lightning_memplan.types import Range
    >>> parts = {"activations": 2**34, "gradients": 2**31}
    >>> row = EstimateRow(1, 18 * 2**30, 2**34, 0, "backward", parts, {}, Range(0, 0, 0))
    >>> print(does_not_fit_message(row, 14 * 2**30, Device("NVIDIA T4", total=15 * 2**30), model="UNet3d",
    ...                            suggestions=["precision='16-mixed' instead of '32-true'"]))
    UNet3d does not fit on NVIDIA T4 at batch size 1: it lacks 4.00 GiB.
    It needs 18.00 GiB, and 14.00 GiB of the GPU's 15.00 GiB are there for it.
    In the backward phase: activations 16.00 GiB, gradients 2.00 GiB.
    What would help, the best first:
      1. precision='16-mixed' instead of '32-true'
    """
    needed = row.peak_reserved
    short = format_bytes(needed - available)
    lines = wrap(f"{model} does not fit on {device.name} at batch size {row.batch_size}: it lacks {short}.")
    lines += wrap(
        f"It needs {format_bytes(needed)}, and {format_bytes(available)} of the {_gpu_or_machine(device)}'s "
        f"{format_bytes(device.total)} are there for it."
    )
    if row.breakdown:
        parts = ", ".join(f"{label} {format_bytes(size)}" for label, size in largest_parts(row.breakdown, 3))
        lines += wrap(f"{f'In the {row.phase} phase' if row.phase else 'At the peak'}: {parts}.")
    if suggestions:
        lines.append("What would help, the best first:")
        for rank, text in enumerate(suggestions, 1):
            lines += wrap(text, f"  {rank}. ")
    if card is not None:
        lines += wrap(f"The smallest GPU with memory for it: {card.name}, {format_bytes(card.capacity)} for training.")
    return "\n".join(lines)


# --- devices and estimates
def devices_table(devices: Sequence[Device]) -> str:
    """Return devices, a line each, with the bytes that training can have of each.

    >>> print(devices_table([Device("RTX 3090", total=25446711296, context=450 * 2**20, capability=(8, 6))]))
    GPU       for training  compute capability
    RTX 3090     23.26 GiB                 8.6
    """
    rows = [("GPU", "for training", "compute capability")]
    rows += [(device.name, format_bytes(device.capacity), _capability(device)) for device in devices]
    return table(rows)


def cards_table(cards: Sequence[tuple[Device, int]]) -> str:
    """Return devices with the largest batch size that fits on each, a line each.

    >>> print(cards_table([(Device("T4", total=2**34), 0), (Device("A100 40GB", total=2**35), 16)]))
    GPU        for training  largest batch size
    T4            16.00 GiB                none
    A100 40GB     32.00 GiB                  16
    """
    rows = [("GPU", "for training", "largest batch size")]
    return table([*rows, *((card.name, format_bytes(card.capacity), str(size or "none")) for card, size in cards)])


def _capability(device: Device) -> str:
    return "" if device.capability is None else "{}.{}".format(*device.capability)


def _gpu_or_machine(device: Device) -> str:
    return "GPU" if device.kind == "cuda" else "machine"


# --- estimates
def estimate_table(model: str, rows: Sequence[EstimateRow], notes: Sequence[str] = ()) -> str:
    """Return what training takes at several batch sizes, and where it goes at the last.

    >>> from lightning_memplan.types import Range
    >>> row = EstimateRow(8, 2**31, 2**30, 2**30, "backward", {"activations": 2**30}, {}, Range(2**31, 2**31, 2**31))
    >>> print(estimate_table("Net", [row]))
    Net
      batch size  peak reserved  peak allocated   formula
      8                2.00 GiB        1.00 GiB  1.00 GiB
    <BLANKLINE>
      at batch size 8, in the backward phase
        activations      1.00 GiB   100 %  ####################
    """
    head = ("batch size", "peak reserved", "peak allocated", "formula")
    sizes = [
        (str(row.batch_size), *map(format_bytes, (row.peak_reserved, row.peak_allocated, row.formula_peak)))
        for row in rows
    ]
    last = rows[-1]
    lines = [shorten_end(model, WIDTH), *(f"  {line}" for line in table([head, *sizes]).splitlines())]
    lines += ["", f"  at batch size {last.batch_size}, in the {last.phase} phase"]
    lines += breakdown_rows(last.breakdown)
    for note in notes:
        lines.extend(wrap(note, "  note: "))
    return "\n".join(lines)


# --- advice
def advice_table(advice: Sequence[Advice]) -> str:
    """Return the changes that take less memory, a paragraph each.

    >>> one = Advice("precision", "precision='bf16-mixed'", "half-precision arithmetic", 8, 2**30, 2**31, 2**30, 16)
    >>> print(advice_table([one]))
    1. precision='bf16-mixed'
       saves 1.00 GiB: 2.00 GiB reserved at batch size 8; largest that fits: 16
       cost: half-precision arithmetic
    """
    lines: list[str] = []
    for rank, item in enumerate(advice, 1):
        largest = "" if item.largest_batch_size is None else f"; largest that fits: {item.largest_batch_size}"
        peak = f"{format_bytes(item.peak_reserved)} reserved at batch size {item.batch_size}"
        lines += wrap(item.change, f"{rank}. ")
        lines += wrap(f"saves {format_bytes(item.saved)}: {peak}{largest}", "   ")
        lines += wrap(f"cost: {item.cost}", "   ")
    return "\n".join(lines) or "nothing that can be traced saves a hundredth of the peak"


def advice_lines(advice: Sequence[Advice], available: int, count: int = 3) -> list[str]:
    """Return the best change of each kind, a line each that says whether the batch then fits in ``available`` bytes.

    >>> one = Advice("precision", "precision='bf16-mixed'", "half-precision arithmetic", 8, 2**30, 2**31, 2**30)
    >>> advice_lines([one], available=2**30)
    ["precision='bf16-mixed': 2.00 GiB, which still lacks 1.00 GiB"]
    """
    best = {item.kind: item for item in reversed(advice)}
    lines = []
    for item in sorted(best.values(), key=lambda item: (item.kind == "samples", -item.saved))[:count]:
        lacks = item.peak_reserved + item.nccl - available
        then = "which fits" if lacks <= 0 else f"which still lacks {format_bytes(lacks)}"
        lines.append(f"{item.change}: {format_bytes(item.peak_reserved)}, {then}")
    return lines
