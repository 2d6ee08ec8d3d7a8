"""What MemoryPlanner's two hooks cost in every training step, against the step itself.

    python tests/benchmarks/measuring_cost.py [BATCH_SIZE]        # on a GPU, or on the null GPU

A step of ResNet-50 (torchvision, 16-mixed, AdamW) runs under a Trainer with the callback; its hooks are timed within
it. On a null GPU kernels take no time, so its step is the host's part alone: less than a step takes on any real card.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader

import lightning_memplan as mp

STEPS = 60


class Timed(mp.MemoryPlanner):
    """Keeps how long its hooks took, and how long it was from one step's start to the next's."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hooks: list[float] = []
        self.starts: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.starts.append(time.perf_counter())
        self.hooks.append(self._time(super().on_train_batch_start, *args))

    def on_train_batch_end(self, *args: Any) -> None:
        self.hooks[-1] += self._time(super().on_train_batch_end, *args)

    @staticmethod
    def _time(hook: Callable[..., None], *args: Any) -> float:
        start = time.perf_counter()
        hook(*args)
        return time.perf_counter() - start


class ResNet(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        import torchvision

        self.net = torchvision.models.resnet50()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch), torch.zeros(len(batch), dtype=torch.long, device=self.device))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def measure(batch_size: int, every_n_steps: int, folder: str) -> tuple[float, float]:
    """Median seconds of the hooks and of a whole step, without the first ten."""
    planner = Timed(apply=False, every_n_steps=every_n_steps)
    images = torch.zeros(3, 224, 224).expand(STEPS * batch_size, 3, 224, 224)
    trainer = pl.Trainer(
        accelerator="gpu", devices=1, precision="16-mixed", max_steps=STEPS, callbacks=planner,
        logger=CSVLogger(folder, flush_logs_every_n_steps=STEPS), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(ResNet(), DataLoader(images, batch_size=batch_size))
    steps = [b - a for a, b in zip(planner.starts, planner.starts[1:], strict=False)]
    return median(planner.hooks[10:]), median(steps[10:])


def main(batch_size: int) -> None:
    warnings.filterwarnings("ignore")
    print(f"ResNet-50, batch size {batch_size}, on {torch.cuda.get_device_name()}")
    for every_n_steps, text in ((1, "logged in every step"), (50, "logged in every 50th step")):
        with tempfile.TemporaryDirectory() as folder:
            hooks, step = measure(batch_size, every_n_steps, str(Path(folder)))
        print(f"  {text}: {hooks * 1e6:.0f} us of a step of {step * 1e3:.1f} ms: {100 * hooks / step:.3f} %")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 64)
