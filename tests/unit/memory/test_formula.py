"""The formula by hand-made arithmetic, and against the real parameter tensors."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from lightning_memplan.data.batches import sample_bytes, tensors_of
from lightning_memplan.memory.formula import Formula
from lightning_memplan.step.layers import filters_of, make_formula, record_layers, textbook_filters
from lightning_memplan.types import Filters, Layer


def meta(module: nn.Module) -> nn.Module:
    return module.to("meta")


def record(module: nn.Module, *inputs: Tensor) -> tuple[Layer, ...]:
    return record_layers(module, lambda: module(*inputs), inputs[0].shape[0])


def both_methods(module: nn.Module) -> tuple[int, int]:
    filters = filters_of(module)
    assert filters is not None
    return sum(f.per_filter for f in filters), sum(f.apart for f in filters)


def numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- the note's numbers -----------------------------------------------------------------------------------------------


def test_the_notes_first_layer_has_840_parameters_by_both_methods() -> None:
    # A: (27 * 1 + 1) * 30 = 840;  B: 27 * 1 * 30 + 30 = 840
    layer = nn.Conv3d(1, 30, 3)
    assert both_methods(layer) == (840, 840)
    assert numel(layer) == 840


def test_the_notes_feature_map_is_993_74_megabytes() -> None:
    # 193 - 2 = 191, 229 - 2 = 227;  191 * 227 * 191 * 30 * 4 bytes = 993,742,440
    layer = meta(nn.Conv3d(1, 30, 3))
    (row,) = record(layer, torch.empty(1, 1, 193, 229, 193, device="meta"))
    assert row.shape == (30, 191, 227, 191)
    assert row.feature_bytes == 191 * 227 * 191 * 30 * 4
    assert round(row.feature_bytes / 10**6, 2) == 993.74
    assert (row.parameters, row.parameter_bytes, row.gradient_bytes) == (840, 3360, 3360)
    assert row.filters == (Filters(kernel=27, inputs=1, biases=1, count=30),)


def test_the_notes_parameters_and_gradients_are_13_21_megabytes_each() -> None:
    # 3,301,651 * 4 bytes = 13,206,604
    network = nn.ParameterList([nn.Parameter(torch.empty(3_301_651, device="meta"))])
    formula = make_formula(network, record_layers(network, lambda: None, 1), input_bytes=1)
    assert formula.parameter_bytes == formula.gradient_bytes == 13_206_604
    assert round(formula.parameter_bytes / 10**6, 2) == 13.21


class NoteShaped(nn.Module):
    """Nine layers after the input, as in the note: I1 is the image and I2 to I10 the layers' outputs."""

    def __init__(self) -> None:
        super().__init__()
        widths = (30, 60, 120, 240)
        blocks: list[nn.Module] = []
        for inputs, outputs in zip((1, *widths), widths, strict=False):
            blocks += [nn.Conv3d(inputs, outputs, 3), nn.ReLU(inplace=True), nn.MaxPool3d(2)]
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(240, 1)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.features(x)
        head: Tensor = self.head(features.mean((2, 3, 4)))
        return head


# (27 + 1) * 30 + (27 * 30 + 1) * 60 + (27 * 60 + 1) * 120 + (27 * 120 + 1) * 240 + 240 + 1
NOTE_SHAPED_PARAMETERS = 840 + 48_660 + 194_520 + 777_840 + 241
# valid 3 x 3 x 3, then halved: 193 -> 191 -> 95 -> 93 -> 46 -> 44 -> 22 -> 20 -> 10, 229 -> 227 -> 113 -> 111 -> 55 ...
NOTE_SHAPED_FEATURES = 4 * (
    30 * (191 * 227 * 191 + 95 * 113 * 95)
    + 60 * (93 * 111 * 93 + 46 * 55 * 46)
    + 120 * (44 * 53 * 44 + 22 * 26 * 22)
    + 240 * (20 * 24 * 20 + 10 * 12 * 10)
    + 1
)


