"""Writing the batch size: every holder of it, by a plain or dotted name, and nothing else."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lightning_memplan.data.holders import Holder, holders_of
from lightning_memplan.errors import ApplyError, MemplanError, PlanningFailedError
from lightning_memplan.planning import apply, proposal
from lightning_memplan.planning.apply import (
    check_batches,
    find_holders,
    find_place,
    leaves_one_sample,
    most_within_epochs,
    names_by_stage,
    training_remarks,
    write_together,
)
from lightning_memplan.planning.proposal import RankResult


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
    assert find_holders("batch_size", Data(batch_size=value)) == ()  # something else has this name
    with pytest.raises(TypeError, match=r"Data\.bs should be an int, the batch size, and is "):
        find_holders("bs", Data(bs=value))
    module, data = Module(batch_size=value), Data(batch_size=2)  # one of two is: that one is the batch size
    write("batch_size", 64, module, data)
    assert (module.batch_size, data.batch_size) == (value, 64)


# ------------------------------------------------------------------------------------------------- an epoch's batches


def settings(**changes):
    """Lightning's defaults, of what decides how many batches an epoch has."""
    values = {
        "world_size": 1,
        "limit_train_batches": 1.0,
        "overfit_batches": 0.0,
        "limit_val_batches": 1.0,
        "enable_validation": True,
        "check_val_every_n_epoch": 1,
        "val_check_interval": 1.0,
        "_accelerator_connector": SimpleNamespace(use_distributed_sampler=changes.pop("divided", True)),
    }
    return SimpleNamespace(**{**values, **changes})


