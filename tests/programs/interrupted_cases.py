"""Planning that fails or is stopped at a named point, and what it leaves: on the CPU, and run on the null GPU.

``python interrupted_cases.py FOLDER`` prints a JSON object for each point on a GPU, and for each at which a process is
killed. ``FOLDER`` is where all files would be: the working directory, the home and the place for temporary files.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.data import DataLoader, Dataset

import lightning_memplan as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.programs.undisturbed_cases import difference, picture, random_states


class Mistake(Exception):
    """The user's own."""


class Points:
    """Note where planning is. Something happens at the point that is armed."""

    def __init__(self) -> None:
        self.arm("", lambda: None)

    def arm(self, name: str, strike: Callable[[], None], *, again: bool = False) -> None:
        """Let ``strike`` happen at a point: once, or each time that it is reached."""
        self.armed, self.strike, self.again, self.struck = name, strike, again, False

    def disarm(self) -> None:
        """Let nothing happen from here on."""
        self.armed = ""

    def reach(self, name: str) -> None:
        """Come by a point."""
        if name == self.armed and (self.again or not self.struck):
            self.struck = True
            self.strike()


POINTS = Points()


# ------------------------------------------------------------------------------------- a user whose every hook can fail


class Samples(Dataset[Any]):
    def __len__(self) -> int:
        POINTS.reach("dataset.__len__")
        return 24

    def __getitem__(self, index: int) -> Any:
        POINTS.reach("dataset.__getitem__")
        return torch.ones(8) * index, index % 3


def collate(rows: Any) -> Any:
    POINTS.reach("collate_fn")
    return torch.stack([x for x, _ in rows]), torch.tensor([y for _, y in rows])


class Data(pl.LightningDataModule):
    """Holds the batch size three times over: as hyperparameter, as attribute, and for validation."""

    def __init__(self, batch_size: int = 2, val_size: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._batch_size, self._val_size = batch_size, val_size

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        if value != 2:  # not where it is put back
            POINTS.reach("batch_size is set")
        self._batch_size = value

    @property
    def val_size(self) -> int:
        return self._val_size

    @val_size.setter
    def val_size(self, value: int) -> None:
        if value != 3:
            POINTS.reach("val_size is set")
        self._val_size = value

    def train_dataloader(self) -> Any:
        POINTS.reach("train_dataloader")
        return DataLoader(Samples(), self.batch_size, collate_fn=collate, num_workers=2)

    def val_dataloader(self) -> Any:
        POINTS.reach("val_dataloader")
        return DataLoader(Samples(), batch_size=self.val_size, collate_fn=collate)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        POINTS.reach("on_before_batch_transfer")
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        POINTS.reach("transfer_batch_to_device")
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        POINTS.reach("on_after_batch_transfer")
        return batch


class Copied:
    """Something that a module keeps."""

    def __deepcopy__(self, memo: Any) -> Copied:
        POINTS.reach("a copy is made")
        return self


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        POINTS.reach("forward")
        return F.dropout(self.norm(self.linear(x)), 0.5)


class Optimizer(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        POINTS.reach("optimizer.step")
        out = super().step(closure)
        POINTS.reach("after optimizer.step")
        return out


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"batch_size": 2, "width": 8})
        self.layer, self.head, self.later = Layer(), nn.Linear(8, 3), None
        self.kept, self.calls = Copied(), []

    def where(self) -> str:
        """Which run of the step this is."""
        if isinstance(self.head.weight, FakeTensor):
            return "trace"
        calls = {frame.f_code.co_name for frame, _ in traceback.walk_stack(None)}
        return "confirm" if "try_step" in calls else "probe"

    def setup(self, stage: str) -> None:
        POINTS.reach("setup")

    def configure_model(self) -> None:
        POINTS.reach("configure_model")
        self.later = self.later or nn.Linear(8, 8)

    def configure_optimizers(self) -> Any:
        POINTS.reach("configure_optimizers")
        return Optimizer(self.parameters(), lr=1e-3)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        POINTS.reach("on_train_batch_start")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls.append(batch_idx)
        POINTS.reach("training_step")
        POINTS.reach(f"training_step {batch_idx} in the {self.where()}")
        out = self.head(self.layer(self.later(batch[0])))
        out.register_hook(self.backward_hook)
        return F.cross_entropy(out, batch[1])

    def backward_hook(self, grad: torch.Tensor) -> None:
        POINTS.reach("a backward hook")

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        POINTS.reach("validation_step")
        return self.head(batch[0]).sum()

    def on_before_zero_grad(self, optimizer: Any) -> None:
        POINTS.reach("on_before_zero_grad")

    def on_after_backward(self) -> None:
        POINTS.reach("on_after_backward")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        POINTS.reach("on_before_optimizer_step")

    def configure_gradient_clipping(self, *args: Any) -> None:
        POINTS.reach("configure_gradient_clipping")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        POINTS.reach("on_train_batch_end")


