"""Batches of every type, and collate functions."""

from __future__ import annotations

import dataclasses
from collections import UserDict, UserList, namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pack_sequence, pad_sequence
from torch.utils.data import (
    DataLoader,
)

from benchmarks.robustness.job import WIDTH, Net, Rows, job, loader
from benchmarks.robustness.jobs.loaders import on

BATCHES = "batches of every type"
COLLATES = "collate functions"


Pair = namedtuple("Pair", "x y")


class Typed(NamedTuple):
    x: Any
    label: Any = 0


@dataclasses.dataclass
class Sample:
    x: Any
    name: str = "a"


class Plain:
    def __init__(self, x: Any) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)


class Of(Rows):
    """Samples by the function given."""

    def __init__(self, sample: Callable[[int], Any]) -> None:
        super().__init__()
        self.sample = sample

    def __getitem__(self, index: int) -> Any:
        return self.sample(index)


ROW = torch.ones(WIDTH)


def of(name: str, sample: Callable[[int], Any], rows: Callable[[Any], Any], collate: Any = None) -> None:
    on(BATCHES, name, lambda: loader(Of(sample), collate_fn=collate), rows)


of("named_tuples", lambda n: Pair(ROW, n), lambda batch: batch.x)
of("typed_tuples", lambda n: Typed(ROW, n), lambda batch: batch.x)
of(
    "user_dictionaries",
    lambda n: UserDict(x=ROW),
    lambda b: b["x"],
    lambda s: UserDict(x=torch.stack([i["x"] for i in s])),
)
of("user_lists", lambda n: ROW, lambda batch: batch[0], lambda s: UserList([torch.stack(s)]))
of("dataclasses", lambda n: Sample(ROW), lambda batch: batch.x, lambda s: Sample(torch.stack([i.x for i in s])))
of("numpy_samples", lambda n: np.ones(WIDTH, np.float32), lambda batch: batch)
of(
    "numpy_batches",
    lambda n: ROW,
    lambda batch: torch.as_tensor(batch[0]).cuda(),
    lambda s: (np.stack(s), np.array([1, 2])),
)
of("strings_and_numbers", lambda n: {"x": ROW, "text": "a" * n, "n": n, "p": 0.5, "t": (n, "b")}, lambda b: b["x"])
of(
    "none_in_the_batch",
    lambda n: ROW,
    lambda batch: batch["x"],
    lambda s: {"x": torch.stack(s), "mask": None, "ids": [None]},
)
of("objects_without_to", lambda n: ROW, lambda batch: batch.x.cuda(), lambda s: Plain(torch.stack(s)))
of("list_of_tensors", lambda n: ROW, torch.stack, list)
of("list_of_dictionaries", lambda n: {"x": ROW, "n": n}, lambda batch: torch.stack([i["x"] for i in batch]), list)
of("list_of_tuples", lambda n: (ROW, {"n": torch.tensor(n)}), lambda b: torch.stack([i[0] for i in b]), list)
of("nested_dictionaries", lambda n: {"in": {"x": ROW, "m": [ROW, ROW]}, "out": {}}, lambda batch: batch["in"]["x"])
of(
    "scalars_beside",
    lambda n: ROW,
    lambda batch: batch[0],
    lambda s: [torch.stack(s), torch.tensor(0.5), 3, torch.Size([2])],
)
of("empty_tensors", lambda n: (ROW, torch.zeros(0)), lambda batch: batch[0])
of("batch_in_the_second_dimension", lambda n: ROW, lambda batch: batch["x"].T, lambda s: {"x": torch.stack(s, 1)})
of(
    "boxes_of_several_lengths",
    lambda n: (ROW, torch.ones(1 + n % 4, 4)),
    lambda b: torch.stack(b[0]),
    lambda s: tuple(zip(*s, strict=True)),
)
of("packed_sequences", lambda n: torch.ones(1 + n % 5, WIDTH), lambda b: b["x"], lambda s: packed(s))
of("padded_with_lengths", lambda n: torch.ones(1 + n % 7, WIDTH), lambda b: b[0].mean(1), lambda s: padded(s))
of(
    "huge_objects_of_text",
    lambda n: {"x": ROW, "tokens": [str(k) for k in range(n)]},
    lambda b: b["x"],
    lambda s: texts(s),
)
of(
    "enums_and_paths",
    lambda n: ROW,
    lambda b: b["x"],
    lambda s: {"x": torch.stack(s), "path": __file__, "dtype": torch.float},
)


