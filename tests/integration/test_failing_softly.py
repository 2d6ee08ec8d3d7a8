"""Planning that fails, whatever the cause: one warning, the user's own batch size, and training goes on."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

import lightning_memplan as mp

CARD = mp.Device("a card", total=2**30)
SMALL = mp.Device("a small card", total=2**20)  # 1 MiB: not even one sample of 1000 floats, with 4 MB of weights
WIDTH = 1000


class Rows(Dataset):
    """Twelve rows of ones; ``read`` counts them."""

    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        self.read += 1
        return torch.ones(WIDTH)


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.batch_size, self.seen = torch.nn.Linear(WIDTH, WIDTH), 4, []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen.append(len(batch))
        return self.layer(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Rows(), batch_size=self.batch_size)


class CountsItsSamples(Rows):
    """A dataset that only the process of training may read, as one that holds a connection."""

    def __getitem__(self, index: int) -> torch.Tensor:
        if any(frame.function == "read_samples" for frame in inspect.stack()):
            raise OSError("the connection is training's")
        return super().__getitem__(index)


class CannotBeRead(Net):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(CountsItsSamples(), batch_size=self.batch_size)


class HoldsLock(Net):
    def __init__(self) -> None:
        super().__init__()
        self.generator = (n for n in range(10**6))  # neither copied nor pickled

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        next(self.generator)
        return super().training_step(batch, batch_idx)


class RefusesCopies(Net):
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise TypeError("copies of me are not allowed")


class ReadsValues(Net):
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        rows = torch.nonzero(batch.sum(1) > 0).flatten().tolist()
        return super().training_step(batch[rows], batch_idx)


class SetupNeedsRank(Net):
    def setup(self, stage: str) -> None:
        if self.trainer.__class__.__module__.startswith("lightning_memplan"):
            raise KeyError("RANK_OF_A_CLUSTER")


class ReadOnly(Net):
    @property
    def size(self) -> int:
        return 4

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Rows(), batch_size=self.size)


FAILURES: dict[str, tuple[Callable[[], Net], dict[str, Any], str]] = {
    "samples cannot be read": (CannotBeRead, {}, "the connection is training's"),
    "a generator cannot be copied": (HoldsLock, {"method": "trace"}, "HoldsLock"),
    "__deepcopy__ raises": (RefusesCopies, {"method": "trace"}, "copies of me are not allowed"),
    "the step needs values": (ReadsValues, {"method": "trace"}, "cannot be traced"),
    "setup raises on a replica": (SetupNeedsRank, {"method": "trace"}, "RANK_OF_A_CLUSTER"),
    "the batch size is read only": (ReadOnly, {"batch_arg_name": "size"}, "ReadOnly.size cannot be set"),
    "nothing holds that name": (Net, {"batch_arg_name": "samples_a_step"}, "no attribute or hyperparameter"),
    "one sample does not fit, as predicted": (Net, {"device": SMALL}, "a small card"),
    "confirm=True on the CPU": (Net, {"confirm": True}, "confirm=True runs real steps on a CUDA device"),
    "no GPU to probe": (Net, {"method": "probe"}, "a probe runs on a CUDA device"),
    "no multiple within the dataset": (Net, {"multiple_of": 64}, "no batch size is"),
}


def fit(module: Net, *callbacks: pl.Callback, **settings: Any) -> list[str]:
    """Train an epoch on the CPU, and return the planner's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_of(*callbacks, **settings).fit(module)
    said = [str(each.message) for each in caught]
    return [text for text in said if text.startswith("MemoryPlanner") and "measures nothing" not in text]


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_one_warning_and_the_users_size_stays(kind: str) -> None:
    make, options, reason = FAILURES[kind]
    planner = mp.MemoryPlanner(**{"device": CARD, "apply": True, **options})
    module = make()
    said = fit(module, planner)
    assert module.seen == [4, 4, 4]  # 12 rows, 4 at a time
    assert module.batch_size == 4
    assert planner.plan is None
    assert len(said) == 1, said
    assert re.match(r"MemoryPlanner: the batch size is not planned: ", said[0])
    assert reason in said[0]
    assert "Training goes on with the user's own batch size" in said[0]


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_raises_where_that_is_asked_for(kind: str) -> None:
    make, options, reason = FAILURES[kind]
    with pytest.raises(Exception, match=re.escape(reason)):
        fit(make(), mp.MemoryPlanner(**{"device": CARD, "apply": True, "on_error": "raise", **options}))


