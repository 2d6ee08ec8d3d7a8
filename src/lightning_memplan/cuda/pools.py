"""Pools, pads, resizing and windows of images: the layout that a kernel reads, and copies into it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lightning_memplan.cuda.layout import CONTIGUOUS, contiguous_copies, copies_in, copy_of, is_dense, suggested
from lightning_memplan.cuda.rule_set import (
    OUTPUTS,
    Allocation,
    Call,
    Gpu,
    Metas,
    OutputMeta,
    Scratch,
    allocates,
    aten,
    decomposes,
    installed,
    output_metas,
)

# ---------------------------------------------------------------------------------------------------------------- pools
# aten/src/ATen/native/cuda (2.14): Im2Col, Col2Im, DilatedMaxPool2d, AveragePool2d, AdaptiveAveragePooling,
# AdaptiveMaxPooling2d, UpSampleNearest2d, UpSampleBicubic2d, ReflectionPad

#: aten/src/ATen/native/cuda: AveragePool*, DilatedMaxPool*, Adaptive*Pooling*, UpSample*, ReflectionPad (2.15)
_DENSE_GRADIENTS = """
adaptive_max_pool3d_backward avg_pool3d_backward
reflection_pad1d_backward upsample_nearest1d_backward upsample_linear1d_backward _adaptive_avg_pool3d_backward
_upsample_nearest_exact1d_backward
"""


@allocates(*installed(_DENSE_GRADIENTS))
def dense_gradient(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """The gradient is read with its channels first or last, else copied."""
    yield OUTPUTS
    yield from _dense_copy(call.input)


@allocates(*installed("upsample_nearest2d_backward _upsample_nearest_exact2d_backward upsample_bilinear2d_backward"))
def resized_gradient(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Fewer than four channels are read and written contiguous.

    Source: aten/src/ATen/native/cuda/UpSampleNearest2d.cu and UpSampleBilinear2d.cu (2.14).
    """
    yield OUTPUTS
    if call.out.size(1) < 4:
        yield from contiguous_copies(call.out, call.input)
    else:
        yield from _dense_copy(call.input)


