"""Modules of many kinds, and whether planning left them as they were: used on the CPU, and run on the null GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import random
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

import lightning_memplan as mp


class Base(pl.LightningModule):
    """Eight features in, three classes out."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 2
        self.body: nn.Module = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)

    def train_dataloader(self) -> Any:
        return DataLoader([(torch.ones(8), 1)] * 24, batch_size=self.batch_size)


class Metrics(Base):
    def __init__(self) -> None:
        super().__init__()
        accuracy = MetricCollection({"a": MulticlassAccuracy(3), "loss": MeanMetric()})
        self.metrics = nn.ModuleDict({"accuracy": accuracy["a"], "mean": accuracy["loss"]})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.metrics["accuracy"](self(batch[0]), batch[1])
        self.metrics["mean"].update(loss.detach())
        self.log("accuracy", self.metrics["accuracy"])
        return loss


class Buffers(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("scratch", torch.arange(8.0), persistent=False)
        self.table = torch.randn(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.scratch = self.scratch + 1
        self.table = self.table.to(x.device) * 0.5
        return super().forward(x + self.table)


class Average(Base):
    def __init__(self) -> None:
        super().__init__()
        self.average = torch.optim.swa_utils.AveragedModel(self.body)

    def on_train_batch_end(self, *args: Any) -> None:
        self.average.update_parameters(self.body)


class CustomInit(Base):
    def __init__(self, width: int, *, depth: int = 2, **kwargs: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(*(nn.Linear(8, 8) for _ in range(depth)))
        self.extra = kwargs


class Hooked(Base):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.body.register_forward_hook(lambda module, args, out: self.calls.append("forward"))
        self.body.register_forward_pre_hook(lambda module, args: self.calls.append("pre"))
        self.head.register_full_backward_hook(lambda module, a, b: self.calls.append("backward"))
        self.head.weight.register_hook(lambda grad: grad * 2)


class Generators(Base):
    def __init__(self) -> None:
        super().__init__()
        self.python, self.numpy = random.Random(1), np.random.default_rng(1)
        self.torch = torch.Generator().manual_seed(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = self.python.random() + self.numpy.random() + random.random() + np.random.rand()
        return super().forward(F.dropout(x, 0.5) + noise + torch.rand(1).to(x.device))


class Compiled(Base):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.body.compile(backend="eager")


class Tied(Base):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.decoder = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.decoder(self.embedding(x.long().clamp(0, 7)).mean(1)))


class Parametrized(Base):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.body)

        class Symmetric(nn.Module):
            def forward(self, w: torch.Tensor) -> torch.Tensor:
                return w.triu() + w.triu(1).mT

        self.square = nn.Linear(8, 8)
        parametrize.register_parametrization(self.square, "weight", Symmetric())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.square(x))


class LazyAttributes(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "scale"):
            self.scale = torch.ones(8, device=x.device)
        return super().forward(x * self.scale)


class Spectral(Base):
    def __init__(self) -> None:
        super().__init__()
        self.body = spectral_norm(nn.Linear(8, 8))


@dataclasses.dataclass
class Settings:
    widths: list[int]
    seen: dict[str, int] = dataclasses.field(default_factory=dict)


class DataclassAttribute(Base):
    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings([8, 3])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.settings.seen["steps"] = self.settings.seen.get("steps", 0) + 1
        self.settings.widths.append(1)
        return super().forward(x)


class Closure(Base):
    def __init__(self) -> None:
        super().__init__()
        counts = {"calls": 0}

        def activation(x: torch.Tensor) -> torch.Tensor:
            return x.relu() + counts["calls"]

        self.counts, self.activation = counts, activation
        self.part = functools.partial(F.leaky_relu, negative_slope=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.part(self.activation(self.body(x))))


class Cached(Base):
    @functools.cached_property
    def mask(self) -> torch.Tensor:
        return torch.ones(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.mask.to(x.device))


class Shared(Base):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.body
        self.bodies = nn.ModuleList([self.body, self.body])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.bodies[1](self.again(x)))


class ParameterCollections(Base):
    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ParameterList([torch.ones(8), torch.zeros(8)])
        self.named = nn.ParameterDict({"a": torch.ones(8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.list[0] + self.list[1] * self.named["a"])


class OwnGetattr(Base):
    def __init__(self) -> None:
        super().__init__()
        self.config = {"dropout": 0.1}
        self.history: list[str] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name != "config" and name in self.config:
                return self.config[name]
            raise

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if "history" in self.__dict__:
            self.history.append(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.dropout
        return super().forward(x)


class Slots:
    __slots__ = ("steps",)

    def __init__(self) -> None:
        self.steps = 0


class Slotted(Base):
    def __init__(self) -> None:
        super().__init__()
        self.counter = Slots()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.counter.steps += 1
        return super().forward(x)


class Example(Base):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.ones(2, 8)


class ByHand(Base):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        self.steps += 1


class Norms(Base):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.BatchNorm1d(8).eval())


class Recurrent(Base):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 8, 2, batch_first=True)
        self.state: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, state = self.rnn(x[:, None].expand(-1, 4, -1))
        self.state = tuple(s.detach() for s in state)
        return super().forward(out[:, -1])


class Frozen(Base):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.backbone(x)
        return super().forward(x)


class LowRank(Base):
    def __init__(self) -> None:
        super().__init__()
        self.body.requires_grad_(False)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x) + self.up(self.down(x)))

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.down.parameters(), "lr": 1e-2}, {"params": self.up.parameters()}]
        return torch.optim.AdamW([*groups, {"params": self.head.parameters(), "weight_decay": 0.0}])


