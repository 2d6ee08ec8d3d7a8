"""Read back what a run's ``CSVLogger`` wrote: its plan, and predicted and actual peaks."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lightning_memplan.types import Measurement, Peaks
from lightning_memplan.units import GiB

_METRICS, _HPARAMS = "metrics.csv", "hparams.yaml"


_MARK = "memplan/actual_reserved_gib"


_STEP = {"allocated", "reserved"}  #: what is predicted of a step; all else that is, is of a phase


@dataclass(frozen=True, slots=True)
class Logged:
    """A run as its log folder has it: ``plan`` are the hyperparameters that begin with ``memplan/``, without that."""

    folder: Path
    measurements: list[Measurement]
    validations: list[Peaks] = field(default_factory=list)
    plan: Mapping[str, str] = field(default_factory=dict)


def read_log(place: str | os.PathLike[str]) -> Logged:
    """The run in a folder of ``CSVLogger``'s, or the last written of those in the folders below it.

    Raises:
        ValueError: there is none, or none in which a ``MemoryPlanner`` measured steps.
    """
    place = Path(place)
    below = (file for part in ("", "*/", "*/*/") for file in place.glob(part + _METRICS))
    found = [place] if place.is_file() else list(below)
    for file in sorted(found, key=lambda file: file.stat().st_mtime, reverse=True):
        if logged := _read(file):
            return logged
    if not found:
        raise ValueError(f"{str(place)!r} has no {_METRICS}: name the folder that a CSVLogger wrote, or its log_dir")
    raise ValueError(
        f"{str(found[0])!r} has no memory in it: a MemoryPlanner logs it where the Trainer runs on a CUDA device"
    )


def _read(file: Path) -> Logged | None:
    with file.open(newline="") as lines:
        rows = csv.DictReader(lines)
        column = next((name for name in rows.fieldnames or () if name.endswith(_MARK)), None)
        if column is None:
            return None
        prefix = column.removesuffix(_MARK)
        values = [
            {name.removeprefix(prefix).removeprefix("memplan/"): float(text) for name, text in row.items() if _is(text)}
            for row in rows
        ]
    steps = [_measurement(row) for row in values if "actual_reserved_gib" in row]
    validations = [
        Peaks(_bytes(row, "validation_allocated_gib"), _bytes(row, "validation_reserved_gib"))
        for row in values
        if "validation_reserved_gib" in row
    ]
    return Logged(file.parent, steps, validations, _plan(file.with_name(_HPARAMS)))


def _measurement(row: Mapping[str, float]) -> Measurement:
    def phases(kind: str) -> dict[str, int]:
        names = (match[1] for name in row if (match := re.fullmatch(rf"{kind}_(\w+)_gib", name)))
        return {name: _bytes(row, f"{kind}_{name}_gib") for name in names if name not in _STEP}

    return Measurement(
        step=int(row.get("step", 0)),
        predicted_allocated=_bytes(row, "predicted_allocated_gib"),
        predicted_reserved=_bytes(row, "predicted_reserved_gib"),
        allocated=_bytes(row, "actual_allocated_gib"),
        reserved=_bytes(row, "actual_reserved_gib"),
        predicted_phases=phases("predicted"),
        phases=phases("actual"),
        floor=_bytes(row, "floor_gib"),
        retries=int(row.get("retries", 0)),
        device_allocations=int(row.get("device_allocations", 0)),
    )


def _plan(file: Path) -> dict[str, str]:
    """The plan among the hyperparameters, whatever else the file has: flat names, as they were logged."""
    if not file.is_file():
        return {}
    found = re.findall(r"^memplan/(\w+): (.*)$", file.read_text(), re.MULTILINE)
    return {name: text.strip("'\"") for name, text in found}


def _bytes(row: Mapping[str, float], name: str) -> int:
    return round(row.get(name, 0.0) * GiB)


def _is(text: object) -> bool:
    """Whether a cell has a number: other callbacks log what they like, and steps without a metric leave it empty."""
    try:
        float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True
