"""Loaders of many kinds train with the planner as they train without it, at the size that is announced."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import lightning_memplan as mp
from tests.paths import PROGRAMS, ROOT
from tests.programs.loader_cases import SET, STAYS


@pytest.fixture(scope="module")
def trained(nullgpu: Any) -> dict[str, Any]:
    """Run every case in one process, on a GPU of 2 GiB."""
    path = f"{Path(mp.__file__).parents[1]}:{ROOT}"
    done = nullgpu(
        [sys.executable, PROGRAMS / "loader_cases.py"],
        PYTHONPATH=path,
        NULLGPU_MEMORY=2**31,
        NULLGPU_CONTEXT=100 * 2**20,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


#: Streams of two workers have 300 samples each; one sample of 600 is skipped, or 600 come in pairs
PLANNED = {"shared by workers": 300, "shared, dropping the last": 300, "a corrupt sample that is skipped": 599}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SET if name != "a stream without a length"])
def test_the_size_that_is_set_is_had_and_no_sample_is_lost(trained: dict[str, Any], name: str) -> None:
    found = trained[name]
    assert found["own"][0] == 8
    assert found["planned"] == PLANNED.get(name, 600)
    assert set(found["sizes"]) == {found["planned"]}
    assert sum(found["sizes"]) >= sum(found["own"])  # a Trainer counts 75 batches of a stream, of which workers make 76
    assert found["same"] or name.startswith("shared")
    assert found["confirmed"]
    assert found["said"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", STAYS)
def test_a_size_that_cannot_be_set_stays_and_is_predicted(trained: dict[str, Any], name: str) -> None:
    found, planned = trained[name], 1 if name == "an item that is a batch" else STAYS[name][1]
    assert found["planned"] == planned
    assert found["sizes"] == found["own"]
    assert found["same"]
    assert found["predicted"] == 1
    text = " ".join((*found["said"], *found["notes"]))
    assert "stays" in text or "there is no batch size to set" in text or "the length of the data is not known" in text


@pytest.mark.slow
def test_a_stream_without_a_length_says_what_is_not_known_and_predicts_what_comes(trained: dict[str, Any]) -> None:
    found = trained["a stream without a length"]
    assert (found["planned"], found["sizes"], found["same"]) == (65536, [600], True)
    assert found["notes"][0].startswith("the length of the data is not known: at most 65536 samples are planned for")
    (said,) = found["said"]
    assert "65536 samples a batch were planned and set, and the first batch has 600" in said


@pytest.mark.slow
def test_accumulation_that_an_epoch_cannot_hold_is_said(trained: dict[str, Any]) -> None:
    found = trained["accumulated"]
    assert found["steps"] == [10, 1]  # 75 batches of 8, eight a step; one batch of 600
    (said,) = found["said"]
    assert "accumulate_grad_batches=8 is more than the 1 batch of an epoch at batch size 600" in said
    assert "the optimizer steps once an epoch, instead of 10 times with batches of 8" in said


@pytest.mark.slow
def test_no_last_batch_of_one_sample_is_left_to_batch_norm(trained: dict[str, Any]) -> None:
    found = trained["a last sample"]
    assert (found["planned"], found["sizes"][-1]) == (63, 10)  # 577 = 9 · 64 + 1 = 9 · 63 + 10
    assert found["same"]
    assert found["notes"] == ["64 samples a batch leave a last batch of one, which a step may refuse: 63 do not"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["for information", "for information, joined"])
def test_for_information_the_loaders_own_size_is_predicted(trained: dict[str, Any], name: str) -> None:
    found = trained[name]
    assert found["planned"] == 600
    assert found["sizes"] == found["own"]
    assert set(found["sizes"]) == {8}
    assert found["errors"] < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("held", [False, True])
def test_other_batches_of_a_later_epoch_stay(trained: dict[str, Any], held: bool) -> None:
    found = trained[f"later batches of 12, {held}"]
    assert found["planned"] == 60
    assert found["sizes"] == [60] * 20 + [12] * 50  # two epochs of 600 rows, then one
    assert found["same"]
    assert found["predicted"] > 1
    assert found["errors"] < 0.01  # predictions follow


@pytest.mark.slow
def test_a_plan_for_a_larger_gpu_than_the_one_that_trains_is_said(trained: dict[str, Any]) -> None:
    (said,) = trained["for a larger GPU"]["said"]
    assert "batch size 600 is planned for RTX 3090 (23.70 GiB), and set here on " in said
    assert "(2.00 GiB): it reserves" in said
