"""What CUDA does differently from the CPU on which a step is traced. One table a subject, each with its source.

``cuda_semantics(...)`` puts CUDA's own choices in the place of the CPU's for the time of a trace:

* autocast's operator lists (``_autocast``),
* composite operators that take another path on CUDA: attention (``_attention``), recurrent networks (``_recurrent``),
  fused dropout, half-precision softmax,
* ``foreach`` optimizers by default (torch/optim/optimizer.py, ``_default_to_fused_or_foreach``),
* temporaries that CUDA's kernels allocate beside their outputs, and cuBLAS's workspaces.
"""

from __future__ import annotations

import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from lightning_memplan._attention import attention, efficient, efficient_backward, flash, flash_backward
from lightning_memplan._autocast import autocast_kernels, cpu_only, exists, operator, users_autocast, without_autocast
from lightning_memplan._convolutions import (
    COPIED_GRADIENTS,
    MADE,
    POOLS,
    Made,
    Rule,
    convolution_layout,
    convolutions,
    copied,
    is_dense,
    laid_out_as,
    nbytes,
    relaid,
    suggested,
)
from lightning_memplan._recurrent import (
    cudnn_rnn,
    cudnn_rnn_backward,
    gru_cell,
    lstm_cell,
    no_dropout_state,
    pack_padded,
    recurrent,
    recurrent_packed,
    reflattened_rnn,
)

aten = torch.ops.aten


_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


# -------------------------------------------------------------------------------------------- composites of CUDA's own
def _dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    # aten/src/ATen/native/Dropout.cpp, is_fused_kernel_acceptable: the fused kernel keeps a bool mask
    if train and 0 < p < 1 and input.numel():
        return aten.native_dropout.default(input, p, train)[0]
    if not train or p == 0:
        return input
    return input.mul(torch.zeros((), device=input.device, dtype=input.dtype)) if p == 1 else input


def _half_softmax(plain: Any, typed: Any) -> Callable[..., torch.Tensor]:
    # aten/src/ATen/native/SoftMax.cpp: on CUDA a half input and a float32 result are one kernel, without a copy
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
    # aten/src/ATen/native/Normalization.cpp, _select_batch_norm_backend
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
    if cudnn and training:
        return aten.cudnn_batch_norm.default(input, weight, bias, running_mean, running_var, training, momentum, eps)[0]
    return aten.native_batch_norm.default(input, weight, bias, running_mean, running_var, training, momentum, eps)[0]


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    # aten/src/ATen/native/Linear.cpp; a tensor subclass gets its bias out of place there, a CUDA tensor in place
    if bias is None:
        return torch.matmul(input, weight.t())
    if input.dim() == 2:
        return torch.addmm(bias, input, weight.t())
    if input.is_contiguous():
        return torch.addmm(bias, input.view(-1, input.size(-1)), weight.t()).view(*input.shape[:-1], -1)
    return torch.matmul(input, weight.t()).add_(bias)


