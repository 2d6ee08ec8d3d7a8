"""Networks in float32 on small cards: the bytes that NVML showed, against the reserved bytes of a replay.

    python -m benchmarks.accuracy.nvml

Measured by the authors of xMem (arXiv 2510.21048) with torch 2.6 (rows/README.md), whose cuDNN cannot be asked for its
workspaces: they are taken by rule. NVML shows more than the allocator's
segments, and cuDNN and the allocator have choices that a trace does not see, so each prediction has a range. It is
taken from another card's fits, not from these rows: see ``scatter`` and ``LOADED``.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_memplan.memory.allocator import replay
from lightning_memplan.memory.allocator_settings import AllocatorSettings
from lightning_memplan.memory.program import Program
from lightning_memplan.step.fake_cuda import DEVICE
from lightning_memplan.step.setup import TrainingSetup
from lightning_memplan.trace.tracer import run_formula

from .fits import FITS, read_fits
from .loop import Loop, trace_loop

ROWS = Path(__file__).parent / "rows" / "nvml_fp32.csv"
CONTEXT = 450 * 2**20  #: of the card, before the allocator gets any (CUDA 12.4)
LOADED = 244 * 2**20  #: what kernels took once they were loaded, at most: an H200's context before and after ResNet-50
LENGTH = 128  #: tokens of a text, at most: some text of every batch is that long

_CNNS = {
    "ConvNeXtBase": "convnext_base",
    "ConvNeXtTiny": "convnext_tiny",
    "MNASNet": "mnasnet1_0",
    "MobileNetV2": "mobilenet_v2",
    "MobileNetV3Large": "mobilenet_v3_large",
    "MobileNetV3Small": "mobilenet_v3_small",
    "RegNetX400MF": "regnet_x_400mf",
    "RegNetY400MF": "regnet_y_400mf",
    "ResNet101": "resnet101",
    "ResNet152": "resnet152",
    "VGG16": "vgg16",
    "VGG19": "vgg19",
}
_OPTIMIZERS: dict[str, Any] = {
    "SGD": torch.optim.SGD,
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": torch.optim.RMSprop,
    "Adafactor": getattr(torch.optim, "Adafactor", None),
}
#: an optimizer's state, in sets of parameters, for the formula
_STATES = {"SGD": 0, "Adam": 2, "AdamW": 2, "Adagrad": 1, "RMSprop": 1, "Adafactor": 0}


class Row(NamedTuple):
    gpu: str
    card: int
    model: str
    optimizer: str
    batch: int
    measured: int
    failed: bool


def read_rows(path: Path = ROWS) -> list[Row]:
    with open(path, newline="") as file:
        return [
            Row(
                r["gpu"],
                int(r["card_bytes"]),
                r["model"],
                r["optimizer"],
                int(r["batch_size"]),
                int(r["measured_bytes"] or 0),
                r["ran_out_of_memory"] == "True",
            )
            for r in csv.DictReader(file)
        ]


def loop_of(row: Row) -> tuple[nn.Module, Loop]:
    make = _OPTIMIZERS[row.optimizer]

    def optimizer(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        return make(parameters, lr=1e-3, foreach=True)

    name = row.model.partition("(")[0]
    if "/" in row.model:
        return _language_model(row.model), Loop(_texts, _Texts(), optimizer, new_batches=True)
    import torchvision

    network = getattr(torchvision.models, _CNNS[name])(num_classes=10)
    return network.train(), Loop(_images, _image_loss, optimizer, new_batches=True)


def _images(size: int) -> Any:
    return torch.empty(size, 3, 86, 86, device=DEVICE), torch.zeros(size, dtype=torch.long, device=DEVICE)


def _image_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _language_model(name: str) -> nn.Module:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes: dict[str, tuple[str, dict[str, Any]]] = {  # the published configurations
        "openai-community/gpt2": ("gpt2", {}),
        "distilbert/distilgpt2": ("gpt2", {"n_layer": 6}),
        "facebook/opt-125m": ("opt", {}),
        "facebook/opt-350m": (
            "opt",
            {
                "hidden_size": 1024,
                "ffn_dim": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "word_embed_proj_dim": 512,
                "do_layer_norm_before": False,
            },
        ),
    }
    kind, values = sizes[name]
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**values)).train()


def _texts(size: int) -> Any:
    return {
        "input_ids": torch.zeros(size, LENGTH, dtype=torch.long, device=DEVICE),
        "attention_mask": torch.ones(size, LENGTH, dtype=torch.long, device=DEVICE),
    }


class _Texts:
    """The loss as GPT-2 and OPT computed it in transformers 4.48 (January 2025, of torch 2.6's time): the logits less
    each text's last are copied. A loop's ``outputs`` live until the next iteration's have been made."""

    def __init__(self) -> None:
        self.outputs: Any = None

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        outputs = model(**batch)
        logits = outputs.logits[..., :-1, :].contiguous()
        labels = batch["input_ids"][..., 1:].contiguous()
        loss = nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))
        self.outputs = outputs
        return loss


