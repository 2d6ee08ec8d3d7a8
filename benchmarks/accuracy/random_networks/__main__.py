"""Random networks against the CUDA build's own allocator, on the null GPU (``tests/nullgpu/README.md``).

    python -m benchmarks.accuracy.random_networks --seeds 0:200 --out random.jsonl      # goes on where it ended
    python -m benchmarks.accuracy.random_networks --out random.jsonl                    # the summary alone

Each seed is a network of convolutions, norms, activations, views, pools, attention, recurrent layers, ..., with a loss,
a precision and an optimizer. It is traced at batch sizes 2, 3 and 5, predicted at another, and trained there. A row
whose peak allocated is off by more than 0.5 %, or peak reserved by more than 2 %, is made as small as it stays wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
GROUP = 20  # networks in one process, which spares its start


def work(seeds: Iterable[int], shrink: bool) -> None:
    """Print a line for each seed, inside the null GPU."""
    from . import compare
    from .draw import draw

    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_memplan"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for seed in seeds:
        network, row = draw(seed), {"seed": seed}
        try:
            row |= compare.measure(network)
            if shrink and compare.is_wrong(row["errors"]):
                row["smallest"], row["smallest_errors"] = compare.smallest(network)
        except Exception as error:  # noqa: BLE001 - whatever a network raises: the next is to be run
            place = traceback.extract_tb(error.__traceback__)[-1]
            row["failed"] = f"{type(error).__name__}: {str(error)[:300]} ({Path(place.filename).name}:{place.lineno})"
        print("RESULT " + json.dumps(row), flush=True)
        if "failed" in row or compare.held() > 2**20:
            return  # what a network leaves behind would count in the next: that one begins in a new process


def run(seeds: list[int], shrink: bool) -> list[dict[str, Any]]:
    """The rows of some seeds; one at which a process dies is a failed row, and the next begin in another process."""
    rows: list[dict[str, Any]] = []
    while seeds:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.accuracy.random_networks"]
        done = subprocess.run(
            [
                str(ROOT / "tests/nullgpu/nullgpu"),
                *command,
                *(["--whole"] if not shrink else []),
                "--worker",
                *map(str, seeds),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
                "NULLGPU_MEMORY": str(2**43),
                "OMP_NUM_THREADS": "1",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        rows += found
        seeds = seeds[len(found) :]
        if seeds and (done.returncode or not found):
            end = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            rows.append({"seed": seeds[0], "failed": f"the process ended: {end[0][:200]}"})
            seeds = seeds[1:]
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    """Count the rows within the bounds, and show the smallest form of each that is not."""
    from .compare import is_wrong

    good = [row for row in rows if "errors" in row]
    wrong = [row for row in good if is_wrong(row["errors"])]
    lines = [f"{row['seed']}: {row['errors']} -> {row.get('smallest_errors')} {_short(row)}" for row in wrong]
    lines += [f"{row['seed']}: failed: {row['failed']}" for row in rows if "failed" in row]
    exact = sum(row["errors"] == [0.0, 0.0] for row in good)
    share = 100 * len(wrong) / max(1, len(good))
    lines.append(
        f"{len(rows)} rows, {len(rows) - len(good)} failed; {exact} exact, {len(wrong)} ({share:.1f} %) over the bounds"
    )
    return "\n".join(lines)


def _short(row: dict[str, Any]) -> str:
    network = row.get("smallest")
    if network is None:
        return ""
    plain = {name: value for name, value in network.items() if name not in ("layers", "loss", "batch_size")}
    loss = [name for name, value in network["loss"].items() if value is True] + [network["loss"]["kind"]]
    return json.dumps([network["layers"], "+".join(loss), network["loss"]["reduction"], plain])


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="", help="FROM:TO, the last not included")
    parser.add_argument("--out", type=Path, help="a file to which a line is added for each network")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--whole", action="store_true", help="do not make wrong networks smaller")
    parser.add_argument("--worker", nargs="*", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.worker, not options.whole)
        return
    rows = _read(options.out) if options.out else []
    done = {row["seed"] for row in rows}
    begin, _, end = options.seeds.partition(":")
    seeds = [seed for seed in range(int(begin or 0), int(end or 0)) if seed not in done]
    groups = [seeds[k : k + GROUP] for k in range(0, len(seeds), GROUP)]
    with ThreadPoolExecutor(options.jobs) as pool:
        for found in pool.map(lambda group: run(group, not options.whole), groups):
            rows += found
            if options.out:
                with options.out.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in found)
            print(f"{len(rows)} rows", file=sys.stderr, flush=True)
    print(summary(rows))


if __name__ == "__main__":
    main()
