"""The command line, in this process (and once as a command): what it prints, and its exit status."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shlex
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

import lightning_memplan as mp
from lightning_memplan.cli.job import make_job
from lightning_memplan.cli.main import main, parse
from lightning_memplan.cli.output import UsageError, progress
from lightning_memplan.types import EstimateRow
from tests.paths import ROOT

JOB = """
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(pl.LightningModule):
    def __init__(self, width: int = 1024):
        super().__init__()
        print("what the job itself prints")
        self.net = nn.Sequential(nn.Linear(1024, width), nn.ReLU(), nn.Linear(width, 10))
    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

class Data(pl.LightningDataModule):
    def __init__(self, samples: int = 300):
        super().__init__()
        self.samples = samples
    def train_dataloader(self):
        data = TensorDataset(torch.zeros(self.samples, 1024), torch.zeros(self.samples, dtype=torch.long))
        return DataLoader(data, batch_size=4)

def plain(width=1024):
    return nn.Linear(1024, width)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(1024, 4096), nn.Linear(4096, 1024)
    def forward(self, x):
        return x + self.two(self.one(x).relu())

def blocks():
    return nn.Sequential(*(Block() for _ in range(8)))

def strategy():
    return pl.strategies.FSDPStrategy(auto_wrap_policy={Block})

def broken(width):
    raise RuntimeError("no such width")

def reads(batch_size=4):
    class Reads(Net):
        def training_step(self, batch, batch_idx):
            raise KeyError("images")
    return Reads()

number = 7
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "cli_job.py").write_text(JOB)
    before = list(sys.path)
    yield str(folder / "cli_job.py")
    sys.path[:] = before
    sys.modules.pop("cli_job", None)


@pytest.fixture
def run(job, capsys):
    def command(*args):
        status = main([arg.replace("JOB", job) for arg in args])
        printed = capsys.readouterr()
        return status, printed.out, printed.err.replace("what the job itself prints\n", "").replace(job, "JOB")

    return command


# ------------------------------------------------------------------------------------------------- without a job