class _RMSNorm(torch.autograd.Function):
    """aten/src/ATen/native/cuda/layer_norm_kernel.cu, ``_fused_rms_norm``: its result and each row's factor."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor | None, rank: int) -> torch.Tensor:
        kept = input if input.is_contiguous() else input.contiguous()
        out = torch.empty_like(kept)
        factors = torch.empty(
            (*input.shape[: input.dim() - rank], *(1,) * rank), dtype=torch.float32, device=out.device
        )
        ctx.save_for_backward(kept, weight, factors)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        kept, weight, _ = ctx.saved_tensors
        return torch.empty_like(kept), None if weight is None else torch.empty_like(weight), None


def _rms_norm(
    input: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    # aten/src/ATen/native/layer_norm.cpp, rms_norm_symint: one kernel on CUDA
    return _RMSNorm.apply(input, weight, len(normalized_shape))


def _ctc(
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    input_lengths: torch.Tensor,
    target_lengths: torch.Tensor,
    blank: int = 0,
    reduction: int = 1,
    zero_infinity: bool = False,
) -> torch.Tensor:
    # aten/src/ATen/native/LossCTC.cpp, which goes another way for tensor subclasses: lengths are read on the host
    log_probs = log_probs if log_probs.dim() == 3 else log_probs.unsqueeze(1)
    losses, _ = torch.ops.aten._ctc_loss.Tensor(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)
    if zero_infinity:
        losses = torch.where(losses == math.inf, losses.new_zeros(()), losses)
    if reduction == 1:
        return (losses / torch.empty_like(losses).clamp_min(1)).mean()
    return losses.sum() if reduction == 2 else losses


def _one_hot(tensor: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
    # aten/src/ATen/native/Onehot.cpp, which goes another way for tensor subclasses
    classes = int(tensor.max().item()) + 1 if num_classes == -1 else num_classes
    made = torch.zeros((*tensor.shape, classes), dtype=tensor.dtype, device=tensor.device)
    return made.scatter_(-1, tensor.unsqueeze(-1), 1)


def _composites(capability: tuple[int, int]) -> dict[str, Callable[..., Any]]:
    return {
        "batch_norm": _batch_norm,
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
    """CUDA's choices in the place of the CPU's, for fake tensors on a CPU device; undone on the way out."""
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


# ---------------------------------------------------------------------------------------------- memory beside outputs
_CUBLAS = [aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.addmm_.default]


_CUBLAS += [aten.addmv.default, aten.mv.default, aten.addbmm.default, aten._addmm_activation.default]


#: torch 2.15 takes cuBLAS's workspace anew for every call; before, each thread kept the first (seen on 2.14 and 2.15)
WORKSPACE_PER_CALL = _VERSION >= (2, 15)


_CUBLASLT_WORKSPACE = 2**20  # aten/src/ATen/cuda/CUDABlas.cpp, 2.15: 1 MiB where the product adds a bias


def _cublas_workspace(capability: tuple[int, int]) -> int:
    """aten/src/ATen/cuda/CublasHandlePool.cpp, ``getChosenWorkspaceSize``: ``:4096:2:16:8`` (KiB times count) is
    2·4096 KiB + 8·16 KiB = 8,519,680 bytes; 32 MiB on compute capability 9.0 and later, or as CUBLAS_WORKSPACE_CONFIG
    says."""
    pairs = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if pairs:
        return sum(int(size) * int(count) for size, count in pairs) * 2**10
    return 32 * 2**20 if capability >= (9, 0) else (2 * 4096 + 8 * 16) * 2**10


def workspaces(
    capability: tuple[int, int] = (8, 6), multiprocessors: int = 82, threads: int = 1536
) -> Mapping[Any, tuple[str, int]]:
    """cuBLAS's workspace, where the first product of matrices in each thread makes it and it stays; cuDNN's random
    state, which the first recurrent network with dropout makes: 24 bytes for each thread that the card runs at once
    (measured: 132 · 2048 · 24 = 6,488,064 on an H200, cuDNN 9.19)."""
    state = multiprocessors * threads * 24
    made = {} if WORKSPACE_PER_CALL else dict.fromkeys(_CUBLAS, ("cublas", _cublas_workspace(capability)))
    return {**made, aten._cudnn_init_dropout_state.default: ("cudnn dropout", state)}


def _matrices(a: torch.Tensor, b: torch.Tensor) -> tuple[int, ...]:
    """aten/src/ATen/native/cuda/cuBlasCommonArgs.h, ``prepare_matrix_for_cublas``: an operand that is neither dense nor
    has rows or columns of its own is copied; the second first, since the result has its rows as cuBLAS has columns."""
    return tuple(nbytes(operand) for operand in (b, a) if not _is_matrix(operand))


def _is_matrix(tensor: torch.Tensor) -> bool:
    (rows, columns), (down, right) = tensor.shape, tensor.stride()
    if (down == 1 and right >= max(1, rows)) or (right == 1 and down >= max(1, columns)):
        return True
    return bool(aten.is_non_overlapping_and_dense.default(tensor))


def _batches(a: torch.Tensor, b: torch.Tensor) -> tuple[int, ...]:
    """aten/src/ATen/native/cuda/Blas.cpp, ``prepare_batch_matrix_for_cublas``; outer products go another way (seen on
    2.14)."""
    if a.size(2) == 1:
        return ()
    (rows, inner), columns = a.shape[1:], b.size(2)
    swapped = columns != 1  # whether the result has its rows as cuBLAS has columns
    m, n = (columns, rows) if swapped else (rows, columns)
    first, second = (b, a) if swapped else (a, b)
    copied = (x for x, sizes in ((first, (m, inner)), (second, (inner, n))) if not _is_batch(x, *sizes, swapped))
    return tuple(map(nbytes, copied))


def _is_batch(tensor: torch.Tensor, m: int, n: int, swapped: bool) -> bool:
    fast, leading = tensor.stride()[1:] if not swapped else tensor.stride()[:0:-1]
    if (fast == 1 and leading >= max(1, m)) or (leading == 1 and fast >= max(1, n)):
        return True
    return tensor.is_contiguous() and 0 not in (fast, leading)


def _matrix_and_vector(matrix: torch.Tensor, vector: torch.Tensor) -> tuple[int, ...]:
    """aten/src/ATen/native/cuda/Blas.cpp, ``addmv_out_cuda``."""
    (rows, columns), (down, right) = matrix.shape, matrix.stride()
    laid = (down == 1 and right >= max(1, rows)) or (right == 1 and down >= max(1, columns)) or matrix.is_contiguous()
    return (*((nbytes(vector),) if vector.stride(0) == 0 else ()), *(() if laid else (nbytes(matrix),)))


#: Copies of operands that cuBLAS cannot read as they lie
_OPERANDS: dict[Any, Rule] = {
    aten.mm.default: lambda args, kwargs, out: _matrices(*args[:2]),
    aten.addmm.default: lambda args, kwargs, out: _matrices(*args[1:3]),
    aten.addmm_.default: lambda args, kwargs, out: _matrices(*args[1:3]),
    aten._addmm_activation.default: lambda args, kwargs, out: _matrices(*args[1:3]),
    aten.bmm.default: lambda args, kwargs, out: _batches(*args[:2]),
    aten.baddbmm.default: lambda args, kwargs, out: _batches(*args[1:3]),
    aten.mv.default: lambda args, kwargs, out: _matrix_and_vector(*args[:2]),
    aten.addmv.default: lambda args, kwargs, out: _matrix_and_vector(*args[1:3]),
}


def _with_workspace(op: Any, rule: Rule | None, size: int) -> Rule:
    def both(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
        copies = () if rule is None else rule(args, kwargs, out)
        biased = op is aten.addmm.default and _adds_bias(*args[:3])
        return (*copies, _CUBLASLT_WORKSPACE if biased else size)

    return both


class Card(NamedTuple):
    """What of a card its kernels' launches depend on."""

    multiprocessors: int = 82
    threads: int = 1536  #: on each of them


