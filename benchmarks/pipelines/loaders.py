"""Samplers, collate functions and loaders of a pipeline."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pytorch_lightning.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from benchmarks.pipelines.choose import Pipeline
from benchmarks.pipelines.datasets import (
    ROWS_OF_SECOND,
    SECOND,
    Key,
    Rows,
    dataset_of,
    indices_of,
    is_bad,
    length_of,
    numbers_in,
    open_file,
    packed,
    row_of,
)


# ---------------------------------------------------------------------------------------------------- collate functions
def own(batch: str, samples: list[Any]) -> Any:
    """Make a batch of a kind: rows stacked, or sequences padded."""
    return packed(batch, [row_of(sample) for sample in samples])


def even(batch: str, samples: list[Any]) -> Any:
    if len(samples) % 2:
        raise ValueError(f"pairs need an even number of samples, not {len(samples)}")
    return own(batch, samples)


def drops(batch: str, samples: list[Any]) -> Any:
    """Leave bad samples out."""
    there = [sample for sample in samples if sample is not None]
    return own(batch, [sample for sample in there if not is_bad(numbers_in(row_of(sample).reshape(1, -1))[0])])


def collate_of(p: Pipeline) -> Callable[[list[Any]], Any] | None:
    functions = {"own": own, "padding": own, "even": even, "drops": drops}
    return partial(functions[p.collate], p.batch) if p.collate in functions else None


# ------------------------------------------------------------------------------------------------------------ samplers
class Keys(Sampler[Any]):
    """Yields tuples or objects in place of indices."""

    def __init__(self, indices: list[int], make: Callable[[int], Any]) -> None:
        self.indices, self.make = indices, make

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Any]:
        return map(self.make, random.sample(self.indices, len(self.indices)))


class ByLength(Sampler[list[int]]):
    """Batches of similar lengths, in random order."""

    def __init__(self, indices: list[int], batch_size: int, drop_last: bool) -> None:
        self.indices, self.batch_size, self.drop_last = sorted(indices, key=length_of), batch_size, drop_last

    def __len__(self) -> int:
        whole, rest = divmod(len(self.indices), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        starts = [place * self.batch_size for place in range(len(self))]
        for start in random.sample(starts, len(starts)):
            yield self.indices[start : start + self.batch_size]


class ByTokens(Sampler[list[int]]):
    """As many samples in a batch as have ``tokens`` together."""

    def __init__(self, indices: list[int], tokens: int) -> None:
        self.batches: list[list[int]] = []
        room = 0
        for index in indices:
            if room < length_of(index):
                self.batches.append([])
                room = max(tokens, length_of(index))
            self.batches[-1].append(index)
            room -= length_of(index)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def sampling_of(p: Pipeline, batch_size: int) -> dict[str, Any]:
    """Return the arguments of a loader that say which samples are in a batch."""
    indices, each = indices_of(p), {"batch_size": batch_size, "drop_last": p.drop_last}
    if p.data == "batched_stream":
        return {"batch_size": None}
    if p.streams:
        return each
    if p.sampler == "batches":
        return {"batch_sampler": BatchSampler(SubsetRandomSampler(indices), batch_size, p.drop_last)}
    if p.sampler == "own_batches":
        return {"batch_sampler": ByLength(indices, batch_size, p.drop_last)}
    if p.sampler == "tokens":
        return {"batch_sampler": ByTokens(indices, 3 * batch_size)}
    if p.sampler == "bulk":
        return {"batch_size": None, "sampler": BatchSampler(SubsetRandomSampler(indices), batch_size, p.drop_last)}
    if p.sampler == "weighted":
        weights = [1.0 + index % 3 if index in indices else 0.0 for index in range(p.count)]
        return {**each, "sampler": WeightedRandomSampler(weights, len(indices))}
    if p.sampler == "replacement":
        return {**each, "sampler": RandomSampler(indices, replacement=True, num_samples=len(indices))}
    if p.sampler == "subset" or (p.sampler == "shuffle" and p.data == "corrupt"):
        return {**each, "sampler": SubsetRandomSampler(indices)}
    if p.sampler == "distributed":
        return {**each, "sampler": DistributedSampler(indices, num_replicas=1, rank=0)}  # type: ignore[arg-type]
    if p.sampler == "tuples":
        return {**each, "sampler": Keys(indices, lambda index: (index, "flipped"))}
    if p.sampler == "objects":
        return {**each, "sampler": Keys(indices, Key)}
    if p.data == "corrupt":
        return {**each, "sampler": indices}
    return {**each, "shuffle": p.sampler == "shuffle"}


# ------------------------------------------------------------------------------------------------------------- loaders
class Finishing(DataLoader[Any]):
    """Its own ``__iter__`` passes each batch on."""

    def __iter__(self) -> Any:
        yield from super().__iter__()


class OwnLength(DataLoader[Any]):
    """Counts its batches itself, by its batch size."""

    def __len__(self) -> int:
        assert self.batch_size is not None
        whole, rest = divmod(len(self.sampler if hasattr(self.sampler, "__len__") else self.dataset), self.batch_size)  # type: ignore[arg-type]
        return whole + (rest > 0 and not self.drop_last)


class KeepsSize(DataLoader[Any]):
    """Keeps its batch size once more, and looks at it in its own ``__iter__``."""

    def __init__(self, dataset: Any, batch_size: int = 1, **options: Any) -> None:
        self.size = batch_size
        super().__init__(dataset, batch_size=batch_size, **options)

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            assert self.size == self.batch_size
            yield batch


class Hides(DataLoader[Any]):
    """Has none of a DataLoader's arguments."""

    def __init__(self, p: Pipeline, size: int) -> None:
        super().__init__(dataset_of(p, size), collate_fn=collate_of(p), **sampling_of(p, size))


