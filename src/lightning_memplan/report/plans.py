"""Plans, estimates, devices, advice and the formula as text, and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_memplan.report.text import (
    WIDTH,
    breakdown_rows,
    draw_bar,
    format_row,
    largest_parts,
    percent,
    shorten_end,
    shorten_middle,
    table,
    wrap,
)
from lightning_memplan.types import Advice, Device, Layer, Plan
from lightning_memplan.units import format_bytes

if TYPE_CHECKING:
    from lightning_memplan.memory.estimate import Estimate

#: What kept the batch size from being larger, by ``Plan.limited_by``
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
      card             23.70 GiB   23.23 GiB for training, budget 23.00 GiB
      batch size              24   limited by memory
      peak reserved    22.00 GiB    93 % of the card  [###################.]
      peak allocated   20.00 GiB    84 % of the card, in the backward phase
        activations    15.00 GiB    75 %  ###############
        gradients       5.00 GiB    25 %  #####
      trace            22.00 GiB   a step on fake tensors
      formula          30.00 GiB   params + grads + bs x (I1 + 2 x sum Ii)
    """
    total, where = plan.device.total, _card_or_machine(plan.device)
    room = f"{format_bytes(plan.device.capacity)} for training, budget {format_bytes(plan.budget)}"
    lines = [shorten_end(f"memory plan for {plan.device.name}", WIDTH), format_row(where, format_bytes(total), room)]
    if plan.nccl:
        lines.append(format_row("  NCCL", format_bytes(plan.nccl), "left to it beside the allocator: an allowance"))
    lines += _batch_size_rows(plan)
    bar = draw_bar(plan.peak_reserved, total, fill=".")
    reserved = f"{percent(plan.peak_reserved, total)} of the {where}  [{bar}]"
    lines += [format_row("peak reserved", format_bytes(plan.peak_reserved), reserved), *_reserved_rows(plan)]
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


def plan_fields(plan: Plan) -> dict[str, object]:
    """Return a plan as plain values, for JSON; sizes in bytes.

    >>> plan = Plan(batch_size=8, device=Device("card", total=2**34), budget=2**33, margin=0.5, limited_by="memory",
    ...             method="trace", peak_reserved=2**32, peak_allocated=2**31, formula_peak=2**31)
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
        "peak_reserved": plan.peak_reserved,
        "peak_allocated": plan.peak_allocated,
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
    """Say how much a batch size needs and the device has, which parts are largest, and which changes would help.

    ``suggestions`` are the changes, the best first; ``card`` is the smallest GPU of the catalogue with enough memory.

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
        f"It needs {format_bytes(needed)}, and {format_bytes(available)} of the {_card_or_machine(device)}'s "
        f"{format_bytes(device.total)} are there for it."
    )
    if breakdown:
        parts = ", ".join(f"{label} {format_bytes(size)}" for label, size in largest_parts(breakdown, 3))
        lines += wrap(f"{f'In the {phase} phase' if phase else 'At the peak'}: {parts}.")
    if suggestions:
        lines.append("What would help, the best first:")
        for rank, text in enumerate(suggestions, 1):
            lines += wrap(text, f"  {rank}. ")
    if card is not None:
        lines += wrap(f"The smallest card with memory for it: {card.name}, {format_bytes(card.capacity)} for training.")
    return "\n".join(lines)


# --- devices and estimates
def device_fields(device: Device) -> dict[str, object]:
    """Return a device as plain values, for JSON; sizes in bytes.

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
        "capability": _capability(device) or None,
    }


def devices_table(devices: Sequence[Device]) -> str:
    """Return devices, a line each, with the bytes that training can have of each.

    >>> print(devices_table([Device("RTX 3090", total=25446711296, context=450 * 2**20, capability=(8, 6))]))
    card      for training  compute capability
    RTX 3090     23.26 GiB                 8.6
    """
    rows = [("card", "for training", "compute capability")]
    rows += [(device.name, format_bytes(device.capacity), _capability(device)) for device in devices]
    return table(rows)


def cards_table(cards: Sequence[tuple[Device, int]]) -> str:
    """Return devices with the largest batch size that fits on each, a line each.

    >>> print(cards_table([(Device("T4", total=2**34), 0), (Device("A100 40GB", total=2**35), 16)]))
    card       for training  largest batch size
    T4            16.00 GiB                none
    A100 40GB     32.00 GiB                  16
    """
    rows = [("card", "for training", "largest batch size")]
    return table([*rows, *((card.name, format_bytes(card.capacity), str(size or "none")) for card, size in cards)])


def _capability(device: Device) -> str:
    return "" if device.capability is None else "{}.{}".format(*device.capability)


def _card_or_machine(device: Device) -> str:
    return "card" if device.kind == "cuda" else "machine"


# --- estimates
@dataclass(frozen=True, slots=True)
class EstimateRow:
    """The estimate at one batch size; sizes in bytes.

    >>> import lightning_memplan as mp, torch
    >>> row = EstimateRow.of(mp.estimate(torch.nn.Linear(100, 100), torch.zeros(4, 100)), batch_size=8)
    >>> sum(row.breakdown.values()) == row.peak_allocated <= row.peak_reserved, row.phase
    (True, 'backward')
    """

    batch_size: int
    peak_reserved: int
    peak_allocated: int
    formula: int
    phase: str
    breakdown: Mapping[str, int]

    @classmethod
    def of(cls, estimate: Estimate, batch_size: int) -> EstimateRow:
        """Return the row of an estimate at a batch size."""
        return cls(
            batch_size,
            estimate.peak(batch_size),
            estimate.peak_allocated(batch_size),
            estimate.formula.memory(batch_size),
            estimate.phase(batch_size),
            dict(estimate.breakdown(batch_size)),
        )


def estimate_table(model: str, rows: Sequence[EstimateRow], notes: Sequence[str] = ()) -> str:
    """Return what training takes at several batch sizes, and where it goes at the last.

    >>> row = EstimateRow(8, 2**31, 2**30, 2**30, "backward", {"activations": 2**30})
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
        (str(row.batch_size), *map(format_bytes, (row.peak_reserved, row.peak_allocated, row.formula))) for row in rows
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


