"""Predictions against the CUDA build's own allocator, on a GPU that is not there (``tests/nullgpu/README.md``).

    python -m benchmarks.accuracy.nullgpu                            # every row of nullgpu.txt
    python -m benchmarks.accuracy.nullgpu --only resnet --jobs 2     # the rows whose text matches
    python -m benchmarks.accuracy.nullgpu --models benchmarks/accuracy/regimes.txt    # ways of training
    python -m benchmarks.accuracy.nullgpu --method probe             # by real steps, with max_batch_size, and no trace
    python -m benchmarks.accuracy.nullgpu --only own.mlp --diff 20   # where the events first differ

A row is a network, a precision, an optimizer and a batch size, and perhaps ``clip=1.0`` or ``accumulate=4``. It is
predicted as a user would, from traces at batch sizes 2, 3 and 5, and compared with what a ``Trainer.fit`` of a few
steps allocates and reserves at most. Errors are percent of what was measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STEPS = 6  # what an estimate replays: each step finds other free blocks than the one before, for a while
GROUP = 8  # rows in one process, which spares its start


class Row(NamedTuple):
    network: str
    precision: str
    optimizer: str
    batch_size: int
    clip: float | None = None
    accumulate: int = 1

    @classmethod
    def parse(cls, line: str) -> Row:
        network, precision, optimizer, batch_size, *options = line.split()
        named = dict(option.split("=") for option in options)
        clip = float(named["clip"]) if "clip" in named else None
        return cls(network, precision, optimizer, int(batch_size), clip, int(named.get("accumulate", 1)))

    def __str__(self) -> str:
        text = f"{self.network} {self.precision} {self.optimizer} {self.batch_size}"
        text += f" clip={self.clip}" if self.clip else ""
        return text + (f" accumulate={self.accumulate}" if self.accumulate > 1 else "")


class Result(NamedTuple):
    row: str
    allocated: int = 0
    reserved: int = 0
    predicted_allocated: int = 0
    predicted_reserved: int = 0
    trace_seconds: float = 0.0
    skipped: str = ""
    failed: str = ""
    least_allocated: int = 0  #: the low end, where a range is predicted
    least_reserved: int = 0

    @property
    def errors(self) -> tuple[float, float]:
        """Percent of what was measured; of a range, how far it is off the nearer end, nothing within."""

        def error(least: int, most: int, measured: int) -> float:
            nearest = min(max(measured, least), most) if least else most
            return 100 * (nearest / measured - 1)

        return (
            error(self.least_allocated, self.predicted_allocated, self.allocated),
            error(self.least_reserved, self.predicted_reserved, self.reserved),
        )


# ----------------------------------------------------------------------------------------------- inside the null GPU


def fit(row: Row) -> tuple[int, int]:
    """Peak bytes allocated and reserved in a few steps of training."""
    from benchmarks.accuracy import networks

    return train(row, *networks.build(row.network, row.optimizer))


_PARTS = "accumulate_grad_batches"


def _fit_with(module: Any) -> dict[str, Any]:
    """What a way of training asks of the Trainer."""
    return module.fit_with() if hasattr(module, "fit_with") else {}


def _trainer(row: Row, module: Any) -> Any:
    import pytorch_lightning as pl

    from lightning_memplan.probe.grad_scaler import UnskippedGradScaler

    how: dict[str, Any] = {"precision": row.precision}
    if row.precision == "16-mixed":  # on a real card the first steps would be passed over: samples are zeros
        scaler = UnskippedGradScaler("cuda", init_scale=1.0)
        how = {"plugins": [pl.plugins.precision.MixedPrecision("16-mixed", "cuda", scaler)]}
    how |= {"max_steps": STEPS, "gradient_clip_val": row.clip, _PARTS: row.accumulate}
    return pl.Trainer(
        accelerator="gpu",
        devices=1,
        **(how | _fit_with(module)),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def train(row: Row, module: Any, sample: Any) -> tuple[int, int]:
    """The same of this module and sample."""
    import torch

    from benchmarks.accuracy import networks
    from lightning_memplan.step.compiled_regions import forget_compiled

    batches = getattr(module, "batches", STEPS) * row.accumulate * _fit_with(module).get(_PARTS, 1)
    loader = networks.loader(sample, row.batch_size, batches)
    trainer = _trainer(row, module)
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # which torch keeps for each thread, up to 2.14
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        trainer.fit(module, loader)
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    finally:
        del trainer, loader
        forget_compiled()  # with the pools of CUDA graphs
        torch._C._cuda_clearCublasWorkspaces()
        module.cpu()
        module.zero_grad()


def asked(row: Row, module: Any) -> tuple[dict[str, Any], int]:
    """What is asked for a row beside module and samples; and what callbacks hold, as MemoryPlanner adds it."""
    from lightning_memplan.lightning.trainer import averaging_bytes

    if _fit_with(module):
        trainer = _trainer(row, module)
        return {"trainer": trainer}, averaging_bytes(trainer, lambda: module)
    how = {"precision": row.precision, "gradient_clip_val": row.clip, _PARTS: row.accumulate}
    return how, 0


class Predicted(NamedTuple):
    allocated: int
    reserved: int
    seconds: float
    least: tuple[int, int] = (0, 0)  #: the same two, where a range is predicted


def predict(row: Row, method: Any = "trace") -> Predicted:
    import lightning_memplan as mp
    from benchmarks.accuracy import networks

    module, sample = networks.build(row.network, row.optimizer)
    how, beside = asked(row, module)
    began = time.perf_counter()
    how["max_batch_size"] = row.batch_size
    found = mp.estimate(module, networks.loader(sample, row.batch_size, 1), method=method, **how)
    seconds = time.perf_counter() - began
    allocated, reserved = found.allocated_range(row.batch_size), found.reserved_range(row.batch_size)
    ranged = found.least is not None or found.loops
    least = (allocated[0] + beside, reserved.low + beside) if ranged else (0, 0)
    return Predicted(allocated[1] + beside, found.peak(row.batch_size) + beside, seconds, least)


def _held() -> int:
    import torch

    gc.collect()
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0


def compare(row: Row, method: str) -> Result:
    try:
        measured = fit(row)  # first: a probe leaves cuDNN's random states in the process
        predicted = predict(row, method)
    except ModuleNotFoundError as error:
        return Result(str(row), skipped=f"{error.name} is not installed")
    except ImportError as error:  # MONAI's own, of what it imports late
        return Result(str(row), skipped=str(error).splitlines()[0])
    except Exception as error:  # noqa: BLE001 - whatever a network raises: the next row is to be run
        if "OptionalImportError" in str(error):
            return Result(str(row), skipped="a package that it needs is not installed")
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {str(error)[:300]} ({Path(place.filename).name}:{place.lineno})"
        return Result(str(row), failed=text)
    return Result(str(row), *measured, *predicted[:3], "", "", *predicted.least)


def difference(row: Row, most: int) -> None:
    """Print where the trace at this very batch size first differs from the events of a real fit."""
    import difflib

    import torch

    from benchmarks.accuracy import networks
    from lightning_memplan.data.samples import read_samples
    from lightning_memplan.settings import StepSettings, parse_precision
    from lightning_memplan.step.setup import TrainingSetup
    from lightning_memplan.trace.tracer import trace_steps

    torch.cuda.memory._record_memory_history(
        enabled="all", context="alloc" if os.environ.get("STACK") else None, stacks="python", max_entries=10**7
    )
    measured = fit(row)
    history = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(enabled=None)
    real: list[str] = []
    frames: list[str] = []
    sizes: dict[int, int] = {}
    for entry in history:
        if entry["action"] == "alloc":
            sizes[entry["addr"]] = size = -(-entry["size"] // 512) * 512
            real.append(f"+{size}")
        elif entry["action"] == "free_completed":
            real.append(f"-{sizes.pop(entry['addr'], '?')}")
        else:
            continue
        stack = [f"{Path(f['filename']).name}:{f['line']}:{f['name']}" for f in entry.get("frames", [])]
        frames.append(" < ".join(stack[:5]))

    module, sample = networks.build(row.network, row.optimizer)
    settings = StepSettings(
        precision=parse_precision(row.precision), gradient_clip_val=row.clip, accumulate_grad_batches=row.accumulate
    )
    batches = read_samples(networks.loader(sample, row.batch_size, 1)).batches((row.batch_size,))
    events = list(trace_steps(TrainingSetup(module, settings), batches, steps=STEPS).traces[0].events)
    blocks = {e.block: -(-e.size // 512) * 512 for e in events if e.size > 0}
    events = [e for e in events if e.block in blocks]
    ours = [f"-{blocks.pop(e.block, '?')}" if e.is_free else f"+{blocks[e.block]}" for e in events]
    print(row, "measured", measured, "predicted", predict(row)[:2], "events", len(real), len(ours))
    for tag, a, b, c, d in difflib.SequenceMatcher(None, real, ours, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        print(f"REAL {a}", *real[a:b][:14], *set(frames[a:b][:3]))
        print(
            f"  OURS {c}",
            *(f"{ours[k]} {events[k].op} {events[k].phase[:3]}{events[k].step}" for k in range(c, d)[:12]),
        )
        most -= 1
        if most <= 0:
            break


def work(lines: list[str], most: int, method: str) -> None:
    import logging

    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for line in lines:
        if most:
            difference(Row.parse(line), most)
        else:
            result = compare(Row.parse(line), method)
            print("RESULT " + json.dumps(result), flush=True)
            if result.failed or _held() > 2**20:
                return  # what a row leaves behind would count in the next: that one begins in a new process


# ---------------------------------------------------------------------------------------------- outside the null GPU


def _run(lines: list[str], most: int = 0, method: str = "trace") -> list[Result]:
    """The rows' results, from processes on the null GPU; a row at which one dies is a failed row."""
    results: list[Result] = []
    while lines:
        command = [sys.executable, "-m", "benchmarks.accuracy.nullgpu", "--worker"]
        command += ["--method", method, "--diff", str(most)]
        done = subprocess.run(
            [str(ROOT / "tests/nullgpu/nullgpu"), *command, *lines],
            cwd=ROOT,
            env={
                **os.environ,
                "CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8",  # the default: monai sets another when it is imported
                "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
                "NULLGPU_MEMORY": str(2**35 if method == "probe" else 2**43),  # a probe tries a batch of half the card
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            },
            stdin=subprocess.DEVNULL,
            stdout=None if most else subprocess.PIPE,
            stderr=None if most else subprocess.PIPE,
            text=True,
            check=False,
        )
        if most:
            break
        found = [Result(*json.loads(t[7:])) for t in done.stdout.splitlines() if t.startswith("RESULT ")]
        results += found
        for result in found:
            print("done:", line(result), file=sys.stderr, flush=True)
        lines = lines[len(found) :]
        if lines and (done.returncode or not found):
            end = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            results.append(Result(lines[0], failed=f"the process ended: {end[0][:200]}"))
            lines = lines[1:]
    return results


