"""Outputs of operators that run often: their shapes and strides, without asking torch's fake kernels.

A fake kernel may run many operators, and is asked anew for every shape. Where no rule is sure, the fake kernel decides:
it lays outputs out as the CPU does. The outputs of convolutions and normalizations, which CUDA lays out otherwise, have
their rules beside these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

from lightning_memplan.cuda.layout import CONTIGUOUS, elementwise_strides, is_dense
from lightning_memplan.cuda.rule_set import Metas, Operator, OutputMeta, aten, installed, output_metas

#: Elementwise operators that torch does not tag as such
_ELEMENTWISE = frozenset(
    installed(
        """elu_backward hardshrink_backward hardsigmoid_backward hardswish hardswish_backward hardtanh_backward
        leaky_relu_backward mish_backward softplus_backward softshrink_backward"""
    )
)
#: Elementwise operators whose kernel reads the second tensor first
_SECOND_FIRST = frozenset(installed("threshold_backward leaky_relu_backward"))


@cache
def is_elementwise(func: Operator) -> bool:
    """Check that an operator makes one new tensor, of the order of dimensions that its inputs have.

    >>> is_elementwise(aten.mul.Tensor), is_elementwise(aten.mm.default), is_elementwise(aten.mul_.Tensor)
    (True, False, False)
    """
    if func in _ELEMENTWISE:
        return True
    returns = func._schema.returns
    if len(returns) != 1 or str(returns[0].type) != "Tensor" or returns[0].alias_info is not None:
        return False
    return torch.Tag.pointwise in func.tags and func is not aten.native_dropout_backward.default


def relaid(func: Operator, args: Sequence[Any], kwargs: Mapping[str, Any], out: torch.Tensor) -> OutputMeta | None:
    """Return the output of an elementwise operator as its kernel lays it out; None if it is laid out so.

    torch's fake kernels convert halves first, which makes tensors that are broadcast, or parts of others, contiguous.
    """
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.dim()]
    if out.dim() < 2 or kwargs.get("memory_format") not in (None, torch.preserve_format):
        return None
    if given and is_dense(out) and all(t.shape == out.shape and t.stride() == out.stride() for t in given):
        return None
    if func in _SECOND_FIRST:
        given.reverse()
    strides = elementwise_strides(out.shape, given)
    if strides == out.stride():
        return None
    return OutputMeta(torch.empty_strided(out.shape, strides, dtype=out.dtype, device="meta"), out.dtype)


@output_metas(aten.threshold_backward)
def like_first(tensor: torch.Tensor, *others: Any, **kwargs: Any) -> Metas | None:
    """An elementwise operator has an output like its first tensor, if all have one shape and one layout."""
    tensors = [other for other in others if isinstance(other, torch.Tensor)]
    alike = all(t.stride() == tensor.stride() and t.size() == tensor.size() for t in tensors)
    if kwargs or not is_dense(tensor) or not alike:
        return None
    return [OutputMeta(tensor, tensor.dtype)]


@output_metas(aten.add.Tensor, aten.mul.Tensor, aten.gelu, aten.gelu_backward)
def pointwise(tensor: torch.Tensor, *others: Any, approximate: str = "none", **kwargs: Any) -> Metas | None:
    """The same with numbers and smaller tensors, where no type is promoted; any approximation of gelu."""
    tensors = [other for other in others if isinstance(other, torch.Tensor)]
    numbers = all(isinstance(other, (int, float, torch.Tensor)) for other in others)
    if not numbers or not tensor.is_floating_point() or not _are_alike(tensor, *tensors):
        return None
    if tensor.is_contiguous():  # its order of dimensions decides, whatever that of a tensor that is broadcast over it
        tensors = [other for other in tensors if not _broadcasts(other.shape, tensor.shape)]
    return like_first(tensor, *tensors, **kwargs) if approximate in ("none", "tanh") else None


def _are_alike(*tensors: torch.Tensor) -> bool:
    """Check that tensors have one type and one device."""
    return len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1


def _broadcasts(shape: torch.Size, over: torch.Size) -> bool:
    """Check that a smaller shape is broadcast over another."""
    pairs = zip(reversed(shape), reversed(over), strict=False)
    return shape != over and len(shape) <= len(over) and all(n in (1, whole) for n, whole in pairs)


@output_metas(aten.addmm)
def addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **kwargs: Any) -> Metas | None:
    if kwargs or (bias.dim(), a.dim(), b.dim()) != (1, 2, 2) or not _are_alike(bias, a, b):
        return None
    rows, columns = a.size(0), b.size(1)
    if (a.size(1), bias.size(0)) != (b.size(0), columns):
        return None
    return [OutputMeta(torch.Size([rows, columns]), a.dtype)]


@output_metas(aten.sum.dim_IntList)
def sum_of_dims(tensor: torch.Tensor, dims: Sequence[int] | None, keepdim: bool = False, **kwargs: Any) -> Metas | None:
    rank = tensor.dim()
    if kwargs or not dims or not tensor.is_floating_point() or not _are_within(dims, rank):
        return None
    gone = {dim % rank for dim in dims}
    if len(gone) < len(dims):
        return None
    sizes = [1 if dim in gone else size for dim, size in enumerate(tensor.shape) if keepdim or dim not in gone]
    return [OutputMeta(torch.Size(sizes), tensor.dtype)]


def _are_within(dims: Sequence[int], rank: int) -> bool:
    return all(-rank <= dim < rank for dim in dims)


@output_metas(aten.select_backward, aten.slice_backward)
def into_zeros(grad: torch.Tensor, sizes: Sequence[int], *_: Any) -> Metas:
    return [OutputMeta(torch.Size(sizes), grad.dtype)]


@output_metas(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(tensor: torch.Tensor, mask: torch.Tensor, value: Any) -> Metas:
    """The result is a contiguous clone.

    Source: aten/src/ATen/native/TensorAdvancedIndexing.cpp, ``masked_fill`` (2.14).
    """
    return [OutputMeta(torch.broadcast_shapes(tensor.shape, mask.shape), tensor.dtype)]


@output_metas(aten.roll)
def roll(tensor: torch.Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Metas | None:
    """The result is contiguous, however the input is laid out.

    Source: aten/src/ATen/native/cuda/TensorTransformations.cu, ``roll_cuda`` (2.14).
    """
    if not _are_within(dims, tensor.dim()):
        return None
    return [OutputMeta(tensor.shape, tensor.dtype)]


@output_metas(aten._foreach_sqrt)
def like_each(tensors: Sequence[torch.Tensor]) -> Metas | None:
    if not all(t.device == tensors[0].device and is_dense(t) for t in tensors):
        return None
    return [OutputMeta(t, t.dtype) for t in tensors]


@output_metas(aten.zeros_like, aten.empty_like, aten.clone, aten._to_copy)
def new_like(tensor: torch.Tensor, **kwargs: Any) -> Metas | None:
    if kwargs.get("layout") not in (None, torch.strided) or kwargs.get("device") not in (None, tensor.device):
        return None
    dtype, order = kwargs.get("dtype") or tensor.dtype, kwargs.get("memory_format")
    if order is CONTIGUOUS:
        return [OutputMeta(tensor.shape, dtype)]
    if order not in (None, torch.preserve_format) or not is_dense(tensor):
        return None
    return [OutputMeta(tensor, dtype)]
