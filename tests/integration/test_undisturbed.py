"""Planning leaves every kind of module as it was, to the bit: by trace on the CPU, by probe on the null GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import lightning_memplan as mp
from tests.paths import PROGRAMS
from tests.programs.undisturbed_cases import KINDS, Buffers, difference, picture, shown

CARD = mp.Device("a card", total=2**33)


@pytest.mark.filterwarnings("ignore:Found . module.s. in eval mode")
@pytest.mark.parametrize("name", KINDS)
def test_a_trace_leaves_it_as_it_was(name):
    found = shown(name, accelerator="cpu", planner={"method": "trace", "device": CARD})
    assert found["changed"] == ""
    assert found["threads"] == 0
    assert found["method"] == "trace"


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.count.add_(1),
        lambda module: module.head.eval(),
        lambda module: setattr(module, "own", 1),
        lambda module: module.head.register_forward_hook(print),
        lambda module: setattr(module, "table", module.table.clone()),
    ],
)
def test_a_change_would_be_seen(change):
    module = Buffers()
    before = picture(module)
    assert difference(before, picture(module)) == ""
    change(module)
    assert difference(before, picture(module)).startswith("differs at ")


@pytest.fixture(scope="module")
def probed(nullgpu):
    source, script = str(Path(mp.__file__).parents[1]), str(PROGRAMS / "undisturbed_cases.py")
    done = nullgpu([sys.executable, script], PYTHONPATH=source, NULLGPU_MEMORY=3 * 10**9)
    rows = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("SHOWN ")]
    return {row["name"]: row for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_probe_leaves_it_as_it_was(probed, name):
    found = probed[name]
    assert "error" not in found, found["error"]
    assert (found["changed"], found["threads"]) == ("", 0)
    assert found["confirmed"] is not None