def high_water(begins_anew: bool = False) -> int:
    """Return the most bytes that were resident since it last began anew; 0 where Linux does not tell."""
    try:
        if begins_anew:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0  # the tensors say the same
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_the_high_water_mark_rises_with_what_is_held() -> None:
    before = high_water(begins_anew=True)
    held = b"x" * 2**28
    assert high_water() - before > len(held) // 2


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_the_notes_network_at_full_size_allocates_nothing(kind: str) -> None:
    # 8 samples: 8 * 1.36 GB of outputs would be in memory if they were real
    seen: list[Tensor] = []
    before = high_water(begins_anew=True)
    if kind == "meta":
        with torch.device("meta"):
            network, batch = NoteShaped(), torch.empty(8, 1, 193, 229, 193)
            layers = record_layers(network, lambda: seen.append(network(batch)), 8)
        assert seen[0].device.type == "meta"
    else:
        with FakeTensorMode():
            network, batch = NoteShaped(), torch.empty(8, 1, 193, 229, 193)
            layers = record_layers(network, lambda: seen.append(network(batch)), 8)
        assert isinstance(seen[0], FakeTensor)
    assert high_water() - before < 2**30

    formula = make_formula(network, layers, sample_bytes(batch, 8))
    assert formula.input_bytes == 193 * 229 * 193 * 4
    assert formula.parameter_bytes == 4 * NOTE_SHAPED_PARAMETERS
    assert formula.feature_bytes == NOTE_SHAPED_FEATURES
    assert formula.memory(8) == 8 * NOTE_SHAPED_PARAMETERS + 8 * (193 * 229 * 193 * 4 + 2 * NOTE_SHAPED_FEATURES)
    assert [row.type for row in layers] == [*["Conv3d", "ReLU", "MaxPool3d"] * 4, "Linear"]


# --- parameters by both methods ---------------------------------------------------------------------------------------

