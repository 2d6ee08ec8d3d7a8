"""Convolutions, pools and what else works on images: which layout CUDA wants, and what is copied into it.

Kernels of images read tensors in one of two orders, channels first or last. What lies otherwise is copied beforehand,
beside the outputs; a convolution takes a workspace as well (``cuda.workspaces``). 1D convolutions are those of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lightning_memplan.cuda.cudnn import KINDS, get_ready
from lightning_memplan.cuda.cudnn_process import FILTER, FORWARD, INPUT, LAST, MOVED, PLAIN
from lightning_memplan.cuda.layout import Made, Rule, copied, laid_out_as, nbytes, relaid, suggested

aten = torch.ops.aten


def convolution_layout(*tensors: torch.Tensor) -> torch.memory_format:
    """aten/src/ATen/native/ConvUtils.h, ``cudnn_conv_suggest_memory_format``: channels last if one of them is so."""
    for tensor in tensors:
        layout = suggested(tensor)
        if layout is not torch.contiguous_format and tensor.dtype != torch.float64:
            return layout
    return torch.contiguous_format


def _images(source: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """aten/src/ATen/native/Convolution.cpp, ``view4d``: a 1D convolution is one of images of one row, whose input has
    been made contiguous."""
    if source.dim() != 3:
        return source, *others
    return torch.empty(source.shape, dtype=source.dtype, device="meta").unsqueeze(2), *(
        torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta").unsqueeze(2)
        for tensor in others
    )


def _row_copied(source: torch.Tensor) -> tuple[int, ...]:
    return (nbytes(source),) if source.dim() == 3 and not source.is_contiguous() else ()


def _depthwise(
    source: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
) -> bool:
    """aten/src/ATen/native/Convolution.cpp, ``is_depthwise`` without ``use_cudnn_depthwise``: torch's own."""
    channels = source.size(1)
    if transposed or source.dim() < 4 or groups == 1 or channels != groups or weight.size(0) % channels:
        return False
    if convolution_layout(source, weight) is not torch.contiguous_format:
        return False
    if source.dim() == 5 or source.dtype != torch.float16 or channels < 32 or set(dilation) != {1}:
        return True
    if source.size(2) == 1 and stride[-1] == 1:
        return False
    width, kernel = source.size(3), weight.size(3)
    if stride[0] != stride[-1] or weight.size(2) != kernel or kernel not in (1, 3, 5) or width < 7:
        return True
    wide = channels >= 512 or (channels >= 256 and width >= 28)
    return stride[-1] != 1 and not (stride[-1] == 2 and kernel > 1 and wide)


