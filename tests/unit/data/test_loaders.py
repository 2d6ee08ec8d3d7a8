"""The batch size of every kind of loader, wherever it comes from: set, each sample seen once, in the same order."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import random
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.data import _replace_dunder_methods
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from pytorch_lightning.utilities.data import _update_dataloader
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

import lightning_memplan as mp
from lightning_memplan.data.loaders import (
    batch_size_of_loader,
    batches_of_epoch,
    check_resizable,
    dataset_size,
    loaders_in,
    resized_loaders,
)

CARD = mp.Device("a card", total=2**30)
numbers = list(torch.arange(1.0, 22.0))  # 21 samples: 3 batches of 7


class Stream(IterableDataset):
    def __iter__(self):
        return iter(numbers)


class Shared(IterableDataset):
    """A stream of which each worker has its share."""

    def __iter__(self):
        worker = get_worker_info()
        return iter(numbers if worker is None else numbers[worker.id :: worker.num_workers])


class Reversed(BatchSampler):
    """A BatchSampler of the user's: the last samples first."""

    def __iter__(self):
        order = list(reversed(list(self.sampler)))
        return iter([order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)])


class Evens:
    """A batch sampler that is none of torch's: even samples and odd ones in batches of their own."""

    def __init__(self, count, batch_size):
        self.count, self.batch_size = count, batch_size

    def __len__(self):
        return len(list(iter(self)))

    def __iter__(self):
        for first in (0, 1):
            order = range(first, self.count, 2)
            yield from (list(order[at : at + self.batch_size]) for at in range(0, len(order), self.batch_size))


class Named(DataLoader):
    """A subclass that asks for one more argument, and keeps it."""

    def __init__(self, name, dataset, batch_size):
        self.name = name
        super().__init__(dataset, batch_size=batch_size, shuffle=True)


class Doubled(DataLoader):
    """A subclass whose arguments are not told, with an __iter__ of its own."""

    def __init__(self, size, *rest):
        super().__init__(numbers, *rest, batch_size=size, collate_fn=torch.stack)

    def __iter__(self):
        return (2 * batch for batch in super().__iter__())


def plain(size, **kwargs):
    return DataLoader(numbers, batch_size=size, **kwargs)


