"""Find and replace a Trainer's loaders."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any, Literal, get_args

from lightning_memplan.lightning.compat import (
    FLAVOURS,
    is_combined_loader,
    is_datamodule,
    is_lightning_module,
    isolated_random_state,
)

Phase = Literal["train", "val", "test"]  #: whose loaders


def _loop(trainer: Any, phase: Phase) -> Any:
    loops = {"train": trainer.fit_loop, "val": trainer.fit_loop.epoch_loop.val_loop, "test": trainer.test_loop}
    return loops[phase]


def loader_source(trainer: Any, module: Callable[[], Any], datamodule: Any, phase: Phase = "train") -> Any:
    """What the Trainer trains, validates or tests on: the loaders that were passed, or those that a hook makes.

    ``module`` gives the module as it is when its ``setup`` has run. It, or the datamodule, is asked on a shallow copy.
    Validation and tests take one loader after the other, which a CombinedLoader says.
    """
    source = _loop(trainer, phase)._data_source.instance
    if loaders_are_made(trainer, phase):
        with isolated_random_state():
            made = datamodule if is_datamodule(source) else module()
            owner = copy.copy(made)
            if is_lightning_module(owner):  # a copied module has no trainer (LightningModule.__getstate__)
                owner.__dict__["_trainer"] = made.__dict__["_trainer"]
            source = getattr(owner, f"{phase}_dataloader")()
    if phase == "train" or is_combined_loader(source):
        return source
    return importlib.import_module(f"{FLAVOURS[0].__name__}.utilities.combined_loader").CombinedLoader(
        source, "sequential"
    )


def loaders_are_made(trainer: Any, phase: Phase = "train") -> bool:
    """Whether the loaders are made by a hook of the module's or datamodule's."""
    source = _loop(trainer, phase)._data_source.instance
    return is_lightning_module(source) or is_datamodule(source)


def remember_arguments(copied: Any, **changed: Any) -> None:
    """Change what Lightning remembers of how a loader or batch sampler was made, on a copy of one.

    Lightning notes the arguments of those that a hook makes, and makes them anew with these for a distributed sampler
    (lightning_fabric/utilities/data.py, ``_wrap_init_method``).
    """
    noted = vars(copied)
    if "__pl_saved_args" not in noted:
        return
    names, args, kwargs = noted["__pl_saved_arg_names"], noted["__pl_saved_args"], dict(noted["__pl_saved_kwargs"])
    for name, value in changed.items():
        if name in names:
            place = names.index(name)
            args = (*args[:place], value, *args[place + 1 :])
        else:
            kwargs[name] = value
    noted.update(__pl_saved_args=args, __pl_saved_kwargs=kwargs)


def change_loaders(trainer: Any, change: Callable[[Any], Any], phase: Phase = "train") -> None:
    """Let the Trainer have ``change(loaders)`` in the place of those that were passed, or that a hook makes.

    What was passed is changed once; what a hook makes, each time it is called in this fit. Call it at ``setup``.
    """
    source = _loop(trainer, phase)._data_source
    owner = source.instance
    if not loaders_are_made(trainer, phase):
        source.instance = change(owner)
        return

    def dataloader() -> Any:
        loaders = type(source).dataloader(source)
        return change(loaders) if source.instance is owner else loaders

    source.dataloader = dataloader


def kept_loaders(trainer: Any, phase: Phase = "train") -> Callable[[], None]:
    """What undoes a ``change_loaders`` that is yet to come."""
    source = _loop(trainer, phase)._data_source
    before = dict(vars(source))

    def put_back() -> None:
        vars(source).clear()
        vars(source).update(before)

    return put_back


def release_loaders(trainer: Any) -> None:
    """Undo ``change_loaders`` for the fits to come."""
    for phase in get_args(Phase):
        vars(_loop(trainer, phase)._data_source).pop("dataloader", None)


def train_loaders(trainer: Any) -> Any:
    """What the Trainer trains with, once it has begun: a CombinedLoader."""
    return trainer.fit_loop._combined_loader
