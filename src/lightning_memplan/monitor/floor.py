"""Detect a leak in training: bytes that are left at the end of a step rise."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from math import inf

from lightning_memplan.units import MiB, format_bytes

#: Number of steps at the start of a run whose phases are always measured: what the first two allocate stays.
FIRST = 3


class Floor:
    """Detect a leak: a steady rise of the bytes that are still allocated when a step has ended.

    Only the lowest floor of every ``WINDOW`` steps counts, so that batches of varying size raise no alarm. It must rise
    from each of ``WINDOWS`` windows to the next, in all by at least 1 MiB and by more than it varies within the first.

    >>> floor = Floor()
    >>> said = [floor.add(2**30 + step * 2**20) for step in range(200)]
    >>> [step for step, text in enumerate(said) if text], said[101]
    ([101], 'memory allocated at the end of a step rises by 1.00 MiB a step ...

    A rise that would run out of memory in this epoch is said as soon as ``SOON`` steps show it.
    """

    WINDOW = 16
    WINDOWS = 6
    SOON = 10

    def __init__(self) -> None:
        self._window: list[int] = []
        self._length = 2 * FIRST + self.WINDOW  # the first steps add gradients and optimizer state, which is no leak
        self._lows: list[int] = []
        self._spread = 0
        self._said = False
        self._last: deque[int] = deque(maxlen=self.SOON + 1)
        self._steps = 0

    def add(self, floor: int, room: int | None = None, left: float = inf) -> str | None:
        """Add the floor of one step; return one sentence once the rise is certain, and only once.

        Args:
            floor: Bytes that are still allocated when the step has ended.
            room: Bytes that the step would have had beyond its peak; None where that is not known.
            left: Number of steps left in this epoch, after which a metric may let go of what it keeps.
        """
        if self._said:
            return None
        self._steps += 1
        if self._steps > 2 * FIRST:  # the first steps add gradients and optimizer state, which is no leak
            self._last.append(floor)
        if room is not None and (text := self._soon(room, left)):
            self._said = True
            return text
        self._window.append(floor)
        if len(self._window) < self._length:
            return None
        window, self._window, self._length = self._window[-self.WINDOW :], [], self.WINDOW
        low = min(window)
        if not self._lows or low <= self._lows[-1]:
            self._lows, self._spread = [], max(window) - low
        self._lows.append(low)
        rise = low - self._lows[0]
        if len(self._lows) < self.WINDOWS or rise < max(MiB, self._spread):
            return None
        self._said = True
        rate = rise / ((len(self._lows) - 1) * self.WINDOW)
        return (
            f"memory allocated at the end of a step rises by {format_bytes(round(rate))} a step (over the last "
            f"{len(self._lows) * self.WINDOW}): something keeps tensors from step to step, such as a list of losses "
            "that were not detached"
        )

    def _soon(self, room: int, left: float) -> str:
        """Return a sentence on a rise that runs out of memory within the steps that are left; "" where none does."""
        floors = list(self._last)
        rises = [after - before for before, after in pairwise(floors)]
        if len(rises) < self.SOON or min(rises) <= 0 or 2 * min(rises) < max(rises):  # not steady
            return ""
        rate = (floors[-1] - floors[0]) // self.SOON
        if rate * left <= room:
            return ""
        return (
            f"memory allocated at the end of a step rises by {format_bytes(rate)} a step (over the last {self.SOON}), "
            f"and runs out in {max(0, room) // rate} steps: something keeps tensors from step to step, such as a list "
            "of losses that were not detached"
        )
