"""The commands, a function each."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_memplan.cli.job import Job, device_of, make_job
from lightning_memplan.cli.output import UsageError, say, working, written
from lightning_memplan.devices.catalogue import gpus
from lightning_memplan.devices.detect import detect_devices
from lightning_memplan.monitor.csv_log import read_log
from lightning_memplan.monitor.history import Lesson, history, latest, lesson
from lightning_memplan.planning.api import advise, cards_for, check, plan
from lightning_memplan.planning.limits import MARGIN
from lightning_memplan.report.figures import plot_measurements, plot_timeline
from lightning_memplan.report.plans import (
    advice_table,
    cards_table,
    device_fields,
    devices_table,
    estimate_table,
    plan_fields,
    plan_table,
)
from lightning_memplan.report.runs import history_table, lessons_table, logged_report, run_report
from lightning_memplan.types import Advice, Run
from lightning_memplan.units import format_bytes

FITS, DOES_NOT_FIT, CANNOT_TELL = 0, 1, 2


_NO_RUNS = "no runs on record: MemoryPlanner adds one for each fit on a GPU"


# --- commands
def run_estimate(args: argparse.Namespace) -> int:
    job, device = make_job(args), device_of(args, default=False)
    with working(f"estimating {job.name}"):
        found = job.estimated(device)
    if args.snapshot:
        with written(args.snapshot):
            found.save_snapshot(args.snapshot, args.batch_size[-1])
    if args.plot:
        with written(args.plot):
            plot_timeline(found, args.batch_size[-1], device=device).savefig(args.plot)
    rows = [
        {
            "batch_size": size,
            "peak_reserved": found.peak(size),
            "peak_allocated": found.peak_allocated(size),
            "formula": found.formula.memory(size),
            "phase": found.phase(size),
            "breakdown": dict(found.breakdown(size)),
        }
        for size in args.batch_size
    ]
    if args.json:
        say(args, {"model": job.name, "method": found.method, "estimates": rows, "notes": list(found.notes)})
    else:
        say(args, estimate_table(job.name, rows, found.notes))
    return FITS


def run_plan(args: argparse.Namespace) -> int:
    job, device = make_job(args), device_of(args)
    with working(f"planning {job.name}"):
        found = plan(
            job.module,
            job.batch,
            device=device,
            margin=args.margin,
            min_batch_size=args.min_batch_size,
            max_batch_size=args.max_batch_size,
            multiple_of=args.multiple_of,
            effective_batch_size=args.effective_batch_size,
            **job.settings,
        )
    advice = _advised(args, job, device, found.batch_size) if args.advice else None
    if args.json:
        more = {} if advice is None else {"advice": [asdict(item) for item in advice]}
        say(args, {"model": job.name, "fits": True, **plan_fields(found), **more})
    else:
        say(args, plan_table(found))
        if advice is not None:
            say(args, f"\nwhat would take less memory at batch size {found.batch_size}\n{advice_table(advice)}")
    return FITS


def run_check(args: argparse.Namespace) -> int:
    job, device, size = make_job(args), device_of(args), args.batch_size
    with working(f"checking {job.name}"):
        found = check(job.module, job.batch, size, device=device, margin=args.margin, **job.settings)
    if args.json:
        say(args, {"model": job.name, "fits": True, **plan_fields(found)})
    else:
        needed, budget = format_bytes(found.predicted_peak), format_bytes(found.budget)
        say(args, f"{job.name} fits on {device.name} at batch size {size}: {needed} of a budget of {budget}")
    return FITS


def run_advise(args: argparse.Namespace) -> int:
    job = make_job(args)
    found = _advised(args, job, device_of(args), args.batch_size)
    say(args, {"model": job.name, "advice": [asdict(item) for item in found]} if args.json else advice_table(found))
    return FITS


def _advised(args: argparse.Namespace, job: Job, device: Any, batch_size: int | None) -> tuple[Advice, ...]:
    settings = {name: value for name, value in job.settings.items() if name != "method"}
    limits = {"batch_size": batch_size, "device": device, "margin": args.margin}
    with working(f"tracing changes to {job.name}"):
        return advise(job.module, job.batch, **limits, **settings)


def run_gpus(args: argparse.Namespace) -> int:
    words = " ".join(args.words).lower().split()
    cards = [card for card in gpus() if all(word in card.name.lower() for word in words)]
    if not cards:
        raise UsageError(f"no card of the catalogue has {' '.join(args.words)!r} in its name: memplan gpus lists all")
    if args.target:
        job = make_job(args)
        limits = {name: getattr(args, name) for name in ("margin", "min_batch_size", "max_batch_size", "multiple_of")}
        with working(f"planning {job.name}"):
            found = cards_for(job.module, job.batch, cards=cards, **limits, **job.settings)
        rows = [device_fields(card) | {"batch_size": size} for card, size in found]
        say(args, rows if args.json else cards_table(found))
        return FITS
    say(args, [device_fields(card) for card in cards] if args.json else devices_table(cards))
    return FITS


def run_devices(args: argparse.Namespace) -> int:
    found = detect_devices()
    if args.json:
        say(args, [device_fields(device) for device in found])
    else:
        say(args, devices_table(found) if found else "no CUDA device here: name one by --gpu (memplan gpus lists them)")
    return FITS


def run_history(args: argparse.Namespace) -> int:
    runs = _runs(args)
    if args.json:
        say(args, [asdict(run) for run in runs])
    else:
        say(args, history_table(runs) if runs else _NO_RUNS)
    return FITS


def run_report_command(args: argparse.Namespace) -> int:
    what = " ".join(args.words)
    if what and Path(what).exists():
        return _report_log(args, what)
    if args.plot:
        raise UsageError("--plot draws each step, which the history does not keep: name the folder of a CSVLogger")
    runs = _runs(args)
    words = what.lower().split()
    named = [run for run in runs if all(word in f"{run.model} {run.device}".lower() for word in words)]
    if what and not named:
        raise UsageError(
            f"{what!r} is no folder of a CSVLogger, and no module or card on record is called so: memplan history "
            "lists the runs"
        )
    if not named:
        say(args, {"run": None, "lessons": []} if args.json else _NO_RUNS)
        return FITS
    last = latest(named)
    taught = list(_lessons(runs, [last, *named]))
    if args.json:
        rows = [
            {"model": run.model, "device": run.device, "precision": run.settings.get("precision"), "runs": count}
            | asdict(each)
            for run, count, each in taught
        ]
        say(args, {"run": asdict(last), "lessons": rows})
    else:
        say(args, run_report(last, taught[0][2].text))
        if taught[1:]:
            say(args, "\n" + lessons_table([(run, count, each.text) for run, count, each in taught[1:]]))
    return FITS


def _lessons(runs: Sequence[Run], named: Sequence[Run]) -> Iterator[tuple[Run, int, Lesson]]:
    """Of runs alike the last one, how many they are, and what they teach; those like the first come first."""
    groups: dict[tuple[str, str], list[Run]] = {(run.device, run.structure): [] for run in named}
    for run in runs:
        groups.get((run.device, run.structure), []).append(run)
    for alike in groups.values():
        last = alike[-1]
        taught = lesson(runs, last.structure, last.device, method=last.method, capacity=last.capacity, prior=MARGIN)
        yield last, sum(run.rank == 0 for run in alike), taught


def _report_log(args: argparse.Namespace, place: str) -> int:
    """What a run's log says of its steps."""
    found = read_log(place)
    if args.plot:
        with written(args.plot):
            plot_measurements(found.measurements).savefig(args.plot)
    if args.json:
        steps = [step._asdict() for step in found.measurements]
        validations = [peaks._asdict() for peaks in found.validations]
        say(args, {"folder": str(found.folder), "plan": found.plan, "steps": steps, "validations": validations})
    else:
        say(args, logged_report(str(found.folder), found.plan, found.measurements, found.validations))
    return FITS


def _runs(args: argparse.Namespace) -> list[Run]:
    if args.file and not Path(args.file).is_file():
        raise UsageError(
            f"there is no file {args.file!r}: without --file it is where MemoryPlanner keeps the history, "
            "$MEMPLAN_HISTORY or its default"
        )
    return history(args.file)


def run_completion(args: argparse.Namespace) -> int:
    try:
        import shtab
    except ModuleNotFoundError as error:
        text = "completion needs shtab: pip install 'lightning-memplan[completion]'"
        raise ModuleNotFoundError(text) from error
    say(args, shtab.complete(args.parser, args.shell))
    return FITS
