"""Losses: every value's loss, whose mean or sum is taken, and gradients that are computed in place on a GPU.

torch's formulas of gradients work out of place as soon as a mode sees operators, as a trace does. Those that a loss has
in place are written out here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lightning_memplan.cuda.layout import contiguous_copies, copy_of, elementwise_strides
from lightning_memplan.cuda.reductions import sum_over
from lightning_memplan.cuda.rule_set import (
    OUTPUTS,
    Allocation,
    Call,
    Gpu,
    Metas,
    Output,
    OutputMeta,
    allocates,
    aten,
    decomposes,
    output_metas,
)

_NONE, _MEAN = range(2)  # aten/src/ATen/core/Reduction.h


def _resized(full: torch.Tensor, reduction: int) -> torch.Tensor:
    """Return every value's loss, or their mean or sum in the same memory, which is resized to one number."""
    if reduction == _NONE:
        return full
    (aten.mean if reduction == _MEAN else aten.sum).default(full)
    return aten.as_strided.default(full, (), ())  # type: ignore[no-any-return]


# ----------------------------------------------------------------------------------------------------------- of values


@allocates(aten.mse_loss, aten.smooth_l1_loss)
def reduced_loss(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Every value has a loss of its own, whose mean or sum is taken.

    Source: aten/src/ATen/native/Loss.cpp (2.14).
    """
    yield OUTPUTS
    if call.out.dim() or not call.input.dim():
        return
    terms = _terms(call)
    yield copy_of(terms)
    yield from sum_over(terms, None, gpu)


@allocates(aten.huber_loss)
def huber_loss(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """The same, but every value's loss comes before the mean or sum.

    Source: aten/src/ATen/native/Loss.cpp (2.14).
    """
    terms, reduced = _terms(call), not call.out.dim() and call.input.dim()
    if reduced:
        yield copy_of(terms)
    yield OUTPUTS
    if reduced:
        yield from sum_over(terms, None, gpu)


def _terms(call: Call) -> torch.Tensor:
    shape = torch.broadcast_shapes(call.input.shape, call.args[1].shape)
    return torch.empty(shape, dtype=call.out.dtype, device="meta")


@decomposes(aten.mse_loss, aten.smooth_l1_loss)
def resized_loss(input: torch.Tensor, target: torch.Tensor, reduction: int = _MEAN, *_: Any) -> torch.Tensor:
    """The output has room for every value's loss, and is resized to one number.

    Source: aten/src/ATen/native/BinaryOps.cpp, the meta functions of losses (2.14).
    """
    dtype = torch.promote_types(input.dtype, target.dtype)
    shape = torch.broadcast_shapes(input.shape, target.shape)
    strides = elementwise_strides(shape, [input, target])
    full = torch.empty_strided(shape, strides, dtype=dtype, device=input.device)
    return aten.as_strided.default(full, (), ()) if reduction else full


@output_metas(aten.mse_loss_backward, aten.smooth_l1_loss_backward, aten.huber_loss_backward)
def loss_backward(grad: torch.Tensor, input: torch.Tensor, *_: Any) -> Metas:
    """The gradient is written into contiguous zeros, however the input is laid out.

    Source: aten/src/ATen/native/Loss.cpp (2.14).
    """
    return [OutputMeta(input.shape, input.dtype)]


@decomposes(aten.soft_margin_loss)
def soft_margin_loss(input: torch.Tensor, target: torch.Tensor, reduction: int = _MEAN) -> torch.Tensor:
    """Source: aten/src/ATen/native/Loss.cpp, ``soft_margin_loss_out`` (2.14)."""
    return _resized(aten.neg.default(input), reduction)


@decomposes(aten.soft_margin_loss_backward)
def soft_margin_loss_backward(
    grad: torch.Tensor, input: torch.Tensor, target: torch.Tensor, reduction: int
) -> torch.Tensor:
    """Source: aten/src/ATen/native/Loss.cpp, ``soft_margin_loss_backward_out`` (2.14)."""
    negative = aten.neg.default(target)
    product = aten.mul.Tensor(negative, input)
    z = aten.exp.default(product)
    strides = elementwise_strides(z.shape, [target, z])
    del negative, product
    return torch.empty_strided(z.shape, strides, dtype=input.dtype, device=input.device)


# ------------------------------------------------------------------------------------------------ binary cross-entropy


@decomposes(aten.binary_cross_entropy)
def binary_cross_entropy(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None, reduction: int = _MEAN
) -> torch.Tensor:
    """Source: aten/src/ATen/native/cuda/Loss.cu, ``binary_cross_entropy_cuda`` (2.14)."""
    return _resized(torch.empty_like(input), reduction)


@output_metas(aten.binary_cross_entropy_backward)
def binary_cross_entropy_backward(grad: torch.Tensor, input: torch.Tensor, *_: Any) -> Metas:
    """The gradient is laid out as the input is.

    Source: aten/src/ATen/native/cuda/Loss.cu, ``binary_cross_entropy_backward_cuda`` (2.14).
    """
    strides = elementwise_strides(input.shape, [input])
    return [OutputMeta(torch.empty_strided(input.shape, strides, dtype=input.dtype, device="meta"), input.dtype)]


@decomposes(aten.binary_cross_entropy_with_logits)
def logits_forward(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    pos_weight: torch.Tensor | None = None,
    reduction: int = _MEAN,
) -> torch.Tensor:
    """Source: aten/src/ATen/native/Loss.cpp (2.14)."""
    of_input = aten.log_sigmoid_forward.default(input)[0]
    if pos_weight is not None:
        less = aten.sub.Tensor(pos_weight, 1)
        log_weight = aten.mul.Tensor(less, target)
        del less, log_weight
    loss = torch.empty_like(target)
    if reduction == _NONE:
        return loss
    reduced = (aten.mean if reduction == _MEAN else aten.sum).default(loss)
    del of_input
    return reduced  # type: ignore[no-any-return]


_logits_loss = aten.binary_cross_entropy_with_logits.default


class _LogitsLoss(torch.autograd.Function):
    """Compute gradients in place, unless there is a graph of them.

    Source: torch/csrc/autograd/FunctionsManual.cpp, ``binary_cross_entropy_with_logits_backward`` and
    ``binary_cross_entropy_with_logits_target_backward`` (2.14).
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None,
        pos_weight: torch.Tensor | None,
        reduction: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(input, target, weight, pos_weight)
        ctx.reduction = reduction
        with torch._C._AutoDispatchBelowAutograd():
            return _logits_loss(input, target, weight, pos_weight, reduction)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        input, target, weight, pos_weight = ctx.saved_tensors
        of_input = of_target = None
        if ctx.needs_input_grad[0]:
            of_input = _scaled(_of_logits(input, target, pos_weight), grad, weight, ctx.reduction)
        if ctx.needs_input_grad[1]:
            of_target = _scaled(_of_labels(input, grad, pos_weight), None, weight, ctx.reduction)
        return of_input, of_target, None, None, None


def _of_logits(input: torch.Tensor, target: torch.Tensor, pos_weight: torch.Tensor | None) -> torch.Tensor:
    kept = torch.is_grad_enabled()
    if pos_weight is None:
        made = input.sigmoid()
        return made.sub(target) if kept else made.sub_(target)
    positive = pos_weight.mul(target)
    made = positive.add(1)
    if kept:
        return made.sub(target).mul(input.sigmoid()).sub(positive)
    return made.sub_(target).mul_(input.sigmoid()).sub_(positive)


def _of_labels(input: torch.Tensor, grad: torch.Tensor, pos_weight: torch.Tensor | None) -> torch.Tensor:
    negative = -input
    if pos_weight is None:
        return negative * grad
    made, of_input = torch.nn.functional.logsigmoid(negative), torch.nn.functional.logsigmoid(input)
    if torch.is_grad_enabled():
        return made.sub(of_input.mul(pos_weight)).mul(grad)
    return made.sub_(of_input.mul_(pos_weight)).mul_(grad)


def _scaled(made: torch.Tensor, grad: torch.Tensor | None, weight: torch.Tensor | None, reduction: int) -> torch.Tensor:
    """Return ``made`` times the gradient and the weight, over the number of values if they have a mean."""
    kept = torch.is_grad_enabled()
    for factor in (grad, weight):
        if factor is not None:
            made = made.mul(factor) if kept else made.mul_(factor)
    if reduction != _MEAN:
        return made
    return made.div(made.numel()) if kept else made.div_(made.numel())


def binary_cross_entropy_with_logits(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    pos_weight: torch.Tensor | None = None,
    reduction: int = _MEAN,
) -> torch.Tensor:
    """Keep the operands for the backward pass."""
    return _LogitsLoss.apply(input, target, weight, pos_weight, reduction)  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------------- of classes


@allocates(aten.nll_loss2d_forward)
def nll_loss_of_maps(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """The total weight comes before the losses.

    Source: aten/src/ATen/native/cuda/NLLLoss2d.cu (2.14).
    """
    yield Output(1)
    yield Output(0)


@allocates(aten.nll_loss_forward)
def nll_loss(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Source: aten/src/ATen/native/cuda/Loss.cu, ``nll_loss_forward_out_cuda_template`` (2.14)."""
    yield OUTPUTS
    reduced = call.args[3] != _NONE or call.input.dim() == 1
    yield from contiguous_copies(*call.args[:2] if reduced else ())


@allocates(aten.nll_loss_backward)
def nll_loss_backward(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Source: aten/src/ATen/native/cuda/Loss.cu, ``nll_loss_backward_out_cuda_template`` (2.14)."""
    yield OUTPUTS
    yield from contiguous_copies(call.args[2], call.input)


@decomposes(aten.multi_margin_loss)
def multi_margin_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    p: float = 1,
    margin: float = 1,
    weight: torch.Tensor | None = None,
    reduction: int = _MEAN,
) -> torch.Tensor:
    """Each sample has a loss of its own.

    Source: aten/src/ATen/native/cuda/MultiMarginLoss.cu (2.14).
    """
    out = input.new_empty(target.shape if reduction == _NONE else ())
    held = [tensor.contiguous() for tensor in (input, target, weight) if tensor is not None]
    if reduction and input.dim() == 2:
        of_samples = input.new_empty(input.size(0))
        del of_samples
    del held
    return out


@decomposes(aten.multi_margin_loss_backward)
def multi_margin_loss_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    target: torch.Tensor,
    p: float,
    margin: float,
    weight: torch.Tensor | None = None,
    reduction: int = _MEAN,
) -> torch.Tensor:
    made = input.new_empty(input.shape)
    held = [tensor.contiguous() for tensor in (input, target, weight, grad) if tensor is not None]
    del held
    return made


@decomposes(aten.multilabel_margin_loss_forward)
def multilabel_margin_loss(
    input: torch.Tensor, target: torch.Tensor, reduction: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Source: aten/src/ATen/native/cuda/MultiLabelMarginCriterion.cu (2.14)."""
    held = [tensor.contiguous() for tensor in (input, target)]
    is_target = input.new_empty(target.shape)
    samples = input.shape[:-1]
    of_samples = input.new_empty(samples) if reduction and samples else None
    out = input.new_empty(samples if reduction == _NONE else ())
    del held, of_samples
    return out, is_target


@decomposes(aten.multilabel_margin_loss_backward)
def multilabel_margin_loss_backward(
    grad: torch.Tensor, input: torch.Tensor, target: torch.Tensor, reduction: int, is_target: torch.Tensor
) -> torch.Tensor:
    made = input.new_empty(input.shape)
    held = [tensor.contiguous() for tensor in (input, target, is_target, grad)]
    del held
    return made
