"""Print results and progress, to a terminal or as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any


class UsageError(ValueError):
    """The command line is wrong; the text says what to type instead.

    >>> raise UsageError("'3,224' is no shape: write one sample's, such as --input 3x224x224")
    Traceback (most recent call last):
    ...
    lightning_memplan.cli.output.UsageError: '3,224' is no shape: write one sample's, such as --input 3x224x224
    """


def show(value: Any, *, as_json: bool) -> None:
    """Print a value as JSON, or a text; in colour on a terminal where rich is installed.

    >>> show("Net", as_json=False)
    Net
    >>> show({"fits": True}, as_json=True)
    {
      "fits": true
    }
    """
    if as_json:
        print(json.dumps(value, indent=2))
        return
    if sys.stdout.isatty():
        try:
            from rich.console import Console
        except ModuleNotFoundError:
            pass
        else:
            Console(soft_wrap=True).print(value, markup=False)
            return
    print(value)


@contextmanager
def progress(text: str, every: float = 1.0) -> Iterator[None]:
    """Show on a terminal what is being done and for how many seconds; erase the line at the end."""
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


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Turn a failure to write the file at ``path`` into a UsageError that names it."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path!r} cannot be written: {error.strerror or error}") from error


def describe(error: BaseException) -> str:
    """Return an error's type and text in one line.

    >>> describe(RuntimeError("no such  width"))
    'RuntimeError: no such width'
    """
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
