"""What training takes on the GPU of this machine: every block of whole fits and probes, recorded for comparison.

    python -m benchmarks.accuracy.card FOLDER --jobs 8                # on a machine with a GPU: rows of nullgpu.txt
    python -m benchmarks.accuracy.card FOLDER --only resnet

A row is fitted as in ``nullgpu.py``, on the card that is there, and probed at several batch sizes. A line
of ``FOLDER/*.jsonl`` is a row. Its recordings are lists of numbers: the bytes of a block that is taken, ``-1 - n``
where the ``n``-th one is given back.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.accuracy.nullgpu import HERE, ROOT, Row, fit

GROUP = 6  # rows in one process, which spares its start


def blocks_of(history: Iterable[Mapping[str, Any]]) -> list[int]:
    """The blocks that an allocator's history takes and gives back, as numbers."""
    found: list[int] = []
    living: dict[int, int] = {}
    count = 0
    for entry in history:
        if entry["action"] == "alloc":
            living[entry["addr"]] = count
            count += 1
            found.append(entry["size"])
        elif entry["action"] == "free_requested" and entry["addr"] in living:
            found.append(-1 - living.pop(entry["addr"]))
    return found


def recorded_fit(row: Row) -> dict[str, Any]:
    import torch

    memory = torch.cuda.memory
    torch.cuda.init()
    memory._record_memory_history("all", context=None, max_entries=10**7)
    try:
        allocated, reserved = fit(row)
        history = memory._snapshot(0)["device_traces"][0]
    finally:
        memory._record_memory_history(None)
    stats = torch.cuda.memory_stats()
    calls = {name: stats.get(name, 0) for name in ("num_alloc_retries", "num_ooms")}
    return {"allocated": allocated, "reserved": reserved, "blocks": blocks_of(history), **calls}


def recorded_probe(row: Row, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """The events of a probe of each batch size: numbers as above, and where each step's phases begin."""
    import torch

    from benchmarks.accuracy import networks
    from lightning_memplan.data.samples import read_samples
    from lightning_memplan.probe.clean_up import as_found
    from lightning_memplan.probe.run import ProbeRun
    from lightning_memplan.settings import StepSettings, parse_precision
    from lightning_memplan.step.setup import TrainingSetup

    module, sample = networks.build(row.network, row.optimizer)
    settings = StepSettings(
        precision=parse_precision(row.precision), gradient_clip_val=row.clip, accumulate_grad_batches=row.accumulate
    )
    samples = read_samples(networks.loader(sample, row.batch_size, 1))
    device = torch.device("cuda", 0)
    with as_found(device):
        traces, _ = ProbeRun(TrainingSetup(module, settings), device).record(samples.batches(sizes), 3)
    found = []
    for trace in traces:
        order = {e.block: n for n, e in enumerate(e for e in trace.events if e.size >= 0)}
        where = [(e.step, e.phase) for e in trace.events]
        found.append(
            {
                "batch_size": trace.batch_size,
                "blocks": [e.size if e.size >= 0 else -1 - order[e.block] for e in trace.events if e.block in order],
                "stretches": [(i, *at) for i, at in enumerate(where) if i == 0 or at != where[i - 1]],
            }
        )
    return found


def work(lines: list[str]) -> None:
    import logging

    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for line in lines:
        row = Row.parse(line)
        result: dict[str, Any] = {"row": line}
        try:
            result["fit"] = recorded_fit(row)
            began = time.perf_counter()
            result["probe"] = recorded_probe(row, (2, 3, 5))
            result["seconds"] = time.perf_counter() - began
            result["more"] = recorded_probe(row, (row.batch_size,)) if row.batch_size > 5 else []
        except Exception as error:  # noqa: BLE001 - whatever a network raises: the next row is to be run
            place = traceback.extract_tb(error.__traceback__)[-1]
            result["failed"] = (
                f"{type(error).__name__}: {str(error)[:300]} ({Path(place.filename).name}:{place.lineno})"
            )
        print("RESULT " + json.dumps(result), flush=True)
        gc.collect()


def run(lines: list[str], file: Path) -> None:
    """Rows in a process of their own, whose results are appended to a file."""
    while lines:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.accuracy.card", str(file), "--worker", *lines],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        found = [t[7:] for t in done.stdout.splitlines() if t.startswith("RESULT ")]
        lines, died = lines[len(found) :], lines[len(found) : len(found) + 1]
        if died:
            end = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            found.append(json.dumps({"row": died[0], "failed": f"the process ended: {end[0][:300]}"}))
            lines = lines[1:]
        with file.open("a") as out:
            out.writelines(text + "\n" for text in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the recordings are written")
    parser.add_argument("--models", type=Path, default=HERE / "nullgpu.txt", help="rows, one a line")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--only", default="", help="a regular expression: only the rows that it matches")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return
    rows = [t.split("#")[0].strip() for t in arguments.models.read_text().splitlines()]
    rows = [line for line in rows if line and re.search(arguments.only, line)]
    groups = []
    for source, of_one in groupby(rows, lambda row: row.split(".")[0]):  # a package may change how torch works
        lines = list(of_one)
        groups += [(source, lines[k : k + GROUP]) for k in range(0, len(lines), GROUP)]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = [
            pool.submit(run, lines, arguments.folder / f"{number:02}-{source}.jsonl")
            for number, (source, lines) in enumerate(groups)
        ]
        for job in jobs:
            job.result()


if __name__ == "__main__":
    main()
