"""What MemoryPlanner's hooks cost in every training step, against the step itself.

    tests/nullgpu/nullgpu python -m benchmarks.speed.measuring_cost [--networks own.mlp ...] [--steps 450] [--runs 3]
    NULLGPU_CALLS=1 tests/nullgpu/nullgpu python -m benchmarks.speed.measuring_cost   # calls of CUDA in place of times

Each network is fitted with the callback's default settings, and its hooks are timed within the run: what they take in
all, what of it is asked of the CUDA allocator, and what logging takes (in every step: making the metrics, which is done
for loggers alone, and Lightning's CSVLogger). On a null GPU kernels take no time, so a step is the host's part alone:
less than it takes on any real card. Medians, of steps whose phases are measured and of the others, weighted by how many
there are of each; without the first steps. Of several runs the one whose steps were quickest counts: the one that other
programs disturbed least. The last columns are the hooks' part of a step, without logging and with it.

A clock takes time itself: that of an empty function, timed in every step, is taken off. The hooks as a whole are timed
in every other 50 steps, and what is within them in those between, so that no clock is within another.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import tempfile
import time
import timeit
import warnings
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger

import lightning_memplan as mp
from benchmarks.accuracy.networks import build, loader
from lightning_memplan.devices import allocator_stats
from lightning_memplan.monitor import meter

NETWORKS = ("torchvision.alexnet", "own.pointnet", "torchvision.resnet18", "torchvision.resnet50", "hf.bert")
BLOCK = meter.APART  #: steps: one of them has its phases measured
WARM = BLOCK


class Clock:
    """Sums up how long functions take, step by step, and how often they are called."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, 0
        self.steps: list[tuple[float, int]] = []

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.now += time.perf_counter() - start
                self.calls += 1

        return call

    def next(self) -> None:
        self.steps.append((self.now, self.calls))
        self.now, self.calls = 0.0, 0


class Timed(mp.MemoryPlanner):
    """Notes when steps begin, and keeps the clocks of hooks, of the allocator's interface, of logging, of nothing."""

    HOOKS = ("on_train_batch_start", "on_before_backward", "on_after_backward", "on_train_batch_end")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.starts: list[tuple[float, float]] = []
        self.clocks = {name: Clock() for name in ("hooks", "allocator", "logger", "nothing")}
        self.plain = {name: getattr(self, name) for name in (*self.HOOKS, "_log_step")}
        self.asked = {name: getattr(meter, name) for name in ("read_stats", "reset_peaks")}
        self.hooks = {name: self.clocks["hooks"].timed(self.plain[name]) for name in self.HOOKS}
        self.inner = {name: self.clocks["allocator"].timed(function) for name, function in self.asked.items()}
        self.timed_log = self.clocks["logger"].timed(self.plain["_log_step"])
        self.nothing = self.clocks["nothing"].timed(lambda: None)
        self.on_train_batch_start = self.first  # type: ignore[method-assign]

    def whole(self, step: int) -> bool:
        """Whether it is the hooks that are timed in a step, not what is within them."""
        return step // BLOCK % 2 == 0

    def first(self, *args: Any) -> None:
        step = len(self.starts)
        if step:
            for clock in self.clocks.values():
                clock.next()
        self.starts.append((time.perf_counter(), time.process_time()))
        hooks = self.hooks if self.whole(step) else self.plain
        for name in self.HOOKS[1:]:
            setattr(self, name, hooks[name])
        self._log_step = self.plain["_log_step"] if self.whole(step) else self.timed_log  # type: ignore[method-assign]
        self.ask(self.asked if self.whole(step) else self.inner)
        self.nothing()
        hooks[self.HOOKS[0]](*args)

    @staticmethod
    def ask(functions: dict[str, Callable[..., Any]]) -> None:
        for name, function in functions.items():
            setattr(meter, name, function)


class Cost(NamedTuple):
    """Seconds of a step (by the clock, and of the processors), of the hooks in it, and of two parts of these."""

    step: float
    processor: float
    hooks: float
    allocator: float
    logger: float


