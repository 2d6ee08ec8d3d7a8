"""Datasets whose rows hold their own number, and batches in which it is found again."""

from __future__ import annotations

import dataclasses
import random
from collections import UserDict
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset, get_worker_info

from benchmarks.pipelines.choose import WIDTH, Pipeline

SECOND = 128  #: number of the first row of a second dataset
ROWS_OF_SECOND = 30


# ------------------------------------------------------------------------------------------------------------ samples
@dataclasses.dataclass
class Record:
    x: Any
    names: Any = "a name"
    label: Any = None


def sample_of(leaf: str, number: int) -> Any:
    """Return a sample of a kind; its row is filled with its number."""
    row = torch.full((WIDTH,), float(number))
    if leaf == "pair":
        return row, number
    if leaf == "dict":
        return {"x": row, "number": number}
    if leaf == "record":
        return Record(row)
    if leaf == "arrays":
        return {"x": np.full(WIDTH, number, np.float32), "number": np.int64(number)}
    if leaf == "words":
        return {"x": row, "text": f"sample {number}", "label": None if number % 2 else number}
    if leaf == "user_dict":
        return UserDict(x=row, text=f"sample {number}")
    if leaf == "sequence":
        return torch.full((length_of(number), WIDTH), float(number))
    return row


def length_of(number: int) -> int:
    """Return the length of a sequence, or the tokens of a sample."""
    return 1 + number % 5


def row_of(sample: Any) -> Tensor:
    """Return the row, or the sequence of rows, of a sample of any kind."""
    if isinstance(sample, Record):
        return sample.x  # type: ignore[no-any-return]
    if isinstance(sample, Mapping):
        sample = sample["x"]
    return torch.as_tensor(sample[0] if isinstance(sample, tuple) else sample)


# ------------------------------------------------------------------------------------------------------------ batches
class Named(NamedTuple):
    x: Tensor
    names: list[str]


class Held:
    """A batch that is no collection, and is moved by its own method."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: Any, non_blocking: bool = False) -> Held:
        return Held(self.x.to(device, non_blocking=non_blocking))


def packed(kind: str, rows: list[Tensor]) -> Any:
    """Return a batch of a kind; sequences are padded to the longest."""
    x, names = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), ["a name"] * len(rows)
    if kind == "record":
        return Record(x, names)
    if kind == "named_tuple":
        return Named(x, names)
    if kind == "user_dict":
        return UserDict(x=x, names=names)
    if kind == "list_of_parts":
        return {"parts": [{"x": row, "name": "a name"} for row in x], "none": None}
    if kind == "object":
        return Held(x)
    return {"x": x, "names": names, "sizes": np.arange(len(rows)), "none": None}


def rows_of(batch: Any) -> list[Tensor]:
    """Return the rows of a batch of any kind: a tensor for each loader that it comes from."""
    if batch is None:  # of a loader that has ended
        return []
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, (Record, Named, Held)):
        return [batch.x]
    if isinstance(batch, (Mapping, UserDict)):
        if "parts" in batch:
            return [torch.stack([part["x"] for part in batch["parts"]])]
        return [batch["x"]] if "x" in batch else [rows for part in batch.values() for rows in rows_of(part)]
    if len(batch) == 2 and isinstance(batch[0], Tensor) and batch[1].dim() == 1:  # rows and numbers
        return [batch[0]]
    return [rows for part in batch for rows in rows_of(part)]


def numbers_in(rows: Tensor) -> list[int]:
    """Return the number of each row; of a sequence, its first value."""
    values = rows.detach().cpu().float()
    return [int(value) for value in (values[:, 0, 0] if values.dim() == 3 else values[:, 0]).tolist()]


# ----------------------------------------------------------------------------------------------------------- datasets
@dataclasses.dataclass(frozen=True)
class Key:
    """Stand for a sample in place of its index, as a sampler may yield it."""

    index: int


class Rows(Dataset[Any]):
    """Samples by number, from ``first`` on; reads a key of any kind, and lists of keys."""

    file: Any = None

    def __init__(self, count: int, leaf: str, first: int = 0, opened: bool = False, corrupt: int = -1) -> None:
        self.count, self.leaf, self.first, self.opened, self.corrupt = count, leaf, first, opened, corrupt

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, list):
            return [self[each] for each in key]
        index = key.index if isinstance(key, Key) else key[0] if isinstance(key, tuple) else int(key)
        if not 0 <= index < self.count:
            raise IndexError(index)
        if index == self.corrupt:
            raise OSError(f"sample {index} is corrupt")
        if self.opened and self.file is None:
            raise RuntimeError("the file is opened in a worker")
        return sample_of(self.leaf, self.first + index)


class AtOnce(Rows):
    def __getitems__(self, keys: list[Any]) -> list[Any]:
        return [self[key] for key in keys]


class SomeNone(Rows):
    """Has None in place of bad samples, which a collate function drops."""

    def __getitem__(self, key: Any) -> Any:
        sample = super().__getitem__(key)
        return sample if isinstance(key, list) or not is_bad(numbers_in(row_of(sample).reshape(1, -1))[0]) else None


class Cached(Rows):
    """Keeps each sample that was read."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.cache: dict[Any, Any] = {}

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, list):
            return [self[each] for each in key]
        if key not in self.cache:
            self.cache[key] = super().__getitem__(key)
        return self.cache[key]


