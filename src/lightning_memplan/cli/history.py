"""``memplan history``: earlier runs on a GPU, a line each."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_memplan.cli.arguments import add_history_file
from lightning_memplan.cli.output import UsageError, show
from lightning_memplan.monitor.history import load_history
from lightning_memplan.report.runs import history_table
from lightning_memplan.types import RunRecord, as_dict

HELP = "earlier runs on a GPU: predicted and actual peak"

NO_RUNS = "no runs on record: MemoryPlanner adds one for each fit on a GPU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_history_file(parser)


def run(args: argparse.Namespace) -> None:
    runs = read_runs(args.file)
    if args.json:
        show([as_dict(each) for each in runs], as_json=True)
    else:
        show(history_table(runs) if runs else NO_RUNS, as_json=False)


def read_runs(file: str | None) -> list[RunRecord]:
    """Return the runs on record, the oldest first, in ``file`` or in MemoryPlanner's own history.

    Raises:
        UsageError: there is no such file.
    """
    if file and not Path(file).is_file():
        raise UsageError(
            f"there is no file {file!r}: without --file it is where MemoryPlanner keeps the history, "
            "$MEMPLAN_HISTORY or its default"
        )
    return load_history(file)
