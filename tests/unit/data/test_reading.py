"""Samples are read as training gets them: in the sampler's order, in workers, in bulk, through the own iterator."""

from __future__ import annotations

import collections
import contextlib
import itertools
import multiprocessing
import queue
import threading
from typing import Any, ClassVar

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from lightning_memplan.data import reading
from lightning_memplan.data.loaders import (
    batch_size_of_loader,
    batches_of_epoch,
    check_resizable,
    dataset_size,
    last_batch,
    resized_loaders,
    yielded_size,
)
from lightning_memplan.data.samples import MOST, SIZES, read_samples
from lightning_memplan.data.streams import most_of_a_stream
from lightning_memplan.errors import ApplyError, TraceError

rows = torch.arange(160.0).reshape(40, 4)


class Rows(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return rows[index]


def made(loader, size=7, **how):
    return read_samples(loader, **how).batch(size)


# ----------------------------------------------------------------------------------------------- the loader's iterator


class Finishes(DataLoader):
    def __iter__(self):
        return ({"x": batch, "rows": len(batch)} for batch in super().__iter__())


class FinishesInside(DataLoader):
    def _get_iterator(self):
        return ({"x": batch, "rows": len(batch)} for batch in super()._get_iterator())


class CollatesItself(DataLoader):
    def __iter__(self):
        for indices in self.batch_sampler:
            yield {"x": torch.stack([self.dataset[index] for index in indices]), "rows": len(indices)}


class Prefetches(DataLoader):
    def __iter__(self):
        ahead = super().__iter__()
        batch = next(ahead)
        for after in ahead:
            yield {"x": batch, "rows": len(batch)}
            batch = after
        yield {"x": batch, "rows": len(batch)}


@pytest.mark.parametrize("kind", [Finishes, FinishesInside, CollatesItself, Prefetches])
@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"num_workers": 1, "persistent_workers": True}], ids=str)
def test_a_loader_of_an_iterator_of_its_own_makes_the_batch(kind, options):
    loader = kind(Rows(), batch_size=4, **options)
    for size, batch in read_samples(loader).batches((2, 3, 5, 40)):
        assert (batch["x"].shape, batch["rows"]) == ((size, 4), size)
    assert loader._iterator is None
    assert multiprocessing.active_children() == []


def test_an_iterator_that_yields_no_batch_on_a_copy_leaves_it_to_collate_fn():
    class Refuses(DataLoader):
        def __iter__(self):
            if type(self.batch_sampler) is not BatchSampler:
                raise RuntimeError("not mine")
            return super().__iter__()

    assert made(Refuses(Rows(), batch_size=4)).shape == (7, 4)


class ReadsInAThread(DataLoader):
    """As ``prefetch_generator``: an error ends its thread, and ``next`` waits for ever."""

    def __iter__(self):
        ahead = queue.Queue(2)

        def read():
            with contextlib.suppress(ValueError):
                for batch in super(ReadsInAThread, self).__iter__():
                    ahead.put({"x": batch, "rows": len(batch)})
                ahead.put(None)

        threading.Thread(target=read, daemon=True).start()
        return iter(ahead.get, None)


def test_a_thread_that_a_refused_number_ends_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(reading, "_SHORTLY", 0.05)
    samples = read_samples(ReadsInAThread(Rows(), batch_size=4, collate_fn=multiples_of(2)))
    assert samples.accepts == 2
    assert samples.batch(6)["x"].shape == (6, 4)


def test_a_loader_that_collates_in_its_own_iterator_needs_no_collate_fn_that_can():
    def refuses(samples):
        raise ValueError("not mine")

    assert made(CollatesItself(Rows(), batch_size=4, collate_fn=refuses))["x"].shape == (7, 4)


def without_odd_rows(samples):
    """Leave out bad samples: None, or rows that begin with 4, 12, 20 and so on."""
    return torch.stack([row for row in samples if row is not None and row[0] % 8 == 0])


class SomeAreNone(Rows):
    def __getitem__(self, index):
        return rows[index] if index % 2 == 0 else None


