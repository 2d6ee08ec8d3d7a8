"""Copies to read from: what reading changes stays in the copy, and samples are shared."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_memplan.data.borrowed import borrowed


class Counts(Dataset):
    """A dataset that counts how often it is read, and keeps others and whatever else in attributes."""

    def __init__(self, **kept):
        self.read = 0
        self.__dict__.update(kept)

    def __getitem__(self, index):
        self.read += 1
        return index


@pytest.mark.parametrize("hold", [list, tuple, lambda parts: dict(enumerate(parts)), lambda parts: parts[0]])
def test_datasets_in_a_dataset_are_copied(hold):
    one, two = Counts(), Counts()
    whole = Counts(parts=hold([one, two]))
    parts = borrowed(whole).parts
    if isinstance(parts, Counts):
        parts = [parts]
    for part in parts.values() if isinstance(parts, dict) else parts:
        part[0]
        assert part.read == 1
    assert (one.read, two.read) == (0, 0)


def test_a_dataset_that_two_hold_is_one_in_the_copy():
    shared = Counts()
    found = borrowed(Counts(parts=[Counts(inner=shared), Counts(inner=shared)], named={"again": shared}))
    first, second = found.parts
    assert first.inner is second.inner is found.named["again"] is not shared


def test_a_dataset_that_holds_itself_is_copied_once():
    whole = Counts()
    whole.own = whole
    found = borrowed(whole)
    assert found.own is found is not whole


def test_generators_draw_apart_and_are_shared_as_before():
    generator, draws = torch.Generator().manual_seed(3), random.Random(3)
    state = generator.get_state()
    found = borrowed(Counts(generator=generator, again=generator, draws=draws))
    torch.rand(1, generator=found.generator)
    found.draws.random()
    assert torch.equal(generator.get_state(), state)
    assert draws.random() == random.Random(3).random()
    assert found.generator is found.again


def test_collections_are_copied_and_samples_are_shared():
    rows, seen, names = [torch.zeros(3)], {1}, {"a": torch.zeros(3)}
    found = borrowed(Counts(rows=rows, seen=seen, names=names))
    found.rows.append(1)
    found.seen.add(2)
    found.names["b"] = 1
    assert (len(rows), seen, list(names)) == (1, {1}, ["a"])
    assert found.rows[0] is rows[0]


def test_a_copied_loader_has_no_workers_of_the_users():
    loader = DataLoader(range(4))
    loader._iterator = workers = object()
    assert borrowed(loader)._iterator is None
    assert loader._iterator is workers


class Draws(Dataset):
    """A dataset that draws its samples from an iterator."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return next(self.rows)


@pytest.mark.parametrize("rows", [itertools.cycle(range(24)), iter(list(range(24))), itertools.count(), zip(range(24))])
def test_an_iterator_of_a_dataset_is_read_from_a_copy(rows):
    dataset = Draws(rows)
    first = [borrowed(dataset)[0] for _ in range(3)]
    assert first[0] == first[1] == first[2] == dataset[0]


@pytest.mark.parametrize(
    "rows", [(row for row in range(24)), map(int, (row for row in range(24)))], ids=["generator", "map"]
)
def test_an_iterator_that_cannot_be_copied_is_not_read(rows):
    dataset = Draws(rows)
    with pytest.raises(ValueError, match="what planning reads of it would be lost to training"):
        borrowed(dataset)[0]
    assert dataset[0] == 0
