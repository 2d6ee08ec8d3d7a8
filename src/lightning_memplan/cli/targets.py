"""Find what a command line names, ``package.module:Name`` or ``script.py:name``, and call it with its arguments."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from lightning_memplan.cli.output import UsageError, describe


def find(path: str) -> Any:
    """Return the object that ``package.module:Name`` or ``script.py:name`` names.

    >>> find("torch.nn:Linear").__name__
    'Linear'

    Raises:
        UsageError: nothing is named so, or the module cannot be imported.
    """
    place, _, name = path.rpartition(":")
    if not place or not name:
        raise UsageError(f"{path!r} names nothing in a module: write package.module:Name or script.py:name")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else _imported(place)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{place!r} cannot be imported: {describe(error)}") from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
            raise UsageError(
                f"{place!r} has no {name!r}: it has {', '.join(public[:8]) or 'nothing that can be called'}"
            )
        found = getattr(found, part)
    return found


def make(path: str, pairs: Sequence[str], option: str) -> Any:
    """Call a class or a function with ``name=value`` arguments, given by ``option``; return any other object itself.

    >>> make("torch.nn:Linear", ["in_features=3", "out_features=2"], "--arg")
    Linear(in_features=3, out_features=2, bias=True)

    Raises:
        UsageError: nothing is named so, or the call fails.
    """
    found = find(path)
    if isinstance(found, nn.Module) or not callable(found):
        return found
    arguments = dict(parse_pair(pair, option) for pair in pairs)
    try:
        return found(**arguments)
    except Exception as error:
        raise UsageError(f"{path} cannot be made: {describe(error)}; its arguments are {option} name=value") from error


def parse_pair(text: str, option: str) -> tuple[str, Any]:
    """Return the name and the value of ``name=value``: a Python literal, else the text.

    >>> parse_pair("lr=0.1", "--arg"), parse_pair("norm=batch", "--arg")
    (('lr', 0.1), ('norm', 'batch'))

    Raises:
        UsageError: it has no name, or no value.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"{text!r} is no argument: write {option} name=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _imported(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as ``python -m`` does, and an installed script does not
    return importlib.import_module(name)


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"there is no file {str(path)!r}")
    known = sys.modules.get(path.stem)  # a second run would make other classes of the same names
    if known is not None and Path(getattr(known, "__file__", None) or "").resolve() == path.resolve():
        return known
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # as Python does for a script
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
