"""Record predicted and measured peaks of each run in a file, and learn a margin from earlier runs."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_memplan.devices.detect import driver_version
from lightning_memplan.errors import issue_warning, located
from lightning_memplan.settings import StepSettings
from lightning_memplan.types import Device, Outcome, Plan, RunRecord, as_dict
from lightning_memplan.units import MiB

if TYPE_CHECKING:
    from lightning_memplan.monitor.meter import Meter

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


SCHEMA = 1

#: Number of similar runs that it takes to lower the margin.
ENOUGH = 3

#: Share of runs whose residual a margin covers: with fewer than 20 runs, it covers the largest residual.
QUANTILE = 0.95

#: The smallest margin that history can justify: other processes on the GPU come and go.
LEAST = 0.01

_LOCK_SECONDS = 2.0


def history_path(place: bool | str | os.PathLike[str] = True) -> Path | None:
    """Return the file that keeps the history: the one named, or the default; None if none is kept.

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


def load_history(path: str | os.PathLike[str] | None = None) -> list[RunRecord]:
    """Return the recorded runs, oldest first; read the default file if ``path`` is None.

    >>> load_history("no such file")
    []

    A damaged line is skipped with a warning and left in the file. A line of a later version is skipped.
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


def append(run: RunRecord, path: Path) -> None:
    """Append one run as one line that every reader sees whole or not at all, even while other processes append.

    The line is one ``write`` to a file opened for appending. On a local disk the kernel keeps such writes apart; on a
    network file system a lock (``flock``) does. If a process was killed halfway through its line, the next append
    begins a new line.

    Raises:
        OSError: The file cannot be written.
    """
    line = json.dumps({"schema": SCHEMA, **as_dict(run)}, separators=(",", ":")).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        with _locked(file):
            size = os.fstat(file).st_size
            cut = size > 0 and _last_byte(file, size) != b"\n"
            os.write(file, b"\n" + line if cut else line)
    finally:
        os.close(file)


def latest(runs: Sequence[RunRecord]) -> RunRecord:
    """Return the last recorded run; of its ranks, the one that reserved the most.

    >>> peaks = [{"first": (1, 3)}, {"first": (1, 2)}]
    >>> latest([RunRecord("a1", "Net", "T4", 9, 9, "trace", 8, {}, each, ranks=2) for each in peaks]).measured["first"]
    (1, 3)
    """
    last = runs[-1]
    ranks = [run for run in runs if run.structure == last.structure and run.ranks == last.ranks][-last.ranks :]
    return max(ranks, key=lambda run: max((reserved for _, reserved in run.measured.values()), default=0))


@dataclass(frozen=True, slots=True)
class Lesson:
    """Margin and batch sizes that earlier runs teach the next plan.

    >>> Lesson(margin=0.05).failed is None
    True
    """

    margin: float
    text: str = ""  #: the reason for the margin
    failed: int | None = None  #: smallest batch size that ran out of memory: same structure, as much capacity or more


def learn(
    path: Path | None, structure: str, device: Device, *, method: str, margin: float | None, prior: float
) -> Lesson:
    """Return the lesson of the runs recorded in ``path``, or the user's own ``margin`` unless that is None.

    >>> learn(None, "a1", Device("T4", total=2**34), method="trace", margin=None, prior=0.05).margin
    0.05

    Warns if the file cannot be read, and learns nothing then.
    """
    if margin is not None or path is None:
        return Lesson(prior if margin is None else margin)
    try:
        runs = load_history(path)
    except OSError as error:
        issue_warning(f"MemoryPlanner: the history of earlier runs cannot be read: {located(error)}")
        runs = []
    return lesson(runs, structure, device.name, method=method, capacity=device.capacity, prior=prior)


def lesson(
    runs: Sequence[RunRecord], structure: str, device: str, *, method: str, capacity: int, prior: float
) -> Lesson:
    """Return the margin that earlier runs justify for the next run of ``structure``, on a GPU named ``device``.

    The residual of a run is the largest ratio of a measured peak to its prediction. The margin leaves room for the 95 %
    quantile of the residuals (nearest rank: the largest of fewer than 20).

    - With three runs of this structure or more, it is that margin, but at least 1 %.
    - With one or two, it is that margin or the ``prior``, whichever is larger.
    - With none, but three of other structures planned by the same method, likewise.
    - A run of this structure that ran out of memory needed more than there was: the margin is at least the one that
      would have ruled its prediction out.

    >>> lesson([], "a1", "T4", method="trace", capacity=2**34, prior=0.05)
    Lesson(margin=0.05, text='', failed=None)
    """
    same_device = [run for run in runs if run.device == device]
    alike = [run for run in same_device if run.structure == structure]
    out = [run for run in alike if run.outcome == "out of memory"]
    failed = min((run.batch_size for run in out if run.capacity >= capacity), default=None)
    like = alike or [run for run in same_device if run.method == method]
    ratios = [ratio for run in like if run.outcome != "out of memory" and (ratio := residual(run)) is not None]
    count = sum(run.rank == 0 and run.outcome != "out of memory" and bool(run.measured) for run in like)
    if not alike and count < ENOUGH:
        return Lesson(prior)
    margins = [_margin_for(sorted(ratios)[math.ceil(QUANTILE * len(ratios)) - 1])] if ratios else []
    if count < ENOUGH or not alike:
        margins.append(prior)
    # A run that ran out of memory was predicted to fit. This margin leaves it one allocator segment (2 MiB) short.
    margins += [1 - (max(p for _, p in run.predicted.values()) - 2 * MiB) / run.capacity for run in out]
    margin = min(max(LEAST, *margins), 0.99)
    whose = f"{'run' if count == 1 else 'runs'} of {'this module' if alike else 'other modules'}"
    said = [f"{count} {whose} took at most {100 * (max(ratios) - 1):+.1f} % of the prediction"] if ratios else []
    if out:
        said.append(f"this module ran out of memory at batch size {min(run.batch_size for run in out)}")
    return Lesson(margin, f"{', '.join(said)}: margin {100 * margin:.1f} %", failed)


def residual(run: RunRecord) -> float | None:
    """Return the largest ratio of a measured peak to its prediction (1.02 is 2 % more), None if nothing was measured.

    >>> residual(RunRecord("a1", "Net", "T4", 2**34, 2**34, "trace", 8, {"steady": (100, 200)}, {"steady": (90, 204)}))
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
    """Return the fraction of the GPU that must stay free for a prediction times ``ratio`` to fit."""
    return max(0.0, 1 - 1 / ratio) if ratio > 0 else 0.0


