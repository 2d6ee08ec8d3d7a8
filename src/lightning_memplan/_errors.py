"""What can go wrong, as one tree.

MemplanError
├── TraceError        a training step cannot be traced: what it needs, and the line of the user's code that needs it
├── DoesNotFitError   the smallest batch size needs more than the device has
└── ApplyError        the batch size cannot be written where the user keeps it

Arguments that are wrong in themselves raise ``ValueError`` or ``TypeError``; a Trainer that is set up in a way that the
callback cannot serve raises Lightning's ``MisconfigurationException``.
"""

from __future__ import annotations

from functools import partial


class MemplanError(Exception):
    """Any error of this package.

    >>> issubclass(TraceError, MemplanError) and issubclass(DoesNotFitError, MemplanError)
    True
    """


class TraceError(MemplanError):
    """A training step cannot be traced; says what it needs and where.

    >>> raise TraceError("the step reads a value")
    Traceback (most recent call last):
    ...
    lightning_memplan._errors.TraceError: the step reads a value
    """


class DoesNotFitError(MemplanError):
    """The smallest batch size does not fit.

    ``needed`` and ``available`` are bytes: what the allocator would reserve, and what it may.

    >>> error = DoesNotFitError("batch size 1 needs more", needed=3 * 2**30, available=2 * 2**30)
    >>> error.needed - error.available
    1073741824
    """

    def __init__(self, message: str, *, needed: int, available: int) -> None:
        super().__init__(message)
        self.needed = needed
        self.available = available

    def __reduce__(self) -> tuple[partial[DoesNotFitError], tuple[object, ...]]:
        # so that it can cross from a spawned rank to the process that waits for it
        return partial(type(self), needed=self.needed, available=self.available), self.args


class ApplyError(MemplanError):
    """The planned batch size cannot be written where the user keeps it; says what to change.

    >>> raise ApplyError("no attribute")
    Traceback (most recent call last):
    ...
    lightning_memplan._errors.ApplyError: no attribute
    """
