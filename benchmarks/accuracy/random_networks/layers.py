"""Layers of random networks, each a function of its options and of the shape that it meets.

A layer fits itself to its input, so that any part of a network is a network: this is what makes one small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

Options = dict[str, Any]
Shape = Sequence[int]  # without the batch's dimension
Make = Callable[[Options, Shape], nn.Module]

LAYERS: dict[str, Make] = {}
RANKS: dict[str, str] = {}  # a kind of layer -> how many dimensions its input may have beside the batch's


def layer(ranks: str) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        LAYERS[make.__name__], RANKS[make.__name__] = make, ranks
        return make

    return register


class Call(nn.Module):
    """A function of the input and of modules or parameters."""

    def __init__(self, function: Callable[..., torch.Tensor], **parts: Any) -> None:
        super().__init__()
        self.function, self.names = function, list(parts)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, *(getattr(self, name) for name in self.names))


def _groups(asked: int, *channels: int) -> int:
    return math.gcd(asked, *channels) if asked else channels[0]


# ------------------------------------------------------------------------------------------------------------- images


@layer("234")
def convolution(options: Options, shape: Shape) -> nn.Module:
    rank, channels = len(shape) - 1, shape[0]
    kernel = min(options["kernel"], *shape[1:])
    groups = _groups(options["groups"], channels, options["width"]) if options["groups"] else 1
    dilation = options["dilation"] if all(size > options["dilation"] * (kernel - 1) for size in shape[1:]) else 1
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    padding = min(kernel // 2, *(size - 1 for size in shape[1:]))
    return kind(
        *(channels, options["width"], kernel, options["stride"], padding, dilation, groups, options["bias"]),
        padding_mode=options["mode"],
    )


@layer("234")
def depthwise(options: Options, shape: Shape) -> nn.Module:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 2]
    kernel = min(options["kernel"], *shape[1:])
    return kind(shape[0], shape[0] * options["times"], kernel, padding=kernel // 2, groups=shape[0])


@layer("234")
def transposed(options: Options, shape: Shape) -> nn.Module:
    if math.prod(shape[1:]) > 700:
        return nn.Identity()
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[len(shape) - 2]
    groups = _groups(options["groups"], shape[0], options["width"]) if options["groups"] else 1
    return kind(shape[0], options["width"], options["kernel"], options["stride"], groups=groups, bias=options["bias"])


@layer("1234")
def norm(options: Options, shape: Shape) -> nn.Module:
    kind, channels, affine = options["kind"], shape[0], options["affine"]
    if kind == "layer":
        return nn.LayerNorm(shape[-1], elementwise_affine=affine)
    if kind == "rms":
        return nn.RMSNorm(shape[-1], elementwise_affine=affine)
    if kind == "channels":
        return Call(lambda x, inner: inner(x.transpose(1, -1)).transpose(1, -1), inner=nn.LayerNorm(channels))
    if kind == "group":
        return nn.GroupNorm(math.gcd(channels, options["groups"]), channels, affine=affine)
    if kind == "instance" and len(shape) > 1 and math.prod(shape[1:]) > 1:
        return (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[len(shape) - 2](channels, affine=affine)
    return (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 1](channels, affine=affine)


@layer("234")
def pool(options: Options, shape: Shape) -> nn.Module:
    rank, kind = len(shape) - 1, options["kind"]
    if kind == "adaptive_avg":
        return (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[rank - 1](options["size"])
    if kind == "adaptive_max":
        return (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)[rank - 1](options["size"])
    if min(shape[1:]) < 3:
        return nn.Identity()
    if kind == "max":
        return (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[rank - 1](options["kernel"], options["stride"])
    if kind == "lp":
        return (nn.LPPool1d, nn.LPPool2d, nn.LPPool3d)[rank - 1](2, options["kernel"])
    return (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[rank - 1](options["kernel"], options["stride"])


@layer("234")
def pad(options: Options, shape: Shape) -> nn.Module:
    edges = options["edges"] if min(shape[1:]) > max(options["edges"]) else (0, 1)
    return Call(lambda x: F.pad(x, tuple(edges) * (len(shape) - 1), mode=options["mode"]))


@layer("234")
def resize(options: Options, shape: Shape) -> nn.Module:
    if math.prod(shape[1:]) > 500:
        return nn.Identity()
    names = ("linear", "bilinear", "trilinear")
    mode = names[len(shape) - 2] if options["mode"] == "linear" else options["mode"]
    return Call(
        lambda x: F.interpolate(x, scale_factor=2, mode=mode if len(shape) == 3 or mode != "bicubic" else "nearest")
    )


@layer("3")
def shuffle(options: Options, shape: Shape) -> nn.Module:
    if options["up"] and shape[0] % 4 == 0:
        return nn.PixelShuffle(2)
    if not options["up"] and shape[1] % 2 == shape[2] % 2 == 0 and shape[0] < 32:
        return nn.PixelUnshuffle(2)
    return nn.Identity()


@layer("234")
def squeeze(options: Options, shape: Shape) -> nn.Module:
    """Squeeze and excite."""
    dims, inner = list(range(2, len(shape) + 1)), max(1, shape[0] // 2)
    first, second = nn.Linear(shape[0], inner), nn.Linear(inner, shape[0])

    def run(x: torch.Tensor, first: nn.Module, second: nn.Module) -> torch.Tensor:
        gate = second(F.relu(first(x.mean(dims)))).sigmoid()
        gate = gate.view(*gate.shape, *(1 for _ in dims))
        return x * (gate.expand_as(x) if options["expand"] else gate)

    return Call(run, first=first, second=second)


@layer("34")
def rows(options: Options, shape: Shape) -> nn.Module:
    """Positions become tokens."""
    return Call(lambda x: x.flatten(2).transpose(1, 2))


# ------------------------------------------------------------------------------------------------- of any dimensions

_ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    name: getattr(nn, name)
    for name in """ReLU ReLU6 ELU SELU CELU GELU SiLU Mish Hardswish Hardsigmoid LeakyReLU Sigmoid Tanh Softplus
    Softsign LogSigmoid Hardtanh Tanhshrink Softshrink RReLU PReLU""".split()
}
IN_PLACE = frozenset("ReLU ReLU6 ELU SELU CELU SiLU Mish Hardswish LeakyReLU Hardtanh RReLU".split())
ACTIVATIONS = tuple(_ACTIVATIONS)


@layer("1234")
def activation(options: Options, shape: Shape) -> nn.Module:
    kind = options["kind"]
    return _ACTIVATIONS[kind](**({"inplace": True} if options["inplace"] and kind in IN_PLACE else {}))


@layer("1234")
def gate(options: Options, shape: Shape) -> nn.Module:
    dim = options["dim"] % len(shape)
    return nn.GLU(dim + 1) if shape[dim] % 2 == 0 else nn.Softmax(dim + 1)


@layer("1234")
def dropout(options: Options, shape: Shape) -> nn.Module:
    kinds: dict[int, Any] = {2: nn.Dropout1d, 3: nn.Dropout2d, 4: nn.Dropout3d}
    kind = kinds.get(len(shape), nn.Dropout) if options["whole"] else nn.Dropout
    return kind(0.1, inplace=options["inplace"])


@layer("234")
def permute(options: Options, shape: Shape) -> nn.Module:
    return Call(lambda x: x.transpose(options["first"] % len(shape) + 1, -1))


@layer("1234")
def part(options: Options, shape: Shape) -> nn.Module:
    return Call(lambda x: x[..., 1:]) if shape[-1] > 4 else nn.Identity()


@layer("1234")
def roll(options: Options, shape: Shape) -> nn.Module:
    dims = sorted({dim % len(shape) + 1 for dim in options["dims"]})
    return Call(lambda x: x.roll([2] * len(dims), dims))


@layer("1234")
def flip(options: Options, shape: Shape) -> nn.Module:
    return Call(lambda x: x.flip(-1))


@layer("1234")
def scale(options: Options, shape: Shape) -> nn.Module:
    """A parameter of some dimensions, which is added or multiplied."""
    kept = [options["dims"] >> dim & 1 for dim in range(len(shape))]
    value = nn.Parameter(torch.zeros([size if keep else 1 for size, keep in zip(shape, kept, strict=True)]))
    if options["first"]:
        return Call(lambda x, value: value + x if options["add"] else value * x, value=value)
    return Call(lambda x, value: x + value if options["add"] else x * value, value=value)


@layer("234")
def centre(options: Options, shape: Shape) -> nn.Module:
    dim = options["dim"] % len(shape) + 1
    if options["expand"]:
        return Call(lambda x: x.mean(dim, keepdim=True).expand_as(x) * 2)
    return Call(lambda x: x - x.mean(dim, keepdim=True))


@layer("1234")
def soften(options: Options, shape: Shape) -> nn.Module:
    return nn.Softmax(options["dim"] % len(shape) + 1)


@layer("1234")
def linear(options: Options, shape: Shape) -> nn.Module:
    return nn.Linear(shape[-1], options["width"], options["bias"])


@layer("1234")
def double(options: Options, shape: Shape) -> nn.Module:
    """The input beside itself."""
    return Call(lambda x: torch.cat([x, x * 2], 1)) if shape[0] < 48 else nn.Identity()


# ------------------------------------------------------------------------------------------------------------- tokens


class First(nn.Module):
    """A module that returns several tensors, of which the first counts."""

    def __init__(self, inner: nn.Module, times: int = 1, **options: Any) -> None:
        super().__init__()
        self.inner, self.times, self.options = inner, times, options

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(*[x] * self.times, **self.options)[0]


@layer("2")
def attention(options: Options, shape: Shape) -> nn.Module:
    heads = math.gcd(options["heads"], shape[1])
    inner = nn.MultiheadAttention(shape[1], heads, options["dropout"], batch_first=True)
    return First(inner, 3, need_weights=options["weights"])


@layer("2")
def products(options: Options, shape: Shape) -> nn.Module:
    """Scaled dot products of queries, keys and values that one layer makes."""
    heads = math.gcd(options["heads"], shape[1])

    def run(x: torch.Tensor, inner: nn.Module) -> torch.Tensor:
        q, k, v = inner(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=options["dropout"], is_causal=options["causal"])
        return out.transpose(1, 2).flatten(2)

    return Call(run, inner=nn.Linear(shape[1], 3 * shape[1]))


@layer("2")
def recurrent(options: Options, shape: Shape) -> nn.Module:
    kind: Any = getattr(nn, options["kind"])
    return First(
        kind(
            *(shape[1], options["width"], options["layers"]),
            batch_first=True,
            dropout=options["dropout"],
            bidirectional=options["both"],
        )
    )


# ------------------------------------------------------------------------------------------------------- of layers


class Skip(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        y = self.inner(x)
        return x + y if y.shape == x.shape else y


class Checkpoint(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: torch.Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def build(layers: Sequence[Options], shape: Shape) -> tuple[nn.Module, Shape]:
    """The layers one after the other, and the shape of what they return; layers that fit no input are left out."""
    made: list[nn.Module] = []
    for options in layers:
        if "layers" in options and isinstance(options["layers"], list):
            inner, shape = build(options["layers"], shape)
            wrapped = Skip(inner) if options["layer"] == "skip" else Checkpoint(inner, options["reentrant"])
            made.append(wrapped)
            continue
        if str(len(shape)) not in RANKS[options["layer"]]:
            continue
        one = LAYERS[options["layer"]](options, shape)
        with torch.no_grad():
            after = tuple(one(torch.zeros(2, *shape)).shape[1:])
        if math.prod(after) and math.prod(after) <= 40_000:
            made.append(one)
            shape = after
    return nn.Sequential(*made), shape
