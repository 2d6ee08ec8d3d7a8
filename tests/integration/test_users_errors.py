"""A mistake of the user's is raised by training: the same type, text and line as without the planner."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest

from lightning_memplan.errors import explain, first_line, located
from tests.paths import PROGRAMS
from tests.programs.mistakes import MISTAKES, ON_GPU, LogsWrongly, Right, ShowsTensors, compared

#: words of fake tensors, which no user has written
FAKE = re.compile(r"[Ff]ake|\bmeta\b|[Pp]roxy|subclass")


def check(found: dict[str, Any]) -> None:
    without = found["without"]
    for planner in (found["default"], found["applied"]):
        assert [planner[name] for name in ("type", "text", "line")] == [
            without[name] for name in ("type", "text", "line")
        ]
        assert len(planner["said"]) <= 1
        assert not any(FAKE.search(text) for text in planner["said"]), planner["said"]


@pytest.mark.parametrize("kind", MISTAKES, ids=lambda kind: kind.__name__)
def test_training_raises_it_as_without_the_planner(kind: type[Right]) -> None:
    found = compared(kind, {"accelerator": "cpu"})
    assert bool(found["without"]["type"]) == (kind not in ON_GPU)
    check(found)


def test_training_raises_it_on_a_gpu(nullgpu: Any) -> None:
    program, settings = str(PROGRAMS / "mistakes.py"), json.dumps({"accelerator": "gpu", "devices": 1})
    shows = (ShowsTensors, LogsWrongly)  # what a tensor holds, which is nothing on a null GPU
    names = [kind.__name__ for kind in MISTAKES if kind not in shows]
    done = nullgpu([sys.executable, "-W", "ignore", program, settings, *names], timeout=500, NULLGPU_MEMORY=2**31)
    rows = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("SHOWN ")]
    assert [row["kind"] for row in rows] == names
    for row in rows:
        assert row["without"]["type"], row["kind"]
        check(row)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("got FakeTensor(..., size=(2,)) and FakeTensor(..., device='cuda:0', size=(3, 4), grad_fn=<Mul>)",
         "got a tensor of shape (2,) and a tensor of shape (3, 4) on cuda:0"),
        ("Unhandled FakeTensor Device Propagation for aten.add.Tensor, found two different devices cuda:0, cpu",
         "aten.add.Tensor, found two different devices cuda:0, cpu"),
        ("Cannot copy out of meta tensor; no data!", "the value of a tensor is not known before training"),
        ("Expected all tensors on one device, found cpu and device='meta'",
         "Expected all tensors on one device, found cpu and no device"),
        ("metadata of the dataset is missing", "metadata of the dataset is missing"),
    ],
)  # fmt: skip
def test_words_of_fake_tensors_are_put_plainly(text: str, plain: str) -> None:
    assert first_line(RuntimeError(text)) == plain


class FakeTensorMismatchError(RuntimeError):
    """As torch names its own."""


def test_an_error_of_fake_tensors_has_the_name_of_its_base() -> None:
    error = FakeTensorMismatchError("two devices")
    assert located(error) == "RuntimeError: two devices"
    assert explain(error).startswith("the step failed in a trace (RuntimeError: two devices)")
