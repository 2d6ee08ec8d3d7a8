"""Values as text, as flat dictionaries, and as metrics.

Plain text of at most 80 columns, in ASCII, so that it reads the same in a terminal, a log file and a job's output.
Bytes come in as ``int``; GiB and MiB are powers of two.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from lightning_memplan.types import Advice, Device, Layer, Measurement, Peaks, Plan, Run
from lightning_memplan.units import GiB, format_bytes, gib

WIDTH = 80


_LIMITS = {
    "memory": "limited by memory",
    "max_batch_size": "limited by max_batch_size",
    "dataset": "limited by the dataset",
    "effective_batch_size": "all of the effective batch size",
    "step": "limited by the step itself",
    "checkpoint": "kept from the checkpoint",
}


_PHASES = ("batch", "forward", "backward", "optimizer")


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
    where = _where(plan.device)
    lines = [
        _shorten_end(f"memory plan for {plan.device.name}", WIDTH),
        _row(
            where,
            format_bytes(total),
            f"{format_bytes(plan.device.capacity)} for training, budget {format_bytes(plan.budget)}",
        ),
        _row("batch size", str(plan.batch_size), _LIMITS[plan.limited_by] + accumulated),
        *_effective(plan),
        _row(
            "peak reserved",
            format_bytes(plan.predicted_peak),
            f"{_share(plan.predicted_peak, total)} of the {where}  [{_bar(plan.predicted_peak, total, fill='.')}]",
        ),
        _row(
            "peak allocated",
            format_bytes(plan.predicted_allocated),
            f"{_share(plan.predicted_allocated, total)} of the {where}{phase}",
        ),
    ]
    if plan.nccl:
        lines.insert(2, _row("  NCCL", format_bytes(plan.nccl), "left to it beside the allocator: an allowance"))
    if plan.reserved_range is not None and plan.reserved_range.high > plan.predicted_peak:
        usual, most = map(format_bytes, plan.reserved_range[1:])
        lines.insert(-1, _row("  with cuDNN", usual, f"expected of its workspaces, {most} at most"))
    if plan.reserved_range is not None and plan.reserved_range.low < plan.predicted_peak:
        least = format_bytes(plan.reserved_range.low)
        lines.insert(-1, _row("  at least", least, "reserved in any case; planned for the most that there may be"))
    if plan.confirmed is not None:
        lines.insert(-1, _row("  confirmed", format_bytes(plan.confirmed), "reserved by real steps of this batch size"))
    whole = sum(plan.breakdown.values())
    for label, size in _largest(plan.breakdown, 5):
        lines.append(_row(f"  {label}", format_bytes(size), f"{_share(size, whole)}  {_bar(size, whole)}".rstrip()))
    for method, peak in (plan.methods or {"formula": plan.formula_peak}).items():
        lines.append(_row(method, format_bytes(peak), _METHODS[method]))
    for label, text in rows:
        lines.extend(_wrap(text, f"  {label:<17}"))
    for note in plan.notes:
        lines.extend(_wrap(note, "  note: "))
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
    return [_row("samples a step", str(plan.effective_batch_size), text)]


def plan_hparams(plan: Plan) -> dict[str, int | float | str]:
    """A plan as flat hyperparameters, for any logger; sizes in GiB.

    >>> plan = Plan(batch_size=8, device=Device("card", total=2**34), budget=2**33, margin=0.5, limited_by="memory",
    ...             method="trace", predicted_peak=2**32, predicted_allocated=2**31, formula_peak=2**31,
    ...             breakdown={"activations": 2**30})
    >>> found = plan_hparams(plan)
    >>> found["memplan/batch_size"], found["memplan/predicted_reserved_gib"], found["memplan/activations_gib"]
    (8, 4.0, 1.0)
    """
    return {
        "memplan/batch_size": plan.batch_size,
        "memplan/accumulate_grad_batches": plan.accumulate_grad_batches,
        **({"memplan/effective_batch_size": plan.effective_batch_size} if plan.effective_batch_size else {}),
        "memplan/device": plan.device.name,
        "memplan/device_gib": gib(plan.device.total),
        "memplan/budget_gib": gib(plan.budget),
        "memplan/margin": plan.margin,
        "memplan/limited_by": plan.limited_by,
        "memplan/method": plan.method,
        "memplan/phase": plan.phase,
        "memplan/predicted_reserved_gib": gib(plan.predicted_peak),
        "memplan/predicted_allocated_gib": gib(plan.predicted_allocated),
        "memplan/formula_gib": gib(plan.formula_peak),
        **({} if plan.confirmed is None else {"memplan/confirmed_gib": gib(plan.confirmed)}),
        **{f"memplan/{method}_gib": gib(peak) for method, peak in plan.methods.items()},
        **{f"memplan/{category}_gib": gib(size) for category, size in plan.breakdown.items()},
    }


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
    lines = _wrap(f"{model} does not fit on {device.name} at batch size {batch_size}: it lacks {short}.")
    lines += _wrap(
        f"It needs {format_bytes(needed)}, and {format_bytes(available)} of the {_where(device)}'s "
        f"{format_bytes(device.total)} are there for it."
    )
    if breakdown:
        parts = ", ".join(f"{label} {format_bytes(size)}" for label, size in _largest(breakdown, 3))
        lines += _wrap(f"{f'In the {phase} phase' if phase else 'At the peak'}: {parts}.")
    if suggestions:
        lines.append("What would help, the best first:")
        for rank, text in enumerate(suggestions, 1):
            lines += _wrap(text, f"  {rank}. ")
    if card is not None:
        lines += _wrap(
            f"The smallest card with memory for it: {card.name}, {format_bytes(card.capacity)} for training."
        )
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
        "capability": _capability(device) or None,
    }


def devices_table(devices: Sequence[Device]) -> str:
    """Devices, a line each: the bytes that training can have of each.

    >>> print(devices_table([Device("RTX 3090", total=25446711296, context=450 * 2**20, capability=(8, 6))]))
    card      for training  compute capability
    RTX 3090     23.26 GiB                 8.6
    """
    rows = [("card", "for training", "compute capability")]
    rows += [(device.name, format_bytes(device.capacity), _capability(device)) for device in devices]
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
    lines = [_shorten_end(model, WIDTH)]
    sizes = table([head, *((str(row["batch_size"]), *(format_bytes(row[name]) for name in names)) for row in rows)])
    lines += [f"  {line}" for line in sizes.splitlines()]
    last = rows[-1]
    lines += ["", f"  at batch size {last['batch_size']}, in the {last['phase']} phase"]
    whole = sum(last["breakdown"].values())
    for label, size in _largest(last["breakdown"], 5):
        lines.append(_row(f"  {label}", format_bytes(size), f"{_share(size, whole)}  {_bar(size, whole)}".rstrip()))
    for note in notes:
        lines.extend(_wrap(note, "  note: "))
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
        lines += _wrap(item.change, f"{rank}. ")
        lines += _wrap(f"saves {format_bytes(item.saved)}: {peak}{largest}", "   ")
        lines += _wrap(f"cost: {item.cost}", "   ")
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
    lines = _columns(table)

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


# --- measurements -----------------------------------------------------------------------------------------------------
def step_metrics(measurement: Measurement, formula_bytes: int) -> dict[str, float]:
    """One step's metrics: predicted and actual peaks in GiB, and the error of the allocated in percent of the actual.

    Phases and NVML's bytes are among them where they were measured.

    >>> step_metrics(Measurement(1, 2**30, 2**31, 2**30, 2**31), formula_bytes=2**29)["memplan/formula_gib"]
    0.5
    """
    metrics = {
        "memplan/predicted_reserved_gib": measurement.predicted_reserved / GiB,
        "memplan/actual_reserved_gib": measurement.reserved / GiB,
        "memplan/predicted_allocated_gib": measurement.predicted_allocated / GiB,
        "memplan/actual_allocated_gib": measurement.allocated / GiB,
        "memplan/error_percent": measurement.error_percent,
        "memplan/formula_gib": formula_bytes / GiB,
        "memplan/floor_gib": measurement.floor / GiB,
        "memplan/retries": measurement.retries,
        "memplan/device_allocations": measurement.device_allocations,
    }
    for name, size in measurement.predicted_phases.items():
        metrics[f"memplan/predicted_{name}_gib"] = size / GiB
    for name, size in measurement.phases.items():
        metrics[f"memplan/actual_{name}_gib"] = size / GiB
    if measurement.process is not None:
        metrics["memplan/process_gib"] = measurement.process / GiB
    if measurement.card is not None:
        metrics["memplan/card_gib"] = measurement.card / GiB
    return metrics


def scalars_layout(phases: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's charts of predicted and actual together, for ``SummaryWriter.add_custom_scalars``.

    Tags are regular expressions there, matched from the left: a logger may put a prefix before its metrics' names.

    >>> charts = scalars_layout(["backward"])["memplan"]
    >>> charts["peak reserved (GiB)"]
    ['Multiline', ['.*memplan/predicted_reserved_gib$', '.*memplan/actual_reserved_gib$']]
    >>> list(charts)
    ['peak reserved (GiB)', 'peak allocated (GiB)', 'backward: peak allocated (GiB)', 'error (%)']
    """

    def chart(*names: str) -> list[Any]:
        return ["Multiline", [f".*memplan/{name}$" for name in names]]

    def pair(kind: str) -> list[Any]:
        return chart(f"predicted_{kind}_gib", f"actual_{kind}_gib")

    return {
        "memplan": {
            "peak reserved (GiB)": pair("reserved"),
            "peak allocated (GiB)": pair("allocated"),
            **{f"{phase}: peak allocated (GiB)": pair(phase) for phase in phases},
            "error (%)": chart("error_percent"),
        }
    }


