"""What advice says that a change saves, against the change made: on a GPU that is not there (``tests/nullgpu``).

    python -m benchmarks.accuracy.advice                   # every row of advice.txt
    python -m benchmarks.accuracy.advice --only resnet     # the rows whose text matches

A row is a network, a precision, an optimizer and a batch size. Each change that ``mp.advise`` names is made to the
network, its optimizer, its data or the Trainer, and both are trained for a few steps by a ``Trainer.fit``. What is
saved are bytes reserved; errors are percent of what was saved. Rows with ``cc=7.5`` run on a card of that compute
capability, where half precision is float16: bfloat16's convolutions are not cuDNN's on the null GPU. Shards, which take
more cards, are compared in ``tests/unit/step/strategies/test_ddp.py``, which trains on two.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.accuracy.nullgpu import HERE, ROOT, Row, percentile, train

OPTIMIZERS = {"fused=True": "{}+fused", "foreach=False": "{}+loop", "8 bits": "{}+8bit", "torch.optim.SGD": "SGD"}


class Result(NamedTuple):
    row: str
    change: str
    batch_size: int = 0
    before: int = 0  #: reserved without the change
    predicted: int = 0  #: saved of it
    saved: int = 0
    failed: str = ""
    skipped: str = ""

    @property
    def error(self) -> float:
        return 100 * (self.predicted / self.saved - 1) if self.saved else float("inf")


# ----------------------------------------------------------------------------------------------- inside the null GPU


def made(row: Row, change: Any) -> tuple[Row, Any, Any]:
    """The row, the module and the sample, with what is advised done to them."""
    import torch
    from torch.utils._pytree import tree_map
    from torch.utils.checkpoint import checkpoint

    from benchmarks.accuracy import networks
    from lightning_memplan.planning.changes import checkpoint_themselves, checkpointed

    row = row._replace(batch_size=change.batch_size)
    if change.kind == "precision":
        row = row._replace(precision=change.change.split("'")[1])
    elif change.kind == "accumulation":
        row = row._replace(accumulate=2)
    elif change.kind == "optimizer":
        named = next(name for words, name in OPTIMIZERS.items() if words in change.change)
        row = row._replace(optimizer=named.format(row.optimizer))
    elif change.kind == "allocator":
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    module, sample = networks.build(row.network, row.optimizer)
    if "gradient_checkpointing_enable" in change.change:
        for path, _ in checkpoint_themselves(module):
            module.get_submodule(path).gradient_checkpointing_enable({"use_reentrant": False})
    elif change.kind == "checkpointing":
        for path, _ in checkpointed(module):
            block = module.get_submodule(path)
            block.forward = partial(checkpoint, partial(type(block).forward, block), use_reentrant=False)
    elif change.kind == "layout":
        for name in re.findall(r"channels_last\w*", change.change):
            module = module.to(memory_format=getattr(torch, name))
    elif change.kind == "samples":
        sizes = [tuple(map(int, re.findall(r"\d+", part))) for part in change.change.split("in place of")]
        sample = tree_map(partial(cut, to=sizes[0], size=sizes[1]), sample)
    return row, module, sample


def cut(value: Any, *, to: tuple[int, ...], size: tuple[int, ...]) -> Any:
    """A tensor of a sample, smaller where its last dimensions are of that size."""
    if not hasattr(value, "shape") or tuple(value.shape[-len(size) :]) != size:
        return value
    return value[(..., *map(slice, to))].clone()


def compare(text: str) -> list[Result]:
    import torch

    import lightning_memplan as mp
    from benchmarks.accuracy import networks

    row = Row.parse(text)
    module, sample = networks.build(row.network, row.optimizer)
    card = mp.Device("a card", total=2**43, capability=torch.cuda.get_device_capability())
    batch = networks.loader(sample, row.batch_size, 1)
    advice = mp.advise(module, batch, batch_size=row.batch_size, precision=row.precision, device=card)
    train(row, module, sample)  # what the first leaves, such as cuDNN's random states, is there for all that follow
    _, before = train(row, *networks.build(row.network, row.optimizer))
    results = []
    for item in sorted(advice, key=lambda item: item.kind == "allocator"):  # which cannot be undone
        result = Result(text, item.change, item.batch_size, before, item.saved)
        if item.kind == "sharding":
            results.append(result._replace(skipped="takes more cards than one"))
            continue
        try:
            after = train(*made(row, item))[1]
            results.append(result._replace(saved=before - after))
        except ModuleNotFoundError as error:
            results.append(result._replace(skipped=f"{error.name} is not installed"))
        except Exception as error:  # noqa: BLE001 - whatever the change makes of a network: the next is to be tried
            results.append(result._replace(failed=f"{type(error).__name__}: {str(error)[:200]}"))
    return results


def work(text: str) -> None:
    import logging

    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for result in compare(text):
        print("RESULT " + json.dumps(result), flush=True)


# ---------------------------------------------------------------------------------------------- outside the null GPU


def run(lines: list[str]) -> list[Result]:
    """Every change of every row, each row in a process of its own."""
    results: list[Result] = []
    for text in lines:
        row, _, capability = text.partition(" cc=")
        done = subprocess.run(
            [str(ROOT / "tests/nullgpu/nullgpu"), sys.executable, "-m", "benchmarks.accuracy.advice", "--worker", row],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
                "NULLGPU_MEMORY": str(2**43),
                "NULLGPU_CC": capability or "8.6",
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        found = [Result(*json.loads(t[7:])) for t in done.stdout.splitlines() if t.startswith("RESULT ")]
        if done.returncode or not found:
            end = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            found.append(Result(row, "", failed=f"the process ended: {end[0][:200]}"))
        print("done:", row, file=sys.stderr, flush=True)
        results += found
    return results


def table(results: list[Result]) -> str:
    lines = []
    for row in dict.fromkeys(r.row for r in results):
        of_one = [r for r in results if r.row == row]
        lines.append(f"{row}: {of_one[0].before / 2**20:,.0f} MiB reserved")
        for r in of_one:
            if r.failed or r.skipped:
                lines.append(f"  {r.change[:40]:<40} {r.skipped or f'failed: {r.failed}'}")
                continue
            saved = f"{r.predicted / 2**20:8,.0f} MiB {r.saved / 2**20:8,.0f} MiB {r.error:8.2f} %"
            lines.append(f"  {r.change[:40]:<40} {saved}")
    errors = [abs(r.error) for r in results if not r.failed and not r.skipped]
    if errors:
        lines.append(
            f"what a change saves, predicted and saved: median error {percentile(errors, 0.5):.2f} %, 90th percentile "
            f"{percentile(errors, 0.9):.2f} %, worst {max(errors):.2f} %, {len(errors)} changes"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression: only the rows that it matches")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return
    lines = [t.split("#")[0].strip() for t in Path(HERE / "advice.txt").read_text().splitlines()]
    print(table(run([line for line in lines if line and re.search(arguments.only, line)])))


if __name__ == "__main__":
    main()
