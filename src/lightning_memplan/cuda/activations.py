"""Activations and dropout: outputs in another order, or of another size, than on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_memplan.cuda.rule_set import Allocation, Call, Gpu, Output, allocates, aten


@allocates(aten.log_sigmoid_forward)
def log_sigmoid(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """The second output is a buffer that only the CPU fills.

    Source: aten/src/ATen/native/Activation.cpp, ``log_sigmoid_forward`` (2.14).
    """
    yield Output(0)
    yield Output(1, itemsize=0)


@allocates(aten.native_dropout)
def dropout(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """The mask comes before the output.

    Source: aten/src/ATen/native/cuda/Dropout.cu (2.14).
    """
    yield Output(1)
    yield Output(0)
