"""The batch size that is chosen trains, and one that is 5 % larger does not: on a small card, null or real.

    python -m benchmarks.accuracy.chosen                                # every row of nullgpu.txt, by what auto chooses
    python -m benchmarks.accuracy.chosen --method trace --margin 0.05   # with a margin: never out of memory
    python -m benchmarks.accuracy.chosen --only resnet
    python -m benchmarks.accuracy.chosen --models benchmarks/accuracy/regimes.txt --method trace --memory 2
    python -m benchmarks.accuracy.chosen --here --margin 0.05 --jobs 8   # on this machine's GPU, in 8 GiB of it
    python -m benchmarks.accuracy.chosen --read benchmarks/accuracy/rows/h200_chosen.txt   # what it printed, summed up

With no margin the prediction itself is tried: a size that runs out of memory was planned too large (``over``), and
where 5 % more runs as well it was planned too small (``under``). With a margin only the first counts, and where the
steps leave more than a tenth of the card, whether one sample more takes what is over the budget (``coarse``) or not
(``empty``). Room that the plan leaves for cuDNN's workspaces counts as used; ``ranged`` is what leaves room for
the upper end of a range (torch.compile, loops over samples).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.accuracy.nullgpu import HERE, ROOT, Row, asked, fit, percentile

MOST = 4096  #: samples: a row that fits more is limited by that


def runs(row: Row, batch_size: int) -> tuple[int, int] | None:
    """Peak bytes allocated and reserved, None where memory runs out."""
    from lightning_memplan.probe.out_of_memory import ran_out_of_memory

    try:
        return fit(row._replace(batch_size=batch_size))
    except RuntimeError as error:
        if not ran_out_of_memory(error, refused=True):
            raise
        return None


def judge(row: Row, method: Any, margin: float, memory: int) -> str:
    """What became of the size that was chosen for a row."""
    import torch

    import lightning_memplan as mp
    from benchmarks.accuracy import networks

    module, sample = networks.build(row.network, row.optimizer)
    device = mp.detect_devices()[0]
    if device.total > 2 * memory:
        torch.cuda.set_per_process_memory_fraction(memory / device.total)
        device = replace(device, total=memory, free=memory, context=0)
    how, beside = asked(row, module)
    began = time.perf_counter()
    plan = mp.plan(
        module,
        networks.loader(sample, 8, MOST // 8),
        method=method,
        margin=margin,
        max_batch_size=MOST,
        device=replace(device, context=device.context + beside),
        **how,
    )
    chosen = f"{plan.method} chose {plan.batch_size} in {time.perf_counter() - began:.1f} s"
    measured = runs(row, plan.batch_size)
    if not measured:
        return f"over: {chosen}, which runs out of memory"
    assert plan.reserved_range is not None
    left = plan.reserved_range.expected + beside  # room for cuDNN's workspaces, of which the null GPU takes none
    used = max(measured[1], left) / device.capacity
    for what, predicted, actual in zip(
        ("allocated", "reserved"), (plan.peak_allocated, plan.peak_reserved), measured, strict=True
    ):
        chosen += f", {what} {actual / 2**20:.0f} MiB ({100 * ((predicted + beside) / actual - 1):+.2f} %)"
    chosen += f", {100 * used:.0f} % of the card" + " with room for workspaces" * (left > 1.01 * measured[1])
    if plan.limited_by != "memory":
        return f"limited: {chosen}, limited by {plan.limited_by}"
    if plan.reserved_range.low < plan.peak_reserved and measured[1] < 0.9 * device.capacity:
        return f"ranged: {chosen}, and room for the upper end of its range"
    if not margin:
        more = max(plan.batch_size + 1, -(-105 * plan.batch_size // 100))
        return f"under: {chosen}, and {more} runs as well" if runs(row, more) else f"right: {chosen}"
    if used >= 0.9:
        return f"right: {chosen}"
    one_more = runs(row, plan.batch_size + 1)
    if one_more and one_more[1] - beside <= plan.budget:
        return f"empty: {chosen}, and {plan.batch_size + 1} runs within the budget"
    return f"coarse: {chosen}, and {plan.batch_size + 1} does not run within the budget"


def judged(line: str, method: str = "auto", margin: float = 0.0, memory: float = 8, here: bool = False) -> str:
    """The same, in a process of its own, on the null GPU or on the one that is here."""
    command = [sys.executable, "-m", "benchmarks.accuracy.chosen", "--method", method, "--margin", str(margin)]
    command += ["--memory", str(memory)]
    done = subprocess.run(
        [*(() if here else (str(ROOT / "tests/nullgpu/nullgpu"),)), *command, "--worker", line],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "NULLGPU_MEMORY": str(int(memory * 2**30)),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search("^JUDGED (.*)$", done.stdout, re.MULTILINE)
    if found is None:
        return "failed: " + (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
    return str(json.loads(found[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=HERE / "nullgpu.txt", help="rows, one a line")
    parser.add_argument("--only", default="", help="a regular expression: only the rows that it matches")
    parser.add_argument("--method", default="auto", help="what is planned by")
    parser.add_argument("--margin", type=float, default=0.0, help="the part of the card that is left free")
    parser.add_argument("--memory", type=float, default=8, help="GiB that the card has")
    parser.add_argument("--here", action="store_true", help="on the GPU of this machine, in place of the null GPU")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--read", type=Path, help="only sum up what was printed before")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        warnings.simplefilter("ignore")
        memory = int(arguments.memory * 2**30)
        verdict = judge(Row.parse(arguments.worker), arguments.method, arguments.margin, memory)
        print("JUDGED " + json.dumps(verdict), flush=True)
        return
    if arguments.read:
        print(summary(arguments.read.read_text().splitlines()))
        return
    lines = [text.split("#")[0].strip() for text in arguments.models.read_text().splitlines()]
    lines = [line for line in lines if line and re.search(arguments.only, line)]
    how = {name: getattr(arguments, name) for name in ("method", "margin", "memory", "here")}
    printed = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for line, verdict in zip(lines, pool.map(partial(judged, **how), lines), strict=True):
            printed.append(f"{line:72} {verdict}")
            print(printed[-1], flush=True)
    print(summary(printed))


def summary(lines: list[str]) -> str:
    """How many of the printed lines came out how, and how far predictions were off."""
    verdicts = Counter(line[72:].split(":")[0].strip() for line in lines)
    text = [f"{len(lines)} rows: " + ", ".join(f"{count} {name}" for name, count in verdicts.most_common())]
    for what in ("allocated", "reserved"):
        errors = [abs(float(e)) for e in re.findall(rf"{what} \d+ MiB \((\S+) %\)", "\n".join(lines))]
        if errors:
            shares = f"90th percentile {percentile(errors, 0.9):.2f} %, worst {max(errors):.2f} %"
            text.append(f"{what}: median {statistics.median(errors):.2f} %, {shares}")
    return "\n".join(text)


if __name__ == "__main__":
    main()
