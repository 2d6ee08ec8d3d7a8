"""Batch, group and layer normalization, softmax: statistics, copies and partial sums."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lightning_memplan.cuda.convolutions import convolution_layout
from lightning_memplan.cuda.layout import contiguous_copies, copies_in, copy_of, is_dense, laid_out_as, suggested
from lightning_memplan.cuda.reductions import sum_vector
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
    decomposes,
    output_metas,
    scratch,
)

# -------------------------------------------------------------------------------------------------- batch norm of cuDNN


@allocates(aten.cudnn_batch_norm)
def cudnn_batch_norm(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """The input is copied into the layout of a convolution, and statistics are float32, also of a half input.

    Source: aten/src/ATen/native/Normalization.cpp, ``_batch_norm_impl_index``, and cudnn/BatchNorm.cpp (2.14).
    """
    yield from copies_in(convolution_layout(call.input), call.input)
    yield from _with_float32_statistics(call.out)


@allocates(aten.cudnn_batch_norm_backward)
def cudnn_batch_norm_backward(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """The gradient is copied into the layout of the input.

    Source: aten/src/ATen/native/cudnn/BatchNorm.cpp (2.14).
    """
    source, grad = call.args[:2]
    yield from copies_in(convolution_layout(source), grad)
    yield OUTPUTS


def _with_float32_statistics(out: Sequence[Any]) -> Iterator[Allocation]:
    """Yield the outputs of a batch norm, whose second and third are statistics."""
    yield Output(0)
    yield Output(1, itemsize=4)
    yield Output(2, itemsize=4)
    for place in range(3, len(out)):
        yield Output(place)


@output_metas(aten.cudnn_batch_norm)
def cudnn_batch_norm_metas(input: torch.Tensor, weight: torch.Tensor, *_: Any) -> Metas:
    """Of the reserve no bytes are known."""
    statistics = OutputMeta(weight, weight.dtype)
    return [_like_images(input), statistics, statistics, OutputMeta(torch.Size([0]), torch.uint8)]


@output_metas(aten.cudnn_batch_norm_backward)
def cudnn_batch_norm_backward_metas(input: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor, *_: Any) -> Metas:
    of_weight = OutputMeta(weight, weight.dtype)
    return [_like_images(input), of_weight, of_weight]


def _like_images(input: torch.Tensor) -> OutputMeta:
    if is_dense(input):
        return OutputMeta(input, input.dtype)
    return laid_out_as(input.shape, suggested(input), input.dtype)


# -------------------------------------------------------------------------------------------- batch norm of torch's own
# aten/src/ATen/native/cuda/Normalization.cu (2.14)


@allocates(aten.native_batch_norm)
def native_batch_norm(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Statistics are float32; in training blocks pass theirs through scratch memory.

    Where channels are neither first nor last, the statistics are those of ``var_mean``: of a copy in float32, if the
    input is of halves.
    """
    yield from _with_float32_statistics(call.out)
    source, weight, training = call.input, call.args[1], call.args[5]
    plain = source.is_contiguous() or _has_channels_last(source)
    if not training:
        return
    cast = source.dtype == torch.bfloat16 or weight is None or weight.element_size() == 4
    if source.element_size() == 2 and not plain and cast:
        yield Scratch(4 * source.numel())
    yield from _norm_blocks(source, 4)


