"""What is printed, by its text; nothing is wider than 80 columns, and nothing needs more than ASCII."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_memplan.report.formula import layers_table
from lightning_memplan.report.metrics import plan_hparams, step_metrics
from lightning_memplan.report.plans import does_not_fit_message, plan_table
from lightning_memplan.report.runs import measurement_summary
from lightning_memplan.types import Device, EstimateRow, Layer, Measurement, Peaks, Plan, Range

GiB = 2**30

CARD = Device("NVIDIA GeForce RTX 3090", total=24 * GiB, context=GiB // 2)

BREAKDOWN = {
    "parameters": GiB // 2,
    "buffers": 2**20,
    "gradients": GiB // 4,
    "optimizer": GiB,
    "batch": 2**27,
    "activations": 15 * GiB,
    "temporaries": 3 * GiB,
    "workspaces": 2**25,
    "other": 0,
}


def make_plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "batch_size": 24,
        "device": CARD,
        "budget": 23 * GiB,
        "margin": 0.02,
        "limited_by": "memory",
        "method": "trace",
        "peak_reserved": 21 * GiB,
        "peak_allocated": 20 * GiB,
        "formula_peak": 30 * GiB,
        "phase": "backward",
        "breakdown": BREAKDOWN,
    }
    return Plan(**{**values, **changes})


def check_width(text: str) -> list[str]:
    lines = text.split("\n")
    assert max(map(len, lines)) <= 80
    assert text.isascii()
    assert all(line == line.rstrip() for line in lines)
    return lines


# --- the plan


def test_the_plan_table_shows_sizes_limits_and_notes() -> None:
    # 21 / 24 = 87.5 %, 20 / 24 = 83 %; the whole breakdown is 19.91 GiB: 15 / 19.91 = 75 %, 3 / 19.91 = 15 %
    table = plan_table(make_plan())
    check_width(table)
    assert (
        table
        == """\
