"""Plans that are confirmed by real steps on a GPU: prints a JSON object of what each showed (see test_proposal.py)."""

from __future__ import annotations

import gc
import json
import random
import traceback
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_memplan as mp

COPIES: list[int] = []  #: batch sizes of real steps on a copy: planning restores attributes of classes


class Net(pl.LightningModule):
    """A small CNN; ``fails`` is what a real step on a copy does."""

    def __init__(self, fails: Any = None) -> None:
        super().__init__()
        self.batch_size = 2
        self.fails = fails
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout(0.1)),
            *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10)),
        )

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if type(batch[0]) is torch.Tensor and not isinstance(self.trainer, pl.Trainer):  # neither a trace nor training
            COPIES.append(len(batch[0]))
            if self.fails is not None:
                self.fails(len(batch[0]))
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([(torch.zeros(3, 64, 64), 0)] * 20_000, batch_size=self.batch_size)


class InTurn(Net):
    """A wider one is trained in the last of each three batches."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.wide = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())

    def training_step(self, batch: Any, batch_idx: int) -> None:
        last = batch_idx % 3 == 2
        optimizer = self.optimizers()[last]
        loss = super().training_step(batch, batch_idx) if not last else self.wide(batch[0]).mean()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(part.parameters()) for part in (self.net, self.wide)]


class Watched(mp.MemoryPlanner):
    """Remembers whether setup left the card and the random states as they were."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        before = self.state()
        super().setup(trainer, pl_module, stage)
        self.unchanged = all(a == b for a, b in zip(before, self.state(), strict=True))

    def state(self) -> tuple[Any, ...]:
        gc.collect()
        in_use = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        states = torch.get_rng_state().tolist(), torch.cuda.get_rng_state().tolist()
        return *in_use, *states, random.getstate(), np.random.get_state()[1].tolist()


def fit(module: Net, steps: int = 3, **planner: Any) -> dict[str, Any]:
    COPIES.clear()
    torch.cuda.empty_cache()
    callback = Watched(method="trace", **{"max_batch_size": 512, **planner})
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    try:
        trainer.fit(module)
    except Exception as error:  # noqa: BLE001 - what it is, is what is shown
        lines = [frame.line for frame in traceback.extract_tb(error.__traceback__)]
        return {"error": f"{type(error).__name__}: {error}", "lines": lines, "batch_size": module.batch_size}
    plan, measured = callback.plan, callback.measurements
    assert plan is not None
    return {
        "batch_size": module.batch_size,
        "parts": trainer.accumulate_grad_batches,
        "limited_by": plan.limited_by,
        "predicted": plan.peak_reserved,
        "confirmed": plan.confirmed,
        "notes": plan.notes,
        "copies": list(COPIES),
        "reserved": max(m.reserved for m in measured),
        "steps": trainer.global_step,
        "unchanged": callback.unchanged,
        "off": [
            (m.predicted_allocated - m.allocated, m.predicted_reserved - m.reserved) for m in callback.measurements
        ],
    }


def out_of_memory(size: int) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def no_handle_over_100(size: int) -> None:
    if size > 100:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def mistake(size: int) -> None:
    raise KeyError("a mistake of the user's")


def main() -> None:
    warnings.simplefilter("ignore")
    card = mp.detect_devices()[0]
    twice = replace(card, total=2 * card.total, free=2 * card.total)
    shown = {
        "fits": fit(Net()),
        "accumulated": fit(Net(), effective_batch_size=1200),
        "twice the card": fit(Net(), device=twice, confirm=True, max_batch_size=None),
        "no handle": fit(Net(no_handle_over_100)),
        "never": fit(Net(out_of_memory)),
        "mistake": fit(Net(mistake)),
        "mistake, strict": fit(Net(mistake), confirm=True, on_error="raise"),
        "in turn": fit(InTurn(), steps=10),
        "another card": fit(Net(), device="RTX 3090"),
        "not asked": fit(Net(), confirm=False),
        "on the card": fit(Net().cuda()),
    }
    print("SHOWN", json.dumps(shown))


if __name__ == "__main__":
    main()