def _convolution(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/cudnn/ConvShared.cpp, ``cudnn_convolution``."""
    source, weight = args[:2]
    row = _row_copied(source)
    source, weight = _images(source, weight)
    if _depthwise(source, weight, args[3], args[5], args[6], args[8]):
        return (*row, *relaid(source, torch.contiguous_format), slice(None))
    layout = convolution_layout(source, weight)
    return (*row, *relaid(source, layout), slice(None), *relaid(weight, layout))


def _convolution_backward(sums_of: Callable[[torch.Tensor], Sequence[Any]]) -> Rule:
    """aten/src/ATen/native/Convolution.cpp and cudnn/ConvShared.cpp: what is not laid out as cuDNN wants it is copied;
    the bias's gradient is a sum."""

    def rule(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
        grad, source, weight, mask = *args[:3], args[10]
        sums = sums_of(grad) if mask[2] else ()
        row = _row_copied(source)
        source, grad, weight = _images(source, grad, weight)
        if _depthwise(source, weight, args[4], args[6], args[7], args[9]):
            copies = [relaid(tensor, torch.contiguous_format) for tensor in (grad, source, weight)]
            if source.dim() == 5:
                return [slice(0, 2), *copies[0], *copies[1], *copies[2]], slice(2, 3), *sums
            return *row, [*copies[0], [*copies[1], slice(1, 2)], slice(0, 1), *copies[2]], slice(2, 3), *sums
        layout = convolution_layout(source, weight)
        moved, laid = (relaid(source, layout) if mask[1] else ()), relaid(grad, layout)
        once: tuple[int, ...] = ()  # the gradient, laid out for both where it suggests another layout
        if args[7] or (laid and convolution_layout(grad) is not layout):
            once, laid = laid, ()
        of_input = [slice(0, 1), *laid, *relaid(weight, layout)] if mask[0] else []
        of_weight = [*laid, slice(1, 2)] if mask[1] else []
        return *row, [*moved, *once, of_input, of_weight], slice(2, 3), *sums

    return rule


def _convolution_made(
    source: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> list[Made] | None:
    if not source.numel():
        return None
    rank = source.dim() - 2
    place = [[value[k % len(value)] for k in range(rank)] for value in (stride, padding, dilation, output_padding)]
    sizes = [source.size(0), weight.size(1) * groups if transposed else weight.size(0)]
    for length, kernel, s, p, d, o in zip(source.shape[2:], weight.shape[2:], *place, strict=True):
        reach = d * (kernel - 1)
        sizes.append((length - 1) * s - 2 * p + reach + o + 1 if transposed else (length + 2 * p - reach - 1) // s + 1)
    source, weight = _images(source, weight)
    own = _depthwise(source, weight, stride, dilation, transposed, groups)
    return [laid_out_as(sizes, torch.contiguous_format if own else convolution_layout(source, weight), source.dtype)]


def _convolution_backward_made(
    grad: torch.Tensor,
    source: torch.Tensor,
    weight: torch.Tensor,
    bias_sizes: Any,
    stride: Sequence[int],
    padding: Any,
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Any,
    groups: int,
    mask: Sequence[bool],
) -> list[Made | None] | None:
    if not source.numel():
        return None
    images, filters = _images(source, weight)
    own = _depthwise(images, filters, stride, dilation, transposed, groups)
    layout = torch.contiguous_format if own else convolution_layout(images, filters)
    made: list[Made] = [laid_out_as(tensor.shape, layout, tensor.dtype) for tensor in (source, weight)]
    made.append((torch.Size([grad.size(1)]), grad.dtype))
    return [one if wanted else None for one, wanted in zip(made, mask, strict=True)]


def convolutions(capability: tuple[int, int], sums_of: Callable[[torch.Tensor], Sequence[Any]]) -> dict[Any, Rule]:
    """Of convolutions and their gradients; ``sums_of`` is what the sum over a gradient takes, that of the bias."""
    return {
        aten.convolution.default: _with_workspaces(_convolution, capability),
        aten.convolution_backward.default: _with_workspaces(_convolution_backward(sums_of), capability),
    }


def _with_workspaces(rule: Rule, capability: tuple[int, int]) -> Rule:
    """A convolution's rule, and cuDNN's workspaces (see ``cuda.workspaces``) one after the other: a call's one, or each
    gradient's. They are none until a replay asks for more."""

    def both(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
        get_ready()
        copies = rule(args, kwargs, out)
        gradients = len(args) > 9  # aten.convolution_backward: grad, input, weight, ..., stride, ..., groups, mask
        y, x, weight = args[:3] if gradients else (out, *args[:2])
        stride, padding, dilation, transposed, _, groups = args[4:10] if gradients else args[3:9]
        images, filters = _images(x, weight)
        layout = PLAIN
        if _tensor_cores(x.dtype, capability):
            layout = MOVED if convolution_layout(images, filters) is torch.contiguous_format else LAST
        edges = [edge if len(edge) == x.ndim - 2 else [*edge] * (x.ndim - 2) for edge in (stride, padding, dilation)]
        places = (tensor.shape[2:] for tensor in (x, y, weight))
        card, kind = 10 * capability[0] + capability[1], KINDS.get(str(x.dtype), 0)
        numbers = (
            *(kind, _deterministic(), layout, x.size(0), x.size(1), y.size(1), groups),
            *(number for edge in (*places, *edges) for number in edge),
        )
        parts = (
            [part for part, asked in zip((INPUT, FILTER), args[10], strict=False) if asked] if gradients else [FORWARD]
        )
        return (*copies, *([("convolution", int(transposed), card, part, *numbers)] for part in parts))

    return both


def _deterministic() -> int:
    return int(torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled())


def _tensor_cores(dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether cuDNN computes in them: float32 does by default, as TF32 (torch.backends.cudnn.allow_tf32)."""
    if dtype == torch.float32:
        return capability >= (8, 0) and torch.backends.cudnn.allow_tf32
    return (dtype == torch.float16 and capability >= (7, 0)) or (dtype == torch.bfloat16 and capability >= (8, 0))


def _columns(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/cuda/Im2Col.cu and Col2Im.cu: what is read is made contiguous, twice (seen on 2.14)."""
    return () if args[0].is_contiguous() else (nbytes(args[0]), nbytes(args[0]), slice(None))


#: aten/src/ATen/native/cuda: AveragePool*, DilatedMaxPool*, Adaptive*Pooling*, UpSample*, ReflectionPad (2.15)
COPIED_GRADIENTS = """
adaptive_max_pool3d_backward avg_pool3d_backward max_pool3d_with_indices_backward
reflection_pad1d_backward upsample_bilinear2d_backward upsample_nearest1d_backward upsample_nearest2d_backward
upsample_nearest3d_backward upsample_linear1d_backward upsample_trilinear3d_backward _adaptive_avg_pool3d_backward
_upsample_bilinear2d_aa_backward _upsample_nearest_exact2d_backward _upsample_nearest_exact1d_backward
_upsample_nearest_exact3d_backward
""".split()


def _pool(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    return relaid(args[0], suggested(args[0]))


def _pool_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    grad, source = args[:2]
    return (*relaid(source, suggested(source)), *relaid(grad, suggested(source)))


def _adaptive_average(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    return (*_pool(args, kwargs, out), slice(None))


def _adaptive_average_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    plain = suggested(args[1]) is torch.contiguous_format
    return relaid(args[0], torch.contiguous_format) if plain else copied(0)(args, kwargs, out)


def _adaptive_maximum(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    return tuple(size for tensor in (*out, args[0]) for size in relaid(tensor, torch.contiguous_format))


def _adaptive_maximum_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    return tuple(size for tensor in (args[0], args[2], out) for size in relaid(tensor, torch.contiguous_format))


def _made_contiguous(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    return relaid(args[0], torch.contiguous_format)


#: aten/src/ATen/native/cuda (2.14): Im2Col, Col2Im, DilatedMaxPool2d, AveragePool2d, AdaptiveAveragePooling,
#: AdaptiveMaxPooling2d, UpSampleNearest2d, UpSampleBicubic2d, ReflectionPad
POOLS: dict[Any, Rule] = {
    aten.im2col.default: _columns,
    aten.col2im.default: _columns,
    aten.max_pool2d_with_indices.default: _pool,
    aten.max_pool2d_with_indices_backward.default: _pool_backward,
    aten.avg_pool2d.default: _pool,
    aten.avg_pool2d_backward.default: _pool_backward,
    aten._adaptive_avg_pool2d.default: _adaptive_average,
    aten._adaptive_avg_pool2d_backward.default: _adaptive_average_backward,
    aten.adaptive_max_pool2d.default: _adaptive_maximum,
    aten.adaptive_max_pool2d_backward.default: _adaptive_maximum_backward,
    aten.upsample_nearest2d.default: _pool,
    aten.upsample_bicubic2d_backward.default: _made_contiguous,
    aten.reflection_pad2d.default: _made_contiguous,
    aten.reflection_pad2d_backward.default: _made_contiguous,
}


#: outputs of convolutions, which torch's fake kernels lay out as the CPU does
MADE: Mapping[Any, Callable[..., Sequence[Made | None] | None]] = {
    aten.convolution.default: _convolution_made,
    aten.convolution_backward.default: _convolution_backward_made,
}