memory plan for NVIDIA GeForce RTX 3090
  GPU              24.00 GiB   23.50 GiB for training
  batch size              24   limited by memory
  needed           21.00 GiB   of a budget of 23.00 GiB, margin 2.0 %
  peak reserved    21.00 GiB    88 % of the GPU  [##################..]
  peak allocated   20.00 GiB    83 % of the GPU, in the backward phase
    activations    15.00 GiB    75 %  ###############
    temporaries     3.00 GiB    15 %  ###
    optimizer       1.00 GiB     5 %  #
    parameters    512.00 MiB     3 %  #
    gradients     256.00 MiB     1 %
    the rest      161.00 MiB     1 %
  formula          30.00 GiB   params + grads + bs x (I1 + 2 x sum Ii)"""
    )


def test_what_the_cache_keeps_is_no_part_of_what_is_needed() -> None:
    plan = make_plan(peak_reserved=23 * GiB + GiB // 4, needed=22 * GiB)  # of 23.5 GiB for training
    lines = check_width(plan_table(plan))
    assert lines[3:6] == [
        "  needed           22.00 GiB   of a budget of 23.00 GiB, margin 2.0 %",
        "  peak reserved    23.25 GiB    97 % of the GPU  [###################.]",
        "    of it cache     1.25 GiB   kept as long as there is room for it",
    ]


def test_a_table_with_rows_and_notes_stays_short() -> None:
    plan = make_plan(
        accumulate_grad_batches=4,
        limited_by="max_batch_size",
        notes=(
            "The step reads a value of a tensor in training_step: it was given a stand-in, and branches may differ.",
        ),
    )
    table = plan_table(plan, [("earlier runs", "predicted +0.3 % of what came, over 12 runs")])
    lines = check_width(table)
    assert len(lines) <= 17
    assert "limited by max_batch_size; 4 batches a step" in table
    assert "  earlier runs     predicted +0.3 %" in table
    assert lines[-2].startswith("  note: The step reads")
    assert lines[-1] == "        stand-in, and branches may differ."


@pytest.mark.parametrize(
    ("whole", "parts", "text"),
    [
        (512, 1, "  samples a step         512   1 batch of 512"),
        (2048, 4, "  samples a step        2048   4 batches of 512"),
        (4096, 4, "  samples a step        4096   4 batches of 512 on each of 2 devices"),
    ],
)
def test_an_effective_batch_size_is_written_out(whole: int, parts: int, text: str) -> None:
    plan = make_plan(
        batch_size=512, accumulate_grad_batches=parts, effective_batch_size=whole, limited_by="effective_batch_size"
    )
    lines = check_width(plan_table(plan))
    assert lines[3] == text
    assert lines[2].endswith("512   all of the effective batch size")
    assert plan_hparams(plan)["memplan/effective_batch_size"] == whole


def test_what_real_steps_reserved() -> None:
    plan = make_plan(confirmed=21 * GiB)
    assert "    confirmed      21.00 GiB   reserved by real steps of this batch size" in check_width(plan_table(plan))
    assert plan_hparams(plan)["memplan/confirmed_gib"] == 21


def test_one_part_is_never_called_the_rest() -> None:
    six = dict(list(BREAKDOWN.items())[:6])
    assert "buffers" in plan_table(make_plan(breakdown=six))
    assert "the rest" not in plan_table(make_plan(breakdown=six))


def test_a_table_without_breakdown_phase_or_card() -> None:
    plan = make_plan(breakdown={}, phase="", limited_by="dataset", device=Device("CPU", total=24 * GiB, kind="cpu"))
    table = plan_table(plan)
    assert len(check_width(table)) == 7
    assert "  machine          24.00 GiB   24.00 GiB for training" in table
    assert "limited by the dataset" in table
    assert "phase" not in table


def needs(peak: int, phase: str = "", breakdown: dict[str, int] | None = None) -> EstimateRow:
    """One sample's estimate."""
    return EstimateRow(1, peak, peak, 0, phase, breakdown or {}, {}, Range(peak, peak, peak))


@given(
    name=st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=120),
    sizes=st.lists(st.integers(0, 2**44), min_size=9, max_size=9),
    peak=st.integers(0, 2**44),
    batch_size=st.integers(1, 10**9),
    note=st.text("ab ", max_size=300),
)
def test_no_plan_is_wider_than_80_columns(name: str, sizes: list[int], peak: int, batch_size: int, note: str) -> None:
    plan = make_plan(
        device=Device(name, total=2**40),
        breakdown=dict(zip(BREAKDOWN, sizes, strict=True)),
        peak_reserved=peak,
        batch_size=batch_size,
        notes=(note,),
    )
    check_width(plan_table(plan))
    check_width(does_not_fit_message(needs(peak, breakdown=plan.breakdown), 0, CARD))


def test_hyperparameters_are_flat_and_json() -> None:
    found = plan_hparams(make_plan())
    assert json.loads(json.dumps(found)) == found
    assert all(type(value) in (int, float, str) for value in found.values())
    assert found == {
        "memplan/batch_size": 24,
        "memplan/accumulate_grad_batches": 1,
        "memplan/device": "NVIDIA GeForce RTX 3090",
        "memplan/device_gib": 24.0,
        "memplan/budget_gib": 23.0,
        "memplan/margin": 0.02,
        "memplan/limited_by": "memory",
        "memplan/method": "trace",
        "memplan/phase": "backward",
        "memplan/predicted_reserved_gib": 21.0,
        "memplan/predicted_allocated_gib": 20.0,
        "memplan/formula_gib": 30.0,
        "memplan/parameters_gib": 0.5,
        "memplan/buffers_gib": 2**-10,
        "memplan/gradients_gib": 0.25,
        "memplan/optimizer_gib": 1.0,
        "memplan/batch_gib": 0.125,
        "memplan/activations_gib": 15.0,
        "memplan/temporaries_gib": 3.0,
        "memplan/workspaces_gib": 2**-5,
        "memplan/other_gib": 0.0,
    }


