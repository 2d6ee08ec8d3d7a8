"""Check arguments before any work is done, and say in one sentence what is wrong with a value."""

from __future__ import annotations

from typing import Literal

Method = Literal["auto", "trace", "formula", "probe"]


_METHODS = ("auto", "trace", "formula", "probe")


def check_method(method: object) -> None:
    """Raise ValueError unless ``method`` is one that there is."""
    if method not in _METHODS:
        raise ValueError(f"method is one of {', '.join(map(repr, _METHODS))}, not {method!r}")


def check_count(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a number of things."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is an int of at least 1, not {value!r}")


def check_margin(margin: object) -> None:
    """Raise ValueError unless ``margin`` is a part of the whole."""
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin < 1:
        raise ValueError(
            f"margin is the part of the device's memory to leave free, at least 0 and below 1, not {margin!r}"
        )


def check_batch_size(batch_size: object) -> None:
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"a batch size is an int of at least 1, not {batch_size!r}")
