"""Batches of any leaves: what can be tiled from a few samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from lightning_memplan.data.batches import batch_size_of, part_count, tensors
from lightning_memplan.data.tiling import tiling

SIZES = (2, 3, 5)


class Unequal:
    """A leaf whose comparison raises."""

    def __eq__(self, other: object) -> bool:
        raise TypeError("not comparable")

    __hash__ = object.__hash__


KEPT = Unequal()


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        (lambda n: np.array([1000, 1]), True),  # the same array at each size
        (lambda n: np.zeros(n), True),
        (lambda n: np.zeros(n + 1), False),
        (lambda n: "a name", True),
        (lambda n: None, True),
        (lambda n: KEPT, True),  # one object
        (lambda n: Unequal(), False),
        (lambda n: float(n), False),
    ],
)
def test_a_leaf_that_is_no_tensor_is_kept_where_it_is_alike_at_each_size(leaf: Any, expected: bool) -> None:
    made = tiling([(n, {"x": torch.zeros(n, 3), "other": leaf(n)}) for n in SIZES])
    assert (made is not None) is expected


def test_a_dataclass_that_checks_what_it_is_made_of_tells_its_tensors():
    @dataclass
    class Checked:
        image: torch.Tensor

        def __setattr__(self, name, value):
            assert isinstance(value, torch.Tensor), f"{name} is no tensor"
            super().__setattr__(name, value)

    batch = Checked(torch.zeros(4, 3))
    assert [tensor.shape for tensor in tensors(batch)] == [(4, 3)]
    assert batch_size_of(batch) == 4


def test_a_number_as_a_tensor_is_moved_as_it_is() -> None:
    made = tiling([(n, {"x": torch.zeros(n, 3), "scale": torch.tensor(2.0)}) for n in SIZES])
    assert made is not None


def test_parts_are_counted_in_containers_and_dataclasses() -> None:
    @dataclass
    class Pair:
        image: torch.Tensor
        names: list[str]

    assert part_count(Pair(torch.zeros(3), ["a", "b"])) == 3
    assert part_count({"pair": Pair(torch.zeros(3), []), "other": (1, 2)}) == 3
    assert part_count(Pair) == 1  # the class itself
