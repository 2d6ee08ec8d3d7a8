"""Reductions and losses: partial sums, and copies in the type of the result."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch

from lightning_memplan.cuda.layout import contiguous_copies, copy_of, is_dense
from lightning_memplan.cuda.rule_set import (
    OUTPUTS,
    Allocation,
    Call,
    Gpu,
    Scratch,
    allocates,
    aten,
    decomposes,
    scratch,
)


def partial_results(source: torch.Tensor, dims: Any, width: int, vector: int, gpu: Gpu) -> Iterator[Scratch]:
    """Yield the memory through which a reduction of ``source`` over ``dims`` passes the results of its blocks.

    The second block of memory counts the blocks that have finished. ``dims`` is None for all dimensions. ``width`` is
    an accumulator's bytes, and ``vector`` the values that a thread reads at once (see `kernel_sizes.reduction`).
    """
    rank = source.dim()
    dims = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    reduced = [d % max(1, rank) for d in dims] if rank else []
    order = reduced + [d for d in range(rank) if d not in reduced]
    layout = (*(source.size(d) for d in order), *(source.stride(d) for d in order))
    arguments = (width, source.element_size(), vector, gpu.multiprocessors, gpu.threads, len(reduced), *layout)
    yield scratch("reduction", 0, *arguments)
    yield scratch("reduction", 1, *arguments)


def sum_over(source: torch.Tensor, dims: Any, gpu: Gpu) -> Iterator[Scratch]:
    """Yield the partial results of a sum."""
    return partial_results(source, dims, _accumulator(source), sum_vector(source), gpu)


def sums_of_channels(grad: torch.Tensor, gpu: Gpu) -> Iterator[Scratch]:
    """Yield the partial results of a bias's gradient, a sum over all dimensions but the channels."""
    return partial_results(grad, [0, *range(2, grad.dim())], 4, sum_vector(grad), gpu)


def sum_vector(source: torch.Tensor) -> int:
    """Return the values that a thread of a sum reads at once.

    Source: aten/src/ATen/native/cuda/ReduceSumProdKernel.cu (2.14).
    """
    return 8 if source.element_size() == 2 else 4


def _accumulator(source: torch.Tensor) -> int:
    return max(4, source.element_size()) if source.is_floating_point() else 8


def _dims(call: Call) -> Any:
    """Return the dimensions that are reduced: the second argument, where that is no option of the operator."""
    positional = len(call.args) > 1 and not isinstance(call.args[1], (bool, float))
    return call.args[1] if positional else call.kwargs.get("dim")


# ---------------------------------------------------------------------------------------------------- reductions
# aten/src/ATen/native/cuda: ReduceNormKernel, ReduceMomentKernel, ReduceMinValuesKernel, ReduceMaxValuesKernel,
# ReduceLogicKernel, ReduceArgMaxKernel (2.15)


@allocates(aten.linalg_vector_norm)
def vector_norm(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    yield OUTPUTS
    yield from partial_results(call.input, call.argument(2, "dim"), _accumulator(call.input), 4, gpu)


@allocates(aten.max.default, aten.min.default)
def extreme_of_all(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Source: aten/src/ATen/native/cuda/TensorCompare.cpp and ReduceAllOps.cpp, ``min_all`` (2.14)."""
    yield OUTPUTS
    yield from contiguous_copies(call.input)
    source = torch.empty(call.input.shape, dtype=call.input.dtype, device="meta")
    yield from partial_results(source, None, call.input.element_size(), 4, gpu)


@allocates(aten.amax, aten.amin)
def extreme(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    yield OUTPUTS
    yield from partial_results(call.input, _dims(call), call.input.element_size(), 4, gpu)


@allocates(aten.any.default, aten.any.dim, aten.all.default, aten.all.dim)
def logical(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    yield OUTPUTS
    yield from partial_results(call.input, _dims(call), 1, 4, gpu)


@allocates(aten.max.dim, aten.min.dim, aten.argmax, aten.argmin)
def place_of_extreme(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """An accumulator is a value and its place."""
    yield OUTPUTS
    yield from partial_results(call.input, _dims(call), 16, 4, gpu)


@allocates(aten.var.correction, aten.var_mean.correction, aten.std.correction)
def moments(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """An accumulator is Welford's four numbers."""
    yield OUTPUTS
    yield from partial_results(call.input, _dims(call), 16 if call.input.element_size() <= 4 else 24, 2, gpu)


@allocates(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim)
def sum_or_mean(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Source: aten/src/ATen/native/ReduceOpsUtils.h, ``make_reduction_from_out_ty`` (2.14)."""
    yield OUTPUTS
    source, halves = call.input, call.input.element_size() == 2
    if not (halves and call.out.dtype == torch.float32 and call.out.shape != source.shape):  # summed in float32
        source = yield from _cast(source, call.out.dtype)
    yield from sum_over(source, _dims(call), gpu)


@allocates(aten.cumsum, aten.cumprod)
def cumulative(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Source: aten/src/ATen/native/ReduceOps.cpp, ``cumsum`` (2.14)."""
    yield OUTPUTS
    source = yield from _cast(call.input, call.out.dtype)
    yield from contiguous_copies(source)


def _cast(source: torch.Tensor, dtype: torch.dtype) -> Generator[Scratch, None, torch.Tensor]:
    """Yield the copy of an input that has another type than the result, and return what is read then."""
    if source.dtype == dtype:
        return source
    strides = source.stride() if is_dense(source) else torch.empty(source.shape, device="meta").stride()
    cast = torch.empty_strided(source.shape, strides, dtype=dtype, device="meta")
    yield copy_of(cast)
    return cast


@allocates(aten._foreach_norm.Scalar)
def foreach_norm(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Each tensor has a number for each part of 65,536 values, and as many parts as the largest.

    Source: aten/src/ATen/native/cuda/ForeachReduceOp.cu (2.14).
    """
    tensors = call.input
    width = max(4, tensors[0].element_size())
    yield Scratch(len(tensors) * max(-(-tensor.numel() // 65536) for tensor in tensors) * width)
    yield OUTPUTS


@decomposes(aten.logsumexp)
def logsumexp(input: torch.Tensor, dim: Sequence[int], keepdim: bool = False) -> torch.Tensor:
    """Source: aten/src/ATen/native/ReduceOps.cpp, ``logsumexp_out_impl`` (2.14)."""
    largest = aten.amax.default(input, dim, True)
    aten.eq.Scalar(aten.abs.default(largest), float("inf"))
    return aten.sum.dim_IntList(aten.exp_.default(aten.sub.Tensor(input, largest)), dim, keepdim)
