"""Operators on the null GPU, each beside its trace: prints JSON.

    tests/nullgpu/nullgpu python -m tests.programs.cuda_cases [CASE...]

A case is a function of a batch size and a device: it makes tensors there, and returns what ``backward`` is called on.
It is traced at batch sizes 2, 3 and 5, predicted at ``BATCH``, and run there.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_memplan.cuda.dispatch import cuda_semantics
from lightning_memplan.cuda.recurrent import flatten_weights
from lightning_memplan.cuda.rule_set import Gpu
from lightning_memplan.cuda.rules import rules_for
from lightning_memplan.memory.allocator import replay
from lightning_memplan.memory.events import Trace, labelled
from lightning_memplan.memory.program import scale
from lightning_memplan.settings import Parallel
from lightning_memplan.step.backend import StepBackend
from lightning_memplan.step.context import EventContext
from lightning_memplan.step.fake_cuda import DEVICE
from lightning_memplan.step.precision import FakeGradScaler
from lightning_memplan.step.strategies.choose import choose_strategy
from lightning_memplan.trace.recorder import Recorder

BATCH = 48
Case = Callable[[int, torch.device], Any]
CASES: dict[str, tuple[Case, torch.dtype | None]] = {}
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def case(*autocasts: torch.dtype | None) -> Callable[[Case], Case]:
    """Register a case, once for each autocast."""

    def register(function: Case) -> Case:
        for autocast in autocasts or (None,):
            suffix = "" if autocast is None else "@" + str(autocast).removeprefix("torch.")
            CASES[function.__name__ + suffix] = (function, autocast)
        return function

    return register


def leaf(device: torch.device, *shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.zeros(shape, device=device, dtype=dtype).requires_grad_()


def on(device: torch.device, module: nn.Module) -> nn.Module:
    """A module with new parameters there; those of a recurrent network are in one buffer, as when it is moved."""
    for child in module.modules():
        for name, value in list(child._parameters.items()):
            if value is not None:
                child._parameters[name] = nn.Parameter(torch.zeros(value.shape, dtype=value.dtype, device=device))
        for name, value in list(child._buffers.items()):
            if value is not None:
                child._buffers[name] = torch.zeros(value.shape, dtype=value.dtype, device=device)
        if isinstance(child, nn.RNNBase):
            child._flat_weights = [getattr(child, name) for name in child._flat_weights_names]
            if device.type == "cuda":
                child.flatten_parameters()
            else:
                flatten_weights(child)
    return module


# --------------------------------------------------------------------------------------------------------------- cases


def _reductions(shape: tuple[int, ...], dims: list[int]) -> None:
    for dtype in (F32, F16):

        def run(n: int, device: torch.device, dtype: torch.dtype = dtype) -> None:
            x = torch.zeros((n, *shape), device=device, dtype=dtype)
            x.sum(dims)
            x.sum(dims, dtype=F32)
            x.mean(dims)
            torch.linalg.vector_norm(x, 2, dims)
            x.var(dims)
            torch.var_mean(x, dims)
            x.amax(dims)
            x.amin(dims)
            x.max(dims[0])
            x.min(dims[0])
            x.argmax(dims[0])
            x.max()
            x.isnan().any()
            torch.logsumexp(x, dims)

        CASES[f"reductions{[*shape]} over {dims} {str(dtype).removeprefix('torch.')}"] = (run, None)


for _shape, _dims in (
    ((91, 1001), [0]),
    ((64, 56, 56), [0, 2, 3]),
    ((5, 7, 100, 11), [0, 2, 4]),
    ((100000,), [0, 1]),
):
    _reductions(_shape, _dims)


@case(None, F16)
def cross_entropy(n: int, device: torch.device) -> Any:
    return F.cross_entropy(leaf(device, n, 1000), torch.zeros(n, dtype=torch.long, device=device))


@case(None, F16)
def cross_entropy_of_maps(n: int, device: torch.device) -> Any:
    return F.cross_entropy(leaf(device, n, 5, 64, 64), torch.zeros(n, 64, 64, dtype=torch.long, device=device))


@case()
def cross_entropy_smoothed(n: int, device: torch.device) -> Any:
    return F.cross_entropy(leaf(device, n, 1000), torch.zeros(n, dtype=torch.long, device=device), label_smoothing=0.1)


@case(None, F16)
def losses(n: int, device: torch.device) -> Any:
    x, y = leaf(device, n, 300), torch.zeros(n, 300, device=device)
    total = F.mse_loss(x, y) + F.l1_loss(x, y) + F.smooth_l1_loss(x, y) + F.huber_loss(x, y)
    total = total + F.binary_cross_entropy_with_logits(x, y) + F.kl_div(x.log_softmax(1), y, reduction="batchmean")
    return total + F.cosine_similarity(x, y).mean() + F.soft_margin_loss(x, y)


@case()
def losses_of_rows(n: int, device: torch.device) -> Any:
    """What is compared lies otherwise than its gradient."""
    y, total = torch.zeros(n, 24, 5, device=device), 0
    for loss in (F.mse_loss, F.smooth_l1_loss, F.l1_loss):
        total = total + loss(on(device, nn.Linear(64, 24))(leaf(device, n, 5, 64)).transpose(1, 2), y)
    return total


@case()
def embedding(n: int, device: torch.device) -> Any:
    return F.embedding(torch.zeros(n, 128, dtype=torch.long, device=device), leaf(device, 1000, 256)).sum()


@case()
def embedding_few(n: int, device: torch.device) -> Any:
    return F.embedding(torch.zeros(n, dtype=torch.long, device=device), leaf(device, 1000, 256)).sum()


@case()
def embedding_bag(n: int, device: torch.device) -> Any:
    index, table = torch.zeros(n, 20, dtype=torch.long, device=device), leaf(device, 5000, 64)
    return F.embedding_bag(index, table, mode="sum").sum() + F.embedding_bag(index, table, mode="mean").sum()


@case(None, F16)
def indexing(n: int, device: torch.device) -> Any:
    x, index = leaf(device, n, 300), torch.zeros(200, dtype=torch.long, device=device)
    rows = torch.zeros(n, dtype=torch.long, device=device)
    total = x[:, index].sum() + x[rows].sum() + x.index_select(1, index).sum() + x[rows, rows].sum()
    total = total + x[rows[:, None], index].sum()
    total = total + x.gather(1, rows[:, None]).sum() + x.scatter_add(1, rows[:, None].expand(n, 300), x).sum()
    return total + x.topk(5, 1).values.sum() + x.sort(1).values.sum() + x.cumsum(1).sum() + x.flip(1).sum()


@case()
def indexing_by_masks(n: int, device: torch.device) -> Any:
    """A number written to where a mask is true, and to parts: no places of the mask, no tensor of the number."""
    x, labels = leaf(device, n, 300) * 1, torch.zeros(n, 300, dtype=torch.long, device=device)
    x[x == 0] = 0.0
    x[:, 1:] = 1
    labels[labels == 0] = -100
    labels[:, 0] = 2
    return x.sum()


@case()
def indexing_over(n: int, device: torch.device) -> Any:
    """What is overwritten has no gradient: zeros in a copy of it."""
    x, rows = leaf(device, n, 300) * 1, torch.zeros(n, dtype=torch.long, device=device)
    total = (x * 1).scatter(1, rows[:, None], 0.0).sum() + (x * 1).scatter(1, rows[:, None], x[:, :1]).sum()
    total = total + (x * 1).index_put((rows, rows), x[:, 0]).sum() + (x * 1).masked_fill(x == 0, 1).sum()
    return total + (x * 1).index_copy(0, rows, x).sum() + (x * 1).index_fill(1, rows, 0.0).sum()


@case()
def relative_position_table(n: int, device: torch.device) -> Any:
    table, index = leaf(device, 169, 3), torch.zeros(49 * 49, dtype=torch.long, device=device)
    return (table[index].view(49, 49, 3).permute(2, 0, 1)[None] + leaf(device, n, 3, 49, 49)).sum()


@case(None, F16, BF16)
def norms(n: int, device: torch.device) -> Any:
    x = leaf(device, n, 64, 16, 16)
    y = (
        on(device, nn.GroupNorm(8, 64))(x)
        + on(device, nn.InstanceNorm2d(64, affine=True))(x)
        + nn.InstanceNorm2d(64)(x)
    )
    y = y + on(device, nn.LayerNorm([16, 16]))(x) + on(device, nn.LayerNorm(16, bias=False))(x)
    return (y + on(device, nn.RMSNorm(16))(x) + F.normalize(x, dim=1) + on(device, nn.LayerNorm(16))(y)).sum()


@case(None, F16, BF16)
def batch_norms(n: int, device: torch.device) -> Any:
    total = 0
    for norm, shape in (
        (nn.BatchNorm1d(64), (n, 64)),
        (nn.BatchNorm1d(64), (n, 64, 30)),
        (nn.BatchNorm2d(64), (n, 64, 9, 9)),
        (nn.BatchNorm3d(64), (n, 64, 5, 5, 5)),
    ):
        total = total + on(device, norm)(leaf(device, *shape)).sum()
    return total


@case(None, F16, BF16)
def batch_norm_of_rows(n: int, device: torch.device) -> Any:
    """Tokens turned to channels and back, before a product that wants them contiguous."""
    x = on(device, nn.Linear(64, 64))(leaf(device, n, 30, 64)).transpose(1, 2)
    y = on(device, nn.BatchNorm1d(64))(x).transpose(1, 2)
    return (on(device, nn.Linear(64, 64))(y) * torch.zeros(n, 30, 64, device=device)).sum()


@case()
def counts(n: int, device: torch.device) -> Any:
    """Sums of another type than what is added up."""
    x = leaf(device, n, 300)
    mask = x > 0
    total = mask.sum() + mask.sum(1).sum() + mask.int().sum() + mask.int().cumsum(1).sum() + mask.cumsum(1).sum()
    return total * (x.half().sum(dtype=F32) + x.half().cumsum(1).sum() + x.sum(1, dtype=torch.float64).sum())


@case(F16, BF16)
def batch_norm_of_half(n: int, device: torch.device) -> Any:
    half = leaf(device, n, 32, 17, 17) @ leaf(device, 17, 17)
    return on(device, nn.BatchNorm2d(32))(half).sum() + on(device, nn.BatchNorm2d(32)).eval()(half).sum()


@case(None, F16)
def activations(n: int, device: torch.device) -> Any:
    x, total = leaf(device, n, 1000), 0
    for f in (
        F.relu,
        F.gelu,
        F.silu,
        F.mish,
        F.elu,
        F.selu,
        F.hardswish,
        F.hardsigmoid,
        F.sigmoid,
        F.tanh,
        F.softplus,
        F.leaky_relu,
        F.relu6,
        F.logsigmoid,
        F.glu,
        F.softsign,
    ):
        total = total + f(x).sum()
    return total + F.softmax(x, 1).sum() + F.prelu(x, leaf(device, 1)).sum() + F.dropout(x, 0.1).sum()


@case(None, F16)
def poolings(n: int, device: torch.device) -> Any:
    x, y = leaf(device, n, 8, 33, 33), leaf(device, n, 4, 9, 9, 9)
    total = F.max_pool2d(x, 3, 2, 1).sum() + F.avg_pool2d(x, 2).sum() + F.adaptive_avg_pool2d(x, 7).sum()
    total = total + F.adaptive_avg_pool2d(x, 1).sum() + F.adaptive_max_pool2d(x, 3).sum() + F.lp_pool2d(x, 2, 2).sum()
    total = total + F.max_pool3d(y, 2).sum() + F.avg_pool3d(y, 2).sum() + F.adaptive_avg_pool3d(y, 2).sum()
    return total + F.max_pool1d(x[:, 0], 2).sum() + F.avg_pool1d(x[:, 0], 2).sum()


@case(None, F16)
def resizings(n: int, device: torch.device) -> Any:
    x, total = leaf(device, n, 4, 13, 13), 0
    for mode in ("nearest", "bilinear", "bicubic", "nearest-exact"):
        total = total + F.interpolate(x, scale_factor=2, mode=mode).sum()
    y = F.interpolate(leaf(device, n, 2, 7, 7, 7), scale_factor=2, mode="trilinear")
    total = total + y.sum() + F.pad(x, (1, 1, 1, 1), mode="reflect").sum() + F.pad(x, (1, 2)).sum()
    grid = torch.zeros(n, 8, 8, 2, device=device)
    total = total + F.grid_sample(x, grid, align_corners=False).sum() + F.pixel_shuffle(x, 2).sum()
    return total + F.interpolate(x, size=(9, 9), mode="bilinear", antialias=True).sum() + x.roll(2, 2).sum()


@case()
def layouts_of_maps(n: int, device: torch.device) -> Any:
    """Contiguous, channels last, or a part of a tensor, and then a gradient that is contiguous or channels last."""
    x, total = leaf(device, n, 16, 12, 12), 0
    for f in (
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.adaptive_avg_pool2d(x, 4),
        lambda x: F.adaptive_max_pool2d(x, 4),
        lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x: F.pixel_shuffle(x, 2),
        lambda x: F.pixel_unshuffle(x, 2),
    ):
        for y in (x * 1, x.contiguous(memory_format=torch.channels_last), x[..., 1:-1, 1:-1]):
            for layout in (torch.contiguous_format, torch.channels_last):
                z = f(y)
                weights = torch.zeros(z.shape, device=device, dtype=z.dtype).to(memory_format=layout)
                total = total + (weights * (z + weights)).sum()
    return total


@case(None, F16)
def convolutions(n: int, device: torch.device) -> Any:
    x, y, z = leaf(device, n, 8, 20, 20), leaf(device, n, 8, 100), leaf(device, n, 4, 9, 9, 9)
    total = 0
    for conv in (
        nn.Conv2d(8, 16, 3),
        nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False),
        nn.Conv2d(8, 16, 1, stride=2),
        nn.ConvTranspose2d(8, 4, 2, 2),
        nn.Conv2d(8, 8, 3, dilation=2, groups=2),
    ):
        total = total + on(device, conv)(x).sum()
    total = total + on(device, nn.Conv1d(8, 16, 5))(y).sum() + on(device, nn.ConvTranspose1d(8, 4, 4, 2))(y).sum()
    return total + on(device, nn.Conv3d(4, 8, 3))(z).sum() + on(device, nn.ConvTranspose3d(4, 2, 2, 2))(z).sum()


@case(None, F16)
def convolutions_channels_last(n: int, device: torch.device) -> Any:
    x = leaf(device, n, 8, 20, 20).contiguous(memory_format=torch.channels_last)
    a = F.conv2d(x, leaf(device, 16, 8, 3, 3).contiguous(memory_format=torch.channels_last))
    b = on(device, nn.Conv2d(8, 16, 3))(x)
    c = on(device, nn.BatchNorm2d(16))(a)
    return F.max_pool2d(c.relu(), 2).sum() + b.sum() + F.adaptive_avg_pool2d(c, 1).sum()


@case(None, F16)
def convolutions_of_rows(n: int, device: torch.device) -> Any:
    """Tokens turned to channels, as audio networks and state spaces do, and their gradients turned back."""
    x, total = leaf(device, n, 50, 64).transpose(1, 2), 0
    for groups, width in ((1, 16), (2, 16), (64, 64), (64, 128)):
        y = on(device, nn.Conv1d(64, width, 3, padding=1, groups=groups))(x)
        total = total + (y.transpose(1, 2) * torch.zeros(n, 50, width, device=device)).sum() + y.sum()
    return total


@case(None, F16)
def convolutions_laid_out_otherwise(n: int, device: torch.device) -> Any:
    """A part of a tensor, channels that come last in a gradient only, or in the input and the weight only."""
    x, total = leaf(device, n, 32, 20, 20), 0
    for conv in (nn.Conv2d(32, 16, 3), nn.Conv2d(32, 32, 3, groups=32), nn.ConvTranspose2d(32, 16, 2, 2)):
        for layout in (torch.contiguous_format, torch.channels_last):
            y = on(device, conv)(x[..., 1:-1, 1:-1].contiguous(memory_format=layout))
            total = total + (y * torch.zeros(y.shape, device=device).to(memory_format=torch.channels_last)).sum()
        total = total + on(device, conv)(x[..., 1:-1, 1:-1]).sum()
    return total


@case(None, F16)
def convolutions_of_each_channel_in_depth(n: int, device: torch.device) -> Any:
    """Videos of which a part is read, or whose channels come last: what is copied ends before the bias's gradient."""
    x, total = leaf(device, n, 32, 6, 20, 20), 0
    conv = on(device, nn.Conv3d(32, 32, 3, groups=32))
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        y = conv(x[..., 1:-1, 1:-1].contiguous(memory_format=layout))
        total = total + (y * torch.zeros(y.shape, device=device).to(memory_format=torch.channels_last_3d)).sum()
    return total + conv(x[..., 1:-1, 1:-1]).sum()