def packed(samples: Any) -> Any:
    return {"x": torch.stack([s[0] for s in samples]), "packed": pack_sequence(samples, enforce_sorted=False)}


def padded(samples: Any) -> Any:
    return pad_sequence(samples, batch_first=True), torch.tensor([len(s) for s in samples])


def texts(samples: Any) -> Any:
    return {"x": torch.stack([s["x"] for s in samples]), "tokens": [s["tokens"] for s in samples]}


# ------------------------------------------------------------------------------------------------------ collates


class Counter:
    """A callable object with a count of its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, samples: Any) -> Any:
        self.calls += 1
        return torch.stack(samples)


class ByMethod(Rows):
    def collate(self, samples: Any) -> Any:
        return torch.stack(samples) * self.count


def in_pairs(samples: Any) -> Any:
    if len(samples) % 2:
        raise ValueError("pairs need an even number of samples")
    return torch.stack(samples)


def with_negatives(samples: Any) -> Any:
    if len(samples) < 2:
        raise ValueError("a negative needs another sample")
    return torch.stack(samples)


def of_one_size(samples: Any) -> Any:
    assert len(samples) in (4, 2), len(samples)
    return torch.stack(samples)


def drops_broken(samples: Any) -> Any:
    return torch.stack([s for s in samples if s is not None])


def two_views(samples: Any) -> Any:
    return torch.cat([torch.stack(samples), torch.stack(samples)])


def draws_size(samples: Any) -> Any:
    return torch.ones(len(samples), int(torch.randint(1, 5, ())), WIDTH)


def packs_tokens(samples: Any) -> Any:
    return torch.cat(samples)[None]


on(COLLATES, "callable_object", lambda: loader(collate_fn=Counter()))
on(COLLATES, "method_of_the_dataset", lambda: loader(ByMethod(), collate_fn=ByMethod().collate))
on(COLLATES, "even_numbers_only", lambda: loader(collate_fn=in_pairs))
on(COLLATES, "at_least_two", lambda: loader(collate_fn=with_negatives))
on(COLLATES, "fixed_sizes_only", lambda: loader(Rows(22), collate_fn=of_one_size))
on(COLLATES, "drops_broken_samples", lambda: loader(Of(lambda n: ROW if n % 3 else None), collate_fn=drops_broken))
on(COLLATES, "two_views_of_each", lambda: loader(collate_fn=two_views), lambda batch: batch.chunk(2)[0])
on(COLLATES, "draws_a_size", lambda: loader(collate_fn=draws_size), samples="same")
on(
    COLLATES,
    "packs_into_one_row",
    lambda: loader(Of(lambda n: torch.ones(1, WIDTH)), collate_fn=packs_tokens),
    lambda batch: batch[0],
    "same",
)
on(COLLATES, "item_is_a_batch", lambda: loader(Of(lambda n: torch.ones(5, WIDTH)), 1, collate_fn=lambda s: s[0]))


@job(COLLATES)
def collate_of_the_module() -> Any:
    class Collates(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn_scale()

        def collate(self, samples: Any) -> Any:
            return torch.stack(samples) * self.scale

        def train_dataloader(self) -> Any:
            return DataLoader(Rows(), batch_size=self.batch_size, collate_fn=self.collate)

    return Collates()


def nn_scale() -> float:
    return 2.0
