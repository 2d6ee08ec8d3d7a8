"""Write hyperparameters and text through a Trainer's loggers.

Private interfaces of Lightning were checked in 2.6.6; tests in tests/unit/lightning fail where one of them moves.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lightning_memplan.lightning.compat import FLAVOURS

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
    from pytorch_lightning.loggers import Logger


def silent_logger(real: Any = None) -> Logger:
    """Return a logger that accepts every call, keeps nothing, and names the folders of the ``real`` one.

    Source: pytorch_lightning/loggers/logger.py (2.6.6), ``DummyLogger``.
    """
    silent = importlib.import_module(f"{FLAVOURS[0].__name__}.loggers.logger").DummyLogger
    folders = {}
    for name in ("save_dir", "root_dir", "log_dir"):
        with suppress(Exception):  # a logger of the user's may need a connection for it
            if isinstance(folder := getattr(real, name, None), (str, os.PathLike)):
                folders[name] = folder
    return type("SilentLogger", (silent,), folders)()  # type: ignore[no-any-return]


def tensorboard_writers(trainer: Trainer) -> list[Any]:
    """Return the SummaryWriter of each TensorBoard logger; ranks other than the first have none."""
    return [logger.experiment for logger in _loggers(trainer, "TensorBoardLogger")] if trainer.is_global_zero else []


def log_first_hyperparams(trainer: Trainer, module: LightningModule, params: Mapping[str, Any]) -> None:
    """Log hyperparameters to TensorBoard together with those of the module and datamodule.

    TensorBoard shows the hyperparameters that are logged first. Lightning logs its own after ``on_fit_start``, as they
    were before the batch size was set, so call this function there.
    """
    own = {**_initial_hparams(module), **_initial_hparams(trainer.datamodule)}  # type: ignore[attr-defined]
    own.pop("_class_path", None)  # written by LightningCLI
    for logger in _loggers(trainer, "TensorBoardLogger"):
        logger.log_hyperparams(own | dict(params))


def _initial_hparams(owner: Any) -> dict[str, Any]:
    """Return the hyperparameters that Lightning logs of a module or datamodule.

    Source: pytorch_lightning/loggers/utilities.py (2.6.6), ``_log_hyperparams``, which reads the flag of that name and
    ``hparams_initial``.
    """
    return dict(owner.hparams_initial) if getattr(owner, "_log_hyperparams", False) else {}


def log_hyperparams(trainer: Trainer, params: Mapping[str, Any]) -> None:
    """Log hyperparameters to every logger; leave out those that MLflow has, which refuses to change a value."""
    keeping = _loggers(trainer, "MLFlowLogger") if trainer.is_global_zero else []
    for logger in trainer.loggers:
        known = logger.experiment.get_run(logger.run_id).data.params if logger in keeping else ()  # type: ignore[attr-defined]
        logger.log_hyperparams({name: value for name, value in params.items() if name not in known})


def _loggers(trainer: Trainer, kind: str) -> list[Any]:
    kinds = tuple(getattr(flavour.loggers, kind) for flavour in FLAVOURS)
    return [logger for logger in trainer.loggers if isinstance(logger, kinds)]


def logged_step(trainer: Trainer) -> int:
    """Return the step under which Lightning itself logs the metrics of this batch.

    Source: pytorch_lightning/loops/training_epoch_loop.py (2.6.6).
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def say(text: str) -> None:
    """Print a text as Lightning prints its own, once for all ranks."""
    importlib.import_module(f"{FLAVOURS[0].__name__}.utilities.rank_zero").rank_zero_info(text)


def warn(text: str) -> None:
    """Warn on rank 0 alone."""
    utilities = importlib.import_module(f"{FLAVOURS[0].__name__}.utilities.rank_zero")
    utilities.rank_zero_warn(f"MemoryPlanner: {text}", stacklevel=6)
