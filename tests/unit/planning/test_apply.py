"""Writing the batch size: every holder of it, by a plain or dotted name, and nothing else."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_memplan.data.holders import holders_of
from lightning_memplan.errors import ApplyError
from lightning_memplan.planning.apply import find_holders, find_place, training_remarks


class Module(pl.LightningModule):
    def __init__(self, **values):
        super().__init__()
        self.__dict__.update(values)


class Data(pl.LightningDataModule):
    def __init__(self, **values):
        super().__init__()
        self.__dict__.update(values)


def with_hparams(owner, **values):
    owner.save_hyperparameters(values)
    return owner


def write(name, value, *owners):
    for holder in find_holders(name, *owners):
        holder.write(value)


def test_every_holder_is_written():
    module = with_hparams(Module(batch_size=2, width=4), batch_size=2, lr=0.1)
    data = with_hparams(Data(batch_size=2, folder="images"), batch_size=2)
    write("batch_size", 64, module, data)
    assert (module.batch_size, module.width, dict(module.hparams)) == (64, 4, {"batch_size": 64, "lr": 0.1})
    assert (data.batch_size, data.folder, dict(data.hparams)) == (64, "images", {"batch_size": 64})


def test_nothing_is_added_where_there_was_nothing():
    module, data = with_hparams(Module(), lr=0.1), Data(batch_size=2)
    write("batch_size", 64, module, data)
    assert not hasattr(module, "batch_size")
    assert (dict(module.hparams), dict(data.hparams)) == ({"lr": 0.1}, {})


@pytest.mark.parametrize(
    "owner",
    [
        Module(batch_size=3),
        Data(batch_size=3),
        with_hparams(Module(), batch_size=3),
        with_hparams(Data(), batch_size=3),
        SimpleNamespace(hparams=argparse.Namespace(batch_size=3)),
    ],
    ids=["module", "datamodule", "module's hparams", "datamodule's hparams", "a namespace"],
)
def test_it_is_found_in_any_holder(owner):
    assert [holder.read() for holder in find_holders("batch_size", None, owner)] == [3]


@pytest.mark.parametrize(
    "owner",
    [
        Module(data=SimpleNamespace(batch_size=3)),
        Data(data={"batch_size": 3}),
        with_hparams(Module(), data={"batch_size": 3}),
        with_hparams(Data(), data=argparse.Namespace(batch_size=3)),
    ],
    ids=["attribute's attribute", "attribute's key", "hparams' key", "hparams' namespace"],
)
def test_a_dotted_name_is_written_where_it_leads(owner):
    write("data.batch_size", 64, owner)
    assert [holder.read() for holder in holders_of("data.batch_size", owner)] == [64]
    assert holders_of("data.size", owner) == holders_of("loader.batch_size", owner) == []


def test_a_dotted_name_in_every_holder():
    config = {"data": {"batch_size": 2, "workers": 3}}
    module, data = with_hparams(Module(data=SimpleNamespace(batch_size=2)), **config), Data(data={"batch_size": 2})
    write("data.batch_size", 64, module, data)
    assert (module.data.batch_size, data.data) == (64, {"batch_size": 64})
    assert dict(module.hparams["data"]) == {"batch_size": 64, "workers": 3}


def test_a_property_is_written_through():
    class Derived(Data):
        @property
        def batch_size(self):
            return self.per_device

        @batch_size.setter
        def batch_size(self, value):
            self.per_device = value

    data = Derived(per_device=2)
    write("batch_size", 64, data)
    assert data.per_device == 64


def test_a_property_that_reads_the_hparams_follows_them():
    class Derived(Data):
        @property
        def batch_size(self):
            return self.hparams["batch_size"]

    data = with_hparams(Derived(), batch_size=2)
    write("batch_size", 64, data)
    assert data.batch_size == 64


def test_an_attribute_that_cannot_be_set_is_an_error_that_names_it():
    class Fixed(Data):
        @property
        def batch_size(self):
            return 2

    with pytest.raises(
        ApplyError, match=r"^Fixed\.batch_size cannot be set to 64 \(AttributeError: .*\): let it be set, or name anoth"
    ):
        write("batch_size", 64, Fixed())


def test_a_name_that_nothing_has():
    with pytest.raises(
        ApplyError,
        match=r"^Module or Data has no attribute or hyperparameter 'bs' to set: name the one that holds the batch size "
        r"with batch_arg_name=\.\.\., leave it out to set the loaders alone, or pass apply=False",
    ):
        find_holders("bs", Module(), Data())
    assert find_holders("batch_size", Module(), Data()) == ()


@pytest.mark.parametrize("value", [None, "8", 8.0, [8], True])
def test_what_is_held_is_no_int(value):
    with pytest.raises(TypeError, match=r"Data\.batch_size should be an int, the batch size, and is "):
        find_holders("batch_size", Data(batch_size=value))
    module, data = Module(batch_size=value), Data(batch_size=2)  # one of two is: that one is the batch size
    write("batch_size", 64, module, data)
    assert (module.batch_size, data.batch_size) == (value, 64)


# ------------------------------------------------------------------------------------------- what a size changes beside


class Rows(Dataset[torch.Tensor]):
    def __init__(self, count: int = 577) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.ones(4)


def trainer_of(**settings: Any) -> Any:
    return pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **settings)


@pytest.mark.parametrize(
    ("parts", "size", "steps"),
    [
        (1, 577, None),  # every batch is a step
        (4, 100, None),  # 6 batches of 100, four a step
        (8, 100, 15),  # 577 / 5 = 116 batches, eight a step
        (8, 577, 15),
        (200, 577, None),  # longer than an epoch before
    ],
)
def test_accumulation_that_an_epoch_cannot_hold(parts: int, size: int, steps: int | None) -> None:
    said = training_remarks(trainer_of(accumulate_grad_batches=parts), nn.Linear(4, 4), DataLoader(Rows()), size, 5)
    assert len(said) == (steps is not None)
    if steps is not None:
        assert f"instead of {steps} times with batches of 5" in said[0]


def test_accumulation_that_the_plan_sets_is_no_surprise() -> None:
    trainer = trainer_of(accumulate_grad_batches=8)
    assert training_remarks(trainer, nn.Linear(4, 4), DataLoader(Rows()), 577, 5, accumulates=False) == []


def test_accumulation_of_a_limited_epoch() -> None:
    trainer = trainer_of(accumulate_grad_batches=8, limit_train_batches=8)
    assert training_remarks(trainer, nn.Linear(4, 4), DataLoader(Rows()), 50, 5) == []  # 8 batches of 50 as well


@pytest.mark.parametrize(
    ("layer", "size", "own", "drops", "said"),
    [
        (nn.BatchNorm1d(4), 64, 5, False, True),  # 577 = 9 · 64 + 1
        (nn.BatchNorm1d(4), 64, 8, False, False),  # 577 = 72 · 8 + 1: as before
        (nn.BatchNorm1d(4), 64, 5, True, False),
        (nn.BatchNorm1d(4), 63, 5, False, False),
        (nn.LayerNorm(4), 64, 5, False, False),
    ],
)
def test_a_last_batch_of_one_sample_before_batch_norm(
    layer: nn.Module, size: int, own: int, drops: bool, said: bool
) -> None:
    remarks = training_remarks(trainer_of(), nn.Sequential(layer), DataLoader(Rows(), drop_last=drops), size, own)
    assert ["the last batch of an epoch has one sample at batch size 64" in remark for remark in remarks] == [
        True
    ] * said


def test_a_holder_that_does_not_hold_the_loaders_size() -> None:
    class Own(pl.LightningModule):
        batch_size = 8

        def train_dataloader(self) -> Any:
            return DataLoader(Rows(), batch_sampler=[[0, 1, 2]])

    trainer, module = trainer_of(), Own()
    trainer.fit_loop._data_source.instance = module
    loader, holders = module.train_dataloader(), find_holders("batch_size", module)
    assert find_place(trainer, loader, holders, own=8).own == 8
    with pytest.raises(
        ApplyError, match=r"^Own\.batch_size is 8, and the loaders' batches have 3 samples: it does not"
    ):
        find_place(trainer, loader, holders, own=3)
