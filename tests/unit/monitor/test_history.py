"""The history of runs: its file, under several processes and with damage; and what margin it justifies."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lightning_memplan as mp
from lightning_memplan.cli.main import main
from lightning_memplan.monitor import history
from lightning_memplan.monitor.history import (
    ENOUGH,
    LEAST,
    RunSetup,
    append,
    history_path,
    latest,
    learn,
    lesson,
    remember,
    residual,
    run_record,
)
from lightning_memplan.monitor.meter import Forecast
from lightning_memplan.report.runs import history_table, lessons_table, run_report
from lightning_memplan.settings import Parallel, StepSettings
from lightning_memplan.types import Measurement, Peaks, Plan, RunRecord
from tests.paths import ROOT

GiB = 2**30


def run(ratio: float = 1.0, **changes: Any) -> RunRecord:
    """A run whose reserved peak was ``ratio`` of the 10 GiB that were predicted."""
    values: dict[str, Any] = {
        "structure": "a1",
        "model": "Net",
        "device": "T4",
        "total": 16 * GiB,
        "capacity": 15 * GiB,
        "method": "trace",
        "batch_size": 32,
        "predicted": {"first": (8 * GiB, 9 * GiB), "steady": (9 * GiB, 10 * GiB)},
        "measured": {"first": (8 * GiB, 9 * GiB), "steady": (9 * GiB, round(10 * GiB * ratio))},
        "steps": 100,
        "time": "2026-11-20T08:00:00+00:00",
    }
    if ratio < 1:
        values["measured"] = {kind: (int(a * ratio), int(r * ratio)) for kind, (a, r) in values["predicted"].items()}
    return RunRecord(**{**values, **changes})


def out_of_memory(**changes: Any) -> RunRecord:
    return run(**{"outcome": "out of memory", "measured": {}, "predicted": {"failed": (9 * GiB, 14 * GiB)}, **changes})


def taught(runs: list[RunRecord], prior: float = 0.05, **changes: Any) -> Any:
    values = {"structure": "a1", "device": "T4", "method": "trace", "capacity": 15 * GiB, **changes}
    return lesson(runs, values.pop("structure"), values.pop("device"), prior=prior, **values)


# ------------------------------------------------------------------------------------------------------------ the file


def test_what_is_appended_is_read(tmp_path):
    path = tmp_path / "new folder" / "runs.jsonl"
    runs = [run(), out_of_memory(settings={"precision": "16-mixed", "capability": [8, 6]}), run(1.02, rank=1, ranks=2)]
    for each in runs:
        append(each, path)
    assert mp.load_history(path) == runs
    assert [json.loads(line)["schema"] for line in path.read_text().splitlines()] == [1, 1, 1]


def test_the_history_is_where_the_environment_or_the_argument_says(monkeypatch, tmp_path):
    assert os.environ["MEMPLAN_HISTORY"] == "off"  # so that no test writes into the user's home
    assert history_path() is None
    assert mp.load_history() == []
    monkeypatch.setenv("MEMPLAN_HISTORY", str(tmp_path / "a.jsonl"))
    append(run(), history_path())
    assert mp.load_history() == [run()]
    assert history_path(tmp_path / "b.jsonl") == tmp_path / "b.jsonl"
    assert history_path(False) is None
    monkeypatch.delenv("MEMPLAN_HISTORY")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert history_path() == tmp_path / "data/lightning-memplan/history.jsonl"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_path() == tmp_path / ".local/share/lightning-memplan/history.jsonl"


GOOD = json.loads(json.dumps({"schema": 1, **dataclasses.asdict(run())}))
DAMAGED = [
    b"{",
    b"null",
    b"[]",
    b"\xff\xfe\x00",
    json.dumps(GOOD).encode()[:200],
    *(json.dumps({k: v for k, v in GOOD.items() if k != name}).encode() for name in ("schema", "model", "predicted")),
    json.dumps({**GOOD, "batch_size": "32"}).encode(),
    json.dumps({**GOOD, "predicted": {"first": [1]}}).encode(),
    json.dumps({**GOOD, "measured": {"first": ["a", 2]}}).encode(),
]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_skipped_and_kept(tmp_path, line):
    path = tmp_path / "runs.jsonl"
    append(run(), path)
    with path.open("ab") as file:
        file.write(line + b"\n")
    append(run(1.5), path)
    with pytest.warns(UserWarning, match=rf"line 2 of {path} is damaged and skipped"):
        assert mp.load_history(path) == [run(), run(1.5)]
    assert path.read_bytes().split(b"\n")[1] == line


def test_only_the_first_five_damaged_lines_are_named(tmp_path):
    path = tmp_path / "runs.jsonl"
    for count, said in ((2, "lines 1, 2 of"), (5, "lines 1, 2, 3, 4, 5 of"), (6, r"lines 1, 2, 3, 4, 5, \.\.\. of")):
        path.write_text("{\n" * count)
        with pytest.warns(UserWarning, match=rf"^{said} {path} are damaged and skipped") as caught:
            assert mp.load_history(path) == []
        assert caught[0].filename == __file__


def test_empty_lines_are_no_runs_and_no_damage(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(f"\n  \n{json.dumps(GOOD)}\n\n{json.dumps(GOOD)}\n")
    assert mp.load_history(path) == [run()] * 2


def test_a_line_of_an_earlier_version_has_no_phases(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps({key: value for key, value in GOOD.items() if key != "phases"}) + "\n")
    assert mp.load_history(path) == [run()]
    path.write_text(json.dumps({**GOOD, "phases": {"forward": [1, 2]}}) + "\n")
    assert mp.load_history(path)[0].phases == {"forward": (1, 2)}


def test_a_line_that_was_cut_costs_only_itself(tmp_path):
    """A process that was killed half way through its line left no line break."""
    path = tmp_path / "runs.jsonl"
    append(run(), path)
    with path.open("ab") as file:
        file.write(json.dumps(GOOD).encode()[:300])
    append(run(1.5), path)
    with pytest.warns(UserWarning, match="line 2 of .* is damaged"):
        assert mp.load_history(path) == [run(), run(1.5)]


def test_a_line_that_was_cut_after_its_first_byte_costs_only_itself(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_bytes(b"{")
    append(run(), path)
    with pytest.warns(UserWarning, match="line 1 of .* is damaged"):
        assert mp.load_history(path) == [run()]


def test_a_file_is_made_in_new_folders_and_others_may_read_it(tmp_path):
    path = tmp_path / "a" / "b" / "runs.jsonl"
    append(run(), path)
    assert path.stat().st_mode & 0o777 == 0o644 & ~current_umask()
    (line,) = path.read_text().splitlines()
    assert ", " not in line
    assert ": " not in line


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_later_version_s_line_is_skipped_without_a_word(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps({"schema": 2, "other": 1}) + "\n" + json.dumps({**GOOD, "added": 1}) + "\n")
    assert mp.load_history(path) == [run()]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        append(run(), tmp_path / "file" / "runs.jsonl")


WRITER = """
import dataclasses, sys
from pathlib import Path
from lightning_memplan.monitor.history import append
from lightning_memplan.types import RunRecord
print("ready", flush=True)
sys.stdin.readline()
for k in range(int(sys.argv[3])):
    append(RunRecord("a1", "Net" * 200, "T4", 1, 1, "trace", k + 1, {}, {}, rank=int(sys.argv[2])), Path(sys.argv[1]))
    print(k, flush=True)
