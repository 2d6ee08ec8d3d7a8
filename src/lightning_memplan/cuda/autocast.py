"""CUDA's autocast: its lists of operators, and its casts in kernels for the CPU.

Source: torch/include/ATen/autocast_mode.h (2.13 to 2.15): AT_FORALL_LOWER_PRECISION_FP, _FP32, _FP32_SET_OPT_DTYPE,
_DIFFERENT_REDISPATCH_SIGNATURE and _PROMOTE. A test compares these lists with those of the installed torch.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lightning_memplan.cuda.rule_set import exists, operator

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


# Both backends have the same kernel: the CPU's stays, with autocast's cache of cast weights
_SHARED = frozenset(
    """_convolution.deprecated conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input
    conv_transpose3d.input addmm matmul mm linalg_vecdot linear addbmm baddbmm bmm
    scaled_dot_product_attention""".split()
)


_CASTS: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}  # cached weights


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast tensors, and a parameter once in a region of autocast.

    Source: aten/src/ATen/autocast_mode.cpp, ``cached_cast`` (2.14).
    """
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point() or value.dtype in (dtype, torch.float64):
            return value
        if not _is_cached(value, dtype):
            return value.to(dtype)
        of, cast = _CASTS.get(id(value), (None, None))
        if cast is None or of is None or of() is not value:
            with torch.enable_grad():  # also if its first reader needs no gradient
                cast = value.to(dtype)
            _CASTS[id(value)] = weakref.ref(value), cast
        return cast
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(item, dtype) for item in value)
    return value


def _is_cached(value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Check for a weight whose cast autocast keeps."""
    return (
        torch.is_autocast_cache_enabled()
        and dtype == torch.get_autocast_dtype("cpu")
        and value.dtype == torch.float32
        and value.requires_grad
        and value.is_leaf
        and not value._is_view()
    )


def _cast_all(args: Sequence[Any], kwargs: Mapping[str, Any], dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Cast all arguments, the last first, as the compiled kernels do."""
    named = {name: _cast(value, dtype) for name, value in reversed([*kwargs.items()])}
    return [_cast(value, dtype) for value in reversed(args)][::-1], named


def _floating(value: Any) -> Iterator[torch.dtype]:
    """Yield the types of the tensors that autocast may cast."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.dtype != torch.float64:
            yield value.dtype
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _floating(item)


def without_autocast(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``func`` for a kernel of autocast: inside it nothing is cast again."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return func(*args, **kwargs)

    return kernel


_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


def _to(op: Any, dtype: torch.dtype | None = None) -> Callable[..., Any]:
    """Cast arguments to ``dtype``, or to autocast's type."""

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _cast_all(args, kwargs, dtype or torch.get_autocast_dtype("cpu"))
        return op(*args, **kwargs)

    return without_autocast(run)


def _set_opt_dtype(op: Any) -> Callable[..., Any]:
    """Ask for a float32 result unless the caller names a dtype; the input is not cast."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if any(True for _ in _floating(args)) and kwargs.get("dtype") is None and not _names_dtype(op, args):
            kwargs = {**kwargs, "dtype": torch.float32}
        return op(*args, **kwargs)

    return without_autocast(run)


def _names_dtype(op: Any, args: Sequence[Any]) -> bool:
    names = [argument.name for argument in op._schema.arguments if not argument.kwarg_only]
    at = names.index("dtype") if "dtype" in names else len(args)
    return at < len(args) and args[at] is not None


def _append_dtype(name: str) -> Callable[..., Any]:
    """Call the overload that takes a dtype, with float32."""
    plain, typed = operator(name), operator(FP32_APPEND_DTYPE[name])

    def run(*args: Any, **kwargs: Any) -> Any:
        if not any(True for _ in _floating(args)):
            return plain(*args, **kwargs)
        if name == "norm.Scalar":
            return typed(args[0], *(args[1:] or (2,)), dtype=torch.float32)
        keepdim = args[3] if len(args) > 3 else kwargs.get("keepdim", False)
        return typed(args[0], args[1], args[2], keepdim, dtype=torch.float32)

    return without_autocast(run)


def _promote(op: Any) -> Callable[..., Any]:
    """Cast arguments to the widest type among them."""

    def run(*args: Any, **kwargs: Any) -> Any:
        widest = torch.float32 if torch.float32 in set(_floating(args)) else torch.get_autocast_dtype("cpu")
        args, kwargs = _cast_all(args, kwargs, widest)
        return op(*args, **kwargs)

    return without_autocast(run)


def autocast_kernels() -> dict[str, Callable[..., Any]]:
    """Return the kernels that cast as CUDA's autocast does, by the names of their operators."""
    kernels: dict[str, Callable[..., Any]] = {}
    kernels.update({name: _to(operator(name)) for name in LOWER_PRECISION if exists(name)})
    kernels.update({name: _to(operator(name), torch.float32) for name in FP32 if exists(name)})
    kernels.update({name: _set_opt_dtype(operator(name)) for name in FP32_SET_OPT_DTYPE if exists(name)})
    kernels.update({name: _append_dtype(name) for name in FP32_APPEND_DTYPE if exists(name)})
    kernels.update({name: _promote(operator(name)) for name in PROMOTE if exists(name)})
    return {name: kernel for name, kernel in kernels.items() if name not in _SHARED}


@functools.cache
def cpu_only() -> list[str]:
    """Return the names of operators that the CPU's autocast casts and CUDA's does not."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::"))
    return [n.removeprefix("aten::") for n in names if has(n, "AutocastCPU") and not has(n, "AutocastCUDA")]


@contextmanager
def users_autocast() -> Iterator[None]:
    """Let ``autocast("cuda")`` in the user's code work on the traced device, by default in float16.

    Weights that the kernels here have cast are kept as long as the rest of autocast's cache.

    Source: torch/amp/autocast_mode.py (2.13 to 2.15); ``torch.cuda.amp.autocast`` is a subclass.
    """
    init, clear = torch.amp.autocast.__init__, torch.clear_autocast_cache

    def renamed(self: Any, device_type: str, dtype: torch.dtype | None = None, *args: Any, **kwargs: Any) -> None:
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or torch.float16
        init(self, device_type, dtype, *args, **kwargs)

    def cleared() -> None:
        _CASTS.clear()
        clear()

    torch.amp.autocast.__init__ = renamed  # type: ignore[method-assign]
    torch.clear_autocast_cache = cleared
    try:
        yield
    finally:
        _CASTS.clear()
        torch.amp.autocast.__init__ = init  # type: ignore[method-assign]
        torch.clear_autocast_cache = clear
