"""Measured runs and the history as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from lightning_memplan.report.text import WIDTH, draw_bar, format_row, percent, shorten_end, table, wrap
from lightning_memplan.types import Measurement, Peaks, RunRecord
from lightning_memplan.units import format_bytes

_PHASES = ("batch", "forward", "backward", "optimizer")  #: in a step's order


@dataclass(frozen=True, slots=True)
class _Peak:
    """A peak as predicted and as measured (bytes); 0 where one of them is not known."""

    predicted: int
    actual: int

    @property
    def error(self) -> str:
        """The prediction's error in percent of the actual peak; empty where it is not known."""
        known = self.predicted and self.actual
        return f"{100 * (self.predicted - self.actual) / self.actual:+.1f} %" if known else ""


# --- measurements


def measurement_summary(
    measurements: Sequence[Measurement],
    ranks: Sequence[Peaks] = (),
    validations: Sequence[Peaks] = (),
    steps: int | None = None,
    retries: int | None = None,
) -> str:
    """Return the highest peaks over all measured steps, predicted and actual; of several ranks, which reserved most.

    ``steps`` and ``retries`` count those of a run of which not all measurements are kept.

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
    steps = len(measurements) if steps is None else steps
    retries = sum(m.retries for m in measurements) if retries is None else retries
    predicted, actual = _highest(m.predicted_phases for m in measurements), _highest(m.phases for m in measurements)
    phases = {name: _Peak(predicted.get(name, 0), size) for name, size in actual.items()}
    if validations:
        phases["validation"] = _Peak(0, max(peaks.allocated for peaks in validations))
    reserved = _Peak(max(m.predicted_reserved for m in measurements), max(m.reserved for m in measurements))
    allocated = _Peak(max(m.predicted_allocated for m in measurements), max(m.allocated for m in measurements))
    without = "" if any(m.predicted_allocated for m in measurements) else ", without predictions"
    head = f"memory over {steps:,} measured step{'s' * (steps != 1)}{without}"
    kept = "step by step" if steps == len(measurements) else f"{len(measurements):,} steps"
    lines = [head, *_peak_lines(reserved, allocated, phases), *_error_lines(measurements, kept)]
    if len(ranks) > 1:
        first = max(range(len(ranks)), key=lambda rank: ranks[rank].reserved)
        lines.append(f"  of {len(ranks)} ranks, rank {first} reserved most: {format_bytes(ranks[first].reserved)}")
    if retries:
        lines += wrap(_retried(retries), "  ")
    return "\n".join(lines)


def _error_lines(measurements: Sequence[Measurement], which: str) -> list[str]:
    """Return the errors of the steps: the median, the worst, and how far the actual peak was above its prediction."""
    measurements = [m for m in measurements if m.predicted_allocated]
    if not measurements:
        return []
    worst = max(measurements, key=lambda m: abs(m.error_percent))
    errors = f"median {median(m.error_percent for m in measurements):+.1f} %, worst {worst.error_percent:+.1f} %"
    lines = [f"  error of allocated, {which}: {errors} in step {worst.step}"]
    over = [m for m in measurements if m.allocated > m.predicted_allocated > 0]
    if over:
        most = max(over, key=lambda m: m.allocated / m.predicted_allocated)
        more = 100 * (most.allocated / most.predicted_allocated - 1)
        text = f"{len(over)} of them allocated more than was predicted, at most {more:.1f} % more, in step {most.step}"
        lines += wrap(text, "  ")
    return lines


def _card_line(reserved: int, total: int) -> str:
    """Return how much of the GPU was reserved at most."""
    bar = draw_bar(reserved, total, fill=".")
    return format_row("GPU", format_bytes(total), f"{percent(reserved, total)} of it reserved  [{bar}]")


def _peak_lines(reserved: _Peak, allocated: _Peak, phases: Mapping[str, _Peak]) -> list[str]:
    """Return predicted and actual peaks, a line each; of the phases the known ones first, in a step's order."""

    def line(label: str, peak: _Peak) -> str:
        predicted, actual = (format_bytes(size) if size else "" for size in (peak.predicted, peak.actual))
        return f"  {label:<15}{predicted:>11}  {actual:>11}  {peak.error:>9}".rstrip()

    known = [name for name in _PHASES if name in phases]
    return [
        f"  {'':<15}{'predicted':>11}  {'actual':>11}  {'error':>9}",
        line("peak reserved", reserved),
        line("peak allocated", allocated),
        *(line(f"  {name}", phases[name]) for name in (*known, *(name for name in phases if name not in known))),
    ]