def scatter(path: Path = FITS) -> tuple[float, float]:
    """Reserved bytes as shares of the expected ones, between which nine in ten fits on an H200 lie: the 5th and the
    95th percentile of those over 512 MiB, below which a single segment counts."""
    shares = quantiles(
        (f.reserved / f.expected for f in read_fits(path) if f.reserved > 2**29), n=20, method="inclusive"
    )
    return shares[0], shares[-1]


class Prediction(NamedTuple):
    """Bytes in use on the card at most: the reserved ones, with what nine in ten are expected to lie between."""

    low: int
    expected: int
    high: int
    formula: int


def predict(row: Row) -> Prediction:
    network, loop = loop_of(row)
    program = trace_loop(network, loop, sizes=(2, 3, 5), steps=3)
    reserved = reserved_bytes(program, row)
    low, high = scatter()
    parameters = sum(p.numel() * p.element_size() for p in network.parameters())
    batch: Any = torch.zeros(2, LENGTH, dtype=torch.long) if "/" in row.model else torch.zeros(2, 3, 86, 86)
    formula = run_formula(TrainingSetup(network), (2, batch)).formula.memory(row.batch)
    return Prediction(
        low=int(low * reserved),
        expected=reserved,
        high=min(int(high * reserved) + LOADED, row.card),
        formula=formula + _STATES[row.optimizer] * parameters,
    )


def reserved_bytes(program: Program, row: Row) -> int:
    """The mean of two replays: torch 2.6 takes, of free blocks of one size, the one at the lowest address, and in which
    order this driver gives addresses is not known. They fall in the one, and rise in the other."""
    entries, capacity = program.at(row.batch, "expected"), row.card - CONTEXT
    orders = (AllocatorSettings(by_address=True), AllocatorSettings())
    return int(fmean(replay(entries, capacity, order).peak_reserved for order in orders))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("models", nargs="*", help="only rows whose network's name begins with one of these")
    options = parser.parse_args()
    os.environ.setdefault("MEMPLAN_CUDNN", "off")
    errors, formula_errors, widths, inside = [], [], [], 0
    print("network, optimizer, batch size: measured, predicted (nine in ten from, to), formula in GiB")
    for row in read_rows(options.rows):
        if options.models and not row.model.startswith(tuple(options.models)):
            continue
        try:
            found = predict(row)
        except Exception as error:  # noqa: BLE001 - whatever the network raises
            print(f"{row.model}, {row.optimizer}: not built: {type(error).__name__}: {error}", flush=True)
            continue
        low, expected, high, formula = (value / 2**30 for value in found)
        measured = row.measured / 2**30
        error = 100 * (expected / measured - 1)
        print(
            f"{row.model}, {row.optimizer}, {row.batch}: {measured:.2f}, {expected:.2f} ({low:.2f} to {high:.2f}), "
            f"{error:+.1f} %; formula {formula:.2f}, {100 * (formula / measured - 1):+.1f} %",
            flush=True,
        )
        errors.append(abs(error))
        formula_errors.append(100 * abs(formula / measured - 1))
        widths.append(100 * (high - low) / expected)
        inside += low <= measured <= high
    if errors:
        print(f"median error {median(errors):.1f} %, formula's {median(formula_errors):.1f} %")
        print(f"{inside} of {len(errors)} within the range, which is {median(widths):.0f} % wide (median)")


if __name__ == "__main__":
    main()
