"""The order of a step: by Lightning, by hand, and of a module without hooks, on the CPU with real tensors."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import lightning_memplan as mp
from lightning_memplan.settings import StepSettings
from lightning_memplan.step.backend import StepBackend
from lightning_memplan.step.context import EventContext
from lightning_memplan.step.module_copy import replicate
from lightning_memplan.step.optimization.automatic import AutomaticStep
from lightning_memplan.step.optimization.manual import ManualStep
from lightning_memplan.step.optimization.plain import PlainStep
from lightning_memplan.step.precision import FakeGradScaler
from lightning_memplan.step.runner import StepRunner
from lightning_memplan.step.setup import TrainingSetup

CPU = torch.device("cpu")
LOG: list[str] = []


class Context(EventContext):
    """Writes down the phases."""

    def update(self, **where):
        before = self.phase
        super().update(**where)
        if self.phase != before:
            LOG.append(self.phase)


class Automatic(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def on_train_batch_start(self, batch, batch_idx):
        LOG.append("start")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        LOG.append(f"end of {sorted(outputs)}")

    def on_before_zero_grad(self, optimizer):
        LOG.append("zero_grad")

    def on_after_backward(self):
        LOG.append("gradients")

    def on_before_optimizer_step(self, optimizer):
        LOG.append("step")

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        LOG.append("clip")

    def training_step(self, batch, batch_idx):
        LOG.append("training_step")
        return {"loss": self.layer(batch).sum(), "seen": len(batch)}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Manual(Automatic):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.layer(batch).sum())
        optimizer.step()
        return {}


def ran(module, accumulate=1, steps=1, precision="32-true"):
    LOG.clear()
    context = Context()
    setup = TrainingSetup(
        module,
        StepSettings(precision, accumulate_grad_batches=accumulate),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    replica = replicate(module, {}, trainer=None, device=CPU)
    runner = StepRunner(replica, setup, StepBackend(context, CPU, FakeGradScaler(context, CPU)))
    runner.run_steps(torch.ones(3, 2), steps)
    return runner


ONE_STEP = "batch forward start training_step zero_grad backward gradients optimizer step clip end of ['loss', 'seen']"


def test_automatic_optimization_zeroes_gradients_after_forward_and_clips_before_the_optimizer():
    runner = ran(Automatic())
    assert type(runner.step) is AutomaticStep
    assert " ".join(LOG) == ONE_STEP
    assert runner.replica.trainer.global_step == 1


def test_accumulated_batches_zero_gradients_in_the_first_and_step_in_the_last():
    ran(Automatic(), accumulate=2)
    first = "batch forward start training_step zero_grad backward gradients optimizer end of ['loss', 'seen']"
    last = "batch forward start training_step backward gradients optimizer step clip end of ['loss', 'seen']"
    assert " ".join(LOG) == f"{first} {last}"


def test_a_half_precision_step_clips_what_is_unscaled():
    ran(Automatic(), precision="16-mixed")
    assert " ".join(LOG) == ONE_STEP


def test_manual_optimization_comes_back_to_forward_after_backward_and_after_the_optimizer():
    runner = ran(Manual())
    assert type(runner.step) is ManualStep
    assert LOG == ["batch", "forward", "start", "backward", "forward", "optimizer", "forward", "end of []"]
    assert runner.replica.trainer.global_step == 1


def test_a_module_without_hooks_trains_in_the_same_order():
    runner = ran(nn.Linear(2, 1), steps=2)
    assert type(runner.step) is PlainStep
    assert LOG == ["batch", "forward", "backward", "optimizer"] * 2
    # the loss is the sum of 3 samples' outputs, each of two ones: a weight's gradient is 3, of the last step alone
    assert runner.replica.weight.grad.tolist() == [[3, 3]]


@pytest.mark.parametrize("module", [Automatic, Manual])
def test_the_replicas_trainer_has_the_replica_as_its_model(module):
    runner = ran(module())
    assert runner.replica.trainer.model is runner.replica


class FromIterator(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1000, 10)

    def training_step(self, dataloader_iter):
        batch, batch_idx, dataloader_idx = next(dataloader_iter)
        assert (batch_idx, dataloader_idx) in ((0, 0), (1, 0), (2, 0))
        return self.layer(batch.to(self.device)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class FromBatch(FromIterator):
    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()


def test_a_step_that_takes_its_batch_from_an_iterator_needs_what_one_that_is_given_it_needs():
    batch = torch.zeros(4, 1000)
    taken, given = (mp.estimate(kind(), batch, method="trace") for kind in (FromIterator, FromBatch))
    # the batch that is given stays until the step is over; the one that is taken is kept for the weight's gradient
    assert taken.peak_allocated(100) == given.peak_allocated(100) >= 4 * (100 * 1000 + 2 * 1000 * 10)
