"""``memplan estimate``: what training takes at given batch sizes, and where it goes."""

from __future__ import annotations

import argparse

from lightning_memplan.cli.arguments import add_job
from lightning_memplan.cli.output import progress, show, writing
from lightning_memplan.report.plans import estimate_table
from lightning_memplan.types import as_dict

HELP = "what training takes at given batch sizes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 64], metavar="N", help="(default: 1 8 64)")
    snapshot = "write the last size's for pytorch.org/memory_viz"
    parser.add_argument("--snapshot", metavar="FILE", help=snapshot)
    parser.add_argument("--plot", metavar="FILE.png", help="draw a step at the last size")


def run(args: argparse.Namespace) -> None:
    from lightning_memplan.cli.job import make_job, named_device

    job, device = make_job(args), named_device(args)
    with progress(f"estimating {job.name}"):
        found = job.estimate(device)
    last = args.batch_size[-1]
    if args.snapshot:
        with writing(args.snapshot):
            found.save_snapshot(args.snapshot, last)
    if args.plot:
        from lightning_memplan.report.figures import plot_timeline

        with writing(args.plot):
            plot_timeline(found, last, device=device).savefig(args.plot)
    rows = [found.row(size) for size in args.batch_size]
    if args.json:
        fields = {"model": job.name, "method": found.method, "estimates": [as_dict(row) for row in rows]}
        show(fields | {"notes": list(found.notes)}, as_json=True)
    else:
        show(estimate_table(job.name, rows, found.notes), as_json=False)