"""


def test_a_thousand_appends_of_eight_processes_of_which_one_is_killed(tmp_path):
    path, count = tmp_path / "runs.jsonl", 125
    source = str(Path(mp.__file__).parents[1])
    code = "import sys, types; package = types.ModuleType('lightning_memplan'); package.__path__ = [sys.argv[4]]\n"
    code += "sys.modules['lightning_memplan'] = package\n" + WRITER  # without Lightning, which takes seconds to import
    folder = str(Path(source) / "lightning_memplan")
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), str(rank), str(count), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(8)
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    killed = writers[3]
    assert killed.stdout.readline() == "0\n"
    killed.send_signal(signal.SIGKILL)
    for rank, writer in enumerate(writers):
        writer.communicate(timeout=60)
        assert writer.returncode == (-signal.SIGKILL if rank == 3 else 0)
    runs = mp.load_history(path)  # no warning: every line is whole, since the kernel writes it at once
    for rank in set(range(8)) - {3}:
        assert [run.batch_size for run in runs if run.rank == rank] == list(range(1, count + 1))
    mine = [run.batch_size for run in runs if run.rank == 3]
    assert mine == list(range(1, len(mine) + 1))
    assert 1 <= len(mine) <= count


def test_a_lock_that_is_held_for_long_is_not_waited_for(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / "runs.jsonl"
    append(run(), path)
    monkeypatch.setattr("lightning_memplan.monitor.history._LOCK_SECONDS", 0.02)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        append(run(1.5), path)
    assert mp.load_history(path) == [run(), run(1.5)]


def test_a_file_system_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuses(file: int, operation: int) -> None:
        tried.append(operation)
        raise OSError("no locks available")

    tried: list[int] = []
    monkeypatch.setattr(fcntl, "flock", refuses)
    append(run(), path := tmp_path / "runs.jsonl")
    assert mp.load_history(path) == [run()]
    assert tried == [fcntl.LOCK_EX | fcntl.LOCK_NB]  # for itself alone, and without waiting


def test_a_lock_is_tried_often_and_for_two_seconds(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    clock, tried = [100.0], []

    def held(file: int, operation: int) -> None:
        tried.append(clock[0])
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "flock", held)
    monkeypatch.setattr(history.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(history.time, "sleep", lambda seconds: clock.append(clock.pop() + seconds))
    append(run(), path := tmp_path / "runs.jsonl")
    assert mp.load_history(path) == [run()]
    assert 1.99 < tried[-1] - tried[0] <= 2.01
    assert max(after - before for before, after in pairwise(tried)) < 0.01


def test_a_writer_waits_for_the_lock(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / "runs.jsonl"
    append(run(), path)
    with ThreadPoolExecutor(1) as pool, path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = pool.submit(append, run(1.5), path)
        time.sleep(0.2)
        assert mp.load_history(path) == [run()]  # nothing is written while another holds it
        fcntl.flock(file, fcntl.LOCK_UN)
        writer.result(timeout=10)
    assert mp.load_history(path) == [run(), run(1.5)]


# ---------------------------------------------------------------------------------------------------------- the margin


def test_without_runs_it_is_the_prior():
    assert taught([]) == taught([run(1.2, device="A100")] * 5) == taught([run(1.2, structure="b2")] * 2)
    assert (taught([]).margin, taught([]).text, taught([]).failed) == (0.05, "", None)


def test_three_exact_runs_lower_it():
    assert taught([run()] * 2).margin == 0.05
    found = taught([run()] * 3)
    assert found.margin == LEAST
    assert found.text == "3 runs of this module took at most +0.0 % of the prediction: margin 1.0 %"


def test_one_run_that_took_more_raises_it():
    # 10 % more than predicted: a prediction of 1 / 1.1 of the card fills it, and 1 - 1 / 1.1 = 9.1 % stay free
    found = taught([run(1.1)])
    assert found.margin == pytest.approx(1 - 1 / 1.1)
    assert found.text == "1 run of this module took at most +10.0 % of the prediction: margin 9.1 %"


def test_other_modules_raise_it_and_never_lower_it():
    assert taught([run(1.0, structure="b2")] * 10).margin == 0.05
    assert taught([run(1.1, structure="b2")] * 3).margin == pytest.approx(1 - 1 / 1.1)
    assert taught([run(1.1, structure="b2", method="formula")] * 3).margin == 0.05
    assert taught([run(1.1, structure="b2")] * 3).text.startswith("3 runs of other modules took at most +10.0 %")
    # what this module itself did counts more than what others did
    assert taught([run(1.1, structure="b2")] * 3 + [run()] * 3).margin == LEAST


def test_a_run_that_took_next_to_nothing_lowers_it_no_further():
    nothing = run(measured={"first": (0, 0)})
    assert residual(nothing) == 0
    assert taught([nothing] * 3).margin == LEAST
    assert taught([nothing]).margin == 0.05


def test_a_margin_is_never_the_whole_gpu():
    # a hundred times the prediction would want 99.0 % free, a thousand times 99.9 %
    assert taught([run(1000)]).margin == 0.99


def test_a_run_without_measurements_has_no_residual():
    assert residual(run(measured={})) is None
    assert residual(run(predicted={})) is None
    assert residual(run(predicted={"steady": (0, 10)}, measured={"steady": (5, 12), "first": (1, 1)})) == 1.2


def test_each_rank_of_a_run_is_evidence_but_no_run_of_its_own():
    ranks = [run(1.2 if rank == 5 else 1.0, rank=rank, ranks=8) for rank in range(8)]
    assert taught(ranks).margin == pytest.approx(1 - 1 / 1.2)
    assert taught([run(rank=rank, ranks=8) for rank in range(8)]).margin == 0.05


def test_what_ran_out_of_memory_is_not_planned_again():
    # predicted at 14 of 15 GiB: from now on a segment of 2 MiB less than those 14
    found = taught([out_of_memory()])
    assert found.margin == 1 - (14 * GiB - 2 * 2**20) / (15 * GiB)
    assert found.failed == 32
    assert found.text == "this module ran out of memory at batch size 32: margin 6.7 %"
    # more room than then: the size may fit now
    assert taught([out_of_memory()], capacity=16 * GiB).failed is None
    assert taught([out_of_memory(structure="b2")]).failed is None
    assert taught([out_of_memory(), out_of_memory(batch_size=30)] + [run()] * 9).failed == 30


def test_one_run_of_twenty_may_be_an_outlier():
    # nearest rank of 95 %: of 19 residuals the 19th (0.95 · 19 = 18.05, rounded up), of 20 the 19th too (0.95 · 20)
    assert taught([run(1.0)] * 18 + [run(1.5)]).margin == pytest.approx(1 - 1 / 1.5)
    assert taught([run(1.0)] * 19 + [run(1.5)]).margin == LEAST
    assert taught([run(1.0)] * 18 + [run(1.5)] * 2).margin == pytest.approx(1 - 1 / 1.5)


def test_the_peaks_before_a_run_failed_do_not_count():
    # its steps were exact until it failed; the failure alone decides: 14 of 15 GiB, less a segment
    failed = out_of_memory(measured={"first": (8 * GiB, 9 * GiB)}, predicted={"first": (8, 9), "failed": (1, 14 * GiB)})
    found = taught([run()] * 3 + [failed])
    assert found.margin == 1 - (14 * GiB - 2 * 2**20) / (15 * GiB)
    assert found.text.startswith("3 runs of this module took at most +0.0 % of the prediction, this module ran out")


RATIOS = st.lists(st.floats(0.2, 3.0, allow_nan=False), max_size=40)
CARDS = st.lists(st.tuples(st.integers(GiB, 15 * GiB), st.integers(1, 99)), max_size=4)


@given(RATIOS, CARDS)
def test_it_is_never_looser_than_what_failed(ratios, failures):
    runs = [run(ratio) for ratio in ratios]
    runs += [out_of_memory(predicted={"failed": (1, peak)}, batch_size=size) for peak, size in failures]
    found = taught(runs)
    assert LEAST <= found.margin < 1
    for peak, size in failures:
        assert int(15 * GiB * (1 - found.margin)) < peak
        assert found.failed <= size


@given(RATIOS)
def test_it_covers_95_of_100_runs(ratios):
    found = taught([run(ratio) for ratio in ratios])
    # the prediction fills what the margin leaves: a run that takes ``residual`` of that is over the card or not
    over = sum(residual(run(ratio)) * (1 - found.margin) > 1 + 1e-9 for ratio in ratios)
    assert over <= 0.05 * len(ratios)
    if len(ratios) < 20:
        assert over == 0
    if len(ratios) < ENOUGH:
        assert found.margin >= 0.05


@given(RATIOS, st.floats(0.2, 3.0, allow_nan=False))
def test_a_run_that_took_more_than_any_never_lowers_it(ratios, more):
    worst = max([*ratios, more])
    if len(ratios) >= ENOUGH:
        assert taught([run(r) for r in [*ratios, worst]]).margin >= taught([run(r) for r in ratios]).margin


@given(RATIOS, st.randoms())
def test_the_order_of_runs_does_not_matter(ratios, shuffled):
    mixed = list(ratios)
    shuffled.shuffle(mixed)
    assert taught([run(r) for r in ratios]) == taught([run(r) for r in mixed])


# ------------------------------------------------------------------------------------------------- a run as it is kept


class Measured:
    """A meter after three steps: 5 bytes were allocated before planning, and are in its figures."""

    forecast = Forecast((Peaks(10, 20), Peaks(30, 40, {"forward": 25}), Peaks(30, 40)), already_allocated=5)
    predicted = forecast.at(3)

    def __init__(self, steps: int = 3) -> None:
        self.measurements = [
            Measurement(0, 15, 25, 14, 24, {"forward": 12}, {"forward": 11, "backward": 14}, retries=1),
            Measurement(1, 35, 45, 33, 50, {"forward": 30}, {"forward": 31, "backward": 33}),
            Measurement(2, 35, 45, 34, 45, retries=2),
        ][:steps]
        self.step, self.retries = steps, 3


def planned(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "batch_size": 8,
        "device": mp.Device("T4", total=16 * GiB, context=GiB),
        "budget": 14 * GiB,
        "margin": 0.05,
        "limited_by": "memory",
        "method": "trace",
        "peak_reserved": 40,
        "peak_allocated": 30,
        "formula_peak": 30,
    }
    return Plan(**{**values, **changes})


SETUP = RunSetup("a1", "Net", StepSettings(precision="16-mixed"), rank=1, ranks=2)


def test_a_record_has_the_highest_peaks_without_what_was_there_before():
    found = run_record(Measured(), planned(), SETUP, "done")
    assert found.predicted == {"first": (10, 20), "steady": (30, 40)}  # 15 - 5, 25 - 5; 35 - 5, 45 - 5
    assert found.measured == {"first": (9, 19), "steady": (29, 45)}  # 14 - 5, 24 - 5; max(33, 34) - 5, max(50, 45) - 5
    # forward: max(12, 30) - 5 and max(11, 31) - 5; of backward nothing was predicted, max(14, 33) - 5 were measured
    assert found.phases == {"forward": (25, 26), "backward": (0, 28)}
    assert (found.steps, found.retries) == (3, 3)
    assert (found.structure, found.model, found.rank, found.ranks) == ("a1", "Net", 1, 2)
    assert (found.device, found.total, found.capacity) == ("T4", 16 * GiB, 15 * GiB)
    assert (found.batch_size, found.method, found.margin, found.outcome) == (8, "trace", 0.05, "done")


def test_a_record_tells_when_and_with_which_versions_it_was_made(monkeypatch):
    monkeypatch.setattr(history, "driver_version", lambda: "580.1")
    before = datetime.now(timezone.utc).replace(microsecond=0)
    found = run_record(Measured(), planned(), SETUP, "done")
    assert before <= datetime.fromisoformat(found.time) <= datetime.now(timezone.utc)
    assert found.time.endswith("+00:00")
    assert found.time[19:] == "+00:00"  # whole seconds
    versions = {"lightning-memplan": version("lightning-memplan"), "torch": torch.__version__, "driver": "580.1"}
    assert found.versions == versions


def test_a_run_that_failed_records_what_its_failed_step_was_predicted_to_take():
    found = run_record(Measured(1), planned(), SETUP, "out of memory")
    assert found.predicted == {"first": (10, 20), "failed": (30, 40)}  # the replayed ones', without the 5
    assert found.measured == {"first": (9, 19)}
    assert "failed" not in run_record(Measured(1), planned(), SETUP, "stopped").predicted


def test_settings_are_kept_as_plain_values():
    hook = (object(), print, (line for line in ()))  # what a strategy holds may be anything, and need not be copied
    parallel = Parallel("ddp", 4, {"gradient_as_bucket_view": True}, hook)
    setup = dataclasses.replace(SETUP, settings=StepSettings(parallel=parallel))
    settings = run_record(Measured(), planned(), setup, "done").settings
    assert settings["parallel"] == "ddp on 4 ranks"
    assert json.loads(json.dumps(settings))["precision"] == "32-true"


@pytest.mark.parametrize(
    ("steps", "outcome", "kept"),
    [(3, "done", 1), (3, "stopped", 1), (3, "out of memory", 1), (0, "out of memory", 1), (0, "stopped", 0)],
)
def test_what_is_remembered(tmp_path, steps, outcome, kept):
    path = tmp_path / "runs.jsonl"
    remember(path, Measured(steps), planned(), SETUP, outcome)
    remember(None, Measured(steps), planned(), SETUP, outcome)
    assert [each.outcome for each in mp.load_history(path)] == [outcome] * kept


def test_a_run_that_cannot_be_remembered_is_said(tmp_path):
    said = r"this run is not kept in the history: .*; name a file by history='\.\.\.', or pass history=False$"
    with pytest.warns(UserWarning, match=said):
        remember(tmp_path, Measured(), planned(), SETUP, "done")


# ----------------------------------------------------------------------------------------------------------- the table


def test_the_history_table_shows_the_error_of_each_run():
    mixed = {"settings": {"precision": "16-mixed"}, "outcome": "stopped"}
    rows = history_table([run(1.02), out_of_memory(model="ANetworkWithQuiteALongNameIndeed"), run(1.02, **mixed)])
    # (10 - 10.2) / 10.2 = -2.0 %
    assert rows.splitlines() == [
        "Net on T4",
        "  when (UTC)        precision  batch  predicted     actual            error",
        "  2026-11-20 08:00                32  10.00 GiB  10.20 GiB           -2.0 %",
        "  2026-11-20 08:00  16-mixed      32  10.00 GiB  10.20 GiB  -2.0 %, stopped",
        "",
        "ANetworkWithQuiteALongNameI... on T4",
        "  when (UTC)        precision  batch  predicted     actual            error",
        "  2026-11-20 08:00                32  14.00 GiB          -    out of memory",
    ]


def test_no_run_is_wider_than_80_columns():
    wide = {"model": "N" * 99, "device": "D" * 99, "batch_size": 10**7, "settings": {"precision": "transformer-engine"}}
    runs = [run(**wide, outcome="stopped"), run(**wide, ranks=99, rank=98, retries=10**6)]
    text = [history_table(runs), lessons_table([(each, 1000, "taught") for each in runs])]
    text += [run_report(each, "what it taught, at length " * 9) for each in runs]
    assert max(map(len, "\n".join(text).splitlines())) <= 80


def test_the_report_of_a_run():
    # reserved: predicted 10, actual 10.2: (10 - 10.2) / 10.2 = -2.0 %; of 16 GiB 64 %
    found = run(1.02, phases={"optimizer": (GiB, GiB), "forward": (2 * GiB, GiB)}, steps=7, margin=0.05, ranks=2)
    assert run_report(found, "and so on").splitlines() == [
        "Net on T4, 2026-11-20 08:00 UTC: done, 7 steps",
        "  batch size 32, planned by trace, margin 5.0 %, rank 0 of 2, which reserved",
        "  most",
        "                   predicted       actual      error",
        "  peak reserved    10.00 GiB    10.20 GiB     -2.0 %",
        "  peak allocated    9.00 GiB     9.00 GiB     +0.0 %",
        "    forward         2.00 GiB     1.00 GiB   +100.0 %",
        "    optimizer       1.00 GiB     1.00 GiB     +0.0 %",
        "  GPU              16.00 GiB    64 % of it reserved  [#############.......]",
        "  and so on",
    ]
    assert run_report(out_of_memory()).splitlines()[0].endswith(": out of memory in step 100")


def test_the_latest_of_a_runs_ranks_is_the_one_that_reserved_most():
    first, second = run(1.1, ranks=2), run(1.0, ranks=2, rank=1)
    assert latest([run(1.2, ranks=2), run(1.3, ranks=2, rank=1), first, second]) == first
    assert latest([first, second, run(structure="b2")]).structure == "b2"
    # a run of as many ranks, and one of this module on one rank, are other runs
    assert latest([run(2.0, structure="b2", ranks=2), second]) == latest([run(2.0), second]) == second


def test_a_run_that_measured_nothing_is_the_latest_too():
    nothing = run(measured={}, ranks=2)
    assert latest([nothing]) == nothing
    assert latest([nothing, run(measured={"first": (0, 1)}, ranks=2, rank=1)]).rank == 1


def test_history_and_report_print_the_runs_of_a_file(tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    path.touch()
    for command in ("history", "report"):
        assert main([command, "--file", str(path)]) == 0
        assert capsys.readouterr().out == "no runs on record: MemoryPlanner adds one for each fit on a GPU\n"
    for each in (run(), run(1.1)):
        append(each, path)
    assert main(["history", "--file", str(path), "--json"]) == 0
    assert [row["batch_size"] for row in json.loads(capsys.readouterr().out)] == [32, 32]
    assert main(["report", "--file", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[-1]) == (
        "Net on T4, 2026-11-20 08:00 UTC: done, 100 steps",
        "  2 runs of this module took at most +10.0 % of the prediction: margin 9.1 %",
    )
    assert main(["report", "--file", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["run"]["batch_size"] == 32
    assert report["lessons"][0]["margin"] == pytest.approx(1 - 1 / 1.1)
    append(run(model="Other", structure="b2"), path)
    assert main(["report", "--file", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Other on T4, ")
    assert lines[-3:-1] == ["", "Net on T4, 2 runs"]
    assert main(["report", "net", "t4", "--file", str(path)]) == 0
    assert capsys.readouterr().out.startswith("Net on T4, ")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["report", "nothing"], "no module or GPU on record is called 'nothing': memplan history lists the runs"),
        (["history", "--file", "none.jsonl"], "there is no file 'none.jsonl': without --file it is where"),
    ],
)
def test_a_commands_error_says_what_to_do(monkeypatch, tmp_path, capsys, words, text):
    monkeypatch.setenv("MEMPLAN_HISTORY", str(tmp_path / "runs.jsonl"))
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"memplan: error: {text}")


# ------------------------------------------------------------------------------------------------- on the null GPU

FITS = """
import dataclasses, gc, sys, warnings
from pathlib import Path
sys.path.insert(0, sys.argv[1])
warnings.filterwarnings("ignore")
import pytorch_lightning as pl
import torch
from tests.models import Classifier, Data, mlp
import lightning_memplan as mp
from lightning_memplan.monitor.history import append, history_path

