"""Loaders, samplers and streams."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pytorch_lightning.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    ChainDataset,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
    random_split,
)

from benchmarks.robustness.job import WIDTH, Bare, Rows, Training, job, loader

LOADERS = "loaders, several loaders, workers"
SAMPLERS = "samplers and batch samplers"
STREAMS = "iterable data"
SMALL = {"max_batch_size": 64}  #: millions of the tiny samples of a stream would fit


class On(Bare):
    """A network that finds its rows in the batch by the function given."""

    def __init__(self, rows: Callable[[Any], Any] = lambda batch: batch) -> None:
        super().__init__()
        self.rows = rows

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(self.rows(batch)).square().mean()


def on(
    kind: str,
    name: str,
    make: Callable[[], Any],
    rows: Callable[[Any], Any] = lambda b: b,
    samples: Any = "same",
    **options: Any,
) -> None:
    """Register a loader's job; ``rows`` finds a tensor with a row a sample in a batch."""

    def training() -> Training:
        return Training(On(rows), make(), count=lambda batch: len(rows(batch)), options=options)

    job(kind, samples, name=name)(training)


# ------------------------------------------------------------------------------------------------------- loaders


class Opened(Rows):
    """Opened in each worker, as HDF5 and LMDB files are."""

    file: Any = None

    def __getitem__(self, index: int) -> Any:
        return self.file[index]


def open_file(worker: int) -> None:
    get_worker_info().dataset.file = torch.ones(24, WIDTH)


class Finishing(DataLoader):
    """Its iterator makes the batch."""

    def __iter__(self) -> Any:
        return (batch["x"] for batch in super().__iter__())


