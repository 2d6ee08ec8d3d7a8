"""Arguments that several commands share: the job, how it is trained, the GPU, and limits of the batch size."""

from __future__ import annotations

import argparse

from lightning_memplan.planning.limits import Limits
from lightning_memplan.settings import MARGIN


def add_job(parser: argparse.ArgumentParser, option: str | None = None) -> None:
    """Add the arguments that ``make_job`` and ``device_of`` read; with ``option`` it names the target, else its place.

    >>> parser = argparse.ArgumentParser()
    >>> add_job(parser, option="--for")
    >>> parser.parse_args(["--for", "train.py:Net"]).target
    'train.py:Net'
    """
    job = parser.add_argument_group("the job")
    text = "what makes the module: package.module:Name or script.py:name"
    if option is None:
        job.add_argument("target", nargs="?", metavar="TARGET", help=text)
    else:
        job.add_argument(option, dest="target", help=text)
    job.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="an argument of it")
    job.add_argument("--data", metavar="TARGET", help="what makes its datamodule, loader or batch")
    job.add_argument("--data-arg", action="append", default=[], metavar="NAME=VALUE", help="an argument of it")
    job.add_argument("--input", metavar="SHAPE", help="in place of --data, one sample: 3x224x224, 512:int64")
    job.add_argument("--labels", nargs="?", const="", metavar="SHAPE", help="with --input, whole-numbered labels")
    job.add_argument("--samples", choices=("first", "largest"), help="which samples make the batch (default: auto)")
    job.add_argument("--config", metavar="YAML", help="a LightningCLI's: module, data and Trainer")
    _add_training(parser)
    _add_device(parser)


def _add_training(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("how it is trained")
    how.add_argument("--precision", metavar="P", help="as a Trainer's: 32-true, 16-mixed, bf16-mixed, ...")
    how.add_argument("--optimizer", metavar="NAME", help="torch.optim's, for what is no LightningModule")
    how.add_argument("--optimizer-arg", action="append", default=[], metavar="NAME=VALUE", help="an argument of it")
    how.add_argument("--accumulate-grad-batches", type=int, metavar="N", help="as a Trainer's")
    how.add_argument("--gradient-clip-val", type=float, metavar="X", help="as a Trainer's")
    how.add_argument("--devices", type=int, metavar="N", help="GPUs that train together (default: 1)")
    how.add_argument(
        "--strategy",
        metavar="NAME",
        help="how they do: ddp, fsdp, fsdp2 or another of Lightning's, or a TARGET that makes one (default: ddp)",
    )
    how.add_argument("--wrap", action="append", default=[], metavar="CLASS", help="a layer that FSDP shards as a unit")
    how.add_argument("--method", choices=("auto", "trace", "formula", "probe"), help="how it is told (default: auto)")


def _add_device(parser: argparse.ArgumentParser) -> None:
    card = parser.add_argument_group("the GPU; the first of this machine where none is named")
    which = card.add_mutually_exclusive_group()
    which.add_argument("--gpu", metavar="NAME", help="a GPU that need not be here, such as 'A100 80GB'")
    which.add_argument("--memory", metavar="SIZE", help="any GPU of so much memory, such as 24GiB")
    card.add_argument("--margin", type=float, default=MARGIN, help=f"the part to leave free (default: {MARGIN})")


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Add the limits of the batch size that ``limits_of`` reads."""
    limits = parser.add_argument_group("limits")
    limits.add_argument("--min-batch-size", type=int, default=1, metavar="N", help="(default: 1)")
    limits.add_argument("--max-batch-size", type=int, metavar="N")
    limits.add_argument("--multiple-of", type=int, default=1, metavar="N", help="(default: 1)")


def limits_of(args: argparse.Namespace) -> Limits:
    """Return the limits that a command line sets."""
    return Limits(args.margin, args.min_batch_size, args.max_batch_size, args.multiple_of)


def add_history_file(parser: argparse.ArgumentParser) -> None:
    """Add the option that names another history than MemoryPlanner's own."""
    parser.add_argument("--file", metavar="FILE", help="(default: where MemoryPlanner keeps it)")
