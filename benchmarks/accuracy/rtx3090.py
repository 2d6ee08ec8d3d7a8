"""Networks of timm on an RTX 3090: does the batch size that ran fit, and the next that ran out of memory not?

    python -m benchmarks.accuracy.rtx3090 [--layout nhwc] [--half learn] [--method formula] [--jobs 2]

Measured by the author of timm with ``benchmark.py --bench train``, torch 1.12 and CUDA 11.3 (rows/README.md). Its cuDNN
cannot be asked for workspaces: they are taken by rule, unless MEMPLAN_CUDNN names one.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import pickle
import re
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_memplan.cuda.workspaces import Choice
from lightning_memplan.memory.allocator import Replay, replay
from lightning_memplan.memory.allocator_settings import AllocatorSettings
from lightning_memplan.memory.events import EMPTY
from lightning_memplan.memory.formula import Formula
from lightning_memplan.memory.program import CONVOLUTION, Kernel, Program
from lightning_memplan.settings import StepSettings
from lightning_memplan.step.fake_cuda import DEVICE
from lightning_memplan.step.setup import TrainingSetup
from lightning_memplan.trace.tracer import run_formula

from .loop import PRIME, Loop, trace_loop

ROWS = Path(__file__).parent / "rows"
TOTAL = 25_446_711_296  #: the card's bytes, as CUDA reports them
CAPACITY = 22 * 2**30  #: what CUDA 11.3 and its libraries leave: the one number taken from the tables
STEPS = 50  #: of one run of the benchmark: ten to warm up, forty that are timed
OLD = AllocatorSettings(by_address=True)  #: torch 1.12's allocator


class Row(NamedTuple):
    layout: str
    model: str
    image_size: int
    ran: int
    failed: int

    @property
    def half(self) -> str:
        """Which half of the rows this is in: a fixed hash of the name decides."""
        return "learn" if hashlib.sha256(self.model.encode()).digest()[0] % 2 == 0 else "check"


def read_rows(layout: str, path: Path | None = None) -> list[Row]:
    with open(path or ROWS / f"rtx3090_timm_amp_{layout}.csv", newline="") as file:
        return [
            Row(
                layout,
                r["model"],
                int(r["image_size"]),
                int(r["batch_that_ran"]),
                int(r["batch_that_ran_out_of_memory"]),
            )
            for r in csv.DictReader(file)
        ]


def build(model: str, image_size: int) -> nn.Module:
    """The network for that image size, attention written out."""
    import timm

    if hasattr(timm, "layers"):  # before 0.9 attention was always written out
        timm.layers.set_fused_attn(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = timm.models.get_pretrained_cfg(model)
        default = getattr(config, "input_size", (image_size,))[-1]
        sized = bool(re.search("vit|deit|beit|swin|cait|volo|coat|nest|mixer|mlp|pit|tnt|xcit|twins|convit", model))
        network = None
        if default != image_size and sized:
            try:
                network = timm.create_model(model, img_size=image_size)
            except TypeError:
                network = None
        return (network or timm.create_model(model)).train()


def timm_loop(layout: str, image_size: int, classes: int = 1000) -> Loop:
    """``TrainBenchmarkRunner`` of timm's benchmark.py: gradients zeroed, forward, loss and backward under autocast."""
    layout_of = torch.channels_last if layout == "nhwc" else torch.contiguous_format

    def batch(size: int) -> Any:
        return torch.empty(size, 3, image_size, image_size, device=DEVICE).contiguous(memory_format=layout_of)

    def loss(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        output = model(images)
        output = output[0] if isinstance(output, tuple) else output
        target = torch.empty(output.shape[0], device=images.device, dtype=torch.long).random_(classes)
        return nn.functional.cross_entropy(output, target)

    return Loop(
        batch=batch,
        loss=loss,
        optimizer=lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, nesterov=True, foreach=False),
        autocast=torch.float16,
        backward_inside=True,
        keep_gradients=True,
        old=True,
    )


def network_of(row: Row) -> nn.Module:
    torch.manual_seed(0)
    try:
        with torch.device("meta"):
            network = build(row.model, row.image_size)
    except (RuntimeError, NotImplementedError):  # it reads values when it is made
        network = build(row.model, row.image_size)
    return network.to(memory_format=torch.channels_last) if row.layout == "nhwc" else network


def trace_row(row: Row) -> Program:
    network = network_of(row)
    recurrent = any(isinstance(module, nn.RNNBase) for module in network.modules())
    sizes = (2, 3) if recurrent else (PRIME,)  # a recurrent network's workspace has a part that does not grow
    return trace_loop(network, timm_loop(row.layout, row.image_size), sizes=sizes, steps=3)


def whole_run(program: Program, size: int, capacity: int, choice: Choice = "expected", steps: int = STEPS) -> Replay:
    """The replay of a run of the benchmark: of three steps, and of all where the allocator had to give back its cache,
    since then each step finds another one than the step before."""
    found = benchmarked(program, size, capacity, choice)
    if found.out_of_memory is not None or not found.retries:
        return found
    return benchmarked(program.at_steady_state(steps - 3), size, capacity, choice)