def test_what_does_not_fit_says_what_it_needs_and_what_would_help() -> None:
    text = does_not_fit_message(
        needs(30 * GiB, "backward", BREAKDOWN),
        23 * GiB,
        CARD,
        model="UNet3d",
        suggestions=[
            "precision='16-mixed' instead of '32-true'",
            "checkpoint the activations of 'encoder', which hold 12.00 GiB until the backward pass",
        ],
    )
    check_width(text)
    assert (
        text
        == """\
UNet3d does not fit on NVIDIA GeForce RTX 3090 at batch size 1: it lacks
7.00 GiB.
It needs 30.00 GiB, and 23.00 GiB of the GPU's 24.00 GiB are there for it.
In the backward phase: activations 15.00 GiB, temporaries 3.00 GiB, optimizer
1.00 GiB, the rest 929.00 MiB.
What would help, the best first:
  1. precision='16-mixed' instead of '32-true'
  2. checkpoint the activations of 'encoder', which hold 12.00 GiB until the
     backward pass"""
    )


def test_what_does_not_fit_may_say_no_more_than_the_bytes() -> None:
    text = does_not_fit_message(needs(2 * GiB), GiB, Device("CPU", total=2 * GiB, kind="cpu"))
    assert text == (
        "the model does not fit on CPU at batch size 1: it lacks 1.00 GiB.\n"
        "It needs 2.00 GiB, and 1.00 GiB of the machine's 2.00 GiB are there for it."
    )


# --- the formula

LAYERS = (
    Layer("features.conv1", "Conv3d", 840, 3360, 3360, (30, 191, 227, 191), 993_742_440),
    Layer("features.relu1", "ReLU", 0, 0, 0, (30, 191, 227, 191), 0),
    Layer("features.pool1", "MaxPool3d", 0, 0, 0, (30, 95, 113, 95), 122_379_000),
    Layer("head", "Linear", 241, 964, 964, (1,), 4),
)


def test_the_layers_table_adds_up_to_the_formula() -> None:
    # parameters 840 + 241 = 1,081; 4,324 bytes = 4.22 KiB, and as much of gradients
    # outputs 993,742,440 + 122,379,000 + 4 = 1,116,121,444 bytes = 1.04 GiB; 34,119,604 bytes of input = 32.54 MiB
    # 4 samples: 2 * 4324 + 4 * (34,119,604 + 2 * 1,116,121,444) = 9,065,458,616 bytes = 8.44 GiB
    table = layers_table(LAYERS, input_bytes=34_119_604, batch_size=4, optimizer_bytes=8648)
    check_width(table)
    assert (
        table
        == """\
layer           type       parameters  shape               output
features.conv1  Conv3d            840  30x191x227x191  947.71 MiB
features.relu1  ReLU                0  30x191x227x191         0 B
features.pool1  MaxPool3d           0  30x95x113x95    116.71 MiB
head            Linear            241  1                      4 B
input                                                   32.54 MiB
sum of layers                   1,081                    1.04 GiB

memory(bs) = params + grads + bs x (I1 + 2 x sum Ii)
           = 4.22 KiB + 4.22 KiB + bs x (32.54 MiB + 2 x 1.04 GiB)
memory(4)  = 8.44 GiB
             and 8.45 KiB of optimizer state, apart"""
    )


def test_the_largest_layers_are_shown_in_the_networks_order() -> None:
    table = layers_table(LAYERS, input_bytes=34_119_604, top=2)
    assert [line.split()[0] for line in check_width(table)[1:4]] == ["features.conv1", "features.pool1", "2"]
    assert check_width(table)[3].split() == ["2", "smaller", "ones", "241", "4", "B"]
    # the totals are of all the layers
    assert "1,081" in table
    assert layers_table(LAYERS, input_bytes=1, top=4) == layers_table(LAYERS, input_bytes=1)


def test_a_long_path_is_shortened_in_the_middle() -> None:
    row = Layer("encoder.stages.3.blocks.11.attn.out", "MultiheadAttention", 10, 40, 40, (30, 191, 227, 191), 605_184)
    line = check_width(layers_table([row], input_bytes=1))[1]
    assert line == "encod....11.attn.out  MultiheadAttention          10  30x191x227x191  591.00 KiB"
    assert len(line) == 80


def test_a_network_that_is_one_layer_has_no_path() -> None:
    assert check_width(layers_table([Layer("", "Linear", 1, 4, 4, (), 0)], input_bytes=1))[1].startswith("(itself) ")


def test_no_layers_are_a_table_too() -> None:
    assert "memory(1)  = 3 B" in layers_table([], input_bytes=3)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"top": 0}])
