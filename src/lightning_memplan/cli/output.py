"""Print results and progress, to a terminal or as JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any


class UsageError(ValueError):
    """What was typed is wrong; says what to type."""


# --- what is printed
@contextmanager
def written(path: str) -> Iterator[None]:
    """What is written meanwhile is written, or a line says why not."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path!r} cannot be written: {error.strerror or error}") from error


@contextmanager
def working(text: str, every: float = 1.0) -> Iterator[None]:
    """Tell whoever looks what takes so long, and for how many seconds; the line is gone when it is done."""
    if not sys.stderr.isatty():
        yield
        return
    done, begun = Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(every):
            print(f"\r\x1b[K{text}, {time.monotonic() - begun:.0f} s", end="", file=sys.stderr, flush=True)

    teller = Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def say(args: argparse.Namespace, what: Any) -> None:
    """A value as JSON, or a text; with colours where rich is installed and someone looks."""
    if args.json:
        print(json.dumps(what, indent=2))
        return
    if sys.stdout.isatty():
        try:
            from rich.console import Console
        except ModuleNotFoundError:
            pass
        else:
            Console(soft_wrap=True).print(what, markup=False)
            return
    print(what)


def described(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