@pytest.mark.parametrize("dataset", [Rows(), SomeAreNone()], ids=lambda dataset: type(dataset).__name__)
@pytest.mark.parametrize("kind", [DataLoader, Finishes])
def test_batches_are_planned_without_the_samples_that_collate_fn_leaves_out(dataset, kind):
    loader = kind(dataset, batch_size=4, collate_fn=without_odd_rows)
    for size, batch in read_samples(loader).batches((2, 3, 5, 40)):
        batch = batch["x"] if kind is Finishes else batch
        assert batch[:3, 0].tolist() == [0, 8, 16][:size]  # rows 0, 2 and 4 of the first five
        assert len(batch) == size  # the most that a batch of training has


def test_samples_that_a_collate_fn_leaves_out_of_a_list_of_parts_are_noticed():
    def listed(samples):
        return [{"x": row} for row in without_odd_rows(samples)]

    for size, batch in read_samples(DataLoader(Rows(), batch_size=4, collate_fn=listed)).batches((2, 3, 5, 40)):
        assert len(batch) == size


def test_samples_stay_where_collate_fn_leaves_all_of_them_out():
    def refuses(samples):
        raise ValueError("no sample is good")

    with pytest.raises(ValueError, match="no sample is good"):
        made(DataLoader(Rows(), batch_size=4, collate_fn=refuses))


def test_an_iterator_that_was_begun_is_not_advanced():
    class Infinite(DataLoader):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.begun = super().__iter__()

        def __iter__(self):
            return (next(self.begun) for _ in range(len(self)))

    loader = Infinite(Rows(), batch_size=4)
    assert made(loader).shape == (7, 4)
    assert torch.equal(next(iter(loader)), rows[:4])


def test_samples_are_read_once_whatever_is_made_of_them():
    class Counted(Rows):
        read: ClassVar = []

        def __getitem__(self, index):
            self.read.append(index)
            return super().__getitem__(index)

    for kind in (DataLoader, Finishes, CollatesItself):
        Counted.read.clear()
        samples = read_samples(kind(Counted(), batch_size=4))
        samples.batches(), samples.batch(23), samples.large(30)
        assert sorted(Counted.read) == [0, 1, 2, 3, 4]


# --------------------------------------------------------------------------------------------------------- bulk reads


class GetsTensor(Rows):
    def __getitems__(self, indices):
        return rows[indices]


class GetsDict(Rows):
    def __getitems__(self, indices):
        return {"x": rows[indices]}


class GetsList(Rows):
    def __getitems__(self, indices):
        return [rows[index] for index in indices]


def as_it_is(batch):
    return batch


@pytest.mark.parametrize(
    ("dataset", "collate", "read"),
    [
        (GetsTensor(), as_it_is, lambda batch: batch),
        (GetsDict(), as_it_is, lambda batch: batch["x"]),
        (GetsList(), torch.stack, lambda batch: batch),
        (Subset(Rows(), range(30)), torch.stack, lambda batch: batch),
        (GetsTensor(), lambda batch: (batch, len(batch)), lambda batch: batch[0]),
    ],
    ids=["a tensor", "a dict", "a list", "a subset", "finished"],
)
def test_a_dataset_that_reads_several_samples_at_once(dataset, collate, read):
    for kind in (DataLoader, type("Own", (DataLoader,), {"__iter__": lambda self: DataLoader.__iter__(self)})):
        samples = read_samples(kind(dataset, batch_size=4, collate_fn=collate))
        assert [tuple(read(batch).shape) for _, batch in samples.batches((2, 3, 5, 11))] == [
            (2, 4),
            (3, 4),
            (5, 4),
            (11, 4),
        ]