@case(None, F16, BF16)
def linears(n: int, device: torch.device) -> Any:
    total = on(device, nn.Linear(100, 70))(leaf(device, n, 100)).sum()
    total = total + on(device, nn.Linear(100, 70))(leaf(device, n, 10, 100)).sum()
    total = total + on(device, nn.Linear(100, 70))(leaf(device, n, 2, 10, 100)).sum()
    total = total + on(device, nn.Linear(100, 70))(leaf(device, n, 100, 10).transpose(1, 2)).sum()
    total = total + on(device, nn.Linear(100, 70, bias=False))(leaf(device, n, 10, 100)).sum()
    total = total + on(device, nn.Bilinear(10, 12, 7))(leaf(device, n, 10), leaf(device, n, 12)).sum()
    a, b = leaf(device, n, 4, 20, 30), leaf(device, n, 4, 30, 20)
    return total + (a @ b).sum() + torch.einsum("nhqd,nhdk->nhqk", a, b).sum() + torch.bmm(a[:, 0], b[:, 0]).sum()


def _attention(width: int, length: int, mask: str, causal: bool, dropout: float, dtype: torch.dtype) -> None:
    def run(n: int, device: torch.device) -> Any:
        q, k, v = (leaf(device, n, length, 3, 4, width, dtype=dtype).permute(2, 0, 3, 1, 4)).unbind(0)
        bias = None
        if mask == "bool":
            bias = torch.zeros(n, 1, length, length, dtype=torch.bool, device=device)
        elif mask == "float":
            bias = torch.zeros(length, length, dtype=dtype, device=device)
        elif mask == "learned":
            bias = leaf(device, 1, 4, length, length, dtype=dtype)
        out = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=dropout, is_causal=causal)
        return out.transpose(1, 2).reshape(n, length, -1).square().sum()

    name = str(dtype).removeprefix("torch.")
    CASES[f"attention {width} {length} {mask} {causal} {dropout} {name}"] = (run, None)


