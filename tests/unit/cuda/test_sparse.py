"""Sparse gradients: as many entries as the batch has indices, whatever they name."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_memplan.settings import StepSettings
from lightning_memplan.step.setup import TrainingSetup
from lightning_memplan.trace.tracer import trace_steps

TOKENS = [(n, torch.zeros(n, 6, dtype=torch.long)) for n in (2, 3)]


class Table(pl.LightningModule):
    """A table of 1,000 rows of 8 float32 values; a sample names six of them."""

    def __init__(self, optimizer, uses=1):
        super().__init__()
        self.table, self.uses, self.optimizer = nn.Embedding(1000, 8, sparse=True), uses, optimizer

    def training_step(self, batch, batch_idx):
        return sum(self.table(batch).square().sum() for _ in range(self.uses))

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def traces(module, **settings):
    return trace_steps(TrainingSetup(module, StepSettings(**settings)), TOKENS).traces


def sizes(trace, op):
    return [event.size for event in trace.events if event.op.startswith(op) and not event.is_free]


def test_a_gradient_has_an_entry_for_each_index():
    for samples, trace in zip((2, 3), traces(Table(sgd)), strict=True):
        gradients = [event.size for event in trace.events if event.category == "gradients" and event.step == 1]
        assert gradients == [samples * 6 * 8 * 4]  # the values; their places are the batch itself


def test_what_the_places_lie_in_lives_as_long_as_the_gradient():
    events = traces(Table(sgd))[0].events
    batch = next(event for event in events if event.category == "batch" and event.step == 1)
    freed = next(event for event in events if event.block == batch.block and event.is_free)
    assert (freed.step, freed.phase) == (2, "forward")  # zero_grad, after the forward pass


def test_gradients_that_are_added_up_are_one_after_the_other():
    of_two, _ = traces(Table(sgd), accumulate_grad_batches=2)
    # values of two batches of 2 samples · 6 indices, 8 float32 values each; their places, an int64 each
    assert {2 * 12 * 8 * 4, 2 * 12 * 8} <= set(sizes(of_two, "aten.cat"))
    of_two, _ = traces(Table(sgd, uses=2))
    assert {2 * 12 * 8 * 4, 2 * 12 * 8} <= set(sizes(of_two, "aten.cat"))


@pytest.mark.parametrize("optimizer", [torch.optim.SparseAdam, torch.optim.Adagrad])
def test_an_optimizer_reads_rows_of_its_moments(optimizer):
    trace, _ = traces(Table(lambda parameters: optimizer(list(parameters))))
    assert [event.size for event in trace.events if event.category == "optimizer" and event.size >= 32000] == [
        1000 * 8 * 4
    ] * (2 if optimizer is torch.optim.SparseAdam else 1)
    assert "planned as if all were selected" in trace.notes[-1]  # the rows that are named, which are not known


def test_a_bag_of_embeddings_adds_its_rows_up():
    module = Table(sgd)
    module.table = nn.EmbeddingBag(1000, 8, mode="sum", sparse=True)
    trace, _ = traces(module)
    # of 2 samples · 6 indices: to which sample each belongs, an int64, and in the backward pass 8 float32 values
    assert 12 * 8 in sizes(trace, "aten.new_empty")
    assert 12 * 8 * 4 in sizes(trace, "aten.index_select")