def temporaries(
    capability: tuple[int, int] = (8, 6), multiprocessors: int = 82, threads: int = 1536
) -> Mapping[Any, Rule]:
    """Bytes that CUDA's kernels allocate beside their outputs, and free before they return."""
    rules: dict[Any, Rule] = dict(_OPERANDS)
    if WORKSPACE_PER_CALL:
        rules.update({op: _with_workspace(op, rules.get(op), _cublas_workspace(capability)) for op in _CUBLAS})
    card = Card(multiprocessors, threads)
    sums = _cast_first(_reduction(card, _accumulator, _sum_vector))
    rules.update(_reductions(card))
    rules.update(_NORMS)
    rules.update(_ROWS)
    rules[aten.native_layer_norm_backward.default] = _layer_norm_backward(card)
    rules.update({operator(name): copied(0) for name in COPIED_GRADIENTS if exists(name)})
    rules.update(POOLS)
    rules.update(convolutions(capability, lambda grad: _sums_of_channels(grad, card)))
    rules.update(
        dict.fromkeys([aten.mse_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default], _loss(card))
    )
    rules[aten._foreach_norm.Scalar] = _foreach_norm
    rules[aten.embedding.default] = _embedding
    rules[aten.embedding_dense_backward.default] = _embedding_backward
    rules[aten.index.Tensor] = _index
    rules[aten.index_put.default] = rules[aten.index_put_.default] = _index_put
    rules[aten._scaled_dot_product_flash_attention.default] = flash
    rules[aten._scaled_dot_product_flash_attention_backward.default] = flash_backward
    rules.update(dict.fromkeys([aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default], sums))
    rules.update(dict.fromkeys([aten.cumsum.default, aten.cumprod.default], _cast_first(lambda args, kwargs, out: ())))
    return rules


