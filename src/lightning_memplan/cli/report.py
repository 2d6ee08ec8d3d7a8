"""``memplan report``: a run of the history, predicted against actual."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from lightning_memplan.cli.arguments import add_history_file
from lightning_memplan.cli.history import NO_RUNS, read_runs
from lightning_memplan.cli.output import UsageError, show
from lightning_memplan.monitor.history import Lesson, latest, lesson
from lightning_memplan.report.runs import lessons_table, run_report
from lightning_memplan.settings import MARGIN
from lightning_memplan.types import RunRecord, as_dict

HELP = "a run, predicted against actual, and what earlier runs teach the next plan"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_history_file(parser)
    text = "words of a module's or GPU's name (default: the last run on record)"
    parser.add_argument("words", nargs="*", metavar="RUN", help=text)


def run(args: argparse.Namespace) -> None:
    text = " ".join(args.words)
    runs = read_runs(args.file)
    words = text.lower().split()
    named = [each for each in runs if all(word in f"{each.model} {each.device}".lower() for word in words)]
    if text and not named:
        raise UsageError(f"no module or GPU on record is called {text!r}: memplan history lists the runs")
    if not named:
        show({"run": None, "lessons": []} if args.json else NO_RUNS, as_json=args.json)
        return
    last = latest(named)
    first, *others = _groups(runs, [last, *named])
    if args.json:
        show({"run": as_dict(last), "lessons": [group.fields() for group in (first, *others)]}, as_json=True)
        return
    show(run_report(last, first.lesson.text), as_json=False)
    if others:
        rows = [(group.last, group.count, group.lesson.text) for group in others]
        show("\n" + lessons_table(rows), as_json=False)


@dataclass(frozen=True)
class _Group:
    """Runs of one structure on one GPU: the last run, the number of runs, and what they teach the next plan."""

    last: RunRecord
    count: int
    lesson: Lesson

    def fields(self) -> dict[str, object]:
        """Return plain values, for JSON."""
        run = self.last
        names = {"model": run.model, "device": run.device, "precision": run.settings.get("precision")}
        return {**names, "runs": self.count, **asdict(self.lesson)}


def _groups(runs: Sequence[RunRecord], named: Sequence[RunRecord]) -> Iterator[_Group]:
    """Group the runs that are like one of those named; the group of the first of these comes first."""
    groups: dict[tuple[str, str], list[RunRecord]] = {(run.device, run.structure): [] for run in named}
    for run in runs:
        groups.get((run.device, run.structure), []).append(run)
    for alike in groups.values():
        last = alike[-1]
        taught = lesson(runs, last.structure, last.device, method=last.method, capacity=last.capacity, prior=MARGIN)
        yield _Group(last, sum(run.rank == 0 for run in alike), taught)
