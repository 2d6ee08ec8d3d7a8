"""CUDA kernels that are written out as other operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lightning_memplan.cuda.attention import efficient, efficient_backward
from lightning_memplan.cuda.indexing import ctc_loss_backward, embedding_bag, embedding_bag_backward
from lightning_memplan.cuda.normalization import norm_gradient, norm_statistics, norm_sums, normalized
from lightning_memplan.cuda.recurrent import cudnn_rnn, cudnn_rnn_backward, no_dropout_state, pack_padded
from lightning_memplan.cuda.reductions import logsumexp, pointwise_loss
from lightning_memplan.cuda.rule_set import aten, exists


def _euclidean_distance(x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
    # aten/src/ATen/native/Distance.cpp, _euclidean_dist: cdist of more than 25 rows
    norm1 = aten.sum.dim_IntList(aten.pow.Tensor_Scalar(x1, 2), [-1], True)
    pad1 = torch.ones_like(norm1)
    norm2 = aten.sum.dim_IntList(aten.pow.Tensor_Scalar(x2, 2), [-1], True)
    pad2 = torch.ones_like(norm2)
    left = aten.cat.default([aten.mul.Scalar(x1, -2), norm1, pad1], -1)
    right = aten.cat.default([x2, pad2, norm2], -1)
    product = aten.mm.default if left.dim() == 2 else aten.bmm.default
    return aten.sqrt_.default(aten.clamp_min_.default(product(left, right.mT), 0))


def _grouped_mm(
    a: torch.Tensor, b: torch.Tensor, offs: Any = None, bias: Any = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    # aten/src/ATen/native/GroupedMMUtils.h, create_grouped_gemm_output_tensor: rows begin at multiples of 16 bytes
    dtype = out_dtype or a.dtype
    groups = [] if a.dim() != b.dim() else [offs.size(0) if a.dim() == 2 else a.size(0)]
    rows, columns = a.size(-2), b.size(-1)
    wide = -(-columns * dtype.itemsize // 16) * 16 // dtype.itemsize
    strides = [rows * wide] * len(groups) + [wide, 1]
    return torch.empty_strided([*groups, rows, columns], strides, dtype=dtype, device=a.device)


def _pixel_shuffle(input: torch.Tensor, factor: int) -> torch.Tensor:
    # aten/src/ATen/native/PixelShuffle.cpp, math_pixel_shuffle: contiguous, however the input is laid out
    *batch, channels, height, width = input.shape
    parts = input.reshape(*batch, channels // factor**2, factor, factor, height, width)
    n = len(batch)
    parts = parts.permute(*range(n), n, n + 3, n + 1, n + 4, n + 2)
    return parts.reshape(*batch, channels // factor**2, height * factor, width * factor)


def _pixel_unshuffle(input: torch.Tensor, factor: int) -> torch.Tensor:
    *batch, channels, height, width = input.shape
    parts = input.reshape(*batch, channels, height // factor, factor, width // factor, factor)
    n = len(batch)
    parts = parts.permute(*range(n), n, n + 2, n + 4, n + 1, n + 3)
    return parts.reshape(*batch, channels * factor**2, height // factor, width // factor)


def _roll(input: torch.Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> torch.Tensor:
    # aten/src/ATen/native/TensorTransformations.h, roll_common: one dimension after the other, all between them kept
    if len(dims) < 2:
        return aten.roll.default(input, shifts, dims)
    rolled = aten.roll.default(input, [shifts[0]], [dims[0]])
    return _roll(rolled, shifts[1:], dims[1:])


KERNELS: Mapping[Any, Callable[..., Any]] = {
    aten._embedding_bag.default: embedding_bag,
    aten._embedding_bag_backward.default: embedding_bag_backward,
    aten._pack_padded_sequence.default: pack_padded,
    aten._scaled_dot_product_efficient_attention.default: efficient,
    aten._scaled_dot_product_efficient_attention_backward.default: efficient_backward,
    aten._cudnn_rnn.default: cudnn_rnn,
    aten._cudnn_rnn_backward.default: cudnn_rnn_backward,
    aten._cudnn_init_dropout_state.default: no_dropout_state,
    aten.batch_norm_stats.default: norm_statistics,
    aten.batch_norm_gather_stats_with_counts.default: norm_statistics,
    aten.batch_norm_elemt.default: normalized,
    aten.batch_norm_backward_reduce.default: norm_sums,
    aten.batch_norm_backward_elemt.default: norm_gradient,
    aten._ctc_loss_backward.default: ctc_loss_backward,
    aten._ctc_loss_backward.Tensor: ctc_loss_backward,
    aten._euclidean_dist.default: _euclidean_distance,
    **({aten._grouped_mm.default: _grouped_mm} if exists("_grouped_mm.default") else {}),
    aten.logsumexp.default: logsumexp,
    aten.mse_loss.default: pointwise_loss,
    aten.pixel_shuffle.default: _pixel_shuffle,
    aten.pixel_unshuffle.default: _pixel_unshuffle,
    aten.smooth_l1_loss.default: pointwise_loss,
    aten.roll.default: _roll,
}
