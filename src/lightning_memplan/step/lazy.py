"""Give lazy layers their shapes, by a forward pass of a replica on the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_memplan.lightning.compat import isolated_random_state
from lightning_memplan.step.backend import StepBackend
from lightning_memplan.step.context import EventContext
from lightning_memplan.step.precision import FakeGradScaler
from lightning_memplan.step.quiet import leaving_no_trace
from lightning_memplan.step.runner import StepRunner
from lightning_memplan.step.setup import TrainingSetup

CPU = torch.device("cpu")


def has_lazy_layers(module: nn.Module) -> bool:
    """Return True if a parameter or buffer of the module has no shape yet.

    >>> has_lazy_layers(nn.LazyLinear(2)), has_lazy_layers(nn.Linear(1, 2))
    (True, False)
    """
    return any(map(torch.nn.parameter.is_lazy, (*module.parameters(), *module.buffers())))


def initialize(setup: TrainingSetup, batch: Any) -> None:
    """Run the forward pass of a replica, ``setup.module``, on a batch on the host. Errors of the step are its own."""
    context = EventContext()
    backend = StepBackend(context, CPU, FakeGradScaler(context, CPU))
    settings = replace(setup.settings, parallel=None)
    with isolated_random_state(), leaving_no_trace(setup.module):
        StepRunner(setup.module, replace(setup, settings=settings), backend).forward(batch)
    setup.module.zero_grad(set_to_none=True)
