"""Write hyperparameters, metrics and text through a Trainer's loggers.

Private interfaces of Lightning were checked in 2.6.6; tests in tests/unit/lightning fail where one of them moves.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from lightning_memplan.errors import issue_warning, located, planning_warnings
from lightning_memplan.lightning.compat import FLAVOURS

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
    from pytorch_lightning.loggers import Logger


def silent_logger(real: Any = None) -> Logger:
    """Return a logger that accepts every call, keeps nothing, and names the folders of the ``real`` one.

    Source: pytorch_lightning/loggers/logger.py (2.6.6), ``DummyLogger``.
    """
    silent = importlib.import_module(f"{FLAVOURS[0].__name__}.loggers.logger").DummyLogger
    folders: dict[str, Any] = {}
    on_disk = tuple(
        getattr(flavour.loggers, kind) for flavour in FLAVOURS for kind in ("TensorBoardLogger", "CSVLogger")
    )
    numbered = ("name", "version") if isinstance(real, on_disk) else ()  # others may begin a run to tell theirs
    for name in ("save_dir", "root_dir", "log_dir", *numbered):
        with suppress(Exception):  # a logger of the user's may need a connection for it
            if isinstance(folder := getattr(real, name, None), (str, int, os.PathLike)):
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


def warn(text: str, *, on_each_rank: bool = False) -> None:
    """Warn on rank 0 alone, or on each rank; where warnings are errors, log the text."""
    utilities = importlib.import_module(f"{FLAVOURS[0].__name__}.utilities.rank_zero")
    if on_each_rank or getattr(utilities.rank_zero_only, "rank", 0) == 0:
        issue_warning(f"MemoryPlanner: {text}", stacklevel=5)


class RunLog:
    """The loggers of one run. A failure is one warning, and nothing more is logged; where ``strict``, it is raised.

    >>> from types import SimpleNamespace
    >>> log = RunLog(SimpleNamespace(loggers=[]))
    >>> log.metrics({"memplan/actual_reserved_gib": 1.0})
    """

    def __init__(self, trainer: Any, *, strict: bool = False) -> None:
        self._trainer, self._strict, self._logs = trainer, strict, True

    def layout(self, charts: Mapping[str, Any]) -> None:
        """Lay out TensorBoard's charts. The last layout counts: call it early, the user's own may come later."""
        with self._softly("the charts of memory are not laid out in TensorBoard"):
            for writer in tensorboard_writers(self._trainer):
                writer.add_custom_scalars(charts)

    def first_hyperparams(self, module: LightningModule, params: Mapping[str, Any]) -> None:
        """Log hyperparameters to TensorBoard together with the user's own."""
        with self._softly():
            log_first_hyperparams(self._trainer, module, params)

    def hyperparams(self, params: Mapping[str, Any]) -> None:
        """Log hyperparameters to every logger."""
        with self._softly():
            log_hyperparams(self._trainer, params)

    def metrics(self, metrics: dict[str, float]) -> None:
        """Log metrics under the step under which Lightning logs its own."""
        loggers = self._trainer.loggers
        if not loggers or not self._logs:
            return
        with self._softly():
            step = logged_step(self._trainer)
            for logger in loggers:
                logger.log_metrics(metrics if len(loggers) == 1 else dict(metrics), step=step)

    def figure(self, name: str, draw: Callable[[], Any]) -> None:
        """Log the figure that ``draw`` returns to TensorBoard; nothing where it returns None."""
        with self._softly("the plan is not drawn for TensorBoard"), planning_warnings():
            for writer in tensorboard_writers(self._trainer) if self._logs else ():
                if (figure := draw()) is not None:
                    writer.add_figure(name, figure)

    @contextmanager
    def _softly(self, what: str = "") -> Iterator[None]:
        """Turn a failure into one warning: of ``what`` has failed, or of all logging, which ends with it."""
        try:
            yield
        except Exception as error:
            if self._strict:
                raise
            if what:
                warn(f"{what}: {located(error)}")
            elif self._logs:
                self._logs = False
                warn(f"memory is not logged: {located(error)}. Measurements are kept in planner.measurements")