class Prefetching:
    """Wraps a loader, with no attribute of its own but the length."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Any]:
        ahead = None
        for batch in self.inner:
            if ahead is not None:
                yield ahead
            ahead = batch
        yield ahead


class Delegating(Prefetching):
    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class HidesArguments(DataLoader):
    def __init__(self, count: int) -> None:
        super().__init__(Rows(count), batch_size=4, shuffle=True)


class KeywordArguments(DataLoader):
    def __init__(self, *, rows: Any, size: int, **options: Any) -> None:
        self.rows, self.size = rows, size
        super().__init__(rows, size, **options)


class Indexed(Rows):
    def __getitem__(self, index: int) -> Any:
        assert isinstance(index, int)
        return torch.full((WIDTH,), float(index))


def as_dict(samples: Any) -> Any:
    return {"x": torch.stack(samples)}


on(LOADERS, "shuffled_and_dropped", lambda: loader(Rows(26), shuffle=True, drop_last=True), samples="any")
on(LOADERS, "last_batch_is_smaller", lambda: loader(Rows(26)))
on(LOADERS, "one_sample_alone", lambda: loader(Rows(1), 1))
on(LOADERS, "batch_size_1", lambda: loader(Rows(9), 1))
on(LOADERS, "batch_size_above_the_dataset", lambda: loader(Rows(6), 64))
on(LOADERS, "workers", lambda: loader(num_workers=1))
on(LOADERS, "workers_that_stay", lambda: loader(num_workers=2, persistent_workers=True, prefetch_factor=1))
on(LOADERS, "workers_that_open_files", lambda: loader(Opened(), num_workers=1, worker_init_fn=open_file))
on(LOADERS, "pinned_with_timeout", lambda: loader(num_workers=1, pin_memory=True, timeout=60))
on(LOADERS, "own_generator", lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(2)))
on(LOADERS, "iterator_finishes_the_batch", lambda: Finishing(Rows(), batch_size=4, collate_fn=as_dict))
on(LOADERS, "no_dataloader", lambda: Prefetching(loader()))
on(LOADERS, "delegates_to_a_loader", lambda: Delegating(loader()))
on(LOADERS, "hides_its_arguments", lambda: HidesArguments(24))
on(LOADERS, "keyword_arguments_only", lambda: KeywordArguments(rows=Rows(), size=4, shuffle=True))
on(LOADERS, "index_must_be_int", lambda: loader(Indexed()))
on(LOADERS, "loader_without_batches", lambda: DataLoader(torch.ones(6, 4, WIDTH), batch_size=None))
on(LOADERS, "two_loaders", lambda: [loader(), loader(Rows(12))], lambda batch: batch[0], "any")
on(LOADERS, "loaders_by_name", lambda: {"a": loader(), "b": loader(batch_size=2)}, lambda batch: batch["a"], "any")
on(
    LOADERS,
    "longest_of_two",
    lambda: CombinedLoader({"a": loader(), "b": loader(Rows(12))}, "max_size_cycle"),
    lambda batch: batch["a"],
)
on(LOADERS, "shortest_of_two", lambda: CombinedLoader([loader(), loader(Rows(12))], "min_size"), lambda b: b[0], "any")
on(LOADERS, "nested_loaders", lambda: {"a": [loader(), loader()], "b": {"c": loader()}}, lambda b: b["b"]["c"], "any")
on(LOADERS, "subset_of_a_dataset", lambda: loader(random_split(Rows(30), [24, 6])[0], shuffle=True))
on(LOADERS, "concatenated_datasets", lambda: loader(ConcatDataset([Rows(10), Rows(14)]), shuffle=True))
on(LOADERS, "tensor_dataset", lambda: loader(TensorDataset(torch.ones(24, WIDTH))), lambda batch: batch[0])
on(LOADERS, "plain_list_dataset", lambda: loader([torch.ones(WIDTH)] * 24))
on(LOADERS, "plain_dictionary_dataset", lambda: loader({n: torch.ones(WIDTH) for n in range(24)}))

# ------------------------------------------------------------------------------------------------------ samplers


class Buckets:
    """A batch sampler by duck typing, with batches of several sizes."""

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[list[int]]:
        sizes, start = [2, 4, 6, 4, 8], 0
        for size in sizes:
            yield list(range(start, start + size))
            start += size


class ByClass(Sampler[list[int]]):
    """Two of each of two classes in every batch."""

    def __init__(self, classes: int = 2, each: int = 2) -> None:
        self.classes, self.each = classes, each

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[list[int]]:
        for k in range(6):
            yield [k * 2, k * 2 + 1, 12 + k * 2, 13 + k * 2]


class Repeats(Sampler[int]):
    """Repeats each index, as repeated augmentation does."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return 2 * self.count

    def __iter__(self) -> Iterator[int]:
        return (n // 2 for n in range(2 * self.count))


class Epochs(Sampler[int]):
    """Has its order from ``set_epoch``."""

    epoch = 0

    def __len__(self) -> int:
        return 24

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(random.Random(self.epoch).sample(range(24), 24))


class Bulk(Dataset):
    """Reads a list of indices at once."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, indices: Any) -> Any:
        return torch.ones(24, WIDTH)[indices]


class Batched(Rows):
    def __getitems__(self, indices: Any) -> Any:
        return torch.ones(len(indices), WIDTH)


class KeepsSize(BatchSampler):
    """Adds arguments to a BatchSampler's."""

    def __init__(self, data: Any, size: int, seed: int = 0) -> None:
        super().__init__(RandomSampler(data), size, drop_last=False)
        self.seed = seed


on(SAMPLERS, "weighted", lambda: loader(sampler=WeightedRandomSampler([1.0] * 12 + [3.0] * 12, 24)))
on(SAMPLERS, "subset_at_random", lambda: loader(sampler=SubsetRandomSampler(range(12))))
on(SAMPLERS, "with_replacement", lambda: loader(sampler=RandomSampler(Rows(), True, num_samples=40)))
on(SAMPLERS, "order_by_epoch", lambda: loader(sampler=Epochs()))
on(SAMPLERS, "repeated_indices", lambda: loader(sampler=Repeats(24)))
on(SAMPLERS, "a_list_as_sampler", lambda: loader(sampler=list(range(20))))
on(SAMPLERS, "batch_sampler", lambda: DataLoader(Rows(), batch_sampler=BatchSampler(range(24), 4, False)))
on(SAMPLERS, "batch_sampler_subclass", lambda: DataLoader(Rows(), batch_sampler=KeepsSize(Rows(), 4)))
on(SAMPLERS, "buckets", lambda: DataLoader(Rows(), batch_sampler=Buckets()))
on(SAMPLERS, "batches_by_class", lambda: DataLoader(Rows(), batch_sampler=ByClass()))
on(SAMPLERS, "list_of_lists", lambda: DataLoader(Rows(), batch_sampler=[[0, 1], [2, 3, 4], [5]]))
on(SAMPLERS, "bulk_reading", lambda: DataLoader(Bulk(), sampler=BatchSampler(range(24), 4, False), batch_size=None))
on(SAMPLERS, "getitems", lambda: loader(Batched(), collate_fn=lambda batch: batch))

# ------------------------------------------------------------------------------------------------------- streams


class Stream(IterableDataset):
    def __init__(self, count: int = 24) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        yield from (torch.ones(WIDTH) for _ in range(first, self.count, step))


class Sized(Stream):
    def __len__(self) -> int:
        return self.count


class Once(IterableDataset):
    """Can be read once, as what a socket sends; then it is at its end until the next epoch has it opened anew."""

    def __init__(self) -> None:
        self.left = 48

    def __iter__(self) -> Iterator[Any]:
        for _ in range(24):
            if self.left == 0:
                return
            self.left -= 1
            yield torch.ones(WIDTH)


class OwnBatches(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        yield from (torch.ones(4, WIDTH) for _ in range(6))


class Shuffled(IterableDataset):
    """Keeps a buffer, and draws from it."""

    def __iter__(self) -> Iterator[Any]:
        buffer = [torch.ones(WIDTH) for _ in range(24)]
        while buffer:
            yield buffer.pop(random.randrange(len(buffer)))


on(STREAMS, "stream", lambda: loader(Stream()))
on(STREAMS, "stream_with_length", lambda: loader(Sized(26)))
on(STREAMS, "stream_shared_by_workers", lambda: loader(Sized(), num_workers=2, drop_last=True), samples="any")
on(STREAMS, "stream_read_once", lambda: loader(Once()))
on(STREAMS, "stream_of_batches", lambda: DataLoader(OwnBatches(), batch_size=None))
on(STREAMS, "stream_from_a_buffer", lambda: loader(Shuffled()))
on(STREAMS, "chained_streams", lambda: loader(ChainDataset([Stream(10), Stream(14)])))
on(STREAMS, "stream_of_dictionaries", lambda: loader(Named()), lambda batch: batch["x"], **SMALL)


class Named(Stream):
    def __iter__(self) -> Iterator[Any]:
        return ({"x": row, "key": f"{n:05}", "n": n} for n, row in enumerate(super().__iter__()))


@job(STREAMS)
def endless_stream_with_limit() -> Any:
    class Endless(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield torch.ones(WIDTH)

    return Training(On(), loader(Endless()), options=SMALL, settings={"limit_train_batches": 5}, count=lambda batch: 1)


@job(STREAMS)
def endless_stream_with_max_steps() -> Any:
    class Endless(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield torch.ones(WIDTH)

    settings = {"max_steps": 5, "max_epochs": -1}
    return Training(On(), loader(Endless()), options=SMALL, settings=settings, count=lambda batch: 1)