for _dtype in (F32, F16):
    for _width, _length in ((64, 128), (32, 197), (20, 50), (80, 33)):
        _attention(_width, _length, "", False, 0.0, _dtype)
    _attention(64, 100, "", True, 0.0, _dtype)
    _attention(64, 100, "", False, 0.1, _dtype)
    for _mask in ("bool", "float", "learned"):
        _attention(64, 100, _mask, False, 0.0, _dtype)
        _attention(32, 49, _mask, False, 0.1, _dtype)


@case(None, F16, BF16)
def multihead_attention(n: int, device: torch.device) -> Any:
    attend = on(device, nn.MultiheadAttention(64, 4, batch_first=True))
    x, y = leaf(device, n, 30, 64), leaf(device, n, 20, 64)
    pad = torch.zeros(n, 20, dtype=torch.bool, device=device)
    total = attend(x, y, y, need_weights=False)[0].sum() + attend(x, y, y)[0].sum()
    return total + attend(x, y, y, key_padding_mask=pad, need_weights=False)[0].sum()


@case(None, F16, BF16)
def channels_last(n: int, device: torch.device) -> Any:
    """Sums of a batch norm from block to block, and a gradient that softmax lays out anew."""
    x = torch.zeros(n, 64, 17, 17, device=device).to(memory_format=torch.channels_last).requires_grad_()
    weights = torch.zeros(n, 64, 17, 17, device=device).to(memory_format=torch.channels_last)
    flat = leaf(device, n, 64, 17, 17).softmax(1)
    return on(device, nn.BatchNorm2d(64))(x).sum() + (flat * weights).sum()


