"""CUDA kernels of no other family that are written out as other operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_memplan.cuda.rule_set import aten, decomposes, installed


@decomposes(aten._euclidean_dist)
def euclidean_distance(x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
    """``cdist`` of more than 25 rows is a product of matrices.

    Source: aten/src/ATen/native/Distance.cpp, ``_euclidean_dist`` (2.14).
    """
    norm1 = aten.sum.dim_IntList(aten.pow.Tensor_Scalar(x1, 2), [-1], True)
    pad1 = torch.ones_like(norm1)
    norm2 = aten.sum.dim_IntList(aten.pow.Tensor_Scalar(x2, 2), [-1], True)
    pad2 = torch.ones_like(norm2)
    left = aten.cat.default([aten.mul.Scalar(x1, -2), norm1, pad1], -1)
    right = aten.cat.default([x2, pad2, norm2], -1)
    product = aten.mm.default if left.dim() == 2 else aten.bmm.default
    return aten.sqrt_.default(aten.clamp_min_.default(product(left, right.mT), 0))


@decomposes(*installed("_grouped_mm"))
def grouped_mm(
    a: torch.Tensor, b: torch.Tensor, offs: Any = None, bias: Any = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Rows of the output begin at multiples of 16 bytes.

    Source: aten/src/ATen/native/GroupedMMUtils.h, ``create_grouped_gemm_output_tensor`` (2.14).
    """
    dtype = out_dtype or a.dtype
    groups = [] if a.dim() != b.dim() else [offs.size(0) if a.dim() == 2 else a.size(0)]
    rows, columns = a.size(-2), b.size(-1)
    wide = -(-columns * dtype.itemsize // 16) * 16 // dtype.itemsize
    strides = [rows * wide] * len(groups) + [wide, 1]
    return torch.empty_strided([*groups, rows, columns], strides, dtype=dtype, device=a.device)


@decomposes(aten.pixel_shuffle)
def pixel_shuffle(input: torch.Tensor, factor: int) -> torch.Tensor:
    """The output is contiguous, however the input is laid out.

    Source: aten/src/ATen/native/PixelShuffle.cpp, ``math_pixel_shuffle`` (2.14).
    """
    *batch, channels, height, width = input.shape
    parts = input.reshape(*batch, channels // factor**2, factor, factor, height, width)
    n = len(batch)
    parts = parts.permute(*range(n), n, n + 3, n + 1, n + 4, n + 2)
    return parts.reshape(*batch, channels // factor**2, height * factor, width * factor)


@decomposes(aten.pixel_unshuffle)
def pixel_unshuffle(input: torch.Tensor, factor: int) -> torch.Tensor:
    *batch, channels, height, width = input.shape
    parts = input.reshape(*batch, channels, height // factor, factor, width // factor, factor)
    n = len(batch)
    parts = parts.permute(*range(n), n, n + 2, n + 4, n + 1, n + 3)
    return parts.reshape(*batch, channels * factor**2, height // factor, width // factor)


@decomposes(aten.roll)
def roll(input: torch.Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> torch.Tensor:
    """Roll one dimension after the other, and keep all results until the last.

    Source: aten/src/ATen/native/TensorTransformations.h, ``roll_common`` (2.14).
    """
    if len(dims) < 2:
        return aten.roll.default(input.contiguous(), shifts, dims)
    rolled = aten.roll.default(input.contiguous(), [shifts[0]], [dims[0]])
    return roll(rolled, shifts[1:], dims[1:])