LOADER = DataLoader(range(20))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # 20 samples are 5 batches of 4
        ({"val_check_interval": 6}, r"val_check_interval=6 counts .* an epoch has 5 of .* size 4: .*max_batch_size=3$"),
        # two ranks have 10 samples each: 3 batches, the last of 2
        ({"val_check_interval": 4, "world_size": 2}, r"an epoch has 3 of the planned batch size 4: .*=3$"),
        # 2 of the 5 batches are read
        ({"val_check_interval": 3, "limit_train_batches": 2}, r"val_check_interval=3 counts .*max_batch_size=2$"),
        # 0.6 · 5 = 3
        ({"val_check_interval": 4, "limit_train_batches": 0.6}, r"val_check_interval=4 counts .*max_batch_size=3$"),
        ({"val_check_interval": 100}, r"max_batch_size=1$"),  # none is small enough: one sample is the least
        (
            {"limit_train_batches": 0.19},
            r"^limit_train_batches=0\.19 is a part of an epoch's batches, and an epoch has 5",
        ),
        ({"limit_train_batches": 0.19, "overfit_batches": 0.19}, r"^overfit_batches=0\.19 is .* \(overfit_batches=1\)"),
    ],
    ids=str,
)
def test_an_epoch_with_too_few_batches_is_refused(changes, message):
    with pytest.raises(ApplyError, match=message):
        check_batches(settings(**changes), LOADER, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"val_check_interval": 5},
        {"val_check_interval": 3, "world_size": 2},
        {"val_check_interval": 5, "world_size": 2, "divided": False},  # each rank has all samples
        {"val_check_interval": 2, "limit_train_batches": 2},
        {"val_check_interval": 3, "limit_train_batches": 0.6},
        {"val_check_interval": 5, "limit_train_batches": 9},  # there are no more than 5
        {"val_check_interval": 6, "limit_val_batches": 0},
        {"val_check_interval": 6, "check_val_every_n_epoch": None},
        {"val_check_interval": 6, "limit_train_batches": 0},  # nothing is trained
        {"val_check_interval": 6, "limit_train_batches": 0.0},
        {"limit_train_batches": 0.2},  # one batch
    ],
    ids=str,
)
def test_an_epoch_with_enough_batches_is_not_refused(changes):
    check_batches(settings(**changes), LOADER, 4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 20),
        ({"val_check_interval": 3}, 9),  # 20 samples are 3 batches of 9, and 2 of 10
        ({"limit_train_batches": 0.5}, 19),  # half of two batches is one
        ({"limit_train_batches": 0.25}, 6),  # a quarter of four batches
        ({"overfit_batches": 0.5, "limit_train_batches": 0.5}, 19),
        (
            {"val_check_interval": 9, "check_val_every_n_epoch": None, "max_epochs": 2},
            4,
        ),  # 5 batches twice, not 4 twice
        (
            {"val_check_interval": 9, "check_val_every_n_epoch": None, "max_epochs": 1},
            20,
        ),  # 4 samples have 5: none anyway
        ({"val_check_interval": 9, "check_val_every_n_epoch": None, "max_epochs": -1}, 20),
        ({"val_check_interval": 30}, 20),  # no size has so many: the check says so
    ],
    ids=str,
)
def test_a_batch_size_leaves_the_batches_that_an_epoch_needs(changes, expected):
    values = {"max_epochs": 1, "max_steps": -1, "accumulate_grad_batches": 1, **changes}
    assert most_within_epochs(settings(**values), LOADER, 20, 4) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 20),
        ({"limit_train_batches": 3}, 4),  # validation comes after the third batch
        ({"limit_train_batches": 1}, 20),
        ({"limit_train_batches": 3, "enable_validation": False}, 20),
        ({"val_check_interval": 0.5}, 20),  # of an epoch of one batch, it is one
        ({"val_check_interval": 2}, 4),
        ({"val_check_interval": 2, "limit_val_batches": 0}, 20),
        ({"val_check_interval": 2, "check_val_every_n_epoch": None}, 4),
        ({"val_check_interval": 2, "check_val_every_n_epoch": None, "max_epochs": -1}, 20),  # it comes at last
        ({"limit_train_batches": 0.5}, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("source", [DataLoader(Stream(), batch_size=4), [[0] * 4] * 5], ids=["stream", "batches"])
def test_the_own_size_has_the_batches_that_an_epoch_of_unknown_length_needs(changes, expected, source):
    values = {"max_epochs": 1, "max_steps": -1, "accumulate_grad_batches": 1, **changes}
    assert most_within_epochs(settings(**values), source, 20, 4) == expected
    assert most_within_epochs(settings(**values), source, 3, 4) == min(3, expected)


def test_an_epoch_of_unknown_length_is_not_refused():
    check_batches(settings(val_check_interval=6, limit_train_batches=0.1), DataLoader(Stream()), 4)


# ----------------------------------------------------------------------------------------------------- all or nothing


class Kept:
    """A place that is written into a dictionary, or fails."""

    def __init__(self, held, name, fails=False):
        self.held, self.name, self.fails = held, name, fails

    def write(self, size, undo):
        undo.callback(self.held.__setitem__, self.name, self.held[self.name])
        self.held[self.name] = size
        if self.fails:
            raise ApplyError(f"{self.name} cannot be set")


@pytest.fixture
def held():
    return {"train": 2, "val": 3}


def test_sizes_and_accumulation_are_written_together(held):
    trainer = SimpleNamespace(accumulate_grad_batches=1)
    with write_together([(Kept(held, "train"), 20), (Kept(held, "val"), 30)], trainer, 4):
        assert (held, trainer.accumulate_grad_batches) == ({"train": 20, "val": 30}, 4)
    assert (held, trainer.accumulate_grad_batches) == ({"train": 20, "val": 30}, 4)


def test_what_fails_inside_undoes_all(held):
    trainer = SimpleNamespace(accumulate_grad_batches=1)
    with (
        pytest.raises(KeyError, match="mine"),
        write_together([(Kept(held, "train"), 20), (Kept(held, "val"), 30)], trainer, 4),
    ):
        raise KeyError("mine")
    assert (held, trainer.accumulate_grad_batches) == ({"train": 2, "val": 3}, 1)


def test_a_place_that_cannot_be_written_undoes_those_before_it(held):
    trainer = SimpleNamespace(accumulate_grad_batches=1)
    with (
        pytest.raises(ApplyError, match="val cannot be set"),
        write_together([(Kept(held, "train"), 20), (Kept(held, "val", fails=True), 30)], trainer, 4),
    ):
        pytest.fail("nothing is announced that was not set")
    assert (held, trainer.accumulate_grad_batches) == ({"train": 2, "val": 3}, 1)


@pytest.mark.parametrize(("fatal", "raised"), [(True, MemplanError), (False, PlanningFailedError)])
def test_what_another_rank_cannot_write_is_written_nowhere(held, monkeypatch, fatal, raised):
    theirs = RankResult(reason="ApplyError: theirs", fatal=fatal)
    said = []
    monkeypatch.setattr(proposal, "over_ranks", lambda vote: said.append(vote) or [vote, theirs])
    with (
        pytest.raises(raised, match="rank 1: ApplyError: theirs"),
        write_together([(Kept(held, "train"), 20)], SimpleNamespace(accumulate_grad_batches=1), 4),
    ):
        pytest.fail("nothing is announced that was not set")
    assert held["train"] == 2
    assert said == [RankResult()]


def test_a_rank_that_cannot_write_tells_the_others_why(held, monkeypatch):
    said = []
    monkeypatch.setattr(proposal, "over_ranks", lambda vote: said.append(vote) or [vote])
    places = [(Kept(held, "train", fails=True), 20)]
    with (
        pytest.raises(PlanningFailedError, match="train cannot be set"),
        write_together(places, SimpleNamespace(accumulate_grad_batches=1), is_fatal=lambda error: False),
    ):
        pytest.fail("nothing is announced that was not set")
    (vote,) = said
    assert "train cannot be set" in vote.reason
    assert not vote.fatal


def test_accumulation_is_left_where_no_size_is_set():
    trainer = SimpleNamespace(accumulate_grad_batches=3)
    with write_together([], trainer, 4):
        pass
    with write_together([(Kept({"train": 2}, "train"), 20)], trainer, None):
        pass
    assert trainer.accumulate_grad_batches == 3


# ------------------------------------------------------------------------------------------------------ names by stage


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, r"batch_arg_name is a name such as 'batch_size', or names by stage such as .*, not 3$"),
        ({"val": 3}, r"batch_arg_name is a name .*, not \{'val': 3\}$"),
        ({"fit": "bs"}, r"has names for 'train', 'val', 'test', 'predict', not for 'fit'$"),
        ({"predict": "bs"}, r"batch_arg_name\['predict'\] cannot be planned yet: leave it out$"),
        ({"val": "batch_size"}, r"'batch_size' is training's batch size: leave batch_arg_name\['val'\] out"),
        ({"train": "bs", "test": "bs"}, r"'bs' is training's batch size: leave batch_arg_name\['test'\] out"),
    ],
)
def test_names_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        names_by_stage(given)