def benchmarked(program: Program, size: int, capacity: int, choice: Choice = "expected") -> Replay:
    """The replay with what torch 1.12 does under ``cudnn.benchmark=True`` (aten/src/ATen/native/cudnn/Conv_v7.cpp).

    When a convolution is met for the first time, all its algorithms are tried and the allocator's cache is given back
    (``findAlgorithms``). An algorithm whose workspace cannot be had is left for one that does without (``try_all``),
    from then on. ``out_of_memory`` is an entry of the program with these additions.
    """
    convolutions = {
        place for place, rule in enumerate(program.table, 2) if isinstance(rule, Kernel) and rule.name == CONVOLUTION
    }
    entries: list[tuple[int, int, int]] = []
    kinds: list[int] = []  # of each entry: its convolution's place in the table, 0 for anything else
    met: set[int] = set()
    for entry, place in zip(program.at(size, choice), program.sizes, strict=True):
        kind = place if place in convolutions else 0
        if kind and kind not in met:
            met.add(kind)
            entries.append((0, EMPTY, 0))
            kinds.append(0)
        entries.append(entry)
        kinds.append(kind)
    found, left_out = replay(entries, capacity, OLD), 0
    while found.out_of_memory is not None and (kind := kinds[found.out_of_memory]):
        for at in range(found.out_of_memory, len(entries)):
            if kinds[at] == kind:
                entries[at] = (entries[at][0], 0, entries[at][2])
        found, left_out = replay(entries, capacity, OLD), left_out + 1
    return replace(found, retries=found.retries + left_out)


class Verdict(NamedTuple):
    row: Row
    needs: tuple[int, int]  #: bytes allocated at most, at the batch size that ran and at the one that failed
    fits: tuple[bool, bool]
    error: str = ""

    @property
    def word(self) -> str:
        if self.error:
            return "not built"
        if not self.fits[0]:
            return "too small"
        return "too large" if self.fits[1] else "exact"


def judge(task: tuple[Row, str, int, Choice, int, Path | None]) -> Verdict:
    """Does the first batch size of the row fit, and the second not?"""
    row, method, capacity, choice, steps, cache = task
    torch.set_num_threads(1)
    try:
        if method == "formula":
            formula = formula_of(row)
            needs = formula.memory(row.ran), formula.memory(row.failed)
            return Verdict(row, needs, (needs[0] <= capacity, needs[1] <= capacity))
        program = _cached(row, cache)
    except Exception as error:  # noqa: BLE001 - whatever the network raises
        return Verdict(row, (0, 0), (False, False), f"{type(error).__name__}: {error}")
    replays = [whole_run(program, size, capacity, choice, steps) for size in (row.ran, row.failed)]
    peaks = [r.peak_allocated for r in replays]
    fits = [r.out_of_memory is None for r in replays]
    return Verdict(row, (peaks[0], peaks[1]), (fits[0], fits[1]))


def _cached(row: Row, cache: Path | None) -> Program:
    if cache is None:
        return trace_row(row)
    path = cache / f"{row.layout}-{row.model}-{row.image_size}.pickle"
    if not path.exists():
        program = trace_row(row)
        cache.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(program))
    program = pickle.loads(path.read_bytes())
    assert isinstance(program, Program)
    return program


def formula_of(row: Row) -> Formula:
    settings = StepSettings(precision="16-mixed")
    images = torch.empty(2, 3, row.image_size, row.image_size)
    sgd = partial(torch.optim.SGD, momentum=0.9)
    return run_formula(TrainingSetup(network_of(row), settings, optimizer=sgd), (2, images)).formula


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="a table with the columns of rows/*.csv; --layout says which it is")
    parser.add_argument("--layout", choices=["nhwc", "nchw"], help="both, where not given")
    parser.add_argument("--method", choices=["trace", "formula"], default="trace")
    parser.add_argument("--half", choices=["learn", "check"], help="both, where not given")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--capacity", type=float, default=CAPACITY / 2**30, help="GiB that the allocator can have")
    parser.add_argument("--workspaces", choices=["low", "expected", "high"], default="expected")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps that are replayed on a full card, 3 at least")
    parser.add_argument("--cache", type=Path, help="a folder in which traces are kept")
    parser.add_argument("models", nargs="*", help="only these networks")
    options = parser.parse_args()
    if options.rows and not options.layout:
        parser.error("--rows needs --layout")
    os.environ.setdefault("MEMPLAN_CUDNN", "off")
    capacity = int(options.capacity * 2**30)
    for layout in [options.layout] if options.layout else ["nhwc", "nchw"]:
        rows = [r for r in read_rows(layout, options.rows) if options.half in (None, r.half)]
        rows = [r for r in rows if not options.models or r.model in options.models]
        tasks = [(row, options.method, capacity, options.workspaces, options.steps, options.cache) for row in rows]
        with ProcessPoolExecutor(options.jobs) as pool:
            report(layout, list(pool.map(judge, tasks)))


def report(layout: str, verdicts: list[Verdict]) -> None:
    for half in ("learn", "check", "all"):
        words = Counter(v.word for v in verdicts if half in ("all", v.row.half))
        count = sum(words.values())
        if count:
            share = 100 * words["exact"] / count
            others = ", ".join(f"{words[w]} {w}" for w in ("too large", "too small", "not built"))
            print(f"{layout} {half:5}  {words['exact']} of {count} exact ({share:.1f} %), {others}")
    for v in sorted(verdicts, key=lambda v: v.word):
        if v.word != "exact":
            ran, failed = (need / 2**30 for need in v.needs)
            at = f"{v.row.ran} ran, {v.row.failed} did not; predicted {ran:.2f}, {failed:.2f} GiB"
            print(f"  {v.word:9} {v.row.model} ({v.row.half}): {v.error or at}", flush=True)


if __name__ == "__main__":
    main()
