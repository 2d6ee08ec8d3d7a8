"""Batches of 2, 3 and 5 samples out of whatever a user has, and nothing of it used up."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import random
from collections import namedtuple
from typing import ClassVar

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

import lightning_memplan as mp
from lightning_memplan.data.batches import batch_size_of, resized
from lightning_memplan.data.borrowed import borrowed
from lightning_memplan.data.loaders import dataset_size
from lightning_memplan.data.samples import SIZES, read_samples
from lightning_memplan.data.tiling import TiledBatch
from lightning_memplan.planning.job import Sampling


def sample_batches(source, **how):
    return read_samples(source, **how).batches()


def shapes(source, **how):
    return [tuple(batch.shape) for _, batch in sample_batches(source, **how)]


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


def test_a_dict_of_loaders_gives_dicts_of_batches():
    both = {"a": SOURCES["a list"], "b": SOURCES["a stream"]}
    for size, batch in sample_batches(both):
        assert {k: tuple(v.shape) for k, v in batch.items()} == {"a": (size, 4), "b": (size, 4)}


def test_a_list_of_loaders_gives_lists_of_batches():
    for size, batch in sample_batches([SOURCES["a list"], SOURCES["shuffled"]]):
        assert [tuple(part.shape) for part in batch] == [(size, 4), (size, 4)]


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
def test_a_combined_loader_gives_batches_of_all_its_loaders(mode):
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
    ids=["a list", "a subset", "a sampler", "a stream", "a batch", "the shorter", "the one that has a length"],
)
def test_how_many_samples_there_are(source, length):
    assert dataset_size(source) == length


@pytest.mark.parametrize("dataset", [TensorDataset(torch.ones(0, 4)), Stream(0)])
@pytest.mark.parametrize("batch_size", [4])
def test_an_empty_dataset_is_rejected(dataset, batch_size):
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


def test_parts_that_are_shared_stay_shared_in_the_copy():
    class Draws(Dataset):
        def __init__(self, generator):
            self.generator, self.own = generator, random.Random(1)

    class Both(Dataset):
        def __init__(self, *parts):
            self.first, self.second = parts

    generator = torch.Generator().manual_seed(1)
    both = Both(Draws(generator), Draws(generator))
    copied = borrowed(both)
    assert copied.first is not copied.second
    assert copied.first.generator is copied.second.generator is not generator  # draws in turn, as the user's do
    assert copied.first.own is not copied.second.own
    twice = borrowed(ConcatDataset([SizedDraws(), SizedDraws()]))
    assert twice.datasets[0] is not twice.datasets[1]
    one = SizedDraws()
    twice = borrowed(ConcatDataset([one, one]))
    assert twice.datasets[0] is twice.datasets[1] is not one


class SizedDraws(Dataset):
    def __len__(self):
        return 2


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


# ------------------------------------------------------------------------------------------------- samples of all sizes


def texts(*lengths):
    return [torch.ones(length, dtype=torch.long) for length in lengths]


def padded(samples):
    return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)


def test_samples_that_differ_in_size_are_planned_for_by_the_largest_of_the_first():
    samples = read_samples(DataLoader(texts(4, 7, 2, 9, 3, 50), collate_fn=padded))
    assert [(size, tuple(batch.shape)) for size, batch in samples.batches()] == [(2, (2, 9)), (3, (3, 9)), (5, (5, 9))]
    # int64: 2 and 9 tokens of 8 bytes
    (note,) = samples.notes
    assert note.startswith(
        "samples differ in size (16 B to 72 B): planned for batches of the largest of the first 5 (samp"
    )


def test_the_largest_sample_is_sought_at_even_distances():
    loader = DataLoader(texts(*range(1, 101)), collate_fn=padded)
    # 99 / 7 = 14.1 apart: those at 0, 14, ..., 84 and the last have 1, 15, ..., 85 and 100 tokens
    samples = read_samples(loader, "largest", 8)
    assert [tuple(batch.shape) for _, batch in samples.batches()] == [(2, 100), (3, 100), (5, 100)]
    assert samples.notes == (
        "samples differ in size (8 B to 800 B): planned for batches of the largest of the 8 that were looked at",
    )


def test_as_many_samples_are_read_as_is_said():
    class Counted(Dataset):
        read: ClassVar = []  # a copy is read

        def __len__(self):
            return 1000

        def __getitem__(self, index):
            self.read.append(index)
            return torch.ones(index + 1)

    loader = DataLoader(Counted(), collate_fn=padded)
    for how, indices in (({}, [0, 1, 2, 3, 4]), ({"sample": "largest", "sample_size": 4}, [0, 333, 666, 999])):
        Counted.read.clear()
        read_samples(loader, **how).batches()
        assert Counted.read == indices


class Texts(Dataset):
    """Texts of other lengths; reading one takes ``seconds`` on a clock of their own."""

    read: ClassVar = []  # a copy is read
    now = 0.0

    def __init__(self, lengths, seconds=0.0):
        self.lengths, self.seconds = list(lengths), seconds
        self.read.clear()

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        self.read.append(index)
        Texts.now += self.seconds
        return torch.zeros(self.lengths[index])


LENGTHS = {
    "rising": [10] * 50 + [40] * 50,
    "falling": [40] * 50 + [10] * 50,
    "one long text in the middle": [10] * 45 + [40] * 10 + [10] * 45,
    "the last": [10] * 99 + [40],
    "in turn": [10, 40] * 50,
}


@pytest.mark.parametrize("order", LENGTHS)
def test_samples_that_differ_anywhere_are_planned_for_by_the_largest(order):
    samples = read_samples(DataLoader(Texts(LENGTHS[order]), batch_size=4, collate_fn=padded), "auto")
    assert samples.make(3).shape == (3, 40)
    if order != "falling":  # of which the first five are the longest
        (note,) = samples.notes
        assert note.startswith("samples differ in size (40 B to 160 B): planned for batches of the largest of the 64")


def test_samples_that_differ_little_are_planned_for_by_the_largest_without_a_word():
    # 100 and 105 numbers are 5 % apart
    samples = read_samples(DataLoader(Texts([100] * 50 + [105] * 50), batch_size=4, collate_fn=padded), "auto")
    assert (samples.make(2).shape, samples.notes) == ((2, 105), ())
    samples = read_samples(DataLoader(Texts([100] * 50 + [106] * 50), batch_size=4, collate_fn=padded), "auto")
    assert len(samples.notes) == 1


@pytest.mark.parametrize(
    ("lengths", "seconds", "read"),
    [
        ([10] * 200, 0.0, 64),
        ([10] * 200, 0.1, 20),  # two seconds are twenty samples of a tenth
        ([10] * 200, 0.5, 0),  # five have taken more than that
        ([10, 40] * 100, 0.1, 64),  # ten seconds are a hundred
        ([10, 40] * 100, 0.5, 20),
        ([10, 40] * 100, 5.0, 10),  # ten at least
        ([10] * 5, 0.0, 0),
    ],
)
def test_the_time_for_looking_at_samples_is_bounded(monkeypatch, lengths, seconds, read):
    dataset = Texts(lengths, seconds)
    monkeypatch.setattr("time.perf_counter", lambda: Texts.now)
    read_samples(DataLoader(dataset, batch_size=2, collate_fn=padded), "auto")
    first, more = dataset.read[:5], dataset.read[5:]
    assert first == [0, 1, 2, 3, 4]
    assert len(more) == read
    assert not more or (more[0], more[-1]) == (0, len(lengths) - 1)


def test_the_largest_of_a_stream_and_of_batches():
    class Longer(IterableDataset):
        def __iter__(self):
            return (torch.ones(2, length) for length in itertools.count(1))

    assert shapes(DataLoader(Longer(), batch_size=None)) == [(2, 1), (3, 1), (5, 1)]
    assert shapes(DataLoader(Longer(), batch_size=None), sample="largest", sample_size=9) == [(2, 9), (3, 9), (5, 9)]
    first = {tuple(batch.shape[1:]) for _, batch in sample_batches(DataLoader(Longer(), collate_fn=lambda b: b[0]))}
    assert first == {(5,)}


def test_samples_of_one_size_are_as_they_are():
    rows_and_names = [(row, "a" * k) for k, row in enumerate(rows)]  # names differ, and take no memory of a card
    samples = read_samples(DataLoader(rows_and_names, batch_size=4), "largest", 3)
    assert samples.notes == ()
    assert torch.equal(samples.batches((3,))[0][1][0], rows[[0, 4, 9]])


def test_texts_are_measured_when_they_are_collated():
    def tokenized(texts):
        return {"ids": padded([torch.tensor([ord(letter) for letter in text]) for text in texts])}

    samples = read_samples(DataLoader(["ab", "abcde", "c"], collate_fn=tokenized))
    assert [tuple(batch["ids"].shape) for _, batch in samples.batches()] == [(2, 5), (3, 5), (5, 5)]


def test_images_and_boxes():
    """As of detection: images of a size each, and as many boxes as there are things."""
    scenes = [(torch.ones(3, 8, 8 + k), {"boxes": torch.ones(k, 4)}) for k in range(5)]
    for size, (images, targets) in sample_batches(
        DataLoader(scenes, collate_fn=lambda rows: tuple(zip(*rows, strict=True)))
    ):
        assert {tuple(image.shape) for image in images} == {(3, 8, 12)}
        assert [len(target["boxes"]) for target in targets] == [4] * size


class Graph:
    """As torch_geometric.data.Data: tensors behind an object that can be moved, batched by a collate_fn of its own."""

    def __init__(self, nodes, edges):
        self._store = {"x": nodes, "edge_index": edges}

    def to(self, device):
        return Graph(*(tensor.to(device) for tensor in self._store.values()))


def joined(graphs):
    nodes = torch.cat([graph._store["x"] for graph in graphs])
    return Graph(nodes, torch.cat([graph._store["edge_index"] for graph in graphs], 1))


def test_graphs_are_batched_by_their_loader_alone():
    graphs = [Graph(torch.ones(k, 4), torch.ones(2, 3 * k, dtype=torch.long)) for k in (3, 6, 2)]
    samples = read_samples(DataLoader(graphs, collate_fn=joined))
    assert [tuple(batch._store["x"].shape) for _, batch in samples.batches()] == [(12, 4), (18, 4), (30, 4)]
    # 2 and 6 nodes of 4 floats, and 6 and 18 edges of two int64: 32 + 96 and 96 + 288 bytes
    assert samples.notes[0].startswith("samples differ in size (128 B to 384 B): ")
    with pytest.raises(
        ValueError, match="a Graph cannot be cut into batches of other sizes: pass the DataLoader that m"
    ):
        sample_batches(joined(graphs))


def test_a_collate_that_takes_samples_apart():
    samples = [{"x": torch.ones(4), "y": torch.ones(length)} for length in (1, 1, 2)]

    def popped(rows):
        return padded([row.pop("y") for row in rows]), torch.stack([row.pop("x") for row in rows])

    assert [tuple(y.shape) for _, (y, x) in sample_batches(DataLoader(samples, collate_fn=popped))] == [
        (2, 2),
        (3, 2),
        (5, 2),
    ]
    assert all(list(sample) == ["x", "y"] for sample in samples)


def test_a_collate_that_draws_draws_the_same():
    def cropped(samples):
        return torch.stack(samples)[:, : torch.randint(1, 5, ())]

    widths = {batch.shape[1] for _, batch in sample_batches(DataLoader(list(rows), collate_fn=cropped))}
    assert len(widths) == 1


def test_a_dataset_of_keys_is_read_as_its_sampler_does():
    class Keyed(Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, key):
            return {"ab": torch.ones(4), "cd": torch.zeros(4)}[key]

    keyed = DataLoader(Keyed(), sampler=["cd", "ab"] * 5, batch_size=2)
    assert torch.equal(sample_batches(keyed)[0][1], torch.stack([torch.zeros(4), torch.ones(4)]))


def test_a_loader_of_batches_that_are_made_keeps_its_ratio_to_another():
    made, other = DataLoader([torch.ones(3, 2)] * 4, batch_size=None), DataLoader(torch.ones(24, 2), batch_size=6)
    samples = read_samples({"a": made, "b": other})
    assert (samples.own, samples.multiple) == (6, 2)  # one of the first for two of the second
    assert [(len(batch["a"]), len(batch["b"])) for _, batch in samples.batches()] == [(2, 4), (3, 6), (5, 10)]
    assert not samples.rows_are_samples


def test_loaders_of_two_sizes_keep_their_ratio():
    few, many = DataLoader(list(rows), batch_size=4), DataLoader(list(rows), batch_size=6)
    # 1.5 for each: batches of 2 and 3, twice those of 2, 3 and 5
    assert [(size, *map(len, batch)) for size, batch in sample_batches([few, many])] == [
        (4, 4, 6),
        (6, 6, 9),
        (10, 10, 15),
    ]


def test_unknown_ways_to_sample_are_rejected():
    message = r"^samples is 'auto' or 'first' or 'largest', not 'all'$"
    with pytest.raises(ValueError, match=message):
        mp.MemoryPlanner(samples="all")
    with pytest.raises(ValueError, match=message):
        mp.estimate(torch.nn.Linear(4, 4), rows, samples="all")


@pytest.mark.parametrize("count", [0, 2.0, True])
def test_a_number_of_samples_that_is_none_is_rejected(count):
    with pytest.raises(
        ValueError, match=r"^sample_size is the number of samples to look at, an int of at least 1, not "
    ):
        Sampling("largest", count)


def test_a_network_of_graphs_is_traced():
    class Passes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, graph):
            x, (source, target) = graph._store["x"], graph._store["edge_index"]
            return torch.zeros_like(x).index_add(0, target, self.layer(x)[source]).relu()

    graphs = [Graph(torch.ones(k, 4), torch.zeros(2, 3 * k, dtype=torch.long)) for k in (3, 64)]
    estimate = mp.estimate(Passes(), DataLoader(graphs, collate_fn=joined))
    assert estimate.method == "trace"
    assert "samples differ in size" in estimate.notes[0]
    # a graph of 64 nodes of 4 floats and 192 edges of two int64: 1 KiB and 3 KiB, of which 512 are none too many
    assert estimate.breakdown(512)["batch"] == 512 * 4 * 1024


# ------------------------------------------------------------------------------------------------------- a large batch


def test_a_large_batch_of_plain_tensors_is_made_on_the_card():
    samples = read_samples(DataLoader([(row, torch.tensor(1)) for row in rows], batch_size=4))
    large = samples.large(23)
    assert isinstance(large, TiledBatch)
    assert (large.samples, large.size, large.few[0].shape) == (5, 23, (5, 4))
    for made, whole in zip(large.on(torch.device("cpu"), large.few), large.whole(), strict=True):
        assert torch.equal(made, whole)
    assert [type(batch) for _, batch in samples.for_the_card((3, 23))] == [list, TiledBatch]


@pytest.mark.parametrize(
    "collate",
    [
        lambda items: (torch.stack(items, 1),),  # the batch in the second dimension
        lambda items: (torch.cat(items),),  # graphs: several rows a sample
        lambda items: (torch.stack(items), torch.eye(len(items))),
        lambda items: (torch.stack(items), f"{len(items)} rows"),
        lambda items: (torch.stack(items).expand(len(items), 4).t().contiguous().t(),),
    ],
)
def test_another_large_batch_is_made_as_the_user_makes_it(collate):
    large = read_samples(DataLoader(list(rows), batch_size=4, collate_fn=collate)).large(23)
    assert not isinstance(large, TiledBatch)


SCALES = (16, 32, 48, 64)


def of_any_scale(samples):
    side = random.choice(SCALES)
    return torch.nn.functional.interpolate(torch.stack(samples), size=(side, side))


def with_any_noise(samples):
    return torch.stack(samples) + torch.rand(1) + np.random.random()


def test_a_collate_that_draws_a_scale_is_planned_for_by_the_largest():
    before = random.getstate()
    loader = DataLoader([torch.zeros(3, 8, 8)] * 20, batch_size=4, collate_fn=of_any_scale)
    samples = read_samples(loader, "auto")
    assert [tuple(batch.shape) for _, batch in samples.batches()] == [(n, 3, 64, 64) for n in (2, 3, 5)]
    # two images of 3 x 16 x 16 and 3 x 64 x 64 numbers of 4 bytes
    (note,) = samples.notes
    assert note == (
        "batches of the same samples differ in size (6.00 KiB to 96.00 KiB), as the loader draws it: planned for the "
        "largest of 16"
    )
    assert random.getstate() == before


def test_a_collate_that_draws_no_sizes_is_as_it_is():
    loader = DataLoader([torch.zeros(3)] * 20, batch_size=4, collate_fn=with_any_noise)
    assert read_samples(loader, "auto").notes == ()
