"""Steps that do not take every batch size, for ``test_retrace.py``, which also runs this file on the null GPU.

There each is planned, and trained at the batch size that is set. What came is printed as JSON.
"""

from __future__ import annotations

import json
import warnings

import pytorch_lightning as pl
import torch
from torch import nn

import lightning_memplan as mp

WIDTH = 1024


class Does(pl.LightningModule):
    """``step(module, x)`` is its loss."""

    def __init__(self, step):
        super().__init__()
        self.net, self.step, self.batch_size = nn.Linear(WIDTH, WIDTH), step, 2
        self.register_buffer("queue", torch.zeros(WIDTH, 4096))

    def training_step(self, batch, batch_idx):
        return self.step(self, batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

    def train_dataloader(self):
        return torch.utils.data.DataLoader([torch.zeros(WIDTH)] * 40_000, self.batch_size, drop_last=True)


def by_eights(module, x):
    assert len(x) % 8 == 0, "a batch is of eights"
    return module.net(x).relu().mean()


def in_thirds(module, x):
    return module.net(x.view(3, -1, WIDTH)).relu().mean()


def into_a_queue(module, x):
    out = module.net(x)
    module.queue[:, : len(out)] = out.detach().T
    assert module.queue.size(1) % len(x) == 0
    return out.relu().mean()


def at_most_1000(module, x):
    assert len(x) <= 1000
    return module.net(x).relu().mean()


def in_quarters(module, x):
    return sum(module.net(part).relu().mean() for part in x.chunk(4))


def by_sixtyfours(module, x):
    return sum(module.net(part).relu().mean() for part in x.split(64))


def twice_if_many(module, x):
    out = module.net(x)
    return torch.cat([out, out, out]).relu().mean() if len(x) > 500 else out.relu().mean()


STEPS = (by_eights, in_thirds, into_a_queue, at_most_1000, in_quarters, by_sixtyfours, twice_if_many)


def of_eights():
    return Does(by_eights)


def main():
    warnings.simplefilter("ignore")
    shown = {}
    for method, steps in (("trace", STEPS), ("auto", (by_eights, into_a_queue))):
        for step in steps:
            module, planner = Does(step), mp.MemoryPlanner(method=method, confirm=False, history=False)
            quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
            trainer = pl.Trainer(accelerator="gpu", devices=1, max_steps=3, logger=False, callbacks=[planner], **quiet)
            trainer.fit(module)
            plan = planner.plan
            shown[f"{step.__name__} {method}"] = {
                "batch_size": module.batch_size,
                "limited_by": plan.limited_by,
                "used": plan.peak_reserved / plan.budget,
                "predicted": [m.predicted_reserved for m in planner.measurements],
                "measured": [m.reserved for m in planner.measurements],
            }
    print(json.dumps(shown))


if __name__ == "__main__":
    main()
