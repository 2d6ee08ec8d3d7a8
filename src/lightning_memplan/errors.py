"""Define all exceptions as one tree, and explain an error by the user's own line of code."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

#: Why a step cannot be traced:
#:
#: - ``"refused"``: the step raises for a batch of this size, as it does where it cannot cut it or has no room for it;
#: - ``"data_dependent"``: the step needs the value of a tensor;
#: - ``"failed"``: the step raises something else, whatever the batch size;
#: - ``"no_loss"``: the step returns nothing that could be trained;
#: - ``"sizes_differ"``: the step has other events at another batch size;
#: - ``"too_large"``: a batch would take too much of the host's memory;
#: - ``"uninitialized"``: a parameter has no shape yet;
#: - ``"not_copyable"``: a part of the module cannot be copied;
#: - ``"unsupported"``: the memory of a strategy or device is not modelled.
TraceReason = Literal[
    "refused",
    "data_dependent",
    "failed",
    "no_loss",
    "sizes_differ",
    "too_large",
    "uninitialized",
    "not_copyable",
    "unsupported",
]

#: Errors by which a step refuses a batch that it cannot cut, or has no room for
REFUSALS = (AssertionError, IndexError, RuntimeError, ValueError)


class MemplanError(Exception):
    """Base class of every error of this package.

    >>> issubclass(TraceError, MemplanError) and issubclass(DoesNotFitError, MemplanError)
    True
    """


class TraceError(MemplanError):
    """A training step cannot be traced; says what it needs and where. ``reason`` names the kind of obstacle.

    >>> raise TraceError("the step reads a value", reason="data_dependent")
    Traceback (most recent call last):
    ...
    lightning_memplan.errors.TraceError: the step reads a value
    >>> TraceError("FSDP does not train in precision '64-true'").reason
    'unsupported'
    """

    def __init__(self, message: str, *, reason: TraceReason = "unsupported") -> None:
        super().__init__(message)
        self.reason: TraceReason = reason

    @classmethod
    def of(cls, error: Exception) -> TraceError:
        """Explain what the user's step raised in a trace.

        >>> TraceError.of(IndexError("list index out of range")).reason
        'refused'
        """
        reason: TraceReason = "refused" if isinstance(error, REFUSALS) else "failed"
        return cls(explain(error), reason="data_dependent" if _needs_value(error) else reason)


@contextmanager
def as_trace_errors() -> Iterator[None]:
    """Turn an error of the user's code into a TraceError that names its line.

    >>> with as_trace_errors():
    ...     [][1]
    Traceback (most recent call last):
    ...
    lightning_memplan.errors.TraceError: the step failed in a trace (IndexError: list index out of range); at ...
    """
    try:
        yield
    except TraceError:
        raise
    except Exception as error:
        raise TraceError.of(error) from error


class DoesNotFitError(MemplanError):
    """The smallest batch size does not fit.

    ``needed`` are the bytes that the allocator would reserve, ``available`` those that it may. ``tried`` is True where
    real steps have shown it, False where it is predicted.

    >>> error = DoesNotFitError("batch size 1 needs more", needed=3 * 2**30, available=2 * 2**30)
    >>> error.needed - error.available
    1073741824
    """

    def __init__(self, message: str, *, needed: int, available: int, tried: bool = False) -> None:
        super().__init__(message)
        self.needed = needed
        self.available = available
        self.tried = tried

    def __reduce__(self) -> tuple[partial[DoesNotFitError], tuple[object, ...]]:
        # pickle it with its bytes: a spawned rank sends it to the process that waits for it
        return partial(type(self), needed=self.needed, available=self.available, tried=self.tried), self.args


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
    standard = filename.startswith(os.path.dirname(os.__file__) + os.sep) and "-packages" + os.sep not in filename
    return standard or filename.startswith(("<", *roots))


def _needs_value(error: BaseException) -> bool:
    """Check for the errors by which torch says that a fake tensor has no value (by name: this module has no torch)."""
    names = "DataDependentOutputException", "DynamicOutputShapeException", "GuardOnDataDependentSymNode"
    return type(error).__name__ in names


def explain(error: BaseException, within: str = "a trace", what: str = "the step") -> str:
    """Say why the step (or ``what`` else) fails ``within`` a trace or a probe, and at which line of the user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if not _is_library(frame.filename)]
    where = (
        f"{users[-1].filename}:{users[-1].lineno}: {users[-1].line}" if users else "no line of the module's own code"
    )
    kind = _kind(error)
    if _needs_value(error):
        what = f"{what} needs the value of a tensor ({kind} in {getattr(error, 'func', error)}), which a trace has not"
    else:
        what = f"{what} failed in {within} ({kind}: {first_line(error) or 'no message'})"
    return f"{what}; at {where}"


