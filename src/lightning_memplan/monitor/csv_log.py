"""Read a run back from the files of its ``CSVLogger``: its plan, and predicted and actual peaks."""

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

_MARK = "memplan/actual_reserved_gib"  #: ends the name of this column; a logger's prefix begins it

_STEP = {"allocated", "reserved"}  #: peaks of a step; every other peak is one of a phase


@dataclass(frozen=True, slots=True)
class Logged:
    """A run as a log folder keeps it.

    >>> Logged(Path("logs/version_0"), [Measurement(0, 99, 110, 100, 110)]).measurements[0].error_percent
    -1.0
    """

    folder: Path
    measurements: list[Measurement]
    validations: list[Peaks] = field(default_factory=list)
    plan: Mapping[str, str] = field(default_factory=dict)  #: hyperparameters named ``memplan/…``, without that prefix


def read_log(place: str | os.PathLike[str]) -> Logged:
    """Return the run in a log folder of a ``CSVLogger``, or the latest run in the folders below it.

    Raises:
        ValueError: There is no run, or none in which a ``MemoryPlanner`` measured steps.
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
            {
                name.removeprefix(prefix).removeprefix("memplan/"): float(text)
                for name, text in row.items()
                if _is_number(text)
            }
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
    """Return the plan among the hyperparameters of a file, which are flat names."""
    if not file.is_file():
        return {}
    found = re.findall(r"^memplan/(\w+): (.*)$", file.read_text(), re.MULTILINE)
    return {name: text.strip("'\"") for name, text in found}


def _bytes(row: Mapping[str, float], name: str) -> int:
    return round(row.get(name, 0.0) * GiB)


def _is_number(text: object) -> bool:
    """Return True for a cell with a number: other callbacks log other values, and some steps leave cells empty."""
    try:
        float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True
