"""Limits: the sizes that they allow, and the sets of limits that allow none."""

from __future__ import annotations

import pytest

import lightning_memplan as mp
from lightning_memplan.planning.limits import Limits

CARD = mp.Device("a card", total=1000, context=200)


@pytest.mark.parametrize("name", ["min_batch_size", "max_batch_size", "multiple_of", "effective_batch_size"])
@pytest.mark.parametrize("value", [0, 2.0, True])
def test_a_size_is_an_int_of_at_least_one(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is an int of at least 1, not {value}$"):
        Limits(**{name: value})
    assert getattr(Limits(**{name: 1}), name) == 1


def test_a_margin_is_a_part():
    with pytest.raises(ValueError, match=r"^margin is the part of the device's memory .* not 1$"):
        Limits(1)


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (
            {"min_batch_size": 9, "max_batch_size": 8},
            "no batch size is at least 9 and at most 8: min_batch_size is above max_batch_size",
        ),
        (
            {"min_batch_size": 5, "max_batch_size": 7, "multiple_of": 4},
            "no batch size from 5 to 7 is a multiple of 4: lower multiple_of",
        ),
        (
            {"min_batch_size": 9, "effective_batch_size": 8},
            "min_batch_size=9 is above effective_batch_size=8, of which it is a part",
        ),
    ],
)
def test_limits_that_no_size_meets_are_refused(limits, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        Limits(**limits).check()


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"min_batch_size": 8, "max_batch_size": 8},
        {"min_batch_size": 5, "max_batch_size": 8, "multiple_of": 4},
        {"min_batch_size": 8, "effective_batch_size": 8},
        {"min_batch_size": 9, "multiple_of": 4},
    ],
)
def test_limits_that_a_size_meets_are_not_refused(limits):
    Limits(**limits).check()


@pytest.mark.parametrize(
    ("limits", "largest"),
    [({}, None), ({"max_batch_size": 9}, 9), ({"samples": 7}, 7), ({"max_batch_size": 9, "samples": 7}, 7)],
)
def test_the_largest_size_is_the_least_of_both_limits(limits, largest):
    assert Limits(**limits).largest == largest


@pytest.mark.parametrize(
    ("limits", "share", "smallest"),
    [
        ({}, None, 1),
        ({"min_batch_size": 8, "multiple_of": 4}, None, 8),
        ({"min_batch_size": 9, "multiple_of": 4}, None, 12),
        ({"effective_batch_size": 30}, 30, 1),
        ({"effective_batch_size": 30, "min_batch_size": 7}, 30, 10),  # 1, 2, 3, 5, 6, 10, 15, 30 divide it
        ({"effective_batch_size": 30, "ranks": 2, "min_batch_size": 7}, 15, 15),
        ({"effective_batch_size": 30, "multiple_of": 4}, 30, 4),  # no multiple of 4 divides it: said in the search
        ({"effective_batch_size": 28, "multiple_of": 4, "min_batch_size": 5}, 28, 28),
    ],
)
def test_the_smallest_size_divides_each_ranks_share(limits, share, smallest):
    assert (Limits(**limits).share, Limits(**limits).smallest) == (share, smallest)


def test_a_budget_is_the_capacity_less_the_margin_unless_it_is_named():
    assert Limits(0.25).budget_of(CARD) == 600  # of 1000 less 200
    assert Limits(0.3).budget_of(mp.Device("a card", total=11)) == 7  # rounded down from 7.7
    assert Limits(0.25, budget=777).budget_of(CARD) == 777
    assert Limits(0.25, budget=0).budget_of(CARD) == 0


def test_one_size_alone_is_allowed_whatever_the_samples():
    limits = Limits(0.25, 3, 9, 3, 30, samples=5, ranks=2, budget=7, failed=4)
    assert limits.exactly(50) == Limits(0.25, 50, 50, 1, 30, ranks=2, budget=7, failed=4)