def test_each_stage_has_a_name_of_its_own():
    assert names_by_stage({"train": "bs", "test": "batch_size"}) == {"train": "bs", "test": "batch_size"}
    assert names_by_stage({"val": "size", "test": "size"}) == {"train": "batch_size", "val": "size", "test": "size"}


# ----------------------------------------------------------------------------------------- what a batch size changes


def remarks(samples, own, size, parts=1, module=None, drop_last=False, accumulates=True, **changes):
    trainer = settings(accumulate_grad_batches=parts, **changes)
    loader = DataLoader(range(samples), drop_last=drop_last)
    return training_remarks(trainer, module or nn.Linear(2, 2), loader, size, own, accumulates)


@pytest.mark.parametrize(
    ("case", "batches", "times"),
    [
        # 20 samples are 10 batches of 2, of which 4 make a step: 3 steps an epoch; and 3 batches of 8, the last of 4
        ({"own": 2, "size": 8, "parts": 4}, "3 batches", 3),
        ({"own": 2, "size": 20, "parts": 2}, "1 batch", 5),
        # two ranks have 10 samples each: 5 batches of 2, two of which make a step; and one of 10
        ({"own": 2, "size": 10, "parts": 2, "world_size": 2}, "1 batch", 3),
        # of 10 batches of 2 no more than 6 are taken, and 4 make a step; of 3 batches of 8 all
        ({"own": 2, "size": 8, "parts": 4, "limit_train_batches": 6}, "3 batches", 2),
        # half of them: 5 and 1
        ({"own": 2, "size": 8, "parts": 4, "limit_train_batches": 0.5}, "1 batch", 2),
    ],
    ids=str,
)
def test_an_accumulation_that_no_epoch_completes_is_said(case, batches, times):
    text = (
        f"accumulate_grad_batches={case['parts']} is more than the {batches} of an epoch at batch size {case['size']}: "
        f"the optimizer steps once an epoch, instead of {times} times with batches of {case['own']}; lower "
        "accumulate_grad_batches, or pass max_batch_size or effective_batch_size"
    )
    assert remarks(20, **case) == [text]


