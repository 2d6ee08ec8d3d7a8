"""Find and replace a Trainer's loaders.

Private interfaces of Lightning were checked in 2.6.6; tests in tests/unit/lightning fail where one of them moves.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning_memplan.lightning.compat import (
    FLAVOURS,
    is_combined_loader,
    is_datamodule,
    is_lightning_module,
    isolated_random_state,
)

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, Trainer
    from torch import nn

Phase = Literal["train", "val", "test"]  #: names a Trainer's loaders, by the loop that reads them


# ------------------------------------------------------------------------------------------------ a Trainer's loaders
def loader_source(
    trainer: Trainer,
    module: Callable[[], nn.Module],
    datamodule: LightningDataModule | None,
    phase: Phase = "train",
    change: Callable[[Any], None] | None = None,
) -> Any:
    """Return the loaders that the Trainer trains, validates or tests on: those passed to it, or those a hook makes.

    ``module`` returns the module after its ``setup`` has run. The hook is called on a shallow copy of that module, or
    of the datamodule; with ``change``, that is called before, and the copy's hyperparameters are its own. Validation
    and tests read one loader after the other: their loaders come as a CombinedLoader.
    """
    source = _data_source(trainer, phase).instance
    if loaders_are_made(trainer, phase):
        with isolated_random_state():
            made = datamodule if is_datamodule(source) else module()
            owner = copy.copy(made)
            if is_lightning_module(owner):  # a copied module has no trainer (LightningModule.__getstate__)
                owner.__dict__["_trainer"] = made.__dict__["_trainer"]
            if change is not None:
                if "_hparams" in vars(owner):
                    owner.__dict__["_hparams"] = copy.deepcopy(vars(owner)["_hparams"])
                change(owner)
            source = getattr(owner, f"{phase}_dataloader")()
    if phase == "train" or is_combined_loader(source):
        return source
    return importlib.import_module(f"{FLAVOURS[0].__name__}.utilities.combined_loader").CombinedLoader(
        source, "sequential"
    )


def loaders_are_made(trainer: Trainer, phase: Phase = "train") -> bool:
    """Return True if a hook of the module or datamodule makes the loaders."""
    source = _data_source(trainer, phase).instance
    return is_lightning_module(source) or is_datamodule(source)


def change_loaders(trainer: Trainer, change: Callable[[Any], Any], phase: Phase = "train") -> None:
    """Make the Trainer use ``change(loaders)`` in place of its loaders. Call it in ``setup``.

    Loaders that were passed are changed once; loaders that a hook makes, after each call of the hook in this fit.
    """
    source = _data_source(trainer, phase)
    owner = source.instance
    if not loaders_are_made(trainer, phase):
        source.instance = change(owner)
        return

    def dataloader() -> Any:
        loaders = type(source).dataloader(source)
        return change(loaders) if source.instance is owner else loaders

    source.dataloader = dataloader


def kept_loaders(trainer: Trainer, phase: Phase = "train") -> Callable[[], None]:
    """Return a function that undoes every later ``change_loaders``."""
    source = _data_source(trainer, phase)
    before = dict(vars(source))

    def put_back() -> None:
        vars(source).clear()
        vars(source).update(before)

    return put_back


def release_loaders(trainer: Trainer) -> None:
    """Undo ``change_loaders`` for later fits."""
    for phase in get_args(Phase):
        vars(_data_source(trainer, phase)).pop("dataloader", None)


def train_loaders(trainer: Trainer) -> Any:
    """Return the CombinedLoader that the Trainer trains with, once training has begun.

    Source: pytorch_lightning/loops/fit_loop.py (2.6.6), ``setup_data``.
    """
    return trainer.fit_loop._combined_loader


def _data_source(trainer: Trainer, phase: Phase) -> Any:
    """Return where a loop takes its loaders from, an object with ``instance`` and ``dataloader()``.

    Source: pytorch_lightning/trainer/connectors/data_connector.py (2.6.6), ``_DataLoaderSource``. Training has one
    source, its validation another, and ``trainer.validate`` and ``trainer.test`` one each.
    """
    if phase == "train":
        return trainer.fit_loop._data_source
    return trainer.fit_loop.epoch_loop.val_loop._data_source if phase == "val" else trainer.test_loop._data_source


# --------------------------------------------------------------------------------------------------- a CombinedLoader
def combined_mode(source: object) -> str:
    """Return how a CombinedLoader reads its loaders: "min_size", "max_size", "max_size_cycle" or "sequential".

    Return "" for any other collection.

    Source: pytorch_lightning/utilities/combined_loader.py (2.6.6), ``CombinedLoader._mode``.
    """
    return str(source._mode) if is_combined_loader(source) else ""  # type: ignore[attr-defined]


def copy_combined(source: Any, change: Callable[[Any], Any]) -> Any:
    """Return a copy of a CombinedLoader, not yet begun, with each of its loaders changed.

    Source: pytorch_lightning/utilities/combined_loader.py (2.6.6), ``CombinedLoader._iterator``.
    """
    own = copy.copy(source)
    own._iterator = None
    own.flattened = [change(loader) for loader in source.flattened]
    return own


# ------------------------------------------------------------------------------------------- arguments of a loader
def remember_arguments(copied: Any, **changed: Any) -> None:
    """Change the arguments that Lightning has noted for a loader or batch sampler, on a copy of one.

    Lightning notes the arguments of loaders that a hook makes, and uses them to make these loaders anew with a
    distributed sampler.

    Source: lightning_fabric/utilities/data.py (2.6.6), ``_wrap_init_method``.
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