def run(rows: list[Row], jobs: int = 1, method: str = "trace") -> list[Result]:
    """Every row's result, in ``jobs`` processes at a time."""
    groups = []
    for _, of_one in groupby(rows, lambda row: row.network.split(".")[0]):  # a package may change how torch works
        lines = [str(row) for row in of_one]
        groups += [lines[k : k + GROUP] for k in range(0, len(lines), GROUP)]
    with ThreadPoolExecutor(jobs) as pool:
        return [result for group in pool.map(partial(_run, method=method), groups) for result in group]


def percentile(values: list[float], share: float) -> float:
    """The value that ``share`` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def line(r: Result) -> str:
    """One result, as a row of the table."""
    if r.failed or r.skipped:
        return f"{r.row:72} {'failed' if r.failed else 'skipped'}: {r.failed or r.skipped}"
    a, b = r.errors
    sizes = f"{r.allocated / 2**20:6.0f} MiB {a:8.3f} {r.reserved / 2**20:6.0f} MiB {b:8.3f}"
    shown = f"{r.row:72} {sizes} {r.trace_seconds:8.1f}"
    if not r.least_allocated:
        return shown
    ends = (r.least_allocated, r.predicted_allocated, r.least_reserved, r.predicted_reserved)
    return shown + " of {} to {}, {} to {} MiB".format(*(end >> 20 for end in ends))


def table(results: list[Result]) -> str:
    good = [r for r in results if not r.failed and not r.skipped]
    good.sort(key=lambda r: -max(map(abs, r.errors)))
    lines = [f"{'row':72} {'allocated':>10} {'error %':>8} {'reserved':>10} {'error %':>8} {'trace s':>8}"]
    lines += map(line, good)
    lines += [line(r) for r in results if r.failed]
    lines += [line(r) for r in results if r.skipped]
    for k, what in enumerate(("allocated", "reserved")):
        errors = [abs(r.errors[k]) for r in good]
        if errors:
            lines.append(
                f"{what}: median {statistics.median(errors):.3f} %, 90th percentile {percentile(errors, 0.9):.3f} %, "
                f"99th {percentile(errors, 0.99):.3f} %, worst {max(errors):.3f} %, {len(errors)} rows"
            )
    return "\n".join(lines)


def by_regime(results: list[Result]) -> str:
    """A line a way of training: of its rows, the median and the worst error of allocated and of reserved."""
    lines = [f"{'way of training':24} {'rows':>4} {'allocated: median, worst %':>26} {'reserved: median, worst %':>26}"]
    for name, of_one in groupby(results, lambda r: r.row.split()[0].removeprefix("regime.")):
        good = [r for r in of_one if not r.failed and not r.skipped]
        shown = f"{name:24} {len(good):4}"
        for k in range(2 if good else 0):
            errors = [abs(r.errors[k]) for r in good]
            shown += f" {f'{statistics.median(errors):.3f} {max(errors):8.3f}':>26}"
        lines.append(shown)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=HERE / "nullgpu.txt", help="rows, one a line")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--only", default="", help="a regular expression: only the rows that it matches")
    parser.add_argument("--diff", type=int, default=0, help="print the first so many differences of events instead")
    parser.add_argument("--method", default="trace", choices=("trace", "probe"), help="what is predicted by")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("rows", nargs="*", help="rows, in place of the file's")
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.rows, arguments.diff, arguments.method)
        return
    lines = arguments.rows or [t.split("#")[0].strip() for t in arguments.models.read_text().splitlines()]
    rows = [Row.parse(line) for line in lines if line and re.search(arguments.only, line)]
    if arguments.diff:
        _run([str(row) for row in rows], arguments.diff)
        return
    results = run(rows, arguments.jobs, arguments.method)
    print(table(results))
    if any(row.network.startswith("regime.") for row in rows):
        print(by_regime(results))


if __name__ == "__main__":
    main()
