"""A replica at its first step is copied together with its optimizers and schedulers."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_memplan.errors import TraceError
from lightning_memplan.settings import StepSettings
from lightning_memplan.step.backend import StepBackend
from lightning_memplan.step.begun import Begun
from lightning_memplan.step.context import EventContext
from lightning_memplan.step.module_copy import replicate
from lightning_memplan.step.precision import FakeGradScaler
from lightning_memplan.step.runner import StepRunner
from lightning_memplan.step.setup import TrainingSetup
from lightning_memplan.step.uncopyable import Uncopied
from lightning_memplan.trace.tracer import begin_training, trace_steps

CPU = torch.device("cpu")


class Net(pl.LightningModule):
    def __init__(self, make=lambda p: torch.optim.Adam(p)) -> None:
        super().__init__()
        self.layer, self.make, self.calls = nn.Linear(4, 4), make, []

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        self.calls.append("configure_optimizers")
        return self.make(self.parameters())

    def on_fit_start(self):
        self.calls.append("on_fit_start")
        self.kept = self.optimizers()

    def on_train_start(self):
        self.calls.append("on_train_start")

    def on_train_epoch_start(self):
        self.calls.append("on_train_epoch_start")


def runner_of(module: Any) -> StepRunner:
    context = EventContext()
    backend = StepBackend(context, CPU, FakeGradScaler(context, CPU))
    return StepRunner(replicate(module, {}, trainer=None, device=CPU), TrainingSetup(module), backend)


def begun(module: Any) -> Begun:
    return runner_of(module).begin()


def with_schedule(parameters):
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9)
    return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "step"}]


OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "LBFGS": torch.optim.LBFGS,
    "a schedule that wraps step": with_schedule,
    "one in a list": lambda p: [torch.optim.SGD(p, 0.1)],
    "groups": lambda p: torch.optim.AdamW([{"params": [each], "lr": 0.1} for each in p]),
    "a hook": lambda p: _hooked(torch.optim.SGD(p, 0.1)),
    "a lock": lambda p: _with(torch.optim.SGD(p, 0.1), "lock", threading.Lock()),
}


def _with(optimizer, name, value):
    setattr(optimizer, name, value)
    return optimizer


def _hooked(optimizer):
    optimizer.register_step_post_hook(lambda own, *_: own.state.setdefault("steps", {}).update(one=1))
    return optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_copy_steps_the_parameters_of_its_own_replica_alone(name):
    first = begun(Net(OPTIMIZERS[name]))
    copied = first.copied(CPU, lambda tensor: None)
    (optimizer,), replica = copied.optimizers, copied.replica
    own = {id(p) for p in replica.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == own
    before = [p.clone() for p in first.replica.parameters()]
    loss = replica.layer(torch.ones(2, 4)).sum()
    loss.backward()
    optimizer.step(*[lambda: loss] if name == "LBFGS" else [])
    assert all(bool((a == b).all()) for a, b in zip(before, first.replica.parameters(), strict=True))
    assert not any(bool((a == b).all()) for a, b in zip(before, replica.parameters(), strict=True))
    assert not first.optimizers[0].state


def test_a_scheduler_changes_the_learning_rate_of_its_copys_optimizer():
    copied = (first := begun(Net(with_schedule))).copied(CPU, lambda tensor: None)
    copied.optimizers[0].step()
    copied.schedulers[0].scheduler.step()
    assert copied.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)  # 0.1 times StepLR's gamma of 0.1
    assert first.optimizers[0].param_groups[0]["lr"] == 0.1
    assert copied.schedulers[0].interval == "step"
    assert copied.replica.trainer.lr_scheduler_configs[0].scheduler is copied.schedulers[0].scheduler


def test_an_optimizer_that_the_module_keeps_is_the_one_that_steps():
    copied = begun(Net()).copied(CPU, lambda tensor: None)
    assert copied.replica.kept is copied.optimizers[0]


def test_new_optimizers_for_the_same_replica_have_no_state():
    first = begun(Net())
    one = first.with_new_optimizers()
    first.replica.layer(torch.ones(2, 4)).sum().backward()
    one.optimizers[0].step()
    two = first.with_new_optimizers()
    assert len(one.optimizers[0].state) == 2  # weight and bias
    assert not two.optimizers[0].state
    trained = {id(p) for group in two.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in first.replica.parameters()}


def test_a_tensor_that_is_no_parameter_stays_the_one_that_is_trained():
    class Temperature(Net):
        def __init__(self):
            super().__init__()
            self.alpha = torch.zeros(1, requires_grad=True)

        def configure_optimizers(self):
            return torch.optim.SGD([self.alpha], 0.1)

    copied = begun(Temperature()).copied(CPU, lambda tensor: None)
    assert copied.optimizers[0].param_groups[0]["params"][0] is copied.replica.alpha
    again = copied.with_new_optimizers()
    assert again.optimizers[0].param_groups[0]["params"][0] is copied.replica.alpha


def test_what_an_optimizer_holds_that_refuses_to_be_copied_is_replaced():
    class Table:
        def __deepcopy__(self, memo):
            raise TypeError("no copies of me")

    first = begun(Net(lambda p: _with(torch.optim.SGD(p, 0.1), "table", Table())))
    (copied,) = first.copied(CPU, lambda tensor: None).optimizers
    assert isinstance(copied.table, Uncopied)
    assert isinstance(first.optimizers[0].table, Table)


def test_hooks_before_the_first_step_run_once_for_all_runs():
    module = Net()
    beginning = begin_training(TrainingSetup(module))
    assert beginning is not None
    batches = [(size, torch.zeros(size, 4)) for size in (2, 3, 5)]
    alone = trace_steps(TrainingSetup(Net()), batches)
    together = trace_steps(TrainingSetup(module), batches, beginning=beginning)
    assert [t.events for t in together.traces] == [t.events for t in alone.traces]
    assert beginning.begun.replica.calls == ["configure_optimizers", "on_fit_start", "on_train_start"]
    assert module.calls == []


def test_memory_that_a_hook_takes_is_in_every_run():
    class Bank(Net):
        def on_fit_start(self):
            self.bank = torch.zeros(1000, 1000, device=self.device)

    batches = [(size, torch.zeros(size, 4)) for size in (2, 3, 5)]
    setup = TrainingSetup(Bank())
    found = trace_steps(setup, batches, beginning=begin_training(setup))
    for trace in found.traces:
        (taken,) = [event for event in trace.events if event.size == 4 * 1000 * 1000]
        assert not [event for event in trace.events if event.is_free and event.block == taken.block]


def test_a_strategy_that_makes_parameters_anew_begins_in_each_run():
    from lightning_memplan.settings import Parallel

    settings = StepSettings(parallel=Parallel("fsdp", 2))
    assert begin_training(TrainingSetup(Net(), settings)) is None
    assert begin_training(TrainingSetup(nn.Linear(1, 1))) is None


def test_an_error_of_a_hook_is_a_trace_error():
    class Fails(Net):
        def configure_optimizers(self):
            raise ValueError("no optimizer today")

    with pytest.raises(TraceError, match="no optimizer today"):
        begin_training(TrainingSetup(Fails()))