class Background(DataLoader[Any]):
    """Reads ahead in a thread, as ``prefetch_generator`` does."""

    def __iter__(self) -> Any:
        ahead: queue.Queue[Any] = queue.Queue(2)

        def read() -> None:
            for batch in super(Background, self).__iter__():
                ahead.put(batch)
            ahead.put(None)

        threading.Thread(target=read, daemon=True).start()
        return iter(ahead.get, None)


class Wrapper:
    """Is no DataLoader, and has one."""

    def __init__(self, inner: DataLoader[Any]) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Any]:
        yield from self.inner


class UnsizedWrapper:
    """Has a loader whose length is not known."""

    def __init__(self, inner: DataLoader[Any]) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[Any]:
        yield from self.inner


def loader_of(p: Pipeline, batch_size: int) -> Any:
    """Return the training loaders of a pipeline."""
    first = _single(p, batch_size)
    if not p.combined:
        return first
    size = {"double": 2 * batch_size, "half": max(1, batch_size // 2), "equal": batch_size}[p.second]
    second = DataLoader(Rows(ROWS_OF_SECOND, p.leaf, first=SECOND), batch_size=size, collate_fn=collate_of(p))
    if p.combined == "list":
        return [first, second]
    named = {"a": first, "b": second}
    return named if p.combined == "dict" else CombinedLoader(named, p.combined)  # type: ignore[arg-type]


def _single(p: Pipeline, batch_size: int) -> Any:
    if p.loader == "hides":
        return Hides(p, batch_size)
    kinds = {"finishing": Finishing, "own_length": OwnLength, "keeps_size": KeepsSize, "background": Background}
    made = kinds.get(p.loader, DataLoader)(
        dataset_of(p, batch_size),
        collate_fn=collate_of(p),
        num_workers=p.workers,
        persistent_workers=p.persistent,
        pin_memory=p.pinned,
        worker_init_fn=open_file if p.worker_init else None,
        **sampling_of(p, batch_size),
    )
    if p.loader == "wrapper":
        return (UnsizedWrapper if p.streams and p.data != "sized_stream" else Wrapper)(made)
    return made


def validation_loader_of(p: Pipeline) -> DataLoader[Any]:
    return DataLoader(Rows(8, p.leaf), batch_size=4, collate_fn=collate_of(p))
