"""Replicas: each is made once, of real tensors where that can be, and a hook that fails is called no more."""

from __future__ import annotations

from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import lightning_memplan as mp
from lightning_memplan.planning import replicas as made
from lightning_memplan.planning.job import DataSource
from lightning_memplan.planning.replicas import Replicas
from lightning_memplan.settings import Parallel, StepSettings
from lightning_memplan.step.setup import TrainingSetup

SETTINGS = StepSettings()


class Counts(pl.LightningModule):
    """Its hooks note their calls in a list that all replicas share."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.layer, self.fails = nn.Linear(8, 8), fails

    def setup(self, stage):
        CALLS.append(stage)
        self.head = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        CALLS.append("optimizers")
        if self.fails:
            raise KeyError("mine")
        return torch.optim.SGD(self.parameters(), lr=0.1)


CALLS: list[str] = []


@pytest.fixture(autouse=True)
def no_calls():
    CALLS.clear()


def is_fake(module: nn.Module) -> bool:
    return isinstance(module.head.weight.data, FakeTensor)


@pytest.fixture
def asked(monkeypatch):
    """Ways to make a replica, which fail with the messages that a test gives; the list tells which were tried."""

    def ways(**failures: str) -> list[str]:
        tried: list[str] = []

        def way(name):
            def make(module, settings, trainer=None, stage=None, **how):
                tried.append(name)
                if name in failures:
                    raise mp.TraceError(failures[name])
                return nn.Linear(1, 1)

            return make

        monkeypatch.setattr(made, "real_replica", way("real"))
        monkeypatch.setattr(made, "prepared", way("fake"))
        return tried

    return ways


def test_a_module_without_hooks_is_itself():
    net = nn.Linear(8, 8)
    assert Replicas().set_up(net, SETTINGS, None, "fit") is net
    assert Replicas().set_up(net, SETTINGS, None, "fit", real=True) is net


def test_hooks_are_called_once_on_a_replica():
    module, replicas = Counts(), Replicas()
    found = replicas.set_up(module, SETTINGS, None, "fit")
    assert is_fake(found)
    assert not hasattr(module, "head")
    assert replicas.set_up(module, replace(SETTINGS, accumulate_grad_batches=9), None, "fit") is found
    assert CALLS == ["fit"]
    real = replicas.set_up(module, SETTINGS, None, "fit", real=True)
    assert type(real.head.weight) is nn.Parameter
    assert replicas.set_up(module, replace(SETTINGS, precision="16-true"), None, "fit", real=True) is real
    assert CALLS == ["fit", "fit"]
    other = replicas.set_up(Counts(), SETTINGS, None, "fit", real=True)
    assert other is not real


def test_precision_and_strategy_have_replicas_of_their_own():
    module, replicas = Counts(), Replicas()
    kinds = [
        SETTINGS,
        replace(SETTINGS, precision="16-true"),
        replace(SETTINGS, parallel=Parallel("ddp", 2)),
        replace(SETTINGS, parallel=Parallel("fsdp", 2)),
    ]
    first = [replicas.set_up(module, settings, None, "fit") for settings in kinds]
    assert len(set(map(id, first))) == 4
    more = replace(SETTINGS, parallel=Parallel("ddp", 8))  # of which nothing is in the module yet
    assert replicas.set_up(module, more, None, "fit") is first[2]
    other = Counts()
    assert replicas.set_up(other, SETTINGS, None, "fit") is not first[0]


def test_hooks_see_the_trainer_and_the_stage():
    class Reads(Counts):
        def setup(self, stage):
            self.head, self.seen = nn.Linear(8, 2), (stage, self.trainer.max_epochs)

    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=7)
    for real in (False, True):
        assert Replicas().set_up(Reads(), SETTINGS, trainer, "test", real=real).seen == ("test", 7)


def test_what_cannot_be_real_is_fake_and_is_not_tried_again(asked):
    tried, replicas, module = asked(real="no room"), Replicas(), Counts()
    assert replicas.why_not_real == ""
    found = replicas.set_up(module, SETTINGS, None, "fit", real=True)
    assert (tried, replicas.why_not_real) == (["real", "fake"], "no room")
    assert replicas.set_up(module, SETTINGS, None, "fit", real=True) is found
    assert tried == ["real", "fake"]


def test_what_cannot_be_fake_is_real(asked):
    tried, replicas, module = asked(fake="reads a value"), Replicas(), Counts()
    found = replicas.set_up(module, SETTINGS, None, "fit")
    assert replicas.set_up(module, SETTINGS, None, "fit") is found
    assert (tried, replicas.why_not_real) == (["fake", "real"], "")


def test_a_replica_that_cannot_be_made_says_why_it_is_not_fake(asked):
    tried = asked(fake="reads a value", real="no room")
    with pytest.raises(mp.TraceError, match=r"^reads a value$") as caught:
        Replicas().set_up(Counts(), SETTINGS, None, "fit")
    assert tried == ["fake", "real"]
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    tried.clear()
    with pytest.raises(mp.TraceError, match=r"^reads a value$"):  # real tensors were tried first, and are not again
        Replicas().set_up(Counts(), SETTINGS, None, "fit", real=True)
    assert tried == ["real", "fake"]


@pytest.mark.parametrize("real", [False, True])
def test_a_replica_is_made_with_all_that_the_hooks_may_ask_for(monkeypatch, real):
    calls = []

    def fails(*arguments, **named):
        calls.append((*arguments, *named.values()))
        raise mp.TraceError("no")

    monkeypatch.setattr(made, "real_replica", fails)
    monkeypatch.setattr(made, "prepared", fails)
    module, trainer = Counts(), object()
    with pytest.raises(mp.TraceError):
        Replicas().set_up(module, SETTINGS, trainer, "fit", real=real)
    assert calls == [(module, SETTINGS, trainer, "fit")] * 2


# ---------------------------------------------------------------------------------------------------------- lazy layers


class Lazy(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(3)

    def setup(self, stage):
        CALLS.append(f"{stage} {self.trainer.max_epochs}")

    def training_step(self, batch, batch_idx):
        CALLS.append(f"step of {len(batch)}")
        return self.layer(batch).sum()


TRAINER = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=7)


def test_lazy_layers_are_given_shapes_once_by_a_step_of_two_samples():
    module, replicas, source = Lazy(), Replicas(), DataSource(torch.zeros(4, 8))
    setup = TrainingSetup(module, trainer=TRAINER)
    found = replicas.initialized(setup, "fit", source)
    assert found.layer.weight.shape == (3, 8)
    assert type(found.layer.weight) is nn.Parameter
    assert torch.nn.parameter.is_lazy(module.layer.weight)
    assert replicas.initialized(setup, "fit", source) is found
    assert CALLS == ["fit 7", "step of 2"]
    assert replicas.set_up(module, SETTINGS, TRAINER, None) is module  # another replica, of which no setup is called


def test_layers_stay_lazy_where_the_step_fails():
    class Fails(Lazy):
        def training_step(self, batch, batch_idx):
            raise KeyError("mine")

    replicas, setup, source = Replicas(), TrainingSetup(Fails(), trainer=TRAINER), DataSource(torch.zeros(4, 8))
    found = replicas.initialized(setup, "fit", source)
    assert torch.nn.parameter.is_lazy(found.layer.weight)
    assert found is not setup.module
    assert replicas.initialized(setup, "fit", source) is found


def test_a_lazy_module_without_first_hooks_is_copied_and_one_with_layers_to_make_makes_them():
    class Makes(Lazy):
        def configure_model(self):
            self.head = nn.LazyLinear(2)

        def training_step(self, batch, batch_idx):
            return self.head(self.layer(batch)).sum()

    replicas, source = Replicas(), DataSource(torch.zeros(4, 8))
    plain, makes = nn.LazyLinear(3), Makes()
    found = replicas.initialized(TrainingSetup(plain), None, source)
    assert (found.weight.shape, torch.nn.parameter.is_lazy(plain.weight)) == ((3, 8), True)
    found = replicas.initialized(TrainingSetup(makes, trainer=TRAINER), "fit", source)
    assert found.head.weight.shape == (2, 3)


# ------------------------------------------------------------------------------------------------------------ beginning


def test_a_beginning_is_made_once_for_what_decides_it():
    module, replicas = Counts(), Replicas()
    found = replicas.beginning(TrainingSetup(module))
    assert found.begun.replica is not module
    assert replicas.beginning(TrainingSetup(module, replace(SETTINGS, accumulate_grad_batches=9))) is found
    others = [
        replace(SETTINGS, precision="16-true"),
        replace(SETTINGS, capability=(9, 0)),
        replace(SETTINGS, parallel=Parallel("ddp", 2)),
    ]
    beginnings = [replicas.beginning(TrainingSetup(module, settings)) for settings in others]
    assert len({id(each) for each in (found, *beginnings)}) == 4
    three = replace(SETTINGS, parallel=Parallel("ddp", 3))
    assert replicas.beginning(TrainingSetup(module, three)) is beginnings[2]
    assert CALLS == ["optimizers"] * 4
    assert replicas.beginning(TrainingSetup(Counts())) is not found


def test_a_module_without_hooks_has_no_beginning(monkeypatch):
    asked = []
    monkeypatch.setattr(made, "begin_training", asked.append)
    setup, replicas = TrainingSetup(nn.Linear(8, 8)), Replicas()
    assert replicas.beginning(setup) is None
    assert replicas.beginning(setup) is None
    assert asked == [setup]  # which is known from then on


def test_a_hook_that_fails_is_called_once_and_its_error_raised_each_time():
    replicas, setup = Replicas(), TrainingSetup(Counts(fails=True))
    errors = []
    for _ in range(2):
        with pytest.raises(mp.TraceError, match="KeyError: 'mine'") as caught:
            replicas.beginning(setup)
        errors.append(caught.value)
    assert errors[0] is errors[1]
    assert CALLS.count("optimizers") == 1
