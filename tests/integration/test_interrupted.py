"""Planning that fails, or is killed, leaves nothing: no file, no process, no changed object, none of the memory."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import weakref
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

import lightning_memplan as mp
from lightning_memplan.probe.clean_up import release_frames
from lightning_memplan.probe.out_of_memory import exception_chain
from tests.paths import PROGRAMS
from tests.programs.interrupted_cases import (
    ALL,
    HOOKS,
    KILLED,
    ON_CARD,
    POINTS,
    Data,
    Mistake,
    Net,
    collate,
    press_ctrl_c,
    raise_mistake,
    stopped,
)

CARD = mp.Device("a card", total=2**33)
QUIET = {
    "max_epochs": 1,
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}
STRIKES = {"raise_mistake": raise_mistake, "press_ctrl_c": press_ctrl_c}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where all files would be: the working directory, the home, the place for temporary files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMPLAN_HISTORY")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    for name in ("HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@pytest.mark.filterwarnings("ignore:MemoryPlanner. validation gets training's batch size")
@pytest.mark.parametrize("strike", STRIKES)
@pytest.mark.parametrize("point", ALL)
def test_nothing_is_left_of_planning_that_stops(point, strike, folder):
    planner = {"method": "trace", "device": CARD, "effective_batch_size": 24}
    found = stopped(point, STRIKES[strike], folder, planner, accelerator="cpu")
    assert found["reached"]
    # validation gets training's size then, and a stand-in takes the place of what refuses to be copied
    if strike == "raise_mistake" and point in ("validation_step", "a copy is made"):
        assert found["ended"] == "it planned"
        return
    assert found["changed"] == {}
    if strike == "press_ctrl_c":
        assert found["ended"] == "KeyboardInterrupt: "
    else:
        assert "a mistake of the user's" in found["ended"]


def test_what_planning_changes_would_be_seen(folder):
    found = stopped("", raise_mistake, folder, {"method": "trace", "device": CARD}, accelerator="cpu")
    assert (found["reached"], found["ended"], *found["changed"]) == (False, "it planned", "module", "data", "trainer")


def test_loaders_that_were_passed_are_there_again():
    """The training loader has its copy, as validation's size cannot be set."""
    loader = DataLoader([(torch.ones(8), 1)] * 24, batch_size=2, collate_fn=collate)
    seen = []

    class Sees(pl.Callback):
        def on_exception(self, trainer, pl_module, exception):
            seen.extend((trainer.fit_loop._data_source.instance, exception))

    class Own(Net):
        val_size, val_dataloader = Data.val_size, Data.val_dataloader
        _val_size = 3

    module = Own()
    planner = mp.MemoryPlanner(
        "trace", CARD, max_batch_size=8, batch_arg_name={"val": "val_size"}, apply=True, on_error="raise"
    )
    trainer = pl.Trainer(callbacks=[planner, Sees()], **QUIET)
    POINTS.arm("val_size is set", raise_mistake, again=True)
    with pytest.raises(mp.ApplyError, match=r"Own\.val_size cannot be set to 8 \(Mistake: a mistake of the user's\)"):
        trainer.fit(module, loader)
    assert seen[0] is loader
    assert (module.hparams["batch_size"], module.val_size, planner.plan) == (2, 3, None)


def test_a_fit_that_fails_after_planning_gives_the_loaders_hooks_back():
    class Fails(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            raise Mistake("later")

    callback = mp.MemoryPlanner("formula", CARD, max_batch_size=8, apply=True, on_error="raise")
    trainer = pl.Trainer(callbacks=[callback, Fails()], **QUIET)
    with pytest.raises(Mistake, match="later"):
        trainer.fit(Net(), datamodule=Data())
    assert "dataloader" not in vars(trainer.fit_loop._data_source)
    assert callback.state_dict() == {"batch_size": 8}


def test_an_error_lets_go_of_what_its_calls_held():
    """Also of what a function closes over that no one else can call; not of what a call holds that goes on."""

    def fails(value):
        def inner():
            return value + missing  # noqa: F821

        return inner()

    def kept():
        return value.sum()

    value, own = torch.ones(3), torch.ones(3)
    alive = weakref.ref(own)
    with pytest.raises(NameError) as caught:
        fails(own)
    del own
    assert alive() is not None  # the error's traceback has the call, and this its arguments
    release_frames(exception_chain(caught.value))
    assert alive() is None
    assert [entry.name for entry in caught.traceback][1:] == ["fails", "inner"]
    assert kept() == 3


# ------------------------------------------------------------------------------------------------- on the null GPU


@pytest.fixture(scope="module")
def shown(nullgpu, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    source, script = str(Path(mp.__file__).parents[1]), str(PROGRAMS / "interrupted_cases.py")
    places = {"HOME": folder, "TMPDIR": folder, "XDG_DATA_HOME": folder}
    done = nullgpu([sys.executable, script, folder], PYTHONPATH=source, NULLGPU_MEMORY=3 * 10**9, **places)
    rows = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("SHOWN ")]
    return {(row["point"], row.get("strike", row.get("signal"))): row for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("strike", STRIKES)
@pytest.mark.parametrize("point", [*HOOKS, *ON_CARD])
def test_nothing_is_left_on_a_card(shown, point, strike):
    found = shown[point, strike]
    assert found["reached"]
    if strike == "raise_mistake" and (point in ("validation_step", "a copy is made") or "in the trace" in point):
        assert found["ended"] == "it planned"  # by the probe, and validation at training's size
        return
    assert found["changed"] == {}
    assert "a mistake of the user's" in found["ended"] or found["ended"] == "KeyboardInterrupt: "


@pytest.mark.slow
@pytest.mark.parametrize("point", [*KILLED["cpu"], *KILLED["gpu"]])
def test_nothing_is_left_of_a_process_that_is_killed(shown, point):
    found = shown[point, signal.SIGKILL]
    assert (found["status"], found["files"], found["processes"]) == (-signal.SIGKILL, False, False)


@pytest.mark.slow
def test_a_process_that_is_interrupted_ends_as_lightning_ends_it(shown):
    found = [row for (_, number), row in shown.items() if number == signal.SIGINT]
    assert len(found) == 6
    for row in found:
        assert (row["status"], row["files"], row["processes"]) == (1, False, False), row
