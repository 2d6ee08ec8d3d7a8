"""CUDA's own choice of operators: composites that it decomposes differently from the CPU."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._prims_common import suggest_memory_format

from lightning_memplan.cuda.attention import attention
from lightning_memplan.cuda.autocast import autocast_kernels, cpu_only, users_autocast, without_autocast
from lightning_memplan.cuda.layout import suggested
from lightning_memplan.cuda.losses import binary_cross_entropy_with_logits
from lightning_memplan.cuda.recurrent import gru_cell, lstm_cell, recurrent, recurrent_packed, reflattened_rnn
from lightning_memplan.cuda.rule_set import aten


# -------------------------------------------------------------------------------------------- composites of CUDA's own
def _dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    """Run the fused kernel, which keeps a bool mask.

    Source: aten/src/ATen/native/Dropout.cpp, ``is_fused_kernel_acceptable`` (2.14).
    """
    if train and 0 < p < 1 and input.numel():
        return aten.native_dropout.default(input, p, train)[0]
    if not train or p == 0:
        return input
    return input.mul(torch.zeros((), device=input.device, dtype=input.dtype)) if p == 1 else input


def _half_softmax(plain: Any, typed: Any) -> Callable[..., torch.Tensor]:
    """Return a softmax that reads halves and writes float32 in one kernel, without a copy.

    Source: aten/src/ATen/native/SoftMax.cpp (2.14).
    """

    def kernel(input: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        if input.dtype == torch.float16 and dtype == torch.float32:
            return plain(input, dim, True)
        return plain(input if dtype is None else input.to(dtype), dim, False)

    return kernel


def _batch_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> torch.Tensor:
    """Choose cuDNN or torch's own kernel.

    Source: aten/src/ATen/native/Normalization.cpp, ``_select_batch_norm_backend`` (2.14).
    """
    cudnn = (
        cudnn_enabled
        and input.dim() >= 3
        and input.numel() > 0
        and weight is not None
        and bias is not None
        and (training or running_mean is not None)
        and (input.dtype != torch.bfloat16)
        and not (input.dim() == 3 and not training)
        and weight.dtype == (torch.float32 if input.dtype == torch.float16 else input.dtype)
    )
    if cudnn:
        input = input.contiguous(memory_format=suggested(input))
    if cudnn and training:
        return aten.cudnn_batch_norm.default(input, weight, bias, running_mean, running_var, training, momentum, eps)[0]
    return aten.native_batch_norm.default(input, weight, bias, running_mean, running_var, training, momentum, eps)[0]


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Add the bias in place, as for a CUDA tensor; a tensor subclass gets it out of place.

    Source: aten/src/ATen/native/Linear.cpp (2.14).
    """
    if bias is None:
        return torch.matmul(input, weight.t())
    if input.dim() == 2:
        return torch.addmm(bias, input, weight.t())
    if input.is_contiguous():
        return torch.addmm(bias, input.view(-1, input.size(-1)), weight.t()).view(*input.shape[:-1], -1)
    return torch.matmul(input, weight.t()).add_(bias)


class _RMSNorm(torch.autograd.Function):
    """Keep the factor of each row for the backward pass, whose kernel is that of layer norm.

    Source: aten/src/ATen/native/cuda/layer_norm_kernel.cu, ``_fused_rms_norm`` (2.14).
    """

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor | None, rank: int) -> torch.Tensor:
        read = input.contiguous()
        out = torch.empty_like(read)
        factors = torch.empty(
            (*input.shape[: input.dim() - rank], *(1,) * rank), dtype=torch.float32, device=out.device
        )
        ctx.save_for_backward(input, weight, factors)
        ctx.rank = rank
        del read
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        kept, weight, factors = ctx.saved_tensors
        shape = kept.shape[kept.dim() - ctx.rank :]
        asked = [True, weight is not None, False]
        made = aten.native_layer_norm_backward.default(grad, kept, shape, factors, factors, weight, None, asked)
        return made[0], made[1], None


