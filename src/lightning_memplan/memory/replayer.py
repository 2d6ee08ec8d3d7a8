"""Replay one program at any batch size, each replay once."""

from __future__ import annotations

from functools import cached_property

from lightning_memplan.cuda.workspaces import Choice
from lightning_memplan.memory.allocator import Replay, replay
from lightning_memplan.memory.allocator_settings import AllocatorSettings
from lightning_memplan.memory.events import Event
from lightning_memplan.memory.heap import Move
from lightning_memplan.memory.program import Program
from lightning_memplan.types import Peaks

_DEFAULT = AllocatorSettings()


class Replayer:
    """Replays of one program under one allocator's settings, kept by batch size, capacity and workspaces.

    A replay goes on beyond the recorded steps, until these leave what they find (``Program.at_steady_state``).

    >>> from lightning_memplan.memory.events import Trace
    >>> from lightning_memplan.memory.program import scale
    >>> replayer = Replayer(scale([Trace(n, (Event(0, n * 2**20, step=1),)) for n in (2, 3)]))
    >>> replayer.replay(40).peak_allocated // 2**20, replayer.replay(40) is replayer.replay(40)
    (40, True)
    """

    def __init__(self, program: Program, settings: AllocatorSettings = _DEFAULT) -> None:
        self.program = program
        self.settings = settings
        self._replays: dict[tuple[int, int | None, Choice], Replay] = {}

    @cached_property
    def steady(self) -> Program:
        """The program as it is replayed: with more of its last steps."""
        return self.program.at_steady_state()

    @cached_property
    def _phases(self) -> tuple[int, ...]:
        return self.steady.phases()

    def knows(self, batch_size: int) -> bool:
        """Return False for larger batches of a program that was recorded at one sample, the most that ran."""
        return self.program.batch_sizes != (1,) or batch_size <= 1

    def replay(self, batch_size: int, capacity: int | None = None, workspaces: Choice = "low") -> Replay:
        """Replay the program at a batch size; ``peaks`` are those of each step's phases.

        Raises:
            ValueError: the program was recorded at one sample, and the batch size is larger.
        """
        if not self.knows(batch_size):
            raise ValueError(
                f"nothing is known of batch size {batch_size}: a probe of 2 samples ran out of memory, and one sample "
                "does not tell how memory grows; ask for method='trace'"
            )
        key = (batch_size, capacity, workspaces)
        if key not in self._replays:
            entries = self.steady.at(batch_size, workspaces)
            self._replays[key] = replay(entries, capacity, self.settings, marks=self._phases[1:-1])
        return self._replays[key]

    def live_bytes_fit(self, batch_size: int, capacity: int, workspaces: Choice = "low") -> bool:
        """Return True if the live bytes fit wherever they lie, which must hold for a replay to fit."""
        return self.knows(batch_size) and self.program.peak_live_bytes(batch_size, workspaces) <= capacity

    def fits(self, batch_size: int, capacity: int, workspaces: Choice = "low") -> bool:
        """Return True if a replay under the capacity serves every request."""
        if not self.live_bytes_fit(batch_size, capacity, workspaces):  # much quicker than a replay
            return False
        return self.replay(batch_size, capacity, workspaces).out_of_memory is None

    def step_peaks(self, batch_size: int, capacity: int | None = None) -> tuple[Peaks, ...]:
        """Return the peaks of each step, and of its phases, as far as the replay came."""
        steps: dict[int, Peaks] = {}
        for begin, (allocated, reserved) in zip(self._phases, self.replay(batch_size, capacity).peaks, strict=False):
            event = self.steady.events[begin]
            if event.step:
                before = steps.get(event.step, Peaks(0, 0))
                phases = {**before.phases, event.phase: max(allocated, before.phases.get(event.phase, 0))}
                peaks = Peaks(max(allocated, before.allocated), max(reserved, before.reserved), phases)
                steps[event.step] = peaks
        return tuple(steps.values())

    def phase_of_peak(self, batch_size: int) -> str:
        """Return the phase in which the allocated bytes reach their peak."""
        return self.steady.events[self.replay(batch_size).peak_at].phase

    def live_at_peak(self, batch_size: int) -> list[tuple[Event, int]]:
        """Return the blocks in use at the peak of the allocated bytes: each one's event and its requested bytes."""
        last = self.replay(batch_size).peak_at
        live: dict[int, tuple[Event, int]] = {}
        entries = zip(self.steady.events[: last + 1], self.steady.at(batch_size), strict=False)
        for event, (block, size, _) in entries:
            if size < 0:
                live.pop(block, None)
            else:
                live[block] = event, size
        return list(live.values())

    def journal(self, batch_size: int, capacity: int | None = None) -> list[Move]:
        """Return the allocator's moves in the recorded steps (see ``allocator.replay``)."""
        journal: list[Move] = []
        total = capacity or 2**40
        replay(self.program.at(batch_size), capacity, self.settings, total=total, journal=journal)
        return journal