KINDS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "Conv1d": (lambda: nn.Conv1d(4, 6, 5), (5 * 4 + 1) * 6),
    "Conv2d": (lambda: nn.Conv2d(3, 8, (3, 5), bias=False), 15 * 3 * 8),
    "Conv2d grouped": (lambda: nn.Conv2d(8, 16, 3, groups=4), (9 * 2 + 1) * 16),
    "Conv2d depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (9 * 1 + 1) * 8),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 5), (5 * 4 + 1) * 6),
    "ConvTranspose2d grouped": (lambda: nn.ConvTranspose2d(8, 4, 2, groups=2), (4 * 4 + 1) * 4),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(30, 1, 3), 27 * 30 + 1),
    "Linear": (lambda: nn.Linear(7, 3), (7 + 1) * 3),
    "Linear no bias": (lambda: nn.Linear(7, 3, bias=False), 21),
    "Bilinear": (lambda: nn.Bilinear(3, 4, 5), (12 + 1) * 5),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(9), 18),
    "BatchNorm3d plain": (lambda: nn.BatchNorm3d(9, affine=False), 0),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(9), 18),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(9), 0),
    "InstanceNorm2d affine": (lambda: nn.InstanceNorm2d(9, affine=True), 18),
    "GroupNorm": (lambda: nn.GroupNorm(3, 9), 18),
    "LayerNorm": (lambda: nn.LayerNorm((4, 5)), 40),
    "LayerNorm no bias": (lambda: nn.LayerNorm(5, bias=False), 5),
    "LayerNorm plain": (lambda: nn.LayerNorm(5, elementwise_affine=False), 0),
    "RMSNorm": (lambda: nn.RMSNorm(5), 5),
    "Embedding": (lambda: nn.Embedding(100, 16), 1600),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(100, 16), 1600),
    "PReLU": (lambda: nn.PReLU(6), 6),
    # 4 projections of 8 * 8 + 8
    "Attention": (lambda: nn.MultiheadAttention(8, 2), 288),
    "Attention no bias": (lambda: nn.MultiheadAttention(8, 2, bias=False), 256),
    # query and output 2 * 72, keys (5 + 1) * 8, values (6 + 1) * 8, a learnt key and value 16
    "Attention apart": (lambda: nn.MultiheadAttention(8, 2, kdim=5, vdim=6, add_bias_kv=True), 144 + 48 + 56 + 16),
    "RNN": (lambda: nn.RNN(8, 16), (8 + 16 + 2) * 16),
    "RNN relu no bias": (lambda: nn.RNN(8, 16, nonlinearity="relu", bias=False), 24 * 16),
    # the second layer's inputs are both directions of the first: 32
    "GRU": (lambda: nn.GRU(8, 16, num_layers=2, bidirectional=True), 2 * 3 * 16 * (26 + 50)),
    "LSTM": (lambda: nn.LSTM(8, 16), 4 * 16 * 26),
    # 4 gates * 16 units * (8 + 4 weights + 2 biases) and a projection of 16 to 4
    "LSTM projected": (lambda: nn.LSTM(8, 16, proj_size=4), 4 * 16 * 14 + 64),
    "RNNCell": (lambda: nn.RNNCell(8, 16), 26 * 16),
    "GRUCell": (lambda: nn.GRUCell(8, 16, bias=False), 3 * 24 * 16),
    "LSTMCell": (lambda: nn.LSTMCell(8, 16), 4 * 26 * 16),
    "ReLU": (nn.ReLU, 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_layer_by_both_methods(kind: str) -> None:
    make, expected = KINDS[kind]
    layer = make()
    assert both_methods(layer) == (expected, expected)
    assert numel(layer) == expected


@settings(max_examples=150, deadline=None)
@given(
    dimensions=st.integers(1, 3),
    transposed=st.booleans(),
    groups=st.integers(1, 4),
    inputs=st.integers(1, 4),
    outputs=st.integers(1, 4),
    kernel=st.tuples(*[st.integers(1, 4)] * 3),
    bias=st.booleans(),
    stride=st.integers(1, 2),
    batch=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_the_parameters_of_any_convolution_are_counted(
    dimensions: int,
    transposed: bool,
    groups: int,
    inputs: int,
    outputs: int,
    kernel: tuple[int, int, int],
    bias: bool,
    stride: int,
    batch: int,
    dtype: torch.dtype,
) -> None:
    kind: Any = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dimensions}d")
    layer = kind(
        groups * inputs,
        groups * outputs,
        kernel[:dimensions],
        stride,
        groups=groups,
        bias=bias,
        dtype=dtype,
        device="meta",
    )
    sizes = [9] * dimensions
    (row,) = record(layer, torch.empty(batch, groups * inputs, *sizes, dtype=dtype, device="meta"))
    assert row.parameters == numel(layer)
    assert both_methods(layer) == (numel(layer), numel(layer))
    assert row.parameter_bytes == row.gradient_bytes == numel(layer) * dtype.itemsize
    # a valid convolution gives (9 - kernel) // stride + 1 places, a transposed one (9 - 1) * stride + kernel
    places = [8 * stride + k if transposed else (9 - k) // stride + 1 for k in kernel[:dimensions]]
    assert row.shape == (groups * outputs, *places)
    expected = groups * outputs * dtype.itemsize
    for place in places:
        expected *= place
    assert row.feature_bytes == expected


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(["RNN", "GRU", "LSTM"]),
    inputs=st.integers(1, 6),
    hidden=st.integers(2, 6),
    layers=st.integers(1, 3),
    bias=st.booleans(),
    both=st.booleans(),
    projection=st.integers(0, 5),
)
def test_the_parameters_of_any_recurrent_layer_are_counted(
    kind: str, inputs: int, hidden: int, layers: int, bias: bool, both: bool, projection: int
) -> None:
    options: dict[str, Any] = {"proj_size": min(projection, hidden - 1)} if kind == "LSTM" else {}
    layer = getattr(nn, kind)(inputs, hidden, layers, bias=bias, bidirectional=both, device="meta", **options)
    assert both_methods(layer) == (numel(layer), numel(layer))


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 3),
    width=st.integers(1, 4),
    bias=st.booleans(),
    learnt=st.booleans(),
    keys=st.none() | st.integers(1, 9),
    values=st.none() | st.integers(1, 9),
)
def test_the_parameters_of_any_attention_are_counted(
    heads: int, width: int, bias: bool, learnt: bool, keys: int | None, values: int | None
) -> None:
    layer = nn.MultiheadAttention(heads * width, heads, bias=bias, add_bias_kv=learnt, kdim=keys, vdim=values)
    assert both_methods(layer) == (numel(layer), numel(layer))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(5))
        self.shift = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.shift


def test_a_module_of_unknown_kind_counts_by_its_tensors() -> None:
    layer = Scale()
    assert filters_of(layer) is None
    (row,) = record(layer, torch.ones(2, 5))
    assert row == Layer("", "Scale", 6, 24, 24, (5,), 20)


def test_a_layer_that_holds_more_than_its_kind_counts_by_its_tensors() -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.scale = nn.Parameter(torch.ones(3))

    (row,) = record(Scaled(), torch.ones(2, 4))
    assert row.parameters == (4 + 1) * 3 + 3
    assert (row.filters[0].per_filter, row.differs) == ((4 + 1) * 3, "it holds other tensors than its kind does")


