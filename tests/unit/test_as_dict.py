"""Results as plain data: every field of every result, and the page that documents them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

import lightning_memplan as mp
from lightning_memplan import types
from lightning_memplan.types import EstimateRow, Filters, Range, RunRecord, as_dict

PAGE = (Path(__file__).resolve().parents[2] / "docs/command_line.md").read_text()

DEVICE = mp.Device("GPU", 2**34, 2**33, 2**30, 0, "GPU-1", (8, 6), 2**32, "cuda")
PEAKS = mp.Peaks(2**31, 2**32, {"forward": 2**30, "backward": 2**31})
LENGTH = mp.Length(512, 20, 2**33, "memory")
#: one of each result, with a value in each field
RESULTS = [
    mp.Advice("precision", "precision='bf16-mixed'", "half precision", 8, 2**30, 2**31, 2**30, 16, 700_000_000),
    DEVICE,
    EstimateRow(8, 2**32, 2**31, 2**33, "backward", {"batch": 2**31}, {"backward": 2**31}, Range(1, 2, 3)),
    Filters(27, 1, 1, 30),
    mp.Layer("conv", "Conv3d", 810, 3240, 3240, (30, 191), 993_742_440, (Filters(27, 1, 1, 30),), "no bias"),
    LENGTH,
    mp.Lengths((LENGTH,), DEVICE, 2**33),
    mp.Measurement(3, 99, 110, 100, 110, {"forward": 50}, {"forward": 51}, 40, 1, 2, 120, 130),
    PEAKS,
    mp.Plan(
        batch_size=8,
        device=DEVICE,
        budget=2**33,
        margin=0.05,
        limited_by="memory",
        method="trace",
        peak_reserved=2**32,
        peak_allocated=2**31,
        formula_peak=2**33,
        phase="backward",
        breakdown={"batch": 2**31},
        accumulate_grad_batches=4,
        notes=("a note",),
        methods={"trace": 2**32},
        effective_batch_size=64,
        confirmed=2**32,
        reserved_range=Range(2**31, 2**32, 2**33),
        nccl=700_000_000,
    ),
    Range(20, 22, 25),
    RunRecord(
        *("a1", "Net", "T4", 2**34, 2**33, "trace", 8, {"first": (100, 200)}, {"first": (90, 200)}, "stopped", 3, 1),
        *(0.05, {"capability": (8, 6)}, {"torch": "2.14"}, "2026-11-20T08:00:00+00:00", 1, 2, {"forward": (10, 11)}),
    ),
]

#: properties that are data as well
DERIVED = {
    "Device": ["capacity"],
    "Filters": ["per_filter", "apart"],
    "Length": ["tokens"],
    "Lengths": ["token_budget"],
    "Measurement": ["error_percent"],
    "Peaks": ["phase"],
}


def names_of(kind: Any) -> list[str]:
    fields = list(kind._fields) if hasattr(kind, "_fields") else [field.name for field in dataclasses.fields(kind)]
    return fields + DERIVED.get(kind.__name__, [])


def type_name(value: object) -> str:
    return type(value).__name__


def test_every_result_is_here() -> None:
    named = [getattr(mp, name) for name in mp.__all__]
    public = {value.__name__ for value in named if isinstance(value, type) and value.__module__ == types.__name__}
    assert public <= {type_name(result) for result in RESULTS} == {kind.__name__ for kind in types._RESULTS}


@pytest.mark.parametrize("result", RESULTS, ids=type_name)
def test_every_field_is_in_the_data(result: Any) -> None:
    found = as_dict(result)
    assert list(found) == names_of(type(result))
    assert json.loads(json.dumps(found)) == found  # nothing but dictionaries with names, lists, texts and numbers
    for name in names_of(type(result)):
        value = getattr(result, name)
        assert value not in (None, "", (), {}), f"{name} has no value in this test"
        if isinstance(value, (bool, int, float, str)):
            assert found[name] == value
            assert type(found[name]) is type(value)


def test_results_within_a_result_are_data_as_well() -> None:
    (plan,) = (result for result in RESULTS if isinstance(result, mp.Plan))
    found = as_dict(plan)
    assert found["device"] == as_dict(DEVICE)
    assert found["device"]["capability"] == [8, 6]
    assert found["device"]["capacity"] == 2**32  # the limit
    assert found["reserved_range"] == {"low": 2**31, "expected": 2**32, "high": 2**33}
    assert found["notes"] == ["a note"]
    lengths = as_dict(mp.Lengths((LENGTH,), DEVICE, 2**33))
    assert lengths["rows"] == [
        {"length": 512, "batch_size": 20, "peak": 2**33, "limited_by": "memory", "tokens": 10240}
    ]
    assert lengths["token_budget"] == 512 * 20


def test_what_a_plan_has_not_is_null() -> None:
    plan = mp.Plan(8, mp.Device("GPU", total=2**34), 2**33, 0.05, "memory", "trace", 2**32, 2**31, 2**33)
    found = as_dict(plan)
    assert [found[name] for name in ("effective_batch_size", "confirmed", "reserved_range")] == [None, None, None]
    assert found["device"]["free"] is None


def test_a_setting_that_is_no_plain_value_is_its_text() -> None:
    run = RunRecord("a1", "Net", "T4", 1, 1, "trace", 8, {}, {}, settings={"strategy": Path("here")})
    assert as_dict(run)["settings"] == {"strategy": "here"}


@pytest.mark.parametrize("value", [3, "plan", {"batch_size": 8}, mp.Plan])
def test_what_is_no_result_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="is no result: give a Advice, Device"):
        as_dict(value)


@pytest.mark.parametrize("kind", types._RESULTS, ids=lambda kind: kind.__name__)
def test_the_page_names_every_field(kind: type) -> None:
    (row,) = re.findall(rf"^\| {kind.__name__} \| (.*) \|$", PAGE, flags=re.MULTILINE)
    assert re.findall(r"`(\w+)`", row) == names_of(kind)
