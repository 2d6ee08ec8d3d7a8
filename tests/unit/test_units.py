"""Bytes as text, and back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_memplan.units import format_bytes, gib, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24 gib", 24 * 2**30),
        ("24 GB", 24 * 10**9),
        ("80gb", 80 * 10**9),
        ("1.5MiB", 3 * 2**19),
        ("512 KiB", 2**19),
        ("3 kb", 3000),
        ("2 TiB", 2**41),
        ("1 TB", 10**12),
        ("7 B", 7),
        (" 512 ", 512),
        ("25_446_711_296", 25_446_711_296),
        (0, 0),
        (17, 17),
    ],
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "value",
    ["", "GiB", "24 GiBs", "24 G", "-1 GiB", "1e9", "nan", "1,5 GiB", "1.GiB", ".5GiB", -1, 1.5, True, None, b"1"],
)
def test_what_is_no_size_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"not a size|negative"):
        parse_bytes(value)


@given(st.integers(0, 2**80))
def test_whole_bytes_are_read_exactly(size: int) -> None:
    assert parse_bytes(str(size)) == parse_bytes(f"{size} B") == parse_bytes(size) == size


@given(st.integers(0, 2**40))
def test_whole_units_are_read_exactly(count: int) -> None:
    assert parse_bytes(f"{count}GiB") == count * 2**30
    assert parse_bytes(f"{count} GB") == count * 10**9


@given(st.integers(0, 2**50))
def test_text_comes_back_to_within_its_last_digit(size: int) -> None:
    # two digits after the point: at most half a hundredth of the unit is lost
    text = format_bytes(size)
    unit = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}[text.split()[1]]
    assert abs(parse_bytes(text) - size) <= unit / 200 + 1


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (2**20, "1.00 MiB"),
        (2**30, "1.00 GiB"),
        (2**30 - 1, "1.00 GiB"),
        (2**20 - 1, "1.00 MiB"),
        (-(3 * 2**29), "-1.50 GiB"),
        (2**40, "1024.00 GiB"),
    ],
)
def test_bytes_are_written_in_a_unit_that_reads_well(size: int, text: str) -> None:
    assert format_bytes(size) == text


def test_gib_is_a_power_of_two() -> None:
    assert gib(2**30) == 1.0
    assert gib(0) == 0.0