class Chunks(Sampler):
    """Yields lists of a size of its own: no BatchSampler."""

    def __init__(self, count, batch_size):
        self.count, self.batch_size = count, batch_size

    def __iter__(self):
        return iter(list(range(k, min(k + self.batch_size, self.count))) for k in range(0, self.count, self.batch_size))

    def __len__(self):
        return -(-self.count // self.batch_size)


class Bulk(Rows):
    def __getitem__(self, indices):
        assert isinstance(indices, list)
        return {"x": rows[indices]}


@pytest.mark.parametrize(
    "sampler",
    [
        BatchSampler(range(40), 8, False),
        BatchSampler(RandomSampler(range(40)), 8, True),
        BatchSampler(SubsetRandomSampler(range(5, 40)), 8, False),
        Chunks(40, 8),
    ],
    ids=["in order", "shuffled", "a part", "a sampler of lists"],
)
def test_bulk_reads_are_resized_and_read_in_lists(sampler):
    loader = DataLoader(Bulk(), sampler=sampler, batch_size=None)
    assert (batch_size_of_loader(loader), yielded_size(loader)) == (8, 8)
    samples = read_samples(loader)
    assert [tuple(batch["x"].shape) for _, batch in samples.batches((2, 3, 5, 11))] == [(2, 4), (3, 4), (5, 4), (11, 4)]
    assert samples.own == 8
    check_resizable(loader, 20)
    own = resized_loaders(loader, [20])
    expected = 35 if isinstance(getattr(sampler, "sampler", None), SubsetRandomSampler) else 40
    assert dataset_size(loader) == expected
    assert [len(batch["x"]) for batch in own] == ([20, 15] if expected == 35 else [20, 20])
    assert [len(batch["x"]) for batch in loader][:2] == [8, 8]


# ------------------------------------------------------------------------------------------------ sizes of a collate_fn


def multiples_of(step, at_most=None):
    def collate(samples):
        if len(samples) % step or (at_most and len(samples) > at_most):
            raise ValueError(f"multiples of {step}")
        return torch.stack(samples)

    return collate


@pytest.mark.parametrize(("step", "own"), [(2, 8), (4, 8), (3, 6), (8, 8), (5, 30), (7, 7)])
def test_a_collate_fn_of_multiples_is_asked_for_multiples(step, own):
    samples = read_samples(DataLoader(Rows(), batch_size=own, collate_fn=multiples_of(step)))
    assert (samples.accepts, samples.multiple, samples.fixed) == (step, step, None)
    assert [size for size, _ in samples.batches()] == [step * size for size in SIZES]
    assert samples.notes == (f"the loader makes batches of multiples of {step} samples alone",)
    assert [size for size, _ in samples.for_the_card((2, 101))] == [2 * step, 101 // step * step]


@pytest.mark.parametrize("own", [1, 4, 6])
def test_a_collate_fn_of_one_size_is_planned_at_that_size(own):
    samples = read_samples(DataLoader(Rows(), batch_size=own, collate_fn=multiples_of(own, at_most=own)))
    assert samples.fixed == own
    assert [(size, len(batch)) for size, batch in samples.batches()] == [(own, own)]


def test_a_collate_fn_that_always_fails_raises_its_own_error():
    def broken(samples):
        raise KeyError("label")

    with pytest.raises(KeyError, match="label"):
        read_samples(DataLoader(Rows(), batch_size=4, collate_fn=broken))


def packed(samples):
    """Fill a row of 16 numbers, however many samples there are."""
    return torch.cat([*samples, torch.zeros(16)])[:16].reshape(1, 16)


@pytest.mark.parametrize(
    ("make", "own"),
    [
        (lambda: DataLoader(rows.repeat(3, 1, 1), batch_size=1, collate_fn=lambda samples: samples[0]), 1),
        (lambda: DataLoader(Rows(), batch_size=4, collate_fn=packed), 4),
        (lambda: DataLoader([{"x": rows}] * 9, batch_size=1, collate_fn=lambda samples: samples[0]["x"]), 1),
    ],
    ids=["an item is a batch", "packed", "an item is a dict"],
)
def test_a_batch_that_does_not_grow_has_no_size_to_set(make, own):
    samples = read_samples(make())
    assert samples.fixed == own
    assert samples.notes[0].startswith("a batch is of the same size, whatever number of samples its loader puts")


# ------------------------------------------------------------------------------------------------------------- workers


class OpenedInWorkers(Rows):
    file = None

    def __getitem__(self, index):
        return self.file[index]


def open_file(worker):
    get_worker_info().dataset.file = rows


class AsksWorker(Rows):
    def __getitem__(self, index):
        return rows[index] + get_worker_info().id


class SharedByWorkers(IterableDataset):
    def __iter__(self):
        worker = get_worker_info()
        return iter(rows[worker.id :: worker.num_workers])


class BulkInWorkers(Bulk):
    def __getitem__(self, indices):
        return {"x": rows[indices] + get_worker_info().id}


def collated_in_workers(samples):
    assert get_worker_info() is not None
    return torch.stack(samples)


IN_WORKERS = {
    "opened there": lambda: DataLoader(OpenedInWorkers(), batch_size=4, num_workers=1, worker_init_fn=open_file),
    "asked there": lambda: DataLoader(AsksWorker(), batch_size=4, num_workers=2, shuffle=True),
    "a stream": lambda: DataLoader(SharedByWorkers(), batch_size=4, num_workers=2),
    "collated there": lambda: DataLoader(Rows(), batch_size=4, num_workers=1, collate_fn=collated_in_workers),
    "kept alive": lambda: DataLoader(AsksWorker(), batch_size=4, num_workers=1, persistent_workers=True, timeout=30),
    "an iterator of its own": lambda: Finishes(AsksWorker(), batch_size=4, num_workers=1),
}


@pytest.mark.parametrize("name", IN_WORKERS)
def test_what_only_a_worker_can_read_is_read_in_one(name):
    loader = IN_WORKERS[name]()
    for size, batch in read_samples(loader).batches((2, 3, 5, 11)):
        assert (batch["x"] if isinstance(batch, dict) else batch).shape == (size, 4)
    assert loader._iterator is None
    assert multiprocessing.active_children() == []


def test_bulk_reads_in_workers():
    loader = DataLoader(BulkInWorkers(), sampler=BatchSampler(range(40), 8, False), batch_size=None, num_workers=1)
    assert [tuple(batch["x"].shape) for _, batch in read_samples(loader).batches()] == [(2, 4), (3, 4), (5, 4)]
    assert multiprocessing.active_children() == []


def test_what_no_process_can_read_raises_the_users_error():
    class Broken(Rows):
        def __getitem__(self, index):
            raise OSError("no such file")

    with pytest.raises(OSError, match=r"^no such file$"):
        read_samples(DataLoader(Broken(), batch_size=4, num_workers=1))
    assert multiprocessing.active_children() == []


# -------------------------------------------------------------------------------------------------- the sampler's order


class FirstIsCorrupt(Rows):
    def __getitem__(self, index):
        if index == 0:
            raise OSError("sample 0 is corrupt")
        return rows[index]


class OfObjects(Sampler):
    """Yields an index and a size, as samplers of multi-scale training do."""

    def __iter__(self):
        return iter((index, 2) for index in range(40))

    def __len__(self):
        return 40


class Scaled(Rows):
    def __getitem__(self, key):
        index, size = key
        return rows[index][:size]


Key = collections.namedtuple("Key", "name")


class Named(Rows):
    def __getitem__(self, key):
        return rows[int(key.name)]


ORDERS = {
    "a part": lambda: DataLoader(FirstIsCorrupt(), batch_size=4, sampler=SubsetRandomSampler(range(1, 40))),
    "no weight": lambda: DataLoader(
        FirstIsCorrupt(), batch_size=4, sampler=WeightedRandomSampler([0.0] + [1.0] * 39, 40)
    ),
    "a batch sampler": lambda: DataLoader(FirstIsCorrupt(), batch_sampler=[[5, 6], [7, 8, 9], [1]]),
    "a list": lambda: DataLoader(FirstIsCorrupt(), batch_size=4, sampler=[3, 1, 2]),
    "shuffled": lambda: DataLoader(
        FirstIsCorrupt(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1)
    ),
    "objects": lambda: DataLoader(Scaled(), batch_size=4, sampler=OfObjects()),
    "objects in batches": lambda: DataLoader(Scaled(), batch_sampler=BatchSampler(OfObjects(), 4, False)),
    "named": lambda: DataLoader(Named(), batch_size=2, sampler=[Key("3"), Key("1"), Key("2")]),
}


@pytest.mark.parametrize("name", ORDERS)
def test_samples_are_those_that_the_sampler_asks_for(name):
    assert len(made(ORDERS[name](), 7)) == 7


def test_the_first_samples_of_the_sampler_are_read_in_its_order():
    assert torch.equal(made(DataLoader(Rows(), batch_size=4, sampler=[9, 3, 7, 1, 30, 2]), 5), rows[[9, 3, 7, 1, 30]])


def test_a_random_sampler_is_asked_alike_in_every_run():
    loader = DataLoader(Rows(), batch_size=4, sampler=SubsetRandomSampler(range(40)))
    torch.manual_seed(1)
    first = made(loader, 5)
    torch.manual_seed(2)
    assert torch.equal(made(loader, 5), first)


def test_a_sampler_that_is_an_iterator_is_not_advanced():
    sampler = iter(range(40))
    assert torch.equal(made(DataLoader(Rows(), batch_size=4, sampler=sampler), 5), rows[:5])
    assert next(sampler) == 0


def test_samples_that_differ_are_looked_at_over_the_whole_dataset():
    class Texts(Dataset):
        def __len__(self):
            return 127

        def __getitem__(self, index):
            return torch.zeros(index + 1, 4)

    def padded(samples):
        return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)

    samples = read_samples(DataLoader(Texts(), batch_size=4, collate_fn=padded), "auto")
    assert samples.batch(2).shape == (2, 127, 4)
    # 1 and 127 rows of four floats: 16 and 2,032 bytes
    assert samples.notes == (
        "samples differ in size (16 B to 1.98 KiB): planned for batches of the largest of the 64 that were looked at",
    )
    assert read_samples(DataLoader(Rows(), batch_size=4), "auto").notes == ()


def test_a_sample_that_cannot_be_read_does_not_stop_looking_further():
    class Corrupt(Dataset):
        def __len__(self):
            return 100

        def __getitem__(self, index):
            if index > 50:
                raise OSError("corrupt")
            return torch.zeros(index + 1)

    def padded(samples):
        return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)

    assert made(DataLoader(Corrupt(), batch_size=4, collate_fn=padded), 2, sample="auto").shape == (2, 5)