def fit(planner: mp.MemoryPlanner, name: str, batch_size: int, steps: int) -> None:
    module, sample = build(name, "AdamW")
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="gpu", devices=1, precision="16-mixed", max_steps=steps, callbacks=planner,
            logger=CSVLogger(folder, flush_logs_every_n_steps=steps), enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, loader(sample, batch_size, steps))


def measure(name: str, batch_size: int, steps: int, **settings: Any) -> Cost:
    planner = Timed(apply=False, history=False, method="trace", **settings)
    try:
        fit(planner, name, batch_size, steps)
    finally:
        planner.ask(planner.asked)
    pairs = list(zip(planner.starts, planner.starts[1:], strict=False))[WARM:]
    phased = [bool(measured.phases) for measured in planner.measurements]
    nothing = median(time for time, _ in planner.clocks["nothing"].steps[WARM:])

    def usual(clock: Clock, whole: bool) -> float:
        kinds = [
            [time - calls * nothing for step, (time, calls) in enumerate(clock.steps)
             if step >= WARM and planner.whole(step) is whole and phased[step] is kind]
            for kind in (True, False)
        ]  # fmt: skip
        return sum(len(kind) * median(kind) for kind in kinds if kind) / sum(map(len, kinds))

    clocks = planner.clocks
    return Cost(
        median(after[0] - before[0] for before, after in pairs),
        median(after[1] - before[1] for before, after in pairs),
        usual(clocks["hooks"], True),
        usual(clocks["allocator"], False),
        usual(clocks["logger"], False),
    )


def calls(name: str, batch_size: int, steps: int) -> tuple[float, int]:
    """How often the null GPU's CUDA (driver, runtime, libraries) is called in a step, and in the hooks of all steps."""
    count = ctypes.c_long.in_dll(ctypes.CDLL(os.environ["LD_PRELOAD"]), "nullgpu_calls")
    planner, begun, within = mp.MemoryPlanner(apply=False, history=False, method="trace"), [], [0]

    def counted(hook: Callable[..., Any], first: bool) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            before = count.value
            begun.extend([before] if first else [])
            try:
                return hook(*args)
            finally:
                within[0] += count.value - before

        return call

    for hook in Timed.HOOKS:
        setattr(planner, hook, counted(getattr(planner, hook), hook == Timed.HOOKS[0]))
    fit(planner, name, batch_size, steps)
    return median(after - before for before, after in pairwise(begun)), within[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batch size {args.batch_size}")
    if os.environ.get("NULLGPU_CALLS"):
        for name in args.networks:
            whole, within = calls(name, args.batch_size, args.steps)
            print(
                f"{name}: {whole:,.0f} calls of CUDA in a step, {within} in the hooks of {args.steps} steps", flush=True
            )
        return
    columns = {"step": 10, "processor": 11, "hooks": 10, "allocator": 11, "logger": 10, "without": 9, "with it": 9}
    print(f"{'network':<22}{''.join(f'{name:>{width}}' for name, width in columns.items())}")
    for name in args.networks:
        cost = min(measure(name, args.batch_size, args.steps) for _ in range(args.runs))
        times = f"{cost.step * 1e3:7.2f} ms{cost.processor * 1e3:8.2f} ms{cost.hooks * 1e6:7.1f} us"
        parts = f"{cost.allocator * 1e6:8.1f} us{cost.logger * 1e6:7.1f} us"
        shares = [f"{100 * part / cost.step:7.2f} %" for part in (cost.hooks - cost.logger, cost.hooks)]
        print(f"{name:<22}{times}{parts}{''.join(shares)}", flush=True)
    hot = min(timeit.repeat(lambda: allocator_stats.read_stats(0), number=1000, repeat=20)) / 1000
    print(f"one reading of the allocator's statistics, in a loop, where caches hold what it needs: {hot * 1e6:.1f} us")


if __name__ == "__main__":
    main()
