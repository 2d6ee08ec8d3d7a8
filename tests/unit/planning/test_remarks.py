"""Say what a batch size makes of a training, and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

import lightning_memplan as mp
from lightning_memplan.planning.remarks import few_steps, smaller_gpu

GIB = 2**30


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Any:
        return iter(torch.zeros(4, 1))


def advice(samples: int, own: int, size: int, loader: Any = None, **settings: Any) -> str:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **settings)
    return few_steps(trainer, DataLoader(range(samples)) if loader is None else loader, size, own)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        # 1,000 samples: 250 batches of 4, 20 of 50, 10 of 100. Above 8 * 4 = 32 it is many times
        ({"own": 4, "size": 32}, ""),
        ({"own": 10, "size": 50}, ""),
        ({"own": 10, "size": 52}, ""),  # 20 batches, the last of 12
        ({"own": 10, "size": 53}, "batch size 53 leaves 19 optimizer steps an epoch in place of 100."),
        ({"own": 4, "size": 34}, "batch size 34 is 8.5 times yours (4)."),
        (
            {"own": 4, "size": 500},
            "500 is 125 times yours (4), and leaves 2 optimizer steps an epoch in place of 250.",
        ),
        (
            {"own": 100, "size": 1000},
            "is 10 times yours (100), and leaves 1 optimizer step an epoch in place of 10.",
        ),
        ({"own": 100, "size": 100}, ""),  # ten steps, as before
        ({"own": 100, "size": 80}, ""),
        # two batches a step: 500 samples are 25 steps of 40, 1,000 are 13
        ({"own": 10, "size": 40, "accumulate_grad_batches": 2}, "leaves 13 optimizer steps an epoch in place of 50."),
        ({"own": 10, "size": 50, "limit_train_batches": 19}, ""),  # 19 batches of either
    ],
    ids=str,
)
def test_few_steps_and_far_sizes_are_said(case: dict[str, Any], said: str) -> None:
    text = advice(1000, **case)
    assert said in text
    assert bool(text) == bool(said)


def test_what_is_advised_is_neither_few_steps_nor_far() -> None:
    # 20 steps of 1,000 samples: batches of 52 (19 of 52 are 988); 8 times 4 are 32
    assert "pass max_batch_size=52, or effective_batch_size=10 to keep" in advice(1000, own=10, size=100)
    assert "pass max_batch_size=32, or effective_batch_size=4 to keep" in advice(1000, own=4, size=100)
    for own, size in ((10, 100), (4, 100), (3, 999)):
        most = int(advice(1000, own, size).partition("max_batch_size=")[2].partition(",")[0])
        assert advice(1000, own, most) == ""
    # 12 batches of 1,000 are few already: no other size has more
    assert "max_batch_size=90," in advice(1000, own=90, size=1000)
    # two batches a step, as now
    assert "effective_batch_size=20 to keep" in advice(1000, own=10, size=100, accumulate_grad_batches=2)


def test_of_a_stream_only_the_ratio_is_known() -> None:
    assert advice(0, own=4, size=32, loader=DataLoader(Stream())) == ""
    assert "batch size 33 is 8.25 times yours (4). To stay closer to your training pass max_batch_size=32," in advice(
        0, own=4, size=33, loader=DataLoader(Stream())
    )


def plan_for(card: mp.Device, reserved: int) -> mp.Plan:
    return mp.Plan(
        batch_size=64,
        device=card,
        budget=23 * GIB,
        margin=0.05,
        limited_by="memory",
        method="trace",
        peak_reserved=reserved,
        peak_allocated=reserved,
        formula_peak=reserved,
    )


@pytest.mark.parametrize(
    ("here", "reserved", "said"),
    [
        (15, 14, "it reserves 14.00 GiB and fits."),
        (15, 15, "it reserves 15.00 GiB and may run out of memory."),  # a GiB is the context's
        (24, 23, ""),
        (32, 23, ""),
    ],
)
def test_a_plan_for_a_larger_gpu_is_said(here: int, reserved: int, said: str) -> None:
    gpu = mp.Device("here", total=here * GIB, context=GIB)
    found = smaller_gpu(plan_for(mp.Device("there", total=24 * GIB), reserved * GIB), gpu)
    assert len(found) == bool(said)
    assert said in "".join(found)