@allocates(
    *installed(
        """upsample_nearest3d_backward _upsample_nearest_exact3d_backward _upsample_bilinear2d_aa_backward
        _upsample_bicubic2d_aa_backward"""
    )
)
def contiguous_gradient(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Source: aten/src/ATen/native/cuda/UpSampleNearest3d.cu and UpSampleBilinear2d.cu (2.14)."""
    yield OUTPUTS
    yield from contiguous_copies(call.input)


@allocates(aten.upsample_trilinear3d_backward)
def trilinear_gradient(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Source: aten/src/ATen/native/cuda/UpSampleTrilinear3d.cu (2.14)."""
    yield OUTPUTS
    yield from contiguous_copies(call.input, call.out)


def _dense_copy(tensor: torch.Tensor) -> Iterator[Scratch]:
    if not is_dense(tensor):
        yield copy_of(tensor)


@output_metas(aten.fractional_max_pool2d_backward, aten.fractional_max_pool3d_backward)
def like_input(grad: torch.Tensor, input: torch.Tensor, *_: Any) -> Metas:
    """Source: aten/src/ATen/native/cuda/FractionalMaxPool3d.cu (2.14)."""
    return [OutputMeta(input.shape, input.dtype)]


@decomposes(aten.im2col)
def im2col(
    input: torch.Tensor, kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> torch.Tensor:
    """The output is made as large as the input, and then resized.

    Source: aten/src/ATen/native/cuda/Im2Col.cu, ``im2col_cuda`` (2.14).
    """
    *batch, channels, height, width = input.shape
    places = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, d, p, s in zip((height, width), kernel, dilation, padding, stride, strict=True)
    ]
    return _resized(input, (*batch, channels * math.prod(kernel), math.prod(places)))


@decomposes(aten.col2im)
def col2im(input: torch.Tensor, size: Sequence[int], kernel: Sequence[int], *_: Any) -> torch.Tensor:
    """Source: aten/src/ATen/native/cuda/Col2Im.cu, ``col2im_cuda`` (2.14)."""
    *batch, rows, _columns = input.shape
    return _resized(input, (*batch, rows // math.prod(kernel), *size))


def _resized(input: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return the output of a kernel that reads ``input`` contiguous, in memory that was made for the input."""
    out = input.new_empty(input.shape)
    read = input.contiguous()
    if math.prod(shape) > input.numel():
        larger = input.new_empty(shape)
        del out, read
        return larger
    strides = torch.empty(shape, device="meta").stride()
    made: torch.Tensor = aten.as_strided.default(out, shape, strides)
    del read
    return made


@allocates(aten.max_pool2d_with_indices, aten.max_pool3d_with_indices, aten.avg_pool2d)
def pool(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    yield OUTPUTS
    yield from copies_in(suggested(call.input), call.input)


@allocates(aten.upsample_nearest2d, aten._upsample_nearest_exact2d)
def nearest(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Fewer than four channels are read and written contiguous.

    Source: aten/src/ATen/native/cuda/UpSampleNearest2d.cu (2.14).
    """
    yield OUTPUTS
    layout = suggested(call.input)
    if layout is CONTIGUOUS or call.input.size(1) < 4:
        yield from contiguous_copies(call.out, call.input)
    else:
        yield from copies_in(layout, call.input)


@allocates(aten.upsample_bilinear2d)
def bilinear(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Source: aten/src/ATen/native/cuda/UpSampleBilinear2d.cu (2.14)."""
    yield OUTPUTS
    layout = suggested(call.input)
    if layout is not CONTIGUOUS and call.input.size(1) >= 4:
        yield from copies_in(layout, call.input)


@allocates(aten.max_pool2d_with_indices_backward, aten.avg_pool2d_backward)
def pool_backward(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    yield OUTPUTS
    grad, source = call.args[:2]
    yield from copies_in(suggested(source), source, grad)


@allocates(aten.max_pool3d_with_indices_backward)
def pool3d_backward(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Source: aten/src/ATen/native/cuda/DilatedMaxPool3d.cu (2.14)."""
    yield OUTPUTS
    yield from copies_in(suggested(call.args[1]), call.input, call.args[7])


@allocates(aten._adaptive_avg_pool2d)
def adaptive_average(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    if suggested(call.input) is CONTIGUOUS:
        yield from contiguous_copies(call.input)
    yield OUTPUTS


@allocates(aten._adaptive_avg_pool3d, aten.max_unpool2d, aten.max_unpool3d)
def contiguous_before(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Operands are copied before the output is made."""
    yield from contiguous_copies(*(arg for arg in call.args if isinstance(arg, torch.Tensor)))
    yield OUTPUTS


@allocates(aten._adaptive_avg_pool2d_backward)
def adaptive_average_backward(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    yield OUTPUTS
    grad, source = call.args[:2]
    yield from contiguous_copies(grad) if suggested(source) is CONTIGUOUS else ()


@allocates(aten.adaptive_max_pool2d)
def adaptive_maximum(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    yield OUTPUTS
    yield from contiguous_copies(*call.out, call.input)


@allocates(aten.adaptive_max_pool2d_backward)
def adaptive_maximum_backward(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    yield OUTPUTS
    yield from contiguous_copies(call.input, call.args[2], call.out)


@allocates(
    aten.adaptive_max_pool3d,
    aten.avg_pool3d,
    aten.reflection_pad1d,
    aten.reflection_pad2d,
    aten.reflection_pad2d_backward,
    aten.reflection_pad3d,
    aten.upsample_bicubic2d_backward,
    aten.upsample_nearest1d,
    aten._upsample_nearest_exact1d,
)
def contiguous_input(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    yield OUTPUTS
    yield from contiguous_copies(call.input)


@allocates(
    *installed("upsample_nearest3d _upsample_nearest_exact3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"),
)
def contiguous_output(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """An output whose channels come last is written to from a contiguous one.

    Source: aten/src/ATen/native/cuda/UpSampleNearest3d.cu and UpSampleBilinear2d.cu (2.14).
    """
    yield OUTPUTS
    yield from contiguous_copies(call.out, call.input)


@output_metas(
    *installed(
        "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d"
    )
)
def padded(input: torch.Tensor, padding: Sequence[int]) -> Metas:
    """The output is contiguous, however the input is laid out.

    Source: aten/src/ATen/native/cuda/ReflectionPad.cu and ReplicationPadding.cu (2.14).
    """
    sizes = list(input.shape)
    for dim in range(len(padding) // 2):
        sizes[-1 - dim] += padding[2 * dim] + padding[2 * dim + 1]
    return [OutputMeta(torch.Size(sizes), input.dtype)]


@output_metas(aten.max_unpool2d, aten.max_unpool3d)
def unpooled(input: torch.Tensor, indices: torch.Tensor, sizes: Sequence[int], *_: Any) -> Metas:
    """Source: aten/src/ATen/native/cuda/MaxUnpooling.cu (2.14)."""
    kept = input.shape[: input.dim() - len(sizes)]
    return [OutputMeta(torch.Size([*kept, *sizes]), input.dtype)]
