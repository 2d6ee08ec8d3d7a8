"""Probes on a GPU, one after another in one process: prints a JSON object of what each showed (see test_probe.py)."""

from __future__ import annotations

import gc
import json
import random
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_memplan as mp
from lightning_memplan.data.samples import read_samples
from lightning_memplan.probe.probe import TrialPeaks, probe_steps, try_step
from lightning_memplan.settings import StepSettings
from lightning_memplan.step.setup import TrainingSetup


class Net(pl.LightningModule):
    """A small CNN, or a wide one whose step is large."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.batch_size = 2
        self.net = nn.Sequential(
            *(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.1)),
            *(nn.Conv2d(width, 2 * width, 3, stride=2), nn.BatchNorm2d(2 * width), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * width, classes)),
        )

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([(torch.zeros(3, 64, 64), 0)] * 20_000, batch_size=self.batch_size)


class Compiled(Net):
    """One whose network is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net)  # type: ignore[assignment]


class Begins(Net):
    """One of whose hooks needs a loader, which a copy's trainer does not have."""

    def on_train_start(self) -> None:
        self.batches = len(self.trainer.train_dataloader)


class NotMany(Net):
    """One whose step cannot take more than 32 samples."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if len(batch[0]) > 32:
            raise ValueError("too many samples for this kernel")
        return super().training_step(batch, batch_idx)


class Drawn(nn.Module):
    """A recurrent network with dropout, of which some layers are left out by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(8, 8, 2, dropout=0.1) for _ in range(20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if torch.rand([]) < 0.5:
                x = layer(x)[0]
        return x


def in_use() -> tuple[int, int]:
    gc.collect()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def fit(precision: Any, net: Net | None = None) -> list[list[int]]:
    planner = mp.MemoryPlanner(method="probe", max_batch_size=512)
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        precision=precision,
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        callbacks=[planner],
    )
    trainer.fit(net or Net())
    assert planner.plan is not None
    assert (planner.plan.method, planner.plan.batch_size) == ("probe", 512)
    return [[m.predicted_allocated, m.allocated, m.predicted_reserved, m.reserved] for m in planner.measurements]


def probe(net: nn.Module, side: int = 64, **kwargs: Any) -> list[int]:
    batch = (torch.zeros(4, 3, side, side), torch.zeros(4, dtype=torch.long))
    settings = StepSettings(**kwargs)
    traces, _ = probe_steps(TrainingSetup(net, settings), read_samples(batch).batches, 0)
    return [t.batch_size for t in traces]


def tried(net: nn.Module, size: int = 512) -> TrialPeaks:
    batch = (torch.zeros(size, 3, 64, 64), torch.zeros(size, dtype=torch.long))
    return try_step(TrainingSetup(net, StepSettings(gradient_clip_val=1.0)), (size, batch), 0)


def main() -> None:
    shown: dict[str, Any] = {}
    warnings.simplefilter("ignore")
    for precision in ("32-true", "16-mixed"):
        shown[precision] = fit(precision)
    shown["compiled"] = fit("32-true", Compiled())

    shown["tried"] = tried(Net())
    rows = read_samples((torch.zeros(5, 3, 64, 64), torch.zeros(5, dtype=torch.long)))
    shown["repeated"] = try_step(TrainingSetup(Net(), StepSettings(gradient_clip_val=1.0)), (512, rows.large(512)), 0)
    free = torch.cuda.mem_get_info()[0]
    shown["tried too much"] = tried(Net(width=1024))
    shown["free"] = [free, torch.cuda.mem_get_info()[0]]

    # nothing of the user's is changed, and the card is left as it was found
    net = Net()
    held = [torch.ones(2**20, device="cuda")]  # 4 MiB of the user's own
    before = {name: value.clone() for name, value in net.state_dict().items()}
    states = (torch.get_rng_state(), torch.cuda.get_rng_state(), random.getstate())
    use = in_use()
    shown["sizes"] = probe(net)
    shown["use"] = [use, in_use()]
    shown["unchanged"] = all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    shown["on_host"] = {p.device.type for p in net.parameters()} == {"cpu"} and all(
        p.grad is None for p in net.parameters()
    )
    after = (torch.get_rng_state(), torch.cuda.get_rng_state(), random.getstate())
    shown["random"] = [torch.equal(states[0], after[0]), torch.equal(states[1], after[1]), states[2] == after[2]]
    shown["history"] = len(torch.cuda.memory._snapshot()["device_traces"][0])

    # an error of the large batch alone: it is not probed, and a note says so
    batch = (torch.zeros(4, 3, 64, 64), torch.zeros(4, dtype=torch.long))
    traces, _ = probe_steps(TrainingSetup(NotMany()), read_samples(batch).batches, 0, capacity=2**32, largest=64)
    shown["not many"] = [[t.batch_size for t in traces], *traces[0].notes]
    traces, _ = probe_steps(TrainingSetup(Net()), read_samples(batch).batches, 0, capacity=2**32, largest=64)
    shown["large"] = [t.batch_size for t in traces]
    traces, _ = probe_steps(TrainingSetup(Begins()), read_samples(batch).batches, 0)
    shown["begins"] = traces[0].notes

    # the user's own error, unchanged
    try:
        probe(nn.Linear(7, 7))
    except RuntimeError as error:
        shown["error"] = [type(error).__name__, str(error).splitlines()[0]]

    # a step that is too large for five, or even for one, on a card that is nearly full
    free = torch.cuda.mem_get_info()[0]
    filler = torch.empty(free - 1000 * 2**20, dtype=torch.uint8, device="cuda")
    shown["smaller"] = probe(Net(), side=700)
    try:
        probe(Net(), side=2500)
    except mp.TraceError as error:
        shown["none"] = str(error)
    del filler
    shown["use_at_the_end"] = in_use()[0]
    assert held

    # what is drawn is the same at each batch size; a process keeps cuDNN's states
    batch = (torch.zeros(4, 3, 8), torch.zeros(4))
    traces, _ = probe_steps(TrainingSetup(Drawn()), read_samples(batch).batches, 0)
    shown["drawn"] = [len(t.events) for t in traces]
    states = 82 * 1536 * 24  # bytes, for the null GPU's multiprocessors and threads on each
    shown["states"] = [sum(e.size == states for e in t.events) for t in traces]
    print("SHOWN", json.dumps(shown))


if __name__ == "__main__":
    main()
