"""Parse the command line and run one command."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NoReturn

from lightning_memplan.cli.commands import (
    CANNOT_TELL,
    DOES_NOT_FIT,
    run_advise,
    run_check,
    run_completion,
    run_devices,
    run_estimate,
    run_gpus,
    run_history,
    run_plan,
    run_report_command,
)
from lightning_memplan.cli.output import described, say
from lightning_memplan.cuda.cudnn import check_named
from lightning_memplan.errors import DoesNotFitError, MemplanError
from lightning_memplan.planning.limits import MARGIN

_HELP = "memplan COMMAND --help lists what a command takes: memplan plan train.py:Net --data train.py:Data --gpu T4"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    >>> main(["gpus", "rtx 3090"])
    card         for training  compute capability
    RTX 3090        23.26 GiB                 8.6
    RTX 3090 Ti     22.94 GiB                 8.6
    0
    """
    args = _parse(argv)
    try:
        with warnings.catch_warnings():
            if not args.debug:
                warnings.simplefilter("ignore")
            check_named()
            return args.run(args)  # type: ignore[no-any-return]
    except DoesNotFitError as error:
        if args.json:
            say(args, {"fits": False, "needed": error.needed, "available": error.available, "message": str(error)})
        else:
            say(args, str(error))
        return DOES_NOT_FIT
    except Exception as error:
        if args.debug:
            raise
        known = isinstance(error, (MemplanError, ValueError, TypeError, ModuleNotFoundError))
        text = " ".join(str(error).split()) if known else described(error)
        print(f"memplan: error: {text}", file=sys.stderr)
        return CANNOT_TELL


# --- what is typed
class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(CANNOT_TELL, f"memplan: error: {message}; see {self.prog} --help\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="memplan", description="How much GPU memory a training job takes, without a GPU.", epilog=_HELP
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('lightning-memplan')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        added.add_argument("--json", action="store_true", help="print JSON; sizes are bytes")
        added.add_argument("--debug", action="store_true", help="show warnings, and the whole traceback of an error")
        return added

    added = command("plan", run_plan, "the largest batch size that fits")
    _add_job(added)
    _add_limits(added)
    added.add_argument("--effective-batch-size", type=int, metavar="N", help="of an optimizer's step, on all cards")

    added.add_argument("--advice", action="store_true", help="and what would take less memory, as memplan advise")

    added = command("check", run_check, "whether a batch size fits: exit status 0, or 1 where it does not")
    _add_job(added)
    added.add_argument("--batch-size", type=int, required=True, metavar="N")

    added = command("estimate", run_estimate, "what training takes at given batch sizes")
    _add_job(added)
    added.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 64], metavar="N", help="(default: 1 8 64)")
    _of_files(added.add_argument("--snapshot", metavar="FILE", help="write the last size's for pytorch.org/memory_viz"))
    _of_files(added.add_argument("--plot", metavar="FILE.png", help="draw a step at the last size"))

    added = command("advise", run_advise, "what would take less memory, by a trace of each change")
    _add_job(added)
    added.add_argument("--batch-size", type=int, metavar="N", help="(default: the largest that fits)")

    added = command("gpus", run_gpus, "the cards that can be named; with --for, the largest batch size of each")
    added.add_argument("words", nargs="*", help="words of the cards' names")
    _add_job(added, option="--for")
    _add_limits(added)

    command("devices", run_devices, "the GPUs of this machine")
    for name, run, text in (
        ("history", run_history, "earlier runs on a GPU: predicted and actual peak"),
        ("report", run_report_command, "a run, predicted against actual, and what earlier runs teach the next plan"),
    ):
        added = command(name, run, text)
        _of_files(added.add_argument("--file", metavar="FILE", help="(default: where MemoryPlanner keeps it)"))
        if run is run_report_command:
            what = "a CSVLogger's folder; or words of a module's or card's name (default: the last run on record)"
            _of_files(added.add_argument("words", nargs="*", metavar="RUN", help=what))
            _of_files(added.add_argument("--plot", metavar="FILE.png", help="draw each step of a CSVLogger's folder"))
    added = command("completion", run_completion, "what a shell reads to complete memplan's words")
    added.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    added.set_defaults(parser=parser)
    return parser.parse_args(argv)


def _add_job(parser: argparse.ArgumentParser, option: str | None = None) -> None:
    """What names a job: its target by position, or by an option."""
    job = parser.add_argument_group("the job")
    place: dict[str, Any] = {"nargs": "?", "metavar": "TARGET"} if option is None else {"dest": "target"}
    what = "what makes the module: package.module:Name or script.py:name"
    _of_files(job.add_argument(option or "target", help=what, **place))
    job.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="an argument of it")
    _of_files(job.add_argument("--data", metavar="TARGET", help="what makes its datamodule, loader or batch"))
    job.add_argument("--data-arg", action="append", default=[], metavar="NAME=VALUE", help="an argument of it")
    job.add_argument("--input", metavar="SHAPE", help="in place of --data, one sample: 3x224x224, 512:int64")
    job.add_argument("--labels", nargs="?", const="", metavar="SHAPE", help="with --input, whole-numbered labels")
    job.add_argument("--sample", choices=("first", "largest"), help="which samples make the batch (default: first)")
    _of_files(job.add_argument("--config", metavar="YAML", help="a LightningCLI's: module, data and Trainer"))
    how = parser.add_argument_group("how it is trained")
    how.add_argument("--precision", metavar="P", help="as a Trainer's: 32-true, 16-mixed, bf16-mixed, ...")
    how.add_argument("--optimizer", metavar="NAME", help="torch.optim's, for what is no LightningModule")
    how.add_argument("--optimizer-arg", action="append", default=[], metavar="NAME=VALUE", help="an argument of it")
    how.add_argument("--accumulate-grad-batches", type=int, metavar="N", help="as a Trainer's")
    how.add_argument("--gradient-clip-val", type=float, metavar="X", help="as a Trainer's")
    how.add_argument("--devices", type=int, metavar="N", help="cards that train together (default: 1)")
    how.add_argument(
        "--strategy",
        metavar="NAME",
        help="how they do: ddp, fsdp, fsdp2 or another of Lightning's, or a TARGET that makes one (default: ddp)",
    )
    how.add_argument("--wrap", action="append", default=[], metavar="CLASS", help="a layer that FSDP shards as a unit")
    how.add_argument("--method", choices=("auto", "trace", "formula", "probe"), help="how it is told (default: auto)")
    card = parser.add_argument_group("the card; the first of this machine where none is named")
    which = card.add_mutually_exclusive_group()
    which.add_argument("--gpu", metavar="NAME", help="a card that need not be here, such as 'A100 80GB'")
    which.add_argument("--memory", metavar="SIZE", help="any card of so much memory, such as 24GiB")
    card.add_argument("--margin", type=float, default=MARGIN, help=f"the part to leave free (default: {MARGIN})")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("limits")
    limits.add_argument("--min-batch-size", type=int, default=1, metavar="N", help="(default: 1)")
    limits.add_argument("--max-batch-size", type=int, metavar="N")
    limits.add_argument("--multiple-of", type=int, default=1, metavar="N", help="(default: 1)")


def _of_files(action: argparse.Action) -> None:
    """A shell completes it by files: ``shtab.FILE``."""
    action.complete = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}  # type: ignore[attr-defined]
