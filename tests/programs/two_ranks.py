"""Two ranks on the CPU, one of which fails or goes while it plans: ``python two_ranks.py [KIND ...]``.

With ``injected PLACE ...``, an exception comes at these places of the second rank (see ``injected_cases.py``). Prints a
JSON object for each kind or place: what each rank planned, trained with, warned of, and how long it took. Waits are
short: a rank is gone after ``SILENCE`` seconds. Run by ``test_ranks.py``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import lightning_memplan as mp
from lightning_memplan.lightning import ranks
from lightning_memplan.planning.apply import Place
from lightning_memplan.planning.fit import FitPlanner
from lightning_memplan.planning.proposal import Proposal
from tests.programs import injected_cases

SILENCE = 4.0
LIMIT = 120.0  # seconds for one kind
CARD = mp.Device("a card", total=2**33)


def in_planning() -> bool:
    return any(thread.name == "memplan-signs-of-life" for thread in threading.enumerate())


@cache
def sleep() -> None:
    """Sleep for longer than others wait for a rank that is gone, once."""
    time.sleep(2 * SILENCE)


@cache
def stall() -> None:
    """Stop the whole process for that long, once: it gives no sign of life."""
    subprocess.Popen(["sh", "-c", f"sleep {2 * SILENCE}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    raise KeyError("a mistake of the user's")


class Rows(Dataset[torch.Tensor]):
    """Strikes as samples are read while planning."""

    def __init__(self, strike: Callable[[], object] | None) -> None:
        self.strike = strike

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.strike is not None and in_planning():
            self.strike()
        return torch.ones(8)


class Net(pl.LightningModule):
    def __init__(self, strike: Callable[[], object] | None) -> None:
        super().__init__()
        self.layer, self.batch_size, self.seen, self.rows = torch.nn.Linear(8, 8), 4, [], Rows(strike)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen.append(len(batch))
        return self.layer(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, batch_size=self.batch_size)


class Earlier(pl.Callback):
    """A callback before the planner, whose setup strikes."""

    def __init__(self, strike: Callable[[], object]) -> None:
        self.strike = strike

    def setup(self, *_: Any, **__: Any) -> None:
        self.strike()


def raises_after_agreeing(planner: mp.MemoryPlanner) -> None:
    def write(*_: Any) -> None:
        raise RuntimeError("no vote is cast")

    FitPlanner._write = write  # type: ignore[method-assign]


#: by kind: the rank that is struck, and how: in the dataset, by callbacks before the planner, or on the planner
KINDS: dict[str, tuple[int, Callable[[], object] | None, str]] = {
    "all is well": (1, None, ""),
    "killed": (1, lambda: os.kill(os.getpid(), signal.SIGKILL), "dataset"),
    "the first is killed": (0, lambda: os.kill(os.getpid(), signal.SIGKILL), "dataset"),
    "os._exit": (1, lambda: os._exit(3), "dataset"),
    "sys.exit": (1, lambda: sys.exit(3), "dataset"),
    "raises while planning": (1, fail, "dataset"),
    "the first raises while planning": (0, fail, "dataset"),
    "raises between two exchanges": (1, None, "planner"),
    "slow, and alive": (1, sleep, "dataset"),
    "stalled, and back": (1, stall, "dataset"),
    "killed before planning": (1, lambda: os.kill(os.getpid(), signal.SIGKILL), "before"),
    "raises before planning": (1, fail, "before"),
    "has no planner": (1, None, "none"),
}


def become(rank: int, port: int) -> None:
    """Make this process one of two ranks."""
    ranks.SILENCE, ranks.BEAT = SILENCE, 0.2
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in own.items()})
    torch.set_num_threads(1)


def train_injected(places: Sequence[str], rank: int, port: int, results: Path) -> None:
    """Train once for each place, in the same processes."""
    become(rank, port)
    settings = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    rows = []
    for place in places:
        rows.append({"rank": rank, **injected_cases.injected(place, settings, strikes=rank == 1)})
        (results / f"{rank}.json").write_text(json.dumps(rows))
    os._exit(0)


def quiet(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), **settings,
    )  # fmt: skip


def refuse(*_: Any) -> None:
    raise mp.DoesNotFitError("the checkpoint's batch size does not fit here", needed=2, available=1)


#: by kind: the rank that refuses the checkpoint's batch size, by which method, and what failures do
RESUMED: dict[str, tuple[int, str, Any]] = {
    "kept": (-1, "", "warn"),
    "the second refuses": (1, "kept", "warn"),
    "the first refuses": (0, "kept", "warn"),
    "the second cannot set it": (1, "write", "warn"),
    "the second refuses, and that is raised": (1, "kept", "raise"),
}


def resume(kind: str, rank: int, port: int, results: Path) -> None:
    """Resume from a checkpoint of batch size 4, on GPUs for which 8 is planned."""
    become(rank, port)
    refuses, method, on_error = RESUMED[kind]
    where, ended = results / "saved.ckpt", ""
    first = quiet(mp.MemoryPlanner(device=CARD, apply=True, max_batch_size=4), max_epochs=1)
    first.fit(Net(None))
    first.save_checkpoint(where)
    module, planner = Net(None), mp.MemoryPlanner(device=CARD, apply=True, max_batch_size=8, on_error=on_error)
    module.batch_size = 2
    original = Place.write
    if rank == refuses and method == "kept":
        Proposal.kept = refuse  # type: ignore[method-assign, assignment]
    if rank == refuses and method == "write":

        def write(self: Place, batch_size: int, undo: Any) -> None:
            original(self, batch_size, undo)
            if batch_size == 4:
                raise RuntimeError("it is read only")

        Place.write = write  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            quiet(planner, max_epochs=2).fit(module, ckpt_path=where)
        except BaseException as error:  # noqa: BLE001 - whatever was raised
            ended = f"{type(error).__name__}: {error}"
    said = [str(each.message) for each in caught if str(each.message).startswith("MemoryPlanner")]
    result = {
        "rank": rank,
        "ended": ended,
        "planned": planner.plan and planner.plan.batch_size,
        "size": module.batch_size,
        "seen": module.seen,
        "said": [text for text in said if "measures nothing" not in text],
    }
    (results / f"{rank}.json").write_text(json.dumps(result))
    os._exit(0)


def train(kind: str, rank: int, port: int, results: Path) -> None:
    become(rank, port)
    struck, strike, where = KINDS[kind]
    strike = strike if rank == struck else None
    module, planner = Net(strike if where == "dataset" else None), mp.MemoryPlanner(device=CARD, apply=True)
    planner.max_batch_size = 6 + 2 * rank  # rank 0 decides
    callbacks: list[pl.Callback] = [planner]
    if where == "planner" and rank == struck:
        raises_after_agreeing(planner)
    if where == "before" and strike is not None:
        callbacks.insert(0, Earlier(strike))
    if where == "none" and rank == struck:
        callbacks = []
    began, ended = time.monotonic(), ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            quiet(*callbacks, max_epochs=1).fit(module)
        except BaseException as error:  # noqa: BLE001 - whatever was raised
            ended = f"{type(error).__name__}: {error}"
    said = [str(each.message) for each in caught if str(each.message).startswith("MemoryPlanner")]
    result = {
        "kind": kind,
        "rank": rank,
        "seconds": time.monotonic() - began,
        "ended": ended,
        "planned": planner.plan and planner.plan.batch_size,
        "size": module.batch_size,
        "seen": module.seen,
        "said": [text for text in said if "measures nothing" not in text],
        "threads": [thread.name for thread in threading.enumerate() if thread.name.startswith("memplan")],
        "keys": _keys_left(),
    }
    (results / f"{rank}.json").write_text(json.dumps(result))
    os._exit(0)  # without the goodbyes of a process group that is broken


def _keys_left() -> list[str]:
    """The planner's keys in the store, where the process group is still there."""
    if not torch.distributed.is_initialized():
        return []
    try:
        store: Any = torch.distributed.distributed_c10d._get_default_store()
        return sorted(key for key in store.list_keys() if "memplan" in key)
    except (AttributeError, RuntimeError):
        return []


def both(target: Callable[..., None], what: object, limit: float) -> list[Any]:
    """Run a function as two ranks; return what each has written."""
    context = multiprocessing.get_context("fork")  # what is imported here need not be imported by each
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        started = [context.Process(target=target, args=(what, rank, port, Path(folder))) for rank in range(2)]
        for process in started:
            process.start()
        end = time.monotonic() + limit
        for process in started:
            process.join(max(0.1, end - time.monotonic()))
            if process.is_alive():
                process.kill()
        return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


def main(*kinds: str) -> None:
    if kinds[:1] == ("injected",):
        for rows in zip(*both(train_injected, kinds[1:], LIMIT * len(kinds)), strict=True):
            print("SHOWN", json.dumps({"kind": rows[0]["place"], "ranks": rows}), flush=True)
        return
    for kind in kinds or KINDS:
        target = resume if kind in RESUMED else train
        print("SHOWN", json.dumps({"kind": kind, "ranks": both(target, kind, LIMIT)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
