"""The size that is set carries validation too, where its batches follow the same attribute."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import lightning_memplan as mp
from tests.paths import PROGRAMS, ROOT
from tests.programs.stage_cases import CASES

#: what limits the batch size: training of 64 x 64 images, or validation
BY_VALIDATION = {
    "larger images",
    "larger images, in hyperparameters",
    "larger images, without a sanity check",
    "more heads",
    "eight times the batch",
    "few of them",  # ten larger images leave other free blocks than training's
}


@pytest.fixture(scope="module")
def trained(nullgpu: Any) -> Any:
    done = nullgpu(
        [sys.executable, PROGRAMS / "stage_cases.py"],
        PYTHONPATH=f"{Path(mp.__file__).parents[1]}:{ROOT}",
        NULLGPU_MEMORY=2**31,
        NULLGPU_CONTEXT=100 * 2**20,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_no_stage_runs_out_of_memory(trained: Any, name: str) -> None:
    found = trained[name]  # it has trained two epochs
    assert found["limited_by"] == ("validation" if name in BY_VALIDATION else "memory")
    assert found["train"] == [found["planned"]]
    assert found["notes"] == []
    assert 0.85 * found["budget"] < found["reserved"] <= found["budget"] / 0.98  # of a margin of 2 %
    assert found["errors"] < 1


@pytest.mark.slow
def test_the_size_of_training_is_not_cut_where_validation_fits(trained: Any) -> None:
    sizes = {name: found["planned"] for name, found in trained.items()}
    assert sizes["larger images, without validation"] >= sizes["the same images"] > 500
    assert sizes["few of them"] < sizes["the same images"]  # ten larger images, whatever the size of training
    assert sizes["of their own size"] == sizes["larger images, without validation"]  # the user's own, not to be planned
    assert max(trained["few of them"]["val"]) == 10
    assert trained["eight times the batch"]["val"][-1] == 8 * sizes["eight times the batch"]
