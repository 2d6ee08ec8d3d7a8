"""``memplan check``: whether one batch size fits, by the exit status."""

from __future__ import annotations

import argparse

from lightning_memplan.cli.arguments import add_job
from lightning_memplan.cli.output import progress, show
from lightning_memplan.types import as_dict
from lightning_memplan.units import format_bytes

HELP = "whether a batch size fits: exit status 0, or 1 where it does not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    parser.add_argument("--batch-size", type=int, required=True, metavar="N")


def run(args: argparse.Namespace) -> None:
    from lightning_memplan.cli.job import device_of, make_job

    job, device = make_job(args), device_of(args)
    with progress(f"checking {job.name}"):
        found = job.check(device, args.batch_size, args.margin)
    if args.json:
        show({"model": job.name, "fits": True, **as_dict(found)}, as_json=True)
        return
    needed, budget = format_bytes(found.peak_reserved), format_bytes(found.budget)
    where = f"{device.name} at batch size {args.batch_size}"
    show(f"{job.name} fits on {where}: {needed} of a budget of {budget}", as_json=False)
