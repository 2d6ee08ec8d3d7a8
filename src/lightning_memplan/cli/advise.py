"""``memplan advise``: what would take less memory."""

from __future__ import annotations

import argparse

from lightning_memplan.cli.arguments import add_job
from lightning_memplan.cli.output import progress, show
from lightning_memplan.report.plans import advice_table
from lightning_memplan.types import as_dict

HELP = "what would take less memory, by a trace of each change"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    parser.add_argument("--batch-size", type=int, metavar="N", help="(default: the largest that fits)")


def run(args: argparse.Namespace) -> None:
    from lightning_memplan.cli.job import device_of, make_job

    job, device = make_job(args), device_of(args)
    with progress(f"tracing changes to {job.name}"):
        found = job.advise(device, args.batch_size, args.margin)
    fields = {"model": job.name, "advice": [as_dict(item) for item in found]}
    show(fields if args.json else advice_table(found), as_json=args.json)
