"""Reductions and losses: partial sums, casts, and their backward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lightning_memplan.cuda.layout import Rule, is_dense, nbytes
from lightning_memplan.cuda.rule_set import aten


class Card(NamedTuple):
    """What of a card its kernels' launches depend on."""

    multiprocessors: int = 82
    threads: int = 1536  #: on each of them


def reduction(card: Card, width: Callable[[torch.Tensor], int], vector: Callable[[torch.Tensor], int]) -> Rule:
    """A reduction cut into blocks passes partial results, and counts its blocks, through the device's memory."""

    def rule(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
        source = args[0]
        dims = args[1] if len(args) > 1 and not isinstance(args[1], (bool, float)) else kwargs.get("dim")
        return reduction_blocks(source, dims, width(source), vector(source), card)

    return rule


def reduction_blocks(source: torch.Tensor, dims: Any, width: int, vector: int, card: Card) -> Sequence[Any]:
    """What a reduction of ``source`` over ``dims`` (all of them where it is None) takes."""
    rank = source.dim()
    dims = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    reduced = [d % max(1, rank) for d in dims] if rank else []
    order = reduced + [d for d in range(rank) if d not in reduced]
    layout = (*(source.size(d) for d in order), *(source.stride(d) for d in order))
    arguments = (width, source.element_size(), vector, card.multiprocessors, card.threads, len(reduced), *layout)
    return ("reduction", 0, *arguments), ("reduction", 1, *arguments)


def sums_of_channels(grad: torch.Tensor, card: Card) -> Sequence[Any]:
    return reduction_blocks(grad, [0, *range(2, grad.dim())], 4, sum_vector(grad), card)


def cast_first(rule: Rule) -> Rule:
    """aten/src/ATen/native/ReduceOpsUtils.h, ``make_reduction_from_out_ty``, and ReduceOps.cpp, ``cumsum``: a copy of
    what is of another type than the result (how many are true of a mask), but sums of halves in float32."""

    def cast(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
        source = args[0]
        if source.dtype == out.dtype:
            return rule(args, kwargs, out)
        if source.element_size() == 2 and out.dtype == torch.float32 and out.shape != source.shape:
            return rule(args, kwargs, out)
        strides = source.stride() if is_dense(source) else torch.empty(source.shape, device="meta").stride()
        same = torch.empty_strided(source.shape, strides, dtype=out.dtype, device="meta")
        return (nbytes(same), *rule((same, *args[1:]), kwargs, out))

    return cast


def accumulator(source: torch.Tensor) -> int:
    return max(4, source.element_size()) if source.is_floating_point() else 8


def sum_vector(source: torch.Tensor) -> int:
    return 8 if source.element_size() == 2 else 4  # ReduceSumProdKernel.cu: 16-bit inputs, eight at a time


def _itself(source: torch.Tensor) -> int:
    return source.element_size()


def reductions(card: Card) -> dict[Any, Rule]:
    """aten/src/ATen/native/cuda: ReduceNormKernel, ReduceMomentKernel, ReduceMin/MaxValuesKernel, ReduceLogicKernel,
    ReduceArgMaxKernel (2.15). The width is an accumulator's: Welford's has four numbers, a maximum's place two."""
    norm = reduction(card, accumulator, lambda source: 4)
    extreme = reduction(card, _itself, lambda source: 4)
    logical = reduction(card, lambda source: 1, lambda source: 4)
    place = reduction(card, lambda source: 16, lambda source: 4)
    moments = reduction(card, lambda source: 16 if source.element_size() <= 4 else 24, lambda source: 2)

    def vector_norm(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
        dims = args[2] if len(args) > 2 else kwargs.get("dim")
        return norm((args[0], dims), {}, out)

    rules: dict[Any, Rule] = {aten.linalg_vector_norm.default: vector_norm}
    rules.update(dict.fromkeys([aten.amax.default, aten.amin.default, aten.max.default, aten.min.default], extreme))
    rules.update(dict.fromkeys([aten.any.default, aten.any.dim, aten.all.default, aten.all.dim], logical))
    rules.update(dict.fromkeys([aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default], place))
    rules.update(dict.fromkeys([aten.var.correction, aten.var_mean.correction, aten.std.correction], moments))
    return rules


def loss(card: Card) -> Rule:
    """aten/src/ATen/native/Loss.cpp: every value's loss, then their mean or sum."""

    def rule(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
        if out.dim() or not args[0].dim():
            return ()
        terms = out.new_empty(torch.broadcast_shapes(args[0].shape, args[1].shape), device="meta")
        sums = reduction_blocks(terms, None, accumulator(terms), sum_vector(terms), card)
        return (nbytes(terms), *sums)

    return rule


def pointwise_loss(input: torch.Tensor, target: torch.Tensor, reduction: int = 1, *_: Any) -> torch.Tensor:
    # aten/src/ATen/native/BinaryOps.cpp, the losses' meta functions: the result is made for every value, then resized
    dtype = torch.promote_types(input.dtype, target.dtype)
    full = input.new_empty(torch.broadcast_shapes(input.shape, target.shape), dtype=dtype)
    return aten.as_strided.default(full, (), ()) if reduction else full


def foreach_norm(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/cuda/ForeachReduceOp.cu: a number for each part of 65,536 values, of as many parts each."""
    width = max(4, args[0][0].element_size())
    return (len(args[0]) * max(-(-t.numel() // 65536) for t in args[0]) * width, slice(None))


def logsumexp(input: torch.Tensor, dim: Sequence[int], keepdim: bool = False) -> torch.Tensor:
    # aten/src/ATen/native/ReduceOps.cpp, logsumexp_out_impl
    largest = aten.amax.default(input, dim, True)
    aten.eq.Scalar(aten.abs.default(largest), float("inf"))
    return aten.sum.dim_IntList(aten.exp_.default(aten.sub.Tensor(input, largest)), dim, keepdim)
