"""``memplan plan``: the largest batch size that fits."""

from __future__ import annotations

import argparse
from dataclasses import replace

from lightning_memplan.cli.arguments import add_job, add_limits, limits_of
from lightning_memplan.cli.output import progress, show
from lightning_memplan.report.plans import advice_table, plan_table
from lightning_memplan.types import as_dict

HELP = "the largest batch size that fits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    add_limits(parser)
    parser.add_argument("--effective-batch-size", type=int, metavar="N", help="of an optimizer's step, on all GPUs")
    parser.add_argument("--advice", action="store_true", help="and what would take less memory, as memplan advise")


def run(args: argparse.Namespace) -> None:
    from lightning_memplan.cli.job import device_of, make_job

    job, device = make_job(args), device_of(args)
    with progress(f"planning {job.name}"):
        found = job.plan(device, replace(limits_of(args), effective_batch_size=args.effective_batch_size))
    advice = None
    if args.advice:
        with progress(f"tracing changes to {job.name}"):
            advice = job.advise(device, found.batch_size, args.margin)
    if args.json:
        more = {} if advice is None else {"advice": [as_dict(item) for item in advice]}
        show({"model": job.name, "fits": True, **as_dict(found), **more}, as_json=True)
        return
    show(plan_table(found), as_json=False)
    if advice is not None:
        heading = f"\nwhat would take less memory at batch size {found.batch_size}"
        show(f"{heading}\n{advice_table(advice)}", as_json=False)