# ------------------------------------------------------------------------------------------------------------- streams


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.repeat(rows[0])


class Ends(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(rows[: self.count])


class Sized(Ends):
    def __len__(self):
        return self.count


def most_of(loader, max_batch_size=None):
    samples = read_samples(loader)
    return samples.count if samples.count is not None else most_of_a_stream(loader, samples, max_batch_size)


def test_a_stream_without_a_length_is_bounded():
    assert most_of(DataLoader(Endless(), batch_size=8)) == MOST
    assert most_of(DataLoader(Endless(), batch_size=8, drop_last=True)) == 8
    assert most_of(DataLoader(Ends(3), batch_size=8)) == 3
    assert most_of(DataLoader(Ends(4), batch_size=8, num_workers=2)) == 2
    assert most_of(DataLoader(Rows(), batch_size=8)) is None


def test_a_stream_is_bounded_by_the_hosts_memory_where_more_is_allowed():
    few = most_of_a_stream(DataLoader(Endless()), read_samples(DataLoader(Endless(), batch_size=8)), 10**9)
    more = DataLoader(Endless(), batch_size=8, num_workers=2, prefetch_factor=3)
    assert few is not None
    assert most_of_a_stream(more, read_samples(more), 10**9) == pytest.approx(few / 7, rel=0.01)  # 1 + 2 · 3 batches


class OfBatches:
    """Begun anew by each epoch: no DataLoader."""

    def __iter__(self):
        return iter([rows[:20]] * 3)


class SizedBatches(OfBatches):
    def __len__(self):
        return 3


@pytest.mark.parametrize(
    ("make", "own", "count"),
    [
        (OfBatches, 20, None),
        (SizedBatches, 20, 60),
        (lambda: DataLoader([rows[:20]] * 3, batch_size=None), 20, 60),
        (lambda: DataLoader(Ends(40), batch_size=None), 4, None),
        (lambda: DataLoader(Sized(40), batch_size=None), 4, 160),
        (lambda: DataLoader(Sized(41), batch_size=None, num_workers=2), 4, 80),  # 20 batches of each worker, at least
    ],
    ids=["no DataLoader", "sized", "a dataset of batches", "a stream", "of known length", "of two workers"],
)
def test_batches_that_are_made_already_tell_a_number_of_samples_by_their_number(make, own, count):
    source = make()
    samples = read_samples(source)
    assert (samples.own, samples.count) == (own, count)
    assert (samples.fixed, dataset_size(source), batches_of_epoch(source, 10)) == (None, None, None)
    # without a number, a batch that is not full may be dropped, and there may be one: as many samples as now
    assert most_of_a_stream(source, samples, None) == (own if count is None else None)
    assert most_of_a_stream(rows, read_samples(rows), None) is None  # a batch


@pytest.mark.parametrize(("workers", "most"), [(0, 29), (1, 29), (2, 14)])
def test_workers_share_a_stream(workers, most):
    loader = DataLoader(Sized(29), batch_size=4, num_workers=workers, drop_last=True)
    assert dataset_size(loader) == most
    assert batches_of_epoch(loader, most) == max(1, workers)
    assert batches_of_epoch(loader, most + 1) == 0


def test_what_is_a_ranks_own_is_not_divided_again():
    own = DistributedSampler(range(40), num_replicas=4, rank=1)
    assert dataset_size(DataLoader(Rows(), sampler=own), ranks=4) == 10
    assert dataset_size(DataLoader(Rows(), batch_sampler=BatchSampler(own, 2, False)), ranks=4) == 10
    assert dataset_size(DataLoader(Sized(30)), ranks=4) == 30
    assert dataset_size(DataLoader(Rows()), ranks=4) == 10


# ------------------------------------------------------------------------------------------------- a size that is had


class Tokens(Sampler):
    """``batch_size`` counts tokens, 10 a sample; a batch has one sample at least."""

    batch_size = 160

    def __iter__(self):
        count = max(1, self.batch_size // 10)
        return iter([list(range(k, min(k + count, 40))) for k in range(0, 40, count)])


class Buckets(Sampler):
    """Samples of a kind alone: 25 of one, 15 of the other."""

    def __init__(self, batch_size):
        self.batch_size = batch_size

    def __iter__(self):
        for kind in (range(25), range(25, 40)):
            yield from (list(kind)[k : k + self.batch_size] for k in range(0, len(kind), self.batch_size))


class ShufflesBatches(Sampler):
    """Whole batches in another order: the rest comes first."""

    def __init__(self, batch_size):
        self.batch_size = batch_size

    def __iter__(self):
        return iter([list(range(k, min(k + self.batch_size, 40))) for k in range(0, 40, self.batch_size)][::-1])


@pytest.mark.parametrize("size", [3, 7, 24, 40])  # which leave 1, 5, 16 and none
def test_a_rest_that_comes_first_is_no_other_batch_size(size):
    loader = DataLoader(Rows(), batch_sampler=ShufflesBatches(3))
    assert yielded_size(loader) == 3
    check_resizable(loader, size)
    assert max(map(len, resized_loaders(loader, [size]))) == size


def test_a_sampler_of_larger_batches_does_not_follow_its_size():
    class Descends(ShufflesBatches):
        def __iter__(self):
            return iter([[0] * count for count in range(5, 0, -1)])

    with pytest.raises(ApplyError, match="set to 1, it makes a batch of 5"):
        check_resizable(DataLoader(Rows(), batch_sampler=Descends(3)))


class MadeBefore(Sampler):
    """Its batches are made when it is."""

    def __init__(self, batch_size):
        self.batch_size = batch_size
        self.lists = [list(range(k, k + batch_size)) for k in range(0, 40, batch_size)]

    def __iter__(self):
        return iter(self.lists)


class MostNodes(Sampler):
    """As of graphs: as many as fill a budget, whatever a batch size."""

    def __iter__(self):
        return iter([[0, 1, 2], [3, 4], [5]])


def test_the_first_batch_of_a_sampler_tells_the_size_that_is_had():
    loaders = {kind: DataLoader(Rows(), batch_sampler=kind) for kind in (Tokens(), Buckets(4), MadeBefore(4))}
    assert [yielded_size(loader) for loader in loaders.values()] == [16, 4, 4]
    tokens, buckets, before = loaders.values()
    assert dataset_size(buckets) == 25  # a bucket has no more
    assert dataset_size(before) == 40  # it tells nothing: a hook may make it anew
    check_resizable(buckets, 25)
    for loader, size, message in [
        (tokens, 30, r"\(set to 30, it makes a batch of 3\)"),
        (buckets, 26, r"\(set to 26, it makes a batch of 25\)"),
        (before, 30, r"\(set to 1, it makes a batch of 4\)"),
        (DataLoader(Rows(), batch_sampler=MostNodes()), 30, "MostNodes has no attribute batch_size"),
    ]:
        with pytest.raises(ApplyError, match=message):
            check_resizable(loader, size)
    assert yielded_size(DataLoader(Rows(), batch_sampler=MostNodes())) == 3


class Tiles(Sampler):
    """Parts of large images: 30 of 3."""

    def __init__(self, batch_size):
        self.batch_size = batch_size

    def __len__(self):
        return 30 // self.batch_size

    def __iter__(self):
        keys = iter((image, part) for image in range(3) for part in range(10))
        return iter(list(itertools.islice(keys, self.batch_size)) for _ in range(len(self)))


class Images(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, key):
        image, part = key
        return rows[10 * image + part]


def test_a_sampler_may_yield_more_keys_than_the_dataset_has_samples():
    loader = DataLoader(Images(), batch_sampler=Tiles(5))
    assert dataset_size(loader) == 30
    assert batches_of_epoch(loader, 10) == 3
    assert made(loader).shape == (7, 4)
    check_resizable(loader, 30)
    assert [len(batch) for batch in resized_loaders(loader, [15])] == [15, 15]


def test_a_sampler_that_drops_all_it_has_is_refused():
    class Few(Sampler):  # without a length
        def __iter__(self):
            return iter(range(6))

    loader = DataLoader(Rows(), batch_sampler=BatchSampler(Few(), 2, drop_last=True))
    check_resizable(loader, 6)
    with pytest.raises(ApplyError, match=r"\(set to 7, it makes none\)"):
        check_resizable(loader, 7)


class ItsOwnIterator(IterableDataset):
    """As litdata's: begun anew by ``iter``, and told its loader's batch size."""

    at, batch_size = 0, 4

    def set_batch_size(self, size):
        self.batch_size = size

    def __len__(self):
        return 40

    def __iter__(self):
        self.at = 0
        return self

    def __next__(self):
        if self.at == 40:
            raise StopIteration
        self.at += 1
        return rows[self.at - 1]


def test_a_dataset_that_is_its_own_iterator_is_no_iterator_over_batches():
    dataset = ItsOwnIterator()
    loader = Finishes(dataset, batch_size=4)
    object.__setattr__(loader, "__dataset", dataset)  # as Lightning notes it for a loader that a hook makes
    check_resizable(loader, 20)
    own = resized_loaders(loader, [20])
    assert [batch["rows"] for batch in own] == [20, 20]
    assert (own.dataset.batch_size, dataset.batch_size, dataset.at) == (20, 4, 0)
    assert made(loader)["x"].shape == (7, 4)
    assert dataset.at == 0


def test_the_last_batch_of_an_epoch():
    assert last_batch(DataLoader(Rows()), 13) == 1  # 40 = 3 · 13 + 1
    assert last_batch(DataLoader(Rows()), 20) == 20
    assert last_batch(DataLoader(Rows(), drop_last=True), 13) is None
    assert last_batch({"a": DataLoader(Rows()), "b": DataLoader(list(rows[:27]))}, 13) == 1
    assert last_batch(DataLoader(Rows()), 13, ranks=3) == 1  # 14 each
    assert last_batch(DataLoader(Endless()), 13) is None


# ----------------------------------------------------------------------------------------- what is not tiled is bounded


def test_a_batch_that_is_not_tiled_is_not_collated_from_many_samples():
    samples = read_samples(DataLoader(Rows(), batch_size=4, collate_fn=torch.cat))
    assert samples.batch(100).shape == (400,)
    with pytest.raises(TraceError, match="a batch of 70000 samples takes too long to make on the host") as caught:
        samples.batch(70_000)
    assert caught.value.reason == "too_large"


def test_a_batch_that_is_tiled_is_made_at_once():
    calls: list[int] = []

    def collate(samples: list[Any]) -> Any:
        calls.append(len(samples))
        return torch.stack(samples), ["a name"] * len(samples)

    samples = read_samples(DataLoader(Rows(), batch_size=4, collate_fn=collate))
    x, names = samples.batch(60_000)
    assert (x.shape, len(names), max(calls)) == ((60_000, 4), 60_000, max(SIZES))
    with pytest.raises(TraceError, match="a batch of 1000000 samples takes too long to make on the host"):
        samples.batch(1_000_000)  # a text for each of them would be looked at
    assert samples.large(1_000_000).size == 1_000_000
    assert read_samples(DataLoader(Rows(), batch_size=4)).batch(1_000_000).shape == (1_000_000, 4)


def test_torch_ends_workers_where_it_is_asked_to():
    """Private: ``DataLoader._get_iterator`` and ``_shutdown_workers`` of torch 2.4 to 2.15."""
    iterator = DataLoader._get_iterator(DataLoader(Rows(), num_workers=1))
    assert callable(iterator._shutdown_workers)
    iterator._shutdown_workers()
    assert "_DataLoader__multiprocessing_context" in vars(DataLoader(Rows()))
    assert type(DataLoader(Rows()).sampler) is SequentialSampler
