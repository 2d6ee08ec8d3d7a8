"""Convolutions, pools and other operators on images: the layout that CUDA wants, and copies into it.

Kernels of images read tensors in one of two orders, channels first or last. A tensor in another order is copied, beside
the outputs; a convolution takes a workspace as well (`cuda.workspaces`). 1D convolutions are those of one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lightning_memplan.cuda.cudnn import KINDS, get_ready
from lightning_memplan.cuda.cudnn_process import FILTER, FORWARD, INPUT, LAST, MOVED, PLAIN
from lightning_memplan.cuda.layout import (
    CONTIGUOUS,
    contiguous_copies,
    copies_in,
    laid_out_as,
    suggested,
)
from lightning_memplan.cuda.reductions import sums_of_channels
from lightning_memplan.cuda.rule_set import (
    OUTPUTS,
    Allocation,
    Call,
    Gpu,
    Metas,
    Output,
    OutputMeta,
    Scope,
    Scratch,
    allocates,
    aten,
    output_metas,
    scratch,
)


def convolution_layout(*tensors: torch.Tensor) -> torch.memory_format:
    """Return the layout in which cuDNN computes: channels last if one of the tensors is so, and has no doubles.

    Source: aten/src/ATen/native/ConvUtils.h, ``cudnn_conv_suggest_memory_format`` (2.14).
    """
    for tensor in tensors:
        layout = suggested(tensor)
        if layout is not CONTIGUOUS and tensor.dtype != torch.float64:
            return layout
    return CONTIGUOUS


def _images(source: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tensors of a 1D convolution as images of one row, whose input is contiguous; others as they are.

    Source: aten/src/ATen/native/Convolution.cpp, ``view4d`` (2.14).
    """
    if source.dim() != 3:
        return source, *others
    return torch.empty(source.shape, dtype=source.dtype, device="meta").unsqueeze(2), *(
        torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta").unsqueeze(2)
        for tensor in others
    )


def _row_copy(source: torch.Tensor) -> Iterator[Scratch]:
    """Yield the contiguous copy of a 1D convolution's input."""
    if source.dim() == 3:
        yield from contiguous_copies(source)


def _is_depthwise(
    source: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
) -> bool:
    """Check for a depthwise convolution that a kernel of torch's own computes.

    Source: aten/src/ATen/native/Convolution.cpp, ``is_depthwise`` without ``use_cudnn_depthwise`` (2.14).
    """
    channels = source.size(1)
    if transposed or source.dim() < 4 or groups == 1 or channels != groups or weight.size(0) % channels:
        return False
    if convolution_layout(source, weight) is not CONTIGUOUS:
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


def _of_each(edge: Sequence[int], rank: int) -> Sequence[int]:
    """Return an option of each dimension, which may be one for all."""
    return edge if len(edge) == rank else [*edge] * rank


def _is_deterministic() -> int:
    return int(torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled())


