"""Ranks that fail or go while they plan: none is waited for over 30 seconds, and all go on with the same batch size."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from lightning_memplan.lightning import ranks
from lightning_memplan.lightning.ranks import over_ranks, planning_together, store_of_ranks
from tests.paths import PROGRAMS
from tests.programs.injected_cases import LIBRARY, USER
from tests.programs.two_ranks import KINDS, RESUMED, SILENCE

#: by kind: what rank 0 says, or rank 1 where rank 0 is gone
GONE = "rank 1 is gone: it has given no sign of life for 4 seconds"
NOT_BEGUN = "rank 1 has not begun to plan within 4 seconds: it is gone, or has no planner"
SAID = {
    "all is well": "",
    "killed": GONE,
    "the first is killed": "the store of the process group cannot be reached: rank 0, which holds it, is gone",
    "os._exit": GONE,
    "sys.exit": "rank 1: SystemExit: 3 at ",
    "raises while planning": 'rank 1: KeyError: "a mistake of the user\'s" at ',
    "the first raises while planning": 'rank 0: KeyError: "a mistake of the user\'s" at ',
    "raises between two exchanges": "rank 1: RuntimeError: no vote is cast at ",
    "slow, and alive": "",
    "stalled, and back": GONE,
    "killed before planning": NOT_BEGUN,
    "raises before planning": NOT_BEGUN,
    "has no planner": NOT_BEGUN,
}
#: no rank of these is left without its peer: both train to the end
BOTH_TRAIN = {
    "all is well",
    "raises while planning",
    "the first raises while planning",
    "raises between two exchanges",
    "slow, and alive",
    "stalled, and back",
    "has no planner",
}
FAST = ["all is well", "killed", "raises while planning", "raises between two exchanges"]


def shown(*kinds: str) -> dict[str, list[dict[str, Any]]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAMS / "two_ranks.py"), *kinds],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("SHOWN ")]
    return {row["kind"]: row["ranks"] for row in rows}


def check(kind: str, found: list[dict[str, Any]]) -> None:
    planned = 6 if not SAID[kind] else None  # the smaller of 6 and 8
    size = planned or 4
    for rank in found:
        assert rank["planned"] == planned
        assert rank["size"] == size
        assert rank["threads"] == []
        if kind in BOTH_TRAIN:
            assert rank["ended"] == ""
            assert rank["seen"] == [size] * (24 // size)  # 48 samples on two ranks
        # planning and training take seconds; what is waited for beyond them is SILENCE, a beat and a poll
        assert rank["seconds"] < (3 if "back" in kind or "slow" in kind else 1) * SILENCE + 20
    if not SAID[kind]:
        assert all(rank["said"] == rank["keys"] == [] for rank in found)  # nothing is left in the store
        return
    said = [text for rank in found for text in rank["said"]]
    assert len(said) == 1  # of all ranks together
    assert said[0].startswith(f"MemoryPlanner: the batch size is not planned: {SAID[kind]}")
    assert "Training goes on with the user's own batch size" in said[0]
    if kind in BOTH_TRAIN:
        assert len(found) == 2


def test_a_rank_that_is_gone_is_not_waited_for_and_one_that_fails_is_told_of_at_once() -> None:
    for kind, found in shown(*FAST).items():
        check(kind, found)


@pytest.mark.slow
def test_all_ranks_go_on_with_one_batch_size_whichever_way_one_of_them_goes() -> None:
    found = shown(*(kind for kind in KINDS if kind not in FAST))
    assert set(found) | set(FAST) == set(SAID) == set(KINDS)
    for kind, rows in found.items():
        check(kind, rows)


REFUSED = "rank {}: the checkpoint's batch size does not fit here"
RESUMED_WITH = {  # the batch size, and what is said
    "kept": (4, ""),
    "the second refuses": (8, REFUSED.format(1)),
    "the first refuses": (8, REFUSED.format(0)),
    "the second cannot set it": (8, "rank 1: RuntimeError: it is read only"),
}


@pytest.mark.slow
def test_a_checkpoints_batch_size_is_kept_by_all_ranks_or_by_none() -> None:
    found = shown(*RESUMED)
    assert set(found) == set(RESUMED)
    for rank in found.pop("the second refuses, and that is raised"):
        error = ("StoppedByRankError: ", "DoesNotFitError: ")[rank["rank"]]  # as the other rank sees it, and its own
        assert rank["ended"].startswith(error)
        assert "the checkpoint's batch size does not fit here" in rank["ended"]
    for kind, rows in found.items():
        size, reason = RESUMED_WITH[kind]
        for rank in rows:
            assert (rank["ended"], rank["planned"], rank["size"]) == ("", size, size)
            assert rank["seen"] == [size] * (24 // size)  # 48 samples on two ranks
        said = [text for rank in rows for text in rank["said"]]
        if reason:
            (text,) = said
            assert text.startswith(f"MemoryPlanner: the checkpoint's batch size is not kept: {reason}")
            assert "Training resumes with the planned batch size 8" in text
        else:
            assert said == []


def check_injected(ranks: list[dict[str, Any]]) -> None:
    place, planned = ranks[0]["place"], ranks[0]["planned"]
    assert ranks[1]["struck"], place
    for rank in ranks:
        assert rank["ended"] == ""
        assert rank["planned"] == planned
        assert rank["seen"] == ([8, 4] if planned else [2] * 6), place  # 24 samples on two ranks
        assert rank["seconds"] < 20
    said = [text for rank in ranks for text in rank["said"]]
    assert len(said) <= 1
    if not planned:
        assert said[0].startswith("MemoryPlanner: the batch size is not planned: rank 1: ")
        assert place in said[0] or ranks[1]["kind"] in said[0]


def test_an_exception_in_one_of_two_ranks_leaves_none_waiting() -> None:
    found = shown("injected", "dataset.__getitem__", "training_step", "ranks exchange", "batch_size is set")
    assert len(found) == 4
    for ranks_found in found.values():
        check_injected(ranks_found)


@pytest.mark.slow
@pytest.mark.further
def test_an_exception_anywhere_in_one_of_two_ranks_leaves_none_waiting() -> None:
    found = shown("injected", *USER, *LIBRARY)
    assert len(found) == len({*USER, *LIBRARY})
    for ranks_found in found.values():
        check_injected(ranks_found)


def test_no_wait_is_over_30_seconds() -> None:
    assert ranks.SILENCE + 2 * ranks.BEAT + 1 < 30  # the last beat, and a poll each quarter of a second


def test_one_rank_exchanges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_Session", None)  # which is not made
    with planning_together():
        assert over_ranks("alone") == ["alone"]
    assert store_of_ranks() is None


@pytest.fixture
def group(tmp_path: Any) -> Any:
    """A process group of one rank."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_the_process_group_has_a_store_where_we_look_for_it(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """``_get_default_store`` is torch's own: where it moves, this fails, and the planner waits on collectives."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    store = store_of_ranks()
    assert store.compare_set("memplan/none", "none", "none") == b"none"  # no value, and none is set
    assert not store.check(["memplan/none"])


def test_a_group_without_a_store_exchanges_by_its_collective(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_store() -> Any:
        raise ValueError("MPI has none")

    def gather(values: list[Any], value: Any) -> None:
        values[:] = [value, "theirs"]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", no_store)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with planning_together():
        assert over_ranks("mine") == ["mine", "theirs"]
