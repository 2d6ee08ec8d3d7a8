"""Metrics for loggers: a plan's hyperparameters, the peaks of steps and of validations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning_memplan.types import Measurement, Peaks, Plan
from lightning_memplan.units import GiB, gib


def plan_hparams(plan: Plan) -> dict[str, int | float | str]:
    """Return a plan as flat hyperparameters, for any logger; sizes in GiB.

    >>> from lightning_memplan.types import Device
    >>> plan = Plan(batch_size=8, device=Device("card", total=2**34), budget=2**33, margin=0.5, limited_by="memory",
    ...             method="trace", peak_reserved=2**32, peak_allocated=2**31, formula_peak=2**31,
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
        "memplan/predicted_reserved_gib": gib(plan.peak_reserved),
        "memplan/predicted_allocated_gib": gib(plan.peak_allocated),
        "memplan/formula_gib": gib(plan.formula_peak),
        **({} if plan.confirmed is None else {"memplan/confirmed_gib": gib(plan.confirmed)}),
        **{f"memplan/{method}_gib": gib(peak) for method, peak in plan.methods.items()},
        **{f"memplan/{category}_gib": gib(size) for category, size in plan.breakdown.items()},
    }


# --- measurements
def step_metrics(measurement: Measurement, formula_bytes: int) -> dict[str, float]:
    """Return one step's metrics: predicted and actual peaks in GiB, and the error of the allocated peak in percent.

    Phases and NVML's bytes are among them if they were measured.

    >>> step_metrics(Measurement(1, 2**30, 2**31, 2**30, 2**31), formula_bytes=2**29)["memplan/formula_gib"]
    0.5
    """
    predicted = {
        "memplan/predicted_reserved_gib": measurement.predicted_reserved / GiB,
        "memplan/predicted_allocated_gib": measurement.predicted_allocated / GiB,
        "memplan/error_percent": measurement.error_percent,
        "memplan/formula_gib": formula_bytes / GiB,
    }
    metrics = {
        **(predicted if measurement.predicted_allocated else {}),
        "memplan/actual_reserved_gib": measurement.reserved / GiB,
        "memplan/actual_allocated_gib": measurement.allocated / GiB,
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


def scalars_layout(phases: Iterable[str]) -> dict[str, dict[str, list[str | list[str]]]]:
    """Return TensorBoard's charts of predicted and actual peaks together, for ``SummaryWriter.add_custom_scalars``.

    TensorBoard matches tags as regular expressions from the left: a logger may put a prefix before a metric's name.

    >>> charts = scalars_layout(["backward"])["memplan"]
    >>> charts["peak reserved (GiB)"]
    ['Multiline', ['.*memplan/predicted_reserved_gib$', '.*memplan/actual_reserved_gib$']]
    >>> list(charts)
    ['peak reserved (GiB)', 'peak allocated (GiB)', 'backward: peak allocated (GiB)', 'error (%)']
    """

    def chart(*names: str) -> list[str | list[str]]:
        return ["Multiline", [f".*memplan/{name}$" for name in names]]

    def pair(kind: str) -> list[str | list[str]]:
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
    """Return the peaks of a validation, in GiB.

    >>> validation_metrics(Peaks(allocated=2**30, reserved=2**31))
    {'memplan/validation_reserved_gib': 2.0, 'memplan/validation_allocated_gib': 1.0}
    """
    return {
        "memplan/validation_reserved_gib": gib(peaks.reserved),
        "memplan/validation_allocated_gib": gib(peaks.allocated),
    }


def ranks_metrics(ranks: Sequence[Peaks]) -> dict[str, float]:
    """Return the highest peaks of any rank, in GiB.

    >>> ranks_metrics([Peaks(allocated=2**30, reserved=2**31), Peaks(allocated=2**29, reserved=3 * 2**30)])
    {'memplan/ranks_reserved_gib': 3.0, 'memplan/ranks_allocated_gib': 1.0}
    """
    return {
        "memplan/ranks_reserved_gib": gib(max(peaks.reserved for peaks in ranks)),
        "memplan/ranks_allocated_gib": gib(max(peaks.allocated for peaks in ranks)),
    }
