"""``memplan report``: a run, predicted against actual, from the history or from a CSVLogger's folder."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_memplan.cli.arguments import add_history_file, complete_files
from lightning_memplan.cli.history import NO_RUNS, read_runs
from lightning_memplan.cli.output import UsageError, show, writing
from lightning_memplan.monitor.csv_log import read_log
from lightning_memplan.monitor.history import Lesson, latest, lesson
from lightning_memplan.report.runs import lessons_table, logged_report, run_report
from lightning_memplan.settings import MARGIN
from lightning_memplan.types import RunRecord

HELP = "a run, predicted against actual, and what earlier runs teach the next plan"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_history_file(parser)
    text = "a CSVLogger's folder; or words of a module's or card's name (default: the last run on record)"
    complete_files(parser.add_argument("words", nargs="*", metavar="RUN", help=text))
    complete_files(parser.add_argument("--plot", metavar="FILE.png", help="draw each step of a CSVLogger's folder"))


def run(args: argparse.Namespace) -> None:
    text = " ".join(args.words)
    if text and Path(text).exists():
        _report_log(args, text)
        return
    if args.plot:
        raise UsageError("--plot draws each step, which the history does not keep: name the folder of a CSVLogger")
    runs = read_runs(args.file)
    words = text.lower().split()
    named = [each for each in runs if all(word in f"{each.model} {each.device}".lower() for word in words)]
    if text and not named:
        raise UsageError(
            f"{text!r} is no folder of a CSVLogger, and no module or card on record is called so: memplan history "
            "lists the runs"
        )
    if not named:
        show({"run": None, "lessons": []} if args.json else NO_RUNS, as_json=args.json)
        return
    last = latest(named)
    first, *others = _groups(runs, [last, *named])
    if args.json:
        show({"run": asdict(last), "lessons": [group.fields() for group in (first, *others)]}, as_json=True)
        return
    show(run_report(last, first.lesson.text), as_json=False)
    if others:
        rows = [(group.last, group.count, group.lesson.text) for group in others]
        show("\n" + lessons_table(rows), as_json=False)


def _report_log(args: argparse.Namespace, place: str) -> None:
    """Show the run that a CSVLogger wrote to the folder ``place``."""
    found = read_log(place)
    if args.plot:
        from lightning_memplan.report.figures import plot_measurements

        with writing(args.plot):
            plot_measurements(found.measurements).savefig(args.plot)
    folder = str(found.folder)
    if args.json:
        steps = [step._asdict() for step in found.measurements]
        validations = [peaks._asdict() for peaks in found.validations]
        show({"folder": folder, "plan": found.plan, "steps": steps, "validations": validations}, as_json=True)
    else:
        show(logged_report(folder, found.plan, found.measurements, found.validations), as_json=False)


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
