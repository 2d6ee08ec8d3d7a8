"""Group what a training step needs: the module, the settings of its Trainer, and what it is trained with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_memplan.settings import StepSettings

MakeOptimizer = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


MAX_MICROBATCHES = 3  #: microbatches of an optimizer step that a trace holds at most: the first, one between, the last


def traced_microbatches(settings: StepSettings) -> int:
    """Return how many microbatches a traced optimizer step has. With more than three, those between are alike.

    >>> [traced_microbatches(StepSettings(accumulate_grad_batches=n)) for n in (1, 3, 100)]
    [1, 3, 3]
    """
    return min(settings.accumulate_grad_batches, MAX_MICROBATCHES)


@dataclass(frozen=True)
class TrainingSetup:
    """A module and how it is trained: all that its steps need beside a batch and a device.

    ``optimizer`` makes the optimizer of a module that is no LightningModule. ``loaders`` are those of training, which
    a step may ask its Trainer for; ``batch_size_name`` is the name of the attribute or hyperparameter that holds their
    batch size.

    >>> TrainingSetup(nn.Linear(4, 2)).settings.precision
    '32-true'
    """

    module: nn.Module
    settings: StepSettings = field(default_factory=StepSettings)
    trainer: Any = None
    datamodule: Any = None
    optimizer: MakeOptimizer | None = None
    loaders: Any = None
    batch_size_name: str = "batch_size"