# --- the formula
def layers_table(
    layers: Sequence[Layer],
    *,
    input_bytes: int,
    batch_size: int = 1,
    optimizer_bytes: int = 0,
    top: int | None = None,
) -> str:
    """Return the formula layer by layer, with its totals, and written out with its numbers.

    ``shape`` and ``output`` are one sample's. With ``top``, only so many layers are shown, the largest at this batch
    size, in the network's order; the rest is one line.

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
    shown = _largest_layers(layers, batch_size, len(layers) if top is None else top)
    hidden = [row for i, row in enumerate(layers) if i not in shown]
    parameters, features = sum(row.parameters for row in layers), sum(row.feature_bytes for row in layers)
    cells = [("layer", "type", "parameters", "shape", "output")]
    for row in (layers[i] for i in shown):
        shape, output = "x".join(map(str, row.shape)), format_bytes(row.feature_bytes)
        cells.append((row.path or "(itself)", row.type, f"{row.parameters:,}", shape, output))
    if hidden:
        rest, output = sum(row.parameters for row in hidden), format_bytes(sum(row.feature_bytes for row in hidden))
        cells.append((f"{len(hidden)} smaller ones", "", f"{rest:,}", "", output))
    cells.append(("input", "", "", "", format_bytes(input_bytes)))
    cells.append(("sum of layers", "", f"{parameters:,}", "", format_bytes(features)))
    weights = sum(row.parameter_bytes for row in layers), sum(row.gradient_bytes for row in layers)
    formula = _formula_lines(weights, input_bytes, features, batch_size, optimizer_bytes)
    return "\n".join([*_columns(cells), "", *formula])


def _largest_layers(layers: Sequence[Layer], batch_size: int, count: int) -> list[int]:
    """Return the places of the ``count`` layers that take the most memory, in the network's order."""

    def size(place: int) -> int:
        row = layers[place]
        return row.parameter_bytes + row.gradient_bytes + 2 * batch_size * row.feature_bytes

    return sorted(sorted(range(len(layers)), key=size, reverse=True)[:count])


def _formula_lines(
    weights: tuple[int, int], input_bytes: int, features: int, batch_size: int, optimizer_bytes: int
) -> list[str]:
    """Write out the formula, with the bytes of parameters and gradients, of inputs and of features, and its value.

    >>> _formula_lines((1024, 1024), 512, 2**20, batch_size=1, optimizer_bytes=0)[2]
    'memory(1)  = 2.00 MiB'
    """
    parameters, gradients = weights
    total = parameters + gradients + batch_size * (input_bytes + 2 * features)
    label = f"memory({batch_size})"
    left = max(len(label), len("memory(bs)"))
    numbers = f"{format_bytes(parameters)} + {format_bytes(gradients)}"
    sample = f"{format_bytes(input_bytes)} + 2 x {format_bytes(features)}"
    lines = [
        f"{'memory(bs)':<{left}} = params + grads + bs x (I1 + 2 x sum Ii)",
        f"{'':<{left}} = {numbers} + bs x ({sample})",
        f"{label:<{left}} = {format_bytes(total)}",
    ]
    if optimizer_bytes:
        lines.append(f"{'':<{left}}   and {format_bytes(optimizer_bytes)} of optimizer state, apart")
    return lines


def _columns(cells: Sequence[tuple[str, str, str, str, str]]) -> list[str]:
    """Align the layers' table in columns as wide as they need; the path gets the width that is left."""
    kind, parameters, shape, output = (max(len(row[i]) for row in cells) for i in range(1, 5))
    kind, shape = min(kind, 20), min(shape, 20)
    path = min(max(len(row[0]) for row in cells), WIDTH - (kind + parameters + shape + output + 8))
    return [
        f"{shorten_middle(row[0], path):<{path}}  {shorten_end(row[1], kind):<{kind}}  {row[2]:>{parameters}}"
        f"  {shorten_end(row[3], shape):<{shape}}  {row[4]:>{output}}"
        for row in cells
    ]