@pytest.mark.parametrize("words", [["--help"], ["plan", "--help"], ["check", "--help"], ["estimate", "--help"]])
def test_help_fits_80_columns(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: memplan")
    assert max(map(len, printed.splitlines())) <= 80


def test_gpus_lists_the_catalogue(run):
    status, text, _ = run("gpus", "a100")
    assert (status, [line.split("  ")[0] for line in text.splitlines()]) == (0, ["GPU", "A100 40GB", "A100 80GB"])
    status, text, _ = run("gpus", "--json")
    cards = json.loads(text)
    assert {card["name"]: card["total"] for card in cards} == {card.name: card.total for card in mp.gpus()}
    assert run("gpus", "a101") == (
        2,
        "",
        "memplan: error: no GPU of the catalogue has 'a101' in its name: memplan gpus lists all\n",
    )


def test_devices_lists_what_is_here(run, monkeypatch):
    monkeypatch.setattr("lightning_memplan.cli.devices.detect_devices", lambda: ())
    assert run("devices")[1] == "no CUDA device here: name one by --gpu (memplan gpus lists them)\n"
    card = mp.Device("a card", total=2**34, free=2**33, context=2**30, index=0, capability=(8, 6))
    monkeypatch.setattr("lightning_memplan.cli.devices.detect_devices", lambda: (card,))
    assert run("devices")[1].splitlines()[1].split() == ["a", "card", "7.00", "GiB", "8.6"]
    found = json.loads(run("devices", "--json")[1])
    assert found == [mp.as_dict(card)]
    assert (found[0]["free"], found[0]["capacity"], found[0]["capability"]) == (2**33, 2**33 - 2**30, [8, 6])


# ------------------------------------------------------------------------------------------------- a job


def test_plan_prints_a_table_of_80_columns(run):
    status, text, errors = run(
        "plan", "JOB:Net", "--input", "1024", "--labels", "--memory", "256MiB", "--margin", "0.1"
    )
    assert (status, errors) == (0, "")
    assert text.startswith("memory plan for a GPU of 256MiB\n")
    assert "of a budget of 230.40 MiB, margin 10.0 %" in text  # 256 MiB less a tenth
    assert max(map(len, text.splitlines())) <= 80


def test_plan_prints_every_field_as_json(run):
    arguments = ("--data", "JOB:Data", "--data-arg", "samples=50", "--arg", "width=64", "--gpu", "T4", "--json")
    status, text, _ = run("plan", "JOB:Net", *arguments, "--precision", "16-mixed", "--multiple-of", "8")
    found = json.loads(text)
    assert status == 0
    assert set(found) == {"model", "fits", *(field.name for field in dataclasses.fields(mp.Plan))}
    assert found["methods"] == {"trace": found["peak_reserved"], "formula": found["formula_peak"]}
    assert found["reserved_range"] == dict.fromkeys(("low", "expected", "high"), found["peak_reserved"])
    assert (found["model"], found["batch_size"], found["limited_by"], found["method"]) == (
        "Net",
        48,
        "dataset",
        "trace",
    )
    assert found["device"]["total"] == mp.gpu("T4").total
    assert sum(found["breakdown"].values()) == found["peak_allocated"] <= found["peak_reserved"]


def test_plan_accumulates_to_an_effective_batch_size(run):
    arguments = (
        "--input",
        "1024",
        "--labels",
        "--gpu",
        "T4",
        "--max-batch-size",
        "100",
        "--effective-batch-size",
        "384",
    )
    found = json.loads(run("plan", "JOB:Net", *arguments, "--json")[1])
    assert (found["batch_size"], found["accumulate_grad_batches"]) == (96, 4)  # 96 is the largest part of 384 up to 100
    assert found["effective_batch_size"] == 384


def test_a_plain_module_takes_an_optimizer(run):
    peaks = {}
    for name, options in {
        "none": (),
        "SGD": ("--optimizer", "SGD"),
        "momentum": ("--optimizer", "SGD", "--optimizer-arg", "momentum=0.9"),
    }.items():
        arguments = ("check", "JOB:plain", "--input", "1024:bfloat16", "--precision", "bf16-true", "--json", *options)
        status, text, _ = run(*arguments, "--memory", "1GiB", "--batch-size", "4")
        found = json.loads(text)
        peaks[name] = found["breakdown"].get("optimizer", 0)
        assert status == 0
    # one moment for each of 1024 · 1024 + 1024 parameters of two bytes
    assert list(peaks.values()) == [0, 0, 2 * (1024 * 1024 + 1024)]


#: 1024 x 4096 weights and 4096 biases, and back again, in four bytes
BLOCK = 4 * (2 * 1024 * 4096 + 4096 + 1024)


def test_sharding_takes_less_of_each_device_than_ddp(run):
    """Eight blocks; no activation is as large as one of them."""
    arguments = ("check", "JOB:blocks", "--input", "1024", "--batch-size", "8", "--memory", "4GiB", "--json")
    found = {}
    for name, options in {
        "one": (),
        "ddp": ("--devices", "2"),
        "fsdp": ("--devices", "2", "--strategy", "fsdp"),
        "units": ("--devices", "4", "--strategy", "fsdp", "--wrap", "Block"),
        "made": ("--devices", "4", "--strategy", "JOB:strategy"),
    }.items():
        status, text, _ = run(*arguments, "--optimizer", "AdamW", *options)
        assert status == 0
        found[name] = json.loads(text)
    assert [one["nccl"] for one in found.values()] == [0] + 4 * [700_000_000]
    assert found["ddp"]["device"]["capacity"] == 2**32 - 700_000_000
    parts = {name: one["breakdown"] for name, one in found.items()}
    # two moments of each parameter, and their steps' numbers
    assert parts["one"]["optimizer"] == pytest.approx(16 * BLOCK, rel=0.001)
    assert parts["ddp"]["communication"] >= 8 * BLOCK  # buckets
    assert parts["fsdp"]["optimizer"] == pytest.approx(parts["one"]["optimizer"] / 2, rel=0.001)
    assert parts["units"]["parameters"] == pytest.approx(8 * BLOCK / 4, rel=0.001)
    assert found["units"]["peak_reserved"] < found["fsdp"]["peak_reserved"] < found["ddp"]["peak_reserved"]
    assert parts["made"] == parts["units"]
    _, text, _ = run("plan", *arguments[1:4], "--memory", "4GiB", "--devices", "2", "--max-batch-size", "8")
    assert "NCCL          667.57 MiB" in text


def test_what_takes_long_is_said_where_someone_looks(monkeypatch):
    told = threading.Event()

    class Terminal(io.StringIO):
        def isatty(self):
            return True

        def write(self, text):
            if " s" in text:
                told.set()
            return super().write(text)

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("planning Net", every=0.01):
        assert told.wait(60)
    assert terminal.getvalue().startswith("\r\x1b[Kplanning Net, 0 s")
    assert terminal.getvalue().endswith("\r\x1b[K")  # the line is gone
    monkeypatch.setattr(sys, "stderr", quiet := io.StringIO())
    with progress("planning Net", every=0.0):
        pass
    assert quiet.getvalue() == ""


def test_check_exits_with_1_where_a_batch_size_does_not_fit(run):
    arguments = ("check", "JOB:Net", "--data", "JOB:Data", "--memory", "80MiB")
    status, text, _ = run(*arguments, "--batch-size", "64")
    assert (status, text) == (0, "Net fits on a GPU of 80MiB at batch size 64: 62.00 MiB of a budget of 76.00 MiB\n")
    status, text, _ = run(*arguments, "--batch-size", "8192")  # more than the dataset has, and it does not matter
    assert status == 1
    assert text.startswith("Net does not fit on a GPU of 80MiB at batch size 8192: it lacks ")
    status, text, _ = run(*arguments, "--batch-size", "8192", "--json")
    found = json.loads(text)
    assert (status, found["fits"], found["available"]) == (1, False, 76 * 2**20)
    assert found["needed"] > found["available"]


def test_estimate_prints_batch_sizes_and_writes_figures(run, tmp_path):
    pictures = ("--snapshot", str(tmp_path / "step.pickle"), "--plot", str(tmp_path / "step.png"))
    status, text, _ = run("estimate", "JOB:Net", "--data", "JOB:Data", "--batch-size", "8", "4096", *pictures)
    assert status == 0
    assert [line.split()[0] for line in text.splitlines()[2:4]] == ["8", "4096"]
    assert "at batch size 4096, in the " in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step.pickle", "step.png"]
    found = json.loads(run("estimate", "JOB:Net", "--data", "JOB:Data", "--json", "--method", "formula")[1])
    assert (found["model"], found["method"]) == ("Net", "formula")
    assert [row["batch_size"] for row in found["estimates"]] == [1, 8, 64]
    assert all(set(row) == {field.name for field in dataclasses.fields(EstimateRow)} for row in found["estimates"])


def test_advise_prints_what_each_change_saves(run):
    arguments = ("--data", "JOB:Data", "--memory", "1GiB", "--batch-size", "4096")
    status, text, _ = run("advise", "JOB:Net", *arguments)
    assert status == 0
    assert text.startswith("1. accumulate_grad_batches=2 at batch size 2048\n   saves ")
    assert max(map(len, text.splitlines())) <= 80
    found = json.loads(run("advise", "JOB:plain", "--input", "1024", *arguments[2:], "--json")[1])
    assert found["model"] == "Linear"
    keys = "kind change cost batch_size saved peak_reserved peak_allocated largest_batch_size nccl"
    assert all(" ".join(item) == keys for item in found["advice"])


def test_the_cards_for_a_job(run):
    arguments = ("gpus", "a100", "--for", "JOB:plain", "--input", "1024", "--max-batch-size", "64")
    assert [line.split()[-1] for line in run(*arguments)[1].splitlines()[1:]] == ["64", "64"]
    found = json.loads(run(*arguments, "--multiple-of", "48", "--json")[1])
    assert [(card["name"], card["batch_size"]) for card in found] == [("A100 40GB", 48), ("A100 80GB", 48)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI calls what a newer jsonargparse deprecates
def test_a_yaml_of_lightning_cli(run, job, tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse")
    config = tmp_path / "config.yaml"
    trainer = "trainer:\n  accelerator: gpu\n  devices: 2\n  precision: bf16-mixed\n  gradient_clip_val: 0.5\n"
    config.write_text(f"{trainer}model:\n  width: 64\ndata:\n  samples: 50\nckpt_path: null\n")
    arguments = ("--config", str(config), "--memory", "1GiB", "--json")
    status, text, errors = run("plan", "JOB:Net", "--data", "JOB:Data", *arguments)
    assert (status, errors) == (0, "")
    found = json.loads(text)
    assert (found["batch_size"], found["limited_by"]) == (25, "dataset")
    assert found["nccl"] == 700_000_000  # two ranks, each with half of the samples
    monkeypatch.setattr(sys, "argv", ["memplan"])  # LightningCLI warns where it has words too
    made = "strategy:\n    class_path: pytorch_lightning.strategies.FSDPStrategy\n"
    config.write_text(
        f"trainer:\n  devices: [0, 1]\n  num_nodes: 2\n  {made}model:\n  width: 64\ndata:\n  samples: 50\n"
    )
    training = make_job(parse(["plan", f"{job}:Net", "--data", f"{job}:Data", "--config", str(config)])).training
    assert (training.devices, type(training.strategy).__name__) == (4, "FSDPStrategy")
    config.write_text("trainer:\n  precisin: 16-mixed\n")
    status, _, errors = run("plan", "JOB:Net", "--data", "JOB:Data", *arguments)
    assert status == 2
    assert "does not accept option 'trainer.precisin'" in errors
    assert errors.count("\n") == 1


# ------------------------------------------------------------------------------------------------- what is wrong

CASES = {
    "an unknown GPU": (
        ["plan", "JOB:Net", "--input", "1024", "--labels", "--gpu", "RTX 3091"],
        "'RTX 3091' is not in the catalogue of GPUs: near are",
    ),
    "no target": (["plan"], "nothing to plan: name it as package.module:Name or script.py:name, or by --config"),
    "no colon": (["plan", "JOB"], "names nothing in a module: write package.module:Name or script.py:name"),
    "no module": (
        ["plan", "nowhere.net:Net"],
        "'nowhere.net' cannot be imported: ModuleNotFoundError: No module named",
    ),
    "no file": (["plan", "nowhere.py:Net"], "there is no file 'nowhere.py'"),
    "no name": (
        ["plan", "JOB:Ned"],
        "'JOB' has no 'Ned': it has Block, Data, DataLoader, Net, TensorDataset, blocks, broken, plain",
    ),
    "no module in it": (["plan", "JOB:number"], "JOB:number made 7: it must be, or make, a LightningModule"),
    "no data": (["plan", "JOB:Net"], "nothing says what is trained on: name it by --data package.module:DataModule or"),
    "its own error": (["plan", "JOB:broken"], "JOB:broken cannot be made: TypeError: broken() missing 1 required"),
    "and another": (
        ["plan", "JOB:broken", "--arg", "width=1"],
        "JOB:broken cannot be made: RuntimeError: no such width",
    ),
    "no pair": (["plan", "JOB:Net", "--arg", "width"], "'width' is no argument: write --arg name=value"),
    "no shape": (["plan", "JOB:Net", "--input", "3,224"], "'3,224' is no shape: write one sample's, such as --input"),
    "no dtype": (["plan", "JOB:Net", "--input", "3:int65"], "'int65' is no type of tensor: write --input 3:int64"),
    "no unit": (
        ["plan", "JOB:plain", "--input", "1024", "--memory", "24"],
        "--memory 24 are 24 bytes: write a unit, such as --memory 24GiB\n",
    ),
    "nowhere to write": (
        ["estimate", "JOB:plain", "--input", "1024", "--method", "trace", "--plot", "nowhere/step.svg"],
        "'nowhere/step.svg' cannot be written: No such file or directory\n",
    ),
    "no optimizer": (
        ["plan", "JOB:plain", "--input", "1024", "--optimizer", "adam"],
        "torch.optim has no optimizer 'adam': AdamW, SGD, ...",
    ),
    "no precision": (
        ["plan", "JOB:plain", "--input", "1024", "--gpu", "T4", "--precision", "8"],
        "precision '8' cannot be planned for: use one of",
    ),
    "no strategy": (
        ["plan", "JOB:plain", "--input", "1024", "--gpu", "T4", "--strategy", "fsdp3"],
        "Lightning has no strategy 'fsdp3': try 'fsdp', 'fsdp2'\n",
    ),
    "no layer to wrap": (
        ["plan", "JOB:blocks", "--input", "1024", "--gpu", "T4", "--wrap", "Blok"],
        "Sequential has no layer of class 'Blok': try Block\n",
    ),
    "wrapped by another": (
        ["plan", "JOB:blocks", "--input", "1024", "--gpu", "T4", "--strategy", "ddp", "--wrap", "Block"],
        "--wrap names the units of --strategy fsdp, not of ddp: leave one out\n",
    ),
    "nothing that shards": (
        ["plan", "JOB:plain", "--input", "1024", "--gpu", "T4", "--devices", "2", "--strategy", "fsdp2"],
        "with ModelParallelStrategy (fsdp2) a module shards itself, and Linear has no configure_model that does: add",
    ),
    "no config": (
        ["plan", "--config", "nowhere.yaml"],
        "there is no file 'nowhere.yaml': --config is a LightningCLI's",
    ),
    "a step that fails": (
        ["plan", "JOB:reads", "--input", "1024", "--gpu", "T4", "--method", "trace"],
        "Reads cannot be traced: the step failed in a trace (KeyError: 'images'); at JOB:",
    ),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_error_is_one_line_that_says_what_to_do(run, case):
    arguments, text = CASES[case]
    status, printed, errors = run(*arguments)
    assert (status, printed, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("memplan: error: ")
    assert text in errors


def test_wrong_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["check", "job:Net"])
    assert caught.value.code == 2
    text = "memplan: error: the following arguments are required: --batch-size; see memplan check --help\n"
    assert capsys.readouterr().err == text


def test_debug_shows_where(run):
    with pytest.raises(ValueError, match="there is no file"):
        run("plan", "nowhere.py:Net", "--debug")


def test_a_process_exits_with_the_status_of_the_command(job, tmp_path):
    code = "import sys; from lightning_memplan.cli.main import main; sys.exit(main())"
    arguments = ["check", "cli_job:Net", "--data", "cli_job:Data", "--gpu", "T4", "--batch-size", "10000000"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        cwd=Path(job).parent,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(mp.__file__).parents[1])},
    )
    assert done.returncode == 1
    assert done.stdout.startswith("Net does not fit on T4 at batch size 10000000: it lacks ")
    assert done.stderr == "what the job itself prints\n"


def test_the_commands_of_the_recipes_run(run):
    pytest.importorskip("torchvision")
    text = (ROOT / "docs" / "recipes.md").read_text()
    commands = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("memplan ")]
    runs = [words[1:] for words in commands if any("torchvision" in word for word in words)]
    assert len(runs) == 3
    for words in runs:
        status, _, errors = run(*words)
        assert (status, errors) == (0, "")
    for words in commands:  # the others need a script of yours: their options are read
        with contextlib.suppress(UsageError):
            make_job(parse(words[1:]))


def test_a_cudnn_that_is_not_there_is_an_error(run, monkeypatch):
    monkeypatch.setenv("MEMPLAN_CUDNN", "/nowhere/libcudnn.so.9")
    status, _, error = run("gpus", "T4")
    what = "MEMPLAN_CUDNN is '/nowhere/libcudnn.so.9', and there is no such file: name a libcudnn.so.9, or say off"
    assert (status, error) == (2, f"memplan: error: {what}\n")
