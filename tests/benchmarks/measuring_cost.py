"""What MemoryPlanner's hooks cost in every training step, against the step itself.

    tests/nullgpu/nullgpu python -m tests.benchmarks.measuring_cost [--networks own.mlp ...] [--steps 300]

Each network is fitted with the callback's default settings, and its hooks are timed within the run: what they take in
all, what of it is asked of the CUDA allocator, and what the logger takes (Lightning's CSVLogger, in every step). On a
null GPU kernels take no time, so a step is the host's part alone: less than it takes on any real card. Medians, of
steps whose phases are measured and of the others, weighted by how many there are of each; without the first ten.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import timeit
import warnings
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger

import lightning_memplan as mp
from lightning_memplan import _measure
from tests.accuracy.networks import build, loader

NETWORKS = ("torchvision.alexnet", "own.pointnet", "torchvision.resnet18", "torchvision.resnet50", "hf.bert")


class Clock:
    """Sums up how long functions take, step by step."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps: list[float] = []

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.now += time.perf_counter() - start

        return call

    def next(self) -> None:
        self.steps.append(self.now)
        self.now = 0.0

    def usual(self, phased: Sequence[bool]) -> float:
        kinds = [[t for t, kind in zip(self.steps[10:], phased[10:], strict=False) if kind is k] for k in (True, False)]
        return sum(len(kind) * median(kind) for kind in kinds if kind) / sum(map(len, kinds))


class Timed(mp.MemoryPlanner):
    """Notes when steps begin, and keeps the clocks of hooks, of the allocator's interface and of logging."""

    HOOKS = ("on_train_batch_start", "on_before_backward", "on_after_backward", "on_train_batch_end")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.starts: list[float] = []
        self.clocks = {name: Clock() for name in ("hooks", "allocator", "logger")}
        for name in self.HOOKS:
            setattr(self, name, self.clocks["hooks"].timed(getattr(self, name)))
        begin = self.on_train_batch_start
        self._log = self.clocks["logger"].timed(self._log)  # type: ignore[method-assign]

        def first(*args: Any) -> None:
            if self.starts:
                for clock in self.clocks.values():
                    clock.next()
            self.starts.append(time.perf_counter())
            begin(*args)

        self.on_train_batch_start = first  # type: ignore[method-assign]


def measure(name: str, batch_size: int, steps: int, **settings: Any) -> list[float]:
    """Seconds of a step, of the hooks in it, of the allocator's interface and of the logger."""
    planner = Timed(apply=False, history=False, method="trace", **settings)
    asked = {"read_stats": _measure.read_stats, "reset_peaks": _measure.reset_peaks}
    for function, plain in asked.items():
        setattr(_measure, function, planner.clocks["allocator"].timed(plain))
    module, sample = build(name, "AdamW")
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="gpu", devices=1, precision="16-mixed", max_steps=steps, callbacks=planner,
            logger=CSVLogger(folder, flush_logs_every_n_steps=steps), enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        try:
            trainer.fit(module, loader(sample, batch_size, steps))
        finally:
            for function, plain in asked.items():
                setattr(_measure, function, plain)
    whole = [b - a for a, b in zip(planner.starts, planner.starts[1:], strict=False)]
    phased = [bool(measured.phases) for measured in planner.measurements]
    return [median(whole[10:]), *(clock.usual(phased) for clock in planner.clocks.values())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batch size {args.batch_size}")
    print(f"{'network':<22}{'step':>10}{'hooks':>10}{'allocator':>11}{'logger':>10}{'of a step':>11}")
    for name in args.networks:
        step, hooks, allocator, logger = measure(name, args.batch_size, args.steps)
        measuring = hooks - logger
        row = f"{measuring * 1e6:7.1f} us{allocator * 1e6:8.1f} us{logger * 1e6:7.1f} us{100 * measuring / step:9.2f} %"
        print(f"{name:<22}{step * 1e3:7.2f} ms{row}", flush=True)
    hot = min(timeit.repeat(lambda: _measure.read_stats(0), number=1000, repeat=20)) / 1000
    print(f"one reading of the allocator's statistics, in a loop, where caches hold what it needs: {hot * 1e6:.1f} us")


if __name__ == "__main__":
    main()
