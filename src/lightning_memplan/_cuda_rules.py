"""What CUDA does differently from the CPU on which a step is traced. One table a subject, each with its source.

``cuda_semantics(...)`` puts CUDA's own choices in the place of the CPU's for the time of a trace:

* autocast's operator lists (torch/include/ATen/autocast_mode.h, torch 2.13 to 2.15),
* composite operators that take another path on CUDA: fused dropout, attention, half-precision softmax,
* ``foreach`` optimizers by default (torch/optim/optimizer.py, ``_default_to_fused_or_foreach``),
* temporaries that CUDA's kernels allocate beside their outputs, and cuBLAS's workspaces.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

aten = torch.ops.aten

# ---------------------------------------------------------------------------------------------------------- autocast
# torch/include/ATen/autocast_mode.h: AT_FORALL_LOWER_PRECISION_FP, _FP32, _FP32_SET_OPT_DTYPE,
# _DIFFERENT_REDISPATCH_SIGNATURE and _PROMOTE. The test compares these lists with the installed torch's own.

LOWER_PRECISION = """
_convolution.deprecated _convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input
conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm
chain_matmul linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
_scaled_dot_product_flash_attention scaled_dot_product_attention
""".split()

FP32 = """
acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar pow.Tensor_Tensor
pow.Scalar softplus layer_norm native_layer_norm rms_norm group_norm frobenius_norm.dim nuclear_norm nuclear_norm.dim
cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss
smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss
multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp upsample_nearest1d
_upsample_nearest_exact1d upsample_nearest2d _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d
upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d
_upsample_bicubic2d_aa
""".split()

FP32_SET_OPT_DTYPE = """
prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm
linalg_matrix_norm.str_ord sum sum.dim_IntList
""".split()

FP32_APPEND_DTYPE = {"norm.Scalar": "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype"}

PROMOTE = "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add".split()

# The same kernel on both backends, so that the CPU's own stays, and with it autocast's cache of cast weights.
_SHARED = frozenset(
    """_convolution.deprecated conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input
    conv_transpose3d.input addmm matmul mm linalg_vecdot linear addbmm baddbmm bmm
    scaled_dot_product_attention""".split()
)


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _exists(name: str) -> bool:
    packet, _, overload = name.partition(".")
    return hasattr(aten, packet) and hasattr(getattr(aten, packet), overload or "default")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.dtype not in (dtype, torch.float64):
            return value.to(dtype)
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(item, dtype) for item in value)
    return value


def _floating(value: Any) -> Iterator[torch.dtype]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.dtype != torch.float64:
            yield value.dtype
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _floating(item)


def _without_autocast(func: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return func(*args, **kwargs)

    return kernel


_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


def _to(op: Any, dtype: torch.dtype) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return op(*_cast(args, dtype), **{k: _cast(v, dtype) for k, v in kwargs.items()})

    return _without_autocast(run)


def _set_opt_dtype(op: Any) -> Callable[..., Any]:
    """CUDA asks for a float32 result where the caller named no dtype; the input is read as it is."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if any(True for _ in _floating(args)) and kwargs.get("dtype") is None and not _names_dtype(op, args):
            kwargs = {**kwargs, "dtype": torch.float32}
        return op(*args, **kwargs)

    return _without_autocast(run)


def _names_dtype(op: Any, args: Sequence[Any]) -> bool:
    names = [argument.name for argument in op._schema.arguments if not argument.kwarg_only]
    at = names.index("dtype") if "dtype" in names else len(args)
    return at < len(args) and args[at] is not None


def _append_dtype(name: str) -> Callable[..., Any]:
    plain, typed = _operator(name), _operator(FP32_APPEND_DTYPE[name])

    def run(*args: Any, **kwargs: Any) -> Any:
        if not any(True for _ in _floating(args)):
            return plain(*args, **kwargs)
        if name == "norm.Scalar":
            return typed(args[0], *(args[1:] or (2,)), dtype=torch.float32)
        keepdim = args[3] if len(args) > 3 else kwargs.get("keepdim", False)
        return typed(args[0], args[1], args[2], keepdim, dtype=torch.float32)

    return _without_autocast(run)


def _promote(op: Any, dtype: torch.dtype) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        widest = torch.float32 if torch.float32 in set(_floating(args)) else dtype
        return op(*_cast(args, widest), **kwargs)

    return _without_autocast(run)