def test_a_parametrized_layer_is_one_row() -> None:
    # a weight norm keeps a direction of 8 * 4 and 8 lengths in place of the weight, beside the bias of 8
    (row,) = record(parametrizations.weight_norm(nn.Linear(4, 8)), torch.ones(2, 4))
    assert (row.path, row.type, row.parameters, row.feature_bytes) == ("", "Linear", 8 * 4 + 8 + 8, 32)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv1d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, 1), nn.ConvTranspose3d(8, 8, 1), nn.Linear(8, 8)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_parametrized_layer_has_no_textbook_count(layer: nn.Module) -> None:
    assert len(textbook_filters(layer)) == 1
    assert textbook_filters(parametrizations.weight_norm(layer)) == ()


def test_recording_computes_no_parametrization_of_its_own() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x

    counting = Counting()
    layer = parametrize.register_parametrization(nn.Linear(4, 8), "bias", counting)
    before = counting.calls
    record(layer, torch.ones(2, 4))
    assert counting.calls == before + 1


# --- feature maps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Identity(),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Unflatten(1, (2, 3)),
        nn.Dropout(0.5).eval(),
        nn.Sequential(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_an_output_in_the_inputs_memory_is_no_feature_map(layer: nn.Module, fake: bool) -> None:
    if fake:
        with FakeTensorMode():
            (row,) = record(layer, torch.ones(2, 6, 4))
    else:
        (row,) = record(layer, torch.ones(2, 6, 4))
    assert row.feature_bytes == 0
    assert row.type == type(layer).__name__


def test_an_output_that_is_copied_is_a_feature_map() -> None:
    # ReLU out of place, a training Dropout, and Flatten of a tensor that is not contiguous: 6 * 4 elements each
    for layer, x in (
        (nn.ReLU(), torch.ones(2, 6, 4)),
        (nn.Dropout(0.5), torch.ones(2, 6, 4)),
        (nn.Flatten(), torch.ones(2, 4, 6).transpose(1, 2)),
    ):
        (row,) = record(layer, x)
        assert row.feature_bytes == 6 * 4 * 4


def test_a_keyword_argument_given_back_is_no_feature_map() -> None:
    class Skip(nn.Module):
        def forward(self, x: Tensor, *, skip: Tensor) -> Tensor:
            return skip

    layer = Skip()
    (row,) = record_layers(layer, lambda: layer(torch.ones(2, 6), skip=torch.ones(2, 6)), 2)
    assert row.feature_bytes == 0


def test_a_buffer_given_out_is_no_feature_map() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table: Tensor
            self.register_buffer("table", torch.ones(1, 100, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.table[:, : x.shape[1]]

    (row,) = record(Positions(), torch.ones(2, 6, 8))
    assert row.feature_bytes == 0


def test_half_precision_takes_half() -> None:
    layer = nn.Linear(8, 4, device="meta", dtype=torch.bfloat16)
    (row,) = record(layer, torch.empty(2, 8, device="meta", dtype=torch.bfloat16))
    # (8 + 1) * 4 parameters and 4 outputs, of 2 bytes
    assert (row.parameter_bytes, row.gradient_bytes, row.feature_bytes) == (72, 72, 8)


def test_autocast_is_seen_in_the_outputs_dtype() -> None:
    layer = nn.Linear(8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (row,) = record(layer, torch.ones(2, 8))
    assert (row.parameter_bytes, row.feature_bytes) == (144, 8)


def test_an_lstms_outputs_add_up() -> None:
    # output 5 * 2 * 16, and the last state and cell of 2 directions: 2 * 2 * 16; 4 bytes each
    layer = nn.LSTM(8, 16, bidirectional=True, batch_first=True)
    (row,) = record(layer, torch.ones(3, 5, 8))
    assert row.shape == (5, 32)
    assert row.feature_bytes == 4 * (5 * 32 + 2 * 16 + 2 * 16)


def test_time_first_leaves_out_the_second_dimension() -> None:
    layer = nn.GRU(8, 16)
    (row,) = record_layers(layer, lambda: layer(torch.ones(5, 3, 8)), 3)
    assert row.shape == (5, 16)
    assert row.feature_bytes == 4 * (5 * 16 + 16)


def test_what_is_folded_into_the_batch_stays_in_the_shape() -> None:
    # 3 samples of 4 windows: 12 rows
    layer = nn.Linear(8, 2)
    (row,) = record_layers(layer, lambda: layer(torch.ones(12, 7, 8)), 3)
    assert row.shape == (4, 7, 2)
    assert row.feature_bytes == 4 * 7 * 2 * 4


def test_dicts_and_dataclasses_add_up_and_shared_memory_counts_once() -> None:
    @dataclass
    class Output:
        logits: Tensor
        extra: dict[str, list[Tensor]]
        loss: Tensor | None = None

    class Head(nn.Module):
        def forward(self, x: Tensor) -> Output:
            logits = x + 1
            return Output(logits, {"again": [logits.view(-1)], "mean": [x.mean(1)]})

    (row,) = record(Head(), torch.ones(2, 6))
    assert row.shape == (6,)
    assert row.feature_bytes == (6 + 1) * 4


def test_a_module_without_an_output_has_an_empty_shape() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    (row,) = record(Log(), torch.ones(2, 6))
    assert (row.shape, row.feature_bytes) == ((), 0)


def test_tensors_of_reads_only_what_holds_tensors() -> None:
    a, b = torch.ones(1), torch.ones(2)
    assert list(map(id, tensors_of([a, {"x": (b, "text", 3, None)}]))) == [id(a), id(b)]
    assert list(tensors_of(Layer)) == []


# --- calls, sharing, freezing -----------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(self.layer(x))
        return result


def test_a_layer_called_twice_has_two_feature_maps_and_its_parameters_once() -> None:
    network = Twice()
    layers = record(network, torch.ones(2, 4))
    assert [(row.path, row.parameters, row.feature_bytes) for row in layers] == [("layer", 20, 16), ("layer", 0, 16)]
    # 20 parameters of 4 bytes, twice; 2 * (16 + 2 * 32)
    assert make_formula(network, layers, 16).memory(2) == 160 + 2 * (16 + 64)


def test_tied_parameters_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 8)
            self.out = nn.Linear(8, 50)
            self.out.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.out(self.embed(x))
            return result

    network = Tied()
    layers = record(network, torch.zeros(2, 3, dtype=torch.int64))
    # the embedding's 50 * 8; of the Linear, only its 50 biases are new
    assert [row.parameters for row in layers] == [400, 50]
    assert make_formula(network, layers, 24).parameter_bytes == 4 * 450


def test_frozen_parameters_have_no_gradient() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    network[0].requires_grad_(False)
    layers = record(network, torch.ones(2, 4))
    assert [row.gradient_bytes for row in layers] == [0, 4 * 18]
    formula = make_formula(network, layers, 16)
    assert (formula.parameter_bytes, formula.gradient_bytes) == (4 * (40 + 18), 4 * 18)


def test_a_parents_own_parameters_are_rows_of_their_own() -> None:
    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
            self.scale = nn.Parameter(torch.zeros(3), requires_grad=False)
            self.body = nn.Linear(8, 8)
            self.unused = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.body(x + self.cls_token)
            return result

    network = Vit()
    layers = record(network, torch.ones(2, 4, 8))
    assert layers == (
        Layer("body", "Linear", 72, 288, 288, (4, 8), 4 * 8 * 4, (Filters(1, 8, 1, 8),)),
        Layer("cls_token", "Parameter", 8, 32, 32, (1, 1, 8), 0),
        Layer("scale", "Parameter", 3, 12, 0, (3,), 0),
        Layer("unused", "Linear", 45, 180, 180, (), 0, (Filters(1, 8, 1, 5),)),
    )
    assert make_formula(network, layers, 4).parameter_bytes == 4 * numel(network)


def test_attention_is_one_layer_with_its_output_projection() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    network = nn.ModuleDict({"attention": attention})
    x = torch.ones(2, 5, 8)
    layers = record_layers(network, lambda: attention(x, x, x), 2)
    # out 5 * 8 and the weights 5 * 5
    filters = (Filters(1, 8, 1, 8),) * 4
    assert layers == (Layer("attention", "MultiheadAttention", 288, 1152, 1152, (5, 8), 4 * (40 + 25), filters),)


def test_a_transformer_block_is_its_layers() -> None:
    network = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layers = record(network, torch.ones(2, 5, 8))
    assert [row.type for row in layers if row.parameters] == [
        "MultiheadAttention",
        "LayerNorm",
        "Linear",
        "Linear",
        "LayerNorm",
    ]
    assert sum(row.parameters for row in layers) == numel(network)


def test_a_module_that_works_on_its_childrens_parameters_is_a_layer() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.inner.weight, self.inner.bias)

    (row,) = record(Functional(), torch.ones(2, 4))
    assert (row.path, row.type, row.parameters, row.feature_bytes) == ("", "Functional", 15, 12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_runs_again_is_written_once(reentrant: bool) -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    x = torch.ones(2, 4, requires_grad=True)
    layers = record_layers(
        network, lambda: checkpoint(network, x, use_reentrant=reentrant).sum().backward(), batch_size=2
    )
    assert [row.path for row in layers] == ["0", "1", "2"]


def test_an_error_that_the_network_catches_leaves_the_rows_in_order() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.inner(x)
            raise RuntimeError("no")

    class Falls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Fails()

        def forward(self, x: Tensor) -> Tensor:
            try:
                result: Tensor = self.first(x)
            except RuntimeError:
                result = x[:, :2] + 1
            return result

    layers = record(nn.Sequential(Falls(), nn.Linear(2, 1)), torch.ones(2, 4))
    # the call that failed is no call that ended: what Falls gives out is its own
    assert [(row.path, row.feature_bytes) for row in layers] == [("0.first.inner", 16), ("0", 8), ("1", 4)]


def test_hooks_go_and_parameters_stay_whatever_happens() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    before = copy.deepcopy(network.state_dict())
    record(network, torch.ones(2, 4))
    with pytest.raises(RuntimeError):
        record(network, torch.ones(2, 5))
    with pytest.raises(KeyboardInterrupt):
        record_layers(network, lambda: (_ for _ in ()).throw(KeyboardInterrupt), 2)
    for module in network.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_with_kwargs
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_the_users_hooks_stay() -> None:
    network = nn.Linear(4, 4)
    called: list[int] = []
    network.register_forward_hook(lambda *_: called.append(1))
    record(network, torch.ones(2, 4))
    assert called == [1]
    assert len(network._forward_hooks) == 1


# --- arguments that are none ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.LazyLinear(4), nn.LazyBatchNorm1d(affine=False)])
def test_lazy_modules_are_refused(layer: nn.Module) -> None:
    network = nn.Sequential(nn.Identity(), layer)
    with pytest.raises(ValueError, match=r"'1\.\w+' has no shape yet"):
        record(network, torch.ones(2, 4))
    with pytest.raises(ValueError, match="has no shape yet"):
        make_formula(network, (), 1)
    network(torch.ones(2, 4))
    assert record(network, torch.ones(2, 4))


@pytest.mark.parametrize("batch_size", [0, -1, True, 2.0, None])
def test_a_batch_size_is_an_int_of_at_least_1(batch_size: Any) -> None:
    network = nn.Linear(4, 4)
    formula = Formula((), 1, 1, 1, 1)
    for call in (
        lambda: record_layers(network, lambda: None, batch_size),
        lambda: sample_bytes(torch.ones(2), batch_size),
        lambda: formula.memory(batch_size),
    ):
        with pytest.raises(ValueError, match="a batch size is an int of at least 1"):
            call()


@pytest.mark.parametrize("value", [-1, 1.5, True, None])
@pytest.mark.parametrize(
    "name", ["parameter_bytes", "gradient_bytes", "input_bytes", "feature_bytes", "optimizer_bytes"]
)
def test_a_formulas_figures_are_bytes(name: str, value: Any) -> None:
    figures: dict[str, Any] = dict.fromkeys(
        ["parameter_bytes", "gradient_bytes", "input_bytes", "feature_bytes", "optimizer_bytes"], 1
    )
    with pytest.raises(ValueError, match=f"{name} is a number of bytes"):
        Formula((), **{**figures, name: value})


def test_layers_of_another_network_are_refused() -> None:
    layers = record(nn.Linear(4, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="80 bytes of parameters and the module 100"):
        make_formula(nn.Linear(4, 5), layers, 16)


# --- the formula ------------------------------------------------------------------------------------------------------


def test_the_optimizer_is_apart() -> None:
    formula = Formula((), 100, 100, 10, 20, optimizer_bytes=200)
    assert formula.memory(2) == 200 + 2 * 50
