"""Batch sizes that fit and that the step refuses, or at which it does something else: traced at that very size."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import lightning_memplan as mp
from lightning_memplan.cli.main import main
from lightning_memplan.data.samples import read_samples
from lightning_memplan.errors import MemplanError
from lightning_memplan.memory.allocator import replay
from lightning_memplan.planning.job import training_job
from lightning_memplan.planning.retrace import retrace_at
from lightning_memplan.step.setup import TrainingSetup
from lightning_memplan.trace.tracer import trace_steps
from tests.paths import PROGRAMS
from tests.programs.retrace_cases import (
    WIDTH,
    Does,
    at_most_1000,
    by_eights,
    by_sixtyfours,
    in_quarters,
    in_thirds,
    into_a_queue,
    twice_if_many,
)

CARD = mp.Device("a card", total=2**27)
BATCH = torch.zeros(4, WIDTH)


def planned(step, **limits):
    return mp.plan(Does(step), BATCH, device=CARD, method="trace", **limits)


@pytest.mark.parametrize(
    ("step", "limits", "size", "error"),
    [
        # of 3 · 4 MiB for weights and Adam's moments, 16 MiB for the queue, the rest for batches of 4 KiB a sample
        (by_eights, {"max_batch_size": 1003}, 1000, "AssertionError: a batch is of eights"),
        (by_eights, {"max_batch_size": 1003, "multiple_of": 3}, 984, "AssertionError: a batch is of eights"),
        (by_eights, {"effective_batch_size": 3000, "max_batch_size": 750}, 600, "AssertionError: a batch is of eights"),
        (in_thirds, {"max_batch_size": 1003}, 1002, "RuntimeError: shape '[3, -1, 1024]' is invalid for input of"),
        (into_a_queue, {"max_batch_size": 1003}, 512, "AssertionError: no message"),
        # 992 runs, 1008 does not, and no more than a 32nd is open
        (at_most_1000, {}, 992, "AssertionError: no message"),
    ],
)
def test_the_largest_batch_size_that_the_step_takes_is_planned(step, limits, size, error):
    found = planned(step, **limits)
    assert (found.batch_size, found.limited_by) == (size, "step")
    (note,) = (note for note in found.notes if "the step refuses them" in note)
    assert error in note
    assert "retrace_cases.py" in note
    assert note.endswith(f": {size} is the largest of those tried that suits it")
    assert "limited by the step itself" in mp.plan_table(found)


def test_a_step_that_takes_the_size_is_planned_as_it_was():
    found = planned(by_eights, max_batch_size=1000)
    assert (found.batch_size, found.limited_by) == (1000, "max_batch_size")
    assert not any("refuses" in note for note in found.notes)


def test_a_limit_that_leaves_no_size_that_the_step_takes():
    with pytest.raises(
        MemplanError, match=r"1003 samples fit, and the step refuses them \(.*a batch is of eights.*\); no"
    ):
        planned(by_eights, min_batch_size=1001, max_batch_size=1003)


@pytest.mark.parametrize("step", [by_sixtyfours, twice_if_many, in_quarters])
def test_a_step_that_does_something_else_at_a_size_is_known_there(step):
    module, size = Does(step), 1003
    found = mp.estimate(module, BATCH, method="trace")
    known = retrace_at(found, size, training_job(module, BATCH))
    (trace,) = trace_steps(TrainingSetup(module), read_samples(BATCH).batches((size,))).traces
    whole = replay([(event.block, event.size, event.stream) for event in trace.events])
    assert known.peak_allocated(size) == whole.peak_allocated
    assert known.peak_allocated(size) != found.peak_allocated(size)
    assert sum(known.breakdown(size).values()) == known.peak_allocated(size)
    assert max(known.phases(size).values()) == known.peak_allocated(size)
    assert known.peak(size - 1) == found.peak(size - 1)


def test_a_size_that_takes_more_than_expected_is_not_planned():
    found = planned(twice_if_many)
    assert (found.batch_size > 500, found.limited_by) == (True, "memory")
    assert found.peak_reserved <= found.budget
    assert "samples were expected to fit, and a trace of so many takes more memory than" in found.notes[-1]


def test_an_error_that_no_size_avoids_is_the_steps_own():
    with pytest.raises(mp.TraceError, match="cannot be traced: the step failed in a trace"):
        planned(lambda module, x: module.net(x[:, :3]).mean())


def test_check_refuses_what_the_step_refuses(monkeypatch, capsys):
    monkeypatch.syspath_prepend(PROGRAMS)
    check = "check retrace_cases:of_eights --input 1024 --gpu T4 --method trace --batch-size".split()
    assert main([*check, "64"]) == 0
    assert "fits on T4 at batch size 64" in capsys.readouterr().out
    assert main([*check, "65"]) == 2
    assert "65 samples fit, and the step refuses them (" in capsys.readouterr().err


def test_what_is_set_trains_on_the_null_gpu(nullgpu):
    """512 MiB, of which a context takes 64: 448 MiB, and 5 % are left free."""
    done = nullgpu([sys.executable, str(PROGRAMS / "retrace_cases.py")], NULLGPU_MEMORY=2**29, NULLGPU_CONTEXT=2**26)
    shown = json.loads(done.stdout.strip().splitlines()[-1])
    for found in shown.values():
        assert found["measured"] == found["predicted"]
    sizes = {name: found["batch_size"] for name, found in shown.items()}
    assert sizes["by_eights trace"] % 8 == sizes["in_thirds trace"] % 3 == 0
    assert sizes["into_a_queue trace"] == sizes["into_a_queue auto"] == 4096
    assert 1000 * 31 / 32 <= sizes["at_most_1000 trace"] <= 1000
    used = [found["used"] for name, found in shown.items() if found["limited_by"] == "memory" and "sixty" not in name]
    assert len(used) == 4
    assert min(used) > 0.95
