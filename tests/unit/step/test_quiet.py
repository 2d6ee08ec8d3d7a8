"""A replica's steps write nothing to experiment trackers, and leave the attributes of its classes as they were."""

from __future__ import annotations

import importlib
import sys
import types
from typing import ClassVar

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import lightning_memplan as mp
from lightning_memplan.step import quiet
from lightning_memplan.step.quiet import leaving_no_trace


class Counts(nn.Module):
    steps = 0
    seen: ClassVar[list[int]] = []
    table: ClassVar[dict[str, int]] = {"a": 1}
    names: ClassVar[set[str]] = {"a"}


class Derived(Counts):
    own = 1.5


def test_class_attributes_are_as_they_were():
    seen, table, names = Counts.seen, Counts.table, Counts.names
    with leaving_no_trace(nn.Sequential(Derived())):
        Counts.steps += 1
        Counts.seen.append(1)
        Counts.table["b"] = 2
        Counts.names = {"b"}
        Derived.own = 2.5
        Derived.added = [1]  # type: ignore[attr-defined]
    assert (Counts.steps, Counts.seen, Counts.table, Counts.names, Derived.own) == (0, [], {"a": 1}, {"a"}, 1.5)
    assert (Counts.seen is seen, Counts.table is table, Counts.names is names) == (True, True, True)
    assert not hasattr(Derived, "added")


def test_class_attributes_are_restored_after_an_error():
    def stops():
        with leaving_no_trace(Derived()):
            Counts.steps = 7
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stops()
    assert Counts.steps == 0


class Run:
    def log(self, row):
        self.rows = [row]


@pytest.fixture
def tracker(monkeypatch):
    """A tracker with a function and a class that log, as wandb has them."""
    made = types.ModuleType("memplan_tracker")
    made.rows = []  # type: ignore[attr-defined]
    made.log = made.rows.append  # type: ignore[attr-defined]
    made.Run = Run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "memplan_tracker", made)
    monkeypatch.setattr(quiet, "_TRACKERS", (("memplan_tracker", "", "log missing"), ("memplan_tracker", "Run", "log")))
    return made


def test_trackers_are_muted_and_heard_again(tracker):
    run = Run()
    with leaving_no_trace(nn.Linear(1, 1)):
        tracker.log(1)
        run.log(1)
    assert (tracker.rows, hasattr(run, "rows")) == ([], False)
    tracker.log(2)
    run.log(2)
    assert (tracker.rows, run.rows) == ([2], [2])


@pytest.mark.parametrize("name", ["wandb", "mlflow", "torch.utils.tensorboard.writer"])
def test_what_writes_to_a_tracker_is_still_called_so(name):
    pytest.importorskip(name)
    for module, kind, calls in quiet._TRACKERS:
        if module.partition(".")[0] != name.partition(".")[0] or "tensorboardX" in module:
            continue
        owner = importlib.import_module(module)
        owner = getattr(owner, kind) if kind else owner
        found = [call for call in calls.split() if callable(getattr(owner, call, None))]
        assert len(found) >= len(calls.split()) // 2, (module, kind)  # the module and the class differ in a few
        assert {"log", "log_metric", "add_scalar"} & set(found)


def test_a_plan_tells_a_tracker_nothing(tracker):
    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def training_step(self, batch, batch_idx):
            sys.modules["memplan_tracker"].log({"loss": 1})  # type: ignore[attr-defined]
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    assert mp.estimate(Net(), torch.zeros(4, 4), method="trace").peak(4)
    assert tracker.rows == []


def test_an_optimizer_of_the_users_own_module_is_noticed():
    class Elsewhere(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(net.parameters(), 0.1)

    net = Elsewhere()
    with pytest.raises(mp.TraceError, match=r"gives SGD parameters that are not self's: make it of self\.parameters"):
        mp.estimate(net, torch.zeros(4, 4), method="trace")


def test_an_optimizer_that_is_made_already_is_refused():
    made = torch.optim.SGD(nn.Linear(4, 4).parameters(), 0.1)
    with pytest.raises(TypeError, match=r"partial\(torch\.optim\.SGD, lr=0\.1\), not a SGD that is made already"):
        mp.estimate(nn.Linear(4, 4), torch.zeros(4, 4), optimizer=made)