@allocates(aten.native_batch_norm_backward)
def native_batch_norm_backward(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Run two passes over channels-last tensors; the second makes the gradient of the input."""
    source, training, mask = call.args[1], call.args[7], call.args[9]
    if not (mask[0] and _has_channels_last(source)):
        yield from _row_copies(source, call.input)
        yield OUTPUTS
        return
    if not training:  # the inverse of the deviation
        yield Scratch(source.size(1) * max(4, source.element_size()))
    sums = Scratch(source.size(1) * max(4, source.element_size()))
    yield sums
    yield sums
    yield Output(1)
    yield Output(2)
    yield Scope(_norm_blocks(source, 2))
    yield Output(0)


@output_metas(aten.native_batch_norm_backward)
def native_batch_norm_backward_metas(
    grad: torch.Tensor, input: torch.Tensor, weight: torch.Tensor | None, *rest: Any
) -> Metas | None:
    if weight is None:
        return None
    of_weight = OutputMeta(weight.shape, weight.dtype)
    kept = rest[-3] and is_dense(input)
    made = OutputMeta(input if kept else input.shape, input.dtype), of_weight, of_weight
    return [one if wanted else None for one, wanted in zip(made, rest[-1], strict=True)]


def _row_copies(*tensors: torch.Tensor) -> Iterator[Scratch]:
    """Yield a copy of each tensor whose dimensions after the channels are not one in memory."""
    for tensor in tensors:
        pairs = zip(tensor.shape[3:], tensor.stride()[2:], tensor.stride()[3:], strict=False)
        if any(before != size * step for size, before, step in pairs):
            yield copy_of(tensor)


def _norm_blocks(source: torch.Tensor, values: int) -> Iterator[Scratch]:
    """Yield the memory through which blocks pass ``values`` numbers for each channel, where channels come last."""
    if _has_channels_last(source):
        shape = source.numel() // source.size(1), source.size(1), values * max(4, source.element_size())
        yield scratch("norm_blocks", 0, *shape)
        yield scratch("norm_blocks", 1, *shape)


def _has_channels_last(source: torch.Tensor) -> bool:
    """Source: ``batch_norm_use_channels_last_kernels``."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(source.dim())
    if layout is not None and source.is_contiguous(memory_format=layout):
        return True
    return source.is_contiguous() and source.stride(1) == 1


# ------------------------------------------------------------------------------- batch norm synchronized between ranks
# aten/src/ATen/native/cuda/Normalization.cu (2.14): two passes, between which ranks exchange their sums


@allocates(aten.batch_norm_stats)
def batch_norm_stats(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    yield OUTPUTS
    yield from _norm_blocks(call.input, 4)


@allocates(aten.batch_norm_backward_reduce)
def batch_norm_backward_reduce(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    yield OUTPUTS
    yield from _norm_blocks(call.args[1], 2)


@decomposes(aten.batch_norm_stats, aten.batch_norm_gather_stats_with_counts)
def norm_statistics(input: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float32 if input.element_size() == 2 else input.dtype
    return input.new_empty(input.size(1), dtype=dtype), input.new_empty(input.size(1), dtype=dtype)


@decomposes(aten.batch_norm_elemt)
def normalized(input: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(input)


@decomposes(aten.batch_norm_backward_reduce)
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


@decomposes(aten.batch_norm_backward_elemt)
def norm_gradient(grad: torch.Tensor, input: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(input)


# ------------------------------------------------------------------------------------------------ group and layer norm


@allocates(aten.native_group_norm)
def group_norm(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Each channel of each sample has a scale and a shift; the input is copied, if its channels come last.

    Source: aten/src/ATen/native/group_norm.cpp and cuda/group_norm_kernel.cu (2.14).
    """
    yield OUTPUTS
    yield from contiguous_copies(call.input)
    _, weight, bias, samples, channels, inner, groups = call.args[:7]
    if call.out[1].element_size() == 2:  # statistics are computed in float32
        yield Scratch(4 * samples * groups)
        yield Scratch(4 * samples * groups)
    if inner != 1 and not (weight is None and bias is None):
        yield Scratch(4 * samples * channels)
        yield Scratch(4 * samples * channels)


@allocates(aten.native_group_norm_backward)
def group_norm_backward(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Source: aten/src/ATen/native/group_norm.cpp and cuda/group_norm_kernel.cu (2.14)."""
    yield from contiguous_copies(*call.args[:2])
    yield OUTPUTS
    _, _, _, _, weight, samples, channels, inner, groups, mask = call.args[:10]
    of_channels, of_groups = Scratch(4 * samples * channels), Scratch(4 * samples * groups)
    if inner == 1:
        yield of_groups
        yield of_groups
        return
    yield of_channels
    yield of_channels
    if mask[0]:
        yield of_groups
        yield of_groups
        if weight is not None:
            yield of_channels


@allocates(aten.native_layer_norm)
def layer_norm(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Source: aten/src/ATen/native/cuda/layer_norm_kernel.cu (2.14)."""
    yield from contiguous_copies(call.input)
    yield OUTPUTS


@allocates(aten.native_layer_norm_backward)
def layer_norm_backward(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Gradients of weight and bias are sums over blocks of rows, and then over these.

    Source: aten/src/ATen/native/cuda/layer_norm_kernel.cu, ``LaunchGammaBetaBackwardCUDAKernel`` (2.15).
    """
    grad, source, shape, _, _, weight, _, mask = call.args[:8]
    yield from contiguous_copies(source)
    yield OUTPUTS
    yield from contiguous_copies(grad)
    if weight is None or not mask[1]:
        return
    width = math.prod(shape)
    rows = source.numel() // width, width, weight.element_size(), sum_vector(weight), gpu.multiprocessors, gpu.threads
    parts, total, *sums = (scratch("layer_norm_rows", part, *rows) for part in range(4))
    gradients = 2 if mask[2] else 1
    of_blocks: list[Allocation] = [total, Scope(sums)]
    yield Scope([*[parts] * gradients, *of_blocks * gradients])


@output_metas(aten.native_layer_norm)
def layer_norm_metas(source: torch.Tensor, shape: Sequence[int], *_: Any) -> Metas:
    dtype = torch.float32 if source.element_size() == 2 else source.dtype
    rows = OutputMeta(torch.Size([*source.shape[: source.dim() - len(shape)], *(1 for _ in shape)]), dtype)
    return [OutputMeta(source.shape, source.dtype), rows, rows]


@output_metas(aten.native_layer_norm_backward)
def layer_norm_backward_metas(
    grad: torch.Tensor, source: torch.Tensor, shape: Any, mean: Any, rstd: Any, weight: Any, bias: Any, mask: Any
) -> Metas:
    return [
        OutputMeta(tensor.shape, tensor.dtype) if wanted and tensor is not None else None
        for tensor, wanted in zip((source, weight, bias), mask, strict=True)
    ]


# -------------------------------------------------------------------------------------------------------------- softmax


@allocates(aten._softmax, aten._log_softmax)
def softmax(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Source: aten/src/ATen/native/cuda/SoftMax.cu, ``host_softmax`` (2.14)."""
    yield OUTPUTS
    yield from contiguous_copies(call.input)


@allocates(aten._safe_softmax)
def safe_softmax(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Masks say which values are masked, and which whole rows.

    Source: aten/src/ATen/native/transformers/attention.cpp (2.14).
    """
    yield OUTPUTS
    out, dim = call.out, call.args[1]
    yield Scratch(out.numel())
    yield Scratch(out.numel() // max(1, out.size(dim)))
    yield Scratch(out.element_size())


@allocates(aten._softmax_backward_data)
def softmax_backward(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """The gradient times the output is a tensor laid out as the gradient is, which is then made contiguous.

    Source: aten/src/ATen/native/cuda/SoftMax.cu, ``softmax_backward_cuda_out`` (2.14).
    """
    yield OUTPUTS
    grad, output = call.args[:2]
    product = Scratch(output.numel() * max(grad.element_size(), output.element_size()))
    yield product
    if is_dense(grad) and not grad.is_contiguous():
        yield product
    yield from contiguous_copies(output)


@allocates(aten._log_softmax_backward_data)
def log_softmax_backward(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Source: aten/src/ATen/native/cuda/SoftMax.cu, ``host_softmax_backward`` (2.14)."""
    yield OUTPUTS
    yield from contiguous_copies(*call.args[:2])


@output_metas(aten._log_softmax_backward_data)
def log_softmax_backward_metas(grad: torch.Tensor, output: torch.Tensor, dim: int, dtype: torch.dtype) -> Metas:
    """The result is contiguous, however the gradient is laid out.

    Source: aten/src/ATen/native/SoftMax.cpp, its meta function (2.14).
    """
    return [OutputMeta(grad.size(), dtype)]
