"""Exchange values between the ranks of a run, and stop waiting for a rank that is gone.

Values go through the key-value store of the process group, not through its collectives: a collective that waits for a
rank that was killed waits for the timeout of the group, half an hour by default. While a rank plans, a thread counts in
the store; where a count stands still for ``SILENCE`` seconds, that rank is gone.
"""

from __future__ import annotations

import itertools
import pickle
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch

from lightning_memplan.errors import RankGoneError, located

T = TypeVar("T")

#: Seconds without a sign of life after which a rank is gone; with the time of a beat and of a poll it is below 30.
SILENCE = 25.0

#: Seconds between two signs of life
BEAT = 1.0

_LEFT = b"left:"  #: what a rank that fails in planning leaves in place of its count, before the reason
_NONE = "none"  #: in place of a count that is not there
_ALL = "all"  #: the decision that every value is there

_sessions = itertools.count()  #: the same on every rank, since all ranks plan as often
_current: _Session | None = None


def over_ranks(value: T) -> list[T]:
    """Return the value of each rank, in the order of ranks. Every rank must call it.

    All ranks raise, or none: one that comes too late finds that the others have given it up.

    Raises:
        RankGoneError: a rank is gone, or has failed.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [value]
    if torch.distributed.get_world_size() == 1:
        return [value]
    with planning_together():
        if _current is not None:
            return _current.exchange(value)
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


@contextmanager
def planning_together() -> Iterator[None]:
    """Give signs of life to the other ranks while the block runs, and tell them at once where it fails.

    Nothing is done in a run of one rank, within another such block, or where the process group has no store.
    """
    global _current
    store = None if _current is not None else store_of_ranks()
    if store is None:
        yield
        return
    _current = session = _Session(store, torch.distributed.get_rank(), torch.distributed.get_world_size())
    try:
        session.begin()
        yield
        session.end()
    except BaseException as error:
        session.end(located(error))
        raise
    finally:
        _current = None


def store_of_ranks() -> Any:
    """Return the store of the default process group; None where there is one rank, or a group without a store (MPI).

    A TCPStore is given a connection of its own, on which no call of another thread is waited for.

    Source: torch/distributed/distributed_c10d.py (2.14), ``_get_default_store``; ``Store.clone`` since torch 2.5.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    try:
        store: Any = distributed.distributed_c10d._get_default_store()
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    below = store
    while isinstance(below, distributed.distributed_c10d.PrefixStore):
        below = below.underlying_store
    if not isinstance(below, distributed.TCPStore) or not hasattr(store, "clone"):  # type: ignore[attr-defined]
        return store
    store = store.clone()
    store.set_timeout(timedelta(seconds=SILENCE))
    return store


class _Session:
    """One planning of all ranks: signs of life, and exchanges that are counted."""

    def __init__(self, store: Any, rank: int, ranks: int) -> None:
        self._store = store
        self._rank, self._ranks = rank, ranks
        self._name = f"memplan/{next(_sessions)}"
        self._exchanges = itertools.count()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="memplan-signs-of-life", daemon=True)

    def begin(self) -> None:
        with self._asking():
            self._store.set(self._alive(self._rank), "0")
        self._thread.start()

    def end(self, reason: str = "") -> None:
        """Stop the signs of life; leave the reason where this rank has failed, and nothing else."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * BEAT)
        with suppress(Exception):
            if reason:
                self._store.set(self._alive(self._rank), _LEFT.decode() + reason)
            else:
                self._store.delete_key(self._alive(self._rank))

    def exchange(self, value: T) -> list[T]:
        """Return the value of each rank.

        The first rank that has all values, or gives one up, decides for all. The last one that has read them removes
        them.
        """
        name = f"{self._name}/{next(self._exchanges)}"
        keys = [f"{name}/{rank}" for rank in range(self._ranks)]
        decision = f"{name}/decision"
        with self._asking():
            self._store.set(keys[self._rank], pickle.dumps(value))
            found = self._wait(keys, decision)
            decided = self._store.compare_set(decision, "", found).decode()
            values = [pickle.loads(self._store.get(key)) for key in keys] if decided == _ALL else []
            if self._store.add(f"{name}/read", 1) == self._ranks:
                for key in (*keys, decision, f"{name}/read"):
                    self._store.delete_key(key)
            elif self._rank == 0:  # it may hold the store, and be about to end
                self._until_read(f"{name}/read")
        if decided != _ALL:
            raise RankGoneError(decided, is_first=decided.startswith("rank 0 "))
        return values

    def _until_read(self, read: str) -> None:
        """Wait a few seconds until the last rank has read, which removes the key."""
        until = time.monotonic() + 5 * BEAT
        while self._store.check([read]) and time.monotonic() < until:
            time.sleep(0.01)

    def _wait(self, keys: Sequence[str], decision: str) -> str:
        """Wait until all keys are there, or a rank is gone; return ``_ALL``, or why there is no value of which rank."""
        seen: dict[int, tuple[bytes, float]] = {}
        pause = 0.001
        while not self._store.check(list(keys)):
            if self._store.check([decision]):
                return ""  # others have decided
            if pause > 0.1:
                for rank in range(self._ranks):
                    if not self._store.check([keys[rank]]) and (gone := self._gone(rank, seen)):
                        return gone
            time.sleep(pause)
            pause = min(2 * pause, 0.25)
        return _ALL

    def _gone(self, rank: int, seen: dict[int, tuple[bytes, float]]) -> str:
        """Return why a rank is not to be waited for; "" while it gives signs of life. ``seen`` has the last ones."""
        now = time.monotonic()
        beat: bytes = self._store.compare_set(self._alive(rank), _NONE, _NONE)  # a ``get`` that waits for no key
        if beat.startswith(_LEFT):
            return f"rank {rank}: {beat[len(_LEFT) :].decode()}"
        last, since = seen.setdefault(rank, (beat, now))
        if beat != last:
            seen[rank] = beat, now
        elif now - since > SILENCE:
            if beat == _NONE.encode():
                return f"rank {rank} has not begun to plan within {SILENCE:.0f} seconds: it is gone, or has no planner"
            return f"rank {rank} is gone: it has given no sign of life for {SILENCE:.0f} seconds"
        return ""

    def _alive(self, rank: int) -> str:
        return f"{self._name}/alive/{rank}"

    def _beat(self) -> None:
        with suppress(Exception):  # a store that is gone is seen by the exchange
            for beat in itertools.count(1):
                if self._ended.wait(BEAT):
                    return
                self._store.set(self._alive(self._rank), str(beat))

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Turn an error of the store into a RankGoneError: a store is gone with the process that holds it."""
        try:
            yield
        except RuntimeError as error:  # torch.distributed.DistError is one
            raise RankGoneError(
                f"the store of the process group cannot be reached: rank 0, which holds it, is gone ({located(error)})",
                is_first=True,
            ) from error
