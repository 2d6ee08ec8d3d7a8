"""Replay PyTorch's CUDA caching allocator: how much GPU memory a program of allocations and frees takes.

Requests are rounded up to 512 bytes and served by the smallest free block of their pool and stream. Where none is
large enough, the GPU provides a segment: 2 MiB for requests of at most 1 MiB, 20 MiB for those under 10 MiB, else the
request rounded up to 2 MiB. Blocks are split where enough is left over, and a freed block merges with its free
neighbours. When the GPU is full, idle segments are released before a request fails. So only a replay under the GPU's
capacity tells if a program fits: the bytes that it reserves with ample memory are an upper bound.

Source: c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h, torch 2.13 to 2.15. Not replayed: blocks
that several streams use (``record_stream``), pools of CUDA graphs, and ``backend:cudaMallocAsync``.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lightning_memplan.memory.allocator_settings import INTERVALS, MIB, AllocatorSettings
from lightning_memplan.memory.events import EMPTY, Stream
from lightning_memplan.memory.heap import ADDRESS, BITS, ROUND, SMALL, Heap, Move, Pool

_KEPT = frozenset(stream for stream in Stream if stream.keeps_segments)


@dataclass(frozen=True, slots=True)
class Replay:
    """Bytes that a program took, as ``torch.cuda.memory_stats`` counts them.

    Allocated are the blocks in use, which are a little larger than the requests; reserved are the segments. ``peak_at``
    is the program's entry at which the allocated bytes first reached their peak. ``out_of_memory`` is the entry that
    could not be served, at which the replay stopped, or ``None``. ``peaks`` has the peaks of allocated and of reserved
    bytes in each interval between marks, as far as the replay came. ``retries`` counts how often everything idle had
    to be released (``num_alloc_retries``), ``segments`` how often the GPU provided memory (``num_device_alloc``).

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

    A size of at least 0 allocates that many bytes under the id ``block`` (0 bytes take no memory); -1 frees the block;
    -2 releases everything idle (``torch.cuda.empty_cache``), whatever the block.

    Below, 3 MiB and 5 MiB share a segment of 20 MiB, and 40 MiB have one of their own. A GPU of 50 MiB has no room for
    both, so the allocator releases the first, which is idle by then. Of ``Stream.TRIALS`` idle segments stay.

    >>> program = [(1, 3 * 2**20, 0), (2, 5 * 2**20, 0), (1, -1, 0), (2, -1, 0), (3, 40 * 2**20, 0)]
    >>> ample = replay(program)
    >>> ample.peak_allocated // 2**20, ample.peak_reserved // 2**20, ample.retries
    (40, 60, 0)
    >>> tight = replay(program, capacity=50 * 2**20)
    >>> tight.peak_reserved // 2**20, tight.retries, tight.out_of_memory
    (40, 1, None)

    More capacity can, rarely, make a program fail that fitted: releasing segments earlier left fewer split blocks.

    The loop is one long function: a search runs it for every event of a program at many batch sizes, and calls would
    take most of its time.

    Args:
        program: the entries, in their order in time.
        capacity: bytes that the GPU can provide (its free memory, less CUDA's context); ``None`` is unlimited.
        settings: the allocator's settings.
        fraction: bytes that ``torch.cuda.set_per_process_memory_fraction`` leaves the process; only with it does the
            ``garbage_collection_threshold`` act.
        marks: indices of entries, ascending; the peaks begin anew before each, as after
            ``torch.cuda.reset_peak_memory_stats``.
        total: bytes of the whole GPU, if more than the capacity. Only expandable segments depend on it: each has
            addresses for 9/8 of it, and a request for which the first has no unbroken range left opens another.
        journal: every move is appended to it, in order.

    Raises:
        ValueError: an entry allocates a block that is allocated, or frees one that is not.
    """
    heap = Heap(settings, capacity, fraction, capacity if total is None else total, journal)
    sizes, starts = heap.sizes, heap.starts
    pools: tuple[dict[int, Pool], dict[int, Pool]] = ({}, {})  # large and small ones, by stream
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
                if stop in sizes:  # the next block is free
                    size = sizes.pop(stop)
                    del keys[bisect_left(keys, size << BITS | stop)]
                    stop += size
                if address in starts:  # the block before is free
                    start = starts.pop(address)
                    del keys[bisect_left(keys, address - start << BITS | start)]
                    address = start
                sizes[address] = size = stop - address
                starts[stop] = address
                insort(keys, size << BITS | address)
                if collects:
                    heap.since[address] = heap.searches
                continue

            if block in live:
                raise ValueError(f"entry {index} allocates block {block}, which is allocated already")
            if not request:
                live[block] = None
                continue
            size = _round_up(request, divisions) if divisions else request + 511 & -512
            small = size <= SMALL
            pool = pools[small].get(stream)
            if pool is None:
                pool = pools[small][stream] = heap.new_pool(small, kept=stream in _KEPT)
            keys = pool.keys
            if collects:
                heap.searches += not small
            at = bisect_left(keys, size << BITS)
            if expandable:
                at = heap.least_reach(keys, at)
            if at == len(keys) or keys[at] >> BITS >= (max_split if size < max_split else size + rounding):
                at = heap.grow(pool, size)
                if at < 0:
                    out_of_memory = index
                    break
            key = keys.pop(at)
            address = key & ADDRESS
            rest = sizes.pop(address) - size
            if rest >= pool.least_rest and size < pool.split_under:
                start = address + size
                sizes[start] = rest
                starts[start + rest] = start
                insort(keys, rest << BITS | start)
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


_Place = tuple[int, int, list[int]] | None  # address, size and the pool's keys; None for a block of 0 bytes


class _Journalled(dict[int, _Place]):
    """Live blocks that write a journal as they come and go; a replay without a journal has a plain dictionary."""

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


def _round_up(size: int, divisions: Sequence[int]) -> int:
    """Return the block's size for a request: a multiple of 512 bytes, or of a part of the power of two below it."""
    parts = divisions[min(max(size.bit_length() - MIB.bit_length(), 0), INTERVALS - 1)]
    if parts <= 1 or size <= ROUND * parts:
        return size + ROUND - 1 & -ROUND
    step = (1 << size.bit_length() - 1) // parts
    return size + step - 1 & -step
