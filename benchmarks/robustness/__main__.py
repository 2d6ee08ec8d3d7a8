"""Train jobs on the null GPU without the planner and with it: none stopped, none hung, no sample lost.

    python -m benchmarks.robustness --results jobs.jsonl                     # all; a row a job, and a table of counts
    python -m benchmarks.robustness --only lock --results jobs.jsonl --again # those whose name matches, once more
    python -m benchmarks.robustness --sample 25                              # the sample that the tests run
    python -m benchmarks.robustness --list                                   # names by kind

Rows that are in the file are not run again. A row has a job's runs (without the planner, with default arguments, with
``apply=False``): error, batch sizes by epoch, warnings, method, seconds. The exit status is 1 where a job failed
that is no known limit (``docs/never_worse.md`` names those).
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.robustness.job import Job
from benchmarks.robustness.jobs import JOBS
from benchmarks.robustness.supervise import JOBS_WORKER, LIMIT, Runs, run_again_alone
from benchmarks.robustness.verdict import doubts, failure, outcome

GROUP = 60  # jobs in one process, which spares its start

Row = dict[str, Any]


def sample(count: int) -> list[str]:
    """Return the names of a fixed sample: jobs at equal distances, so that each kind is among them."""
    names = [name for name, job in JOBS.items() if not job.alone and not job.limit]
    return [names[k * len(names) // count] for k in range(count)]


def rows_of(names: Sequence[str], limit: float = LIMIT, on_gpu: bool = False) -> Iterator[Row]:
    """Run jobs, several in a process; what fails there is run again in a process of its own, which counts."""
    groups = list(_groups([JOBS[name] for name in names]))
    for name, runs, first in run_again_alone(JOBS_WORKER, groups, _failed, limit, on_gpu):
        yield {**_row(name, runs), **({"failed_among_others": first} if first else {})}


def _failed(name: str, runs: Runs) -> str:
    return failure(runs, JOBS[name].samples)


def _groups(jobs: Sequence[Job]) -> Iterator[list[str]]:
    yield from ([job.name] for job in jobs if job.alone)
    together = iter([job.name for job in jobs if not job.alone])
    while group := list(islice(together, GROUP)):
        yield group


def _row(name: str, runs: dict[str, Any]) -> Row:
    job = JOBS[name]
    failed = _failed(name, runs)
    row = {"name": name, "kind": job.kind, "failed": failed, "outcome": outcome(runs, failed), "limit": job.limit}
    return {**row, "doubts": doubts(runs), "runs": runs}


def counted(row: Row) -> str:
    """Name a row's outcome in the table: known limits are counted apart."""
    if not row["limit"]:
        return row["outcome"]
    return f"{row['outcome']}, a known limit" if row["failed"] else f"{row['outcome']}: no limit any longer"


def table(rows: Sequence[Row]) -> str:
    """Count outcomes, in all and by kind."""
    counts = Counter(counted(row) for row in rows)
    lines = [f"{count:5} {name}" for name, count in counts.most_common()]
    seconds = {way: sum(row["runs"][way]["seconds"] for row in rows) for way in ("without", "default", "apply=False")}
    lines.append(f"{len(rows):5} jobs; " + ", ".join(f"{way} {total:.0f} s" for way, total in seconds.items()))
    return "\n".join(lines)


def line(row: Row) -> str:
    found = row["runs"]["default"]
    mark = "ok" if not row["failed"] else "lim" if row["limit"] else "FAIL"
    text = f"{mark:4} {row['name']:36} {row['outcome']:27} {found['seconds']:6.1f} s"
    warned = next(iter(found["said"]), "").partition(": ")[2]
    why = row["failed"] or "; ".join(row["doubts"]) or warned
    return f"{text}\n     {textwrap.shorten(why, 74)}" if why else text


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="REGEX", help="jobs whose name or kind matches")
    parser.add_argument("--sample", type=int, metavar="N", help="a fixed sample of N jobs")
    parser.add_argument("--results", type=Path, metavar="FILE", help="file of rows, which are not run again")
    parser.add_argument("--again", action="store_true", help="run jobs whose rows are in the file, too")
    parser.add_argument("--failed", action="store_true", help="run again the jobs that failed in the file")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help="longest time for one run")
    parser.add_argument("--gpu", action="store_true", help="run on this machine's GPU, not on the null GPU")
    parser.add_argument("--list", action="store_true", help="list the jobs by kind")
    return parser.parse_args()


def main() -> int:
    options = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the processes of jobs end as well
    names = sample(options.sample) if options.sample else list(JOBS)
    if options.only:
        names = [n for n in names if re.search(options.only, n) or re.search(options.only, JOBS[n].kind)]
    if options.list:
        for name in names:
            print(f"{JOBS[name].kind:44} {name}")
        return 0
    rows: dict[str, Row] = {}
    if options.results is not None and options.results.exists():
        rows = {row["name"]: row for row in map(json.loads, options.results.read_text().splitlines())}
    stale = {name for name, row in rows.items() if options.again or (options.failed and row["failed"])}
    for row in rows_of([name for name in names if name not in rows or name in stale], options.limit, options.gpu):
        rows[row["name"]] = row
        print(line(row), flush=True)
        if options.results is not None:
            options.results.write_text("".join(json.dumps(each) + "\n" for each in rows.values()))
    asked = [rows[name] for name in names if name in rows]
    print(table(asked))
    return int(any(row["failed"] and not row["limit"] for row in asked))


if __name__ == "__main__":
    sys.exit(main())
