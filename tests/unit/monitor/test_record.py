"""A record is bounded, and keeps what a summary of the whole run needs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_memplan.monitor.record import Record


def kept(items: list[int], **sizes: int) -> list[int]:
    record = Record[list[int]](lambda item: abs(item[0]), lambda item: item[0], **sizes)
    for item in items:
        record.add([item])  # an object of its own, as a measurement is
    assert record.count == len(items)
    return [item for (item,) in record.kept]


def test_all_are_kept_up_to_the_bound() -> None:
    assert kept([1, 2, 3, 4], first=1, last=3) == [1, 2, 3, 4]
    assert kept([], first=1, last=3) == []


def test_beyond_it_the_oldest_goes_that_is_no_first_and_no_highest() -> None:
    assert kept([9, 1, 2, 3, 4], first=1, last=3) == [9, 2, 3, 4]
    assert kept([1, -9, 7, 2, 3, 4, 5, 6], first=1, last=3) == [1, -9, 7, 4, 5, 6]  # -9 by abs, 7 by itself
    assert kept([1, 5, 6, 7, 8, 9, 2, 2, 2], first=2, last=2) == [1, 5, 9, 2, 2]  # the highest of later ones: 9
    assert kept([3, 8, 8, 1, 1, 1], first=1, last=2) == [3, 8, 1, 1]  # the first of two that are equal


@given(st.lists(st.integers(-100, 100)), st.integers(0, 4), st.integers(1, 6))
def test_a_record_has_the_first_the_highest_and_the_last(items: list[int], first: int, last: int) -> None:
    found = kept(items, first=first, last=last)
    assert len(found) <= first + last + 2  # two heights
    assert found[:first] == items[:first]
    assert found[max(0, len(found) - last) :] == items[max(0, len(items) - last) :]
    later = items[first:]
    if later:
        assert max(found[first:]) == max(later)
        assert max(map(abs, found[first:])) == max(map(abs, later))
    rest = iter(items)
    assert all(item in rest for item in found)  # in order
