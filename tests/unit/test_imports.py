"""The package's names are imported when they are used: what that leaves out, and that the names agree everywhere."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning_memplan as mp

HEAVY = ("torch", "pytorch_lightning", "lightning", "numpy", "matplotlib")

LOADED = """
import atexit, json, sys
heavy = sys.argv.pop(1).split()
atexit.register(lambda: print(json.dumps([name for name in heavy if name in sys.modules]), file=sys.stderr))
"""

MEMPLAN = "from lightning_memplan.cli.main import main\nsys.exit(main())"

#: A pynvml that knows one GPU of 24 GiB, of which 1 GiB is used
NVML = """
from types import ModuleType, SimpleNamespace
nvml = sys.modules["pynvml"] = ModuleType("pynvml")
nvml.NVMLError, nvml.nvmlMemory_v2 = OSError, 2
nvml.nvmlInit = nvml.nvmlShutdown = lambda: None
nvml.nvmlDeviceGetCount, nvml.nvmlDeviceGetHandleByIndex = lambda: 1, lambda index: index
nvml.nvmlDeviceGetMigMode = lambda handle: [0, 0]
nvml.NVML_DEVICE_MIG_ENABLE = 1
nvml.nvmlDeviceGetUUID, nvml.nvmlDeviceGetName = lambda handle: "GPU-0", lambda handle: "NVIDIA A"
memory = SimpleNamespace(total=24 * 2**30, reserved=0, used=2**30, free=23 * 2**30)
nvml.nvmlDeviceGetMemoryInfo = lambda handle, version=None: memory
nvml.nvmlDeviceGetComputeRunningProcesses = lambda handle: []
nvml.nvmlDeviceGetCudaComputeCapability = lambda handle: (8, 6)
"""


def run(code, *arguments):
    """What a program of its own prints, and which of the heavy packages it has imported when it ends."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED + code, " ".join(HEAVY), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(mp.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stderr)


def test_importing_the_package_imports_nothing_heavy():
    _, loaded = run(
        "import lightning_memplan as mp; mp.Plan, mp.DoesNotFitError, mp.gpu('T4'), mp.Estimate, mp.plan_table"
    )
    assert loaded == []
    printed, loaded = run("from lightning_memplan import *; print(MemoryPlanner.__module__, plot_layers.__name__)")
    assert printed == "lightning_memplan.callback plot_layers\n"
    assert "torch" in loaded


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--help", "usage: memplan"),
        ("--version", "memplan 0."),
        ("plan --help", "usage: memplan plan"),
        ("gpus a100", "A100 80GB"),
        ("gpus --json", '"name": "T4"'),
        ("history --file runs.jsonl", "Net on T4"),
        ("report --file runs.jsonl", "Net on T4"),
        ("report --file runs.jsonl --json", '"model": "Net"'),
    ],
)
def test_commands_without_a_job_import_nothing_heavy(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    peaks = {"steady": (2**30, 2**31)}
    record = {"structure": "a1", "model": "Net", "device": "T4", "total": 2**34, "capacity": 2**34, "method": "trace"}
    line = {"schema": 1, **record, "batch_size": 8, "predicted": peaks, "measured": peaks}
    Path("runs.jsonl").write_text(json.dumps(line) + "\n")
    printed, loaded = run(MEMPLAN, *words.split())
    assert said in printed
    assert loaded == []


def test_the_devices_that_nvml_tells_need_no_torch(monkeypatch):
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    printed, loaded = run(NVML + MEMPLAN, "devices")
    # 23 GiB are free, and 450 MiB of these are the CUDA context's
    assert printed.splitlines()[1].split() == ["NVIDIA", "A", "22.56", "GiB", "8.6"]
    assert loaded == []


def test_a_job_is_all_that_needs_torch():
    words = "--for torch.nn:Linear --arg in_features=8 --arg out_features=8 --input 8 --max-batch-size 2"
    printed, loaded = run(MEMPLAN, "gpus", "t4", *words.split())
    assert printed.splitlines()[1].split() == ["T4", "14.31", "GiB", "2"]
    assert "torch" in loaded


# --- the names


def test_every_public_name_is_there():
    for name in mp.__all__:
        value = getattr(mp, name)
        assert vars(mp)[name] is value  # kept: the second time is an attribute like any other
    assert set(mp.__all__) <= set(dir(mp))
    assert mp.__all__ == sorted(mp.__all__, key=lambda name: (not name[0].isupper(), name))


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lightning_memplan' has no attribute 'MemoryPlaner'"):
        _ = mp.MemoryPlaner
    with pytest.raises(ImportError, match="cannot import name 'MemoryPlaner'"):
        from lightning_memplan import MemoryPlaner  # noqa: F401


def test_type_checkers_read_the_same_names():
    tree = ast.parse(Path(mp.__file__).read_text())
    static = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    read = {name.name: node.module for node in static.body for name in node.names}
    assert read == {name: f"lightning_memplan.{module}" for name, module in mp._MODULE_OF.items()}
    assert sorted(read) == sorted(mp.__all__)
