"""Recognize an out-of-memory error of any library by its type and message."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from lightning_memplan.units import parse_bytes


def ran_out_of_memory(error: BaseException | None, *, refused: bool = False) -> bool:
    """Whether an error says that the device's memory is full, in any of the ways in which libraries say it.

    An error that another one was raised from, or while handling, counts as well. ``refused`` says that the allocator
    has refused memory since the step began (``num_ooms`` of ``torch.cuda.memory_stats``): then errors count that have
    other causes too. cuDNN's callers pass over algorithms that get no workspace, and in the end find none; a library
    that cannot allocate its handle says that it is not initialized.

    >>> ran_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    True
    >>> error = RuntimeError("GET was unable to find an engine to execute this computation")
    >>> ran_out_of_memory(error), ran_out_of_memory(error, refused=True)
    (False, True)
    """
    for one in exception_chain(error):
        text = str(one)
        if isinstance(one, torch.OutOfMemoryError):
            return True
        if isinstance(one, RuntimeError) and any(part in text for part in _OUT_OF_MEMORY):
            return True
        if refused and any(part in text for part in _PERHAPS_OUT_OF_MEMORY):
            return True
    return False


def exception_chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those from which it was raised or while they were handled."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


_OUT_OF_MEMORY = (
    "out of memory",  # cudaErrorMemoryAllocation, whoever met it: CUDA, NCCL, Triton
    "_ALLOC_FAILED",  # CUBLAS_STATUS_, CUDNN_STATUS_, CUSOLVER_STATUS_, CUFFT_
    "DEVICE_ALLOCATION_FAILED",  # CUDNN_STATUS_INTERNAL_ERROR_, from cuDNN 9 on
)


_PERHAPS_OUT_OF_MEMORY = (
    "unable to find an engine to execute this computation",  # aten/src/ATen/native/cudnn/Conv_v8.cpp: GET or FIND
    "Unable to find a valid cuDNN algorithm to run convolution",  # Conv_v7.cpp
    "CUDNN_STATUS_NOT_SUPPORTED",
    "CUDNN_STATUS_INTERNAL_ERROR",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUBLAS_STATUS_INTERNAL_ERROR",
    "unhandled cuda error",  # NCCL
)


def refusals(device: torch.device) -> int:
    return int(torch.cuda.memory_stats(device).get("num_ooms", 0))


def missing_bytes(error: BaseException | None) -> int:
    """What a failed request lacked of the card's free bytes, by the allocator's message (CUDACachingAllocator.cpp)."""
    for one in exception_chain(error):
        found = re.search(r"Tried to allocate (\S+ \w+?)\. .*?of which (\S+ \w+) is free", str(one), re.DOTALL)
        if found is not None:
            return max(1, parse_bytes(found[1].replace("bytes", "B")) - parse_bytes(found[2].replace("bytes", "B")))
    return 1