def _rms_norm(
    input: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """Run one kernel, unless the channels come last.

    Source: aten/src/ATen/native/layer_norm.cpp, ``rms_norm_symint`` and ``rms_norm_composite`` (2.14).
    """
    rank = len(normalized_shape)
    if suggest_memory_format(input) is torch.contiguous_format:
        return _RMSNorm.apply(input, weight, rank)
    wide = input.to(torch.float32) if input.element_size() == 2 else input
    squares = wide.pow(2)
    means = squares.mean(list(range(-rank, 0)), True)
    factors = means.add_(eps or 1e-6).rsqrt()
    del squares, means
    made = wide.mul(factors)
    return (made if weight is None else made.mul(weight)).type_as(input)


def _ctc(
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    input_lengths: torch.Tensor,
    target_lengths: torch.Tensor,
    blank: int = 0,
    reduction: int = 1,
    zero_infinity: bool = False,
) -> torch.Tensor:
    """Read the lengths on the host, as for a CUDA tensor but not for a tensor subclass.

    Source: aten/src/ATen/native/LossCTC.cpp (2.14).
    """
    log_probs = log_probs if log_probs.dim() == 3 else log_probs.unsqueeze(1)
    losses, _ = torch.ops.aten._ctc_loss.Tensor(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)
    if zero_infinity:
        losses = torch.where(losses == math.inf, losses.new_zeros(()), losses)
    if reduction == 1:
        return (losses / torch.empty_like(losses).clamp_min(1)).mean()
    return losses.sum() if reduction == 2 else losses


def _one_hot(tensor: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
    """Scatter ones into zeros, as for a CUDA tensor but not for a tensor subclass.

    Source: aten/src/ATen/native/Onehot.cpp (2.14).
    """
    classes = int(tensor.max().item()) + 1 if num_classes == -1 else num_classes
    made = torch.zeros((*tensor.shape, classes), dtype=tensor.dtype, device=tensor.device)
    return made.scatter_(-1, tensor.unsqueeze(-1), 1)


def _composites(capability: tuple[int, int]) -> dict[str, Callable[..., Any]]:
    """Return CUDA's decompositions by the names of their operators."""
    return {
        "batch_norm": _batch_norm,
        "binary_cross_entropy_with_logits": binary_cross_entropy_with_logits,
        "dropout": _dropout,
        "ctc_loss.Tensor": _ctc,
        "gru_cell": gru_cell,
        "gru.data": recurrent_packed(3),
        "gru.input": recurrent(3),
        "linear": _linear,
        "lstm_cell": lstm_cell,
        "lstm.data": recurrent_packed(2),
        "lstm.input": recurrent(2),
        "one_hot": _one_hot,
        "rms_norm": _rms_norm,
        "rnn_relu.data": recurrent_packed(0),
        "rnn_relu.input": recurrent(0),
        "rnn_tanh.data": recurrent_packed(1),
        "rnn_tanh.input": recurrent(1),
        "softmax.int": _half_softmax(aten._softmax.default, None),
        "log_softmax.int": _half_softmax(aten._log_softmax.default, None),
        "scaled_dot_product_attention": attention(capability),
    }


@contextmanager
def cuda_semantics(capability: tuple[int, int] = (8, 6)) -> Iterator[None]:
    """Run operators on CPU tensors as CUDA decomposes and casts them, and undo this at the end."""
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Overriding a previously registered kernel": that is the purpose
            for name, kernel in _composites(capability).items():
                library.impl(name, kernel, "AutogradCPU")
            for name, kernel in (*autocast_kernels().items(), ("_cudnn_rnn", without_autocast(reflattened_rnn))):
                library.impl(name, kernel, "AutocastCPU", allow_override=True)
            for name in cpu_only():
                library.impl(name, torch.library.fallthrough_kernel, "AutocastCPU", allow_override=True)
        with users_autocast(), _nms_as_on_cuda(), _capturable():
            yield
    finally:
        library._destroy()


@contextmanager
def _nms_as_on_cuda() -> Iterator[None]:
    """Let torchvision's ``batched_nms`` go class by class from as many boxes on as on CUDA: fewer suffice on a CPU.

    Source: torchvision/ops/boxes.py, ``batched_nms`` (0.29).
    """
    boxes: Any = sys.modules.get("torchvision.ops.boxes")
    vanilla, trick = (getattr(boxes, f"_batched_nms_{name}", None) for name in ("vanilla", "coordinate_trick"))
    if vanilla is None or trick is None:
        yield
        return

    def chosen(of: torch.Tensor, *args: Any) -> Any:
        return (vanilla if of.numel() > 100_000 else trick)(of, *args)

    boxes._batched_nms_vanilla = chosen
    try:
        yield
    finally:
        boxes._batched_nms_vanilla = vanilla


# ----------------------------------------------------------------------------------------------------------- optimizers
@contextmanager
def _capturable() -> Iterator[None]:
    """Let optimizers take traced parameters for ``capturable=True``, which they refuse on a CPU.

    Source: torch/optim/optimizer.py, ``_get_capturable_supported_devices``, which each optimizer imports (2.4 to 2.14).
    """
    name = "_get_capturable_supported_devices"
    modules = [vars(module) for key, module in list(sys.modules.items()) if key.startswith("torch.optim.")]
    own = [(names, names[name]) for names in modules if name in names]

    def here(supports_xla: bool = True) -> list[str]:
        return ["cuda", "cpu"]

    for names, _ in own:
        names[name] = here
    try:
        yield
    finally:
        for names, before in own:
            names[name] = before


def foreach_by_default(optimizer: torch.optim.Optimizer) -> None:
    """Set ``foreach`` for traced parameters as an optimizer chooses it on CUDA; torch's Adafactor never does."""
    if isinstance(optimizer, getattr(torch.optim, "Adafactor", ())):
        return
    for group in optimizer.param_groups:
        if (
            "foreach" in group
            and group["foreach"] is None
            and not group.get("fused")
            and not group.get("differentiable")
        ):
            tensor_lr = isinstance(group.get("lr"), torch.Tensor) and not group.get("capturable")
            group["foreach"] = not tensor_lr
