"""The textbook's count of a layer's parameters, beside what its tensors hold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_memplan.report.formula import layers_table
from lightning_memplan.step.layers import record_layers
from lightning_memplan.types import Layer


def record(module: nn.Module, *inputs: Tensor) -> tuple[Layer, ...]:
    return record_layers(module, lambda: module(*inputs), inputs[0].shape[0])


def counts(layers: tuple[Layer, ...]) -> list[str]:
    """The table's lines on parameters; lines of one layer are one."""
    lines = layers_table(layers, input_bytes=0).split("\n\n")[1].splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["parameters", "(kernel·in", "+", "bias)·out"]
    found: list[str] = []
    for line in lines[1:]:
        if line.startswith(" "):
            found[-1] += f" {line.strip()}"
        else:
            found.append(" ".join(line.split()))
    return found


def count_of(module: nn.Module, *inputs: Tensor) -> str:
    (text,) = counts(record(module, *inputs))
    return text.removeprefix("(itself) ")


def test_the_notes_own_layer() -> None:
    """30 filters of 3 x 3 x 3 on 1 channel: (27 X 1 + 1) X 30 = 840, and (27 X 1 X 30) + 30 = 840."""
    text = count_of(nn.Conv3d(1, 30, 3), torch.zeros(1, 1, 5, 5, 5))
    assert text == "(27·1+1)·30 = 840; 27·1·30 + 30 = 840; in tensors 840"


IMAGE = torch.zeros(2, 16, 8, 8)


@pytest.mark.parametrize(
    ("layer", "inputs", "text"),
    [
        pytest.param(
            # 9 * 16 * 32 = 4608 weights; the formula has 32 biases more
            *(nn.Conv2d(16, 32, 3, bias=False), IMAGE),
            "(9·16+1)·32 = 4,640; 9·16·32 + 32 = 4,640; in tensors 4,608: no bias",
            id="bias=False",
        ),
        pytest.param(
            # each of 32 filters reads 4 channels: 9 * 4 * 32 + 32
            *(nn.Conv2d(16, 32, 3, groups=4), IMAGE),
            "(9·16+1)·32 = 4,640; 9·16·32 + 32 = 4,640; in tensors 1,184: "
            "groups=4, so that a filter reads 4 of 16 channels",
            id="groups",
        ),
        pytest.param(
            *(nn.Conv2d(16, 16, 3, groups=16, bias=False), IMAGE),
            "(9·16+1)·16 = 2,320; 9·16·16 + 16 = 2,320; in tensors 144: "
            "groups=16, so that a filter reads 1 of 16 channels; no bias",
            id="depthwise, bias=False",
        ),
        pytest.param(
            *(nn.ConvTranspose2d(16, 8, 2, stride=2), IMAGE),
            "(4·16+1)·8 = 520; 4·16·8 + 8 = 520; in tensors 520",
            id="transposed",
        ),
        pytest.param(
            # 16 channels to 8 in 2 groups: each of 8 filters reads 8
            *(nn.ConvTranspose2d(16, 8, 2, groups=2), IMAGE),
            "(4·16+1)·8 = 520; 4·16·8 + 8 = 520; in tensors 264: groups=2, so that a filter reads 8 of 16 channels",
            id="transposed, groups",
        ),
        pytest.param(
            *(nn.Linear(64, 10), torch.zeros(2, 64)),
            "(1·64+1)·10 = 650; 1·64·10 + 10 = 650; in tensors 650",
            id="linear",
        ),
        pytest.param(
            *(nn.Linear(64, 10, bias=False), torch.zeros(2, 64)),
            "(1·64+1)·10 = 650; 1·64·10 + 10 = 650; in tensors 640: no bias",
            id="linear, bias=False",
        ),
        pytest.param(
            *(nn.Embedding(50, 8), torch.zeros(2, 3, dtype=torch.int64)),
            "(1·8+1)·50 = 450; 1·8·50 + 50 = 450; in tensors 400: no bias",
            id="embedding",
        ),
        pytest.param(*(nn.BatchNorm2d(16), IMAGE), "(1·1+1)·16 = 32; 1·1·16 + 16 = 32; in tensors 32", id="batch norm"),
        pytest.param(
            *(nn.LayerNorm([8, 8], bias=False), IMAGE),
            "(1·1+1)·64 = 128; 1·1·64 + 64 = 128; in tensors 64: no bias",
            id="layer norm, bias=False",
        ),
        pytest.param(
            # 4 gates of 16 units, each with 8 + 16 weights and two biases
            *(nn.LSTM(8, 16), torch.zeros(5, 2, 8)),
            "(1·24+2)·64 = 1,664; 1·24·64 + 2·64 = 1,664; in tensors 1,664",
            id="LSTM",
        ),
    ],
)
def test_both_counts_and_the_tensors(layer: nn.Module, inputs: Tensor, text: str) -> None:
    (row,) = record(layer, inputs)
    assert row.parameters == sum(p.numel() for p in layer.parameters())
    assert bool(row.differs) == (sum(each.per_filter for each in row.filters) != row.parameters)
    assert sum(each.per_filter for each in row.filters) == sum(each.apart for each in row.filters)
    assert count_of(layer, inputs) == text


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(50, 8), nn.Linear(8, 50)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.embed(x))
        return result


def test_tied_weights_are_counted_once() -> None:
    assert counts(record(Tied(), torch.zeros(2, 3, dtype=torch.int64))) == [
        "embed (1·8+1)·50 = 450; 1·8·50 + 50 = 450; in tensors 400: no bias",
        "out (1·8+1)·50 = 450; 1·8·50 + 50 = 450; in tensors 50: tied, and counted in embed",
    ]


def test_tied_weights_of_a_layer_that_is_not_called() -> None:
    class Decodes(Tied):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.embed(x), self.embed.weight)

    (_, out) = counts(record(Decodes(), torch.zeros(2, 3, dtype=torch.int64)))
    assert out == "out (1·8+1)·50 = 450; 1·8·50 + 50 = 450; in tensors 50: tied, and counted in embed"


def test_a_layer_that_is_called_again_is_counted_at_its_first_call() -> None:
    layer = nn.Linear(8, 8)
    assert counts(record(nn.Sequential(layer, layer), torch.zeros(2, 8))) == [
        "0 (1·8+1)·8 = 72; 1·8·8 + 8 = 72; in tensors 72",
        "0 (1·8+1)·8 = 72; 1·8·8 + 8 = 72; in tensors 0: counted at its first call",
    ]


def test_layers_that_are_alike_are_one_line() -> None:
    layers = record(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(2, 8))
    assert counts(layers) == [
        "0 and 2 more (1·8+1)·8 = 72; 1·8·8 + 8 = 72; in tensors 72",
        "4 (1·8+1)·2 = 18; 1·8·2 + 2 = 18; in tensors 18",
    ]


@pytest.mark.parametrize(
    "layer", [nn.ReLU(), parametrizations.weight_norm(nn.Linear(8, 8))], ids=["ReLU", "weight norm"]
)
def test_without_filters_there_is_no_count(layer: nn.Module) -> None:
    assert "kernel" not in layers_table(record(layer, torch.zeros(2, 8)), input_bytes=0)
