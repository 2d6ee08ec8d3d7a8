"""Run pipelines in processes on the null GPU, and judge them: a row a pipeline."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from benchmarks.pipelines.choose import parse
from benchmarks.pipelines.verdict import failure, outcome
from benchmarks.robustness.supervise import Runs, Worker, run_again_alone

WORKER = Worker("benchmarks.pipelines.worker", ("without", "default"))
LIMIT = 60.0  #: seconds for one run
GROUP = 40  #: pipelines in one process, which spares its start

Row = dict[str, Any]


def rows_of(texts: Sequence[str], limit: float = LIMIT, jobs: int = 1) -> Iterator[Row]:
    """Run pipelines by their descriptions, in a number of processes at once, and yield their rows as they come."""
    if jobs == 1:
        for text, runs, first in run_again_alone(WORKER, list(_groups(texts)), _failed, limit):
            yield _row(text, runs) | ({"failed_among_others": first} if first else {})
        return
    rows: queue.Queue[Row | None] = queue.Queue()

    def run(part: Sequence[str]) -> None:
        try:
            for row in rows_of(part, limit):
                rows.put(row)
        finally:
            rows.put(None)

    for job in range(jobs):
        threading.Thread(target=run, args=[texts[job::jobs]], daemon=True).start()
    for _ in range(jobs):
        yield from iter(rows.get, None)


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    left = iter(texts)
    while group := list(islice(left, GROUP)):
        yield group


def _failed(text: str, runs: Runs) -> str:
    return failure(parse(text), runs["without"], runs["default"])


def _row(text: str, runs: Runs) -> Row:
    reason = _failed(text, runs)
    return {
        "pipeline": text,
        "failed": reason,
        "outcome": outcome(runs["without"], runs["default"], reason),
        "runs": runs,
    }