@pytest.mark.parametrize("kind", FAILURES)
def test_a_plan_for_information_stops_no_training(kind: str) -> None:
    make, options, _ = FAILURES[kind]
    module = make()
    fit(module, mp.MemoryPlanner(**{"device": CARD, "apply": False, **options}))
    assert module.seen == [4, 4, 4]


def test_a_finder_beside_the_planner_keeps_its_size() -> None:
    class Finder(pl.callbacks.BatchSizeFinder):
        def setup(self, *_: Any, **__: Any) -> None:
            """Nothing is tried here."""

        on_fit_start = setup

    module = Net()
    said = fit(module, mp.MemoryPlanner(device=CARD, apply=True), Finder())
    assert "so does the callback BatchSizeFinder" in said[0]
    assert module.seen == [4, 4, 4]


DEMANDS = {
    "an effective batch size without a share": (
        {"effective_batch_size": 7, "multiple_of": 2},
        "no batch size divides 7",
    ),
    "an effective batch size beyond the dataset": ({"effective_batch_size": 100}, "the dataset has 12 for each"),
    "a smallest size beyond the dataset": ({"min_batch_size": 13}, "no batch size is at least 13, at most 12"),
    "a smallest size that does not fit": ({"min_batch_size": 2, "device": SMALL}, "a small card"),
}


@pytest.mark.parametrize("kind", DEMANDS)
def test_a_demand_that_cannot_be_met_stops_training(kind: str) -> None:
    options, reason = DEMANDS[kind]
    with pytest.raises(mp.MemplanError, match=reason):
        fit(Net(), mp.MemoryPlanner(**{"device": CARD, "apply": True, **options}))


@pytest.mark.parametrize("kind", DEMANDS)
def test_no_demand_stops_training_where_nothing_is_set(kind: str) -> None:
    options, _ = DEMANDS[kind]
    module = Net()
    fit(module, mp.MemoryPlanner(**{"device": CARD, "apply": False, **options}))
    assert module.seen == [4, 4, 4]


def test_the_users_error_is_the_users_own() -> None:
    class Wrong(Net):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return torch.nn.functional.linear(batch[:, :10], self.layer.weight).mean()

    raised = []
    for callbacks in ((), (mp.MemoryPlanner(device=CARD, apply=True),)):
        with pytest.raises(RuntimeError) as caught:
            fit(Wrong(), *callbacks)
        raised.append((type(caught.value), str(caught.value)))
    assert raised[0] == raised[1]


def test_warnings_of_libraries_in_planning_are_no_errors() -> None:
    class Warns(Net):
        def setup(self, stage: str) -> None:
            warnings.warn("old", FutureWarning, stacklevel=1)

    module, planner = Warns(), mp.MemoryPlanner(device=CARD, apply=True, method="trace")
    trainer = trainer_of(planner, max_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "old")
        with pytest.raises(FutureWarning):  # training's own call of the hook, after the plan
            trainer.fit(module)
    assert planner.plan is not None


