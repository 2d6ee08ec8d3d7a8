"""Plans, estimates and advice as text and as flat dictionaries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_memplan.report.text import (
    WIDTH,
    capability,
    columns,
    draw_bar,
    format_row,
    largest,
    module_or_phase,
    share,
    shorten_end,
    table,
    wrap,
)
from lightning_memplan.types import Advice, Device, Layer, Plan
from lightning_memplan.units import format_bytes

LIMITS = {
    "memory": "limited by memory",
    "max_batch_size": "limited by max_batch_size",
    "dataset": "limited by the dataset",
    "effective_batch_size": "all of the effective batch size",
    "step": "limited by the step itself",
    "checkpoint": "kept from the checkpoint",
}


_METHODS = {
    "probe": "real steps on the GPU",
    "trace": "a step on fake tensors",
    "formula": "params + grads + bs x (I1 + 2 x sum Ii)",
}


# --- the plan ---------------------------------------------------------------------------------------------------------
def plan_table(plan: Plan, rows: Iterable[tuple[str, str]] = ()) -> str:
    """A plan as a short table; ``rows`` adds lines of a label and a text.

    >>> card = Device("NVIDIA GeForce RTX 3090", total=25446711296, context=480 * 2**20)
    >>> plan = Plan(batch_size=24, device=card, budget=23 * 2**30, margin=0.02, limited_by="memory", method="trace",
    ...             predicted_peak=22 * 2**30, predicted_allocated=20 * 2**30, formula_peak=30 * 2**30,
    ...             phase="backward", breakdown={"activations": 15 * 2**30, "gradients": 5 * 2**30},
    ...             methods={"trace": 22 * 2**30, "formula": 30 * 2**30})
    >>> print(plan_table(plan))
    memory plan for NVIDIA GeForce RTX 3090
      card             23.70 GiB   23.23 GiB for training, budget 23.00 GiB
      batch size              24   limited by memory
      peak reserved    22.00 GiB    93 % of the card  [###################.]
      peak allocated   20.00 GiB    84 % of the card, in the backward phase
        activations    15.00 GiB    75 %  ###############
        gradients       5.00 GiB    25 %  #####
      trace            22.00 GiB   a step on fake tensors
      formula          30.00 GiB   params + grads + bs x (I1 + 2 x sum Ii)
    """
    total = plan.device.total
    accumulated = ""
    if plan.accumulate_grad_batches > 1 and plan.effective_batch_size is None:
        accumulated = f"; {plan.accumulate_grad_batches} batches a step"
    phase = f", in the {plan.phase} phase" if plan.phase else ""
    where = module_or_phase(plan.device)
    lines = [
        shorten_end(f"memory plan for {plan.device.name}", WIDTH),
        format_row(
            where,
            format_bytes(total),
            f"{format_bytes(plan.device.capacity)} for training, budget {format_bytes(plan.budget)}",
        ),
        format_row("batch size", str(plan.batch_size), LIMITS[plan.limited_by] + accumulated),
        *_effective(plan),
        format_row(
            "peak reserved",
            format_bytes(plan.predicted_peak),
            f"{share(plan.predicted_peak, total)} of the {where}  [{draw_bar(plan.predicted_peak, total, fill='.')}]",
        ),
        format_row(
            "peak allocated",
            format_bytes(plan.predicted_allocated),
            f"{share(plan.predicted_allocated, total)} of the {where}{phase}",
        ),
    ]
    if plan.nccl:
        lines.insert(2, format_row("  NCCL", format_bytes(plan.nccl), "left to it beside the allocator: an allowance"))
    if plan.reserved_range is not None and plan.reserved_range.high > plan.predicted_peak:
        usual, most = map(format_bytes, plan.reserved_range[1:])
        lines.insert(-1, format_row("  with cuDNN", usual, f"expected of its workspaces, {most} at most"))
    if plan.reserved_range is not None and plan.reserved_range.low < plan.predicted_peak:
        least = format_bytes(plan.reserved_range.low)
        lines.insert(
            -1, format_row("  at least", least, "reserved in any case; planned for the most that there may be")
        )
    if plan.confirmed is not None:
        lines.insert(
            -1, format_row("  confirmed", format_bytes(plan.confirmed), "reserved by real steps of this batch size")
        )
    whole = sum(plan.breakdown.values())
    for label, size in largest(plan.breakdown, 5):
        lines.append(
            format_row(f"  {label}", format_bytes(size), f"{share(size, whole)}  {draw_bar(size, whole)}".rstrip())
        )
    for method, peak in (plan.methods or {"formula": plan.formula_peak}).items():
        lines.append(format_row(method, format_bytes(peak), _METHODS[method]))
    for label, text in rows:
        lines.extend(wrap(text, f"  {label:<17}"))
    for note in plan.notes:
        lines.extend(wrap(note, "  note: "))
    return "\n".join(lines)


def validation_text(batch_size: int, training: Plan, both: Plan | None) -> str:
    """Validation's batch size, and which of the two has the peak; ``both`` is the plan with validation in between.

    >>> from dataclasses import replace
    >>> card = Device("my card", total=2**35)
    >>> plan = Plan(batch_size=8, device=card, budget=2**34, margin=0.5, limited_by="memory", method="trace",
    ...             predicted_peak=2**32, predicted_allocated=2**31, formula_peak=2**31)
    >>> both = replace(plan, batch_size=4, predicted_allocated=3 * 2**31, predicted_peak=2**33)
    >>> validation_text(4, plan, both)
    "MemoryPlanner: validation's batch size is 4; peak of both, in validation: 6.00 GiB allocated, 8.00 GiB reserved"
    """
    text = f"MemoryPlanner: validation's batch size is {batch_size}"
    if both is None or both.batch_size != batch_size:
        return text
    which = "validation" if both.predicted_allocated > training.predicted_allocated else "training"
    allocated, reserved = format_bytes(both.predicted_allocated), format_bytes(both.predicted_peak)
    return f"{text}; peak of both, in {which}: {allocated} allocated, {reserved} reserved"


def _effective(plan: Plan) -> list[str]:
    """How the samples of an optimizer's step come together, where a number of them was asked for."""
    if plan.effective_batch_size is None:
        return []
    parts = plan.accumulate_grad_batches
    devices = plan.effective_batch_size // (plan.batch_size * parts)
    each = f" on each of {devices} devices" if devices > 1 else ""
    text = f"{parts} {'batches' if parts > 1 else 'batch'} of {plan.batch_size}{each}"
    return [format_row("samples a step", str(plan.effective_batch_size), text)]


def plan_fields(plan: Plan) -> dict[str, Any]:
    """A plan as plain values, for JSON; sizes in bytes.

    >>> plan = Plan(batch_size=8, device=Device("card", total=2**34), budget=2**33, margin=0.5, limited_by="memory",
    ...             method="trace", predicted_peak=2**32, predicted_allocated=2**31, formula_peak=2**31)
    >>> found = plan_fields(plan)
    >>> found["batch_size"], found["peak_reserved"], found["device"]["total"]
    (8, 4294967296, 17179869184)
    """
    return {
        "batch_size": plan.batch_size,
        "accumulate_grad_batches": plan.accumulate_grad_batches,
        "limited_by": plan.limited_by,
        "method": plan.method,
        "device": device_fields(plan.device),
        "margin": plan.margin,
        "budget": plan.budget,
        "nccl": plan.nccl,
        "peak_reserved": plan.predicted_peak,
        "peak_allocated": plan.predicted_allocated,
        "formula": plan.formula_peak,
        "phase": plan.phase,
        "breakdown": dict(plan.breakdown),
        "notes": list(plan.notes),
    }


def does_not_fit_message(
    *,
    needed: int,
    available: int,
    device: Device,
    model: str = "the model",
    batch_size: int = 1,
    phase: str = "",
    breakdown: Mapping[str, int] | None = None,
    suggestions: Sequence[str] = (),
    card: Device | None = None,
) -> str:
    """What a batch size needs, what the device has, what takes the most, and what would help (the best first).

    ``card`` is the smallest of the catalogue that has enough memory.

    >>> card = Device("NVIDIA T4", total=15 * 2**30)
    >>> print(does_not_fit_message(needed=18 * 2**30, available=14 * 2**30, device=card, model="UNet3d",
    ...                            phase="backward", breakdown={"activations": 2**34, "gradients": 2**31},
    ...                            suggestions=["precision='16-mixed' instead of '32-true'"]))
    UNet3d does not fit on NVIDIA T4 at batch size 1: it lacks 4.00 GiB.
    It needs 18.00 GiB, and 14.00 GiB of the card's 15.00 GiB are there for it.
    In the backward phase: activations 16.00 GiB, gradients 2.00 GiB.
    What would help, the best first:
      1. precision='16-mixed' instead of '32-true'
    """
    short = format_bytes(needed - available)
    lines = wrap(f"{model} does not fit on {device.name} at batch size {batch_size}: it lacks {short}.")
    lines += wrap(
        f"It needs {format_bytes(needed)}, and {format_bytes(available)} of the {module_or_phase(device)}'s "
        f"{format_bytes(device.total)} are there for it."
    )
    if breakdown:
        parts = ", ".join(f"{label} {format_bytes(size)}" for label, size in largest(breakdown, 3))
        lines += wrap(f"{f'In the {phase} phase' if phase else 'At the peak'}: {parts}.")
    if suggestions:
        lines.append("What would help, the best first:")
        for rank, text in enumerate(suggestions, 1):
            lines += wrap(text, f"  {rank}. ")
    if card is not None:
        lines += wrap(f"The smallest card with memory for it: {card.name}, {format_bytes(card.capacity)} for training.")
    return "\n".join(lines)


# --- devices and estimates --------------------------------------------------------------------------------------------
def device_fields(device: Device) -> dict[str, Any]:
    """A device as plain values, for JSON; sizes in bytes.

    >>> device_fields(Device("card", total=2**34, context=2**30, capability=(8, 6)))["capability"]
    '8.6'
    """
    return {
        "name": device.name,
        "kind": device.kind,
        "index": device.index,
        "uuid": device.uuid,
        "total": device.total,
        "free": device.total if device.free is None else device.free,
        "capacity": device.capacity,
        "capability": capability(device) or None,
    }


def devices_table(devices: Sequence[Device]) -> str:
    """Devices, a line each: the bytes that training can have of each.

    >>> print(devices_table([Device("RTX 3090", total=25446711296, context=450 * 2**20, capability=(8, 6))]))
    card      for training  compute capability
    RTX 3090     23.26 GiB                 8.6
    """
    rows = [("card", "for training", "compute capability")]
    rows += [(device.name, format_bytes(device.capacity), capability(device)) for device in devices]
    return table(rows)


def estimate_table(model: str, rows: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()) -> str:
    """What training takes at several batch sizes, and where it goes at the last.

    >>> row = {"batch_size": 8, "peak_reserved": 2**31, "peak_allocated": 2**30, "formula": 2**30, "phase": "backward",
    ...        "breakdown": {"activations": 2**30}}
    >>> print(estimate_table("Net", [row]))
    Net
      batch size  peak reserved  peak allocated   formula
      8                2.00 GiB        1.00 GiB  1.00 GiB
    <BLANKLINE>
      at batch size 8, in the backward phase
        activations      1.00 GiB   100 %  ####################
    """
    names = ("peak_reserved", "peak_allocated", "formula")
    head = ("batch size", "peak reserved", "peak allocated", "formula")
    lines = [shorten_end(model, WIDTH)]
    sizes = table([head, *((str(row["batch_size"]), *(format_bytes(row[name]) for name in names)) for row in rows)])
    lines += [f"  {line}" for line in sizes.splitlines()]
    last = rows[-1]
    lines += ["", f"  at batch size {last['batch_size']}, in the {last['phase']} phase"]
    whole = sum(last["breakdown"].values())
    for label, size in largest(last["breakdown"], 5):
        lines.append(
            format_row(f"  {label}", format_bytes(size), f"{share(size, whole)}  {draw_bar(size, whole)}".rstrip())
        )
    for note in notes:
        lines.extend(wrap(note, "  note: "))
    return "\n".join(lines)


# --- advice -----------------------------------------------------------------------------------------------------------
def advice_table(advice: Sequence[Advice]) -> str:
    """What would take less memory, a paragraph each.

    >>> one = Advice("precision", "precision='bf16-mixed'", "half-precision arithmetic", 8, 2**30, 2**31, 2**30, 16)
    >>> print(advice_table([one]))
    1. precision='bf16-mixed'
       saves 1.00 GiB: 2.00 GiB reserved at batch size 8; largest that fits: 16
       cost: half-precision arithmetic
    """
    lines = []
    for rank, item in enumerate(advice, 1):
        largest = "" if item.largest_batch_size is None else f"; largest that fits: {item.largest_batch_size}"
        peak = f"{format_bytes(item.peak_reserved)} reserved at batch size {item.batch_size}"
        lines += wrap(item.change, f"{rank}. ")
        lines += wrap(f"saves {format_bytes(item.saved)}: {peak}{largest}", "   ")
        lines += wrap(f"cost: {item.cost}", "   ")
    return "\n".join(lines) or "nothing that can be traced saves a hundredth of the peak"


def advice_lines(advice: Sequence[Advice], available: int, count: int = 3) -> list[str]:
    """The best of each kind, in a line each that says whether it then fits.

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


def cards_table(cards: Sequence[tuple[Device, int]]) -> str:
    """Cards with the largest batch size that fits on each.

    >>> print(cards_table([(Device("T4", total=2**34), 0), (Device("A100 40GB", total=2**35), 16)]))
    card       for training  largest batch size
    T4            16.00 GiB                none
    A100 40GB     32.00 GiB                  16
    """
    rows = [("card", "for training", "largest batch size")]
    return table([*rows, *((card.name, format_bytes(card.capacity), str(size or "none")) for card, size in cards)])


# --- the formula ------------------------------------------------------------------------------------------------------
def layers_table(
    layers: Sequence[Layer],
    *,
    input_bytes: int,
    batch_size: int = 1,
    optimizer_bytes: int = 0,
    top: int | None = None,
) -> str:
    """The formula layer by layer, with its totals, and written out with its numbers.

    ``shape`` and ``output`` are one sample's. Where there are more than ``top`` rows, those that take the most at this
    batch size are shown, in the network's order, and the rest is one line.

    >>> conv = Layer("conv", "Conv3d", 840, 840, 3360, 3360, (30, 191, 227, 191), 993742440)
    >>> print(layers_table([conv], input_bytes=34119604, batch_size=2))
    layer          type    parameters  shape               output
    conv           Conv3d         840  30x191x227x191  947.71 MiB
    input                                               32.54 MiB
    sum of layers                 840                  947.71 MiB
    <BLANKLINE>
    memory(bs) = params + grads + bs x (I1 + 2 x sum Ii)
               = 3.28 KiB + 3.28 KiB + bs x (32.54 MiB + 2 x 947.71 MiB)
    memory(2)  = 3.77 GiB

    Raises:
        ValueError: ``batch_size`` or ``top`` is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"a batch size is at least 1, and {batch_size} is not")
    if top is not None and top < 1:
        raise ValueError(f"top is a number of layers to show, at least 1, and {top} is not")
    weights = [row.parameter_bytes + row.gradient_bytes + 2 * batch_size * row.feature_bytes for row in layers]
    shown = set(range(len(layers)))
    if top is not None and len(layers) > top:
        shown = set(sorted(shown, key=lambda i: weights[i], reverse=True)[:top])
    hidden = [row for i, row in enumerate(layers) if i not in shown]

    table = [("layer", "type", "parameters", "shape", "output")]
    for i, row in enumerate(layers):
        if i in shown:
            shape = "x".join(map(str, row.shape))
            output = format_bytes(row.feature_bytes)
            table.append((row.path or "(itself)", row.type, f"{row.parameters:,}", shape, output))
    if hidden:
        rest, features = sum(row.parameters for row in hidden), sum(row.feature_bytes for row in hidden)
        table.append((f"{len(hidden)} smaller ones", "", f"{rest:,}", "", format_bytes(features)))
    parameters = sum(row.parameters for row in layers)
    parameter_bytes = sum(row.parameter_bytes for row in layers)
    gradient_bytes = sum(row.gradient_bytes for row in layers)
    feature_bytes = sum(row.feature_bytes for row in layers)
    table.append(("input", "", "", "", format_bytes(input_bytes)))
    table.append(("sum of layers", "", f"{parameters:,}", "", format_bytes(feature_bytes)))
    lines = columns(table)

    total = parameter_bytes + gradient_bytes + batch_size * (input_bytes + 2 * feature_bytes)
    label = f"memory({batch_size})"
    left = max(len(label), len("memory(bs)"))
    numbers = f"{format_bytes(parameter_bytes)} + {format_bytes(gradient_bytes)}"
    sample = f"{format_bytes(input_bytes)} + 2 x {format_bytes(feature_bytes)}"
    lines += [
        "",
        f"{'memory(bs)':<{left}} = params + grads + bs x (I1 + 2 x sum Ii)",
        f"{'':<{left}} = {numbers} + bs x ({sample})",
        f"{label:<{left}} = {format_bytes(total)}",
    ]
    if optimizer_bytes:
        lines.append(f"{'':<{left}}   and {format_bytes(optimizer_bytes)} of optimizer state, apart")
    return "\n".join(lines)
