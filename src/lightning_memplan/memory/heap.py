"""GPU memory as the caching allocator holds it: segments, and the free blocks of each pool.

Source: c10/cuda/CUDACachingAllocator.cpp, torch 2.13 to 2.15.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from typing import Literal, NamedTuple

from lightning_memplan.memory.allocator_settings import MIB, AllocatorSettings

ROUND = 512  # a block's size is a multiple of it


SMALL = MIB  # the largest request that the small pool serves


_SMALL_SEGMENT = 2 * MIB


_LARGE_ALONE = 10 * MIB  # from here on a request has a segment of its own size, rounded up to 2 MiB


_UNLIMITED = 2**62


# A free block's key is its size and its address in one int: a sorted list of keys is in the order of best fit.
BITS = 64


ADDRESS = (1 << BITS) - 1


class Move(NamedTuple):
    """One move of a replay that keeps a journal.

    ``alloc`` and ``free`` are of an entry's block (of 0 bytes where it takes no memory), ``empty`` is of the cache, and
    the others are of segments, or of parts of them, that the GPU provided or got back.

    >>> from lightning_memplan.memory.allocator import replay
    >>> journal = []
    >>> _ = replay([(0, 600, 0), (0, -1, 0)], journal=journal)
    >>> [tuple(move) for move in journal]
    [('segment_alloc', 0, 2097152), ('alloc', 0, 1024), ('free', 0, 1024)]
    """

    action: Literal["alloc", "free", "empty", "segment_alloc", "segment_free", "segment_map", "segment_unmap"]
    address: int
    size: int


class Pool:
    """The free blocks of one stream that serve small requests, or that serve large ones."""

    __slots__ = ("granule", "keys", "least_rest", "small", "split_under", "unmapped")

    def __init__(self, small: bool, granule: int, least_rest: int, split_under: int) -> None:
        self.small = small
        self.granule = granule  # bytes by which an expandable segment grows
        self.least_rest = least_rest  # a block is split if so many bytes are left over ...
        self.split_under = split_under  # ... and the request is smaller than this
        self.keys: list[int] = []  # of the free blocks, best fit first
        self.unmapped: list[int] = []  # addresses of the holes in expandable segments, ascending


_APART = 4  # addresses are multiplied by it, so that no two segments touch


class Driver:
    """Addresses that the GPU's driver gives to cudaMalloc.

    It takes chunks of whole 32 MiB, each below those before it, and serves a request from the rest of one first.

    Seen on an H200 with driver 580 in 2026-11: recorded steps replayed so have the real allocator's bytes.
    """

    _CHUNK = 32 * MIB

    def __init__(self) -> None:
        self.lowest = 2**47
        self.left: dict[int, int] = {}  # the rests of chunks, by their address

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


class Heap:
    """GPU memory as the allocator holds it: free blocks by their start and by their end, and segments.

    Addresses are not the GPU's. Of free blocks of one size, torch 2.14 takes the one in the oldest segment, wherever
    that lies, and therein the first: so each new segment lies above those before it. Earlier versions take the lowest
    address, so segments lie as the driver places them (see ``Driver``). Of several expandable segments of a pool,
    which exist only where addresses run out, the newest is searched first: these lie below those before. A gap is left
    between any two segments, so the block that starts where another ends is its neighbour in the same segment.
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
        self.pools: list[Pool] = []  # those that release idle segments
        self.sizes: dict[int, int] = {}  # of free blocks
        self.starts: dict[int, int] = {}  # of free blocks, by their end
        self.segment_sizes: dict[int, int] = {}
        self.holes: dict[int, int] = {}  # sizes of the unmapped parts of expandable segments
        self.alignment = math.lcm(_SMALL_SEGMENT, settings.large_segment_size)
        self.top = 0  # segments lie below ...
        self.bottom = 2**62 // self.alignment * self.alignment  # ... and expandable ones above
        self.driver = Driver() if settings.by_address else None
        self.reserved = self.peak = self.retries = self.segments = 0
        self.searches = 0  # of large pools for a free block: garbage collection's clock
        self.since: dict[int, int] = {}  # that clock when a block was freed

    def new_pool(self, small: bool, kept: bool) -> Pool:
        finely = small or self.settings.expandable_segments
        pool = Pool(
            small=small,
            granule=_SMALL_SEGMENT if small else self.settings.large_segment_size,
            least_rest=ROUND if finely else SMALL + ROUND,
            split_under=_UNLIMITED if finely else self.max_split,
        )
        if not kept:
            self.pools.append(pool)
        return pool

    def add(self, pool: Pool, address: int, size: int) -> None:
        self.sizes[address] = size
        self.starts[address + size] = address
        insort(pool.keys, size << BITS | address)

    def remove(self, pool: Pool, address: int) -> int:
        size = self.sizes.pop(address)
        del self.starts[address + size]
        del pool.keys[bisect_left(pool.keys, size << BITS | address)]
        return size

    def new_address(self, size: int) -> int:
        """Return the start of a new segment, apart from all others, on a multiple of every granule."""
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

    def grow(self, pool: Pool, size: int) -> int:
        """Add memory for a request that no free block serves; return the block's index in the pool's keys, or -1."""
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

    def take(self, pool: Pool, size: int) -> int:
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
        return bisect_left(pool.keys, segment << BITS | address)

    def give_back(self, pool: Pool, key: int) -> int:
        """Give back a segment that is one free block; return its bytes, or 0 if the block is only part of one."""
        address, size = key & ADDRESS, key >> BITS
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
        """Give back everything idle: whole segments, or whole granules of expandable ones."""
        give_back = self.unmap if self.settings.expandable_segments else self.give_back
        for pool in self.pools:
            for key in tuple(pool.keys):
                give_back(pool, key)

    def release_oversize(self, pool: Pool, size: int) -> bool:
        """With a ``max_split_size``, give back the best fit of blocks over it, else the largest until they suffice."""
        if self.settings.max_split_size is None or self.settings.expandable_segments:
            return False
        wanted = max(size, self.max_split)
        at = bisect_left(pool.keys, wanted << BITS)
        if at < len(pool.keys):
            return self.give_back(pool, pool.keys[at]) > 0
        for key in reversed(tuple(pool.keys)):
            if wanted <= 0 or key >> BITS < self.max_split:
                break
            wanted -= self.give_back(pool, key)
        return wanted <= 0

    def collect(self) -> None:
        """Over the threshold, give back large segments that were idle for at least the average time, repeatedly."""
        wanted = self.reserved - int(self.settings.garbage_collection_threshold * self.fraction)
        if wanted <= 0:
            return
        ages = {
            (pool, key): self.searches - self.since[key & ADDRESS]
            for pool in self.pools
            if not pool.small
            for key in pool.keys
            if self.segment_sizes.get(key & ADDRESS) == key >> BITS
        }
        while ages and wanted > 0:
            average = sum(ages.values()) / len(ages)
            for idle in [idle for idle, age in ages.items() if age >= average]:
                del ages[idle]
                wanted -= self.give_back(*idle)

    # Expandable segments: a long range of addresses for each pool, whose granules are mapped as they are needed.

    def least_reach(self, keys: list[int], at: int) -> int:
        """Return the best fit by the size that a free block can grow to: go on while the next one's is smaller."""
        while at + 1 < len(keys) and self.reach(keys[at + 1]) < self.reach(keys[at]):
            at += 1
        return at

    def reach(self, key: int) -> int:
        size = key >> BITS
        return size + self.holes.get((key & ADDRESS) + size, 0)

    def extend(self, pool: Pool, size: int) -> int:
        if size > self.span:
            return -1
        start = self.room(pool, size)
        while (free := self.sizes.get(start, 0)) < size:
            if not self.map(pool, start + free, min(size - free, self.holes[start + free])):
                return -1
        return bisect_left(pool.keys, free << BITS | start)

    def room(self, pool: Pool, size: int) -> int:
        """Return the lowest address from which free blocks and holes make up the size, else that of a new segment."""
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

    def map(self, pool: Pool, address: int, size: int) -> bool:
        """Map as many granules from a hole's start on as the size needs, or none if the GPU has fewer."""
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

    def unmap(self, pool: Pool, key: int) -> None:
        """Give back the granules that lie wholly within a free block."""
        granule = pool.granule
        start, end = key & ADDRESS, (key & ADDRESS) + (key >> BITS)
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