def test_numbers_of_layers_and_samples_are_at_least_1(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        layers_table(LAYERS, input_bytes=1, **options)


names = st.text("abc.0_", max_size=90)


@given(
    rows=st.lists(
        st.tuples(names, names, st.integers(0, 10**10), st.lists(st.integers(0, 10**7), max_size=6)), max_size=9
    ),
    batch_size=st.integers(1, 10**6),
    size=st.integers(0, 2**36),
)
def test_no_layer_is_wider_than_80_columns(
    rows: list[tuple[str, str, int, list[int]]], batch_size: int, size: int
) -> None:
    layers = [Layer(path, kind, n, 4 * n, 4 * n, tuple(shape), size) for path, kind, n, shape in rows]
    check_width(layers_table(layers, input_bytes=size, batch_size=batch_size, top=5))


# --- measurements


def test_step_metrics_hold_predicted_and_actual_bytes() -> None:
    # (10 - 8) / 8 = +25 %
    measurement = Measurement(
        step=3, predicted_allocated=10 * GiB, predicted_reserved=12 * GiB, allocated=8 * GiB, reserved=11 * GiB
    )
    assert step_metrics(measurement, formula_bytes=6 * GiB) == {
        "memplan/predicted_reserved_gib": 12.0,
        "memplan/actual_reserved_gib": 11.0,
        "memplan/predicted_allocated_gib": 10.0,
        "memplan/actual_allocated_gib": 8.0,
        "memplan/error_percent": 25.0,
        "memplan/formula_gib": 6.0,
        "memplan/floor_gib": 0.0,
        "memplan/retries": 0,
        "memplan/device_allocations": 0,
    }


def test_the_summary_names_the_rank_that_took_the_most() -> None:
    ranks = [Peaks(GiB, 2 * GiB), Peaks(GiB, 3 * GiB)]
    text = measurement_summary([Measurement(0, GiB, 2 * GiB, GiB, 2 * GiB)], ranks)
    assert check_width(text)[-1] == "  of 2 ranks, rank 1 reserved most: 3.00 GiB"


def test_the_summary_states_the_errors_of_all_steps() -> None:
    # errors: 0 %, (10 - 8) / 8 = +25 %, (10 - 12.5) / 12.5 = -20 %; median 0, worst +25 in step 1
    # peak: predicted 10, actual 12.5
    steps = [
        Measurement(0, 10 * GiB, 12 * GiB, 10 * GiB, 12 * GiB),
        Measurement(1, 10 * GiB, 12 * GiB, 8 * GiB, 12 * GiB),
        Measurement(2, 10 * GiB, 12 * GiB, 25 * GiB // 2, 15 * GiB),
    ]
    text = measurement_summary(steps)
    check_width(text)
    assert (
        text
        == """\
memory over 3 measured steps
                   predicted       actual      error
  peak reserved    12.00 GiB    15.00 GiB    -20.0 %
  peak allocated   10.00 GiB    12.50 GiB    -20.0 %
  error of allocated, step by step: median +0.0 %, worst +25.0 % in step 1
  1 of them allocated more than was predicted, at most 25.0 % more, in step 2"""
    )


def test_the_worst_error_may_be_too_low() -> None:
    # (10 - 20) / 20 = -50 % is further off than (12 - 10) / 10 = +20 %
    steps = [Measurement(4, 12, 12, 10, 12), Measurement(5, 10, 12, 20, 20)]
    assert "median -15.0 %, worst -50.0 % in step 5" in measurement_summary(steps)


def test_a_long_run_of_which_not_all_is_kept() -> None:
    # 52,000 steps ran, and the allocator retried in five of them
    text = measurement_summary([Measurement(4, 12, 12, 10, 12)] * 3, steps=52_000, retries=5)
    assert text.startswith("memory over 52,000 measured steps")
    assert "error of allocated, 3 steps: median" in text
    assert "the allocator gave its cache back 5 times" in text


def test_no_measurements_are_said_to_be_none() -> None:
    assert measurement_summary([]) == "memory: no step was measured"
    # a step that allocated nothing has no error
    assert measurement_summary([Measurement(0, 1, 1, 0, 0)]).splitlines()[2].split() == ["peak", "reserved", "1", "B"]
