"""Outputs whose memory layout differs between CUDA and the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lightning_memplan.cuda.convolutions import MADE
from lightning_memplan.cuda.layout import Made, laid_out_as, suggested
from lightning_memplan.cuda.rule_set import aten


# ----------------------------------------------------------------------------------- shapes of outputs, told directly
def _dense(tensor: torch.Tensor) -> bool:
    last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    return tensor.is_contiguous() or (tensor.dim() in (4, 5) and tensor.is_contiguous(memory_format=last))


def _like_first(tensor: torch.Tensor, *others: Any, **kwargs: Any) -> list[Made] | None:
    """An elementwise operator of tensors of one shape and layout."""
    tensors = [other for other in others if isinstance(other, torch.Tensor)]
    if kwargs or not _dense(tensor) or any(t.stride() != tensor.stride() or t.size() != tensor.size() for t in tensors):
        return None
    return [(tensor, tensor.dtype)]


def _alike(*tensors: torch.Tensor) -> bool:
    """Whether they are of one type, and on one device."""
    return len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1


def _pointwise_made(tensor: torch.Tensor, *others: Any, approximate: str = "none", **kwargs: Any) -> list[Made] | None:
    """The same with numbers or smaller tensors, and whatever gelu is approximated by, where nothing is promoted."""
    tensors = [other for other in others if isinstance(other, torch.Tensor)]
    numbers = all(isinstance(other, (int, float, torch.Tensor)) for other in others)
    if not numbers or not tensor.is_floating_point() or not _alike(tensor, *tensors):
        return None
    if tensor.is_contiguous():  # then its order of dimensions decides, whatever that of what is spread over it
        tensors = [other for other in tensors if not _spreads(other.shape, tensor.shape)]
    return _like_first(tensor, *tensors, **kwargs) if approximate in ("none", "tanh") else None


def _spreads(shape: torch.Size, over: torch.Size) -> bool:
    pairs = zip(reversed(shape), reversed(over), strict=False)
    return shape != over and len(shape) <= len(over) and all(n in (1, whole) for n, whole in pairs)


def _addmm_made(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **kwargs: Any) -> list[Made] | None:
    if kwargs or (bias.dim(), a.dim(), b.dim()) != (1, 2, 2) or not _alike(bias, a, b):
        return None
    rows, columns = a.size(0), b.size(1)
    return [(torch.Size([rows, columns]), a.dtype)] if (a.size(1), bias.size(0)) == (b.size(0), columns) else None


def _sum_made(
    tensor: torch.Tensor, dims: Sequence[int] | None, keepdim: bool = False, **kwargs: Any
) -> list[Made] | None:
    rank = tensor.dim()
    if kwargs or not dims or not tensor.is_floating_point() or not _within(dims, rank):
        return None
    gone = {dim % rank for dim in dims}
    if len(gone) < len(dims):
        return None
    sizes = [1 if dim in gone else size for dim, size in enumerate(tensor.shape) if keepdim or dim not in gone]
    return [(torch.Size(sizes), tensor.dtype)]


def _within(dims: Sequence[int], rank: int) -> bool:
    return all(-rank <= dim < rank for dim in dims)


def _into_zeros_made(grad: torch.Tensor, sizes: Sequence[int], *_: Any) -> list[Made]:
    return [(torch.Size(sizes), grad.dtype)]


def _roll_made(tensor: torch.Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> list[Made] | None:
    return [(tensor.shape, tensor.dtype)] if tensor.is_contiguous() and _within(dims, tensor.dim()) else None


def _like_each(tensors: Sequence[torch.Tensor]) -> list[Made] | None:
    return (
        [(t, t.dtype) for t in tensors] if all(t.device == tensors[0].device and _dense(t) for t in tensors) else None
    )


def _new_like(tensor: torch.Tensor, **kwargs: Any) -> list[Made] | None:
    if kwargs.get("layout") not in (None, torch.strided) or kwargs.get("device") not in (None, tensor.device):
        return None
    order = kwargs.get("memory_format")
    if order is torch.contiguous_format:
        return [(tensor.shape, kwargs.get("dtype") or tensor.dtype)]
    if order not in (None, torch.preserve_format) or not _dense(tensor):
        return None
    return [(tensor, kwargs.get("dtype") or tensor.dtype)]


def _layer_norm_made(source: torch.Tensor, shape: Sequence[int], *_: Any) -> list[Made]:
    wide = torch.float32 if source.element_size() == 2 else source.dtype
    rows = torch.Size([*source.shape[: source.dim() - len(shape)], *(1 for _ in shape)])
    return [(source.shape, source.dtype), (rows, wide), (rows, wide)]


def _layer_norm_backward_made(
    grad: torch.Tensor, source: torch.Tensor, shape: Any, mean: Any, rstd: Any, weight: Any, bias: Any, mask: Any
) -> list[Made | None]:
    return [
        (tensor.shape, tensor.dtype) if wanted and tensor is not None else None
        for tensor, wanted in zip((source, weight, bias), mask, strict=True)
    ]


def _batch_norm_made(input: torch.Tensor, weight: torch.Tensor, *rest: Any) -> list[Made] | None:
    sums: list[Made] = [(weight, weight.dtype), (weight, weight.dtype), (torch.Size([0]), torch.uint8)]
    return [(input, input.dtype) if _dense(input) else laid_out_as(input.shape, suggested(input), input.dtype), *sums]


def _batch_norm_backward_made(
    input: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor, *_: Any
) -> list[Made] | None:
    of_input = (input, input.dtype) if _dense(input) else laid_out_as(input.shape, suggested(input), input.dtype)
    return [of_input, (weight, weight.dtype), (weight, weight.dtype)]


def _loss_backward_made(grad: torch.Tensor, input: torch.Tensor, *_: Any) -> list[Made]:
    # aten/src/ATen/native/Loss.cpp: new zeros, contiguous, however the input is laid out
    return [(input.shape, input.dtype)]


def _native_norm_backward_made(
    grad: torch.Tensor, input: torch.Tensor, weight: torch.Tensor | None, *rest: Any
) -> list[Made | None] | None:
    if _dense(input) or weight is None:
        return None
    made: list[Made] = [(input.shape, input.dtype), (weight.shape, weight.dtype), (weight.shape, weight.dtype)]
    return [one if asked else None for one, asked in zip(made, rest[-1], strict=True)]


#: See ``Rules.shapes``. An output that is not told here is what torch's fake kernel says: for the CPU, whose
#: convolutions lay their outputs out otherwise than cuDNN's do.
def _log_softmax_gradient(grad: torch.Tensor, output: torch.Tensor, dim: int, dtype: torch.dtype) -> list[Made]:
    # aten/src/ATen/native/SoftMax.cpp, its meta function: contiguous, whatever the gradient is
    return [(grad.size(), dtype)]


SHAPES: Mapping[Any, Callable[..., Sequence[Made | None] | None]] = {
    **MADE,
    aten.native_layer_norm.default: _layer_norm_made,
    aten.native_layer_norm_backward.default: _layer_norm_backward_made,
    aten.cudnn_batch_norm.default: _batch_norm_made,
    aten.cudnn_batch_norm_backward.default: _batch_norm_backward_made,
    aten.huber_loss_backward.default: _loss_backward_made,
    aten.mse_loss_backward.default: _loss_backward_made,
    aten.smooth_l1_loss_backward.default: _loss_backward_made,
    aten.native_batch_norm_backward.default: _native_norm_backward_made,
    aten.threshold_backward.default: _like_first,
    aten.add.Tensor: _pointwise_made,
    aten.mul.Tensor: _pointwise_made,
    aten.gelu.default: _pointwise_made,
    aten.gelu_backward.default: _pointwise_made,
    aten.addmm.default: _addmm_made,
    aten.sum.dim_IntList: _sum_made,
    aten.select_backward.default: _into_zeros_made,
    aten.slice_backward.default: _into_zeros_made,
    aten.roll.default: _roll_made,
    aten.zeros_like.default: _new_like,
    aten.empty_like.default: _new_like,
    aten.clone.default: _new_like,
    aten._to_copy.default: _new_like,
    aten._foreach_sqrt.default: _like_each,
    aten._log_softmax_backward_data.default: _log_softmax_gradient,
}
