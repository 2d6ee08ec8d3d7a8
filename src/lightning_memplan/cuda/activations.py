"""Activations and dropout: outputs in another order, or of another size, than on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lightning_memplan.cuda.layout import elementwise_strides
from lightning_memplan.cuda.rule_set import (
    Allocation,
    Call,
    Gpu,
    Metas,
    Output,
    OutputMeta,
    allocates,
    aten,
    output_metas,
)


@allocates(aten.log_sigmoid_forward)
def log_sigmoid(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """The second output is a buffer that only the CPU fills.

    Source: aten/src/ATen/native/Activation.cpp, ``log_sigmoid_forward`` (2.14).
    """
    yield Output(0)
    yield Output(1, itemsize=0)


@output_metas(aten.log_sigmoid_backward)
def log_sigmoid_gradient(grad: torch.Tensor, *_: Any) -> Metas:
    """The result is laid out as the gradient is.

    Source: aten/src/ATen/native/Activation.cpp, ``log_sigmoid_backward_cuda`` (2.14).
    """
    strides = elementwise_strides(grad.shape, [grad])
    return [OutputMeta(torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device="meta"), grad.dtype)]


@output_metas(aten.glu_backward)
def glu_gradient(grad: torch.Tensor, input: torch.Tensor, dim: int) -> Metas:
    """The result is contiguous, however the input is laid out.

    Source: aten/src/ATen/native/cuda/ActivationGluKernel.cu and GatedLinearUnit.cpp, ``glu_backward_cuda`` (2.14).
    """
    return [OutputMeta(input.shape, input.dtype)]


@output_metas(aten.rrelu_with_noise)
def rrelu(input: torch.Tensor, *_: Any) -> Metas:
    """Source: aten/src/ATen/native/cuda/RreluWithNoise.cu (2.14)."""
    return [OutputMeta(input.shape, input.dtype)]


@allocates(aten.native_dropout)
def dropout(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """The mask comes before the output.

    Source: aten/src/ATen/native/cuda/Dropout.cu (2.14).
    """
    yield Output(1)
    yield Output(0)
