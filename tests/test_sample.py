"""Batches of 2, 3 and 5 samples out of whatever a user has, and nothing of it used up."""

from __future__ import annotations

import dataclasses
import multiprocessing
import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_memplan._loaders import borrowed, dataset_size
from lightning_memplan._sample import SIZES, batch_size_of, read_samples, resized


def sample_batches(source, **how):
    return read_samples(source, **how).batches()


def shapes(source):
    return [tuple(batch.shape) for _, batch in sample_batches(source)]


THREE_SIZES = [(2, 4), (3, 4), (5, 4)]
rows = torch.arange(40.0).reshape(10, 4)


class Stream(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(rows[: self.count])


class Batches(Dataset):
    """Makes batches itself: ``batch_size=None``."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.ones(6, 4) * index


class StreamOfBatches(IterableDataset):
    def __iter__(self):
        return iter([torch.ones(6, 4)] * 3)


SOURCES = {
    "a list": DataLoader(list(rows), batch_size=4),
    "shuffled": DataLoader(list(rows), batch_size=4, shuffle=True),
    "a weighted sampler": DataLoader(list(rows), batch_size=4, sampler=WeightedRandomSampler([1.0] * 10, 10)),
    "a batch sampler": DataLoader(list(rows), batch_sampler=BatchSampler(RandomSampler(rows), 4, drop_last=True)),
    "fewer than five samples": DataLoader(list(rows[:3]), batch_size=4),
    "one sample": DataLoader(list(rows[:1]), batch_size=4),
    "batches that the dataset makes": DataLoader(Batches(), batch_size=None),
    "a stream": DataLoader(Stream(10), batch_size=4),
    "a short stream": DataLoader(Stream(2), batch_size=4),
    "a stream of batches": DataLoader(StreamOfBatches(), batch_size=None),
    "workers": DataLoader(list(rows), batch_size=4, num_workers=2, persistent_workers=True),
    "a subset": DataLoader(Subset(list(rows), [7, 8, 9]), batch_size=2),
    "a list of batches": [torch.ones(4, 4)] * 2,
    "a batch": torch.ones(4, 4),
    "a batch of one": torch.ones(1, 4),
}


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "a list of batches"])
def test_every_source_gives_the_three_sizes(name):
    assert shapes(SOURCES[name]) == THREE_SIZES
    assert [size for size, _ in sample_batches(SOURCES[name])] == list(SIZES)


def test_what_is_iterated_is_asked_for_its_first_batch():
    class Loader:
        def __iter__(self):
            return iter(SOURCES["a list of batches"])

    assert shapes(Loader()) == THREE_SIZES


def test_samples_come_from_the_dataset_in_order():
    (_, two), _, (_, five) = sample_batches(SOURCES["shuffled"])
    assert torch.equal(two, rows[:2])
    assert torch.equal(five, rows[:5])


def test_few_samples_are_repeated():
    assert torch.equal(sample_batches(SOURCES["fewer than five samples"])[2][1], rows[[0, 1, 2, 0, 1]])


def test_the_users_collate_is_used():
    loader = DataLoader(list(rows), batch_size=4, collate_fn=lambda got: {"x": torch.stack(got), "n": len(got)})
    for size, batch in sample_batches(loader):
        assert (batch["x"].shape, batch["n"]) == ((size, 4), size)


Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    name: str


@pytest.mark.parametrize(
    ("batch", "read"),
    [
        ((torch.ones(4, 4), torch.ones(4)), lambda b: (b[0], b[1])),
        ([torch.ones(4, 4), torch.ones(4)], lambda b: (b[0], b[1])),
        ({"x": torch.ones(4, 4), "y": torch.ones(4)}, lambda b: (b["x"], b["y"])),
        (Pair(torch.ones(4, 4), torch.ones(4)), lambda b: (b.x, b.y)),
        (({"x": torch.ones(4, 4)}, [torch.ones(4)]), lambda b: (b[0]["x"], b[1][0])),
    ],
    ids=["tuple", "list", "dict", "named tuple", "nested"],
)
def test_batches_are_cut_and_repeated_in_any_shape(batch, read):
    for size, made in sample_batches(batch):
        assert type(made) is type(batch)
        x, y = read(made)
        assert (x.shape, y.shape) == ((size, 4), (size,))


def test_a_dataclass_is_a_batch():
    for size, made in sample_batches(Record(torch.ones(4, 4), "a")):
        assert (made.x.shape, made.name) == ((size, 4), "a")


def test_what_is_not_of_the_batch_stays():
    batch = {"x": torch.ones(4, 4), "weights": torch.ones(7), "scale": torch.tensor(2.0), "name": "a"}
    made = resized(batch, 4, 2)
    assert (made["x"].shape, made["weights"].shape, made["scale"].shape, made["name"]) == ((2, 4), (7,), (), "a")


def test_a_cut_batch_owns_its_memory():
    whole = torch.ones(4, 4)
    assert resized(whole, 4, 2).untyped_storage().nbytes() == 2 * 4 * 4


@pytest.mark.parametrize("batch", [{"x": 1}, "text", torch.tensor(1.0)])
def test_no_tensor_has_a_batch(batch):
    with pytest.raises(
        ValueError, match="a batch is made of tensors whose first dimension is the batch; there is none in"
    ):
        batch_size_of(batch)


# ------------------------------------------------------------------------------------------------- more than one loader


def test_a_dict_of_loaders():
    both = {"a": SOURCES["a list"], "b": SOURCES["a stream"]}
    for size, batch in sample_batches(both):
        assert {k: tuple(v.shape) for k, v in batch.items()} == {"a": (size, 4), "b": (size, 4)}


def test_a_list_of_loaders():
    for size, batch in sample_batches([SOURCES["a list"], SOURCES["shuffled"]]):
        assert [tuple(part.shape) for part in batch] == [(size, 4), (size, 4)]


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
def test_a_combined_loader(mode):
    for size, batch in sample_batches(CombinedLoader({"a": SOURCES["a list"], "b": SOURCES["shuffled"]}, mode)):
        assert {k: tuple(v.shape) for k, v in batch.items()} == {"a": (size, 4), "b": (size, 4)}


def test_a_combined_loader_that_gives_one_after_the_other():
    assert shapes(CombinedLoader([SOURCES["a list"], SOURCES["shuffled"]], "sequential")) == THREE_SIZES


# ------------------------------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    ("source", "length"),
    [
        (SOURCES["a list"], 10),
        (SOURCES["a subset"], 3),
        (DataLoader(list(rows), batch_size=4, sampler=RandomSampler(rows, num_samples=6)), 6),
        (SOURCES["a stream"], None),
        (SOURCES["a batch"], None),
        ({"a": SOURCES["a list"], "b": SOURCES["a subset"]}, 3),
        ({"a": SOURCES["a list"], "b": SOURCES["a stream"]}, 10),
    ],
    ids=str,
)
def test_how_many_samples_there_are(source, length):
    assert dataset_size(source) == length


@pytest.mark.parametrize("dataset", [TensorDataset(torch.ones(0, 4)), Stream(0)])
@pytest.mark.parametrize("batch_size", [4])
def test_an_empty_dataset(dataset, batch_size):
    with pytest.raises(ValueError, match="the dataset has length 0: there is nothing to plan a batch size for"):
        sample_batches(DataLoader(dataset, batch_size=batch_size))


def test_a_loader_without_a_batch():
    class Empty:
        def __iter__(self):
            return iter([])

    with pytest.raises(ValueError, match="the loader yields no batch"):
        sample_batches(Empty())


def test_an_iterator_is_not_used_up():
    iterator = iter([torch.ones(4, 4)] * 2)
    with pytest.raises(
        ValueError, match=r"a list_iterator can be read only once, and the batch that a plan reads would"
    ):
        sample_batches(iterator)
    assert len(list(iterator)) == 2


# -------------------------------------------------------------------------------------------------- nothing is used up


class Remembers(Dataset):
    """Counts, caches, opens and draws."""

    def __init__(self):
        self.served, self.file, self.cache, self.order = 0, None, {}, []
        self.own, self.drawn = random.Random(1), np.random.default_rng(1)
        self.generator = torch.Generator().manual_seed(1)
        self.samples = rows

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.served += 1
        self.file = self.file or object()  # as an HDF5 file is opened in the process that reads it
        self.cache[index] = self.own.random() + self.drawn.random()
        self.order.append(index)
        return self.samples[index] + torch.rand(4, generator=self.generator) + random.random() + np.random.rand()

    def state(self):
        kept = (self.served, self.file, dict(self.cache), list(self.order), self.own.getstate())
        return (*kept, self.drawn.bit_generator.state, self.generator.get_state().tolist())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: d,
        lambda d: Subset(d, range(8)),
        lambda d: ConcatDataset([d, d]),
        lambda d: Subset(Subset(d, range(8)), range(7)),
    ],
    ids=["itself", "a subset", "twice", "a subset of a subset"],
)
def test_a_dataset_stays_as_it_was(wrap):
    dataset = Remembers()
    before, everywhere = dataset.state(), (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist())
    assert shapes(DataLoader(wrap(dataset), batch_size=2, shuffle=True)) == THREE_SIZES
    assert dataset.state() == before
    assert random.getstate() == everywhere[0]
    assert torch.equal(torch.get_rng_state(), everywhere[1])
    assert np.random.get_state()[1].tolist() == everywhere[2]


def test_a_stream_that_is_its_own_iterator_is_not_advanced():
    class Own(IterableDataset):
        at = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.at += 1
            return rows[self.at % 10]

    stream = Own()
    assert shapes(DataLoader(stream, batch_size=2)) == THREE_SIZES
    assert stream.at == 0


def test_samples_are_shared_not_copied():
    dataset = Remembers()
    assert borrowed(dataset).samples is rows


def test_what_cannot_be_copied_is_read_itself():
    class Locked(Dataset):
        def __copy__(self):
            raise TypeError("cannot be copied")

    locked = Locked()
    assert borrowed(locked) is locked


def test_a_sampler_is_not_advanced():
    class Counted(RandomSampler):
        begun = 0

        def __iter__(self):
            self.begun += 1
            return super().__iter__()

    sampler = Counted(rows)
    sample_batches(DataLoader(list(rows), batch_size=2, sampler=sampler))
    assert sampler.begun == 0


def test_no_worker_is_started():
    loader = SOURCES["workers"]
    sample_batches(loader)
    assert multiprocessing.active_children() == []
    assert loader._iterator is None