def _grouped(dtype: torch.dtype) -> None:
    def run(n: int, device: torch.device) -> Any:
        q, k, v = (leaf(device, n, heads, 64, 32, dtype=dtype) for heads in (8, 2, 2))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).sum()

    # flash's backward pass has the same bytes in another order
    kind = "attention" if dtype == F32 else "flash attention"
    CASES[f"{kind} of grouped keys"] = (run, None)


for _dtype in (F32, BF16):
    _grouped(_dtype)


def _fewer_dimensions(dtype: torch.dtype) -> None:
    def run(n: int, device: torch.device) -> Any:
        q, k, v, mask = (leaf(device, 4 * n, 50, width, dtype=dtype) for width in (32, 32, 32, 50))
        return F.scaled_dot_product_attention(q, k, v, mask).sum() + F.scaled_dot_product_attention(q, k, v).sum()

    CASES[f"exact attention of fewer dimensions {str(dtype).removeprefix('torch.')}"] = (run, None)


for _dtype in (F32, BF16):
    _fewer_dimensions(_dtype)


@case(None, F16)
def one_head_of_keys(n: int, device: torch.device) -> Any:
    queries, keys = leaf(device, n, 8, 64, 32), leaf(device, n, 1, 64, 32)
    return F.scaled_dot_product_attention(queries * 2, keys * 2, keys * 3).sum()


