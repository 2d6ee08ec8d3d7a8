"""Predict a network, train it on the null GPU, and make one that is predicted badly as small as it stays bad."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

import lightning_memplan as mp
from benchmarks.accuracy import networks
from benchmarks.accuracy.nullgpu import Row, asked, train

from . import layers, losses
from .draw import Network, Options

ALLOCATED, RESERVED = 0.5, 2.0  # percent of what is measured
_WORDS = 500


class Random(pl.LightningModule):
    """A network of layers, with a loss of any shape."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = network
        self.last = network["channels_last"]
        shape = network["shape"]
        self.table = nn.Embedding(_WORDS, 16, sparse=network["sparse"]) if len(shape) == 1 else None
        self.first = nn.Linear(shape[-1], shape[-1]) if len(shape) == 2 else None
        self.net, after = layers.build(network["layers"], (*shape, 16) if len(shape) == 1 else shape)
        self.head = nn.Linear(after[-1], after[-1])  # so that there is a parameter
        if self.last:
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            for parameter in self.parameters():
                if parameter.dim() in formats:
                    parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        (x,) = batch
        return losses.loss(self(x), self.network["loss"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is not None:
            x = self.table(x)
        if self.first is not None:
            x = self.first(x)
        if self.last:
            x = x.contiguous(memory_format=(torch.channels_last, torch.channels_last_3d)[x.dim() - 4])
        out: torch.Tensor = self.head(self.net(x))
        return out

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return networks.make_optimizer(self.network["optimizer"], self.parameters())


def allowed(network: Network) -> Network:
    """The network without layers in place, if autograd needs what one of them writes to."""
    (sample,) = _sample(network)
    try:
        Random(network)(torch.stack([sample] * 2)).sum().backward()
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        return network | {"layers": _out_of_place(network["layers"])}
    return network


def _out_of_place(given: list[Options]) -> list[Options]:
    return [
        one
        | ({"layers": _out_of_place(one["layers"])} if isinstance(one.get("layers"), list) else {})
        | ({"inplace": False} if "inplace" in one else {})
        for one in given
    ]


def _row(network: Network) -> Row:
    names = ("precision", "optimizer", "batch_size", "clip", "accumulate")
    return Row("random", *(network[name] for name in names))


def _sample(network: Network) -> tuple[torch.Tensor]:
    dtype = torch.long if len(network["shape"]) == 1 else torch.float32
    return (torch.zeros(network["shape"], dtype=dtype),)


def measure(network: Network) -> dict[str, Any]:
    """Return what training takes and what is predicted, in bytes, with errors in percent."""
    warnings.simplefilter("ignore")
    network = allowed(network)
    row, sample = _row(network), _sample(network)
    allocated, reserved = train(row, Random(network), sample)
    module = Random(network)
    how, _ = asked(row, module)
    loader = networks.loader(sample, row.batch_size, 1)
    found = mp.estimate(module, loader, method="trace", max_batch_size=row.batch_size, **how)
    predicted = found.peak_allocated(row.batch_size), found.peak(row.batch_size)
    errors = [round(100 * (a / b - 1), 3) for a, b in zip(predicted, (allocated, reserved), strict=True)]
    return {"measured": [allocated, reserved], "predicted": [*predicted], "errors": errors}


def held() -> int:
    """Bytes that networks have left behind, as cuDNN's random states are."""
    gc.collect()
    return torch.cuda.memory_allocated()


def is_wrong(errors: list[float]) -> bool:
    """Check that an error is over its bound."""
    return abs(errors[0]) > ALLOCATED or abs(errors[1]) > RESERVED


def smallest(network: Network, most: int = 60) -> tuple[Network, list[float]]:
    """The smallest network whose prediction is as wrong, found by leaving out one thing at a time."""
    found = network, measure(network)["errors"]
    tried = 0
    again = True
    while again and tried < most:
        again = False
        for simpler in _simpler(found[0]):
            tried += 1
            if held() > 2**20:  # which would count in what is measured
                return found
            try:
                errors = measure(simpler)["errors"]
            except Exception:  # noqa: BLE001 - it is no network
                continue
            if is_wrong(errors):
                found, again = (simpler, errors), True
                break
            if tried >= most:
                break
    return found


_PLAIN: Options = {
    "precision": "32-true",
    "optimizer": "SGD",
    "accumulate": 1,
    "clip": None,
    "channels_last": False,
    "sparse": False,
    "loss": {"kind": "mse_loss", "reduction": "mean"}
    | dict.fromkeys(("weight", "positive", "smooth", "ignore", "same_type"), False),
}


def _simpler(network: Network) -> Iterator[Network]:
    given = network["layers"]
    if len(given) > 3:
        half = len(given) // 2
        yield network | {"layers": given[:half]}
        yield network | {"layers": given[half:]}
    for place, one in enumerate(given):
        yield network | {"layers": [*given[:place], *given[place + 1 :]]}
        if isinstance(one.get("layers"), list):
            yield network | {"layers": [*given[:place], *one["layers"], *given[place + 1 :]]}
    for name, plain in _PLAIN.items():
        if network[name] != plain:
            yield network | {name: plain}