def validation_metrics(peaks: Peaks) -> dict[str, float]:
    """The peaks of a validation, in GiB.

    >>> validation_metrics(Peaks(allocated=2**30, reserved=2**31))
    {'memplan/validation_reserved_gib': 2.0, 'memplan/validation_allocated_gib': 1.0}
    """
    return {
        "memplan/validation_reserved_gib": gib(peaks.reserved),
        "memplan/validation_allocated_gib": gib(peaks.allocated),
    }


def ranks_metrics(ranks: Sequence[Peaks]) -> dict[str, float]:
    """The highest peaks of any rank, in GiB.

    >>> ranks_metrics([Peaks(allocated=2**30, reserved=2**31), Peaks(allocated=2**29, reserved=3 * 2**30)])
    {'memplan/ranks_reserved_gib': 3.0, 'memplan/ranks_allocated_gib': 1.0}
    """
    return {
        "memplan/ranks_reserved_gib": gib(max(peaks.reserved for peaks in ranks)),
        "memplan/ranks_allocated_gib": gib(max(peaks.allocated for peaks in ranks)),
    }


def measurement_summary(
    measurements: Sequence[Measurement], ranks: Sequence[Peaks] = (), validations: Sequence[Peaks] = ()
) -> str:
    """What was predicted and what came, over all measured steps; of several ranks, which of them took the most.

    >>> step = Measurement(0, 2**31, 3 * 2**30, 2**31, 3 * 2**30, {"backward": 2**31}, {"backward": 2**31})
    >>> print(measurement_summary([step], validations=[Peaks(2**29, 3 * 2**30)]))
    memory over 1 measured step
                       predicted       actual      error
      peak reserved     3.00 GiB     3.00 GiB     +0.0 %
      peak allocated    2.00 GiB     2.00 GiB     +0.0 %
        backward        2.00 GiB     2.00 GiB     +0.0 %
        validation                 512.00 MiB
      error of allocated, step by step: median +0.0 %, worst +0.0 % in step 0
    """
    if not measurements:
        return "memory: no step was measured"
    steps = "1 measured step" if len(measurements) == 1 else f"{len(measurements)} measured steps"
    errors = [m.error_percent for m in measurements]
    worst = max(measurements, key=lambda m: abs(m.error_percent))
    predicted, actual = _highest(m.predicted_phases for m in measurements), _highest(m.phases for m in measurements)
    phases = {name: (predicted.get(name, 0), size) for name, size in actual.items()}
    rows = _peaks(
        (max(m.predicted_reserved for m in measurements), max(m.reserved for m in measurements)),
        (max(m.predicted_allocated for m in measurements), max(m.allocated for m in measurements)),
        phases | ({"validation": (0, max(peaks.allocated for peaks in validations))} if validations else {}),
    )
    of_steps = f"median {median(errors):+.1f} %, worst {worst.error_percent:+.1f} % in step {worst.step}"
    lines = [f"memory over {steps}", *rows, f"  error of allocated, step by step: {of_steps}"]
    over = [m for m in measurements if m.allocated > m.predicted_allocated > 0]
    if over:
        most = max(over, key=lambda m: m.allocated / m.predicted_allocated)
        more = 100 * (most.allocated / most.predicted_allocated - 1)
        text = f"{len(over)} of them allocated more than was predicted, at most {more:.1f} % more, in step {most.step}"
        lines += _wrap(text, "  ")
    if len(ranks) > 1:
        first = max(range(len(ranks)), key=lambda rank: ranks[rank].reserved)
        lines.append(f"  of {len(ranks)} ranks, rank {first} reserved most: {format_bytes(ranks[first].reserved)}")
    if retries := sum(m.retries for m in measurements):
        lines += _wrap(_retried(retries), "  ")
    return "\n".join(lines)


