"""Replace an attribute for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give ``owner`` another attribute of that name inside, and restore its own afterwards.

    >>> class Loader:
    ...     workers = 4
    >>> with patched(Loader, "workers", 0):
    ...     Loader.workers
    0
    >>> Loader.workers
    4
    """
    own, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)
