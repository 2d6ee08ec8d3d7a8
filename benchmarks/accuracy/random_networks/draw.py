"""Draw a network from a seed: its layers, its loss, and how it is trained."""

from __future__ import annotations

import random
from typing import Any

from .layers import ACTIVATIONS
from .losses import LOSSES

Options = dict[str, Any]
Network = dict[str, Any]  # as it is written to the file

_OPTIMIZERS = ("AdamW", "Adam", "SGD", "SGD+momentum", "RMSprop", "Adagrad", "AdamW+loop", "NAdam", "Adam+amsgrad")
_IMAGES = """convolution convolution convolution depthwise transposed norm norm pool pad pad resize shuffle squeeze rows
activation activation gate dropout permute part roll flip scale centre soften linear double""".split()
_TOKENS = """attention products recurrent linear linear norm norm activation dropout permute part roll scale centre
convolution convolution gate soften pad pool""".split()


def draw(seed: int) -> Network:
    """The network of a seed: the same each time.

    >>> draw(1) == draw(1), draw(1) == draw(2)
    (True, False)
    """
    of = random.Random(seed)
    rank = of.choice([1, 2, 2, 2, 2, 3, 4, 4])  # 1: indices of an embedding
    sizes = {1: [of.choice([12, 20, 33])], 2: [of.choice([8, 12, 20]), of.choice([16, 24, 32])]}
    sizes[3] = [of.choice([3, 6, 8]), of.choice([12, 16, 17]), of.choice([12, 16, 20])]
    sizes[4] = [of.choice([2, 4]), of.choice([6, 8]), of.choice([8, 9]), of.choice([8, 10])]
    if rank == 2 and of.random() < 0.5:
        rank = 3
    precision = of.choice(["32-true", "32-true", "16-mixed", "bf16-mixed", "bf16-true"])
    accumulate = of.choice([1, 1, 1, 2])
    clip = of.choice([None, None, 1.0])
    network: Network = {
        "shape": sizes[rank],
        "layers": [_layer(of, rank) for _ in range(of.randint(3, 9))],
        "loss": _of_loss(of),
        "precision": precision,
        "optimizer": of.choice(_OPTIMIZERS),
        "accumulate": accumulate,
        "clip": clip,
        "batch_size": of.choice([150, 256, 400, 600]),
        "channels_last": rank > 2 and of.random() < 0.5,
        "sparse": False,
    }
    if rank == 1 and clip is None and precision == "32-true" and of.random() < 0.5:
        network |= {"sparse": True, "optimizer": "SGD", "accumulate": 1}
    return network


def _of_loss(of: random.Random) -> Options:
    options: Options = {"kind": of.choice(LOSSES), "reduction": of.choice(["mean", "mean", "sum", "none"])}
    return options | {name: of.random() < 0.4 for name in ("weight", "positive", "smooth", "ignore", "same_type")}


def _layer(of: random.Random, rank: int, depth: int = 0) -> Options:
    if depth == 0 and of.random() < 0.2:
        inner = [_layer(of, rank, 1) for _ in range(of.randint(1, 3))]
        kind = of.choice(["skip", "skip", "checkpoint"])
        return {"layer": kind, "layers": inner, "reentrant": of.random() < 0.3}
    kind = of.choice(_TOKENS if rank < 3 else _IMAGES)
    return {"layer": kind} | _OPTIONS.get(kind, lambda of: {})(of)


def _some(of: random.Random, **choices: Any) -> Options:
    return {name: of.choice(values) for name, values in choices.items()}


_BOTH = (False, True)
_OPTIONS: dict[str, Any] = {
    "convolution": lambda of: _some(
        of,
        width=(4, 8, 16, 24),
        kernel=(1, 3, 3, 5),
        stride=(1, 1, 2),
        groups=(0, 0, 0, 2, 4),
        dilation=(1, 1, 2),
        bias=_BOTH,
        mode=("zeros", "zeros", "zeros", "reflect", "replicate", "circular"),
    ),
    "depthwise": lambda of: _some(of, kernel=(3, 5), times=(1, 2)),
    "transposed": lambda of: _some(of, width=(4, 8, 12), kernel=(2, 3), stride=(1, 2), groups=(0, 0, 2), bias=_BOTH),
    "norm": lambda of: _some(
        of,
        kind=("batch", "batch", "layer", "rms", "channels", "group", "group", "instance"),
        groups=(1, 2, 4),
        affine=(True, True, True, False),
    ),
    "pool": lambda of: _some(
        of, kind=("max", "avg", "adaptive_avg", "adaptive_max", "lp"), size=(1, 3, 5), kernel=(2, 3), stride=(1, 2)
    ),
    "pad": lambda of: _some(
        of, mode=("constant", "reflect", "reflect", "replicate", "circular"), edges=((1, 1), (0, 1), (2, 1))
    ),
    "resize": lambda of: _some(of, mode=("nearest", "linear", "linear", "nearest-exact", "bicubic")),
    "shuffle": lambda of: _some(of, up=_BOTH),
    "squeeze": lambda of: _some(of, expand=_BOTH),
    "activation": lambda of: _some(of, kind=ACTIVATIONS, inplace=_BOTH),
    "gate": lambda of: _some(of, dim=(0, -1)),
    "dropout": lambda of: _some(of, whole=(False, False, True), inplace=(False, False, True)),
    "permute": lambda of: _some(of, first=(0, 0, -2)),
    "roll": lambda of: _some(of, dims=((1,), (0, 1), (-1,), (0, 1, 2))),
    "scale": lambda of: _some(of, dims=(1, 2, 4, 7, 15), add=_BOTH, first=_BOTH),
    "centre": lambda of: _some(of, dim=(0, -1), expand=_BOTH),
    "soften": lambda of: _some(of, dim=(0, -1)),
    "linear": lambda of: _some(of, width=(8, 16, 30), bias=(True, True, False)),
    "attention": lambda of: _some(of, heads=(1, 2, 4), dropout=(0.0, 0.1), weights=_BOTH),
    "products": lambda of: _some(of, heads=(1, 2, 4), dropout=(0.0, 0.0, 0.1), causal=_BOTH),
    "recurrent": lambda of: _some(
        of, kind=("LSTM", "GRU"), width=(8, 16), layers=(1, 1, 2), dropout=(0.0, 0.2), both=_BOTH
    ),
}
