"""Jobs that train without the planner train with it: a fixed sample of ``benchmarks/robustness``, on the null GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.robustness.__main__ import Row, counted, rows_of, sample
from benchmarks.robustness.job import JOBS, job
from benchmarks.robustness.jobs import JOBS as ALL
from benchmarks.robustness.supervise import run_jobs
from benchmarks.robustness.verdict import doubts, failure, outcome

SAMPLE = sample(18)


@pytest.fixture(scope="module")
def rows(nullgpu: Any) -> dict[str, Row]:
    return {row["name"]: row for row in rows_of(SAMPLE, limit=120)}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_job_trains_with_the_planner(rows: dict[str, Row], name: str) -> None:
    assert rows[name]["failed"] == ""


def test_the_sample_has_most_kinds() -> None:
    assert len(SAMPLE) == len(set(SAMPLE)) == 18
    assert len({ALL[name].kind for name in SAMPLE}) >= 16


def test_known_limits_are_few_and_counted_apart() -> None:
    limits = [name for name, each in ALL.items() if each.limit]
    assert len(limits) <= 5
    assert not set(limits) & set(SAMPLE)
    row = {"limit": "a hook twice", "outcome": "stopped", "failed": "default: OSError"}
    assert counted(row) == "stopped, a known limit"
    assert counted({**row, "failed": "", "outcome": "planned by probe"}) == "planned by probe: no limit any longer"
    assert counted({**row, "limit": ""}) == "stopped"


def test_there_are_jobs_enough() -> None:
    assert ALL is JOBS
    assert len(ALL) >= 150


PAGE = (Path(__file__).parents[2] / "docs" / "never_worse.md").read_text()


@pytest.mark.parametrize("kind", sorted({each.kind for each in ALL.values()}))
def test_every_kind_stands_in_the_docs(kind: str) -> None:
    assert f"\n| {kind} | " in PAGE


def test_the_docs_name_tests_that_are_there() -> None:
    there = {path.name for path in Path(__file__).parents[1].rglob("test_*.py")}
    named = set(re.findall(r"`(?:tests/\w+/)?(test_\w+\.py)`", PAGE))
    assert len(named) > 15
    assert named - there == set()


def test_two_jobs_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two jobs are named lock"):
        job("a kind", name="lock")(dict)


def test_a_job_that_does_not_answer_hangs(nullgpu: Any) -> None:
    ((_, runs),) = run_jobs(["lock"], limit=0.1)  # its process takes seconds to start
    assert runs["without"]["error"] == "no answer within 0 s"


PLAIN = {"error": "", "epochs": [[4, 4], [4, 4]], "validations": 2, "said": [], "seconds": 0.1}
VERDICTS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "the same": ({}, {}, "", "user's size, without a word"),
    "another size": ({"epochs": [[8], [8]], "method": "probe", "batch_size": 8}, {}, "", "planned by probe"),
    "stopped": ({"error": "TypeError: a"}, {}, "default: TypeError: a", "stopped"),
    "hung": ({}, {"error": "no answer within 9 s"}, "apply=False: no answer within 9 s", "hung"),
    "samples lost": (
        {"epochs": [[6], [6]]},
        {},
        "default: samples by epoch [6, 6], not [8, 8]",
        "samples lost",
    ),
    "an epoch lost": ({"epochs": [[8]]}, {}, "default: samples by epoch [8], not [8, 8]", "samples lost"),
    "other steps with apply=False": (
        {},
        {"epochs": [[8], [8]]},
        "apply=False: batches [[8], [8]], not [[4, 4], [4, 4]]",
        "samples lost",
    ),
    "validation lost": ({"validations": 1}, {}, "default: 1 validations, not 2", "samples lost"),
    "a warning": ({"said": ["MemoryPlanner: not planned"]}, {}, "", "user's size, with a warning"),
}


@pytest.mark.parametrize("kind", VERDICTS)
def test_the_verdict_on_runs(kind: str) -> None:
    default, off, reason, word = VERDICTS[kind]
    runs = {"without": PLAIN, "default": {**PLAIN, **default}, "apply=False": {**PLAIN, **off}}
    assert failure(runs, "same") == reason
    assert outcome(runs, reason) == word


def test_a_job_that_does_not_train_by_itself_is_wrong() -> None:
    runs = {way: {**PLAIN, "error": "ValueError: a"} for way in ("without", "default", "apply=False")}
    reason = failure(runs, "same")
    assert reason == "the job is wrong, it does not train without the planner: ValueError: a"
    assert outcome(runs, reason) == "wrong job"


def test_more_samples_are_allowed_where_that_is_said() -> None:
    more = {**PLAIN, "epochs": [[12], [12]]}
    runs = {"without": PLAIN, "default": more, "apply=False": PLAIN}
    assert failure(runs, "more") == failure(runs, "any") == ""
    assert failure(runs, "same") == "default: samples by epoch [12, 12], not [8, 8]"


def test_a_size_that_training_does_not_have_is_a_doubt() -> None:
    planned = {**PLAIN, "method": "probe", "batch_size": 16, "measured": 0}
    said = doubts({"without": PLAIN, "default": planned, "apply=False": {**PLAIN, "measured": 2}})
    assert said == ["announced 16, trained 4", "default: no step is measured"]
