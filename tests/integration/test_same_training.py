"""Training with the planner (``apply=False``) and without is the same to the bit: weights, random states, batches."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

import lightning_memplan as mp
from tests.programs.undisturbed_cases import KINDS

VARIED = (
    *("Metrics", "Buffers", "Average", "Hooked", "Generators", "Compiled"),
    *("Parametrized", "Closure", "ByHand", "Norms", "Recurrent", "Transformer"),
)
CARD = mp.Device("a card", total=2**33)
pytestmark = [
    pytest.mark.filterwarnings("ignore:MemoryPlanner measures nothing"),  # the CPU does not tell its peaks
    pytest.mark.filterwarnings("ignore:Found . module.s. in eval mode"),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads only wait for one another with tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Noisy(Dataset):
    """Rows that every generator of random numbers has a part in, as augmentations have."""

    def __len__(self) -> int:
        return 26

    def __getitem__(self, index: int) -> Any:
        return torch.randn(8) + random.random() + np.random.rand() + index, index % 3


class Batches(pl.Callback):
    """Keep every batch."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch[0].clone())


def plain(size: int) -> DataLoader:
    return DataLoader(Noisy(), batch_size=size, shuffle=True)


def weighted(size: int) -> DataLoader:
    return DataLoader(Noisy(), batch_size=size, sampler=WeightedRandomSampler([1.0, 2.0] * 13, 20))


def own_generator(size: int) -> DataLoader:
    return DataLoader(Noisy(), batch_size=size, shuffle=True, generator=torch.Generator().manual_seed(3))


def workers(size: int) -> DataLoader:
    return DataLoader(Noisy(), batch_size=size, shuffle=True, num_workers=1)


LOADERS = {loader.__name__: loader for loader in (plain, weighted, own_generator, workers)}


def trained(kind: str, loader: str, planner: mp.MemoryPlanner | None) -> dict[str, Any]:
    """Return what two epochs on the CPU leave behind."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    module, batches = KINDS[kind](), Batches()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[batches, *([planner] if planner else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, LOADERS[loader](module.batch_size))
    return {
        "weights": copy.deepcopy(module.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "batches": batches.seen,
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state(),
        "steps": trainer.global_step,
    }


def check_same(plain: Any, planned: Any, where: str = "") -> None:
    """Raise AssertionError where two values differ in a bit."""
    assert type(plain) is type(planned), where
    if isinstance(plain, torch.Tensor):
        assert torch.equal(plain, planned), where
    elif isinstance(plain, dict):
        assert plain.keys() == planned.keys(), where
        for name in plain:
            check_same(plain[name], planned[name], f"{where}/{name}")
    elif isinstance(plain, (list, tuple)):
        assert len(plain) == len(planned), where
        for k, (a, b) in enumerate(zip(plain, planned, strict=True)):
            check_same(a, b, f"{where}/{k}")
    else:
        assert plain == planned, where


@pytest.mark.parametrize("kind", VARIED)
def test_training_is_the_same_to_the_bit(kind: str) -> None:
    planner = mp.MemoryPlanner(device=CARD, apply=False, max_batch_size=64)
    check_same(trained(kind, "plain", None), trained(kind, "plain", planner))
    assert planner.plan is not None


@pytest.mark.parametrize("loader", ["weighted", "own_generator", "workers"])
def test_the_order_of_samples_is_the_same(loader: str) -> None:
    planner = mp.MemoryPlanner(device=CARD, apply=False, max_batch_size=64)
    check_same(trained("Generators", loader, None), trained("Generators", loader, planner))
    assert planner.plan is not None


def test_planning_that_fails_leaves_training_the_same() -> None:
    plain = trained("Generators", "plain", None)
    planner = mp.MemoryPlanner(device=CARD, apply=False, multiple_of=64)  # of 26 samples
    with pytest.warns(UserWarning, match="the batch size is not planned"):
        check_same(plain, trained("Generators", "plain", planner))
    assert planner.plan is None


@pytest.mark.parametrize("change", ["seed", "size"])
def test_a_difference_would_be_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trained("Norms", "plain", None)
    if change == "seed":
        monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    else:
        monkeypatch.setitem(LOADERS, "plain", lambda size: DataLoader(Noisy(), batch_size=size + 1, shuffle=True))
    with pytest.raises(AssertionError):
        check_same(plain, trained("Norms", "plain", None))