class Stream(IterableDataset[Any]):
    """Samples in order, of which each worker reads its share."""

    def __init__(self, count: int, leaf: str) -> None:
        self.count, self.leaf = count, leaf

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return (sample_of(self.leaf, number) for number in range(first, self.count, step))


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.count


class ShuffledStream(Stream):
    """Draws from a buffer of ten samples."""

    def __iter__(self) -> Iterator[Any]:
        buffer: list[Any] = []
        for sample in super().__iter__():
            buffer.append(sample)
            if len(buffer) == 10:
                yield buffer.pop(random.randrange(10))
        yield from random.sample(buffer, len(buffer))


class EndlessStream(Stream):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from super().__iter__()


class BatchedStream(Stream):
    """Yields batches, as lists of samples."""

    def __init__(self, count: int, leaf: str, batch_size: int) -> None:
        super().__init__(count, leaf)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Any]:
        samples = super().__iter__()
        return iter(lambda: list(islice(samples, self.batch_size)), [])


class OwnIterator(Stream):
    """A stream that is its own iterator."""

    at = 0

    def __iter__(self) -> Any:
        self.at = 0
        return self

    def __next__(self) -> Any:
        if self.at == self.count:
            raise StopIteration
        self.at += 1
        return sample_of(self.leaf, self.at - 1)


def open_file(worker: int) -> None:
    """Open the dataset's file in a worker."""
    info: Any = get_worker_info()
    info.dataset.file = "open"


def dataset_of(p: Pipeline, batch_size: int) -> Any:
    """Return the dataset of a pipeline."""
    count, leaf = p.count, p.leaf
    if p.data == "subset":
        return Subset(AtOnce(count + 5, leaf), range(5, count + 5))
    if p.data == "concat":
        return ConcatDataset([Rows(count // 3, leaf), Rows(count - count // 3, leaf, first=count // 3)])
    if p.data == "tensors":
        return TensorDataset(torch.arange(float(count))[:, None].repeat(1, WIDTH), torch.arange(count))
    if p.data == "batched_stream":
        return BatchedStream(count, leaf, batch_size)
    if p.streams:
        return STREAMS[p.data](count, leaf)
    kind = {"getitems": AtOnce, "cached": Cached, "some_none": SomeNone}.get(p.data, Rows)
    return kind(count, leaf, opened=p.worker_init, corrupt=0 if p.data == "corrupt" else -1)


STREAMS = {
    "stream": Stream,
    "sized_stream": SizedStream,
    "shuffled_stream": ShuffledStream,
    "endless_stream": EndlessStream,
    "own_iterator": OwnIterator,
}


def numbers_of(p: Pipeline) -> list[int]:
    """Return the numbers of the samples that an epoch has, or may have where they are drawn with replacement.

    >>> numbers_of(Pipeline(data="corrupt", count=7, sampler="subset")), numbers_of(Pipeline(count=7, collate="drops"))
    ([1, 3, 5], [0, 1, 2, 4, 5, 6])
    """
    first = 5 if p.data == "subset" else 0
    numbers = [first + index for index in indices_of(p)]
    return [number for number in numbers if p.collate != "drops" or not is_bad(number)]


def indices_of(p: Pipeline) -> list[int]:
    """Return the indices of a dataset that a sampler may ask for: not that of a corrupt sample."""
    return list(range(p.count))[p.data == "corrupt" :][:: 2 if p.sampler == "subset" else 1]


def is_bad(number: int) -> bool:
    """Return True for samples that a collate function may drop: a sixth of them."""
    return number % 6 == 3
