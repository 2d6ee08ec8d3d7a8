"""Advice: what it saves is what the null GPU shows of the same change; what applies, and what it leaves alone."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_memplan as mp
from lightning_memplan._advice import _repeated_blocks

MiB = 2**20
CASES = Path(__file__).with_name("advice_cases.py")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(256, 1024), nn.Linear(1024, 256)

    def forward(self, x):
        return x + self.two(self.one(x).relu())


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def training_step(self, batch, batch_idx):
        for block in self.blocks:
            batch = block(batch)
        return batch.sum()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 10)]


CARD = mp.Device("a card", total=2**30, capability=(8, 6))


def advised(module, **options):
    found = mp.advise(module, torch.zeros(2, 256), **{"batch_size": 4096, "device": CARD, **options})
    assert [item.saved for item in found] == sorted((item.saved for item in found), reverse=True)
    return {item.change: item for item in found}


@pytest.fixture(scope="module")
def advice():
    module = Module()
    before = {name: dict(child.__dict__) for name, child in module.named_modules()}
    found = advised(module)
    for name, child in module.named_modules():
        assert child.__dict__ == before[name]  # the user's module is left alone
    assert all(type(parameter) is nn.Parameter for parameter in module.parameters())
    return found


# ------------------------------------------------------------------------------------------------- what is advised


def test_each_is_an_estimate_of_the_change_itself(advice):
    before = mp.estimate(Module(), torch.zeros(2, 256), device=CARD)
    mixed = advice["precision='bf16-mixed'"]
    after = mp.estimate(Module(), torch.zeros(2, 256), device=CARD, precision="bf16-mixed")
    assert (mixed.kind, mixed.batch_size) == ("precision", 4096)
    assert (mixed.peak_reserved, mixed.peak_allocated) == (after.peak(4096), after.peak_allocated(4096))
    assert mixed.saved == before.peak(4096) - after.peak(4096)
    budget = int(CARD.capacity * 0.95)
    assert after.fits(mixed.largest_batch_size, budget)
    assert not after.fits(mixed.largest_batch_size + 1, budget)


def test_blocks_are_checkpointed_on_the_copy(advice):
    (item,) = (item for item in advice.values() if item.kind == "checkpointing")
    assert item.change.startswith("torch.utils.checkpoint around each of the 3 blocks (Block)")
    # of each block but the one at hand its outputs alone are kept: not the 1024 values before and after the ReLU
    assert item.saved >= 2 * 4096 * 1024 * 4


def test_halves_are_accumulated(advice):
    (item,) = (item for item in advice.values() if item.kind == "accumulation")
    assert (item.change, item.batch_size) == ("accumulate_grad_batches=2 at batch size 2048", 2048)


class Keeps(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(1024, 1024), nn.ReLU())))

    def training_step(self, batch, batch_idx):
        return self.net(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


def test_gradients_that_are_kept():
    found = mp.advise(Keeps(), torch.zeros(2, 1024), batch_size=4096, device=CARD)
    (item,) = (item for item in found if item.kind == "zero_grad")
    assert item.saved > 6 * 1024 * 1024 * 4  # the gradients, that are there while activations are


def test_what_does_not_apply():
    module = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    plain = advised(module, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), precision="16-true")
    assert {item.kind for item in plain.values()} <= {"accumulation", "allocator"}
    old = advised(module, device=mp.Device("a card", total=2**30, capability=(7, 5)))
    assert "precision='16-true'" in old  # bfloat16 begins with 8.0
    assert not any(item.kind == "optimizer" for item in old.values())  # it has none


def test_which_blocks_repeat():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ReLU())  # no parts
            self.stage = nn.Sequential(Block(), Block())
            self.outer = nn.ModuleList([Module(), Module()])  # whose own blocks are within

    assert [path for path, _ in _repeated_blocks(Net())] == ["stage.0", "stage.1", "outer.0", "outer.1"]


def test_by_default_at_the_largest_batch_size_that_fits():
    loader = DataLoader(torch.zeros(100, 64), batch_size=4)
    found = mp.advise(nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 4096)), loader, device=CARD)
    assert {item.batch_size for item in found} <= {100, 50}


def test_a_step_that_cannot_be_traced():
    class Reads(Module):
        def training_step(self, batch, batch_idx):
            return self.blocks[0](batch[batch.sum(1) > 0]).sum().long().item()

    with pytest.raises(mp.TraceError, match="Reads cannot be traced"):
        mp.advise(Reads(), torch.zeros(2, 256), device=CARD)


# ------------------------------------------------------------------------------------------------- where it is said


def test_what_does_not_fit_says_what_would_help():
    card = mp.Device("a small card", total=128 * MiB)
    with pytest.raises(mp.DoesNotFitError) as caught:
        mp.plan(Module(), torch.zeros(2, 256), device=card, margin=0, min_batch_size=4096)
    lines = str(caught.value).splitlines()
    at = lines.index("What would help, the best first:")
    assert lines[at + 1].startswith("  1. ")
    assert "which fits" in "".join(lines[at:]) or "which still lacks" in "".join(lines[at:])
    assert sum(line.startswith(("  1. ", "  2. ", "  3. ", "  4. ")) for line in lines) == 3


def test_every_card():
    cards = [mp.gpu("A100 80GB"), mp.gpu("T4"), mp.Device("tiny", total=8 * MiB, capability=(7, 5))]
    found = mp.cards_for(Module(), torch.zeros(2, 256), cards=cards, max_batch_size=2**20, multiple_of=8)
    assert [card.name for card, _ in found] == ["tiny", "T4", "A100 80GB"]
    sizes = [size for _, size in found]
    assert sizes[0] == 0 < sizes[1] < sizes[2]
    assert sizes[1] == mp.plan(Module(), torch.zeros(2, 256), device="T4", multiple_of=8).batch_size


# ------------------------------------------------------------------------------------------------- the same, done


def test_what_is_saved_is_what_the_null_gpu_shows(nullgpu):
    """Reserved bytes saved by each change: within 5 % of what the allocator itself reserved less."""
    spec = importlib.util.spec_from_file_location("advice_cases", CASES)
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    real = json.loads(nullgpu([sys.executable, "-W", "ignore", str(CASES)]).stdout)
    compared = 0
    for case, (make, shape, size, half) in cases.CASES.items():
        card = mp.Device("a card", total=2**34, capability=(8, 6) if half is torch.bfloat16 else (7, 5))
        measured = real[case]
        found = mp.advise(make(), torch.zeros(2, *shape), batch_size=size, device=card, optimizer=cases.adamw)
        for item in found:
            name = item.change.split("-")[-1].strip("'") if item.kind == "precision" else item.change
            ((allocated, reserved),) = (peaks for key, peaks in measured.items() if key and name.startswith(key))
            saved = measured[""][1] - reserved
            assert item.saved == pytest.approx(saved, rel=0.05), (case, item.change)
            assert item.peak_allocated == pytest.approx(allocated, rel=0.05), (case, item.change)
            compared += 1
    assert compared >= 12
