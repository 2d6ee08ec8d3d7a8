"""``memplan completion``: the script with which a shell completes memplan's words."""

from __future__ import annotations

import argparse

from lightning_memplan.cli.output import show

HELP = "what a shell reads to complete memplan's words"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def run(args: argparse.Namespace) -> None:
    try:
        import shtab
    except ModuleNotFoundError as error:
        text = "completion needs shtab: pip install 'lightning-memplan[completion]'"
        raise ModuleNotFoundError(text) from error
    show(shtab.complete(args.parser, args.shell), as_json=args.json)
