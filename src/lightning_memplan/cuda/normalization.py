"""Batch, group and layer normalization, softmax: statistics, copies and partial sums."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_memplan.cuda.convolutions import convolution_layout
from lightning_memplan.cuda.layout import Rule, is_dense, relaid
from lightning_memplan.cuda.reductions import Card, sum_vector
from lightning_memplan.cuda.rule_set import aten


def _batch_norm_copies(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/Normalization.cpp, ``_batch_norm_impl_index``."""
    copied = relaid(args[0], convolution_layout(args[0]))
    return (*copied, slice(None)) if copied else ()


def _batch_norm_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/cudnn/BatchNorm.cpp: the gradient is laid out as the input is."""
    copied = relaid(args[1], convolution_layout(args[0]))
    return (*copied, slice(None)) if copied else ()


def _group_norm(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/cuda/group_norm_kernel.cu: a scale and a shift for each channel of each sample."""
    _, weight, bias, samples, channels, inner = args[:6]
    if inner == 1 or (weight is None and bias is None):
        return ()
    return (4 * samples * channels,) * 2


def _group_norm_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    _, _, _, _, weight, samples, channels, _, groups, mask = args[:10]
    sums = (4 * samples * channels,) * 2
    of_groups = 4 * samples * groups
    return (*sums, of_groups, of_groups, of_groups if weight is None else sums[0]) if mask[0] else sums


def _norm_blocks(source: torch.Tensor, values: int) -> Sequence[Any]:
    """Where channels come last, blocks pass so many values for each channel: two sums, or what makes a mean."""
    if not _channels_last(source):
        return ()
    shape = source.numel() // source.size(1), source.size(1), values * max(4, source.element_size())
    return ("norm_blocks", 0, *shape), ("norm_blocks", 1, *shape)


def _channels_last(source: torch.Tensor) -> bool:
    """aten/src/ATen/native/cuda/Normalization.cu, ``batch_norm_use_channels_last_kernels``."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(source.dim())
    if layout is not None and source.is_contiguous(memory_format=layout):
        return True
    return source.is_contiguous() and source.stride(1) == 1


def _native_norm(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """Where channels are neither first nor last the moments are var_mean's, of a copy in float32 if it is of halves."""
    source = args[0]
    general = not source.is_contiguous() and not _channels_last(source)
    wide = (4 * source.numel(),) if general and source.element_size() == 2 else ()
    return (slice(None), *wide, *_norm_blocks(source, 4)) if args[5] else ()


def _native_norm_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """Two passes where channels come last: the gradient of the input is made in the second."""
    source, of_input, training = args[1], args[9][0], args[7]
    if not (of_input and training and _channels_last(source)):
        return ()
    sums = (source.size(1) * max(4, source.element_size()),) * 2
    return (*sums, slice(1, 3), [*_norm_blocks(source, 2)], slice(0, 1))


NORMS: dict[Any, Rule] = {
    aten.cudnn_batch_norm.default: _batch_norm_copies,
    aten.cudnn_batch_norm_backward.default: _batch_norm_backward,
    aten.native_batch_norm.default: _native_norm,
    aten.native_batch_norm_backward.default: _native_norm_backward,
    aten.batch_norm_stats.default: lambda args, kwargs, out: _norm_blocks(args[0], 4),
    aten.batch_norm_backward_reduce.default: lambda args, kwargs, out: _norm_blocks(args[1], 2),
    aten.native_group_norm.default: _group_norm,
    aten.native_group_norm_backward.default: _group_norm_backward,
}


def _layer_norm(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/cuda/layer_norm_kernel.cu."""
    copied = relaid(args[0], torch.contiguous_format)
    return (*copied, slice(None)) if copied else ()


def layer_norm_backward(card: Card) -> Rule:
    def rule(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
        grad, source, shape, _, _, weight, _, mask = args[:8]
        copies = (*relaid(source, torch.contiguous_format), slice(None), *relaid(grad, torch.contiguous_format))
        if weight is None or not mask[1]:
            return copies
        width = math.prod(shape)
        rows = (source.numel() // width, width, weight.element_size(), sum_vector(weight), *card)
        parts, total, *sums = (("layer_norm_rows", part, *rows) for part in range(4))
        several = 2 if mask[2] else 1
        return (*copies, [*[parts] * several, *[total, [*sums]] * several])

    return rule


def _softmax(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/cuda/SoftMax.cu, ``host_softmax``."""
    return relaid(args[0], torch.contiguous_format)


def _safe_softmax(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/transformers/attention.cpp: which values are masked, and which whole rows."""
    return (out.numel(), out.numel() // max(1, out.size(args[1])), out.element_size())


def _softmax_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """The gradient times the output is a tensor of its own, laid out as the gradient is, and then made contiguous."""
    grad, output = args[:2]
    size = output.numel() * max(grad.element_size(), output.element_size())
    again = (size,) if is_dense(grad) and not grad.is_contiguous() else ()
    return (size, *again, *relaid(output, torch.contiguous_format))


def _log_softmax_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    grad, output = args[:2]
    return (*relaid(grad, torch.contiguous_format), *relaid(output, torch.contiguous_format))


ROWS: dict[Any, Rule] = {
    aten.native_layer_norm.default: _layer_norm,
    aten._softmax.default: _softmax,
    aten._safe_softmax.default: _safe_softmax,
    aten._log_softmax.default: _softmax,
    aten._softmax_backward_data.default: _softmax_backward,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
}


# aten/src/ATen/native/cuda/Normalization.cu (2.14): batch norm in two passes, with what other ranks say between them
def norm_statistics(input: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _wide(input), _wide(input)


def normalized(input: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(input)


def norm_sums(
    grad: torch.Tensor,
    input: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: torch.Tensor | None,
    of_input: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[torch.Tensor | None, ...]:
    sums = [torch.empty_like(mean) if of_input else None for _ in range(2)]
    of = [torch.empty_like(weight) if asked and weight is not None else None for asked in (of_weight, of_bias)]
    return (*sums, *of)


def norm_gradient(grad: torch.Tensor, input: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(input)


def _wide(input: torch.Tensor) -> torch.Tensor:
    return input.new_empty(input.size(1), dtype=torch.float32 if input.element_size() == 2 else input.dtype)
