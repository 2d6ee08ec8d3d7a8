"""PyTorch's CUDA caching allocator, replayed: which bytes a program of allocations and frees takes of a card.

Requests are rounded up to 512 bytes and served by the smallest free block of their pool and stream. Where none is
large enough the card gives a segment: 2 MiB for requests of at most 1 MiB, 20 MiB for those under 10 MiB, else the
request rounded up to 2 MiB. Blocks are split where enough is left over, and a freed block merges with its free
neighbours. When the card is full, segments of which nothing is in use go back to it first. So whether a program fits
is known only by replaying it under the card's capacity: what it reserves where there is room says too much.

Source: c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h, torch 2.13 to 2.15. Not replayed: blocks that
several streams use (``record_stream``), the pools of CUDA graphs, and ``backend:cudaMallocAsync``.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from lightning_memplan.memory.allocator_settings import INTERVALS, MIB, AllocatorSettings
from lightning_memplan.memory.events import EMPTY, Stream

_ROUND = 512


_SMALL = MIB  # the largest request that the small pool serves


_SMALL_SEGMENT = 2 * MIB


_LARGE_ALONE = 10 * MIB  # from here on a request has a segment of its own size, rounded up to 2 MiB


_KEPT = frozenset(stream for stream in Stream if stream.keeps_segments)


_UNLIMITED = 2**62


# A free block's key is its size and its address in one int: a sorted list of keys is in the order of best fit.
_BITS = 64


_ADDRESS = (1 << _BITS) - 1


@dataclass(frozen=True, slots=True)
class Replay:
    """What a program took of the card, in bytes, as ``torch.cuda.memory_stats`` counts them.

    Allocated are the blocks in use, which are a little larger than what was asked for; reserved are the segments.
    ``peak_at`` is the program's entry at which the allocated bytes first were at their peak. ``out_of_memory`` is the
    entry that could not be served, at which the replay stopped, and ``None`` where all were. ``peaks`` has the peaks
    of allocated and of reserved bytes in each interval between marks, as far as the replay came. ``retries`` counts
    how often all that was idle had to be given back (``num_alloc_retries``), ``segments`` how often the card gave
    memory (``num_device_alloc``).

    >>> taken = replay([(0, 600, 0), (0, -1, 0)])
    >>> taken.peak_allocated, taken.peak_reserved, taken.peak_at, taken.allocated, taken.reserved
    (1024, 2097152, 0, 0, 2097152)
    """

    peak_allocated: int
    peak_reserved: int
    peak_at: int
    allocated: int
    reserved: int
    out_of_memory: int | None
    peaks: tuple[tuple[int, int], ...]
    retries: int
    segments: int


class Move(NamedTuple):
    """What a replay did, where it keeps a journal: ``alloc`` and ``free`` of an entry's block, of 0 bytes where it
    takes no memory, ``empty`` of the cache, and segments or parts of them that the card gave and was given back.

    >>> journal = []
    >>> _ = replay([(0, 600, 0), (0, -1, 0)], journal=journal)
    >>> [tuple(move) for move in journal]
    [('segment_alloc', 0, 2097152), ('alloc', 0, 1024), ('free', 0, 1024)]
    """

    action: Literal["alloc", "free", "empty", "segment_alloc", "segment_free", "segment_map", "segment_unmap"]
    address: int
    size: int


_DEFAULT = AllocatorSettings()


def replay(
    program: Sequence[tuple[int, int, int]],
    capacity: int | None = None,
    settings: AllocatorSettings = _DEFAULT,
    fraction: int | None = None,
    marks: Sequence[int] = (),
    total: int | None = None,
    journal: list[Move] | None = None,
) -> Replay:
    """Run a program of entries ``(block, size, stream)`` through the allocator.

    A size from 0 on allocates that many bytes under the id ``block`` (0 bytes take no memory); -1 frees the block, -2
    gives all that is idle back to the card (``torch.cuda.empty_cache``), whatever the block.
    Below, 3 MiB and 5 MiB share a segment of 20 MiB, and 40 MiB have one of their own. A card of 50 MiB has no room
    for both, so it is given back the first, in which nothing is in use any more. What is idle in the pool of a CUDA
    graph (``Stream.GRAPHS``) is not given back: the graph runs in it again.

    >>> program = [(1, 3 * 2**20, 0), (2, 5 * 2**20, 0), (1, -1, 0), (2, -1, 0), (3, 40 * 2**20, 0)]
    >>> ample = replay(program)
    >>> ample.peak_allocated // 2**20, ample.peak_reserved // 2**20, ample.retries
    (40, 60, 0)
    >>> tight = replay(program, capacity=50 * 2**20)
    >>> tight.peak_reserved // 2**20, tight.retries, tight.out_of_memory
    (40, 1, None)
    >>> replay([(block, size, Stream.GRAPHS) for block, size, _ in program], capacity=50 * 2**20).out_of_memory
    4

    More capacity can, rarely, make a program fail that fitted: what was given back earlier left fewer split blocks.

    Args:
        program: the entries, in their order in time.
        capacity: bytes that the card can give (what is free on it, less CUDA's context); ``None`` is without end.
        settings: the allocator's.
        fraction: bytes that ``torch.cuda.set_per_process_memory_fraction`` leaves the process; only with it does the
            ``garbage_collection_threshold`` act.
        marks: indices of entries, ascending; before each, the peaks begin anew, as after
            ``torch.cuda.reset_peak_memory_stats``.
        total: bytes of the whole card, where the capacity is less. Only expandable segments ask: each has addresses
            for 9/8 of it, and a request for which the first has no unbroken range left opens another.
        journal: every move is appended to it, in order.

    Raises:
        ValueError: an entry allocates a block that is there, or frees one that is not.
    """
    heap = _Heap(settings, capacity, fraction, capacity if total is None else total, journal)
    sizes, starts = heap.sizes, heap.starts
    pools: tuple[dict[int, _Pool], dict[int, _Pool]] = ({}, {})  # large and small ones, by stream
    live: dict[int, _Place] = {} if journal is None else _Journalled(journal)
    divisions = settings.roundup_power2_divisions
    expandable = settings.expandable_segments
    max_split, rounding = heap.max_split, settings.max_non_split_rounding
    collects = heap.collects

    allocated = peak_allocated = peak_reserved = peak_at = 0
    out_of_memory = None
    peaks = []
    bounds = [0, *marks, len(program)]
    for begin, end in pairwise(bounds):
        peak, heap.peak = allocated, heap.reserved
        for index, (block, request, stream) in enumerate(program[begin:end], begin):
            if request < 0:
                if request == EMPTY:
                    heap.release()
                    heap.journal.append(Move("empty", 0, 0))
                    continue
                if block not in live:
                    raise ValueError(f"entry {index} frees block {block}, which is not allocated")
                place = live.pop(block)
                if place is None:
                    continue
                address, size, keys = place
                allocated -= size
                stop = address + size
                if stop in sizes:  # what follows is free
                    size = sizes.pop(stop)
                    del keys[bisect_left(keys, size << _BITS | stop)]
                    stop += size
                if address in starts:  # what lies before is free
                    start = starts.pop(address)
                    del keys[bisect_left(keys, address - start << _BITS | start)]
                    address = start
                sizes[address] = size = stop - address
                starts[stop] = address
                insort(keys, size << _BITS | address)
                if collects:
                    heap.since[address] = heap.searches
                continue

            if block in live:
                raise ValueError(f"entry {index} allocates block {block}, which is allocated already")
            if not request:
                live[block] = None
                continue
            size = _round_up(request, divisions) if divisions else request + 511 & -512
            small = size <= _SMALL
            pool = pools[small].get(stream)
            if pool is None:
                pool = pools[small][stream] = heap.new_pool(small, kept=stream in _KEPT)
            keys = pool.keys
            if collects:
                heap.searches += not small
            at = bisect_left(keys, size << _BITS)
            if expandable:
                at = heap.least_reach(keys, at)
            if at == len(keys) or keys[at] >> _BITS >= (max_split if size < max_split else size + rounding):
                at = heap.grow(pool, size)
                if at < 0:
                    out_of_memory = index
                    break
            key = keys.pop(at)
            address = key & _ADDRESS
            rest = sizes.pop(address) - size
            if rest >= pool.least_rest and size < pool.split_under:
                start = address + size
                sizes[start] = rest
                starts[start + rest] = start
                insort(keys, rest << _BITS | start)
            else:
                size += rest
                del starts[address + size]
            live[block] = address, size, keys
            allocated += size
            if allocated > peak:
                peak = allocated
                if peak > peak_allocated:
                    peak_allocated, peak_at = peak, index
        peaks.append((peak, heap.peak))
        peak_reserved = max(peak_reserved, heap.peak)
        if out_of_memory is not None:
            break
    return Replay(
        peak_allocated=peak_allocated,
        peak_reserved=peak_reserved,
        peak_at=peak_at,
        allocated=allocated,
        reserved=heap.reserved,
        out_of_memory=out_of_memory,
        peaks=tuple(peaks),
        retries=heap.retries,
        segments=heap.segments,
    )


_Place = tuple[int, int, list[int]] | None  # address, size and the pool's keys; None for a block without bytes


class _Journalled(dict[int, _Place]):
    """The live blocks, written down as they come and go: replays without a journal have a plain dictionary instead."""

    def __init__(self, journal: list[Move]) -> None:
        super().__init__()
        self.journal = journal

    def __setitem__(self, block: int, place: _Place) -> None:
        self.journal.append(Move("alloc", *(place or (0, 0))[:2]))
        super().__setitem__(block, place)

    def pop(self, block: int) -> _Place:  # type: ignore[override]
        place = super().pop(block)
        self.journal.append(Move("free", *(place or (0, 0))[:2]))
        return place


class _Pool:
    """The free blocks of one stream, of those that serve small or of those that serve large requests."""

    __slots__ = ("granule", "keys", "least_rest", "small", "split_under", "unmapped")

    def __init__(self, small: bool, granule: int, least_rest: int, split_under: int) -> None:
        self.small = small
        self.granule = granule  # bytes by which an expandable segment grows
        self.least_rest = least_rest  # a block is split if so many bytes are left over ...
        self.split_under = split_under  # ... and the request is smaller than this
        self.keys: list[int] = []  # of the free blocks, best fit first
        self.unmapped: list[int] = []  # addresses of the holes in expandable segments, ascending


_APART = 4  # addresses are multiplied by it, so that no two segments touch


class _Driver:
    """Where the card's driver lays what cudaMalloc asks for: in chunks of whole 32 MiB, each below those before it, and
    first of all in what is left of one.

    Seen on an H200 with driver 580 in 2026-11: recorded steps replayed so have the real allocator's bytes.
    """

    _CHUNK = 32 * MIB

    def __init__(self) -> None:
        self.lowest = 2**47
        self.left: dict[int, int] = {}  # bytes that are left, by their address

    def take(self, size: int) -> int:
        address = min((at for at, room in self.left.items() if room >= size), default=None)
        if address is None:
            chunk = -(-size // self._CHUNK) * self._CHUNK
            self.lowest = address = self.lowest - chunk
            self.left[address] = chunk
        if room := self.left.pop(address) - size:
            self.left[address + size] = room
        return address

    def give_back(self, address: int, size: int) -> None:
        after = self.left.pop(address + size, 0)
        before = next((at for at, room in self.left.items() if at + room == address), None)
        if before is None:
            self.left[address] = size + after
        else:
            self.left[before] += size + after


class _Heap:
    """The card's memory as the allocator holds it: free blocks by their start and by their end, and segments.

    Addresses are not the card's. Of free blocks of one size torch 2.14 takes the one in the oldest segment, wherever
    the card laid it, and therein the first: so each new segment lies above those before it. Before, the lowest address
    decided, so segments lie in the order in which the driver lays them (see ``_Driver``). Of several expandable
    segments of a pool, which exist only where addresses run out, it searches the newest first: these lie below those
    before. A gap is left between any two, so whatever starts where a block ends is its neighbour in the same segment.
    """

    def __init__(
        self,
        settings: AllocatorSettings,
        capacity: int | None,
        fraction: int | None,
        total: int | None,
        journal: list[Move] | None,
    ) -> None:
        self.settings = settings
        self.journal = [] if journal is None else journal
        self.capacity = _UNLIMITED if capacity is None else capacity
        self.span = 2**52 if total is None else total + total // 8  # addresses of an expandable segment
        self.fraction = _UNLIMITED if fraction is None else fraction
        self.max_split = _UNLIMITED if settings.max_split_size is None else settings.max_split_size
        self.collects = fraction is not None and settings.garbage_collection_threshold > 0.0
        self.pools: list[_Pool] = []  # that give back what is idle
        self.sizes: dict[int, int] = {}  # of free blocks
        self.starts: dict[int, int] = {}  # of free blocks, by their end
        self.segment_sizes: dict[int, int] = {}
        self.holes: dict[int, int] = {}  # sizes of the unmapped parts of expandable segments
        self.alignment = math.lcm(_SMALL_SEGMENT, settings.large_segment_size)
        self.top = 0  # segments lie below ...
        self.bottom = 2**62 // self.alignment * self.alignment  # ... and expandable ones above
        self.driver = _Driver() if settings.by_address else None
        self.reserved = self.peak = self.retries = self.segments = 0
        self.searches = 0  # of large pools for a free block: garbage collection's clock
        self.since: dict[int, int] = {}  # that clock when a block was freed

    def new_pool(self, small: bool, kept: bool) -> _Pool:
        finely = small or self.settings.expandable_segments
        pool = _Pool(
            small=small,
            granule=_SMALL_SEGMENT if small else self.settings.large_segment_size,
            least_rest=_ROUND if finely else _SMALL + _ROUND,
            split_under=_UNLIMITED if finely else self.max_split,
        )
        if not kept:
            self.pools.append(pool)
        return pool

    def add(self, pool: _Pool, address: int, size: int) -> None:
        self.sizes[address] = size
        self.starts[address + size] = address
        insort(pool.keys, size << _BITS | address)

    def remove(self, pool: _Pool, address: int) -> int:
        size = self.sizes.pop(address)
        del self.starts[address + size]
        del pool.keys[bisect_left(pool.keys, size << _BITS | address)]
        return size

    def new_address(self, size: int) -> int:
        """The start of a new segment, apart from all others, on a multiple of every granule."""
        step = (size // self.alignment + 1) * self.alignment
        if self.driver is not None and not self.settings.expandable_segments:
            return _APART * self.driver.take(size)
        if self.settings.expandable_segments:
            self.bottom -= step
            return self.bottom
        self.top += step
        return self.top - step

    def reserve(self, address: int, size: int) -> None:
        self.journal.append(
            Move("segment_map" if self.settings.expandable_segments else "segment_alloc", address, size)
        )
        self.segments += 1
        self.reserved += size
        self.peak = max(self.peak, self.reserved)

    def grow(self, pool: _Pool, size: int) -> int:
        """Have the card give memory for a request that no free block serves: its index in the pool's keys, or -1."""
        if self.collects:
            self.collect()
        at = self.take(pool, size)
        if at < 0 and self.release_oversize(pool, size):
            at = self.take(pool, size)
        if at < 0:
            self.release()
            self.retries += 1
            at = self.take(pool, size)
        return at

    def take(self, pool: _Pool, size: int) -> int:
        if size < _LARGE_ALONE:
            segment = _SMALL_SEGMENT if pool.small else self.settings.large_segment_size
        else:
            segment = size + 2 * MIB - 1 & -2 * MIB
        if self.reserved + segment > self.fraction:
            return -1
        if self.settings.expandable_segments:
            return self.extend(pool, size)
        if self.reserved + segment > self.capacity:
            return -1
        address = self.new_address(segment)
        self.segment_sizes[address] = segment
        self.add(pool, address, segment)
        self.reserve(address, segment)
        return bisect_left(pool.keys, segment << _BITS | address)

    def give_back(self, pool: _Pool, key: int) -> int:
        """Give the card a segment that is one free block; its bytes, and 0 for a block that is only part of one."""
        address, size = key & _ADDRESS, key >> _BITS
        if self.segment_sizes.get(address) != size:
            return 0
        del self.segment_sizes[address]
        self.remove(pool, address)
        self.journal.append(Move("segment_free", address, size))
        self.reserved -= size
        if self.driver is not None:
            self.driver.give_back(address // _APART, size)
        return size

    def release(self) -> None:
        """Give back all that is idle: whole segments, or whole granules of expandable ones."""
        give_back = self.unmap if self.settings.expandable_segments else self.give_back
        for pool in self.pools:
            for key in tuple(pool.keys):
                give_back(pool, key)

    def release_oversize(self, pool: _Pool, size: int) -> bool:
        """With a ``max_split_size``: give back the best fit of those over it, else the largest until they suffice."""
        if self.settings.max_split_size is None or self.settings.expandable_segments:
            return False
        wanted = max(size, self.max_split)
        at = bisect_left(pool.keys, wanted << _BITS)
        if at < len(pool.keys):
            return self.give_back(pool, pool.keys[at]) > 0
        for key in reversed(tuple(pool.keys)):
            if wanted <= 0 or key >> _BITS < self.max_split:
                break
            wanted -= self.give_back(pool, key)
        return wanted <= 0

    def collect(self) -> None:
        """Over the threshold, give back large segments that have been idle for at least the average, then anew."""
        wanted = self.reserved - int(self.settings.garbage_collection_threshold * self.fraction)
        if wanted <= 0:
            return
        ages = {
            (pool, key): self.searches - self.since[key & _ADDRESS]
            for pool in self.pools
            if not pool.small
            for key in pool.keys
            if self.segment_sizes.get(key & _ADDRESS) == key >> _BITS
        }
        while ages and wanted > 0:
            average = sum(ages.values()) / len(ages)
            for idle in [idle for idle, age in ages.items() if age >= average]:
                del ages[idle]
                wanted -= self.give_back(*idle)

    # Expandable segments: a long range of addresses for each pool, whose granules are mapped as they are needed.

    def least_reach(self, keys: list[int], at: int) -> int:
        """Best fit by the size that a free block can grow to: go on for as long as the next one's is smaller."""

        while at + 1 < len(keys) and self.reach(keys[at + 1]) < self.reach(keys[at]):
            at += 1
        return at

    def reach(self, key: int) -> int:
        size = key >> _BITS
        return size + self.holes.get((key & _ADDRESS) + size, 0)

    def extend(self, pool: _Pool, size: int) -> int:
        if size > self.span:
            return -1
        start = self.room(pool, size)
        while (free := self.sizes.get(start, 0)) < size:
            if not self.map(pool, start + free, min(size - free, self.holes[start + free])):
                return -1
        return bisect_left(pool.keys, free << _BITS | start)

    def room(self, pool: _Pool, size: int) -> int:
        """The lowest address from which on free blocks and holes make up the size, else that of a new segment."""
        for hole in pool.unmapped:
            start = end = self.starts.get(hole, hole)
            while end - start < size and (step := self.sizes.get(end) or self.holes.get(end)):
                end += step
            if end - start >= size:
                return start
        size = -(-self.span // pool.granule) * pool.granule
        start = self.new_address(size)
        self.holes[start] = size
        insort(pool.unmapped, start)
        return start

    def map(self, pool: _Pool, address: int, size: int) -> bool:
        """Map granules from a hole's start on: all that the size needs, or none where the card has fewer."""
        size = -(-size // pool.granule) * pool.granule
        if self.reserved + size > self.capacity:
            return False
        self.reserve(address, size)
        end = address + size
        pool.unmapped.remove(address)
        if left := self.holes.pop(address) - size:
            self.holes[end] = left
            insort(pool.unmapped, end)
        elif end in self.sizes:
            end += self.remove(pool, end)
        if address in self.starts:
            address = self.starts[address]
            self.remove(pool, address)
        self.add(pool, address, end - address)
        return True

    def unmap(self, pool: _Pool, key: int) -> None:
        """Give back the granules that lie wholly within a free block."""
        granule = pool.granule
        start, end = key & _ADDRESS, (key & _ADDRESS) + (key >> _BITS)
        first, last = -(-start // granule) * granule, end // granule * granule
        if first >= last:
            return
        self.remove(pool, start)
        if start < first:
            self.add(pool, start, first - start)
        if last < end:
            self.add(pool, last, end - last)
        self.journal.append(Move("segment_unmap", first, last - first))
        self.reserved -= last - first
        at = bisect_left(pool.unmapped, first)
        if last in self.holes:
            del pool.unmapped[at]
            last += self.holes.pop(last)
        if at and (before := pool.unmapped[at - 1]) + self.holes[before] == first:
            first = before
        else:
            pool.unmapped.insert(at, first)
        self.holes[first] = last - first


def _round_up(size: int, divisions: Sequence[int]) -> int:
    """The block's size for a request: a multiple of 512 bytes, or of a part of the power of two below it."""
    parts = divisions[min(max(size.bit_length() - MIB.bit_length(), 0), INTERVALS - 1)]
    if parts <= 1 or size <= _ROUND * parts:
        return size + _ROUND - 1 & -_ROUND
    step = (1 << size.bit_length() - 1) // parts
    return size + step - 1 & -step