class Logging(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log_dict({"loss": loss, "half": loss / 2}, on_epoch=True)
        if self.logger is not None:
            self.logger.experiment.add_scalar("mine", 1.0, self.global_step)
        return loss


class Transformer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.register_buffer("position", torch.arange(4.0)[:, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.encoder(x[:, None] + self.position).mean(1))


KINDS: dict[str, Callable[[], Base]] = {
    **{
        kind.__name__: kind
        for kind in (
            Metrics,
            Buffers,
            Average,
            Hooked,
            Generators,
            Compiled,
            Tied,
            Parametrized,
            LazyAttributes,
            Spectral,
        )
    },
    **{
        kind.__name__: kind
        for kind in (DataclassAttribute, Closure, Cached, Shared, ParameterCollections, OwnGetattr, Slotted, Example)
    },
    **{kind.__name__: kind for kind in (ByHand, Norms, Recurrent, Frozen, LowRank, Logging, Transformer)},
    "CustomInit": lambda: CustomInit(8, depth=3, name="x"),
}


# ----------------------------------------------------------------------------------------------------- as it was


def picture(thing: Any, seen: dict[int, int] | None = None) -> Any:
    """Everything in an object by value, and by identity where it is a tensor, a module or another object."""
    seen = {} if seen is None else seen
    if thing is None or isinstance(thing, (int, float, str, bytes, bool, type, torch.dtype, torch.device, torch.Size)):
        return thing
    if id(thing) in seen:
        return ("again", id(thing))
    seen[id(thing)] = 1
    if isinstance(thing, torch.Tensor):
        value = None if thing.device.type == "meta" else thing.detach().cpu().reshape(-1).tolist()
        own = (
            id(thing),
            type(thing).__name__,
            str(thing.device),
            thing.requires_grad,
            thing.data_ptr(),
        )
        return (
            *own,
            tuple(thing.shape),
            thing.stride(),
            repr(value),
            picture(thing.grad, seen) if thing.is_leaf else None,
        )
    if type(thing).__module__.startswith("torch._dynamo"):
        return ("compiler", id(thing))  # which notes how it last compiled, whatever module that was of
    if isinstance(thing, np.ndarray):
        return (id(thing), thing.tolist())
    if isinstance(thing, random.Random):
        return (id(thing), thing.getstate())
    if isinstance(thing, np.random.Generator):
        return (id(thing), repr(thing.bit_generator.state))
    if isinstance(thing, torch.Generator):
        return (id(thing), thing.get_state().tolist())
    if isinstance(thing, dict):
        return (id(thing), [(repr(k), picture(v, seen)) for k, v in thing.items()])
    if isinstance(thing, (list, tuple)):
        return (type(thing).__name__, [picture(v, seen) for v in thing])
    if isinstance(thing, (set, frozenset)):
        return (id(thing), sorted(map(repr, thing)))
    slots = {name: getattr(thing, name, None) for name in getattr(type(thing), "__slots__", ()) if name != "__dict__"}
    closed = [
        cell.cell_contents for cell in getattr(thing, "__closure__", None) or () if cell.cell_contents is not thing
    ]
    if isinstance(thing, pl.Trainer) or type(thing).__module__.startswith(("pytorch_lightning.trainer", "weakref")):
        return id(thing)
    parts = {**vars(thing), **slots} if hasattr(thing, "__dict__") else slots
    return (
        id(thing),
        type(thing).__qualname__,
        [(name, picture(part, seen)) for name, part in parts.items()],
        [picture(c, seen) for c in closed],
    )


def random_states(cuda: bool) -> Any:
    own = (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist())
    return (*own, torch.cuda.get_rng_state().tolist() if cuda else None)


class Watched(mp.MemoryPlanner):
    """Keeps what planning found and what it left."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        cuda, threads = trainer.strategy.root_device.type == "cuda", threading.active_count()
        self.before = picture(pl_module), random_states(cuda)
        super().setup(trainer, pl_module, stage)
        self.after = picture(pl_module), random_states(cuda)
        self.threads = threading.active_count() - threads


class Planned(Exception):
    """That is all that is wanted."""


def planned(module: Base, /, **settings: Any) -> Watched:
    """Planned, and not trained."""

    class Stops(pl.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            raise Planned

    planner = Watched(max_batch_size=8, apply=False, **settings.pop("planner"))
    trainer = pl.Trainer(
        callbacks=[planner, Stops()],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    with contextlib.suppress(Planned):
        trainer.fit(module)
    return planner


def difference(a: Any, b: Any, where: str = "") -> str:
    """Where two pictures differ first, empty if they do not."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
        names = (str(x[0]) if isinstance(x, tuple) and x else str(k) for k, x in enumerate(a))
        found = (difference(x, y, f"{where}/{name}") for name, x, y in zip(names, a, b, strict=True))
        return next(filter(None, found), "")
    return "" if a == b else f"differs at {where}: {str(a)[:200]} {str(b)[:200]}"


def shown(name: str, **settings: Any) -> dict[str, Any]:
    """What planning for a module of that kind changed: nothing, one hopes; by which method, and its notes."""
    torch.manual_seed(1)
    planner = planned(KINDS[name](), **settings)
    plan = planner.plan
    assert plan is not None
    return {
        "changed": difference(planner.before, planner.after),
        "threads": planner.threads,
        "method": plan.method,
        "confirmed": plan.confirmed,
        "notes": plan.notes,
    }


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    for name in names or KINDS:
        try:
            found = shown(name, accelerator="gpu", devices=1, planner={"method": "probe", "confirm": True})
        except Exception as error:  # noqa: BLE001 - what it is, is what is shown
            found = {"error": repr(error)}
        print("SHOWN", json.dumps({"name": name, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
