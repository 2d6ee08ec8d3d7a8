"""Define what runs and records a step: fake tensors, or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lightning_memplan.memory.events import Event
from lightning_memplan.step.context import EventContext
from lightning_memplan.step.precision import LossScaler


def _as_it_is(optimizer: torch.optim.Optimizer) -> None:
    """Leave the optimizer as it was made."""


@dataclass(frozen=True)
class StepBackend:
    """The place where steps run and are recorded. A backend has

    - ``context``, which is told where the step is;
    - ``device``, on which the replica trains: a GPU, or the fake device that stands for one;
    - ``scaler``, which scales the loss of ``16-mixed``;
    - ``events``, which returns what has been recorded so far: the runner sees from it whether steps repeat;
    - ``prepare_optimizer``, which changes a new optimizer so that it steps as it would on a GPU.
    """

    context: EventContext
    device: torch.device
    scaler: LossScaler
    events: Callable[[], Sequence[Event]] = tuple
    prepare_optimizer: Callable[[torch.optim.Optimizer], None] = _as_it_is

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"
