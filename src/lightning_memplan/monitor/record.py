"""Keep the measurements of a run in bounded memory, however long it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

#: How many of the last measurements of a run are kept
LAST = 1000


class Record(Generic[T]):
    """Keep the first items, the highest by each of ``heights``, and the ``last`` ones, in their order.

    >>> record = Record[int](abs, last=3)
    >>> for item in (5, 1, -9, 2, 3, 4):
    ...     record.add(item)
    >>> record.kept, record.count
    ([5, -9, 2, 3, 4], 6)

    Args:
        heights: Functions by each of which the highest item is kept, of those after the first ones.
        first: Number of items at the beginning to keep.
        last: Number of items at the end to keep.
    """

    def __init__(self, *heights: Callable[[T], float], first: int = 1, last: int = LAST) -> None:
        self.kept: list[T] = []
        self.count = 0  #: of all items that were added
        self._heights, self._first, self._last = heights, first, last
        self._highest: list[T] = []

    def add(self, item: T) -> None:
        """Add an item; beyond the bound, drop the oldest that is neither among the first nor a highest."""
        self.count += 1
        self.kept.append(item)
        if self.count <= self._first:
            return
        if not self._highest:
            self._highest = [item] * len(self._heights)
        for place, height in enumerate(self._heights):
            if height(item) > height(self._highest[place]):
                self._highest[place] = item
        beyond = range(self._first, len(self.kept) - self._last)
        dropped = (place for place in beyond if all(self.kept[place] is not one for one in self._highest))
        if (oldest := next(dropped, None)) is not None:
            del self.kept[oldest]
