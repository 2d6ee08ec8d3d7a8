"""Train random data pipelines on the null GPU without the planner and with it: on the same samples.

    python -m benchmarks.pipelines --seeds 0:500 --out pipelines.jsonl        # a row a pipeline, and counts by verdict
    python -m benchmarks.pipelines --seeds 0:500 --out pipelines.jsonl --shrink   # and the smallest that fails alike
    python -m benchmarks.pipelines --seed 17 --show                           # one: what it is, and what happened
    python -m benchmarks.pipelines --only "data=stream workers=2" --show      # one by its description

Rows that are in the file are not run again: pipelines that do not train without the planner are left out and counted. A
pipeline fails where the planner stops or hangs it, where an epoch loses a sample or has one twice, where a validation
is lost, or where batches have another size than was announced, without a word. The exit status is 1 if one fails.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pipelines.choose import draw, parse
from benchmarks.pipelines.shrink import shrunk
from benchmarks.pipelines.supervise import LIMIT, Row, rows_of


def table(rows: Sequence[Row]) -> str:
    """Count rows by verdict, then list those that failed."""
    lines = [f"{count:5} {name}" for name, count in Counter(row["outcome"] for row in rows).most_common()]
    seconds = [sum(run["seconds"] for run in row["runs"].values()) for row in rows]
    lines.append(f"{len(rows):5} pipelines, {sum(seconds):.0f} s")
    lines += [line(row) for row in rows if row["failed"]]
    return "\n".join(lines)


def line(row: Row) -> str:
    seed = "" if row.get("seed") is None else f"seed {row['seed']}: "
    text = f"{'FAIL' if row['failed'] else 'ok':4} {seed}{row['outcome']}"
    if not row["failed"]:
        return text
    return f"{text}\n     {row.get('smallest', row['pipeline'])}\n     {textwrap.shorten(row['failed'], 110)}"


def shown(row: Row) -> str:
    """Describe a pipeline and its runs."""
    lines = [line(row), f"     {row['pipeline']}"]
    for way, run in row["runs"].items():
        lines += [f"--- {way}: {run['seconds']} s, {run['validations']} validations, {run.get('steps')} steps"]
        lines += [f"    epoch of batches {[len(batch) for batch in epoch]}" for epoch in run["epochs"]]
        lines += [f"    {name}: {run[name]}" for name in ("method", "batch_size", "limited_by", "notes") if name in run]
        lines += [f"    said: {text}" for text in run["said"]]
        lines += [run.get("traceback", run["error"])] if run["error"] else []
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", metavar="FIRST:END", default="0:100", help="pipelines of these seeds")
    parser.add_argument("--seed", type=int, metavar="N", help="the pipeline of one seed")
    parser.add_argument("--only", metavar="DESCRIPTION", help="one pipeline, such as 'data=stream workers=2'")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file of rows, which are not run again")
    parser.add_argument("--again", action="store_true", help="run again the pipelines that failed in the file")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at once")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help="longest time for one run")
    parser.add_argument("--shrink", action="store_true", help="find the smallest pipeline that fails alike")
    parser.add_argument("--show", action="store_true", help="describe each run")
    parser.add_argument("--dry", action="store_true", help="list the pipelines alone")
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> dict[str, int | None]:
    """Return the seed of each pipeline by its description."""
    if options.only is not None:
        return {str(parse(options.only)): None}
    first, _, end = options.seeds.partition(":")
    seeds = range(int(first), int(end)) if options.seed is None else [options.seed]
    return {str(draw(seed)): seed for seed in seeds}


def main() -> int:
    options = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the processes of jobs end as well
    seeds = chosen(options)
    if options.dry:
        print("\n".join(f"{'' if seed is None else seed:5} {text}" for text, seed in seeds.items()))
        return 0
    rows: dict[str, Row] = {}
    if options.out is not None and options.out.exists():
        rows = {row["pipeline"]: row for row in map(json.loads, options.out.read_text().splitlines())}
    left = [text for text in seeds if text not in rows or (options.again and rows[text]["failed"])]
    for row in rows_of(left, options.limit, options.jobs):
        row: dict[str, Any] = {"seed": seeds[row["pipeline"]], **row}
        if row["failed"] and options.shrink:
            row["smallest"] = str(shrunk(parse(row["pipeline"]), row["outcome"], options.limit))
        rows[row["pipeline"]] = row
        print(shown(row) if options.show else line(row), flush=True)
        if options.out is not None:
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    asked = [rows[text] for text in seeds if text in rows]
    print(table(asked))
    return int(any(row["failed"] for row in asked))


if __name__ == "__main__":
    sys.exit(main())
