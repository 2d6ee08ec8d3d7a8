"""Attention on CUDA: the kernel that is chosen, the tensors that it saves, and its backward pass.

Source: aten/src/ATen/native/transformers (2.11 to 2.15): attention.cpp, cuda/sdp_utils.cpp, cuda/attention.cu and
cuda/attention_backward.cu.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from lightning_memplan.cuda.layout import copy_of
from lightning_memplan.cuda.rule_set import (
    OUTPUTS,
    VERSION,
    Allocation,
    Call,
    Gpu,
    Output,
    Scratch,
    allocates,
    aten,
    decomposes,
)

#: Kernels get inputs without a batch, and one head of keys for all, from torch 2.14 on (seen on 2.11 and 2.14)
BROADCASTS = VERSION >= (2, 14)

#: Memory-efficient attention takes fewer heads of keys than of queries from torch 2.14 on (torch/nn/functional.py)
GROUPED_EFFICIENT = VERSION >= (2, 14)


def attention(capability: tuple[int, int]) -> Callable[..., torch.Tensor]:
    """Return ``scaled_dot_product_attention`` as CUDA decomposes it: flash, memory-efficient, or math.

    Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (2.11 to 2.15).
    """

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
        if BROADCASTS and query.dim() == key.dim() == value.dim() == 3:
            mask = attn_mask if attn_mask is None or attn_mask.dim() < 3 else attn_mask.unsqueeze(0)
            q, k, v = (tensor.unsqueeze(0) for tensor in (query, key, value))
            return kernel(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa).squeeze(0)
        grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        plain = key, value
        if BROADCASTS and not enable_gqa and query.dim() == 4 and key.size(1) == value.size(1) == 1:
            key, value = (tensor.expand(-1, query.size(1), -1, -1) for tensor in (key, value))
        choice = _attention_backend(query, key, value, attn_mask, is_causal, enable_gqa, capability, grad)
        if choice == "flash":
            width = query.size(-1)
            scale = width**-0.5 if scale is None else scale
            q, k, v = (_pad_width(t, 8) for t in (query, key, value))
            out = aten._scaled_dot_product_flash_attention.default(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
            return out[..., :width] if width % 8 else out  # type: ignore[no-any-return]
        if choice == "efficient":
            bias = _attention_bias(attn_mask, query, key)
            return aten._scaled_dot_product_efficient_attention.default(  # type: ignore[no-any-return]
                query, key, value, bias, grad, dropout_p, is_causal, scale=scale
            )[0]
        mask = _float_mask(attn_mask, query)
        return _math_attention(query, *plain, mask, dropout_p, is_causal, scale, enable_gqa)[0]

    return kernel


def _math_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    gqa: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the mask in place, and compute halves in float32.

    Source: aten/src/ATen/native/transformers/attention.cpp, ``_scaled_dot_product_attention_math`` (2.11 to 2.15).
    """
    q, k, v = query, key, value
    if q.dtype in (torch.float16, torch.bfloat16) and not torch._C._get_math_sdp_allow_fp16_bf16_reduction():
        q, k, v = (t.float() for t in (q, k, v))
        mask = mask.float() if mask is not None else None
    factor = math.sqrt(q.size(-1) ** -0.5 if scale is None else abs(scale))
    scaled = q * factor
    if causal:
        kept = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).tril()
        mask = _float_mask(kept, q)
    if gqa:
        k, v = (t.repeat_interleave(q.size(-3) // t.size(-3), -3) for t in (k, v))
    scores = torch.matmul(scaled, k.transpose(-2, -1) * factor)
    if mask is not None:
        scores.add_(mask)
    scores = aten._safe_softmax.default(scores, -1)
    if dropout > 0:
        scores = torch.dropout(scores, dropout, True)
    weights = scores.to(query.dtype)  # the second result is made first
    return torch.matmul(scores, v).to(query.dtype), weights


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
        and (same_heads or (gqa and GROUPED_EFFICIENT))
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


def _float_mask(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    # attention.cpp, convert_boolean_attn_mask: one where() with two scalars
    scalars = [mask.new_empty((), dtype=query.dtype) for _ in range(2)]
    mask = torch.zeros_like(mask, dtype=query.dtype)
    del scalars
    return mask


def _attention_bias(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    mask = _float_mask(mask, query)
    if mask is None:
        return None
    if mask.size(-1) % 8:  # attention.cpp: pad_bias<8>
        width = mask.size(-1)
        mask = torch.nn.functional.pad(mask, (0, -width % 8))[..., :width]
    return mask.expand(query.size(0), query.size(1), query.size(2), key.size(2))


@allocates(aten._scaled_dot_product_flash_attention)
def flash(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """With dropout the state of the random numbers, the seventh output, is made twice.

    Source: aten/src/ATen/native/transformers/cuda/attention.cu (2.14).
    """
    if not call.argument(3, "dropout_p"):
        yield OUTPUTS
        return
    yield Output(0)
    yield Output(1)
    yield Scratch(16)
    yield Output(7)
    yield Output(6)


@allocates(aten._scaled_dot_product_flash_attention_backward)
def flash_backward(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """The kernel needs sums of the output times its gradient, and the query's gradient in float32, both in tiles.

    The gradient and the output are copied where the dimension of heads is not the last but one in memory.

    Source: aten/src/ATen/native/transformers/cuda/attention_backward.cu (2.14).
    """
    grad, query, key, _, output = call.args[:5]
    batch, heads, length, width = query.shape
    wide = -(-width // 32) * 32 if width <= 128 else -(-width // 64) * 64
    rows = batch * heads * (-(-length // 128) * 128)
    for tensor in (grad, output):
        if not tensor.transpose(1, 2).is_contiguous():
            yield copy_of(tensor)
    yield OUTPUTS
    yield Scratch(4 * rows)
    yield Scratch(4 * rows * wide)
    if key.size(1) != heads:  # gradients of keys and values are added up by groups
        yield Scratch(2 * batch * heads * key.size(2) * width * key.element_size())


@decomposes(aten._scaled_dot_product_efficient_attention)
def efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    grad: bool,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, ...]:
    """The seed and offset of random numbers are on the host with dropout; else on the GPU, from 2.12 on, and unused.

    Source: aten/src/ATen/native/transformers/cuda/attention.cu, ``_efficient_attention_forward`` (2.11, 2.14).
    """
    batch, heads, length, _ = query.shape
    device = query.device if not dropout and VERSION >= (2, 12) else torch.device("cpu")
    seed, offset = (torch.empty((), dtype=torch.int64, device=device) for _ in range(2))
    out = query.new_empty((batch, length, heads, value.size(-1))).transpose(1, 2)
    rows = -(-length // 32) * 32 if grad else 0
    return out, query.new_empty((batch, heads, rows), dtype=torch.float32), seed, offset


@decomposes(aten._scaled_dot_product_efficient_attention_backward)
def efficient_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    seed: torch.Tensor,
    offset: torch.Tensor,
    dropout: float,
    wanted: Sequence[bool],
    causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """The kernel needs sums of the output times its gradient, and the query's gradient in float32.

    The latter is in tiles of 64 · 64, with 16 bytes each.

    Source: aten/src/ATen/native/transformers/cuda/attention_backward.cu (2.14).
    """
    batch, heads, length, width = query.shape
    grad = grad.transpose(1, 2)
    dense = None if grad.is_contiguous() else torch.empty_like(grad, memory_format=torch.contiguous_format)
    grads: list[torch.Tensor | None] = [
        t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (query, key, value)
    ]
    if bias is not None and wanted[3]:
        last = bias.size(-1)
        grads.append(bias.new_empty((*bias.shape[:-1], -(-last // 16) * 16))[..., :last])
    else:
        grads.append(None)
    several = [] if key.size(1) == heads else [query.new_empty(grad.shape) for _ in range(2)]  # added up by groups
    if query.element_size() == 4:
        product = query.new_empty(grad.shape)
        sums = query.new_empty((batch, length, heads))
        rows = sums.transpose(1, 2).contiguous()
        del product, sums
    else:
        rows = query.new_empty((batch, heads, length), dtype=torch.float32)
    tiles = -(-length // 64) * (-(-width // 64))
    workspace = query.new_empty(batch * heads * tiles * (64 * 64 * 4 + 16), dtype=torch.uint8)
    del dense, rows, workspace
    several.clear()
    return tuple(grads)