def _has_tensor_cores(dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Check that cuDNN computes in tensor cores: float32 too by default, as TF32 (torch.backends.cudnn.allow_tf32)."""
    if dtype == torch.float32:
        return capability >= (8, 0) and torch.backends.cudnn.allow_tf32
    return (dtype == torch.float16 and capability >= (7, 0)) or (dtype == torch.bfloat16 and capability >= (8, 0))


# --------------------------------------------------------------------------------------------------------- convolutions


@dataclass(frozen=True)
class _Convolution:
    """A convolution, given by its operands as images and its options."""

    input: torch.Tensor
    weight: torch.Tensor
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    groups: int

    @classmethod
    def of(cls, call: Call, options: int) -> _Convolution:
        """Read a call whose options begin at that argument, after the input, the weight and the bias."""
        source, weight = call.args[options - 3 : options - 1]
        stride, padding, dilation, transposed, _, groups = call.args[options : options + 6]
        return cls(source, weight, stride, padding, dilation, transposed, groups)

    @cached_property
    def images(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The input and the weight, as images."""
        source, weight = _images(self.input, self.weight)
        return source, weight

    @cached_property
    def is_depthwise(self) -> bool:
        """A kernel of torch's own computes it."""
        return _is_depthwise(*self.images, self.stride, self.dilation, self.transposed, self.groups)

    @cached_property
    def layout(self) -> torch.memory_format:
        """The layout in which it is computed."""
        return CONTIGUOUS if self.is_depthwise else convolution_layout(*self.images)

    def workspace(self, part: int, output: torch.Tensor, gpu: Gpu) -> Scope:
        """Return the workspace of cuDNN for a ``part``: the results, or the gradient of the input or of the filter.

        It is of no bytes until a replay asks for more (see `cuda.workspaces`).
        """
        x, rank = self.input, self.input.dim() - 2
        layout = PLAIN
        if _has_tensor_cores(x.dtype, gpu.capability):
            layout = MOVED if convolution_layout(*self.images) is CONTIGUOUS else LAST
        places = (tensor.shape[2:] for tensor in (x, output, self.weight))
        options = (_of_each(edge, rank) for edge in (self.stride, self.padding, self.dilation))
        numbers = (
            *(10 * gpu.capability[0] + gpu.capability[1], part, KINDS.get(str(x.dtype), 0), _is_deterministic()),
            *(layout, x.size(0), x.size(1), output.size(1), self.groups),
            *(number for edge in (*places, *options) for number in edge),
        )
        return Scope([scratch("convolution", int(self.transposed), *numbers)])


@allocates(aten.convolution)
def convolution(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Copy the input before the output is allocated, and the filter after it.

    Source: aten/src/ATen/native/cudnn/ConvShared.cpp, ``cudnn_convolution`` (2.14).
    """
    get_ready()
    of = _Convolution.of(call, options=3)
    source, weight = of.images
    yield from _row_copy(of.input)
    yield from copies_in(of.layout, source)
    yield OUTPUTS
    if not of.is_depthwise:
        yield from copies_in(of.layout, weight)
    yield of.workspace(FORWARD, call.out, gpu)


@allocates(aten.convolution_backward)
def convolution_backward(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Operands are copied into the layout of the kernel; the gradient of the bias is a sum.

    Source: aten/src/ATen/native/Convolution.cpp and cudnn/ConvShared.cpp (2.14).
    """
    get_ready()
    of, grad, mask = _Convolution.of(call, options=4), call.input, call.args[10]
    yield from _row_copy(of.input)
    if not of.is_depthwise:
        yield Scope(_cudnn_gradients(of, grad, mask))
    elif of.input.dim() == 5:
        yield Scope([Output(0), Output(1), *contiguous_copies(grad, *of.images)])
    else:
        yield Scope(_depthwise_gradients(of, grad))
    yield Output(2)
    if mask[2]:
        yield from sums_of_channels(grad, gpu)
    for part, wanted in zip((INPUT, FILTER), mask, strict=False):
        if wanted:
            yield of.workspace(part, grad, gpu)


def _depthwise_gradients(of: _Convolution, grad: torch.Tensor) -> Iterator[Allocation]:
    source, grad, weight = _images(of.input, grad, of.weight)
    yield from contiguous_copies(grad)
    yield Scope([*contiguous_copies(source), Output(1)])
    yield Output(0)
    yield from contiguous_copies(weight)


def _cudnn_gradients(of: _Convolution, grad: torch.Tensor, mask: Sequence[bool]) -> Iterator[Allocation]:
    source, grad, weight = _images(of.input, grad, of.weight)
    layout = of.layout
    if mask[1]:
        yield from copies_in(layout, source)
    copies = list(copies_in(layout, grad))
    if of.transposed or (copies and convolution_layout(grad) is not layout):  # one copy serves both gradients
        yield from copies
        copies = []
    if mask[0]:
        yield Scope([Output(0), *copies, *copies_in(layout, weight)])
    if mask[1]:
        yield Scope([*copies, Output(1)])


@output_metas(aten.convolution)
def convolution_metas(
    source: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Metas | None:
    if not source.numel():
        return None
    rank = source.dim() - 2
    edges = [_of_each(value, rank) for value in (stride, padding, dilation, output_padding)]
    sizes = [source.size(0), weight.size(1) * groups if transposed else weight.size(0)]
    for length, kernel, s, p, d, o in zip(source.shape[2:], weight.shape[2:], *edges, strict=True):
        reach = d * (kernel - 1)
        sizes.append((length - 1) * s - 2 * p + reach + o + 1 if transposed else (length + 2 * p - reach - 1) // s + 1)
    of = _Convolution(source, weight, stride, padding, dilation, transposed, groups)
    return [laid_out_as(sizes, of.layout, source.dtype)]


@output_metas(aten.convolution_backward)
def convolution_backward_metas(
    grad: torch.Tensor,
    source: torch.Tensor,
    weight: torch.Tensor,
    bias_sizes: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    mask: Sequence[bool],
) -> Metas | None:
    if not source.numel():
        return None
    layout = _Convolution(source, weight, stride, padding, dilation, transposed, groups).layout
    made = [laid_out_as(tensor.shape, layout, tensor.dtype) for tensor in (source, weight)]
    made.append(OutputMeta(torch.Size([grad.size(1)]), grad.dtype))
    return [one if wanted else None for one, wanted in zip(made, mask, strict=True)]