@case()
def distances(n: int, device: torch.device) -> Any:
    return torch.cdist(leaf(device, n, 40, 16), leaf(device, n, 30, 16)).sum()


@case()
def one_hot(n: int, device: torch.device) -> Any:
    classes = torch.zeros(n, 40, dtype=torch.long, device=device)
    return (F.one_hot(classes, 16).float() * leaf(device, n, 40, 16)).sum()


@case(None, F16)
def exact_operands(n: int, device: torch.device) -> Any:
    """Operands that cuBLAS cannot read as they lie."""
    x, y = leaf(device, n, 40, 30), leaf(device, n, 40, 40, 8)
    last = on(device, nn.Linear(40, 10))(x[..., -1]).sum() + F.linear(x[..., 3], leaf(device, 10, 40)).sum()
    mixed = torch.einsum("ntsc,nsc->ntc", y, leaf(device, n, 40, 8) * 2).sum()
    return last + mixed + torch.mv(leaf(device, 20, 30, n)[..., 0], leaf(device, 1).expand(30)).sum()


@case()
def exact_indices(n: int, device: torch.device) -> Any:
    """Indices of an embedding that are part of others, indices from the host, numbers that are written, rows that are
    the largest of some, values of a mask that are counted."""
    words, table = torch.zeros(n, 51, dtype=torch.long, device=device), leaf(device, 100, 16)
    x = leaf(device, n, 20, 3)
    y = x * 2
    y[:, 2:5, 0], y[:, 5] = 1, 2.0
    total = F.embedding(words[:, 1:], table).sum() + F.embedding(words[:, :1], table).sum() + y[..., [2, 0, 1]].sum()
    rows = torch.zeros(n * 20, dtype=torch.long, device=device)[:, None].expand(-1, 3)
    most = torch.zeros(10, 3, device=device).scatter_reduce_(0, rows, y.flatten(0, 1), "amax", include_self=False)
    return total + most.sum() + x.amax((1, 2)).sum() + (x > 0).sum((1, 2), True).sum()


