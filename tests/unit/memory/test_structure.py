"""A hash of what makes two runs comparable."""

from __future__ import annotations

from lightning_memplan.memory.structure import structure_hash


class Named:
    """Something whose text has its address."""


def test_a_hash_is_twelve_digits_whatever_the_addresses():
    found = structure_hash([Named(), 3])
    assert found == structure_hash([Named(), 3])
    assert len(found) == 12
    assert set(found) <= set("0123456789abcdef")


def test_parts_are_told_apart_and_are_in_order():
    alike = [["ab", "c"], ["a", "bc"], ["c", "ab"], ["ab", "c", ""], ["ab"], []]
    assert len({structure_hash(parts) for parts in alike}) == len(alike)
