"""An exception at each call that planning and measuring make into user code and libraries: training goes on.

With the user's batch size and one warning that names the place, or with a plan by another way. The steps are measured.
``MEMPLAN_SWEEP="SEED COUNT"`` takes other calls, or more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.paths import PROGRAMS
from tests.programs import injected_cases
from tests.programs.injected_cases import (
    KINDS,
    LIBRARY,
    MEASURING,
    ON_GPU,
    USER,
    Active,
    calls,
    fit,
    injected,
    planner_on,
    wrong,
)
from tests.programs.interrupted_cases import POINTS

CPU = {"accelerator": "cpu"}
GPU = {"accelerator": "gpu", "devices": 1}
CARD = {"NULLGPU_MEMORY": 2**31, "NULLGPU_CONTEXT": 100 * 2**20}  # 2 GiB: nothing large is run
SEED, COUNT = (int(number) for number in os.environ.get("MEMPLAN_SWEEP", "1 12").split())


@pytest.mark.parametrize("place", [*USER, *LIBRARY])
def test_training_goes_on(place: str) -> None:
    assert wrong(injected(place, CPU)) == []


def test_there_are_places_and_kinds_enough() -> None:
    assert len({*USER, *LIBRARY, *ON_GPU, *MEASURING}) >= 60
    assert len(KINDS) >= 11


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_kind_of_exception_is_one_warning(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(injected_cases, "KINDS", (kind,))
    row = injected("dataset.__getitem__", CPU)
    assert wrong(row) == []
    assert row["planned"] is None
    assert row["kind"] == kind.__name__


def test_any_call_may_fail() -> None:
    """In a process of its own, since torch ends it where some functions raise that it calls in C++."""
    program = [sys.executable, "-W", "ignore", str(PROGRAMS / "injected_cases.py"), json.dumps(CPU)]
    done = subprocess.run([*program, "sweep", str(SEED), str(COUNT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("SHOWN ")]
    assert len(rows) == COUNT
    assert [(row["place"], row["nth"], row["kind"], row["wrong"]) for row in rows if row["wrong"]] == []
    assert sum(row["struck"] for row in rows) >= 0.6 * len(rows)  # it is the same run, but for what is cached


def test_the_sweep_finds_the_calls_that_planning_makes() -> None:
    found = calls(CPU)
    assert len(found) > 300
    for name in ("Samples.__getitem__", "collate", "Net.training_step", "Net.configure_optimizers", "Net.setup"):
        assert any(place.endswith(name) for place in found), name


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("place", ["dataset.__getitem__", "training_step"])
def test_what_ends_a_process_is_passed_on(place: str, kind: type[BaseException]) -> None:
    def strike() -> None:
        if Active.in_planner:
            raise kind("now")

    POINTS.arm(place, strike, again=True)
    try:
        row = fit(CPU, planner_on(CPU))
    finally:
        POINTS.disarm()
    ended = "SystemExit" if kind is KeyboardInterrupt else kind.__name__  # Lightning ends the process on Ctrl+C
    assert row["ended"].startswith(ended)
    assert row["seen"] == []
    assert row["said"] == []


def test_training_goes_on_and_is_measured_on_a_gpu(nullgpu: Any) -> None:
    places = [*ON_GPU, *MEASURING, "dataset.__getitem__", "training_step", "setup", "deepcopy", "the plan is printed"]
    rows = shown(nullgpu, *places)
    assert [(row["place"], row["kind"], row["wrong"]) for row in rows if row["wrong"]] == []
    assert [row["place"] for row in rows] == places


@pytest.mark.slow
def test_training_goes_on_on_a_gpu_wherever_the_user_or_a_library_fails(nullgpu: Any) -> None:
    rows = shown(nullgpu, *USER, *LIBRARY) + shown(nullgpu, "sweep", str(SEED), str(2 * COUNT))
    assert [(row["place"], row["kind"], row["wrong"]) for row in rows if row["wrong"]] == []


def shown(nullgpu: Any, *places: str) -> list[dict[str, Any]]:
    program = str(PROGRAMS / "injected_cases.py")
    done = nullgpu([sys.executable, "-W", "ignore", program, json.dumps(GPU), *places], timeout=500, **CARD)
    return [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("SHOWN ")]