@pytest.mark.parametrize("apply", [True, False])
def test_where_warnings_are_errors_the_plan_is_made(apply: bool, logged: list[str]) -> None:
    """pytest makes errors of warnings."""

    class Warns(Net):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            if not isinstance(self.trainer, pl.Trainer):
                warnings.warn("as torch does of an old argument", FutureWarning, stacklevel=1)
            return self.layer(batch)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return super().training_step(self(batch), batch_idx)

    module, planner = Warns(), mp.MemoryPlanner(device=CARD, apply=apply, max_batch_size=6)
    trainer_of(planner).fit(module)
    assert planner.plan is not None
    assert planner.plan.method == "trace"
    assert module.seen == ([6, 6] if apply else [4, 4, 4])
    (text,) = logged
    assert text.startswith("MemoryPlanner measures nothing: the Trainer runs on cpu")
    logged.clear()


@pytest.mark.parametrize("kind", FAILURES)
def test_where_warnings_are_errors_a_failure_is_logged(kind: str, logged: list[str]) -> None:
    make, options, reason = FAILURES[kind]
    module = make()
    trainer_of(mp.MemoryPlanner(**{"device": CARD, "apply": True, **options})).fit(module)
    assert module.seen == [4, 4, 4]
    (text,) = logged
    assert text.startswith("MemoryPlanner: the batch size is not planned: ")
    assert reason in text
    logged.clear()


def trainer_of(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": list(callbacks),
            **settings,
        }
    )


class Breaks(pl.loggers.CSVLogger):
    """A logger that refuses the planner's values."""

    def log_hyperparams(self, params: Any = None) -> None:
        if any(str(name).startswith("memplan/") for name in params or {}):
            raise ConnectionError("the tracker is down")


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_logger_that_refuses_the_plan_stops_no_training(on_error: str, tmp_path: Any) -> None:
    module, planner = Net(), mp.MemoryPlanner(device=CARD, apply=True, max_batch_size=6, on_error=on_error)
    trainer = trainer_of(planner, logger=Breaks(tmp_path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if on_error == "raise":
            with pytest.raises(ConnectionError, match="the tracker is down"):
                trainer.fit(module)
            return
        trainer.fit(module)
    assert module.seen == [6, 6]  # as planned
    said = [str(each.message) for each in caught if "memory is not logged" in str(each.message)]
    assert len(said) == 1
    assert "ConnectionError: the tracker is down" in said[0]


def test_an_interrupt_is_passed_on() -> None:
    class Interrupted(Net):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(Interrupted(), mp.MemoryPlanner(device=CARD, apply=True, method="trace"))


def test_every_option_has_to_argue() -> None:
    assert len(inspect.signature(mp.MemoryPlanner).parameters) == 17


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "fastest"}, "objective is 'largest', not 'fastest'"),
        ({"on_error": "ignore"}, "on_error is 'warn' or 'raise', not 'ignore'"),
        ({"apply": "False"}, "apply is None or True or False, not 'False'"),
        ({"confirm": "no"}, "confirm is None or True or False, not 'no'"),
        ({"history": None}, "history is True, False or the path of a file, not None"),
        ({"samples": "all"}, "samples is 'auto' or 'first' or 'largest', not 'all'"),
        ({"prog_bar": True}, "prog_bar is False, not True"),
        ({"margin": "learned"}, "margin='learned' learns from earlier runs: pass history=True or the path of a file"),
        ({"margin": 1.0}, "margin is the part of the device's memory to leave free"),
        (
            {"min_batch_size": 8, "max_batch_size": 4},
            "no batch size is at least 8 and at most 4: min_batch",
        ),
        ({"min_batch_size": 5, "max_batch_size": 7, "multiple_of": 8}, "no batch size from 5 to 7 is a multiple of 8"),
        ({"max_batch_size": 7, "multiple_of": 8}, "no batch size from 1 to 7 is a multiple of 8"),
        ({"min_batch_size": 9, "effective_batch_size": 8}, "min_batch_size=9 is above effective_batch_size=8"),
        ({"batch_arg_name": 3}, "batch_arg_name is a name such as 'batch_size'"),
        ({"batch_arg_name": {"valid": "size"}}, "batch_arg_name has names for 'train', 'val', 'test', 'predict', not"),
    ],
)
def test_a_wrong_option_is_refused_in_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        mp.MemoryPlanner(**options)