KINDS = {
    "plain": plain,
    "shuffled": functools.partial(plain, shuffle=True),
    "with a generator": lambda size: plain(size, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "dropping the last": functools.partial(plain, shuffle=True, drop_last=True),
    "collated": functools.partial(plain, collate_fn=lambda rows: {"x": torch.stack(rows), "n": len(rows)}),
    "a weighted sampler": lambda size: plain(size, sampler=WeightedRandomSampler([1.0] * 21, 21, replacement=False)),
    "a batch sampler": lambda size: DataLoader(
        numbers, batch_sampler=BatchSampler(RandomSampler(numbers), size, False)
    ),
    "a batch sampler's subclass": lambda size: DataLoader(
        numbers, batch_sampler=Reversed(SequentialSampler(numbers), size, False)
    ),
    "a batch sampler of one's own": lambda size: DataLoader(numbers, batch_sampler=Evens(21, size)),
    "a stream": lambda size: DataLoader(Stream(), batch_size=size),
    "a stream with workers": lambda size: DataLoader(Shared(), batch_size=size, num_workers=2),
    "a subclass": lambda size: Named("own", numbers, size),
    "a subclass that hides its arguments": Doubled,
    "positional": lambda size: DataLoader(numbers, size, True),
    "workers": functools.partial(plain, shuffle=True, num_workers=1, persistent_workers=True),
    "a dict": lambda size: {"a": plain(size, shuffle=True), "b": plain(size)},
    "nested": lambda size: [plain(size), {"b": (plain(size, shuffle=True),)}],
    "a CombinedLoader": lambda size: CombinedLoader({"a": plain(size), "b": [plain(size)]}, "min_size"),
}
SEVERAL = ("a dict", "nested", "a CombinedLoader")
ONCE = [kind for kind in KINDS if kind not in SEVERAL]


SHUFFLED = (
    *("shuffled", "with a generator", "dropping the last", "a weighted sampler", "a batch sampler", "a subclass"),
    "positional",
)


class Net(pl.LightningModule):
    """``seen`` are the batches of real steps, each as a flat list."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        parts = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
        self.seen.append([part.tolist() for part in parts])
        return sum(part.sum() for part in parts) * self.weight

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def attribute_of_the_module(make):
    class Own(Net):
        batch_size = 2

        def train_dataloader(self):
            return make(self.batch_size)

    return Own(), {}


def number_in_the_module(make):
    class Own(Net):
        def train_dataloader(self):
            return make(2)

    return Own(), {}


def attribute_of_the_datamodule(make):
    class Data(pl.LightningDataModule):
        def __init__(self):
            super().__init__()
            self.batch_size = 2

        def train_dataloader(self):
            return make(self.batch_size)

    return Net(), {"datamodule": Data()}


def number_in_the_datamodule(make):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return make(2)

    return Net(), {"datamodule": Data()}


def passed(make, size=2):
    return Net(), {"train_dataloaders": make(size)}


WAYS = [
    attribute_of_the_module,
    number_in_the_module,
    attribute_of_the_datamodule,
    number_in_the_datamodule,
    passed,
]


def fit(module, arguments, *callbacks, **settings):
    """One epoch under a seed."""
    common = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(
        **{"max_epochs": 1, "enable_model_summary": False, **common, **settings}, callbacks=list(callbacks)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "MemoryPlanner measures nothing")
        pl.seed_everything(5, verbose=False)
        trainer.fit(module, **arguments)
    return trainer


def planner_of(**kwargs):
    return mp.MemoryPlanner(
        **{"apply": True, "on_error": "raise", "device": CARD, "method": "formula", "max_batch_size": 7, **kwargs}
    )


@functools.cache
def without_a_planner(kind, **settings):
    module, arguments = passed(KINDS[kind], 7)
    fit(module, arguments, **settings)
    return module.seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_it_is_set_as_if_it_had_been_so_from_the_start(way, kind):
    module, arguments = way(KINDS[kind])
    planner = planner_of()
    given = arguments.get("train_dataloaders")
    trainer = fit(module, arguments, planner)
    assert planner.plan.batch_size == 7
    assert module.seen == without_a_planner(kind)
    assert module.seen
    assert {batch_size_of_loader(loader) for loader in loaders_in(trainer.train_dataloader)} == {7}
    if kind in ONCE:
        factor = 2 if kind == "a subclass that hides its arguments" else 1
        seen = Counter(number for (batch,) in module.seen for number in batch)
        assert seen == Counter(factor * float(number) for number in numbers)
    if given is not None:  # the user's own loaders are as they were
        assert {batch_size_of_loader(loader) for loader in loaders_in(given)} == {2}
        assert all(loader._iterator is None for loader in loaders_in(given))


@pytest.mark.parametrize("kind", [kind for kind in ONCE if "worker" not in kind])
@pytest.mark.parametrize("way", [attribute_of_the_datamodule, passed])
def test_a_second_epoch_is_as_it_would_have_been(way, kind):
    """Another order than the first one's, where samples are shuffled, and again each sample once."""
    module, arguments = way(KINDS[kind])
    fit(module, arguments, planner_of(), max_epochs=2)
    assert module.seen == without_a_planner(kind, max_epochs=2)
    halves = module.seen[: len(module.seen) // 2], module.seen[len(module.seen) // 2 :]
    assert (halves[0] == halves[1]) == (kind not in SHUFFLED)
    first, second = (Counter(number for (batch,) in half for number in batch) for half in halves)
    assert first == second
    assert set(first.values()) == {1}


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
@pytest.mark.parametrize("way", [number_in_the_datamodule, passed])
def test_a_combined_loader_of_any_mode(way, mode):
    def make(size):
        return CombinedLoader([plain(size, shuffle=True), DataLoader(numbers[:14], batch_size=size)], mode)

    def seen(module, arguments, *callbacks):
        class Any(type(module)):
            def training_step(self, batch, batch_idx, dataloader_idx=0):
                present = batch if torch.is_tensor(batch) else [part for part in batch if part is not None]
                return super().training_step(present, batch_idx)

        module.__class__ = Any
        fit(module, arguments, *callbacks)
        return module.seen

    plainly = seen(Net(), {"train_dataloaders": make(7)})
    assert seen(*way(make), planner_of()) == plainly
    # 3 and 2 batches of 7: as many as the shorter has, or the longer
    assert len(plainly) == {"min_size": 2, "max_size_cycle": 3, "max_size": 3}[mode]


def test_what_a_copy_keeps():
    loader = plain(2, shuffle=True, num_workers=2, prefetch_factor=3, persistent_workers=True, timeout=9)
    loader.worker_init_fn, loader.mine = print, "kept"
    context = loader.multiprocessing_context
    own = resized_loaders(loader, [5])
    assert own is not loader
    assert (own.batch_size, own.batch_sampler.batch_size, len(own)) == (5, 5, 5)  # 21 = 4 · 5 + 1
    assert (loader.batch_size, loader.batch_sampler.batch_size, len(loader)) == (2, 2, 11)
    for name in ("dataset", "sampler", "collate_fn", "worker_init_fn", "mine", "prefetch_factor", "timeout"):
        assert getattr(own, name) is getattr(loader, name)
    assert (own.num_workers, own.persistent_workers, own.multiprocessing_context) == (2, True, context)


def test_a_copy_of_a_used_loader_starts_workers_of_its_own():
    loader = plain(2, num_workers=1, persistent_workers=True)
    assert len(next(iter(loader))) == 2
    workers = loader._iterator
    assert workers is not None  # they live on, and make batches of 2
    own = resized_loaders(loader, [5])
    assert own._iterator is None
    assert [len(batch) for batch in own] == [5, 5, 5, 5, 1]
    assert loader._iterator is workers
    for each in (own, loader):
        each._iterator._shutdown_workers()


def test_a_rank_has_its_share_rounded_up():
    # 10 samples for 4 ranks are 2.5 each: DistributedSampler gives each 3, which are 2 batches of 2, or 1 and a rest
    assert batches_of_epoch(DataLoader(range(10)), 2, ranks=4) == 2
    assert batches_of_epoch(DataLoader(range(10), drop_last=True), 2, ranks=4) == 1
    assert batches_of_epoch(DataLoader(range(10), drop_last=True), 3, ranks=4) == 1
    assert batches_of_epoch(DataLoader(Stream()), 2, ranks=4) is None


def test_a_loader_of_the_right_size_stays_itself():
    loader = plain(5)
    assert resized_loaders({"a": loader}, [5])["a"] is loader


def test_loaders_keep_their_ratio():
    few, many = plain(2), DataLoader(numbers * 10, batch_size=6)
    module, planner = Net(), planner_of()
    fit(module, {"train_dataloaders": {"labelled": few, "unlabelled": many}}, planner)
    assert [[len(part) for part in batch] for batch in module.seen[:3]] == [[7, 21]] * 3
    assert dataset_size({"a": few, "b": many}) == 21  # of 21 and 210 / 3 = 70
    assert dataset_size([plain(4), plain(6)]) == 14  # 21 / 1.5


def test_an_attribute_keeps_its_ratio_to_the_loader(tmp_path):
    class Halves(pl.LightningDataModule):
        batch_size = 4

        def train_dataloader(self):
            return plain(self.batch_size // 2)

    module, data = Net(), Halves()
    fit(module, {"datamodule": data}, planner_of(), logger=CSVLogger(tmp_path, "", ""), log_every_n_steps=1)
    assert (data.batch_size, [len(batch[0]) for batch in module.seen]) == (14, [7, 7, 7])
    assert "\nbatch_size: 14\n" in "\n" + (tmp_path / "hparams.yaml").read_text()


def test_a_hook_may_ask_the_trainer():
    class Asks(Net):
        batch_size = 2

        def train_dataloader(self):
            return plain(self.batch_size // self.trainer.world_size)

    module = Asks()
    fit(module, {}, planner_of())
    assert [len(batch[0]) for batch in module.seen] == [7, 7, 7]


def test_a_passed_loader_and_an_attribute_are_both_set():
    module, arguments = passed(KINDS["plain"])
    module.save_hyperparameters({"batch_size": 2})
    fit(module, arguments, planner_of())
    assert (module.hparams["batch_size"], [len(batch[0]) for batch in module.seen]) == (7, [7, 7, 7])


def test_loaders_that_are_made_every_epoch():
    module, arguments = number_in_the_module(KINDS["plain"])
    fit(module, arguments, planner_of(), max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert [len(batch[0]) for batch in module.seen] == [7] * 9


def test_the_trainer_is_left_as_it_was():
    module, arguments = number_in_the_module(KINDS["plain"])
    trainer = fit(module, arguments, planner_of())
    assert "dataloader" not in vars(trainer.fit_loop._data_source)


def test_a_loader_that_lightning_makes_anew_keeps_the_size():
    """As it does for a distributed sampler: ``overfit_batches`` takes the same way in one process."""
    for way in (number_in_the_module, passed):
        module, arguments = way(KINDS["shuffled"])
        with pytest.warns(UserWarning, match="You requested to overfit but enabled train dataloader shuffling"):
            fit(module, arguments, planner_of(), overfit_batches=2)
        assert [batch[0] for batch in module.seen] == [list(range(1, 8)), list(range(8, 15))]


@pytest.mark.parametrize("noted", [True, False], ids=["made in a hook", "passed"])
@pytest.mark.parametrize("kind", ["positional", "a batch sampler's subclass"])
def test_what_lightning_makes_anew_for_a_rank_has_the_size(kind, noted):
    """Lightning notes the arguments of what a hook makes, and reads the attributes of what is passed."""
    with contextlib.ExitStack() as stack:
        if noted:
            stack.enter_context(_replace_dunder_methods(DataLoader, "dataset"))
            stack.enter_context(_replace_dunder_methods(BatchSampler))
        loader = DataLoader(numbers, 2) if kind == "positional" else KINDS[kind](2)
    own = _update_dataloader(resized_loaders(loader, [7]), DistributedSampler(numbers, 2, 1, shuffle=False))
    assert batch_size_of_loader(own) == 7
    assert [len(batch) for batch in own] == [7, 4]  # 11 samples of 22
    assert batch_size_of_loader(loader) == 2


RANKS = """
import json, os, sys, warnings
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
import lightning_memplan as mp

warnings.filterwarnings("ignore")

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []
    def training_step(self, batch, batch_idx):
        if isinstance(self.trainer, pl.Trainer):
            self.seen.append(batch.tolist())
        return (batch * self.weight).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
    def on_train_end(self):
        name = f"{self.trainer.strategy._start_method}-{type(self).__name__}-{self.global_rank}.json"
        open(os.path.join(sys.argv[1], name), "w").write(json.dumps(self.seen))

class Own(Net):
    def train_dataloader(self):
        return DataLoader(list(torch.arange(22.0)), batch_size=2, shuffle=True)

if __name__ == "__main__":
    for strategy in sys.argv[2:]:
        passed = (Net(), Own.train_dataloader(None))
        for module, loaders in (passed, (Own(), None)) if strategy == "ddp" else (passed,):
            planner = mp.MemoryPlanner(device=mp.Device("a card", total=2**30), method="formula", max_batch_size=7,
                                       apply=True)
            trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, logger=False,
                                 callbacks=planner, enable_checkpointing=False, enable_progress_bar=False,
                                 enable_model_summary=False)
            trainer.fit(module, loaders)
            assert loaders is None or loaders.batch_size == 2
            if strategy != "ddp":  # spawned or forked: what ranks do is not seen here
                assert planner.plan is None and module.seen == []
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategies",
    [
        pytest.param(("ddp",), id="ddp"),
        pytest.param(("ddp_notebook", "ddp_spawn"), id="in a notebook", marks=pytest.mark.further),
    ],
)
def test_two_ranks_share_the_samples(tmp_path, strategies):
    """Lightning gives each loader a DistributedSampler: what is passed or made with a number keeps the planned size."""
    (tmp_path / "ranks.py").write_text(RANKS)
    path = {**os.environ, "PYTHONPATH": str(Path(mp.__file__).parents[1])}
    arguments = [sys.executable, tmp_path / "ranks.py", tmp_path, *strategies]
    subprocess.run(arguments, check=True, timeout=200, env=path)
    started = {"ddp": "popen", "ddp_notebook": "fork", "ddp_spawn": "spawn"}
    for strategy, name in itertools.product(strategies, ("Net", "Own") if strategies == ("ddp",) else ("Net",)):
        files = (tmp_path / f"{started[strategy]}-{name}-{rank}.json" for rank in range(2))
        one, other = (json.loads(file.read_text()) for file in files)
        assert [len(batch) for batch in one] == [len(batch) for batch in other] == [7, 4]  # of 11 samples each
        assert sorted(sample for batch in one + other for sample in batch) == list(range(22))


def test_validation_loaders_are_left():
    class Validated(Net):
        sizes = ()

        def validation_step(self, batch, batch_idx):
            self.sizes += (len(batch),)

    module = Validated()
    fit(module, {"train_dataloaders": plain(2), "val_dataloaders": plain(3)}, planner_of(), num_sanity_val_steps=0)
    assert set(module.sizes) == {3}


# ----------------------------------------------------------------------------------------------- validation's own size


class Wide(Net):
    """A step of training holds what a step of validation frees at once: four outputs of 4 KiB a sample."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(1024, 1024), nn.Sigmoid()) for _ in range(4)])
        self.validated = []

    def training_step(self, batch, batch_idx):
        return self.layers(batch).sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.validated.append(len(batch))
        assert not self.training
        return self.layers(batch).sum()


class Both(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.batch_size, self.val_size = 2, 3
        self.save_hyperparameters({"val_size": 3})

    def train_dataloader(self):
        return DataLoader(list(torch.ones(3000, 1024)), batch_size=self.batch_size)

    def val_dataloader(self):
        return [DataLoader(list(torch.ones(count, 1024)), batch_size=self.val_size) for count in (3000, 20)]


def test_validation_has_a_batch_size_of_its_own():
    module, data = Wide(), Both()
    card = mp.Device("a small card", total=80 * 2**20)  # 16 MiB of weights, their gradients, a batch
    planner = mp.MemoryPlanner(
        device=card, batch_arg_name={"val": "val_size"}, max_batch_size=2000, margin=0, apply=True
    )
    fit(module, {"datamodule": data}, planner, limit_train_batches=2, limit_val_batches=1, num_sanity_val_steps=0)
    assert planner.plan.limited_by == planner.val_plan.limited_by == "memory"
    # a sample takes 4 KiB a layer in training, twice over in its backward pass, and two of them at once in validation
    assert 2 < planner.plan.batch_size < planner.val_plan.batch_size
    assert (data.batch_size, data.val_size) == (planner.plan.batch_size, planner.val_plan.batch_size)
    assert data.hparams["val_size"] == data.val_size
    assert module.validated == [data.val_size, 20]


def test_validation_that_cannot_be_traced_gets_the_size_of_training():
    class Reads(Wide):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return batch.sum() * int(batch.long().sum().item())

    data, planner = Both(), planner_of(method="trace", batch_arg_name={"val": "val_size"})
    with pytest.warns(
        UserWarning, match="validation gets training's batch size, since it cannot be traced: the step nee"
    ):
        fit(Reads(), {"datamodule": data}, planner, limit_train_batches=1, limit_val_batches=1)
    assert (planner.val_plan, data.val_size) == (None, 7)


def test_validation_that_takes_more_turns_for_more_samples_keeps_its_size(caplog):
    class Slides(Wide):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            for window in batch.split(2):
                self.validated.append(len(window))
                self.layers(window)

    module, data, planner = Slides(), Both(), planner_of(method="trace", batch_arg_name={"val": "val_size"})
    fit(module, {"datamodule": data}, planner, limit_train_batches=1, limit_val_batches=1, num_sanity_val_steps=0)
    assert (planner.val_plan.batch_size, data.val_size) == (3, 3)
    assert module.validated == [2, 1, 2, 1]  # of two loaders
    assert "validation's batch size is 3; peak of both, in training" in caplog.text


def test_validation_without_a_hook_of_its_own_is_left():
    class Bare(Both):
        val_dataloader = pl.LightningDataModule.val_dataloader

    data = Bare()
    with pytest.warns(UserWarning, match="You defined a `validation_step` but have no `val_dataloader`"):
        fit(Wide(), {"datamodule": data}, planner_of(batch_arg_name={"val": "val_size"}), limit_train_batches=1)
    assert data.val_size == 3


class Three(Both):
    """A size for each phase."""

    def __init__(self):
        super().__init__()
        self.test_size = 3

    def test_dataloader(self):
        return DataLoader(list(torch.ones(3000, 1024)), batch_size=self.test_size)


class Evaluated(Wide):
    def test_step(self, batch, batch_idx):
        self.validated.append(len(batch))
        assert not self.training
        assert self.trainer.testing
        return self.layers(batch).sum()


def test_a_test_has_a_batch_size_of_its_own():
    module, data = Evaluated(), Three()
    card = mp.Device("a small card", total=80 * 2**20)
    planner = mp.MemoryPlanner(
        device=card, batch_arg_name={"val": "val_size", "test": "test_size"}, margin=0, apply=True
    )
    trainer = fit(module, {"datamodule": data}, planner, limit_train_batches=1, limit_val_batches=1)
    assert data.test_size == 3
    sizes = data.batch_size, data.val_size
    module.validated.clear()
    trainer.test(module, data, verbose=False)
    # 16 MiB of weights and nothing else: more room than beside gradients, and a sample takes two outputs at once
    assert planner.test_plan.batch_size == max(module.validated) > data.val_size > data.batch_size
    assert planner.test_plan.peak_allocated > 16 * 2**20
    assert (data.batch_size, data.val_size, data.test_size) == (*sizes, 3)
    assert "dataloader" not in vars(trainer.test_loop._data_source)


def test_a_test_alone_on_a_loader_that_was_passed():
    module, loader = Evaluated(), DataLoader(list(torch.ones(30, 1024)), batch_size=3)
    module.test_size = 3
    planner = planner_of(batch_arg_name={"test": "test_size"})
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=planner, enable_progress_bar=False)
    trainer.test(module, loader, verbose=False)
    assert (module.validated, loader.batch_size, planner.plan) == ([7, 7, 7, 7, 2], 3, None)


def test_a_test_that_cannot_be_planned():
    class Reads(Evaluated):
        def test_step(self, batch, batch_idx):
            return batch.sum() * int(batch.long().sum().item())

    def trainer():
        return pl.Trainer(accelerator="cpu", logger=False, callbacks=planner_of(batch_arg_name={"test": "test_size"}))

    data = Three()
    with pytest.raises(mp.TraceError, match="a test of Reads cannot be traced: the step needs the value of a tensor"):
        trainer().test(Reads(), data)
    assert data.test_size == 3
    with pytest.raises(mp.ApplyError, match="Evaluated has no attribute or hyperparameter 'test_size' to set"):
        trainer().test(Evaluated(), plain(3))


def test_a_test_that_cannot_be_planned_leaves_the_plan_of_training():
    class Reads(Evaluated):
        def test_step(self, batch, batch_idx):
            return batch.sum() * int(batch.long().sum().item())

    module, data = Reads(), Three()
    planner = mp.MemoryPlanner(
        device=mp.Device("a small card", total=80 * 2**20), batch_arg_name={"test": "test_size"}, apply=True
    )
    trainer = fit(module, {"datamodule": data}, planner, limit_train_batches=1, limit_val_batches=1)
    plan = planner.plan
    with pytest.warns(
        UserWarning, match=r"the test is not planned: .*\. The test goes on with the user's own batch size"
    ):
        trainer.test(module, data, verbose=False)
    assert (planner.plan, planner.test_plan, data.test_size) == (plan, None, 3)
    assert planner.estimate is not None


def test_a_name_of_validations_size_that_is_none():
    with pytest.raises(mp.ApplyError, match="Wide or Both has no attribute or hyperparameter 'eval_size' to set"):
        fit(Wide(), {"datamodule": Both()}, planner_of(batch_arg_name={"val": "eval_size"}))
    with pytest.raises(
        ValueError, match=r"'batch_size' is training's batch size: leave batch_arg_name\['val'\] out, or name"
    ):
        mp.MemoryPlanner(batch_arg_name={"val": "batch_size"})


VALIDATED = """
import json
import os
import subprocess
import sys
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import lightning_memplan as mp

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        conv = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())
        self.net = nn.Sequential(conv(3, 64), conv(64, 64), nn.MaxPool2d(2), conv(64, 128), nn.Flatten(2))
    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).mean()
    def validation_step(self, batch, batch_idx):
        self.log("value", self.net(batch[0]).mean())
    test_step = validation_step
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

class Data(pl.LightningDataModule):
    batch_size, val_size, test_size = 2, 3, 3
    def test_dataloader(self):
        return DataLoader(TensorDataset(torch.zeros(1, 3, 64, 64).expand(9999, -1, -1, -1)), self.test_size)
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.zeros(1, 3, 64, 64).expand(9999, -1, -1, -1)), self.batch_size)
    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.zeros(1, 3, 64, 64).expand(9999, -1, -1, -1)), self.val_size)

planner, data = mp.MemoryPlanner(batch_arg_name={"val": "val_size", "test": "test_size"}), Data()
trainer = pl.Trainer(accelerator="gpu", devices=1, limit_train_batches=2, limit_val_batches=2, num_sanity_val_steps=1,
                     max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                     enable_model_summary=False, callbacks=planner)
trainer.fit(Net(), data)
trainer.validate(Net(), data, verbose=False)  # alone: no part of what was planned
torch.cuda.empty_cache()
torch.cuda.reset_peak_memory_stats()
trainer.limit_test_batches = 2
trainer.test(Net(), data, verbose=False)
tested = [planner.test_plan.peak_allocated, planner.test_plan.peak_reserved,
          torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
measured = [[m.predicted_allocated, m.allocated, m.reserved] for m in planner.measurements]
peaks = [[v.allocated, v.reserved] for v in planner.validations]
sizes = [data.batch_size, data.val_size, planner.test_plan.batch_size]
print(json.dumps([*sizes, planner.val_plan.peak_reserved, measured, peaks, tested]))
"""


@pytest.mark.slow
def test_training_and_validation_of_planned_sizes_fit_the_card(nullgpu):
    """With torch's own allocator: a validation that fits alone may leave a cache in which training does not."""
    source = str(Path(mp.__file__).parents[1])
    done = nullgpu([sys.executable, "-W", "ignore", "-c", VALIDATED], PYTHONPATH=source, NULLGPU_MEMORY=3 * 2**30)
    train, val, test, predicted, measured, peaks, tested = json.loads(done.stdout.splitlines()[-1])
    assert (len(measured), len(peaks)) == (4, 2)
    assert train > 100
    assert val > 100
    for planned, allocated, _ in measured:
        assert planned == pytest.approx(allocated, rel=0.03)
    assert max(reserved for *_, reserved in (*measured, *peaks)) == pytest.approx(predicted, rel=0.06)
    assert test > val
    assert tested[:2] == pytest.approx(tested[2:], rel=0.03)


# ----------------------------------------------------------------------------------------------- an epoch's batches


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # 21 samples are 3 batches of 7; 7 · 3 // 4 = 5, of which there are 5
        (
            {"val_check_interval": 4},
            r"^val_check_interval=4 counts batches, and an epoch has 3 of the planned batch size 7: .*_size=5$",
        ),
        (
            {"limit_train_batches": 0.3},
            r"^limit_train_batches=0\.3 is .* an epoch has 3 of the planned batch size 7, which is not one: give",
        ),
    ],
)
def test_settings_that_ask_for_more_batches_than_an_epoch_has(settings, message):
    module, arguments = attribute_of_the_datamodule(KINDS["plain"])
    with pytest.raises(mp.ApplyError, match=message):
        fit(module, arguments, planner_of(min_batch_size=7), **settings)
    assert arguments["datamodule"].batch_size == 2
    module, arguments = attribute_of_the_datamodule(KINDS["plain"])
    planner = planner_of()
    fit(module, arguments, planner, **settings)
    assert planner.plan.batch_size == 6  # 21 samples are 4 batches of 6, of which 0.3 are one


@pytest.mark.parametrize(
    "settings",
    [
        {"val_check_interval": 3},
        {"val_check_interval": 4, "check_val_every_n_epoch": None},
        {"val_check_interval": 4, "limit_val_batches": 0},
        {"val_check_interval": 4, "max_batch_size": 5},
        {"limit_train_batches": 0.4},
        {"limit_train_batches": 2},
    ],
    ids=str,
)
def test_settings_that_ask_for_as_many_batches_as_there_are(settings):
    module, arguments = passed(KINDS["plain"])
    planner = planner_of(max_batch_size=settings.pop("max_batch_size", 7))
    assert fit(module, arguments, planner, **settings).global_step > 0


def test_dropping_the_last_leaves_a_batch():
    """No batch size is above the dataset's length, where an epoch would have no batch and nothing would be trained."""
    module, arguments = passed(KINDS["dropping the last"])
    planner = planner_of(max_batch_size=None)
    fit(module, arguments, planner)
    assert (planner.plan.batch_size, planner.plan.limited_by, len(module.seen)) == (21, "dataset", 1)


# -------------------------------------------------------------------------------------------------- what cannot be set


class Batches(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.ones(4)


class Iterated:
    def __iter__(self):
        return iter([torch.ones(4)])


class Keeps(DataLoader):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ahead = iter([])


class Counts(DataLoader):
    def __init__(self, dataset, size):
        super().__init__(dataset, batch_size=size)
        self.size = size

    def __len__(self):
        return len(self.dataset) // self.size


class Fixed(Sampler):
    batch_size = 4

    def __iter__(self):
        return iter([[0, 1, 2, 3]])


CANNOT = {
    "a list of batches": ([torch.ones(4)], "of a Tensor cannot be set, since it is no torch.utils.data.DataLoader: "),
    "an iterable": (Iterated(), "of a Iterated cannot be set, since it is no torch.utils.data.DataLoader: "),
    "no batch size": (
        DataLoader(Batches(), batch_size=None),
        r"with batch_size=None cannot be set, since its dataset makes the batches \(Batches\): make it in train_datal",
    ),
    "an iterator": (
        Keeps(numbers, batch_size=4),
        r"keeps an iterator over batches that are made already \(self\.ahead",
    ),
    "a second record": (
        Counts(numbers, 4),
        r"__len__ of its own and keeps 4 as self\.size beside batch_size: use self",
    ),
    "a list of indices": (
        DataLoader(numbers, batch_sampler=[[0, 1], [2]]),
        r"since its batch sampler list does not follow its attribute batch_size \(AttributeError: .*\): read self",
    ),
    "a fixed sampler": (
        DataLoader(numbers, batch_sampler=Fixed()),
        r"Fixed does not follow its attribute batch_size \(set to 1, it makes a batch of 4\): read self\.batch_size in",
    ),
}


@pytest.mark.parametrize("kind", CANNOT)
def test_what_to_change_where_it_cannot_be_set(kind):
    source, message = CANNOT[kind]
    with pytest.raises(mp.ApplyError, match=f"^the batch size .*{message}.*(or pass apply=False|$)"):
        check_resizable({"a": source})


def test_nothing_is_run_where_it_cannot_be_set():
    module, arguments = number_in_the_module(lambda size: DataLoader(Batches(), batch_size=None))
    with pytest.raises(mp.ApplyError, match="with batch_size=None cannot be set"):
        fit(module, arguments, planner_of())
    assert module.seen == []


def test_a_batch_sampler_is_not_advanced_to_check_it():
    class Remembers(BatchSampler):
        begun = 0

        def __iter__(self):
            self.begun += 1
            return super().__iter__()

    generator = torch.Generator().manual_seed(1)
    batches = Remembers(RandomSampler(numbers, generator=generator), 4, False)
    state = generator.get_state()
    check_resizable(DataLoader(numbers, batch_sampler=batches))
    assert batches.begun == 0
    assert torch.equal(generator.get_state(), state)


def test_random_states_stay_while_a_batch_sampler_is_tried():
    class Draws(BatchSampler):
        def __iter__(self):
            drawn.append(random.random() + np.random.rand() + float(torch.rand(1)))
            return super().__iter__()

    drawn: list[float] = []
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    check_resizable(DataLoader(numbers, batch_sampler=Draws(SequentialSampler(numbers), 4, False)))
    assert len(drawn) == 1
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_samples_of_a_tensor_dataset_are_counted_by_the_sampler():
    short = RandomSampler(numbers, num_samples=9)
    assert dataset_size(DataLoader(TensorDataset(torch.ones(21)), batch_sampler=BatchSampler(short, 2, False))) == 9
