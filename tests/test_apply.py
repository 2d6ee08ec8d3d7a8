"""Writing the batch size: every holder of it, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl

from lightning_memplan._apply import check_settable, holders_of, read_batch_size, write_batch_size
from lightning_memplan._errors import ApplyError


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


def test_every_holder_is_written():
    module = with_hparams(Module(batch_size=2, width=4), batch_size=2, lr=0.1)
    data = with_hparams(Data(batch_size=2, folder="images"), batch_size=2)
    write_batch_size("batch_size", 64, module, data)
    assert (module.batch_size, module.width, dict(module.hparams)) == (64, 4, {"batch_size": 64, "lr": 0.1})
    assert (data.batch_size, data.folder, dict(data.hparams)) == (64, "images", {"batch_size": 64})


def test_nothing_is_added_where_there_was_nothing():
    module, data = with_hparams(Module(), lr=0.1), Data(batch_size=2)
    write_batch_size("batch_size", 64, module, data)
    assert not hasattr(module, "batch_size")
    assert (dict(module.hparams), dict(data.hparams)) == ({"lr": 0.1}, {})


@pytest.mark.parametrize(
    "owner",
    [
        Module(batch_size=3),
        Data(batch_size=3),
        with_hparams(Module(), batch_size=3),
        with_hparams(Data(), batch_size=3),
    ],
    ids=["module", "datamodule", "module's hparams", "datamodule's hparams"],
)
def test_it_is_read_from_any_holder(owner):
    assert read_batch_size("batch_size", None, owner) == 3
    assert len(holders_of("batch_size", None, owner)) == 1


def test_a_property_is_written_through():
    class Derived(Data):
        @property
        def batch_size(self):
            return self.per_device

        @batch_size.setter
        def batch_size(self, value):
            self.per_device = value

    data = Derived(per_device=2)
    write_batch_size("batch_size", 64, data)
    assert data.per_device == 64


def test_hparams_that_are_a_namespace_are_left():
    owner = SimpleNamespace(hparams=SimpleNamespace(batch_size=2))
    assert holders_of("batch_size", owner) == []


def test_no_holder():
    with pytest.raises(
        ApplyError,
        match=r"Module or Data has no attribute or hyperparameter 'bs' to set: keep the batch size as self\.bs and "
        r"make the dataloaders with it, name the attribute with batch_arg_name=\.\.\., or pass apply=False",
    ):
        read_batch_size("bs", Module(), Data())


@pytest.mark.parametrize("value", [None, "8", 8.0, [8], True])
def test_what_is_held_is_no_int(value):
    with pytest.raises(TypeError, match=r"Data\.batch_size should be an int, the batch size, and is "):
        read_batch_size("batch_size", Data(batch_size=value))


def test_loaders_that_are_there_already():
    with pytest.raises(ApplyError, match=r"^the loaders were passed to fit, .* pass apply=False"):
        check_settable("batch_size", Module(batch_size=2), None, loaders_are_made=False)
    check_settable("batch_size", Module(batch_size=2), None, loaders_are_made=True)
