"""Read and reset the peaks of torch's caching allocator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch


class AllocatorStats(NamedTuple):
    """Figures of a CUDA device's allocator: bytes, and counts since the process began."""

    allocated: int = 0
    peak_allocated: int = 0
    peak_reserved: int = 0
    retries: int = 0  #: times that it freed its cache to serve a request
    device_allocations: int = 0  #: times that it called cudaMalloc


#: The functions behind ``torch.cuda.memory_stats_as_nested_dict`` and ``reset_peak_memory_stats`` (torch 2.4 to 2.14).
#: In the middle of a training step, each Python function around them costs a third of the reading itself. They raise
#: RuntimeError before CUDA is initialised. If torch has none of that name, use the public functions.
_STATS: Callable[[int], Mapping[str, Any]] = getattr(
    torch._C, "_cuda_memoryStats", torch.cuda.memory_stats_as_nested_dict
)
_RESET: Callable[[int], None] = getattr(torch._C, "_cuda_resetPeakMemoryStats", lambda _: None)


def reset_peaks(index: int) -> None:
    """Reset the peaks of a CUDA device to the bytes allocated and reserved at this moment.

    >>> reset_peaks(0)
    >>> read_stats(0).peak_allocated >= 0  # since the reset
    True

    The allocator keeps its statistics on the host, so nothing waits for the device. It takes less than a microsecond.
    Before CUDA is initialised there are no peaks, and this does nothing.
    """
    try:
        _RESET(index)
    except RuntimeError:
        if torch.cuda.is_initialized():
            raise


def read_stats(index: int) -> AllocatorStats:
    """Return the allocator's figures, with peaks since ``reset_peaks``; all are 0 before CUDA is initialised.

    >>> stats = read_stats(0)
    >>> 0 <= stats.peak_allocated <= stats.peak_reserved
    True

    Nothing waits for the device. One query takes about 10 microseconds; ``torch.cuda.max_memory_allocated`` and
    ``max_memory_reserved`` take about 65 each, since each of them flattens and sorts all statistics.
    """
    try:
        stats = _STATS(index)
    except RuntimeError:
        if torch.cuda.is_initialized():
            raise
        stats = {}
    if not stats:
        return AllocatorStats()
    allocated = stats["allocated_bytes"]["all"]
    return AllocatorStats(
        allocated["current"],
        allocated["peak"],
        stats["reserved_bytes"]["all"]["peak"],
        stats["num_alloc_retries"],
        stats.get("num_device_alloc", 0),
    )


def read_peaks(index: int) -> tuple[int, int]:
    """Return the peak bytes allocated and reserved since ``reset_peaks``; (0, 0) before CUDA is initialised.

    >>> allocated, reserved = read_peaks(0)
    >>> 0 <= allocated <= reserved
    True
    """
    stats = read_stats(index)
    return stats.peak_allocated, stats.peak_reserved
