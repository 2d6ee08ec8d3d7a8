"""Data pipelines train with the planner as without it: a fixed sample of ``benchmarks/pipelines``, on the null GPU."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.pipelines import shrink
from benchmarks.pipelines.__main__ import table
from benchmarks.pipelines.choose import AXES, Pipeline, draw, mended, parse
from benchmarks.pipelines.datasets import numbers_of
from benchmarks.pipelines.supervise import Row, rows_of
from benchmarks.pipelines.verdict import failure, outcome

SAMPLE = [str(draw(seed)) for seed in range(8)]

FURTHER = [str(draw(seed)) for seed in range(8, 30)]

#: the smallest pipelines that once failed
FAILED = [
    "data=some_none collate=drops count=61 memory=large",  # planned with a fifth of the samples left out, and more came
    "collate=even loader=background",  # hung: a refused number of samples ends the loader's thread
    "drop_last=True loader=wrapper holder=hparams",  # no batch: 65,536 samples, of which the last batch is dropped
    "data=batched_stream collate=own combined=min_size",  # predicted for as many samples of each
    "sampler=own_batches combined=dict",  # not planned: the rest of an epoch came first
    "loader=keeps_size holder=kept_loader",  # stopped: the hook returns a loader that cannot be resized
    "drop_last=True combined=list second=equal limit=0.5",  # stopped: half of one loader's only batch
    "data=own_iterator validates=True interval=2",  # no validation: an epoch of one batch, and no second
    "data=stream validates=True limit=3",  # no validation: it comes after the third batch
    "loader=wrapper holder=hparams validates=True interval=2",  # stopped: an epoch of one batch, and no second
]


@pytest.fixture(scope="module")
def rows(nullgpu: Any) -> dict[str, Row]:
    return {row["pipeline"]: row for row in rows_of(SAMPLE + FAILED)}


@pytest.mark.slow
@pytest.mark.parametrize("text", SAMPLE + FAILED)
def test_a_pipeline_trains_with_the_planner(rows: dict[str, Row], text: str) -> None:
    assert rows[text]["failed"] == ""
    if text in FAILED:
        assert not rows[text]["outcome"].startswith("left out")


@pytest.mark.slow
@pytest.mark.further
def test_further_pipelines_train_with_the_planner(nullgpu: Any) -> None:
    assert {row["pipeline"]: row["failed"] for row in rows_of(FURTHER)} == dict.fromkeys(FURTHER, "")


def test_most_choices_are_in_the_sample() -> None:
    drawn = [parse(text).choices() for text in SAMPLE + FURTHER]
    chosen = {(axis, value) for choices in drawn for axis, value in choices.items()}
    others = {(axis, value) for axis, values in AXES.items() for value in values[1:]}
    assert len(chosen & others) > 0.6 * len(others)


def test_a_seed_draws_one_pipeline_whose_choices_go_together() -> None:
    drawn = [draw(seed) for seed in range(300)]
    assert drawn == [draw(seed) for seed in range(300)]
    assert len(set(drawn)) > 290
    for p in drawn:
        assert mended(p) == p == parse(str(p))
        assert not (p.streams and p.sampler != "in_order")
        assert not (p.leaf == "sequence" and p.collate == "default")


def test_a_choice_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="'workers=9' is no choice: workers has 0, 1, 2"):
        parse("data=stream workers=9")


def test_the_samples_of_an_epoch() -> None:
    assert numbers_of(Pipeline(data="subset", count=7)) == [5, 6, 7, 8, 9, 10, 11]
    assert numbers_of(Pipeline(data="corrupt", count=7)) == [1, 2, 3, 4, 5, 6]


#: eight samples in batches of four, two epochs
PLAIN = {"error": "", "epochs": [[[0, 1, 2, 3], [4, 5, 6, 7]]] * 2, "validations": 2, "steps": 4, "seconds": 0.1}
ALL = [list(range(8))]
WITH = {**PLAIN, "epochs": [ALL, ALL], "steps": 2, "method": "probe", "batch_size": 8, "said": [], "notes": []}
VERDICTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "the same samples": ({}, {}, ""),
    "an error": ({}, {"error": "TypeError: a"}, "TypeError: a"),
    "a sample lost": (
        {},
        {"epochs": [[list(range(7))]] * 2, "batch_size": 7},
        "samples: 7 in an epoch, not 8; lost [7]",
    ),
    "a sample twice": (
        {},
        {"epochs": [[[*range(8), 0]]] * 2, "batch_size": 9},
        "samples: seen more than once: {0: 2}",
    ),
    "drawn with replacement": ({"sampler": "weighted"}, {"epochs": [[[0, 0, 0, 0, 1, 1, 1, 1]], ALL]}, ""),
    "a rest dropped": ({"drop_last": True}, {"epochs": [[[0, 1, 2, 3, 4]]] * 2, "batch_size": 5}, ""),
    "more than a rest dropped": (
        {"drop_last": True},
        {"epochs": [[[0, 1, 2]]] * 2, "batch_size": 3},
        "samples: 5 are dropped, with batches of 3",
    ),
    "an epoch lost": ({}, {"epochs": [ALL]}, "epochs: 1, not 2"),
    "an epoch without a batch": ({}, {"epochs": [ALL, []]}, "epochs: [[8], []], one without a batch"),
    "a validation lost": ({}, {"validations": 1}, "validations: 1, not 2"),
    "another size": ({}, {"batch_size": 16}, "size: 16 samples are announced, and the first batch has 8"),
    "another size, which is said": ({}, {"batch_size": 16, "said": ["16 samples a batch were planned and set"]}, ""),
    "no word": ({}, {"batch_size": None, "method": None}, "size: nothing is planned, without a word"),
    "another size later": (
        {},
        {"epochs": [ALL, PLAIN["epochs"][0]]},
        "size: the first batches of epochs have [4, 8]",
    ),
}


@pytest.mark.parametrize("kind", VERDICTS)
def test_the_verdict_on_a_pipeline(kind: str) -> None:
    choices, found, reason = VERDICTS[kind]
    p = Pipeline(**{"count": 8, "validates": True, **choices})
    assert failure(p, PLAIN, {**WITH, **found}) == reason


def test_a_pipeline_that_does_not_train_by_itself_is_left_out() -> None:
    stopped = {**WITH, "error": "TypeError: a"}
    for plain in ({**PLAIN, "error": "ValueError: b"}, {**PLAIN, "epochs": [[], []], "steps": 0}):
        assert failure(Pipeline(), plain, stopped) == ""
        assert outcome(plain, stopped, "").startswith("left out")
    assert outcome(PLAIN, stopped, "TypeError: a") == "stopped"
    assert outcome(PLAIN, {**WITH, "error": "no answer within 9 s"}, "no answer within 9 s") == "hung"
    assert outcome(PLAIN, WITH, "") == "planned by probe"


def test_a_failure_is_shrunk_to_the_choices_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(texts: list[str], limit: float) -> list[Row]:
        needed = {"data=stream", "workers=2"}
        return [{"pipeline": text, "outcome": "hung" if needed <= set(text.split()) else "planned"} for text in texts]

    monkeypatch.setattr(shrink, "rows_of", rows)
    drawn = Pipeline(data="stream", workers=2, persistent=True, holder="hparams", count=37, clip=1.0)
    assert str(shrink.shrunk(drawn, "hung", 1.0)) == "data=stream workers=2"


def test_the_table_counts_verdicts_and_lists_failures() -> None:
    row = {"pipeline": "workers=2", "outcome": "planned by probe", "failed": "", "seed": 1, "runs": {"default": WITH}}
    hung = {**row, "seed": 7, "outcome": "hung", "failed": "no answer within 60 s", "smallest": "workers=1"}
    assert table([row, row, hung]).splitlines() == [
        "    2 planned by probe",
        "    1 hung",
        "    3 pipelines, 0 s",
        "FAIL seed 7: hung",
        "     workers=1",
        "     no answer within 60 s",
    ]