class Eater(pl.Callback):
    held = None
    def on_train_batch_start(self, *args):
        self.held = torch.empty(2**30, dtype=torch.uint8, device="cuda")

def fit(*others):
    planner = mp.MemoryPlanner(method="trace", confirm=False, margin="learned", history=True)
    try:
        pl.Trainer(accelerator="gpu", devices=1, max_steps=3, callbacks=[planner, *others], logger=False,
                   enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ).fit(Classifier(mlp()), Data(torch.zeros(2048), 400000))
    except torch.cuda.OutOfMemoryError as error:
        error.__traceback__ = None
    print("RESULT", planner.plan.batch_size, planner.plan.margin)

fit()
(run,) = mp.load_history()
for _ in range(2):
    append(run, history_path())
fit()
eater = Eater()
fit(eater)
eater.held = None
gc.collect()
torch.cuda.empty_cache()
fit()
"""


def test_runs_are_kept_and_the_next_ones_learn_of_them(nullgpu, tmp_path):
    path = tmp_path / "runs.jsonl"
    source = str(Path(mp.__file__).parents[1])
    done = nullgpu(
        [sys.executable, "-c", FITS, str(ROOT)],
        PYTHONPATH=source,
        MEMPLAN_HISTORY=path,
        NULLGPU_MEMORY=4 * GiB,
    )
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("RESULT")]
    first, exact, hungry, after = [(int(size), float(margin)) for _, size, margin in lines]
    assert (first[1], exact[1]) == (0.05, LEAST)  # three runs that were exact need no more
    assert hungry == exact
    # of it something took 1 GiB more than was planned: the next leaves more free
    assert after[1] > LEAST
    assert after[0] < hungry[0] > first[0]
    runs = mp.load_history(path)
    assert [run.outcome for run in runs] == ["done"] * 4 + ["out of memory", "done"]
    assert len({run.structure for run in runs}) == 1
    assert runs[0].measured.keys() == {"first", "steady"}
    assert list(runs[0].phases) == ["forward", "backward", "optimizer"]
    assert all(actual == pytest.approx(predicted, rel=0.01) for predicted, actual in runs[0].phases.values())
    assert residual(runs[0]) == pytest.approx(1, rel=0.01)
    assert runs[0].versions["torch"]
    assert runs[0].settings["precision"] == "32-true"


def test_a_margin_that_is_named_is_kept_to(tmp_path):
    path = tmp_path / "runs.jsonl"
    for _ in range(3):
        append(run(), path)

    def margin(path: Path | None, named: float | None = None) -> float:
        device = mp.Device("T4", total=16 * GiB)
        return learn(path, "a1", device, method="trace", margin=named, prior=0.05).margin

    assert margin(path) == LEAST
    assert margin(path, 0.2) == 0.2
    assert margin(None) == 0.05
    assert margin(None, 0.2) == 0.2
    with pytest.warns(UserWarning, match="the history of earlier runs cannot be read: .*Is a directory"):
        assert margin(tmp_path) == 0.05


def test_a_lesson_is_of_this_gpu_and_this_method(tmp_path):
    path = tmp_path / "runs.jsonl"
    for _ in range(3):
        append(run(1.1, structure="b2"), path)
    append(out_of_memory(), path)
    device = mp.Device("T4", total=15 * GiB)
    found = learn(path, "a1", device, method="trace", margin=None, prior=0.05)
    assert found == taught(mp.load_history(path))
    assert found.failed == 32
    assert learn(path, "a1", mp.Device("T4", total=16 * GiB), method="trace", margin=None, prior=0.05).failed is None
    other = learn(path, "c3", device, method="trace", margin=None, prior=0.05)
    assert other.margin == pytest.approx(1 - 1 / 1.1)  # of another module, planned by the same method
    assert learn(path, "c3", device, method="formula", margin=None, prior=0.05).margin == 0.05