@pytest.mark.parametrize(
    "case",
    [
        {"own": 2, "size": 8, "parts": 3},  # three batches are a step
        {"own": 2, "size": 20, "parts": 1},  # every batch is one
        {"own": 5, "size": 10, "parts": 4},  # 4 batches of 5 are one step too
        {"own": 5, "size": 20, "parts": 9},  # no epoch completed it before
        {"own": 2, "size": 8, "parts": 4, "accumulates": False},  # another accumulation is planned
        {"own": 8, "size": 8, "parts": 4},
        {"own": None, "size": 8, "parts": 4},
        {"own": 2, "size": 5, "parts": 4, "limit_train_batches": 4},  # four batches are taken of either
    ],
    ids=str,
)
def test_an_accumulation_that_goes_on_as_before_is_not_said(case):
    assert remarks(20, **case) == []


NORMED = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


@pytest.mark.parametrize(
    ("samples", "case", "said"),
    [
        (21, {"own": 3, "size": 4}, True),  # the last of batches of 3 has 3, of 4 one
        (21, {"own": 2, "size": 4}, False),  # the last of 2 has one: as before
        (22, {"own": 3, "size": 4}, False),
        (21, {"own": 3, "size": 4, "module": nn.LayerNorm(2)}, False),
        (21, {"own": 3, "size": 4, "drop_last": True}, False),
        (22, {"own": 3, "size": 5, "world_size": 2}, True),  # each rank has 11
        (22, {"own": 3, "size": 5}, False),
        (21, {"own": 3, "size": 4, "accumulates": False}, True),  # whatever is accumulated
    ],
)
def test_a_last_batch_of_one_sample_is_said_where_a_layer_may_refuse_it(samples, case, said):
    text = (
        f"the last batch of an epoch has one sample at batch size {case['size']}, and Sequential has batch norm, which "
        "may refuse it: pass drop_last=True to the loader, or multiple_of or max_batch_size"
    )
    assert remarks(samples, **{"module": NORMED, **case}) == [text] * said


def test_both_remarks_are_made():
    assert len(remarks(21, own=3, size=20, parts=3, module=NORMED)) == 2


def test_of_an_epoch_of_unknown_length_nothing_is_said():
    trainer = settings(accumulate_grad_batches=100)
    assert training_remarks(trainer, nn.BatchNorm1d(2), DataLoader(Stream()), 8, 2) == []


# -------------------------------------------------------------------------------------------------- where it is written


def test_a_holder_that_does_not_hold_the_loaders_size():
    class Own(pl.LightningModule):
        batch_size = 8

        def train_dataloader(self):
            return DataLoader(range(20), batch_sampler=[[0, 1, 2]])

    trainer, module = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), Own()
    trainer.fit_loop._data_source.instance = module
    loader, holders = module.train_dataloader(), find_holders("batch_size", module)
    assert find_place(trainer, loader, holders, own=8).own == 8
    with pytest.raises(
        ApplyError, match=r"^Own\.batch_size is 8, and the loaders' batches have 3 samples: it does not"
    ):
        find_place(trainer, loader, holders, own=3)


class Batches(IterableDataset):
    """A dataset that makes the batches: its loader does not know their size."""

    def __iter__(self):
        return iter(torch.zeros(3, 8, 2))