#: hooks of the user's that planning calls
HOOKS = """
dataset.__len__ | dataset.__getitem__ | collate_fn | train_dataloader | val_dataloader | on_before_batch_transfer
transfer_batch_to_device | on_after_batch_transfer | a copy is made | setup | configure_model | configure_optimizers
on_train_batch_start | training_step | forward | on_before_zero_grad | a backward hook | on_after_backward
on_before_optimizer_step | configure_gradient_clipping | optimizer.step | after optimizer.step | on_train_batch_end
validation_step
"""
HOOKS = [name.strip() for name in HOOKS.replace("\n", "|").split("|") if name.strip()]

#: where planning itself is stopped: as a function is called for the n-th time, in the module that calls it
INSIDE: dict[str, tuple[str, str, int]] = {
    "the history is read": ("monitor.history", "load_history", 1),
    "kernels are registered": ("cuda.dispatch", "torch.library.Library.impl", 40),
    "the host's kernel is registered": ("trace.isolation", "torch.library.Library.impl", 1),
    "an operator is recorded": ("trace.recorder", "Recorder._see", 60),
    "an operator of a second recording": ("trace.recorder", "Recorder._see", 200),
    "traces are scaled": ("planning.predict", "scale", 1),
    "the layers are counted": ("step.optimization.plain", "record_layers", 1),
    "a batch size is looked for": ("memory.fitting", "largest_fitting", 1),
    "validation is traced": ("planning.predict", "trace_validation", 1),
    "all ranks agree": ("planning.proposal", "over_ranks", 1),
    "loaders are changed": ("planning.apply", "change_loaders", 1),
    "the plan is printed": ("planning.fit", "say", 1),
}
LEARNED: dict[str, Any] = {"margin": "learned", "history": True}  # so that a history is read
SETTERS = ["batch_size is set", "val_size is set"]
#: on a card: which of its runs the step is in
ON_CARD = [f"training_step {step} in the {where}" for step in (0, 1) for where in ("trace", "probe", "confirm")]
ALL = [*HOOKS, *SETTERS, *INSIDE]
#: where a process is killed: on the CPU, and on a card
KILLED = {
    "cpu": [
        *("train_dataloader", "dataset.__getitem__", "collate_fn", "setup", "configure_model", "configure_optimizers"),
        *("a backward hook", "optimizer.step", "validation_step", *SETTERS, "the history is read"),
        *("kernels are registered", "an operator of a second recording", "a batch size is looked for"),
    ],
    "gpu": ON_CARD,
}


@contextlib.contextmanager
def reached_inside(name: str) -> Iterator[None]:
    """The function of a point in ``INSIDE`` tells when it is called."""
    if name not in INSIDE:
        yield
        return
    place, path, nth = INSIDE[name]
    owner: Any = importlib.import_module(f"lightning_memplan.{place}")
    *steps, last = path.split(".")
    for step in steps:
        owner = getattr(owner, step)
    original, calls = getattr(owner, last), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            POINTS.reach(name)
        return original(*args, **kwargs)

    setattr(owner, last, counted)
    try:
        yield
    finally:
        setattr(owner, last, original)


# ----------------------------------------------------------------------------------------------- what there is to leave

_OPERATORS = ("bincount", "linear", "native_layer_norm", "scaled_dot_product_attention", "conv2d", "mm", "gru_cell")


def trainer_of(trainer: pl.Trainer) -> dict[str, Any]:
    """A Trainer's attributes, its loops' and its connectors', but for the callback's own."""
    loops = (trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.val_loop)
    parts = (trainer, *loops, trainer._data_connector, trainer.strategy, *(loop._data_source for loop in loops[::2]))
    return {f"{k} {type(part).__name__}": {n: _of(v) for n, v in vars(part).items()} for k, part in enumerate(parts)}


def _of(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool, tuple, type(None))) else id(value)


