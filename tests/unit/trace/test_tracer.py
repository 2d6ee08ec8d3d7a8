"""Results of a trace, and why a step has none."""

from __future__ import annotations

import pickle
from typing import get_args

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import lightning_memplan as mp
from lightning_memplan.errors import TraceError, TraceReason
from lightning_memplan.memory.program import scale
from lightning_memplan.planning.retrace import batches_of_many
from lightning_memplan.settings import Parallel, StepSettings
from lightning_memplan.step.setup import TrainingSetup
from lightning_memplan.trace.tracer import TraceResult, run_formula, trace_counted, trace_steps, trace_test
from lightning_memplan.trace.tracer import trace_validation as validation

WIDTH = 256
BATCHES = [(size, torch.zeros(size, WIDTH)) for size in (2, 3)]
PARAMETERS = WIDTH * WIDTH * 4  # bytes


class Net(pl.LightningModule):
    """One layer, and a step that does ``what`` with its result."""

    def __init__(self, what=lambda out: out.sum()):
        super().__init__()
        self.layer, self.what = nn.Linear(WIDTH, WIDTH, bias=False), what

    def training_step(self, batch, batch_idx):
        return self.what(self.layer(batch))

    def validation_step(self, batch, batch_idx):
        self.layer(batch)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def halves(out):
    assert len(out) % 2 == 0, "the batch has two halves"
    return out.sum()


def whole_number(out):
    return out.sum() * int(out.argmax())


def no_such_attribute(out):
    return out.no_such_attribute


def no_gradient(out):
    return out.detach()


def twice_for_three(out):
    return (out * 2 if len(out) == 3 else out).sum()


class ReturnsNothing(nn.Module):
    def forward(self, batch):
        return None


class Lazy(Net):
    def __init__(self):
        super().__init__()
        self.layer = nn.LazyLinear(WIDTH)


class UsesGenerator(Net):
    def __init__(self):
        super().__init__()
        self.numbers = (n for n in range(10))  # of which there is no copy

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * next(self.numbers)


def steps(module, **settings):
    return trace_steps(TrainingSetup(module, StepSettings(**settings)), BATCHES)


def sharded_test():
    return trace_test(TrainingSetup(Net(), StepSettings(parallel=Parallel("fsdp", ranks=2))), BATCHES)


class Huge:
    """Samples of 2**60 bytes, of which no batch is made."""

    multiple = 1

    def batches(self, sizes):
        return [(1, torch.empty(2**58, device="meta"))]


REASONS = {
    "refused": lambda: steps(Net(halves)),
    "data_dependent": lambda: steps(Net(whole_number)),
    "failed": lambda: steps(Net(no_such_attribute)),
    "no_loss": lambda: steps(ReturnsNothing()),
    "sizes_differ": lambda: scale(steps(Net(twice_for_three)).traces),
    "too_large": lambda: batches_of_many(Huge(), (32, 64)),
    "uninitialized": lambda: steps(Lazy()),
    "not_copyable": lambda: steps(UsesGenerator()),
    "unsupported": sharded_test,
}


def test_each_reason_is_known():
    assert set(REASONS) == set(get_args(TraceReason))


@pytest.mark.parametrize("reason", REASONS)
def test_why_a_step_cannot_be_traced(reason):
    with pytest.raises(TraceError) as error:
        REASONS[reason]()
    assert error.value.reason == reason
    assert pickle.loads(pickle.dumps(error.value)).reason == reason  # from one rank to the others


def test_an_estimate_has_the_reason_of_its_step():
    with pytest.raises(mp.TraceError, match="Net cannot be traced: the step failed in a trace") as error:
        mp.estimate(Net(no_such_attribute), torch.zeros(4, WIDTH), method="trace")
    assert error.value.reason == "failed"


def test_a_step_that_refuses_few_samples_is_traced_with_many():
    """2, 3 and 5 samples are tried first, and 3 have no two halves."""
    found = mp.estimate(Net(halves), torch.zeros(4, WIDTH), method="trace")
    assert found.program.batch_sizes == (32, 64, 128)
    assert found.notes == ("the step does something else with few samples: planned from 32 and more",)


def test_a_step_that_fails_is_not_tried_with_many_samples():
    sizes = []

    def fails(out):
        sizes.append(len(out))
        return out.no_such_attribute

    with pytest.raises(TraceError):
        mp.estimate(Net(fails), torch.zeros(4, WIDTH), method="trace")
    assert sizes == [2]


def test_a_result_has_a_trace_a_batch_size():
    result = steps(Net())
    assert [trace.batch_size for trace in result.traces] == [2, 3]
    assert result == TraceResult(result.traces)
    assert result.notes == ()


def test_a_counted_result_has_the_formula_of_the_same_network():
    formulas = [
        trace_counted(TrainingSetup(Net()), BATCHES).formula,
        run_formula(TrainingSetup(Net()), BATCHES[0]).formula,
    ]
    # a sample is WIDTH floats, and so is the layer's output for it
    assert [f.parameter_bytes for f in formulas] == [f.gradient_bytes for f in formulas] == [PARAMETERS] * 2
    assert [(f.input_bytes, f.feature_bytes) for f in formulas] == [(WIDTH * 4, WIDTH * 4)] * 2


def test_a_test_has_no_gradients():
    result = trace_test(TrainingSetup(Net()), BATCHES)
    assert (result.formula.parameter_bytes, result.formula.gradient_bytes) == (PARAMETERS, 0)
    assert {event.phase for trace in result.traces for event in trace.events} == {"setup", "batch", "forward"}


def test_validation_alone_grows_with_its_batch_size():
    result = validation(TrainingSetup(Net()), torch.zeros(4, WIDTH), BATCHES)
    inputs = [[e.size for e in trace.events if e.category == "batch" and e.size > 0] for trace in result.traces]
    # 4 samples of training, then 2 or 3 of validation
    assert inputs == [[4 * WIDTH * 4, size * WIDTH * 4] for size, _ in BATCHES]