class UnmetDemandError(MemplanError, ValueError):
    """A batch size that was demanded (``min_batch_size``, ``effective_batch_size``) cannot be had.

    >>> raise UnmetDemandError("no batch size divides 7")
    Traceback (most recent call last):
    ...
    lightning_memplan.errors.UnmetDemandError: no batch size divides 7
    """


class PlanningFailedError(MemplanError):
    """Planning failed on at least one rank, for a reason that need not stop training; raised on all ranks alike.

    >>> raise PlanningFailedError("rank 1: ValueError: the dataset has length 0")
    Traceback (most recent call last):
    ...
    lightning_memplan.errors.PlanningFailedError: rank 1: ValueError: the dataset has length 0
    """


class RankGoneError(PlanningFailedError):
    """A rank is gone, or has failed, while the others wait for its result.

    ``is_first`` is True where it is the first rank, which warns for all others as long as it is there.

    >>> RankGoneError("rank 1 is gone").is_first
    False
    """

    def __init__(self, message: str, *, is_first: bool = False) -> None:
        super().__init__(message)
        self.is_first = is_first


class StoppedByRankError(MemplanError):
    """Another rank has failed for a reason that stops training: it stops on every rank.

    >>> issubclass(StoppedByRankError, MemplanError)
    True
    """


def located(error: BaseException) -> str:
    """Describe an error with its type, its first line, and the last line of the user's code that it passed.

    >>> try:
    ...     raise ValueError("no samples")
    ... except ValueError as error:
    ...     located(error).startswith("ValueError: no samples")
    True
    """
    text = first_line(error) or "without a message"
    if isinstance(error, MemplanError):
        return text
    users = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_library(frame.filename)]
    where = f" at {users[-1].filename}:{users[-1].lineno}: {users[-1].line}" if users else ""
    return f"{_kind(error)}: {text}{where}"


def _kind(error: BaseException) -> str:
    """Return the name of an error's class, or of the nearest base that users meet where it is one of fake tensors'."""
    return next(kind.__name__ for kind in type(error).__mro__ if not kind.__name__.startswith("Fake"))


def message_of(error: BaseException) -> str:
    """Return an error's message, which may be the work of a class of the user's.

    >>> message_of(ValueError("a prime"))
    'a prime'
    """
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - whatever its __str__ raises
        return "its message cannot be read"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, in the words of training: without fake tensors and their device.

    >>> first_line(RuntimeError("FakeTensor(..., device='cuda:0', size=(2, 3)) is no index"))
    'a tensor of shape (2, 3) on cuda:0 is no index'
    """
    lines = message_of(error).strip().splitlines()
    text = lines[0] if lines else ""
    for words, plain in _PLAIN:
        text = words.sub(plain, text)
    return text


#: Words of fake tensors, and what they mean to a user.
#: Source: torch/_subclasses/fake_tensor.py and torch/_tensor_str.py (2.14)
_PLAIN = tuple(
    (re.compile(words), plain)
    for words, plain in {
        r"FakeTensor\(\.\.\., device='([^']*)', size=\(([^)]*)\)[^()]*\)": r"a tensor of shape (\2) on \1",
        r"FakeTensor\(\.\.\., size=\(([^)]*)\)[^()]*\)": r"a tensor of shape (\1)",
        r"Unhandled FakeTensor Device Propagation for ": "",
        r"Cannot copy out of meta tensor; no data!": "the value of a tensor is not known before training",
        r"\.numpy\(\) is not supported for tensor subclasses\.": "the value of a tensor is not known before training",
        r"(?:FunctionalTensor|FakeTensorMode|FakeTensor)\b": "tensor",
        r"\bmeta tensors?\b|'meta' tensors?": "tensor without values",
        r"\bmeta device\b|device='?meta'?|device meta|'meta'|(?<=on )meta\b": "no device",
    }.items()
)


def issue_warning(text: str, stacklevel: int = 1) -> None:
    """Warn; where warnings are errors, log the text: no warning of the planner stops training."""
    with logged_if_error(text):
        warnings.warn(text, stacklevel=stacklevel + 1)


@contextmanager
def logged_if_error(text: str) -> Iterator[None]:
    """Log a text where the warning that says it is raised, since warnings are errors (``-W error``)."""
    try:
        yield
    except Warning:
        logging.getLogger(__package__).warning(text)


@contextmanager
def planning_warnings() -> Iterator[None]:
    """Issue only the planner's own warnings, at the end: under ``-W error`` no library's warning stops planning."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for each in caught:
            if str(each.message).startswith("MemoryPlanner"):
                with logged_if_error(str(each.message)):
                    warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