@pytest.fixture
def made(monkeypatch):
    """Loaders that a hook makes anew from the attribute."""
    monkeypatch.setattr(apply, "loaders_are_made", lambda trainer, phase: True)
    monkeypatch.setattr(apply, "change_loaders", lambda *arguments: None)
    monkeypatch.setattr(apply, "kept_loaders", lambda *arguments: lambda: None)


@pytest.mark.parametrize(("held", "follows"), [(8, True), (16, True), (4, False), (32, False)])
def test_an_attribute_that_the_loaders_do_not_follow_is_no_place(made, held, follows):
    # batches of 8 samples on each of two ranks: the attribute is 8, or 16 for both
    holders, own = (Holder(Data(batch_size=held), "batch_size"),), DataLoader(Batches(), batch_size=None)
    if follows:
        assert find_place(settings(world_size=2), own, holders, own=8).before == (held,)
    else:
        with pytest.raises(ApplyError, match=rf"^Data\.batch_size is {held}, and the loaders' batches have 8 samples"):
            find_place(settings(world_size=2), own, holders, own=8)
    # where nobody knows the size of a batch, or the loaders tell it, the attribute may be anything
    assert find_place(settings(world_size=2), own, holders).before == (held,)
    assert find_place(settings(world_size=2), DataLoader(range(20), batch_size=2), holders, own=8).before == (held,)


def test_an_attribute_keeps_its_ratio_to_the_loaders_batches(made):
    data = Data(batch_size=16)
    place = find_place(settings(), DataLoader(range(90), batch_size=4), (Holder(data, "batch_size"),))
    with ExitStack() as undo:
        place.write(6, undo)
        assert (data.batch_size, place.held(6)) == (24, 24)  # 16 for batches of 4
    assert data.batch_size == 16


def test_loaders_that_cannot_be_resized_are_no_place():
    for source in (iter([]), DataLoader(Batches(), batch_size=None)):
        with pytest.raises(ApplyError, match="cannot be set"):
            find_place(settings(), source, ())


def test_what_cannot_be_described_is_not_set(held):
    def fails():
        raise KeyError("mine")

    trainer = SimpleNamespace(accumulate_grad_batches=1)
    with (
        pytest.raises(KeyError, match="mine"),
        write_together([(Kept(held, "train"), 20)], trainer, 4, describe=fails),
    ):
        pytest.fail("nothing is said that was not set")
    assert (held["train"], trainer.accumulate_grad_batches) == (2, 1)


def with_loader(loader, phase="train"):
    """Return a Trainer to which the loaders of a phase were passed, and what keeps them."""
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    sources = {
        "train": trainer.fit_loop._data_source,
        "val": trainer.fit_loop.epoch_loop.val_loop._data_source,
        "test": trainer.test_loop._data_source,
    }
    sources[phase].instance = loader
    return trainer, sources[phase]


@pytest.mark.parametrize("phase", ["train", "val", "test"])
def test_loaders_that_were_passed_are_set_themselves(phase):
    loader = DataLoader(range(60), batch_size=4)
    trainer, kept = with_loader(loader, phase)
    place = find_place(trainer, loader, (), phase)
    with ExitStack() as undo:
        place.write(6, undo)
        assert (kept.instance.batch_size, loader.batch_size, place.held(6)) == (6, 4, 6)
    assert kept.instance is loader


class AtMostEight(BatchSampler):
    """It groups samples that are alike, of which there are eight of a kind."""

    def __iter__(self):
        return iter([list(range(min(self.batch_size, 8)))] * 3)


@pytest.mark.parametrize("holds", [False, True], ids=["loaders alone", "an attribute too"])
def test_loaders_that_do_not_make_batches_of_a_size_are_found_out_before_any_is_set(holds):
    loader = DataLoader(range(60), batch_sampler=AtMostEight(SequentialSampler(range(60)), 4, drop_last=False))
    trainer, kept = with_loader(loader)
    data = Data(batch_size=4)
    place = find_place(trainer, loader, (Holder(data, "batch_size"),) if holds else ())
    with ExitStack() as undo:
        place.write(8, undo)
        assert kept.instance.batch_sampler.batch_size == 8
    with ExitStack() as undo, pytest.raises(ApplyError, match="set to 16, it makes a batch of 8"):
        place.write(16, undo)
    assert data.batch_size == 4


