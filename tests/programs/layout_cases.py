"""Operators on tensors of every layout on the null GPU, each beside its trace: prints JSON.

    tests/nullgpu/nullgpu python -m tests.programs.layout_cases [--show] [CASE...]

A case is a function of one tensor. It is traced and run for a tensor that is contiguous, whose channels come last, or
that is transposed, expanded or a part of another, in some type. Compared are the blocks that are allocated and freed,
which blocks there are at each allocation, and the strides of the result and of the tensor's gradient.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_memplan.cuda.dispatch import cuda_semantics
from lightning_memplan.cuda.rule_set import Gpu
from lightning_memplan.cuda.rules import rules_for
from lightning_memplan.step.fake_cuda import DEVICE
from lightning_memplan.trace.recorder import Recorder
from tests.programs.cuda_cases import leaf, on

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
Function = Callable[[torch.Tensor], torch.Tensor]
Strides = tuple[int, ...]

SHAPES = {2: (40, 24), 3: (10, 16, 36), 4: (6, 16, 12, 18), 5: (5, 16, 6, 8, 10)}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
TYPES = {  # of autocast, and of the tensor
    "float32": (None, F32),
    "float16": (None, F16),
    "autocast float16": (F16, F32),
    "autocast bfloat16": (BF16, F32),
    "bfloat16": (None, BF16),
}


# ------------------------------------------------------------------------------------------------------------- layouts


def contiguous(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return leaf(device, *shape, dtype=dtype) * 1


def last(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return contiguous(device, shape, dtype).contiguous(memory_format=LAST[len(shape)])


def permuted(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    order = [0, *range(len(shape) - 1, 0, -1)]
    return contiguous(device, tuple(shape[k] for k in order), dtype).permute(order)


def transposed(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return contiguous(device, (*shape[:-2], shape[-1], shape[-2]), dtype).transpose(-1, -2)


def expanded(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return contiguous(device, (shape[0], 1, *shape[2:]), dtype).expand(shape)


def sliced(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return contiguous(device, (*shape[:-1], shape[-1] + 2), dtype)[..., 1:-1]


def last_sliced(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return last(device, (*shape[:-1], shape[-1] + 2), dtype)[..., 1:-1]


LAYOUTS: dict[str, Callable[..., torch.Tensor]] = {
    made.__name__: made for made in (contiguous, transposed, expanded, sliced, permuted, last, last_sliced)
}


def layouts(rank: int) -> list[str]:
    return [name for name in LAYOUTS if rank in LAST or not name.startswith("last")]


# --------------------------------------------------------------------------------------------------------------- cases


class Case(NamedTuple):
    function: Function
    ranks: str = "234"


CASES: dict[str, Case] = {}


def _values(y: torch.Tensor) -> torch.Tensor:
    return torch.zeros(y.shape, device=y.device)


def _numbers(y: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, device=y.device)


def _parameter(y: torch.Tensor, *shape: int) -> torch.Tensor:
    return leaf(y.device, *shape, dtype=y.dtype)


def _channels(y: torch.Tensor) -> torch.Tensor:
    return _parameter(y, 1, y.size(1), *(1 for _ in range(y.dim() - 2)))


def _places(y: torch.Tensor) -> torch.Tensor:
    return torch.zeros(y.size(0), *y.shape[2:], dtype=torch.long, device=y.device)


def _of_module(make: Callable[[torch.Tensor], nn.Module]) -> Function:
    return lambda y: on(y.device, make(y).to(y.dtype))(y)


for (
    _name
) in """relu gelu silu mish elu selu celu hardswish hardsigmoid sigmoid tanh softplus leaky_relu relu6 logsigmoid
softsign hardtanh softshrink hardshrink tanhshrink rrelu""".split():
    CASES[_name] = Case(getattr(F, _name))
for _name in "relu elu selu celu hardswish hardsigmoid leaky_relu relu6 hardtanh silu mish rrelu".split():
    CASES[f"{_name} in place"] = Case(lambda y, name=_name: getattr(F, name)(y * 2, inplace=True), "4")
for _name in "sqrt exp log abs square rsqrt sin cos atan erf reciprocal neg sign expm1 log1p".split():
    CASES[_name] = Case(getattr(torch, _name), "24")

CASES |= {
    "glu": Case(lambda y: F.glu(y, 1)),
    "glu of the last": Case(lambda y: F.glu(y, -1)),
    "prelu": Case(lambda y: F.prelu(y, _parameter(y, y.size(1)))),
    "softmax": Case(lambda y: F.softmax(y, 1)),
    "log_softmax": Case(lambda y: F.log_softmax(y, -1)),
    "dropout": Case(lambda y: F.dropout(y, 0.1)),
    "dropout in place after elu": Case(lambda y: F.dropout(F.elu(y), 0.1, inplace=True)),
    "dropout of channels": Case(lambda y: F.dropout1d(y, 0.1) if y.dim() == 3 else F.dropout2d(y, 0.1), "34"),
    "alpha dropout": Case(lambda y: F.alpha_dropout(y, 0.1)),
    "pow": Case(lambda y: y**2.5),
    "clamp": Case(lambda y: y.clamp(-1, 1)),
    "add row": Case(lambda y: y + leaf(y.device, y.size(-1))),
    "add channels": Case(lambda y: y + _channels(y)),
    "times channels": Case(lambda y: _channels(y) * y),
    "over channels": Case(lambda y: y / (_channels(y) + 1)),
    "times itself": Case(lambda y: y * torch.sigmoid(y)),
    "parameter plus": Case(lambda y: leaf(y.device, *y.shape) + y),
    "maximum": Case(lambda y: torch.maximum(y, y * 2)),
    "minimum": Case(lambda y: torch.min(y, y * 2), "4"),
    "where": Case(lambda y: torch.where(y > 0, y, y * 2)),
    "masked_fill": Case(lambda y: y.masked_fill(y > 0, 0.0)),
    "lerp": Case(lambda y: torch.lerp(y, y * 2, 0.3)),
    "addcmul": Case(lambda y: torch.addcmul(y, y, y)),
    "cat": Case(lambda y: torch.cat([y, y * 2], 1)),
    "stack": Case(lambda y: torch.stack([y, y * 2], 1)),
    "chunks": Case(lambda y: torch.mul(*y.chunk(2, 1))),
    "flip": Case(lambda y: y.flip(1)),
    "roll": Case(lambda y: y.roll(1, 1)),
    "roll two": Case(lambda y: y.roll((1, 2), (1, -1))),
    "roll all": Case(lambda y: y.roll(3)),
    "clone": Case(lambda y: y.clone()),
    "half": Case(lambda y: y.half() * 2),
    "float": Case(lambda y: y.float() * 2),
    "zeros_like": Case(lambda y: y + torch.zeros_like(y)),
    "noise": Case(lambda y: y * torch.empty_like(y).bernoulli_(0.5)),
    "cumsum": Case(lambda y: y.cumsum(1)),
    "mean": Case(lambda y: y - y.mean(-1, keepdim=True)),
    "expanded mean": Case(lambda y: y.mean(1, keepdim=True).expand_as(y) * 2),
    "var": Case(lambda y: y.var(1)),
    "amax": Case(lambda y: y.amax(1)),
    "normalize": Case(lambda y: F.normalize(y, dim=1)),
    "topk": Case(lambda y: y.topk(3, 1).values),
    "index_select": Case(lambda y: y.index_select(1, torch.zeros(5, dtype=torch.long, device=y.device))),
    "flatten": Case(lambda y: F.linear(y.flatten(1), _parameter(y, 8, math.prod(y.shape[1:])))),
    "linear": Case(lambda y: F.linear(y, _parameter(y, 8, y.size(-1)), _parameter(y, 8))),
    "linear of channels": Case(lambda y: F.linear(y.transpose(1, -1), _parameter(y, 8, y.size(1)), _parameter(y, 8))),
    "matmul": Case(lambda y: y @ y.transpose(-1, -2)),
}

# --------------------------------------------------------------------------------------------------------------- norms

_INSTANCE = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
_BATCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}

CASES |= {
    "layer norm": Case(_of_module(lambda y: nn.LayerNorm(y.size(-1)))),
    "layer norm without bias": Case(_of_module(lambda y: nn.LayerNorm(y.size(-1), bias=False)), "3"),
    "layer norm of channels": Case(
        lambda y: F.hardswish(on(y.device, nn.LayerNorm(y.size(1)).to(y.dtype))(y.transpose(1, -1)).transpose(1, -1))
    ),
    "rms norm": Case(_of_module(lambda y: nn.RMSNorm(y.size(-1))), "2345"),
    "rms norm without weight": Case(lambda y: F.rms_norm(y, (y.size(-1),)), "34"),
    "group norm": Case(_of_module(lambda y: nn.GroupNorm(4, y.size(1))), "2345"),
    "group norm and silu": Case(lambda y: F.silu(on(y.device, nn.GroupNorm(4, 16).to(y.dtype))(y)), "4"),
    "instance norm": Case(_of_module(lambda y: _INSTANCE[y.dim()](16, affine=True)), "345"),
    "batch norm": Case(_of_module(lambda y: _BATCH[y.dim()](y.size(1))), "2345"),
}

# --------------------------------------------------------------------------------------------- pools, pads and resizing


def _by_rank(name: str, *args: Any, **options: Any) -> Function:
    return lambda y: getattr(F, f"{name}{y.dim() - 2}d")(y, *args, **options)


def _unpool(y: torch.Tensor) -> torch.Tensor:
    return _by_rank("max_unpool", _by_rank("max_pool", 2, return_indices=True)(y)[1], 2)(_by_rank("max_pool", 2)(y))


def _linear_mode(y: torch.Tensor) -> str:
    return {3: "linear", 4: "bilinear", 5: "trilinear"}[y.dim()]


for _name, _options in {"max_pool": (3, 2, 1), "avg_pool": (2,), "adaptive_avg_pool": (3,), "lp_pool": (2, 2)}.items():
    CASES[_name] = Case(_by_rank(_name, *_options), "345")
for _name in ("adaptive_avg_pool", "adaptive_max_pool"):
    CASES[f"{_name} to one"] = Case(_by_rank(_name, 1), "345")
CASES["adaptive_max_pool"] = Case(_by_rank("adaptive_max_pool", 3), "345")
for _name in ("reflect", "replicate", "circular", "constant"):
    CASES[f"pad {_name}"] = Case(lambda y, m=_name: F.pad(y, (1, 2) * (y.dim() - 2), mode=m), "345")
for _name in ("nearest", "nearest-exact"):
    CASES[f"resize {_name}"] = Case(lambda y, m=_name: F.interpolate(y, scale_factor=2, mode=m), "345")

CASES |= {
    "max_unpool": Case(_unpool, "345"),
    "min": Case(lambda y: y.detach().min() * y, "4"),
    "std": Case(lambda y: y.std(1), "34"),
    "fractional_max_pool": Case(lambda y: getattr(F, f"fractional_max_pool{y.dim() - 2}d")(y, 2, output_size=4), "45"),
    "resize few channels": Case(lambda y: F.interpolate(y[:, :3] * 1, scale_factor=2).square(), "345"),
    "resize few channels linear": Case(
        lambda y: F.interpolate(y[:, :3] * 1, scale_factor=2, mode=_linear_mode(y)).square(), "345"
    ),
    "resize and square": Case(lambda y: F.interpolate(y, scale_factor=2, mode=_linear_mode(y)).square(), "345"),
    "resize": Case(lambda y: F.interpolate(y, scale_factor=2, mode=_linear_mode(y)), "35"),
    "resize bicubic": Case(lambda y: F.interpolate(y, scale_factor=2, mode="bicubic"), "4"),
    "resize bicubic antialias": Case(lambda y: F.interpolate(y, size=(5, 5), mode="bicubic", antialias=True), "4"),
    "resize antialias": Case(lambda y: F.interpolate(y, size=(5, 5), mode="bilinear", antialias=True), "4"),
    "pixel_shuffle": Case(lambda y: F.pixel_shuffle(y, 2), "4"),
    "pixel_unshuffle": Case(lambda y: F.pixel_unshuffle(y, 2), "4"),
    "unfold": Case(lambda y: F.unfold(y, 3, padding=1), "4"),
    "fold": Case(lambda y: F.fold(F.unfold(y, 2, stride=2), y.shape[2:], 2, stride=2), "4"),
}

# -------------------------------------------------------------------------------------------------------- convolutions


def _convolution(groups: int = 1, width: int = 24, transpose: bool = False, **options: Any) -> Function:
    def run(y: torch.Tensor) -> torch.Tensor:
        rank = y.dim() - 2
        sizes = (y.size(1), width // groups) if transpose else (width, y.size(1) // groups)
        weight, bias = _parameter(y, *sizes, *(3 for _ in range(rank))), _parameter(y, width)
        name = f"conv_transpose{rank}d" if transpose else f"conv{rank}d"
        return getattr(F, name)(y, weight, bias, groups=groups, **options)

    return run


CASES |= {
    "conv": Case(_convolution(stride=2, padding=1), "345"),
    "conv of groups": Case(_convolution(groups=4), "345"),
    "conv of each channel": Case(_convolution(groups=16, width=16, padding=1), "345"),
    "conv transpose": Case(_convolution(transpose=True, stride=2), "345"),
    "conv reflect": Case(_of_module(lambda y: nn.Conv2d(16, 8, 3, padding=1, padding_mode="reflect")), "4"),
}

# -------------------------------------------------------------------------------------------------------------- losses


def _loss(function: Callable[..., torch.Tensor], ranks: str = "24", rows: bool = False) -> None:
    name = function.__name__.removeprefix("_").replace("_", " ")
    for reduction in ("mean", "sum", "none"):

        def run(y: torch.Tensor, reduction: str = reduction) -> torch.Tensor:
            return function(y.flatten(1) if rows else y, reduction=reduction)

        CASES[f"{name} {reduction}"] = Case(run, ranks)


def _of_values(name: str, same_type: bool = False, learned: bool = False, **options: Any) -> None:
    def run(y: torch.Tensor, reduction: str) -> torch.Tensor:
        target = y * 2 if learned else _values(y).to(y.dtype) if same_type else _values(y)
        return getattr(F, name)(y, target, reduction=reduction, **options)

    run.__name__ = name + " same" * same_type + " learned" * learned + "".join(f" {option}" for option in options)
    _loss(run)


for _name in """mse_loss l1_loss smooth_l1_loss huber_loss soft_margin_loss poisson_nll_loss kl_div hinge_embedding_loss
binary_cross_entropy_with_logits""".split():
    _of_values(_name)
    _of_values(_name, same_type=True)
for _name in ("mse_loss", "smooth_l1_loss", "huber_loss", "kl_div", "binary_cross_entropy_with_logits"):
    _of_values(_name, learned=True)
_of_values("kl_div", log_target=True)
_of_values("poisson_nll_loss", log_input=False)
_of_values("smooth_l1_loss", beta=0.0)


def _logits_weighted(y: torch.Tensor, reduction: str) -> torch.Tensor:
    weight = _numbers(y, y.size(-1))
    return F.binary_cross_entropy_with_logits(y, _values(y), weight, reduction=reduction, pos_weight=weight)


def _logits_positive(y: torch.Tensor, reduction: str) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(y, _values(y), pos_weight=_numbers(y, 1), reduction=reduction)


def _logits_of_learned_labels(y: torch.Tensor, reduction: str) -> torch.Tensor:
    positive = _numbers(y, y.size(-1))
    return F.binary_cross_entropy_with_logits(y, y.sigmoid(), pos_weight=positive, reduction=reduction)


def _probabilities(y: torch.Tensor, reduction: str) -> torch.Tensor:
    with torch.autocast("cuda", enabled=False):
        return F.binary_cross_entropy(y.float(), _values(y), _numbers(y, y.size(-1)), reduction=reduction)


def _cross_entropy(y: torch.Tensor, reduction: str) -> torch.Tensor:
    return F.cross_entropy(y, _places(y), ignore_index=0, label_smoothing=0.1, reduction=reduction)


def _cross_entropy_weighted(y: torch.Tensor, reduction: str) -> torch.Tensor:
    return F.cross_entropy(y, _places(y), _parameter(y, y.size(1)).detach(), reduction=reduction)


def _cross_entropy_of_probabilities(y: torch.Tensor, reduction: str) -> torch.Tensor:
    return F.cross_entropy(y, y.softmax(1), label_smoothing=0.1, reduction=reduction)


def _triplets(y: torch.Tensor, reduction: str) -> torch.Tensor:
    return F.triplet_margin_loss(y, y * 2, _values(y), swap=True, reduction=reduction)


def _margin_of_classes(y: torch.Tensor, reduction: str) -> torch.Tensor:
    labels = torch.zeros(y.size(0), dtype=torch.long, device=y.device)
    return F.multi_margin_loss(y, labels, weight=_parameter(y, y.size(1)).detach(), reduction=reduction)


def _margin_of_labels(y: torch.Tensor, reduction: str) -> torch.Tensor:
    return F.multilabel_margin_loss(y, torch.zeros(y.shape, dtype=torch.long, device=y.device), reduction=reduction)


def _soft_margin_of_labels(y: torch.Tensor, reduction: str) -> torch.Tensor:
    return F.multilabel_soft_margin_loss(y, _values(y), weight=_numbers(y, y.size(1)), reduction=reduction)


def _cosine_embedding(y: torch.Tensor, reduction: str) -> torch.Tensor:
    return F.cosine_embedding_loss(y, y * 2, _numbers(y, y.size(0)), reduction=reduction)


for _function in (
    *(_logits_weighted, _logits_positive, _logits_of_learned_labels, _probabilities),
    *(_cross_entropy, _cross_entropy_weighted, _cross_entropy_of_probabilities, _triplets),
):
    _loss(_function)
for _function in (_margin_of_classes, _margin_of_labels, _soft_margin_of_labels, _cosine_embedding):
    _loss(_function, "2", rows=True)

# ------------------------------------------------------------------------------------------------------------- running

_MODE = FakeTensorMode(allow_non_fake_inputs=True)
_CUBLAS = 8_519_680  # its workspace, which the first call of a thread makes
Events = list[int]  # bytes of a block that is allocated, or less than 0 when it is freed
SEEN: set[Any] = set()  # operators of the traces


class Seeing(Recorder):
    def _run(self, func: Any, *args: Any) -> Any:
        SEEN.add(func)
        return super()._run(func, *args)


def _strides(tensor: torch.Tensor) -> Strides:
    return tuple(stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def _step(case: Case, layout: str, dtype: torch.dtype, rank: int, device: torch.device) -> tuple[Any, list[Strides]]:
    seen: list[Strides] = []
    x = LAYOUTS[layout](device, SHAPES[rank], dtype)
    x.register_hook(lambda grad: seen.append(_strides(grad)))
    out = case.function(x)
    seen.append(_strides(out))
    weights = torch.zeros(out.shape, device=device, dtype=out.dtype)
    return (out * weights).sum() if out.dim() else out, seen


def _run(
    case: Case, layout: str, kind: str, rank: int, device: torch.device, recorder: Recorder | None = None
) -> list[Strides]:
    autocast, dtype = TYPES[kind]
    with torch.autocast(device.type, autocast or BF16, enabled=autocast is not None, cache_enabled=False):
        loss, seen = _step(case, layout, dtype, rank, device)
    if recorder is not None:
        recorder.phase = "backward"
    loss.backward()
    return seen


def traced(case: Case, layout: str, kind: str, rank: int) -> tuple[Events, list[Strides]]:
    recorder = Seeing(_MODE, rules_for(Gpu()))
    gc.disable()
    try:
        with cuda_semantics(), recorder:
            recorder.phase, recorder.category = "forward", "activations"
            seen = _run(case, layout, kind, rank, DEVICE, recorder)
            recorder.stop()
    finally:
        gc.enable()
    sizes = {event.block: _up(event.size) for event in recorder.events if event.size > 0}
    given = (event for event in recorder.events if event.block in sizes)
    return _ordered(-sizes[event.block] if event.is_free else sizes[event.block] for event in given), seen


def measured(case: Case, layout: str, kind: str, rank: int) -> tuple[Events, list[Strides]]:
    device = torch.device("cuda", 0)
    _run(case, layout, kind, rank, device)  # handles are made in a first round
    torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=10_000)
    seen = _run(case, layout, kind, rank, device)
    history = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(enabled=None)
    events, sizes = [], {}
    for entry in history:
        if entry["action"] == "alloc":
            sizes[entry["addr"]] = _up(entry["size"])
            events.append(sizes[entry["addr"]])
        elif entry["action"] == "free_completed":
            events.append(-sizes.pop(entry["addr"], 0))
    return _ordered(events), seen


def _up(size: int) -> int:
    return -(-size // 512) * 512


def _ordered(events: Any) -> Events:
    """The events up to the last that is allocated; those that are freed together are sorted."""
    made: Events = []
    freed: Events = []
    for event in events:
        if abs(event) == _CUBLAS:
            continue
        if event < 0:
            freed.append(event)
        else:
            made += [*sorted(freed), event]
            freed = []
    return made


def rounds() -> Iterator[tuple[str, Case, str, str, int]]:
    """Each case in all its layouts, and in one type or two for each."""
    kinds = [*TYPES]
    for place, (name, case) in enumerate(CASES.items()):
        for rank in map(int, case.ranks):
            for turn, layout in enumerate(layouts(rank)):
                yield name, case, layout, kinds[(place + turn + rank) % len(kinds)], rank


def main(words: list[str], show: bool, every: int = 1) -> None:
    count = 0
    for place, (name, case, layout, kind, rank) in enumerate(rounds()):
        if place % every:
            continue
        label = f"{name}, {rank} dimensions, {layout}, {kind}"
        if words and not any(fnmatch(label, word + "*") for word in words):
            continue
        try:
            real = measured(case, layout, kind, rank)
        except RuntimeError:
            continue  # torch refuses it
        try:
            ours = traced(case, layout, kind, rank)
        except Exception as error:  # noqa: BLE001 - it is reported
            print(json.dumps({"case": label, "error": f"{type(error).__name__}: {error}"[:300]}), flush=True)
            continue
        count += 1
        if real != ours:
            row: dict[str, Any] = (
                {"case": label, "strides": [real[1], ours[1]]} if real[1] != ours[1] else {"case": label}
            )
            print(json.dumps(row | ({"real": real[0], "ours": ours[0]} if show else {})), flush=True)
        if count == 1:  # by now all is imported, which collecting garbage need not look at
            gc.collect()
            gc.freeze()
    print(json.dumps({"compared": count}))


if __name__ == "__main__":
    options = [word for word in sys.argv[1:] if word.startswith("--")]
    every_nth = next((int(word.removeprefix("--every=")) for word in options if word.startswith("--every=")), 1)
    main([word for word in sys.argv[1:] if word not in options], "--show" in options, every_nth)