@case(None, F16)
def exact_windows(n: int, device: torch.device) -> Any:
    """Rolls over three dimensions, columns of what has its channels last, convolutions of single pixels."""
    x = leaf(device, n, 8, 8, 8, 16)
    total = x.roll((1, 2, 3), (1, 2, 3)).square().sum()
    y = leaf(device, n, 12, 12, 8).permute(0, 3, 1, 2)
    total = total + F.unfold(y, 3, stride=2).transpose(1, 2).square().sum()
    pixel = F.layer_norm(F.adaptive_avg_pool2d(y, 1).permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2)
    return total + on(device, nn.Conv2d(8, 16, 1))(pixel).sum()


@case(None, F16)
def exact_products(n: int, device: torch.device) -> Any:
    """Products that are added to another tensor."""
    x, y = leaf(device, n, 20, 30), leaf(device, n, 30, 20)
    total = torch.baddbmm(leaf(device, n, 20, 20), x, y).sum() + torch.addbmm(leaf(device, 20, 20), x, y).sum()
    return total + torch.addmv(leaf(device, n), leaf(device, n, 30), leaf(device, 30)).sum()


@case()
def exact_choices(n: int, device: torch.device) -> Any:
    """Conditions over all or some dimensions, the place of the least, and what a mask of all true selects."""
    x = leaf(device, n, 40, 16)
    (x > 0).all()
    (x > 0).all(1)
    (x > 0).any(1)
    x.argmin(1)
    return x.masked_fill(x > 0, torch.zeros((), device=device)).sum()


