"""Parse the command line, run one command, and turn its error into one line and an exit status."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import NoReturn, Protocol

from lightning_memplan.cli import advise, check, devices, estimate, gpus, history, plan, report
from lightning_memplan.cli.output import describe, show
from lightning_memplan.cuda.cudnn import check_named
from lightning_memplan.errors import DoesNotFitError, MemplanError

FITS, DOES_NOT_FIT, CANNOT_TELL = 0, 1, 2  #: exit status

_EPILOG = "memplan COMMAND --help lists what a command takes: memplan plan train.py:Net --data train.py:Data --gpu T4"


class Command(Protocol):
    """A module of this folder that is one command."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's own arguments."""

    def run(self, args: argparse.Namespace) -> None:
        """Do the work and print the result.

        Raises:
            DoesNotFitError: no batch size fits.
            Exception: the result cannot be told.
        """


_COMMANDS: Mapping[str, Command] = {
    "plan": plan,
    "check": check,
    "estimate": estimate,
    "advise": advise,
    "gpus": gpus,
    "devices": devices,
    "history": history,
    "report": report,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    >>> main(["gpus", "rtx 3090"])
    GPU          for training  compute capability
    RTX 3090        23.26 GiB                 8.6
    RTX 3090 Ti     22.94 GiB                 8.6
    0
    """
    args = parse(argv)
    try:
        with warnings.catch_warnings():
            if not args.debug:
                warnings.simplefilter("ignore")
            check_named()
            args.run(args)
    except DoesNotFitError as error:
        found = {"fits": False, "needed": error.needed, "available": error.available, "message": str(error)}
        show(found if args.json else str(error), as_json=args.json)
        return DOES_NOT_FIT
    except Exception as error:
        if args.debug:
            raise
        known = isinstance(error, (MemplanError, ValueError, TypeError, ModuleNotFoundError))
        text = " ".join(str(error).split()) if known else describe(error)
        print(f"memplan: error: {text}", file=sys.stderr)
        return CANNOT_TELL
    return FITS


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line; ``run`` of the result is the command's.

    >>> args = parse(["check", "train.py:Net", "--batch-size", "64"])
    >>> args.run is check.run, args.target, args.batch_size
    (True, 'train.py:Net', 64)

    Raises:
        SystemExit: the command line is wrong (status 2), or asks for help or the version (status 0).
    """
    parser = _Parser(
        prog="memplan", description="How much GPU memory a training job takes, without a GPU.", epilog=_EPILOG
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('lightning-memplan')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        added = commands.add_parser(name, help=command.HELP, description=command.HELP)
        added.set_defaults(run=command.run)
        added.add_argument("--json", action="store_true", help="print JSON; sizes are bytes")
        added.add_argument("--debug", action="store_true", help="show warnings, and the whole traceback of an error")
        command.add_arguments(added)
    return parser.parse_args(argv)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(CANNOT_TELL, f"memplan: error: {message}; see {self.prog} --help\n")
