"""Find and set what holds the batch size: attributes and hyperparameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lightning_memplan.errors import ApplyError

DEFAULT_NAME = "batch_size"


@dataclass(frozen=True, slots=True)
class Holder:
    """One place that holds the batch size: an attribute of an object, or a key of a mapping.

    >>> class Data:
    ...     batch_size = 4
    >>> holder = Holder(Data(), "batch_size")
    >>> holder.write(8)
    >>> holder.read()
    8
    """

    owner: Any
    key: str

    def read(self) -> Any:
        return self.owner[self.key] if isinstance(self.owner, Mapping) else getattr(self.owner, self.key)

    def write(self, value: int) -> None:
        """Set it.

        Raises:
            ApplyError: it is read only, and does not follow what has been set elsewhere.
        """
        try:
            if isinstance(self.owner, MutableMapping):
                self.owner[self.key] = value
            else:
                setattr(self.owner, self.key, value)
        except Exception as error:
            if self.read() != value:  # a property that reads what was set before
                raise ApplyError(
                    f"{self} cannot be set to {value} ({type(error).__name__}: {error}): let it be set, or name "
                    "another attribute with batch_arg_name=..."
                ) from error

    def restore(self, value: int) -> None:
        """Set it to what it held before, where it can be set."""
        with suppress(ApplyError):
            self.write(value)

    def __str__(self) -> str:
        kind = type(self.owner).__name__
        return f"{kind}[{self.key!r}]" if isinstance(self.owner, Mapping) else f"{kind}.{self.key}"


def holders_of(name: str, *owners: Any) -> list[Holder]:
    """Return all holders of the batch size: modules, datamodules, and their hparams, which come first.

    A dotted name is looked up step by step, in attributes and mappings alike.

    >>> class Data:
    ...     batch_size = 4
    ...     hparams = {"data": {"batch_size": 4}}
    >>> print(*holders_of("batch_size", Data(), None), *holders_of("data.batch_size", Data()))
    Data.batch_size dict['batch_size']
    """
    found: dict[int, Holder] = {}
    for owner in owners:
        for root in (getattr(owner, "hparams", None), owner):  # a property may read what the hparams hold
            for holder in _holders(root, name):
                found.setdefault(id(holder.owner), holder)
    return list(found.values())


def _holders(root: Any, name: str) -> Iterator[Holder]:
    *path, key = name.split(".")
    for step in path:
        root = root.get(step) if isinstance(root, Mapping) else getattr(root, step, None)
    if root is not None and (key in root if isinstance(root, Mapping) else hasattr(root, key)):
        yield Holder(root, key)


def hold_batch_size(name: str, batch_size: int, unit: int | None, *owners: Any) -> None:
    """Set all holders of a replica to the batch size of its next step, where they can be set.

    ``unit`` is the batch size that belongs to what they hold: a holder that differs keeps its ratio to it.

    >>> class Net:
    ...     batch_size = 8
    >>> net = Net()
    >>> hold_batch_size("batch_size", 6, 4, net)
    >>> net.batch_size
    12
    """
    for holder in holders_of(name, *owners):
        with suppress(Exception):  # a property of the user's
            old = holder.read()
            if type(old) is int:
                holder.write(max(1, batch_size * old // unit) if unit else batch_size)
