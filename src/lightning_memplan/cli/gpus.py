"""``memplan gpus``: the GPUs of the catalogue, and with a job the largest batch size on each."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_memplan.cli.arguments import add_job, add_limits, limits_of
from lightning_memplan.cli.output import UsageError, progress, show
from lightning_memplan.devices.catalogue import gpus
from lightning_memplan.report.plans import cards_table, devices_table
from lightning_memplan.types import Device, as_dict

HELP = "the GPUs that can be named; with --for, the largest batch size of each"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", help="words of the GPUs' names")
    add_job(parser, option="--for")
    add_limits(parser)


def run(args: argparse.Namespace) -> None:
    devices = _with_words(" ".join(args.words))
    if args.target:
        _run_for_job(args, devices)
    else:
        show([as_dict(device) for device in devices] if args.json else devices_table(devices), as_json=args.json)


def _run_for_job(args: argparse.Namespace, devices: Sequence[Device]) -> None:
    from lightning_memplan.cli.job import make_job

    job = make_job(args)
    with progress(f"planning {job.name}"):
        found = job.plan_each(devices, limits_of(args))
    rows = [as_dict(device) | {"batch_size": size} for device, size in found]
    show(rows if args.json else cards_table(found), as_json=args.json)


def _with_words(text: str) -> list[Device]:
    """Return the GPUs of the catalogue whose names have each of these words.

    >>> [device.name for device in _with_words("a100")]
    ['A100 40GB', 'A100 80GB']
    """
    words = text.lower().split()
    found = [device for device in gpus() if all(word in device.name.lower() for word in words)]
    if not found:
        raise UsageError(f"no GPU of the catalogue has {text!r} in its name: memplan gpus lists all")
    return found
