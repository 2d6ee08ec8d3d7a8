"""Loaders of all kinds, by chance: the batches that are planned for are those that training gets, and nothing moves."""

from __future__ import annotations

import collections
import dataclasses
import random
from collections import Counter, UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_memplan.data.batches import outline, tensor_bytes, tensors
from lightning_memplan.data.loaders import check_resizable, dataset_size, loaders_in, resized_loaders, yielded_size
from lightning_memplan.data.samples import read_samples
from lightning_memplan.errors import ApplyError

COUNT = 24


@dataclasses.dataclass
class Record:
    image: torch.Tensor
    name: str
    index: int
    boxes: Any = None


Pair = collections.namedtuple("Pair", "image index")


def sample(index: int) -> torch.Tensor:
    return torch.full((2, 3), float(index))


class Rows(Dataset[Any]):
    """Reads samples one by one, and counts; also those that it makes of others' keys."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return sample(int(index)), int(index)


class AtOnce(Rows):
    def __getitems__(self, indices: list[Any]) -> list[Any]:
        return [self[index] for index in indices]


class Stream(IterableDataset[Any]):
    def __init__(self, sized: bool) -> None:
        self.reads = 0
        if sized:
            self.__class__ = SizedStream

    def __iter__(self) -> Any:
        for index in range(COUNT):
            self.reads += 1
            yield sample(index), index


class SizedStream(Stream):
    def __len__(self) -> int:
        return COUNT


DATASETS: dict[str, Callable[[], Any]] = {
    "one by one": Rows,
    "at once": AtOnce,
    "a list": lambda: [(sample(index), index) for index in range(COUNT)],
    "a subset": lambda: Subset(Rows(), range(COUNT)),
    "joined": lambda: ConcatDataset([Subset(Rows(), range(10)), Subset(Rows(), range(10, COUNT))]),
    "a stream": lambda: Stream(False),
    "a stream of known length": lambda: Stream(True),
}


class Halves:
    """Yields even samples and odd ones in batches of their own: a sampler of no class of torch's."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __iter__(self) -> Any:
        for first in (0, 1):
            order = range(first, COUNT, 2)
            yield from (list(order[at : at + self.batch_size]) for at in range(0, len(order), self.batch_size))

    def __len__(self) -> int:
        return 2 * -(-COUNT // 2 // self.batch_size)


SAMPLERS: dict[str, Callable[[int], dict[str, Any]]] = {
    "in order": lambda size: {"batch_size": size},
    "dropping the last": lambda size: {"batch_size": size, "drop_last": True},
    "shuffled": lambda size: {"batch_size": size, "shuffle": True},
    "with a generator": lambda size: {
        "batch_size": size,
        "shuffle": True,
        "generator": torch.Generator().manual_seed(7),
    },
    "a part": lambda size: {"batch_size": size, "sampler": SubsetRandomSampler(range(COUNT))},
    "weighted": lambda size: {
        "batch_size": size,
        "sampler": WeightedRandomSampler([1.0] * COUNT, COUNT, replacement=False),
    },
    "reversed": lambda size: {"batch_size": size, "sampler": list(reversed(range(COUNT)))},
    "objects": lambda size: {"batch_size": size, "sampler": [np.int64(index) for index in range(COUNT)]},
    "in batches": lambda size: {"batch_sampler": BatchSampler(RandomSampler(range(COUNT)), size, False)},
    "in halves": lambda size: {"batch_sampler": Halves(size)},
    "in order, in batches": lambda size: {"batch_sampler": BatchSampler(SequentialSampler(range(COUNT)), size, True)},
}


def stacked(samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([image for image, _ in samples]), torch.tensor([index for _, index in samples])


COLLATES: dict[str, Any] = {
    "the default": None,
    "a dict": lambda samples: {"image": stacked(samples)[0], "count": len(samples)},
    "a record": lambda samples: Record(stacked(samples)[0], "train", 1, [{"box": torch.ones(2, 4)} for _ in samples]),
    "a named tuple": lambda samples: Pair(*stacked(samples)),
    "a UserDict": lambda samples: UserDict(image=stacked(samples)[0], names=[f"{index:02}" for _, index in samples]),
    "arrays": lambda samples: (stacked(samples)[0], np.zeros(len(samples)), np.array([2, 3]), None, "a name"),
    "lists": lambda samples: ([image for image, _ in samples], [index for _, index in samples]),
    "joined": lambda samples: torch.cat([image for image, _ in samples]),
    "the batch comes second": lambda samples: torch.stack([image for image, _ in samples], 1),
    "with noise": lambda samples: stacked(samples)[0] + torch.rand(()) + random.random() + np.random.rand(),
}


class Finishes(DataLoader[Any]):
    def __iter__(self) -> Any:
        return ((batch, "finished") for batch in super().__iter__())


class Marks(DataLoader[Any]):
    """Has an argument of its own, and no iterator."""

    def __init__(self, *args: Any, mark: str = "a", **kwargs: Any) -> None:
        self.mark = mark
        super().__init__(*args, **kwargs)


KINDS = {"a DataLoader": DataLoader, "one that finishes the batch": Finishes, "one that is marked": Marks}


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of loader, made anew at any batch size."""

    dataset: str
    sampler: str
    collate: str
    kind: str

    def make(self, size: int) -> DataLoader[Any]:
        options = SAMPLERS[self.sampler](size)
        return KINDS[self.kind](DATASETS[self.dataset](), collate_fn=COLLATES[self.collate], **options)


def _goes_together(kind: Kind) -> bool:
    return "stream" not in kind.dataset or kind.sampler in ("in order", "dropping the last")


kinds = st.builds(Kind, *map(st.sampled_from, (list(DATASETS), list(SAMPLERS), list(COLLATES), list(KINDS)))).filter(
    _goes_together
)
by_chance = settings(deadline=None, max_examples=80, derandomize=True, suppress_health_check=list(HealthCheck))


@by_chance
@given(kinds, st.integers(1, 12), st.integers(1, 12))
def test_the_batch_of_any_size_is_the_one_that_training_gets(kind: Kind, own: int, size: int) -> None:
    """The oracle is a loader that was made with that batch size."""
    loader, oracle = kind.make(own), next(iter(kind.make(size)))
    samples = read_samples(loader)
    assert samples.fixed is None
    assert samples.own == own
    batch = samples.batch(size)
    assert outline(batch) == outline(oracle)
    assert tensor_bytes(batch) == tensor_bytes(oracle)
    assert [t.dtype for t in tensors(batch)] == [t.dtype for t in tensors(oracle)]


@by_chance
@given(kinds, st.integers(13, 60))
def test_a_large_batch_is_alike_whether_it_is_tiled_or_collated(kind: Kind, size: int) -> None:
    samples = read_samples(kind.make(4))
    assert outline(samples.batch(size)) == outline(samples.make(size))


@by_chance
@given(kinds, st.integers(1, 12))
def test_nothing_of_the_users_moves(kind: Kind, own: int) -> None:
    loader = kind.make(own)

    def states() -> tuple[Any, ...]:
        drawn = random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
        generator = loader.generator
        return (*drawn, None if generator is None else generator.get_state().tolist(), loader.batch_size)

    before = states()
    read_samples(loader, "auto").batches()
    dataset_size(loader), yielded_size(loader)
    assert states() == before
    assert getattr(loader.dataset, "reads", 0) == 0
    assert loader._iterator is None


@by_chance
@given(kinds.filter(lambda kind: kind.collate == "the default"), st.integers(1, 12), st.integers(1, COUNT))
def test_a_size_that_can_be_set_is_had_and_no_sample_is_lost(kind: Kind, own: int, size: int) -> None:
    loader = kind.make(own)
    most = dataset_size(loader)
    size = min(size, most or size)
    try:
        check_resizable(loader, size)
    except ApplyError:
        assert kind.sampler == "in halves"
        return
    resized = resized_loaders(loader, [size])
    batches = [batch[0] if kind.kind == "one that finishes the batch" else batch for batch in resized]
    assert len(batches[0][1]) == size
    seen = Counter(int(index) for _, indices in batches for index in indices)
    drops = kind.sampler in ("dropping the last", "in order, in batches")
    assert set(seen.values()) == {1}
    assert len(seen) == (COUNT // size * size if drops else COUNT)


@by_chance
@given(st.lists(kinds, min_size=2, max_size=3), st.integers(1, 6))
def test_collections_have_a_batch_of_each(collection: list[Kind], own: int) -> None:
    source = [kind.make(own) for kind in collection]
    assert loaders_in(source) == source
    for size, batch in read_samples(source).batches():
        assert [outline(part) for part in batch] == [outline(next(iter(kind.make(size)))) for kind in collection]