@case()
def cells_in_turn(n: int, device: torch.device) -> Any:
    """Parameters are cast once in a region of autocast."""
    lstm, gru = on(device, nn.LSTMCell(16, 32)), on(device, nn.GRUCell(32, 32))
    x, h, c = leaf(device, n, 16), leaf(device, n, 32), leaf(device, n, 32)
    with torch.autocast(device.type, dtype=F16, cache_enabled=True):
        for _ in range(3):
            h, c = lstm(x, (h, c))
            h = gru(h, h)
    return h.float().sum()


@case()
def exact_gradients_of_gradients(n: int, device: torch.device) -> Any:
    """Autograd's thread has a handle and numbers of its own."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(1024, 64))
    net = on(device, nn.Sequential(*net, nn.Tanh(), nn.Linear(64, 1)))
    x = leaf(device, n, 3, 16, 16)
    score = net(x)
    (gradient,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    return F.softplus(-score).mean() + gradient.square().sum((1, 2, 3)).mean()


@case(None, F16)
def ctc(n: int, device: torch.device) -> Any:
    scores = on(device, nn.Linear(32, 30))(leaf(device, n, 100, 32)).log_softmax(-1).transpose(0, 1)
    text = torch.ones(n, 12, dtype=torch.long, device=device)
    return F.ctc_loss(scores, text, torch.full((n,), 100), torch.full((n,), 12))


@case()
def ctc_sums(n: int, device: torch.device) -> Any:
    """Lengths on the card, losses of each sample, and of a single text a row."""
    scores = leaf(device, 50, n, 20).log_softmax(-1)
    text = torch.ones(n, 8, dtype=torch.long, device=device)
    given = (torch.full((n,), length).to(device) for length in (50, 8))  # from the host: the null GPU keeps these
    return F.ctc_loss(scores, text, *given, reduction="none", zero_infinity=True).sum()


@case(None, BF16)
def grouped(n: int, device: torch.device) -> Any:
    """Four experts, each for an equal part of the rows."""
    x, experts = leaf(device, 16 * n, 64, dtype=BF16), leaf(device, 4, 64, 128, dtype=BF16)
    ends = torch.full((4,), 16 * n // 4, dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    return F.grouped_mm(x, experts, offs=ends).float().sum()


@case(None, F16)
def synchronized_norms(n: int, device: torch.device) -> Any:
    """Over two ranks, of which the other says nothing."""
    context = EventContext()
    backend = StepBackend(context, device, FakeGradScaler(context, device))
    with choose_strategy(Parallel("ddp", 2)).environment(backend):
        first, second = (on(device, nn.SyncBatchNorm(16)) for _ in range(2))
        x = on(device, nn.Conv2d(4, 16, 3))(leaf(device, n, 4, 30, 30))
        return second(first(x).relu().to(memory_format=torch.channels_last)).sum()


@case(None, F16)
def cells(n: int, device: torch.device) -> Any:
    x, h = leaf(device, n, 16), leaf(device, n, 32)
    total = on(device, nn.LSTMCell(16, 32))(x, (h, h))[0].sum() + on(device, nn.GRUCell(16, 32))(x, h).sum()
    return total + on(device, nn.RNNCell(16, 32))(x, h).sum()


@case(None, F16)
def recurrent(
    n: int, device: torch.device
) -> Any:  # the last: cuDNN's random state stays, in a segment that others use
    total = 0
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        for options in ({}, {"num_layers": 2, "bidirectional": True, "dropout": 0.1}, {"bias": False}):
            total = total + on(device, kind(16, 32, batch_first=True, **options))(leaf(device, n, 20, 16))[0].sum()
    return total


# ------------------------------------------------------------------------------------------------------------- running


_MODE = FakeTensorMode(allow_non_fake_inputs=True)


def _traced(run: Case, autocast: torch.dtype | None, n: int) -> Trace:
    rules = rules_for(Gpu())
    # cuDNN's is there already
    workspaces = {op: kept for op, kept in rules.workspaces.items() if kept.name == "cublas"}
    recorder = Recorder(_MODE, replace(rules, workspaces=workspaces))
    gc.collect()
    gc.disable()
    try:
        with recorder:
            recorder.phase, recorder.category = "forward", "activations"
            with torch.autocast("cpu", dtype=autocast or BF16, enabled=autocast is not None, cache_enabled=False):
                loss = run(n, DEVICE)
            if loss is not None:
                recorder.phase = "backward"
                loss.backward()
            recorder.stop()
            del loss
    finally:
        gc.enable()
    return Trace(n, labelled(recorder.events))


def _measured(run: Case, autocast: torch.dtype | None, n: int) -> tuple[int, int, list[int]]:
    device = torch.device("cuda", 0)
    for measure in (False, True):  # handles are made in a first round
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # or what they leave of their segment is found by what comes after
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        if measure:
            torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=10**6)
        with torch.autocast("cuda", dtype=autocast or BF16, enabled=autocast is not None, cache_enabled=False):
            loss = run(n, device)
        if loss is not None:
            loss.backward()
        del loss
    peaks = torch.cuda.max_memory_allocated() - before[0], torch.cuda.max_memory_reserved() - before[1]
    history = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(enabled=None)
    sizes = [entry["size"] for entry in history if entry["action"] == "alloc"]
    return *peaks, sizes


def _up(size: int) -> int:
    return -(-size // 512) * 512


def compare(name: str) -> dict[str, Any]:
    run, autocast = CASES[name]
    try:
        with cuda_semantics():
            traces = [_traced(run, autocast, n) for n in (2, 3, 5)]
        program = scale(traces)
    except Exception as error:  # noqa: BLE001 - it is reported
        return {"case": name, "error": f"{type(error).__name__}: {error}", "where": traceback.format_exc()[-1500:]}
    predicted = replay(program.at(BATCH))
    allocated, reserved, sizes = _measured(run, autocast, BATCH)
    real = [_up(size) for size in sizes if size]
    ours = [
        (_up(size), event.op) for event, (_, size, _) in zip(program.events, program.at(BATCH), strict=True) if size > 0
    ]
    return {
        "case": name,
        "allocated": [predicted.peak_allocated, allocated],
        "reserved": [predicted.peak_reserved, reserved],
        "same": [size for size, _ in ours] == real,
        "real": real,
        "ours": ours,
    }


def show(result: dict[str, Any]) -> None:
    import difflib

    print(result["case"], *(f"{k} {result[k]}" for k in ("allocated", "reserved", "error", "where") if k in result))
    if "real" not in result:
        return
    real, ours = result["real"], [size for size, _ in result["ours"]]
    for tag, a, b, c, d in difflib.SequenceMatcher(None, real, ours, autojunk=False).get_opcodes():
        if tag != "equal":
            before = result["ours"][c - 1] if c else ""
            print("   after", before, "REAL", real[a:b][:12], "OURS", [tuple(t) for t in result["ours"][c:d][:12]])


if __name__ == "__main__":
    verbose = "--show" in sys.argv
    words = [word for word in sys.argv[1:] if word != "--show"]
    for _name in CASES:
        if words and not any(_name.startswith(word) for word in words):
            continue
        _result = compare(_name)
        if verbose:
            if not _result.get("same"):
                show(_result)
        else:
            print(json.dumps({k: v for k, v in _result.items() if k not in ("real", "ours")}), flush=True)
        if not gc.get_freeze_count():  # by now all is imported, which collecting garbage need not look at
            gc.collect()
            gc.freeze()
