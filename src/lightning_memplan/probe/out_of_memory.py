"""Recognize an out-of-memory error of any library by its type and message."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from lightning_memplan.errors import message_of
from lightning_memplan.units import parse_bytes


def ran_out_of_memory(error: BaseException | None, *, refused: bool = False) -> bool:
    """Tell whether an error, or one in its chain, means that the device's memory is full.

    With ``refused``, the allocator has refused memory since the step began (``num_ooms`` of
    ``torch.cuda.memory_stats``). Then errors count that can have other causes: cuDNN's callers pass over algorithms
    that get no workspace, and in the end find none; a library that cannot allocate its handle reports that it is not
    initialized.

    >>> ran_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    True
    >>> error = RuntimeError("GET was unable to find an engine to execute this computation")
    >>> ran_out_of_memory(error), ran_out_of_memory(error, refused=True)
    (False, True)
    """
    for one in exception_chain(error):
        text = message_of(one)
        if isinstance(one, torch.OutOfMemoryError):
            return True
        if isinstance(one, RuntimeError) and any(part in text for part in _OUT_OF_MEMORY):
            return True
        if refused and any(part in text for part in _PERHAPS_OUT_OF_MEMORY):
            return True
    return False


def gpu_failed(error: BaseException) -> bool:
    """Tell an error after which the GPU fails in every call of this process (torch 2.8 and later name it).

    >>> gpu_failed(RuntimeError("out of memory"))
    False
    """
    return isinstance(error, getattr(torch, "AcceleratorError", ()))


def exception_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, the error from which or while handling which it was raised, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


#: Messages that have no other cause
_OUT_OF_MEMORY = (
    "out of memory",  # cudaErrorMemoryAllocation, as CUDA, NCCL and Triton print it
    "_ALLOC_FAILED",  # CUBLAS_STATUS_, CUDNN_STATUS_, CUSOLVER_STATUS_, CUFFT_
    "DEVICE_ALLOCATION_FAILED",  # CUDNN_STATUS_INTERNAL_ERROR_, since cuDNN 9
)


#: Messages that can have other causes, and count where the allocator has refused memory
_PERHAPS_OUT_OF_MEMORY = (
    "unable to find an engine to execute this computation",  # aten/src/ATen/native/cudnn/Conv_v8.cpp: GET or FIND
    "Unable to find a valid cuDNN algorithm to run convolution",  # Conv_v7.cpp
    "CUDNN_STATUS_NOT_SUPPORTED",  # aten/src/ATen/cudnn/Exceptions.h prints cudnnStatus_t
    "CUDNN_STATUS_INTERNAL_ERROR",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # aten/src/ATen/cuda/CUDABlas.cpp and Exceptions.h print cublasStatus_t
    "CUBLAS_STATUS_INTERNAL_ERROR",
    "unhandled cuda error",  # ncclUnhandledCudaError of NCCL's ncclGetErrorString
)


def refusals(device: torch.device) -> int:
    """Return how often the allocator has refused memory so far."""
    return int(torch.cuda.memory_stats(device).get("num_ooms", 0))


def missing_bytes(error: BaseException | None) -> int:
    """Return how many bytes more than were free a request asked for, by its message (CUDACachingAllocator.cpp).

    >>> missing_bytes(RuntimeError("Tried to allocate 3.00 MiB. GPU 0 has 8 GiB, of which 1.00 MiB is free."))
    2097152
    """
    for one in exception_chain(error):
        found = re.search(r"Tried to allocate (\S+ \w+?)\. .*?of which (\S+ \w+) is free", message_of(one), re.DOTALL)
        if found is not None:
            return max(1, parse_bytes(found[1].replace("bytes", "B")) - parse_bytes(found[2].replace("bytes", "B")))
    return 1
