"""Write hyperparameters and text through a Trainer's loggers."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from lightning_memplan.lightning.compat import FLAVOURS


def silent_logger() -> Any:
    """A logger of Lightning's that takes whatever is logged, and keeps nothing."""
    return importlib.import_module(f"{FLAVOURS[0].__name__}.loggers.logger").DummyLogger()


def tensorboard_writers(trainer: Any) -> list[Any]:
    """The SummaryWriter of each TensorBoard logger; none on ranks but the first, which have none."""
    return [logger.experiment for logger in _loggers(trainer, "TensorBoardLogger")] if trainer.is_global_zero else []


def log_first_hyperparams(trainer: Any, module: Any, params: dict[str, Any]) -> None:
    """Log hyperparameters to TensorBoard, with the module's and datamodule's own: it shows those that come first.

    Call it at ``on_fit_start``, after which Lightning logs their own, as they were before the batch size was set
    (pytorch_lightning/loggers/utilities.py, ``_log_hyperparams``).
    """
    own: dict[str, Any] = {}
    for owner in (module, trainer.datamodule):
        if getattr(owner, "_log_hyperparams", False):
            own |= owner.hparams_initial
    own.pop("_class_path", None)  # LightningCLI's
    for logger in _loggers(trainer, "TensorBoardLogger"):
        logger.log_hyperparams(own | params)


def log_hyperparams(trainer: Any, params: dict[str, Any]) -> None:
    """Log hyperparameters to every logger. MLflow keeps what it has: it refuses another value, with an exception."""
    keeping = _loggers(trainer, "MLFlowLogger") if trainer.is_global_zero else []
    for logger in trainer.loggers:
        known = logger.experiment.get_run(logger.run_id).data.params if logger in keeping else ()
        logger.log_hyperparams({name: value for name, value in params.items() if name not in known})


def _loggers(trainer: Any, kind: str) -> list[Any]:
    kinds = tuple(getattr(flavour.loggers, kind) for flavour in FLAVOURS)
    return [logger for logger in trainer.loggers if isinstance(logger, kinds)]


def logged_step(trainer: Any) -> int:
    """The step under which Lightning itself logs the metrics of this batch."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def say(text: str) -> None:
    """Print to whoever runs the Trainer, once for all ranks, as Lightning itself does."""
    _rank_zero().rank_zero_info(text)


def _rank_zero() -> ModuleType:
    return importlib.import_module(f"{FLAVOURS[0].__name__}.utilities.rank_zero")