@pytest.mark.parametrize("phase", ["train", "val"])
def test_loaders_that_a_hook_makes_are_set_each_time(phase):
    class Makes(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.batch_size = 4

        def train_dataloader(self):
            return [DataLoader(range(60), batch_size=self.batch_size), DataLoader(range(60), batch_size=8)]

        val_dataloader = train_dataloader

    module = Makes()
    trainer, kept = with_loader(module, phase)
    trainer.strategy._lightning_module, module._trainer = module, trainer
    kept.name = f"{phase}_dataloader"
    place = find_place(trainer, module.train_dataloader(), find_holders("batch_size", module), phase)
    with ExitStack() as undo:
        place.write(6, undo)
        assert module.batch_size == 6
        assert [loader.batch_size for loader in kept.dataloader()] == [6, 12]  # the second keeps its ratio to the first
    assert [loader.batch_size for loader in kept.dataloader()] == [4, 8]


@pytest.mark.parametrize(
    ("old", "own", "size", "new"),
    [
        (4, 4, 6, 6),
        (2, 4, 7, 3),  # half of 7, rounded down
        (1, 8, 6, 1),  # an eighth of 6 is none
        (4, None, 6, 6),  # nobody knows what a batch has now
    ],
)
def test_an_attribute_is_written_in_its_ratio(made, old, own, size, new):
    data = Data(batch_size=old)
    source = DataLoader(Batches(), batch_size=None)
    place = apply.Place((Holder(data, "batch_size"),), settings(), source, (old,), own=own)
    with ExitStack() as undo:
        place.write(size, undo)
        assert data.batch_size == new
        assert type(data.batch_size) is int


def test_a_loader_that_has_another_size_after_it_was_made_anew_is_found_out():
    loader = DataLoader(range(60), batch_size=4)
    trainer, _ = with_loader(loader)
    trainer.fit_loop._combined_loader = DataLoader(range(60), batch_size=6)
    place = find_place(trainer, loader, ())
    place.check(6)
    with pytest.raises(
        ApplyError, match=r"^7 samples a batch were planned, and the DataLoader gives 6: Lightning made"
    ):
        place.check(7)
    trainer.fit_loop._combined_loader = DataLoader(Batches(), batch_size=None)  # which tells no size
    place.check(7)


def test_a_place_checks_what_training_alone_needs():
    loader = DataLoader(range(20), batch_size=2)
    trainer, _ = with_loader(loader)
    trainer.val_check_interval = 9
    with ExitStack() as undo, pytest.raises(ApplyError, match="val_check_interval=9 counts batches"):
        find_place(trainer, loader, ()).write(4, undo)
    trainer, kept = with_loader(loader, "val")
    trainer.val_check_interval = 9
    with ExitStack() as undo:
        find_place(trainer, loader, (), "val").write(4, undo)
        assert kept.instance.batch_size == 4


@pytest.mark.parametrize(
    ("changes", "own", "expected"),
    [
        ({"max_steps": 5}, 2, 20),  # with 2 samples a batch training ends before the 9th too
        ({"max_steps": 9, "max_epochs": 3}, 2, 9),  # three batches of 9 three times, and two of 10
        ({"max_steps": 3, "max_epochs": 3, "accumulate_grad_batches": 3}, 2, 9),  # three steps of three batches
        ({"max_steps": 1, "max_epochs": 3, "accumulate_grad_batches": 9}, 2, 9),
        ({"max_steps": 1, "max_epochs": 3, "accumulate_grad_batches": 8}, 2, 20),
        ({"max_epochs": 1}, 2, 2),  # 10 batches of 2, and 7 of 3
        ({"max_epochs": 2}, 2, 4),  # 5 batches of 4 twice
        ({"max_epochs": 1, "limit_val_batches": 0, "check_val_every_n_epoch": 1}, 2, 20),  # counted in each epoch
        ({"max_epochs": None, "max_steps": -1}, 2, 20),  # nothing ends it
        ({"max_epochs": 0}, 2, 20),
        ({"max_epochs": 2, "limit_train_batches": 4}, 2, 20),  # 4 batches twice: none anyway
        ({"max_epochs": 3, "limit_train_batches": 3}, 2, 9),  # 3 batches of 7 to 9
        ({"max_epochs": 2, "world_size": 2}, 2, 2),  # 10 samples a rank: 5 batches of 2
        ({"max_epochs": 2, "check_val_every_n_epoch": 1, "val_check_interval": 1.0}, 2, 20),
        ({"max_epochs": 2, "val_check_interval": 0.5}, 2, 20),
        ({"max_epochs": 2}, None, 20),  # nobody knows the user's own size
        ({"max_epochs": 2, "val_check_interval": 20}, 1, 2),  # 20 batches of one, or 10 of two twice
    ],
    ids=str,
)
def test_training_comes_to_the_validation_that_it_came_to_before(changes, own, expected):
    values = {"max_epochs": 9, "max_steps": -1, "accumulate_grad_batches": 1}
    values |= {"val_check_interval": 9, "check_val_every_n_epoch": None, **changes}
    assert most_within_epochs(settings(**values), LOADER, 20, own) == expected


def test_the_own_size_of_a_stream_stays_where_training_may_not_come_to_a_validation():
    values = {"val_check_interval": 9, "check_val_every_n_epoch": None, **ENDLESS, "max_epochs": 1}
    assert most_within_epochs(settings(**values), DataLoader(Stream()), 20, 4) == 4


def test_a_size_of_one_is_looked_at_where_two_are_too_many():
    # 20 samples are 20 batches of one, and 10 of two
    assert most_within_epochs(settings(val_check_interval=11, **ENDLESS), LOADER, 20, 1) == 1
    assert most_within_epochs(settings(val_check_interval=21, **ENDLESS), LOADER, 20, 1) == 20


ENDLESS = {"max_epochs": -1, "max_steps": -1, "accumulate_grad_batches": 1}


def test_a_part_of_an_epoch_is_taken_of_each_loader():
    # at 20 samples a batch, half of the second loader's only batch is none; at 19 it has two
    several = [DataLoader(range(40), batch_size=4), DataLoader(range(20), batch_size=4)]
    half = {"limit_train_batches": 0.5, "max_epochs": 1, "max_steps": -1, "accumulate_grad_batches": 1}
    with pytest.raises(ApplyError, match="a loader has 1 of the planned batch size 20, which is not one"):
        check_batches(settings(**half), several, 20)
    assert most_within_epochs(settings(**half), several, 20, 4) == 19


@pytest.mark.parametrize(
    ("size", "own", "expected"),
    [(19, 4, True), (3, 4, False), (19, 19, False), (19, None, False), (20, 4, False), (9, 19, False)],
    ids=str,
)
def test_a_last_batch_of_one_sample_is_noticed_where_there_was_none(size, own, expected):
    # of 20 samples, batches of 19 leave one, and those of 3, 9 and 4 leave two or none
    assert leaves_one_sample(settings(), LOADER, size, own) is expected


class KeepsSize(DataLoader):
    def __init__(self, size):
        super().__init__(range(32), batch_size=size)
        self.size = size

    def __iter__(self):
        return super().__iter__()


def test_a_loader_made_before_that_cannot_be_resized_stays_and_so_does_what_holds_its_size():
    module, loader = Module(batch_size=4), KeepsSize(4)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit_loop._data_source.instance, module.trainer = module, trainer
    module.train_dataloader = lambda: loader
    place = find_place(trainer, loader, find_holders("batch_size", module))
    with ExitStack() as undo:
        place.write(8, undo)
        assert module.batch_size == 8
        assert trainer.fit_loop._data_source.dataloader() is loader
        assert (loader.batch_size, module.batch_size) == (4, 4)
        with pytest.raises(ApplyError, match=r"keeps 4 as self\.size beside batch_size"):
            place.check(8)
