"""Choose the strategy of a step from its settings."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_memplan.settings import Parallel
from lightning_memplan.step.strategies.base import ParallelStrategy, SingleDeviceStrategy, Strategy, UnmodelledStrategy
from lightning_memplan.step.strategies.ddp import DDPStrategy
from lightning_memplan.step.strategies.deepspeed import DeepSpeedStrategy
from lightning_memplan.step.strategies.fsdp import FSDPStrategy
from lightning_memplan.step.strategies.model_parallel import ModelParallelStrategy

_STRATEGIES: Mapping[str, type[ParallelStrategy]] = {
    "ddp": DDPStrategy,
    "fsdp": FSDPStrategy,
    "model_parallel": ModelParallelStrategy,
    "deepspeed": DeepSpeedStrategy,
    "other": UnmodelledStrategy,
}


def choose_strategy(parallel: Parallel | None) -> Strategy:
    """Return the strategy for one replica.

    >>> type(choose_strategy(Parallel("ddp", ranks=2))).__name__, type(choose_strategy(None)).__name__
    ('DDPStrategy', 'SingleDeviceStrategy')
    """
    return SingleDeviceStrategy() if parallel is None else _STRATEGIES[parallel.kind](parallel)
