"""Keep a file of what earlier runs needed against what was predicted, and the margin that it justifies."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_memplan.devices.detect import driver_version
from lightning_memplan.types import Outcome, Plan, Run
from lightning_memplan.units import MiB

if TYPE_CHECKING:
    from lightning_memplan.monitor.meter import Meter

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


SCHEMA = 1


#: Runs alike that must be there before they can lower the margin.
ENOUGH = 3


#: The share of runs whose residual a margin covers: of fewer than 20 runs, that is the largest.
QUANTILE = 0.95


#: The smallest margin that history can justify: the card's other users come and go.
LEAST = 0.01


_LOCK_SECONDS = 2.0


def history_path(place: bool | str | os.PathLike[str] = True) -> Path | None:
    """Where history is kept: the place that was named, or the default; None where none is kept.

    >>> history_path("runs.jsonl").name, history_path(False)
    ('runs.jsonl', None)
    """
    if place is False:
        return None
    named = os.environ.get("MEMPLAN_HISTORY") if place is True else os.fspath(place)
    if named:
        return None if named == "off" else Path(named).expanduser()
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "lightning-memplan" / "history.jsonl"


def history(path: str | os.PathLike[str] | None = None) -> list[Run]:
    """The runs on record, the oldest first; ``path`` is the default's where nothing is said.

    >>> history("no such file")
    []

    A line that is damaged is left in the file and skipped, with a warning; one of a later version is skipped.
    """
    place = history_path(True if path is None else path)
    try:
        lines = [] if place is None else place.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    runs, damaged = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            if (run := _from_line(line)) is not None:
                runs.append(run)
        except (ValueError, TypeError, KeyError):
            damaged.append(number)
    if damaged:
        first = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        which = f"line {first} of {place} is" if len(damaged) == 1 else f"lines {first} of {place} are"
        warnings.warn(f"{which} damaged and skipped: no run of lightning-memplan's reads so", stacklevel=2)
    return runs


def append(run: Run, path: Path) -> None:
    """Add one run as one line, whole or not at all for every reader, whatever other processes append meanwhile.

    The line is one ``write`` to a file opened for appending, which the kernel does not mix with another's on a local
    disk; a lock (``flock``) keeps that so on network file systems. Where a process was killed half way through its
    line, the next one begins a new line.

    Raises:
        OSError: the file cannot be written.
    """
    line = json.dumps({"schema": SCHEMA, **asdict(run)}, separators=(",", ":"), default=str).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        with _locked(file):
            size = os.fstat(file).st_size
            cut = size > 0 and _last_byte(file, size) != b"\n"
            os.write(file, b"\n" + line if cut else line)
    finally:
        os.close(file)


def latest(runs: Sequence[Run]) -> Run:
    """The run that was added last; of its ranks, that which reserved the most.

    >>> first, other = (Run("a1", "Net", "T4", 9, 9, "trace", 8, {}, {"first": (1, size)}, ranks=2) for size in (3, 2))
    >>> latest([first, other]).measured["first"]
    (1, 3)
    """
    last = runs[-1]
    ranks = [run for run in runs if run.structure == last.structure and run.ranks == last.ranks][-last.ranks :]
    return max(ranks, key=lambda run: max((reserved for _, reserved in run.measured.values()), default=0))


@dataclass(frozen=True, slots=True)
class Lesson:
    """What earlier runs teach the next plan: its margin, why, and batch sizes that ran out of memory.

    ``failed`` is the smallest batch size at which this very structure ran out of memory on such a card with at least as
    much room.
    """

    margin: float
    text: str = ""
    failed: int | None = None


def lesson(
    runs: Sequence[Run], structure: str, device: str, *, method: str, capacity: int, prior: float
) -> Lesson:  # fmt: skip
    """The margin that runs like the one to come justify, on a card of the name ``device``.

    A run's residual is the most that any of its peaks was of what was predicted of it; the margin leaves room for the
    95 % quantile of the residuals (nearest rank: the largest of fewer than 20).

    - Three runs or more of this structure: that margin, at least 1 %.
    - Fewer: that margin or the ``prior``, whichever is larger.
    - None, but three of other structures, planned by the same method: likewise.
    - A run of this structure that ran out of memory took more than there was: no margin is smaller than what would have
      kept its prediction out.

    >>> lesson([], "a1", "T4", method="trace", capacity=2**34, prior=0.05)
    Lesson(margin=0.05, text='', failed=None)
    """
    same_card = [run for run in runs if run.device == device]
    alike = [run for run in same_card if run.structure == structure]
    out = [run for run in alike if run.outcome == "out of memory"]
    failed = min((run.batch_size for run in out if run.capacity >= capacity), default=None)
    like = alike or [run for run in same_card if run.method == method]
    ratios = [ratio for run in like if run.outcome != "out of memory" and (ratio := residual(run)) is not None]
    count = sum(run.rank == 0 and run.outcome != "out of memory" and bool(run.measured) for run in like)
    if not alike and count < ENOUGH:
        return Lesson(prior)
    margins = [_margin_for(sorted(ratios)[math.ceil(QUANTILE * len(ratios)) - 1])] if ratios else []
    if count < ENOUGH or not alike:
        margins.append(prior)
    # what ran out of memory was predicted to fit: next time it is a segment of the allocator's short of fitting
    margins += [1 - (max(p for _, p in run.predicted.values()) - 2 * MiB) / run.capacity for run in out]
    margin = min(max(LEAST, *margins), 0.99)
    whose = f"{'run' if count == 1 else 'runs'} of {'this module' if alike else 'other modules'}"
    said = [f"{count} {whose} took at most {100 * (max(ratios) - 1):+.1f} % of the prediction"] if ratios else []
    if out:
        said.append(f"this module ran out of memory at batch size {min(run.batch_size for run in out)}")
    return Lesson(margin, f"{', '.join(said)}: margin {100 * margin:.1f} %", failed)


def residual(run: Run) -> float | None:
    """The most that any peak of a run was of its prediction: 1.02 is 2 % more. None where nothing was measured.

    >>> residual(Run("a1", "Net", "T4", 2**34, 2**34, "trace", 8, {"steady": (100, 200)}, {"steady": (90, 204)}))
    1.02
    """
    ratios = [
        actual / predicted
        for kind, peaks in run.measured.items()
        for actual, predicted in zip(peaks, run.predicted.get(kind, ()), strict=False)
        if predicted
    ]
    return max(ratios, default=None)


def _margin_for(ratio: float) -> float:
    """The part of the card that must stay free for a prediction times ``ratio`` to fit."""
    return max(0.0, 1 - 1 / ratio) if ratio > 0 else 0.0


_FIELDS = {field.name: field for field in fields(Run)}


_REQUIRED = ("structure", "model", "device", "total", "capacity", "method", "batch_size", "predicted", "measured")


def _from_line(line: bytes) -> Run | None:
    """A line's run; None where a later version wrote it.

    Raises:
        ValueError, TypeError, KeyError: the line is damaged.
    """
    found: Any = json.loads(line)
    if int(found["schema"]) > SCHEMA:
        return None
    values = {name: value for name, value in found.items() if name in _FIELDS}
    for name in _REQUIRED:
        wanted = str if _FIELDS[name].type == "str" else int if _FIELDS[name].type == "int" else dict
        if type(values[name]) is not wanted:
            raise TypeError(f"{name} is {values[name]!r}")
    for name in ("predicted", "measured"):
        values[name] = _pairs(values[name])
    values["phases"] = _pairs(values.get("phases", {}))
    return Run(**values)


def _pairs(found: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    return {str(kind): (int(a), int(b)) for kind, (a, b) in found.items()}


@contextmanager
def _locked(file: int) -> Iterator[None]:
    """Hold the file's lock, if it can be had within two seconds; else go on without."""
    until = time.monotonic() + _LOCK_SECONDS
    while fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < until:
                time.sleep(0.005)
                continue
        except OSError:  # a file system without locks
            pass
        break
    yield  # the lock goes with the file


