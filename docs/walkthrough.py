"""The figures of walkthrough.md: one network, from the formula to the trace to what its steps take.

    tests/nullgpu/nullgpu python docs/walkthrough.py [FOLDER]  # or python alone, where there is a GPU

Prints what the page shows; with a folder, draws its figure there.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_memplan as mp

BATCH_SIZE = 16
MiB = 2**20


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(1, 16, 3)
        self.pool = nn.MaxPool3d(2)
        self.conv2 = nn.Conv3d(16, 32, 3)
        self.head = nn.Linear(32, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        x = self.pool(self.conv1(x).relu())
        x = self.conv2(x).relu()
        return F.cross_entropy(self.head(x.mean((2, 3, 4))), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def scans(count: int) -> TensorDataset:
    return TensorDataset(torch.zeros(1).expand(count, 1, 64, 64, 64), torch.zeros(count, dtype=torch.long))


def heading(text: str) -> None:
    print(f"\n--- {text}")


def main(folder: Path | None) -> None:
    net, card = Net(), mp.gpu("RTX 3090")
    loader = DataLoader(scans(4 * BATCH_SIZE), batch_size=BATCH_SIZE)
    est = mp.estimate(net, loader, device=card, method="trace")
    assert est.program is not None

    heading("the formula")
    formula = est.formula
    table = mp.layers_table(
        est.layers,
        input_bytes=formula.input_bytes,
        batch_size=BATCH_SIZE,
        optimizer_bytes=formula.optimizer_bytes,
    )
    print(table)

    heading("what the first forward pass allocates and frees")
    events = list(zip(est.program.events, *(est.program.at(size) for size in (2, 3, BATCH_SIZE)), strict=True))
    print(f"{'operator':<36}{'bytes: batch of 2':>18}{'of 3':>12}{'of ' + str(BATCH_SIZE):>13}")
    made: dict[int, str] = {}
    for event, *sizes in (row for row in events if row[0].step == 1 and row[0].phase == "forward"):
        block = sizes[0][0]
        if all(size > 0 for _, size, _ in sizes):
            made[block] = f"{event.op.split('.')[1]}{f' of {event.path}' if event.path else ''}"
            small, middle, large = (f"{size:,}" for _, size, _ in sizes)
            print(f"{made[block]:<36}{small:>18}{middle:>12}{large:>13}")
        elif block in made:
            print(f"  frees {made[block]}")

    heading("the step at its peak")
    print(f"peak allocated {est.peak_allocated(BATCH_SIZE):>13,} bytes, in the {est.phase(BATCH_SIZE)} phase")
    for name, size in est.breakdown(BATCH_SIZE).items():
        print(f"  {name:<13}{size:>13,}")

    heading("step by step")
    print(f"{'step':<8}{'allocated':>14}{'reserved':>14}{'forward':>14}{'backward':>14}{'optimizer':>14}")
    first, second, *_, later = est.step_peaks(BATCH_SIZE)
    for name, peaks in (("first", first), ("second", second), ("later", later)):
        phases = "".join(f"{peaks.phases[phase]:>14,}" for phase in ("forward", "backward", "optimizer"))
        print(f"{name:<8}{peaks.allocated:>14,}{peaks.reserved:>14,}{phases}")

    heading("measured")
    planner = mp.MemoryPlanner("trace", apply=False, history=False)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    pl.Trainer(accelerator="gpu", devices=1, max_steps=4, callbacks=[planner], **quiet).fit(net, loader)
    print(f"{'step':<8}{'allocated':>14}{'reserved':>14}{'forward':>14}{'backward':>14}{'optimizer':>14}")
    for m in planner.measurements[:3]:
        phases = "".join(f"{m.phases[phase]:>14,}" for phase in ("forward", "backward", "optimizer"))
        print(f"{m.step:<8}{m.allocated:>14,}{m.reserved:>14,}{phases}")

    heading("which is how far off")
    steady = planner.measurements[2]
    said = {
        "formula": (formula.memory(BATCH_SIZE), "allocated", steady.allocated),
        "trace, allocated": (est.peak_allocated(BATCH_SIZE), "allocated", steady.allocated),
        "trace, reserved": (est.peak(BATCH_SIZE), "reserved", steady.reserved),
    }
    for name, (predicted, of, actual) in said.items():
        error = 100 * (predicted / actual - 1)
        print(f"{name:<18}{predicted:>13,} bytes, {of} {actual:>13,}: {error:+8.3f} %")
    if folder is not None:
        mp.plot_timeline(est, BATCH_SIZE).savefig(folder / "walkthrough.png")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable()
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