def _autocast_kernels(dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    kernels: dict[str, Callable[..., Any]] = {}
    kernels.update({name: _to(_operator(name), dtype) for name in LOWER_PRECISION if _exists(name)})
    kernels.update({name: _to(_operator(name), torch.float32) for name in FP32 if _exists(name)})
    kernels.update({name: _set_opt_dtype(_operator(name)) for name in FP32_SET_OPT_DTYPE if _exists(name)})
    kernels.update({name: _append_dtype(name) for name in FP32_APPEND_DTYPE if _exists(name)})
    kernels.update({name: _promote(_operator(name), dtype) for name in PROMOTE if _exists(name)})
    return {name: kernel for name, kernel in kernels.items() if name not in _SHARED}


def _cpu_only() -> list[str]:
    """Operators that the CPU's autocast casts and CUDA's does not."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::"))
    return [n.removeprefix("aten::") for n in names if has(n, "AutocastCPU") and not has(n, "AutocastCUDA")]


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


def _attention(capability: tuple[int, int]) -> Callable[..., torch.Tensor]:
    """aten/src/ATen/native/transformers/cuda/sdp_utils.cpp: flash, then memory-efficient, then math."""

    def kernel(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        choice = _attention_backend(query, key, value, attn_mask, is_causal, enable_gqa, capability, grad)
        if choice == "flash":
            width = query.size(-1)
            scale = width**-0.5 if scale is None else scale
            q, k, v = (_pad_width(t, 8) for t in (query, key, value))
            out = aten._scaled_dot_product_flash_attention.default(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
            return out[..., :width] if width % 8 else out
        if choice == "efficient":
            bias = _attention_bias(attn_mask, query, key)
            return aten._scaled_dot_product_efficient_attention.default(
                query, key, value, bias, grad, dropout_p, is_causal, scale=scale
            )[0]
        mask = attn_mask
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
        if query.dtype in (torch.float16, torch.bfloat16) and not torch._C._get_math_sdp_allow_fp16_bf16_reduction():
            wide = [t.float() for t in (query, key, value)]
            mask = mask.float() if mask is not None else None
            return aten._scaled_dot_product_attention_math.default(
                *wide, mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
            )[0].to(query.dtype)
        return aten._scaled_dot_product_attention_math.default(
            query, key, value, mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]

    return kernel


def _attention_backend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    gqa: bool,
    capability: tuple[int, int],
    grad: bool,
) -> str:
    half = query.dtype in (torch.float16, torch.bfloat16)
    width = query.size(-1)
    dense = all(t.dim() == 4 and t.size(-2) > 0 for t in (query, key, value))
    same_heads = query.dim() == 4 and query.size(1) == key.size(1) == value.size(1)
    backends = torch.backends.cuda
    flash = (
        backends.flash_sdp_enabled()
        and dense
        and half
        and mask is None
        and capability >= (8, 0)
        and width <= 256
        and width == key.size(-1) == value.size(-1)
        and all(t.stride(-1) == 1 for t in (query, key, value))
        and (same_heads or gqa)
        and not (causal and query.size(-2) != key.size(-2))
    )
    if flash:
        return "flash"
    align = 1 if not half or capability < (7, 5) else 8
    align = 4 if not half and capability >= (8, 0) else align
    efficient = (
        backends.mem_efficient_sdp_enabled()
        and dense
        and query.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and not (query.dtype == torch.bfloat16 and capability < (8, 0))
        and same_heads
        and width == key.size(-1)
        and width % align == 0
        and value.size(-1) % align == 0
        and all(t.stride(-1) == 1 for t in (query, key, value))
        and not (causal and mask is not None)
    )
    return "efficient" if efficient else "math"


def _pad_width(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    missing = -tensor.size(-1) % multiple
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _attention_bias(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    if mask.size(-1) % 16:  # sdp_utils: pad_bias<16>
        width = mask.size(-1)
        mask = torch.nn.functional.pad(mask, (0, -width % 16))[..., :width]
    return mask.expand(query.size(0), query.size(1), query.size(2), key.size(2))


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
        and (input.dtype == weight.dtype or (input.dtype == torch.float16 and weight.dtype == torch.float32))
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
    if input.dim() == 3 and input.is_contiguous():
        return torch.addmm(bias, input.view(-1, input.size(-1)), weight.t()).view(*input.shape[:-1], -1)
    return torch.matmul(input, weight.t()).add_(bias)


def _composites(capability: tuple[int, int]) -> dict[str, Callable[..., Any]]:
    return {
        "batch_norm": _batch_norm,
        "dropout": _dropout,
        "linear": _linear,
        "softmax.int": _half_softmax(aten._softmax.default, None),
        "log_softmax.int": _half_softmax(aten._log_softmax.default, None),
        "scaled_dot_product_attention": _attention(capability),
    }


@contextmanager
def cuda_semantics(autocast: torch.dtype | None, capability: tuple[int, int] = (8, 6)) -> Iterator[None]:
    """CUDA's choices in the place of the CPU's, for fake tensors on a CPU device; undone on the way out."""
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Overriding a previously registered kernel": that is the purpose
            for name, kernel in _composites(capability).items():
                library.impl(name, kernel, "AutogradCPU")
            if autocast is not None:
                for name, kernel in _autocast_kernels(autocast).items():
                    library.impl(name, kernel, "AutocastCPU", allow_override=True)
                for name in _cpu_only():
                    library.impl(name, torch.library.fallthrough_kernel, "AutocastCPU", allow_override=True)
        yield
    finally:
        library._destroy()


# ---------------------------------------------------------------------------------------------- memory beside outputs

_CUBLAS = [aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.addmm_.default]
_CUBLAS += [aten.addmv.default, aten.mv.default, aten.addbmm.default, aten._addmm_activation.default]

#: torch 2.15 takes cuBLAS's workspace anew for every call; before, each thread kept the first (seen on 2.14 and 2.15)
WORKSPACE_PER_CALL = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 15)
_CUBLASLT_WORKSPACE = 2**20  # aten/src/ATen/cuda/CUDABlas.cpp, 2.15: 1 MiB where the product adds a bias


def _cublas_workspace(capability: tuple[int, int]) -> int:
    """aten/src/ATen/cuda/CublasHandlePool.cpp, ``getChosenWorkspaceSize``: ``:4096:2:16:8`` (KiB times count) is
    2·4096 KiB + 8·16 KiB = 8,519,680 bytes; 32 MiB on compute capability 9.0 and later."""
    return 32 * 2**20 if capability >= (9, 0) else (2 * 4096 + 8 * 16) * 2**10


def workspaces(capability: tuple[int, int] = (8, 6)) -> Mapping[Any, tuple[str, int]]:
    """cuBLAS's workspace, where the first product of matrices in each thread makes it and it stays."""
    return {} if WORKSPACE_PER_CALL else dict.fromkeys(_CUBLAS, ("cublas", _cublas_workspace(capability)))


class Card(NamedTuple):
    """What of a card its kernels' launches depend on."""

    multiprocessors: int = 82
    threads: int = 1536  #: on each of them


Rule = Callable[[Sequence[Any], Mapping[str, Any], Any], Sequence[Any]]


def temporaries(
    capability: tuple[int, int] = (8, 6), multiprocessors: int = 82, threads: int = 1536
) -> Mapping[Any, Rule]:
    """Bytes that CUDA's kernels allocate beside their outputs, and free before they return."""
    rules: dict[Any, Rule] = {}
    if WORKSPACE_PER_CALL:
        size = _cublas_workspace(capability)
        rules.update(dict.fromkeys(_CUBLAS, lambda args, kwargs, out: (size,)))
        rules[aten.addmm.default] = lambda args, kwargs, out: (_CUBLASLT_WORKSPACE if _adds_bias(*args[:3]) else size,)
    card = Card(multiprocessors, threads)
    sums = _reduction(card, _accumulator, _sum_vector)
    rules.update(dict.fromkeys([aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default], sums))
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


def _accumulator(source: torch.Tensor) -> int:
    return max(4, source.element_size()) if source.is_floating_point() else 8


def _sum_vector(source: torch.Tensor) -> int:
    return 8 if source.element_size() == 2 else 4  # ReduceSumProdKernel.cu: 16-bit inputs, eight at a time


def _adds_bias(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> bool:
    # aten/src/ATen/native/cuda/Blas.cpp, isInputCompliesAddmmCudaLt
    return bias.dim() == 1 and bias.is_contiguous() and bias.size(0) == b.size(1) and b.size(0) > 1 and b.size(1) > 1


#: Statistics that CUDA keeps in float32 where the input is half (aten/src/ATen/native/cudnn/BatchNorm.cpp)
WIDTHS: Mapping[Any, Mapping[int, int]] = {aten.cudnn_batch_norm.default: {1: 4, 2: 4}}
WIDTHS = {**WIDTHS, aten.native_batch_norm.default: {1: 4, 2: 4}}
#: Outputs that CUDA allocates in another order than they are returned in: the mask first
#: (aten/src/ATen/native/cuda/Dropout.cu)
ORDER: Mapping[Any, Sequence[int]] = {aten.native_dropout.default: (1, 0)}


# ----------------------------------------------------------------------------------------------------------- optimizers


def foreach_by_default(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer over traced parameters choose ``foreach`` as it would on CUDA."""
    for group in optimizer.param_groups:
        if (
            "foreach" in group
            and group["foreach"] is None
            and not group.get("fused")
            and not group.get("differentiable")
        ):
            tensor_lr = isinstance(group.get("lr"), torch.Tensor) and not group.get("capturable")
            group["foreach"] = not tensor_lr