def _last_byte(file: int, size: int) -> bytes:
    os.lseek(file, size - 1, os.SEEK_SET)
    return os.read(file, 1)


def run_record(
    meter: Meter,
    plan: Plan,
    *,
    structure: str,
    model: str,
    outcome: Outcome,
    settings: Mapping[str, Any],
    rank: int,
    ranks: int,
    held: int,
) -> Run:
    """A run as history keeps it: its peaks without the bytes ``held``, which the plan leaves out of the capacity."""

    import torch

    from lightning_memplan.monitor.meter import PHASES

    def most(peaks: Iterable[tuple[int, int]]) -> tuple[int, int]:
        allocated, reserved = zip(*peaks, strict=True)
        return max(allocated) - held, max(reserved) - held

    kinds = {"first": meter.measurements[:1], "steady": meter.measurements[1:]}
    ran = {kind: steps for kind, steps in kinds.items() if steps}
    predicted = {
        kind: most((m.predicted_allocated, m.predicted_reserved) for m in steps) for kind, steps in ran.items()
    }
    phases = {
        name: most((m.predicted_phases.get(name, held), m.phases[name]) for m in meter.measurements if name in m.phases)
        for name in PHASES
        if any(name in m.phases for m in meter.measurements)
    }
    if outcome == "out of memory":
        predicted["failed"] = most([(meter.predicted.allocated, meter.predicted.reserved)])
    return Run(
        structure=structure,
        model=model,
        device=plan.device.name,
        total=plan.device.total,
        capacity=plan.device.capacity,
        method=plan.method,
        batch_size=plan.batch_size,
        predicted=predicted,
        measured={kind: most((m.allocated, m.reserved) for m in steps) for kind, steps in ran.items()},
        outcome=outcome,
        steps=len(meter.measurements),
        retries=sum(m.retries for m in meter.measurements),
        margin=plan.margin,
        settings=settings,
        versions={
            "lightning-memplan": version("lightning-memplan"),
            "torch": torch.__version__,
            "driver": driver_version(),
        },
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        rank=rank,
        ranks=ranks,
        phases=phases,
    )