def _highest(sizes: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the largest size of each name."""
    found: dict[str, int] = {}
    for each in sizes:
        found.update({name: max(size, found.get(name, 0)) for name, size in each.items()})
    return found


def _planned(method: str, margin: float) -> str:
    return f"planned by {method}, margin {100 * margin:.1f} %"


def _retried(times: int) -> str:
    often = "once" if times == 1 else f"{times} times"
    return f"the allocator gave its cache back {often} to serve a request, which takes time: the GPU was full"


# --- history
def history_table(runs: Sequence[RunRecord]) -> str:
    """Return earlier runs by module and GPU, a line each: the predicted and the actual reserved peak, and the error.

    >>> print(history_table([RunRecord("a1", "Net", "T4", 2**34, 2**34, "trace", 8, {"steady": (2**30, 2**31)},
    ...                          {"steady": (2**30, 2**31)}, time="2026-11-20T08:00:00+00:00")]))
    Net on T4
      when (UTC)        precision  batch  predicted    actual   error
      2026-11-20 08:00                 8   2.00 GiB  2.00 GiB  +0.0 %
    """
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(f"{shorten_end(run.model, 30)} on {run.device}", []).append(run)
    head = ("when (UTC)", "precision", "batch", "predicted", "actual", "error")
    lines = iter(table([head, *(_history_row(run) for group in groups.values() for run in group)], left=2).splitlines())
    title = f"  {next(lines)}"
    parts = []
    for name, group in groups.items():
        rows = [f"  {next(lines)}".rstrip() for _ in group]
        parts.append("\n".join([shorten_end(name, WIDTH), title, *rows]))
    return "\n\n".join(parts)


def _history_row(run: RunRecord) -> tuple[str, ...]:
    predicted, actual = _highest_reserved(run.predicted), _highest_reserved(run.measured)
    error = f"{100 * (predicted - actual) / actual:+.1f} %" if actual else ""
    if run.outcome == "out of memory":
        error = run.outcome
    elif run.outcome != "done":
        error = f"{error}, {run.outcome}"
    return (
        _when(run),
        shorten_end(str(run.settings.get("precision", "")), 11),
        str(run.batch_size),
        format_bytes(predicted),
        format_bytes(actual) if actual else "-",
        error,
    )


def _when(run: RunRecord) -> str:
    return run.time[:16].replace("T", " ")


def run_report(run: RunRecord, lesson: str = "") -> str:
    """Return one run of the history: how it was planned, how it ended, its peaks, and the lesson of runs like it.

    >>> print(run_report(RunRecord("a1", "Net", "T4", 2**34, 2**34, "trace", 8, {"steady": (2**30, 2**31)},
    ...                      {"steady": (2**30, 2**31)}, steps=20, phases={"backward": (2**30, 2**30)},
    ...                      margin=0.05, time="2026-11-20T08:00:00+00:00")))
    Net on T4, 2026-11-20 08:00 UTC: done, 20 steps
      batch size 8, planned by trace, margin 5.0 %
                       predicted       actual      error
      peak reserved     2.00 GiB     2.00 GiB     +0.0 %
      peak allocated    1.00 GiB     1.00 GiB     +0.0 %
        backward        1.00 GiB     1.00 GiB     +0.0 %
      GPU              16.00 GiB   12 % of it reserved  [##..................]
    """
    when = f", {_when(run)} UTC" if run.time else ""
    ended = {"done": "done,", "stopped": "stopped after"}.get(run.outcome)
    how = f"{ended} {run.steps} step{'s' * (run.steps != 1)}" if ended else f"{run.outcome} in step {run.steps}"
    parts = [f"batch size {run.batch_size}", str(run.settings.get("precision", "")), _planned(run.method, run.margin)]
    if run.ranks > 1:
        parts.append(f"rank {run.rank} of {run.ranks}, which reserved most")
    reserved = _Peak(_highest_reserved(run.predicted), _highest_reserved(run.measured))
    allocated = _Peak(_highest_allocated(run.predicted), _highest_allocated(run.measured))
    lines = [
        *wrap(f"{run.model} on {run.device}{when}: {how}"),
        *wrap(", ".join(filter(None, parts)), "  "),
        *_peak_lines(reserved, allocated, {name: _Peak(*pair) for name, pair in run.phases.items()}),
    ]
    if reserved.actual:
        lines.append(_card_line(reserved.actual, run.total))
    if run.retries:
        lines += wrap(_retried(run.retries), "  ")
    if lesson:
        lines += wrap(lesson, "  ")
    return "\n".join(lines)


def _highest_allocated(peaks: Mapping[str, tuple[int, int]]) -> int:
    return max((allocated for allocated, _ in peaks.values()), default=0)


def _highest_reserved(peaks: Mapping[str, tuple[int, int]]) -> int:
    return max((reserved for _, reserved in peaks.values()), default=0)


def lessons_table(rows: Iterable[tuple[RunRecord, int, str]]) -> str:
    """Return what earlier runs teach; a row is one of the runs, how many there are, and the lesson's text.

    >>> run = RunRecord("a1", "Net", "T4", 2**34, 2**34, "trace", 8, {}, {}, settings={"precision": "16-mixed"})
    >>> print(lessons_table([(run, 3, "3 runs of this module took at most +0.0 %: margin 1.0 %")]))
    Net in 16-mixed on T4, 3 runs
      3 runs of this module took at most +0.0 %: margin 1.0 %
    """
    lines: list[str] = []
    for run, runs, text in rows:
        precision = f" in {run.settings['precision']}" if "precision" in run.settings else ""
        name = f"{shorten_end(run.model, 30)}{precision} on {run.device}, {runs} run{'s' * (runs != 1)}"
        lines.append(shorten_end(name, WIDTH))
        lines += wrap(text, "  ") if text else []
    return "\n".join(lines)