def _reduction(card: Card, width: Callable[[torch.Tensor], int], vector: Callable[[torch.Tensor], int]) -> Rule:
    """A reduction cut into blocks passes partial results, and counts its blocks, through the device's memory."""

    def rule(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
        source = args[0]
        dims = args[1] if len(args) > 1 and not isinstance(args[1], (bool, float)) else kwargs.get("dim")
        return reduction_blocks(source, dims, width(source), vector(source), card)

    return rule


def reduction_blocks(source: torch.Tensor, dims: Any, width: int, vector: int, card: Card) -> Sequence[Any]:
    """What a reduction of ``source`` over ``dims`` (all of them where it is None) takes."""
    rank = source.dim()
    dims = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    reduced = [d % max(1, rank) for d in dims] if rank else []
    order = reduced + [d for d in range(rank) if d not in reduced]
    layout = (*(source.size(d) for d in order), *(source.stride(d) for d in order))
    arguments = (width, source.element_size(), vector, card.multiprocessors, card.threads, len(reduced), *layout)
    return ("reduction", 0, *arguments), ("reduction", 1, *arguments)


def _sums_of_channels(grad: torch.Tensor, card: Card) -> Sequence[Any]:
    return reduction_blocks(grad, [0, *range(2, grad.dim())], 4, _sum_vector(grad), card)


def _cast_first(rule: Rule) -> Rule:
    """aten/src/ATen/native/ReduceOpsUtils.h, ``make_reduction_from_out_ty``, and ReduceOps.cpp, ``cumsum``: a copy of
    what is of another type than the result (how many are true of a mask), but sums of halves in float32."""

    def cast(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
        source = args[0]
        if source.dtype == out.dtype:
            return rule(args, kwargs, out)
        if source.element_size() == 2 and out.dtype == torch.float32 and out.shape != source.shape:
            return rule(args, kwargs, out)
        strides = source.stride() if is_dense(source) else torch.empty(source.shape, device="meta").stride()
        same = torch.empty_strided(source.shape, strides, dtype=out.dtype, device="meta")
        return (nbytes(same), *rule((same, *args[1:]), kwargs, out))

    return cast


def _accumulator(source: torch.Tensor) -> int:
    return max(4, source.element_size()) if source.is_floating_point() else 8


def _sum_vector(source: torch.Tensor) -> int:
    return 8 if source.element_size() == 2 else 4  # ReduceSumProdKernel.cu: 16-bit inputs, eight at a time


def _itself(source: torch.Tensor) -> int:
    return source.element_size()


def _reductions(card: Card) -> dict[Any, Rule]:
    """aten/src/ATen/native/cuda: ReduceNormKernel, ReduceMomentKernel, ReduceMin/MaxValuesKernel, ReduceLogicKernel,
    ReduceArgMaxKernel (2.15). The width is an accumulator's: Welford's has four numbers, a maximum's place two."""
    norm = _reduction(card, _accumulator, lambda source: 4)
    extreme = _reduction(card, _itself, lambda source: 4)
    logical = _reduction(card, lambda source: 1, lambda source: 4)
    place = _reduction(card, lambda source: 16, lambda source: 4)
    moments = _reduction(card, lambda source: 16 if source.element_size() <= 4 else 24, lambda source: 2)

    def vector_norm(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
        dims = args[2] if len(args) > 2 else kwargs.get("dim")
        return norm((args[0], dims), {}, out)

    rules: dict[Any, Rule] = {aten.linalg_vector_norm.default: vector_norm}
    rules.update(dict.fromkeys([aten.amax.default, aten.amin.default, aten.max.default, aten.min.default], extreme))
    rules.update(dict.fromkeys([aten.any.default, aten.any.dim, aten.all.default, aten.all.dim], logical))
    rules.update(dict.fromkeys([aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default], place))
    rules.update(dict.fromkeys([aten.var.correction, aten.var_mean.correction, aten.std.correction], moments))
    return rules


def _batch_norm_copies(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/Normalization.cpp, ``_batch_norm_impl_index``."""
    copied = relaid(args[0], convolution_layout(args[0]))
    return (*copied, slice(None)) if copied else ()


def _batch_norm_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/cudnn/BatchNorm.cpp: the gradient is laid out as the input is."""
    copied = relaid(args[1], convolution_layout(args[0]))
    return (*copied, slice(None)) if copied else ()


def _group_norm(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/cuda/group_norm_kernel.cu: a scale and a shift for each channel of each sample."""
    _, weight, bias, samples, channels, inner = args[:6]
    if inner == 1 or (weight is None and bias is None):
        return ()
    return (4 * samples * channels,) * 2


def _group_norm_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    _, _, _, _, weight, samples, channels, _, groups, mask = args[:10]
    sums = (4 * samples * channels,) * 2
    of_groups = 4 * samples * groups
    return (*sums, of_groups, of_groups, of_groups if weight is None else sums[0]) if mask[0] else sums


def _norm_blocks(source: torch.Tensor, values: int) -> Sequence[Any]:
    """Where channels come last, blocks pass so many values for each channel: two sums, or what makes a mean."""
    if not _channels_last(source):
        return ()
    shape = source.numel() // source.size(1), source.size(1), values * max(4, source.element_size())
    return ("norm_blocks", 0, *shape), ("norm_blocks", 1, *shape)


def _channels_last(source: torch.Tensor) -> bool:
    """aten/src/ATen/native/cuda/Normalization.cu, ``batch_norm_use_channels_last_kernels``."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(source.dim())
    if layout is not None and source.is_contiguous(memory_format=layout):
        return True
    return source.is_contiguous() and source.stride(1) == 1


def _native_norm(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """Where channels are neither first nor last the moments are var_mean's, of a copy in float32 if it is of halves."""
    source = args[0]
    general = not source.is_contiguous() and not _channels_last(source)
    wide = (4 * source.numel(),) if general and source.element_size() == 2 else ()
    return (slice(None), *wide, *_norm_blocks(source, 4)) if args[5] else ()


def _native_norm_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """Two passes where channels come last: the gradient of the input is made in the second."""
    source, of_input, training = args[1], args[9][0], args[7]
    if not (of_input and training and _channels_last(source)):
        return ()
    sums = (source.size(1) * max(4, source.element_size()),) * 2
    return (*sums, slice(1, 3), [*_norm_blocks(source, 2)], slice(0, 1))


_NORMS: dict[Any, Rule] = {
    aten.cudnn_batch_norm.default: _batch_norm_copies,
    aten.cudnn_batch_norm_backward.default: _batch_norm_backward,
    aten.native_batch_norm.default: _native_norm,
    aten.native_batch_norm_backward.default: _native_norm_backward,
    aten.batch_norm_stats.default: lambda args, kwargs, out: _norm_blocks(args[0], 4),
    aten.batch_norm_backward_reduce.default: lambda args, kwargs, out: _norm_blocks(args[1], 2),
    aten.native_group_norm.default: _group_norm,
    aten.native_group_norm_backward.default: _group_norm_backward,
}


def _layer_norm(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/cuda/layer_norm_kernel.cu."""
    copied = relaid(args[0], torch.contiguous_format)
    return (*copied, slice(None)) if copied else ()


def _layer_norm_backward(card: Card) -> Rule:
    def rule(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
        grad, source, shape, _, _, weight, _, mask = args[:8]
        copies = (*relaid(source, torch.contiguous_format), slice(None), *relaid(grad, torch.contiguous_format))
        if weight is None or not mask[1]:
            return copies
        width = math.prod(shape)
        rows = (source.numel() // width, width, weight.element_size(), _sum_vector(weight), *card)
        parts, total, *sums = (("layer_norm_rows", part, *rows) for part in range(4))
        several = 2 if mask[2] else 1
        return (*copies, [*[parts] * several, *[total, [*sums]] * several])

    return rule


def _softmax(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/cuda/SoftMax.cu, ``host_softmax``."""
    return relaid(args[0], torch.contiguous_format)


def _safe_softmax(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/transformers/attention.cpp: which values are masked, and which whole rows."""
    return (out.numel(), out.numel() // max(1, out.size(args[1])), out.element_size())


def _softmax_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """The gradient times the output is a tensor of its own, laid out as the gradient is, and then made contiguous."""
    grad, output = args[:2]
    size = output.numel() * max(grad.element_size(), output.element_size())
    again = (size,) if is_dense(grad) and not grad.is_contiguous() else ()
    return (size, *again, *relaid(output, torch.contiguous_format))


def _log_softmax_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    grad, output = args[:2]
    return (*relaid(grad, torch.contiguous_format), *relaid(output, torch.contiguous_format))


_ROWS: dict[Any, Rule] = {
    aten.native_layer_norm.default: _layer_norm,
    aten._softmax.default: _softmax,
    aten._safe_softmax.default: _safe_softmax,
    aten._log_softmax.default: _softmax,
    aten._softmax_backward_data.default: _softmax_backward,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
}


def _loss(card: Card) -> Rule:
    """aten/src/ATen/native/Loss.cpp: every value's loss, then their mean or sum."""

    def rule(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
        if out.dim() or not args[0].dim():
            return ()
        terms = out.new_empty(torch.broadcast_shapes(args[0].shape, args[1].shape), device="meta")
        sums = reduction_blocks(terms, None, _accumulator(terms), _sum_vector(terms), card)
        return (nbytes(terms), *sums)

    return rule


def _pointwise_loss(input: torch.Tensor, target: torch.Tensor, reduction: int = 1, *_: Any) -> torch.Tensor:
    # aten/src/ATen/native/BinaryOps.cpp, the losses' meta functions: the result is made for every value, then resized
    dtype = torch.promote_types(input.dtype, target.dtype)
    full = input.new_empty(torch.broadcast_shapes(input.shape, target.shape), dtype=dtype)
    return aten.as_strided.default(full, (), ()) if reduction else full


def _foreach_norm(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/cuda/ForeachReduceOp.cu: a number for each part of 65,536 values, of as many parts each."""
    width = max(4, args[0][0].element_size())
    return (len(args[0]) * max(-(-t.numel() // 65536) for t in args[0]) * width, slice(None))


def _embedding(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/Embedding.cpp: indices are made a row, by a copy where they are none."""
    indices = args[1]
    several = [(size, stride) for size, stride in zip(indices.shape, indices.stride(), strict=True) if size != 1]
    if all(stride == size * step for (_, stride), (size, step) in pairwise(several)):
        return ()
    return (nbytes(indices), slice(None))


def _embedding_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/cuda/Embedding.cu: indices are sorted, unless there are few of them."""
    grad, indices, rows = args[:3]
    n = indices.numel()
    each, number = ("above", 3072, n, 8 * n), ("above", 3072, n, 8)
    dense = tuple(nbytes(tensor) for tensor in (indices, grad) if not tensor.is_contiguous())
    sorting = [each, ("sort_pairs", 3072, n, rows)]
    segments, places, values, scanned = (("embedding_segments", k, n, rows, 4 * out.size(1)) for k in (0, 1, 2, 3))
    unique = [each, ("scan", 3072, n, 320)]
    return (
        *dense,
        each,
        each,
        sorting,
        slice(None),
        each,
        number,
        unique,
        segments,
        segments,
        [scanned],
        number,
        places,
        values,
    )


def _index(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/TensorAdvancedIndexing.cpp, ``AdvancedIndex``: indices that lie otherwise than one another
    when they have been expanded are copied."""
    given = [index for index in args[1] if index is not None]
    moved = tuple(nbytes(index) for index in given if index.device != args[0].device)  # from the host
    if moved:
        return (*moved, slice(None))
    if len(given) < 2 or any(index.dtype != torch.int64 for index in given):
        return ()
    indices = torch.broadcast_tensors(*given)
    if len({index.stride() for index in indices}) < 2:
        return ()
    return (*(nbytes(index) for index in indices if not index.is_contiguous()), slice(None))


def _index_put(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/cuda/Indexing.cu, index_put_with_sort_kernel: to add values up, indices are made one, and
    sorted."""
    values = args[2]
    filled = values.numel() == 1 and values.device != args[0].device  # Indexing.cpp, canDispatchToMaskedFill
    masks = [] if filled else [index for index in args[1] if index is not None and index.dtype == torch.bool]
    if masks:  # at their longest, as in LONGEST
        return [8 * mask.dim() * mask.numel() for mask in masks]
    if not (args[3] if len(args) > 3 else kwargs.get("accumulate", False)):
        return _index(args, kwargs, out)
    indices = [index for index in args[1] if index is not None and index.dtype == torch.int64]
    if not indices:
        return ()
    n = math.prod(torch.broadcast_shapes(*(index.shape for index in indices)))
    rows = math.prod(args[0].size(d) for d, index in enumerate(args[1]) if index is not None)
    values = () if args[2].is_contiguous() else (args[2].numel() * args[2].element_size(),)
    others = ([8 * n, 8 * n] for _ in indices[1:])
    return (8 * n, [8 * n], *others, *values, 8 * n, 8 * n, 8 * n, [("sort_pairs", 0, n, rows)])


def _logsumexp(input: torch.Tensor, dim: Sequence[int], keepdim: bool = False) -> torch.Tensor:
    # aten/src/ATen/native/ReduceOps.cpp, logsumexp_out_impl
    largest = aten.amax.default(input, dim, True)
    aten.eq.Scalar(aten.abs.default(largest), float("inf"))
    return aten.sum.dim_IntList(aten.exp_.default(aten.sub.Tensor(input, largest)), dim, keepdim)


# aten/src/ATen/native/cuda/Normalization.cu (2.14): batch norm in two passes, with what other ranks say between them
def _norm_statistics(input: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _wide(input), _wide(input)


def _normalized(input: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(input)


def _norm_sums(
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


def _norm_gradient(grad: torch.Tensor, input: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(input)


def _wide(input: torch.Tensor) -> torch.Tensor:
    return input.new_empty(input.size(1), dtype=torch.float32 if input.element_size() == 2 else input.dtype)


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


def _ctc_loss(log_probs: torch.Tensor, targets: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    # aten/src/ATen/native/cuda/LossCTC.cu; targets in one row are taken to be of equal length
    batch = log_probs.size(1)
    longest = targets.size(1) if targets.dim() == 2 else -(-targets.numel() // max(1, batch))
    held = _ctc_numbers(log_probs)
    alpha = log_probs.new_empty(batch, log_probs.size(0), 2 * longest + 1)
    losses = log_probs.new_empty(batch)
    del held
    return losses, alpha


def _ctc_numbers(log_probs: torch.Tensor) -> list[torch.Tensor]:
    """Both lengths of each sample, and where its targets begin, which come from the host."""
    return [torch.empty(log_probs.size(1), dtype=torch.int64, device=log_probs.device) for _ in range(3)]


def _ctc_loss_backward(grad: torch.Tensor, log_probs: torch.Tensor, *others: Any) -> torch.Tensor:
    held, beta = _ctc_numbers(log_probs), torch.empty_like(others[4])
    made = torch.empty_like(log_probs, memory_format=torch.contiguous_format)
    del held, beta
    return made


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


_SUM, _MEAN, _MAX = range(3)  # aten/src/ATen/native/EmbeddingBag.h, EmbeddingBagMode


def _embedding_bag(
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[torch.Tensor, ...]:
    """aten/src/ATen/native/cuda/EmbeddingBag.cu, ``_embedding_bag_cuda``."""
    bags = offsets.size(0) - include_last_offset
    sizes, places = indices.new_empty(offsets.shape), indices.new_empty(indices.shape)
    out = weight.new_empty((bags, weight.size(1)))
    return out, places, sizes, indices.new_empty((bags, weight.size(1)) if mode == _MAX else (0,))


def _embedding_bag_backward(
    grad: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    offset2bag: torch.Tensor,
    bag_size: torch.Tensor,
    maximum_indices: torch.Tensor,
    num_weights: int,
    scale_grad_by_freq: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: torch.Tensor | None,
    padding_idx: int = -1,
) -> Any:
    """aten/src/ATen/native/EmbeddingBag.cpp, ``_embedding_bag_sparse_backward``."""
    if not sparse:
        return NotImplemented
    values = aten.index_select.default(grad, 0, offset2bag)
    if mode == _MEAN:
        sizes = aten.reciprocal.default(bag_size.to(grad.dtype))
        aten.mul_.Tensor(values, aten.index_select.default(sizes.unsqueeze(1), 0, offset2bag))
    if per_sample_weights is not None:
        aten.mul_.Tensor(values, per_sample_weights.unsqueeze(1))
    return aten.embedding_sparse_backward.default(values, indices, num_weights, padding_idx, scale_grad_by_freq)


#: Kernels that are told by other operators: what these allocate and free is what CUDA's kernel does
# ----------------------------------------------------------------------------------------- results of unknown length
def _nonzero(mask: torch.Tensor) -> torch.Tensor:
    # aten/src/ATen/native/cuda/Nonzero.cu: a result of one row a dimension, seen through its transpose
    return torch.empty((mask.dim(), mask.numel()), dtype=torch.int64, device=mask.device).t()


def _index_by_mask(tensor: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> Any:
    # aten/src/ATen/native/IndexingUtils.h, expandTensors: a mask becomes the places where it is true
    masks = [index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices]
    if not any(masks):
        return NotImplemented
    found: list[torch.Tensor | None] = []
    for index, is_mask in zip(indices, masks, strict=True):
        found += _nonzero(index).unbind(1) if is_mask and index is not None else [index]
    return aten.index.Tensor(tensor, found)


def _masked_select(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    shape = torch.broadcast_shapes(tensor.shape, mask.shape)
    return torch.empty(math.prod(shape), dtype=tensor.dtype, device=tensor.device)


def _unique(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flat = tensor.numel()
    counts = [torch.empty(flat, dtype=torch.int64, device=tensor.device) for _ in range(2)]
    return torch.empty(flat, dtype=tensor.dtype, device=tensor.device), counts[0].view(tensor.shape), counts[1]


#: operators whose result is as long as the values say: at its longest
LONGEST: Mapping[Any, Callable[..., Any]] = {
    aten.nonzero.default: _nonzero,
    aten.index.Tensor: _index_by_mask,
    aten.masked_select.default: _masked_select,
    aten._ctc_loss.default: _ctc_loss,
    aten._ctc_loss.Tensor: _ctc_loss,
    aten._unique2.default: _unique,
    aten._unique.default: lambda *args, **kwargs: _unique(*args)[:2],
}


def longest() -> Mapping[Any, Callable[..., Any]]:
    """``LONGEST``, and torchvision's operators where it is loaded."""
    if "torchvision" not in sys.modules or not hasattr(torch.ops.torchvision, "nms"):
        return LONGEST
    return {**LONGEST, torch.ops.torchvision.nms.default: _nms}


def _nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    # torchvision/csrc/ops/cuda/nms_kernel.cu, 0.29: boxes in the order of their scores, and a bit for each pair
    order = scores.sort(descending=True)[1]
    ordered = boxes.index_select(0, order).contiguous()
    pairs = torch.empty(len(boxes) * -(-len(boxes) // 64), dtype=torch.int64, device=boxes.device)
    kept = torch.empty(len(boxes), dtype=torch.bool, device=boxes.device)
    del ordered, pairs, kept
    return torch.empty_like(order)


@contextmanager
def _nms_as_on_cuda() -> Iterator[None]:
    """torchvision.ops.batched_nms goes class by class from fewer boxes on where these are on a CPU (boxes.py, 0.29)."""
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


KERNELS: Mapping[Any, Callable[..., Any]] = {
    aten._embedding_bag.default: _embedding_bag,
    aten._embedding_bag_backward.default: _embedding_bag_backward,
    aten._pack_padded_sequence.default: pack_padded,
    aten._scaled_dot_product_efficient_attention.default: efficient,
    aten._scaled_dot_product_efficient_attention_backward.default: efficient_backward,
    aten._cudnn_rnn.default: cudnn_rnn,
    aten._cudnn_rnn_backward.default: cudnn_rnn_backward,
    aten._cudnn_init_dropout_state.default: no_dropout_state,
    aten.batch_norm_stats.default: _norm_statistics,
    aten.batch_norm_gather_stats_with_counts.default: _norm_statistics,
    aten.batch_norm_elemt.default: _normalized,
    aten.batch_norm_backward_reduce.default: _norm_sums,
    aten.batch_norm_backward_elemt.default: _norm_gradient,
    aten._ctc_loss_backward.default: _ctc_loss_backward,
    aten._ctc_loss_backward.Tensor: _ctc_loss_backward,
    aten._euclidean_dist.default: _euclidean_distance,
    **({aten._grouped_mm.default: _grouped_mm} if exists("_grouped_mm.default") else {}),
    aten.logsumexp.default: _logsumexp,
    aten.mse_loss.default: _pointwise_loss,
    aten.pixel_shuffle.default: _pixel_shuffle,
    aten.pixel_unshuffle.default: _pixel_unshuffle,
    aten.smooth_l1_loss.default: _pointwise_loss,
    aten.roll.default: _roll,
}


def _adds_bias(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> bool:
    # aten/src/ATen/native/cuda/Blas.cpp, isInputCompliesAddmmCudaLt
    return bias.dim() == 1 and bias.is_contiguous() and bias.size(0) == b.size(1) and b.size(0) > 1 and b.size(1) > 1


#: Statistics that CUDA keeps in float32 where the input is half (aten/src/ATen/native/cudnn/BatchNorm.cpp)
WIDTHS: Mapping[Any, Mapping[int, int]] = {
    aten.cudnn_batch_norm.default: {1: 4, 2: 4},
    aten.native_batch_norm.default: {1: 4, 2: 4},
    # what only the CPU keeps (aten/src/ATen/native/Activation.cpp, log_sigmoid_forward's buffer)
    aten.log_sigmoid_forward.default: {1: 0},
}


#: Outputs that CUDA allocates in another order than they are returned in: the mask first
#: (aten/src/ATen/native/cuda/Dropout.cu)
ORDER: Mapping[Any, Sequence[int]] = {
    aten.native_dropout.default: (1, 0),
}


# ----------------------------------------------------------------------------------- shapes of outputs, told directly
def _dense(tensor: torch.Tensor) -> bool:
    last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    return tensor.is_contiguous() or (tensor.dim() in (4, 5) and tensor.is_contiguous(memory_format=last))


def _like_first(tensor: torch.Tensor, *others: Any, **kwargs: Any) -> list[Made] | None:
    """An elementwise operator of tensors of one shape and layout."""
    tensors = [other for other in others if isinstance(other, torch.Tensor)]
    if kwargs or not _dense(tensor) or any(t.stride() != tensor.stride() or t.size() != tensor.size() for t in tensors):
        return None
    return [(tensor, tensor.dtype)]


def _alike(*tensors: torch.Tensor) -> bool:
    """Whether they are of one type, and on one device."""
    return len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1


def _pointwise_made(tensor: torch.Tensor, *others: Any, approximate: str = "none", **kwargs: Any) -> list[Made] | None:
    """The same with numbers or smaller tensors, and whatever gelu is approximated by, where nothing is promoted."""
    tensors = [other for other in others if isinstance(other, torch.Tensor)]
    numbers = all(isinstance(other, (int, float, torch.Tensor)) for other in others)
    if not numbers or not tensor.is_floating_point() or not _alike(tensor, *tensors):
        return None
    if tensor.is_contiguous():  # then its order of dimensions decides, whatever that of what is spread over it
        tensors = [other for other in tensors if not _spreads(other.shape, tensor.shape)]
    return _like_first(tensor, *tensors, **kwargs) if approximate in ("none", "tanh") else None


def _spreads(shape: torch.Size, over: torch.Size) -> bool:
    pairs = zip(reversed(shape), reversed(over), strict=False)
    return shape != over and len(shape) <= len(over) and all(n in (1, whole) for n, whole in pairs)


def _addmm_made(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **kwargs: Any) -> list[Made] | None:
    if kwargs or (bias.dim(), a.dim(), b.dim()) != (1, 2, 2) or not _alike(bias, a, b):
        return None
    rows, columns = a.size(0), b.size(1)
    return [(torch.Size([rows, columns]), a.dtype)] if (a.size(1), bias.size(0)) == (b.size(0), columns) else None


def _sum_made(
    tensor: torch.Tensor, dims: Sequence[int] | None, keepdim: bool = False, **kwargs: Any
) -> list[Made] | None:
    rank = tensor.dim()
    if kwargs or not dims or not tensor.is_floating_point() or not _within(dims, rank):
        return None
    gone = {dim % rank for dim in dims}
    if len(gone) < len(dims):
        return None
    sizes = [1 if dim in gone else size for dim, size in enumerate(tensor.shape) if keepdim or dim not in gone]
    return [(torch.Size(sizes), tensor.dtype)]


def _within(dims: Sequence[int], rank: int) -> bool:
    return all(-rank <= dim < rank for dim in dims)


def _into_zeros_made(grad: torch.Tensor, sizes: Sequence[int], *_: Any) -> list[Made]:
    return [(torch.Size(sizes), grad.dtype)]


def _roll_made(tensor: torch.Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> list[Made] | None:
    return [(tensor.shape, tensor.dtype)] if tensor.is_contiguous() and _within(dims, tensor.dim()) else None


def _like_each(tensors: Sequence[torch.Tensor]) -> list[Made] | None:
    return (
        [(t, t.dtype) for t in tensors] if all(t.device == tensors[0].device and _dense(t) for t in tensors) else None
    )


def _new_like(tensor: torch.Tensor, **kwargs: Any) -> list[Made] | None:
    if kwargs.get("layout") not in (None, torch.strided) or kwargs.get("device") not in (None, tensor.device):
        return None
    order = kwargs.get("memory_format")
    if order is torch.contiguous_format:
        return [(tensor.shape, kwargs.get("dtype") or tensor.dtype)]
    if order not in (None, torch.preserve_format) or not _dense(tensor):
        return None
    return [(tensor, kwargs.get("dtype") or tensor.dtype)]


def _layer_norm_made(source: torch.Tensor, shape: Sequence[int], *_: Any) -> list[Made]:
    wide = torch.float32 if source.element_size() == 2 else source.dtype
    rows = torch.Size([*source.shape[: source.dim() - len(shape)], *(1 for _ in shape)])
    return [(source.shape, source.dtype), (rows, wide), (rows, wide)]


def _layer_norm_backward_made(
    grad: torch.Tensor, source: torch.Tensor, shape: Any, mean: Any, rstd: Any, weight: Any, bias: Any, mask: Any
) -> list[Made | None]:
    return [
        (tensor.shape, tensor.dtype) if wanted and tensor is not None else None
        for tensor, wanted in zip((source, weight, bias), mask, strict=True)
    ]


def _batch_norm_made(input: torch.Tensor, weight: torch.Tensor, *rest: Any) -> list[Made] | None:
    sums: list[Made] = [(weight, weight.dtype), (weight, weight.dtype), (torch.Size([0]), torch.uint8)]
    return [(input, input.dtype) if _dense(input) else laid_out_as(input.shape, suggested(input), input.dtype), *sums]


def _batch_norm_backward_made(
    input: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor, *_: Any
) -> list[Made] | None:
    of_input = (input, input.dtype) if _dense(input) else laid_out_as(input.shape, suggested(input), input.dtype)
    return [of_input, (weight, weight.dtype), (weight, weight.dtype)]


def _loss_backward_made(grad: torch.Tensor, input: torch.Tensor, *_: Any) -> list[Made]:
    # aten/src/ATen/native/Loss.cpp: new zeros, contiguous, however the input is laid out
    return [(input.shape, input.dtype)]


def _native_norm_backward_made(
    grad: torch.Tensor, input: torch.Tensor, weight: torch.Tensor | None, *rest: Any
) -> list[Made | None] | None:
    if _dense(input) or weight is None:
        return None
    made: list[Made] = [(input.shape, input.dtype), (weight.shape, weight.dtype), (weight.shape, weight.dtype)]
    return [one if asked else None for one, asked in zip(made, rest[-1], strict=True)]


#: See ``Rules.shapes``. An output that is not told here is what torch's fake kernel says: for the CPU, whose
#: convolutions lay their outputs out otherwise than cuDNN's do.
def _log_softmax_gradient(grad: torch.Tensor, output: torch.Tensor, dim: int, dtype: torch.dtype) -> list[Made]:
    # aten/src/ATen/native/SoftMax.cpp, its meta function: contiguous, whatever the gradient is
    return [(grad.size(), dtype)]


SHAPES: Mapping[Any, Callable[..., Sequence[Made | None] | None]] = {
    **MADE,
    aten.native_layer_norm.default: _layer_norm_made,
    aten.native_layer_norm_backward.default: _layer_norm_backward_made,
    aten.cudnn_batch_norm.default: _batch_norm_made,
    aten.cudnn_batch_norm_backward.default: _batch_norm_backward_made,
    aten.huber_loss_backward.default: _loss_backward_made,
    aten.mse_loss_backward.default: _loss_backward_made,
    aten.smooth_l1_loss_backward.default: _loss_backward_made,
    aten.native_batch_norm_backward.default: _native_norm_backward_made,
    aten.threshold_backward.default: _like_first,
    aten.add.Tensor: _pointwise_made,
    aten.mul.Tensor: _pointwise_made,
    aten.gelu.default: _pointwise_made,
    aten.gelu_backward.default: _pointwise_made,
    aten.addmm.default: _addmm_made,
    aten.sum.dim_IntList: _sum_made,
    aten.select_backward.default: _into_zeros_made,
    aten.slice_backward.default: _into_zeros_made,
    aten.roll.default: _roll_made,
    aten.zeros_like.default: _new_like,
    aten.empty_like.default: _new_like,
    aten.clone.default: _new_like,
    aten._to_copy.default: _new_like,
    aten._foreach_sqrt.default: _like_each,
    aten._log_softmax_backward_data.default: _log_softmax_gradient,
}


# ----------------------------------------------------------------------------------------------------------- optimizers
@contextmanager
def _capturable() -> Iterator[None]:
    """``capturable=True`` is for parameters on a card: traced ones are as good.

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
    """Let an optimizer over traced parameters choose ``foreach`` as it would on CUDA; torch's Adafactor never does."""
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
