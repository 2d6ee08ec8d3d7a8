"""Check arguments before any work begins; each error says in one sentence what is wrong with a value."""

from __future__ import annotations

from typing import Literal, get_args

Method = Literal["auto", "trace", "formula", "probe"]


def check_method(method: object) -> None:
    """Check that ``method`` is a ``Method``.

    >>> check_method("guess")
    Traceback (most recent call last):
    ...
    ValueError: method is one of 'auto', 'trace', 'formula', 'probe', not 'guess'
    """
    if method not in get_args(Method):
        raise ValueError(f"method is one of {', '.join(map(repr, get_args(Method)))}, not {method!r}")


def check_count(name: str, value: object) -> None:
    """Check that ``value`` is an int of at least 1; an error calls it ``name``."""
    if not _is_count(value):
        raise ValueError(f"{name} is an int of at least 1, not {value!r}")


def check_batch_size(batch_size: object) -> None:
    """Check that ``batch_size`` is an int of at least 1."""
    if not _is_count(batch_size):
        raise ValueError(f"a batch size is an int of at least 1, not {batch_size!r}")


def check_margin(margin: object) -> None:
    """Check that ``margin`` is a number of at least 0 and below 1."""
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin < 1:
        raise ValueError(
            f"margin is the part of the device's memory to leave free, at least 0 and below 1, not {margin!r}"
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless ``value`` is one of the choices.

    >>> check_choice("resume", "restart", ("keep", "plan"))
    Traceback (most recent call last):
    ...
    ValueError: resume is 'keep' or 'plan', not 'restart'
    """
    if value not in choices:
        raise ValueError(f"{name} is {' or '.join(map(repr, choices))}, not {value!r}")
