"""The search: what it returns was asked, the next larger was refused, and it asks few times."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_memplan.memory.search import (
    SearchResult,
    SizeLimits,
    lacking,
    largest_dividing,
    largest_fitting,
    largest_suited,
)

positive = st.integers(1, 10**6)
optional = st.none() | positive


@given(
    limit=st.integers(0, 10**7), low=st.integers(1, 5000), multiple=st.integers(1, 300), high=optional, samples=optional
)
def test_the_largest_is_found_and_the_reason_named(limit, low, multiple, high, samples):
    asked: dict[int, bool] = {}

    def fits(batch_size: int) -> bool:
        assert batch_size not in asked, "asked twice"
        asked[batch_size] = batch_size <= limit
        return asked[batch_size]

    limits = [x for x in (high, samples) if x is not None]
    smallest = -(-low // multiple) * multiple
    largest = min(limits, default=10**12) // multiple * multiple
    if largest < smallest:
        with pytest.raises(ValueError, match="no batch size is at least"):
            largest_fitting(fits, SizeLimits(low, high, samples, multiple))
        return
    found = largest_fitting(fits, SizeLimits(low, high, samples, multiple))
    assert found.tried == len(asked)
    if limit < smallest:
        assert found == SearchResult(0, "memory", 1)
        return
    assert asked[found.batch_size]  # what is returned was itself asked
    assert found.batch_size % multiple == 0
    assert found.batch_size == min(limit // multiple * multiple, largest)
    if found.limited_by == "memory":
        assert asked[found.batch_size + multiple] is False  # and so was the next
    else:
        assert found.limited_by == (
            "dataset" if samples is not None and samples <= (high or samples) else "max_batch_size"
        )
        assert found.batch_size == largest
    # doubling from the smallest, then halving what lies between: at most twice the logarithm, and a few
    assert found.tried <= 2 * math.log2(found.batch_size / multiple + 1) + 3


@given(limit=st.integers(0, 10**6), near=st.integers(0, 10**6), low=st.integers(1, 100), high=optional)
def test_a_search_from_nearby_finds_the_same(limit, near, low, high):
    high = None if high is None else high + low
    asked: list[int] = []

    def fits(batch_size: int) -> bool:
        assert batch_size not in asked, "asked twice"
        asked.append(batch_size)
        return batch_size <= limit

    found = largest_fitting(fits, SizeLimits(low, high), near)
    assert found.tried == len(asked)
    plain = largest_fitting(lambda n: n <= limit, SizeLimits(low, high))
    assert (found.batch_size, found.limited_by) == (plain.batch_size, plain.limited_by)


def test_what_fits_need_not_be_one_interval():
    """A replay can refuse a size and take a larger one: the returned size still was itself found to fit."""
    asked = {}

    def fits(n):
        asked[n] = n <= 40 or n in (44, 45, 50)
        return asked[n]

    found = largest_fitting(fits)
    assert asked[found.batch_size]
    assert asked[found.batch_size + 1] is False


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_batch_size": 64}, (64, "max_batch_size")),
        ({"dataset_size": 64}, (64, "dataset")),
        ({"max_batch_size": 64, "dataset_size": 48}, (48, "dataset")),
        ({"max_batch_size": 32, "dataset_size": 48}, (32, "max_batch_size")),
        ({"max_batch_size": 60, "multiple_of": 8}, (56, "max_batch_size")),
        ({"max_batch_size": 2000}, (1000, "memory")),
        ({"multiple_of": 64}, (960, "memory")),
        ({"min_batch_size": 1000}, (1000, "memory")),
        ({"min_batch_size": 1001}, (0, "memory")),
        ({"min_batch_size": 7, "max_batch_size": 7}, (7, "max_batch_size")),
    ],
    ids=str,
)
def test_each_limit_is_kept_and_named(limits, expected):
    found = largest_fitting(lambda n: n <= 1000, SizeLimits(**limits))
    assert (found.batch_size, found.limited_by) == expected


@pytest.mark.parametrize("name", ["min_batch_size", "max_batch_size", "dataset_size", "multiple_of"])
@pytest.mark.parametrize("value", [-1, 1.5, "8", True])
def test_limits_that_are_no_numbers_of_samples(name, value):
    with pytest.raises(ValueError, match=f"{name} is a number of samples, an int of at least 1, not {value!r}"):
        largest_fitting(lambda n: True, SizeLimits(**{name: value}))


def test_an_empty_dataset_is_rejected():
    with pytest.raises(ValueError, match="the dataset has length 0: there is nothing to make a batch of"):
        largest_fitting(lambda n: True, SizeLimits(dataset_size=0))


def test_a_prediction_that_never_refuses():
    with pytest.raises(ValueError, match=r"every batch size fits: .*; name a max_batch_size"):
        largest_fitting(lambda n: True)


@given(
    limit=st.integers(0, 5000),
    whole=st.integers(1, 4000),
    low=st.integers(1, 50),
    multiple=st.integers(1, 6),
    high=optional,
    samples=optional,
)
def test_the_largest_divisor_is_found(limit, whole, low, multiple, high, samples):
    asked: dict[int, bool] = {}

    def fits(batch_size: int) -> bool:
        assert batch_size not in asked, "asked twice"
        asked[batch_size] = batch_size <= limit
        return asked[batch_size]

    limits = SizeLimits(low, high, samples, multiple)
    most = min(whole, high or whole, samples or whole)
    allowed = [n for n in range(low, most + 1) if whole % n == 0 and n % multiple == 0]
    if not allowed:
        with pytest.raises(ValueError, match=f"no batch size divides {whole}, is at least {low}, at most {most}"):
            largest_dividing(fits, whole, limits)
        return
    found = largest_dividing(fits, whole, limits)
    assert found.tried == len(asked) <= math.log2(len(allowed)) + 2
    assert found.batch_size == max((n for n in allowed if n <= limit), default=0)
    if found.limited_by == "memory":  # the next larger divisor was asked
        assert asked[min(n for n in allowed if n > found.batch_size)] is False
    else:
        assert found.batch_size == allowed[-1]
        assert (found.limited_by == "effective_batch_size") == (most == whole)


def test_the_whole_is_asked_first():
    """With accumulation a step takes more memory: a batch of 8 may fit where twice 4 do not."""
    assert largest_dividing(lambda n: n == 8, 8) == SearchResult(8, "effective_batch_size", 1)
    assert largest_dividing(lambda n: False, 7) == SearchResult(0, "memory", 2)  # 7, then 1


@given(st.integers(2, 5000), st.integers(1, 40), st.integers(1, 20), st.integers(1, 5000), st.sampled_from([1, 32, 60]))
def test_what_suits_is_asked_itself(below, low, multiple, most, like):
    asked: dict[int, bool] = {}

    def suits(batch_size: int) -> bool:
        assert batch_size not in asked, "asked twice"
        assert low <= batch_size < below
        assert batch_size % multiple == 0
        asked[batch_size] = batch_size <= most
        return asked[batch_size]

    found = largest_suited(suits, below, min_batch_size=low, multiple_of=multiple, like=like)
    allowed = [n for n in range(multiple, below, multiple) if low <= n <= most]
    assert found == max((n for n, good in asked.items() if good), default=0)
    assert len(asked) <= 4 * below.bit_length() + 6
    if allowed:  # no more than a 32nd is open
        assert found >= allowed[-1] * 31 // 32 - multiple


@pytest.mark.parametrize("part", [2, 4, 8, 16, 32])
def test_the_largest_multiple_of_a_power_of_two_suits(part):
    assert largest_suited(lambda n: n % part == 0, 1001) == 1000 // part * part
    assert largest_suited(lambda n: 2**20 % n == 0, 1001) == 512


def test_a_size_that_suits_divides_the_whole_and_keeps_the_limits():
    # divisors of 120 are 60, 40, 30, 24, 20, ...
    assert largest_suited(lambda n: True, 61, whole=120) == 60
    assert largest_suited(lambda n: True, 60, whole=120) == 40
    assert largest_suited(lambda n: True, 61, whole=120, multiple_of=8) == 40
    assert largest_suited(lambda n: n != 40, 61, whole=120, multiple_of=8) == 24
    assert largest_suited(lambda n: n < 20, 61, whole=120, min_batch_size=20) == 0


def test_as_many_bytes_are_cut_as_were_missing_at_least():
    # of 3200 predicted bytes: what was missing, what was not reached, or a 32nd; doubled with each attempt
    assert lacking(3200, reserved=3200, missing=500, attempt=0) == 500
    assert lacking(3200, reserved=3100, missing=10, attempt=0) == 100
    assert lacking(3200, reserved=3190, missing=10, attempt=1) == 200
    assert lacking(3200, reserved=3200, missing=3000, attempt=0) == 2400