def logged_report(
    folder: str, plan: Mapping[str, str], measurements: Sequence[Measurement], validations: Sequence[Peaks] = ()
) -> str:
    """A run as its log has it: the plan among its hyperparameters, and its measured steps.

    >>> plan = {"device": "T4", "batch_size": "8", "method": "trace", "margin": "0.05", "limited_by": "dataset",
    ...         "device_gib": "16.0"}
    >>> print(logged_report("logs/version_0", plan, [Measurement(0, 2**31, 2**32, 2**31, 2**32)]))
    logs/version_0
      batch size 8 on T4, limited by the dataset; planned by trace, margin 5.0 %
    memory over 1 measured step
                       predicted       actual      error
      peak reserved     4.00 GiB     4.00 GiB     +0.0 %
      peak allocated    2.00 GiB     2.00 GiB     +0.0 %
      error of allocated, step by step: median +0.0 %, worst +0.0 % in step 0
      card             16.00 GiB    25 % of it reserved  [#####...............]
    """
    lines = [_shorten_middle(folder, WIDTH)]
    if plan:
        size = f"batch size {plan['batch_size']} on {plan['device']}, {_LIMITS[plan['limited_by']]}"
        lines += _wrap(f"{size}; {_planned(plan['method'], float(plan['margin']))}", "  ")
    lines.append(measurement_summary(measurements, validations=validations))
    if plan and measurements:
        lines.append(_card(max(m.reserved for m in measurements), round(float(plan["device_gib"]) * GiB)))
    return "\n".join(lines)