_FIELDS = {field.name: field for field in fields(RunRecord)}

_REQUIRED = ("structure", "model", "device", "total", "capacity", "method", "batch_size", "predicted", "measured")


def _from_line(line: bytes) -> RunRecord | None:
    """Return the run of one line, None if a later version wrote it.

    Raises:
        ValueError, TypeError, KeyError: The line is damaged.
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
    return RunRecord(**values)


def _pairs(found: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    return {str(kind): (int(a), int(b)) for kind, (a, b) in found.items()}


@contextmanager
def _locked(file: int) -> Iterator[None]:
    """Hold the file's lock; go on without it after two seconds."""
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
    yield  # closing the file releases the lock


def _last_byte(file: int, size: int) -> bytes:
    os.lseek(file, size - 1, os.SEEK_SET)
    return os.read(file, 1)


@dataclass(frozen=True, slots=True)
class RunSetup:
    """Identify a run: the module and its settings, and the place of this process among the ranks.

    >>> RunSetup("a1", "Net", StepSettings()).ranks
    1
    """

    structure: str  #: hash of the module's layers, its step and its settings
    model: str
    settings: StepSettings
    rank: int = 0
    ranks: int = 1


def remember(path: Path | None, meter: Meter, plan: Plan, setup: RunSetup, outcome: Outcome) -> None:
    """Record a run in the file ``path``, unless it ended before its first step for another reason than memory.

    Warns if the file cannot be written.
    """
    if path is None or not (meter.measurements or outcome == "out of memory"):
        return
    try:
        append(run_record(meter, plan, setup, outcome), path)
    except OSError as error:
        issue_warning(
            f"MemoryPlanner: this run is not kept in the history: {located(error)}; name a file by history='...', "
            "or pass history=False",
        )


def run_record(meter: Meter, plan: Plan, setup: RunSetup, outcome: Outcome) -> RunRecord:
    """Return a run as the history keeps it.

    Its peaks leave out the bytes that were allocated before planning, as the plan leaves them out of the capacity.
    """
    import torch

    from lightning_memplan.monitor.meter import PHASES

    already_allocated = meter.forecast.already_allocated

    def highest(peaks: Iterable[tuple[int, int]]) -> tuple[int, int]:
        allocated, reserved = zip(*peaks, strict=True)
        return max(allocated) - already_allocated, max(reserved) - already_allocated

    steps = {"first": meter.measurements[:1], "steady": meter.measurements[1:]}
    ran = {kind: measured for kind, measured in steps.items() if measured}
    predicted = {
        kind: highest((m.predicted_allocated, m.predicted_reserved) for m in measured) for kind, measured in ran.items()
    }
    phases = {
        name: highest(
            (m.predicted_phases.get(name, already_allocated), m.phases[name])
            for m in meter.measurements
            if name in m.phases
        )
        for name in PHASES
        if any(name in m.phases for m in meter.measurements)
    }
    if outcome == "out of memory":
        predicted["failed"] = highest([(meter.predicted.allocated, meter.predicted.reserved)])
    return RunRecord(
        structure=setup.structure,
        model=setup.model,
        device=plan.device.name,
        total=plan.device.total,
        capacity=plan.device.capacity,
        method=plan.method,
        batch_size=plan.batch_size,
        predicted=predicted,
        measured={kind: highest((m.allocated, m.reserved) for m in measured) for kind, measured in ran.items()},
        outcome=outcome,
        steps=meter.step,
        retries=meter.retries,
        margin=plan.margin,
        settings=_recorded_settings(setup.settings),
        versions={
            "lightning-memplan": version("lightning-memplan"),
            "torch": torch.__version__,
            "driver": driver_version(),
        },
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        rank=setup.rank,
        ranks=setup.ranks,
        phases=phases,
    )


def _recorded_settings(settings: StepSettings) -> dict[str, object]:
    """Return the settings as plain values; a strategy's arguments may hold objects that cannot be copied."""
    parallel = settings.parallel
    ranks = None if parallel is None else f"{parallel.kind} on {parallel.ranks} ranks"
    return asdict(replace(settings, parallel=None)) | {"parallel": ranks}
