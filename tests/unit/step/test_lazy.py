"""Lazy layers get their shapes from a batch, on a replica: the module's own stay lazy."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import lightning_memplan as mp
from lightning_memplan.step.lazy import has_lazy_layers


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LazyLinear(3)

    def forward(self, batch):
        return self.layer(batch)


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))

    def training_step(self, batch, batch_idx):
        return self.layers(batch).sum()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class MadeLater(Net):
    def __init__(self):
        super().__init__()
        del self.layers

    def configure_model(self):
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))


class ByHand(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()


@pytest.mark.parametrize(
    ("module", "parameters"),
    [
        (Net, 4 * 27 + 4 + 8 + 2 * 4 * 36 + 2),  # 3x3 filters of 3 channels, norm, 4 maps of 6x6 to 2
        (MadeLater, 2 * 3 * 64 + 2),
        (ByHand, 4 * 27 + 4 + 8 + 2 * 4 * 36 + 2),
        (Plain, 3 * 8 + 3),  # the last dimension of 8x8 images
    ],
)
def test_lazy_layers_are_planned_with_the_shapes_of_the_batch(module, parameters):
    lazy = module()
    found = mp.estimate(lazy, torch.zeros(4, 3, 8, 8), method="trace")
    assert found.formula.parameter_bytes == 4 * parameters
    if module is not MadeLater:
        assert has_lazy_layers(lazy)


def test_layers_that_stay_lazy_are_named():
    class Unused(Net):
        def __init__(self):
            super().__init__()
            self.other = nn.LazyLinear(1)

    with pytest.raises(mp.TraceError, match=r"'other\.weight' has no shape yet"):
        mp.estimate(Unused(), torch.zeros(4, 3, 8, 8), method="trace")


@pytest.mark.filterwarnings("ignore:MemoryPlanner measures nothing")
def test_a_lazy_module_that_makes_its_own_loader_is_planned():
    class Makes(Net):
        batch_size = 4

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.zeros(8, 3, 8, 8), batch_size=self.batch_size)

    planner = mp.MemoryPlanner("trace", device=mp.Device("a card", total=2**31), apply=True)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[planner], **quiet).fit(Makes())
    assert planner.plan.batch_size == 8  # the whole dataset
