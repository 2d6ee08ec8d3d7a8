"""Measured runs and history as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from lightning_memplan.report.plans import LIMITS
from lightning_memplan.report.text import WIDTH, draw_bar, format_row, share, shorten_end, shorten_middle, table, wrap
from lightning_memplan.types import Measurement, Peaks, Run
from lightning_memplan.units import GiB, format_bytes

_PHASES = ("batch", "forward", "backward", "optimizer")


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
    predictions = [m for m in measurements if m.predicted_allocated]
    predicted, actual = _highest(m.predicted_phases for m in measurements), _highest(m.phases for m in measurements)
    phases = {name: (predicted.get(name, 0), size) for name, size in actual.items()}
    rows = _peaks(
        (max(m.predicted_reserved for m in measurements), max(m.reserved for m in measurements)),
        (max(m.predicted_allocated for m in measurements), max(m.allocated for m in measurements)),
        phases | ({"validation": (0, max(peaks.allocated for peaks in validations))} if validations else {}),
    )
    lines = [f"memory over {steps}" + ("" if predictions else ", without predictions"), *rows]
    if predictions:
        worst = max(predictions, key=lambda m: abs(m.error_percent))
        middle = median(m.error_percent for m in predictions)
        of_steps = f"median {middle:+.1f} %, worst {worst.error_percent:+.1f} % in step {worst.step}"
        lines.append(f"  error of allocated, step by step: {of_steps}")
    over = [m for m in measurements if m.allocated > m.predicted_allocated > 0]
    if over:
        most = max(over, key=lambda m: m.allocated / m.predicted_allocated)
        more = 100 * (most.allocated / most.predicted_allocated - 1)
        text = f"{len(over)} of them allocated more than was predicted, at most {more:.1f} % more, in step {most.step}"
        lines += wrap(text, "  ")
    if len(ranks) > 1:
        first = max(range(len(ranks)), key=lambda rank: ranks[rank].reserved)
        lines.append(f"  of {len(ranks)} ranks, rank {first} reserved most: {format_bytes(ranks[first].reserved)}")
    if retries := sum(m.retries for m in measurements):
        lines += wrap(_retried(retries), "  ")
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
    lines = [shorten_middle(folder, WIDTH)]
    if plan:
        size = f"batch size {plan['batch_size']} on {plan['device']}, {LIMITS[plan['limited_by']]}"
        lines += wrap(f"{size}; {_planned(plan['method'], float(plan['margin']))}", "  ")
    lines.append(measurement_summary(measurements, validations=validations))
    if plan and measurements:
        lines.append(_card(max(m.reserved for m in measurements), round(float(plan["device_gib"]) * GiB)))
    return "\n".join(lines)


def _card(reserved: int, total: int) -> str:
    """How much of the card was reserved at most."""
    bar = draw_bar(reserved, total, fill=".")
    return format_row("card", format_bytes(total), f"{share(reserved, total)} of it reserved  [{bar}]")


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
        groups.setdefault(f"{shorten_end(run.model, 30)} on {run.device}", []).append(run)
    head = ("when (UTC)", "precision", "batch", "predicted", "actual", "error")
    lines = iter(table([head, *(_history_row(run) for group in groups.values() for run in group)], left=2).splitlines())
    title = f"  {next(lines)}"
    parts = []
    for name, group in groups.items():
        rows = [f"  {next(lines)}".rstrip() for _ in group]
        parts.append("\n".join([shorten_end(name, WIDTH), title, *rows]))
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
        shorten_end(str(run.settings.get("precision", "")), 11),
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
        *wrap(head),
        *wrap(", ".join(filter(None, parts)), "  "),
        *_peaks((most(run.predicted, 1), reserved), (most(run.predicted, 0), most(run.measured, 0)), run.phases),
        *([_card(reserved, run.total)] if reserved else []),
    ]
    if run.retries:
        lines += wrap(_retried(run.retries), "  ")
    lines += wrap(lesson, "  ") if lesson else []
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
        name = f"{shorten_end(run.model, 30)}{precision} on {run.device}, {runs} run{'s' * (runs != 1)}"
        lines.append(shorten_end(name, WIDTH))
        lines += wrap(text, "  ") if text else []
    return "\n".join(lines)
