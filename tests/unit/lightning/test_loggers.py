"""A failure of one logger, or of one kind of logging, ends nothing but itself."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from pytorch_lightning.loggers import TensorBoardLogger

from lightning_memplan.lightning.loggers import RunLog

EPOCH_LOOP = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=3))


class Writer:
    """Refuses charts and figures."""

    def add_custom_scalars(self, *_: Any) -> None:
        raise ConnectionError("no charts")

    add_figure = add_custom_scalars


class Logger(TensorBoardLogger):
    """Keeps what it is given; refuses hyperparameters where it is ``closed``."""

    def __init__(self, folder: Any, *, closed: bool = False) -> None:
        super().__init__(folder)
        self.closed, self.kept = closed, []

    @property
    def experiment(self) -> Any:
        return Writer()

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        if self.closed:
            raise ConnectionError("no hyperparameters")
        self.kept.append(dict(params))

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.kept.append((metrics, step))


def log_of(*loggers: Logger, strict: bool = False) -> RunLog:
    return RunLog(SimpleNamespace(loggers=list(loggers), is_global_zero=True, fit_loop=EPOCH_LOOP), strict=strict)


def said(what: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        what()
    return [str(each.message) for each in caught]


def test_charts_and_figures_that_fail_leave_metrics(tmp_path: Any) -> None:
    logger = Logger(tmp_path)
    log = log_of(logger)
    assert said(lambda: log.layout({}))[0].startswith(
        "MemoryPlanner: the charts of memory are not laid out in TensorBoard: ConnectionError: no charts"
    )
    assert said(lambda: log.figure("a figure", dict))[0].startswith(
        "MemoryPlanner: the plan is not drawn for TensorBoard: ConnectionError: no charts"
    )

    def draw() -> None:
        raise RecursionError("no figure")

    assert said(lambda: log.figure("a figure", draw))[0].startswith(
        "MemoryPlanner: the plan is not drawn for TensorBoard: RecursionError: no figure"
    )
    assert said(lambda: log.metrics({"peak": 1.0})) == []
    assert logger.kept == [({"peak": 1.0}, 3)]


def test_a_logger_that_fails_is_one_warning_and_logging_ends(tmp_path: Any) -> None:
    logger = Logger(tmp_path, closed=True)
    log = log_of(logger)
    assert len(said(lambda: log.hyperparams({"batch_size": 8}))) == 1
    assert said(lambda: log.hyperparams({"batch_size": 8})) == []
    log.metrics({"peak": 1.0})
    assert logger.kept == []


@pytest.mark.parametrize("name", ["layout", "figure", "hyperparams"])
def test_where_errors_are_asked_for_they_are_raised(tmp_path: Any, name: str) -> None:
    log = log_of(Logger(tmp_path, closed=True), strict=True)
    call = {"layout": lambda: log.layout({}), "figure": lambda: log.figure("a figure", dict)}
    with pytest.raises(ConnectionError):
        call.get(name, lambda: log.hyperparams({"batch_size": 8}))()
