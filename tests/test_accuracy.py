"""Predictions against real fits on the null GPU: a small sample of ``python -m tests.accuracy.nullgpu``'s rows."""

from __future__ import annotations

import pytest

from tests.accuracy import nullgpu as accuracy
from tests.accuracy import regimes

SAMPLE = """
own.mlp 16-mixed Adam+fused 300
own.conv3d 32-true SGD 4
own.encoder bf16-mixed AdamW 16
own.diffusion 16-mixed AdamW 32 clip=1.0
own.unet 32-true Adam+loop 8
own.pointnet 16-mixed RMSprop 64 accumulate=2
regime.checkpoint 16-mixed AdamW 64
regime.gan 32-true Adam 64
regime.reads 16-mixed AdamW 64
regime.users_cuda 32-true AdamW 64
"""


@pytest.mark.slow
def test_a_sample_of_networks_is_predicted_to_half_a_percent(nullgpu):
    rows = [accuracy.Row.parse(line) for line in SAMPLE.split("\n") if line]
    results = accuracy.run(rows)
    shown = accuracy.table(results)
    assert not [r for r in results if r.failed or r.skipped], shown
    assert all(abs(r.errors[0]) < 0.5 for r in results), shown  # allocated
    assert all(abs(r.errors[1]) < 4.0 for r in results), shown  # reserved, in segments of 2 and 20 MiB


def test_every_row_of_the_list_is_one():
    lines = (accuracy.HERE / "nullgpu.txt").read_text().splitlines()
    rows = [accuracy.Row.parse(line) for line in lines if not line.startswith("#")]
    assert len({row.network.partition("@")[0] for row in rows}) >= 60
    assert len(set(rows)) == len(rows)


def test_every_way_of_training_has_a_row():
    lines = (accuracy.HERE / "regimes.txt").read_text().splitlines()
    assert {accuracy.Row.parse(line).network for line in lines} == {f"regime.{name}" for name in regimes.REGIMES}


def test_a_row_is_read_as_it_is_written():
    row = accuracy.Row.parse("own.mlp 16-mixed AdamW 32 clip=1.0 accumulate=4")
    assert row == accuracy.Row("own.mlp", "16-mixed", "AdamW", 32, 1.0, 4)
    assert accuracy.Row.parse(str(row)) == row


def test_errors_are_percent_of_what_was_measured():
    result = accuracy.Result("a row", allocated=200, reserved=400, predicted_allocated=202, predicted_reserved=300)
    assert result.errors == (pytest.approx(1.0), pytest.approx(-25.0))
    assert "allocated: median 1.000 %" in accuracy.table([result, accuracy.Result("another", failed="why")])
