"""Write the batch size where the user keeps it."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from lightning_memplan._errors import ApplyError


def holders_of(name: str, *owners: Any) -> list[tuple[Any, bool]]:
    """Everything that holds the batch size: ``(holder, is a mapping)`` for modules, datamodules and their hparams.

    >>> class Data:
    ...     batch_size = 4
    >>> [(type(holder).__name__, mapping) for holder, mapping in holders_of("batch_size", Data(), None)]
    [('Data', False)]
    """
    return list(_holders(name, owners))


def _holders(name: str, owners: tuple[Any, ...]) -> Iterator[tuple[Any, bool]]:
    for owner in owners:
        if owner is None:
            continue
        if hasattr(owner, name):
            yield owner, False
        hparams = getattr(owner, "hparams", None)
        if isinstance(hparams, MutableMapping) and name in hparams:
            yield hparams, True


def read_batch_size(name: str, *owners: Any) -> int:
    """The batch size as the user set it.

    Raises:
        ApplyError: nothing has an attribute or hyperparameter of that name.
        TypeError: it is not an int.
    """
    found = holders_of(name, *owners)
    if not found:
        owners_named = " or ".join(type(owner).__name__ for owner in owners if owner is not None)
        raise ApplyError(
            f"{owners_named} has no attribute or hyperparameter {name!r} to set: keep the batch size as self.{name} "
            "and make the dataloaders with it, name the attribute with batch_arg_name=..., or pass apply=False"
        )
    holder, mapping = found[0]
    value = holder[name] if mapping else getattr(holder, name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{type(holder).__name__}.{name} should be an int, the batch size, and is {value!r}")
    return value


def check_settable(name: str, *owners: Any, loaders_are_made: bool) -> None:
    """Raise unless ``write_batch_size`` can set the batch size, and loaders will be made with it.

    Raises:
        ApplyError: the loaders are there already, or nothing has an attribute or hyperparameter of that name.
        TypeError: it is not an int.
    """
    if not loaders_are_made:
        raise ApplyError(
            "the loaders were passed to fit, and keep the batch size that they were made with: make them in "
            f"train_dataloader() of a module or datamodule that keeps it as self.{name}, or pass apply=False and make "
            "them with planner.plan.batch_size, or mp.plan(module, loader).batch_size, yourself"
        )
    read_batch_size(name, *owners)


def write_batch_size(name: str, batch_size: int, *owners: Any) -> None:
    """Set the batch size on everything that holds it.

    >>> class Data:
    ...     batch_size = 4
    >>> data = Data()
    >>> write_batch_size("batch_size", 64, data)
    >>> data.batch_size
    64
    """
    for holder, mapping in holders_of(name, *owners):
        if mapping:
            holder[name] = batch_size
        else:
            setattr(holder, name, batch_size)
