"""Define all exceptions as one tree, and explain an error by the user's own line of code."""

from __future__ import annotations

import os
import sys
import traceback
from functools import partial


class MemplanError(Exception):
    """Base class of every error of this package.

    >>> issubclass(TraceError, MemplanError) and issubclass(DoesNotFitError, MemplanError)
    True
    """


class TraceError(MemplanError):
    """A training step cannot be traced; says what it needs and where.

    >>> raise TraceError("the step reads a value")
    Traceback (most recent call last):
    ...
    lightning_memplan.errors.TraceError: the step reads a value
    """


class DoesNotFitError(MemplanError):
    """The smallest batch size does not fit.

    ``needed`` are the bytes that the allocator would reserve, ``available`` those that it may.

    >>> error = DoesNotFitError("batch size 1 needs more", needed=3 * 2**30, available=2 * 2**30)
    >>> error.needed - error.available
    1073741824
    """

    def __init__(self, message: str, *, needed: int, available: int) -> None:
        super().__init__(message)
        self.needed = needed
        self.available = available

    def __reduce__(self) -> tuple[partial[DoesNotFitError], tuple[object, ...]]:
        # pickle it with its bytes: a spawned rank sends it to the process that waits for it
        return partial(type(self), needed=self.needed, available=self.available), self.args


class ApplyError(MemplanError):
    """The planned batch size cannot be written where the user keeps it. The message says what to change.

    >>> raise ApplyError("no attribute")
    Traceback (most recent call last):
    ...
    lightning_memplan.errors.ApplyError: no attribute
    """


# ------------------------------------------------------------------------------------------------------------- errors
_LIBRARIES = ("torch", "lightning_memplan", "pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities")


def _is_library(filename: str) -> bool:
    modules = (sys.modules.get(name) for name in (*_LIBRARIES, "torchmetrics"))
    roots = (os.path.dirname(module.__file__) + os.sep for module in modules if module is not None and module.__file__)
    return filename.startswith(("<", *roots))


def explain(error: BaseException, within: str = "a trace", what: str = "the step") -> str:
    """What the step (or ``what`` else) needs that it has not ``within`` a trace or a probe, and the line of the user's
    code."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if not _is_library(frame.filename)]
    where = (
        f"{users[-1].filename}:{users[-1].lineno}: {users[-1].line}" if users else "no line of the module's own code"
    )
    kind = type(error).__name__
    if kind in ("DataDependentOutputException", "DynamicOutputShapeException", "GuardOnDataDependentSymNode"):
        what = f"{what} needs the value of a tensor ({kind} in {getattr(error, 'func', error)}), which a trace has not"
    else:
        text = str(error).strip().splitlines()
        what = f"{what} failed in {within} ({kind}: {text[0] if text else 'no message'})"
    return f"{what}; at {where}"
