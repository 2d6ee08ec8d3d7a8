"""What a CSVLogger wrote down of a run, read back: from the logger itself, and its report."""

from __future__ import annotations

import os

import pytest
from pytorch_lightning.loggers import CSVLogger

from lightning_memplan.cli.main import main
from lightning_memplan.monitor.csv_log import read_log
from lightning_memplan.report.metrics import plan_hparams, step_metrics, validation_metrics
from lightning_memplan.report.runs import logged_report
from lightning_memplan.types import Device, Measurement, Peaks, Plan

GiB = 2**30
CARD = Device("my card", total=16 * GiB)
PLAN = Plan(
    batch_size=8,
    device=CARD,
    budget=15 * GiB,
    margin=0.0625,
    limited_by="dataset",
    method="trace",
    peak_reserved=4 * GiB,
    peak_allocated=3 * GiB,
    formula_peak=5 * GiB,
)
STEPS = [
    Measurement(0, 2 * GiB, 3 * GiB, 2 * GiB, 3 * GiB, {"forward": GiB}, {"forward": GiB}, floor=GiB, retries=2),
    Measurement(1, 3 * GiB, 4 * GiB, 4 * GiB, 5 * GiB, floor=GiB, device_allocations=1),
]


def write(folder, *, prefix="", memory=True):
    """A run as CSVLogger has it: hyperparameters, steps of which one measured phases, a validation, and a loss."""
    logger = CSVLogger(folder, prefix=prefix)
    logger.log_hyperparams({"batch_size": 8, "lr": 0.1, **(plan_hparams(PLAN) if memory else {})})
    for step in STEPS:
        logger.log_metrics({"loss": 0.5, **(step_metrics(step, 5 * GiB) if memory else {})}, step=step.step)
    if memory:
        logger.log_metrics(validation_metrics(Peaks(GiB // 2, 3 * GiB)), step=1)
    logger.log_metrics({"val_accuracy": 0.25}, step=1)
    logger.finalize("success")
    return logger.log_dir


@pytest.mark.parametrize("prefix", ["", "fold 1"])
def test_what_was_logged_is_read(tmp_path, prefix):
    found = read_log(write(tmp_path, prefix=prefix))
    assert found.measurements == STEPS
    assert found.validations == [Peaks(GiB // 2, 3 * GiB)]
    assert (found.plan["device"], found.plan["batch_size"], found.plan["margin"]) == ("my card", "8", "0.0625")


def test_the_last_written_of_the_runs_below(tmp_path):
    first, second = write(tmp_path), write(tmp_path)
    os.utime(f"{first}/metrics.csv", (2**31, 2**31))
    assert str(read_log(tmp_path).folder) == first
    os.utime(f"{second}/metrics.csv", (2**32, 2**32))
    write(tmp_path, memory=False)
    assert str(read_log(tmp_path).folder) == second
    assert str(read_log(f"{second}/metrics.csv").folder) == second


def test_without_hyperparameters_there_are_the_steps(tmp_path):
    place = write(tmp_path)
    os.remove(f"{place}/hparams.yaml")
    found = read_log(place)
    assert (found.plan, found.measurements) == ({}, STEPS)
    assert logged_report("here", {}, STEPS).splitlines()[:2] == ["here", "memory over 2 measured steps"]


def test_the_command(tmp_path, capsys):
    place = write(tmp_path)
    assert main(["report", place, "--plot", str(tmp_path / "steps.png")]) == 0
    # reserved: predicted 4, actual 5, (4 - 5) / 5 = -20 %; allocated: 3 and 4, -25 %, and 4 / 3 is 33.3 % more
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        "  batch size 8 on my card, limited by the dataset; planned by trace, margin",
        "  6.2 %",
        "memory over 2 measured steps",
        "                   predicted       actual      error",
        "  peak reserved     4.00 GiB     5.00 GiB    -20.0 %",
        "  peak allocated    3.00 GiB     4.00 GiB    -25.0 %",
        "    forward         1.00 GiB     1.00 GiB     +0.0 %",
        "    validation                 512.00 MiB",
        "  error of allocated, step by step: median -12.5 %, worst -25.0 % in step 1",
        "  1 of them allocated more than was predicted, at most 33.3 % more, in step 1",
        "  the allocator gave its cache back 2 times to serve a request, which takes",
        "  time: the card was full",
        "  card             16.00 GiB    31 % of it reserved  [######..............]",
    ]
    assert max(map(len, lines[1:])) <= 80
    assert (tmp_path / "steps.png").stat().st_size > 10_000
    assert main(["report", place, "--json"]) == 0
    assert '"retries": 2' in capsys.readouterr().out


def test_what_has_no_memory_in_it(tmp_path):
    with pytest.raises(ValueError, match=r"has no metrics\.csv: name the folder that a CSVLogger wrote, or its "):
        read_log(tmp_path)
    with pytest.raises(ValueError, match="has no memory in it: a MemoryPlanner logs it where the Trainer runs"):
        read_log(write(tmp_path, memory=False))