def _card(reserved: int, total: int) -> str:
    """How much of the card was reserved at most."""
    bar = _bar(reserved, total, fill=".")
    return _row("card", format_bytes(total), f"{_share(reserved, total)} of it reserved  [{bar}]")


def _peaks(reserved: tuple[int, int], allocated: tuple[int, int], phases: Mapping[str, tuple[int, int]]) -> list[str]:
    """Predicted and actual, a line each; 0 where one of them is not known."""

    def line(label: str, predicted: int, actual: int) -> str:
        error = f"{100 * (predicted - actual) / actual:+.1f} %" if predicted and actual else ""
        sizes = (format_bytes(size) if size else "" for size in (predicted, actual))
        return f"  {label:<15}{next(sizes):>11}  {next(sizes):>11}  {error:>9}".rstrip()

    known = [name for name in _PHASES if name in phases]
    return [
        f"  {'':<15}{'predicted':>11}  {'actual':>11}  {'error':>9}",
        line("peak reserved", *reserved),
        line("peak allocated", *allocated),
        *(line(f"  {name}", *phases[name]) for name in (*known, *(name for name in phases if name not in known))),
    ]


def _highest(sizes: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """For each name the largest of its sizes."""
    found: dict[str, int] = {}
    for each in sizes:
        found.update({name: max(size, found.get(name, 0)) for name, size in each.items()})
    return found


def _planned(method: str, margin: float) -> str:
    return f"planned by {method}, margin {100 * margin:.1f} %"


def _retried(times: int) -> str:
    often = "once" if times == 1 else f"{times} times"
    return f"the allocator gave its cache back {often} to serve a request, which takes time: the card was full"


# --- history ---------------------------------------------------------------------------------------------------------
def history_table(runs: Sequence[Run]) -> str:
    """Earlier runs by module and card, a line each: the reserved peak that was predicted, what came, and the error.

    >>> print(history_table([Run("a1", "Net", "T4", 2**34, 2**34, "trace", 8, {"steady": (2**30, 2**31)},
    ...                          {"steady": (2**30, 2**31)}, time="2026-11-20T08:00:00+00:00")]))
    Net on T4
      when (UTC)        precision  batch  predicted    actual   error
      2026-11-20 08:00                 8   2.00 GiB  2.00 GiB  +0.0 %
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(f"{_shorten_end(run.model, 30)} on {run.device}", []).append(run)
    head = ("when (UTC)", "precision", "batch", "predicted", "actual", "error")
    lines = iter(table([head, *(_history_row(run) for group in groups.values() for run in group)], left=2).splitlines())
    title = f"  {next(lines)}"
    parts = []
    for name, group in groups.items():
        rows = [f"  {next(lines)}".rstrip() for _ in group]
        parts.append("\n".join([_shorten_end(name, WIDTH), title, *rows]))
    return "\n\n".join(parts)


def _history_row(run: Run) -> tuple[str, ...]:
    predicted, actual = (max((r for _, r in peaks.values()), default=0) for peaks in (run.predicted, run.measured))
    error = f"{100 * (predicted - actual) / actual:+.1f} %" if actual else ""
    if run.outcome == "out of memory":
        error = run.outcome
    elif run.outcome != "done":
        error = f"{error}, {run.outcome}"
    return (
        _when(run),
        _shorten_end(str(run.settings.get("precision", "")), 11),
        str(run.batch_size),
        format_bytes(predicted),
        format_bytes(actual) if actual else "-",
        error,
    )


def _when(run: Run) -> str:
    return run.time[:16].replace("T", " ")


def run_report(run: Run, lesson: str = "") -> str:
    """One run on record: how it was planned, how it ended, its peaks, and what runs like it teach.

    >>> print(run_report(Run("a1", "Net", "T4", 2**34, 2**34, "trace", 8, {"steady": (2**30, 2**31)},
    ...                      {"steady": (2**30, 2**31)}, steps=20, phases={"backward": (2**30, 2**30)},
    ...                      margin=0.05, time="2026-11-20T08:00:00+00:00")))
    Net on T4, 2026-11-20 08:00 UTC: done, 20 steps
      batch size 8, planned by trace, margin 5.0 %
                       predicted       actual      error
      peak reserved     2.00 GiB     2.00 GiB     +0.0 %
      peak allocated    1.00 GiB     1.00 GiB     +0.0 %
        backward        1.00 GiB     1.00 GiB     +0.0 %
      card             16.00 GiB   12 % of it reserved  [##..................]
    """
    when = f", {_when(run)} UTC" if run.time else ""
    ended = {"done": "done,", "stopped": "stopped after"}.get(run.outcome)
    how = f"{ended} {run.steps} step{'s' * (run.steps != 1)}" if ended else f"{run.outcome} in step {run.steps}"
    head = f"{run.model} on {run.device}{when}: {how}"
    parts = [f"batch size {run.batch_size}", str(run.settings.get("precision", "")), _planned(run.method, run.margin)]
    if run.ranks > 1:
        parts.append(f"rank {run.rank} of {run.ranks}, which reserved most")

    def most(peaks: Mapping[str, tuple[int, int]], place: int) -> int:
        return max((both[place] for both in peaks.values()), default=0)

    reserved = most(run.measured, 1)
    lines = [
        *_wrap(head),
        *_wrap(", ".join(filter(None, parts)), "  "),
        *_peaks((most(run.predicted, 1), reserved), (most(run.predicted, 0), most(run.measured, 0)), run.phases),
        *([_card(reserved, run.total)] if reserved else []),
    ]
    if run.retries:
        lines += _wrap(_retried(run.retries), "  ")
    lines += _wrap(lesson, "  ") if lesson else []
    return "\n".join(lines)


def lessons_table(rows: Iterable[tuple[Run, int, str]]) -> str:
    """What earlier runs teach: one of them, how many they are, and the lesson's words.

    >>> run = Run("a1", "Net", "T4", 2**34, 2**34, "trace", 8, {}, {}, settings={"precision": "16-mixed"})
    >>> print(lessons_table([(run, 3, "3 runs of this module took at most +0.0 %: margin 1.0 %")]))
    Net in 16-mixed on T4, 3 runs
      3 runs of this module took at most +0.0 %: margin 1.0 %
    """
    lines: list[str] = []
    for run, runs, text in rows:
        precision = f" in {run.settings['precision']}" if "precision" in run.settings else ""
        name = f"{_shorten_end(run.model, 30)}{precision} on {run.device}, {runs} run{'s' * (runs != 1)}"
        lines.append(_shorten_end(name, WIDTH))
        lines += _wrap(text, "  ") if text else []
    return "\n".join(lines)


# --- text -------------------------------------------------------------------------------------------------------------
def _row(label: str, value: str, text: str) -> str:
    return f"  {label:<15}{value:>11}   {text}"


def _columns(table: Sequence[tuple[str, str, str, str, str]]) -> list[str]:
    """The layers' table in columns as wide as they need; the path gets what is left of the width."""
    kind, parameters, shape, output = (max(len(row[i]) for row in table) for i in range(1, 5))
    kind, shape = min(kind, 20), min(shape, 20)
    path = min(max(len(row[0]) for row in table), WIDTH - (kind + parameters + shape + output + 8))
    return [
        f"{_shorten_middle(row[0], path):<{path}}  {_shorten_end(row[1], kind):<{kind}}  {row[2]:>{parameters}}"
        f"  {_shorten_end(row[3], shape):<{shape}}  {row[4]:>{output}}"
        for row in table
    ]


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows in columns: the first ``left`` of them to the left, the others to the right.

    >>> print(table([("name", "size"), ("a", "1 B")]))
    name  size
    a      1 B
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{text:{'<' if k < left else '>'}{widths[k]}}" for k, text in enumerate(row)) for row in rows
    )


def _capability(device: Device) -> str:
    return "" if device.capability is None else "{}.{}".format(*device.capability)


def _where(device: Device) -> str:
    return "card" if device.kind == "cuda" else "machine"


def _shorten_middle(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    head = (width - 3) // 3
    return text[:head] + "..." + text[len(text) - (width - 3 - head) :]


def _shorten_end(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _wrap(text: str, label: str = "") -> list[str]:
    text = re.sub(r"(?<=\d) (?=%|[KMG]iB\b)", "\N{NO-BREAK SPACE}", text)  # a number and its unit stay together
    lines = textwrap.wrap(text, WIDTH, initial_indent=label, subsequent_indent=" " * len(label), break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines] or [label.rstrip()]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:3.0f} %" if whole else "  - %"


def _bar(part: int, whole: int, fill: str = "") -> str:
    length = min(20, round(20 * part / whole)) if whole else 0
    return "#" * length + fill * (20 - length)


def _largest(breakdown: Mapping[str, int], count: int) -> list[tuple[str, int]]:
    """The largest parts first; where there are more than ``count``, the rest is one part."""
    parts = sorted(((label, size) for label, size in breakdown.items() if size), key=lambda part: -part[1])
    if len(parts) <= count + 1:
        return parts
    return [*parts[:count], ("the rest", sum(size for _, size in parts[count:]))]