def of_the_process() -> dict[str, Any]:
    cuda = torch.cuda.is_initialized()
    world = torch.distributed.distributed_c10d._world
    return {
        "children": [child.pid for child in psutil.Process().children(recursive=True)],
        "active children": len(multiprocessing.active_children()),
        "threads": threading.active_count(),
        "kernels": [torch._C._dispatch_dump(f"aten::{name}") for name in _OPERATORS],
        "registered": sorted(map(str, torch.library._impls)),
        "autocast": (torch.amp.autocast.__init__, torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        "modes": (torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()),
        "torch": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_default_device()),
        "group": (world.default_pg, len(world.pg_map), len(world.pg_group_ranks)),
        "warnings": list(warnings.filters),
        "garbage": (gc.isenabled(), gc.get_freeze_count() > 0),  # frozen objects may die, and no more are frozen
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "randomness": random_states(cuda),
        "on the card": (torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), _recorded()) if cuda else None,
    }


def _recorded() -> tuple[int, str]:
    """What the allocator's history has of what is allocated from here on, and how it is labelled."""
    torch.empty(1, device="cuda")
    recorded = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.empty_cache()
    return len(recorded), torch.cuda.memory._get_memory_metadata()


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class Left(Exception):
    """How planning ended, and what it changed."""


class Watched(mp.MemoryPlanner):
    """Says what planning changed when it was stopped."""

    folder = Path()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        def all_there_is() -> dict[str, Any]:
            return {
                "module": picture(pl_module),
                "data": picture(trainer.datamodule),
                "trainer": trainer_of(trainer),
                "files": files(self.folder),
                **of_the_process(),
            }

        before, ended = all_there_is(), "it planned"
        try:
            super().setup(trainer, pl_module, stage)
        except BaseException as error:  # noqa: BLE001 - whatever was raised
            ended = f"{type(error).__name__}: {error}"
        after = all_there_is()
        changed = {name: difference(before[name], after[name]) or "in order" for name in before}
        changed = {name: text for name, text in changed.items() if before[name] != after[name]}
        raise Left(ended, changed)


def raise_mistake() -> None:
    raise Mistake("a mistake of the user's")


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)  # and the handler runs before the next line


def planned(callback: mp.MemoryPlanner, point: str, strike: Callable[[], None], **settings: Any) -> None:
    """Planning, at one point of which ``strike`` is called."""
    POINTS.arm(point, strike, again=strike is raise_mistake)
    trainer = pl.Trainer(
        callbacks=[callback],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    with reached_inside(point):
        trainer.fit(Net(), datamodule=Data())


def stopped(point: str, strike: Callable[[], None], folder: Path, planner: Any, **settings: Any) -> dict[str, Any]:
    """How planning ended that was struck at one point, and what it left changed."""
    Watched.folder = folder
    try:
        planned(
            Watched(
                max_batch_size=8, batch_arg_name={"val": "val_size"}, apply=True, on_error="raise", **LEARNED, **planner
            ),
            point,
            strike,
            **settings,
        )
    except Left as left:
        ended, changed = left.args
    return {"point": point, "reached": POINTS.struck, "ended": ended, "changed": changed}


def killed(point: str, number: int, folder: Path, planner: Any, **settings: Any) -> dict[str, Any]:
    """How a process ended that got a signal in planning, and what it left: files, and processes of its group."""
    before, process = files(folder), os.fork()
    if not process:
        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            callback = mp.MemoryPlanner(
                max_batch_size=8, batch_arg_name={"val": "val_size"}, apply=True, on_error="raise", **LEARNED, **planner
            )
            planned(callback, point, lambda: os.kill(os.getpid(), number), **settings)
        except SystemExit as error:  # Lightning's, on Ctrl+C
            os._exit(int(str(error)))
        finally:
            os._exit(99)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        os.killpg(process, 0)
        left = True
    except ProcessLookupError:
        left = False
    return {"point": point, "signal": number, "status": status, "files": files(folder) != before, "processes": left}


def main(folder: str) -> None:
    warnings.simplefilter("ignore")
    os.environ.pop("MEMPLAN_HISTORY", None)
    os.chdir(folder)
    where = Path(folder)
    ways: dict[str, Any] = {"cpu": {"accelerator": "cpu"}, "gpu": {"accelerator": "gpu", "devices": 1}}
    for kind, settings in ways.items():
        for k, point in enumerate(KILLED[kind]):
            for number in (signal.SIGKILL, signal.SIGINT) if k % 4 == 0 else (signal.SIGKILL,):
                print("SHOWN", json.dumps(killed(point, number, where, {}, **settings)), flush=True)
    for method, points in (("probe", HOOKS), ("auto", ON_CARD)):
        for point in points:
            for strike in (raise_mistake, press_ctrl_c):
                found = stopped(point, strike, where, {"method": method, "confirm": True}, **ways["gpu"])
                print("SHOWN", json.dumps({"strike": strike.__name__, **found}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
