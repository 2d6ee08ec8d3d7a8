"""Call ``setup`` and ``configure_model`` on a replica, as a Trainer does before its strategy takes the module over."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from lightning_memplan.errors import as_trace_errors
from lightning_memplan.lightning.compat import is_overridden, isolated_random_state
from lightning_memplan.settings import StepSettings
from lightning_memplan.step.quiet import leaving_no_trace
from lightning_memplan.step.strategies.choose import choose_strategy


def has_first_hooks(module: nn.Module, settings: StepSettings, stage: str | None) -> bool:
    """Return True if ``setup(stage)`` or ``configure_model`` has to be called; no ``setup`` where ``stage`` is None.

    >>> has_first_hooks(nn.Linear(2, 1), StepSettings(), "fit")
    False
    """
    return _calls_setup(module, stage) or _calls_configure_model(module, settings)


def call_first_hooks(
    replica: Any,
    settings: StepSettings,
    stage: str | None,
    making: AbstractContextManager[Any] = nullcontext(),  # noqa: B008 - it has no state
) -> None:
    """Call the hooks that the replica has; ``configure_model`` makes its layers within ``making``.

    Raises:
        TraceError: a hook fails; says by which error, and at which line.
    """
    with as_trace_errors(), isolated_random_state(), leaving_no_trace(replica), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come when the hooks really run
        if _calls_setup(replica, stage):
            replica.setup(stage)
        if _calls_configure_model(replica, settings):
            with making, choose_strategy(settings.parallel).note_units():
                replica.configure_model()


def _calls_setup(module: nn.Module, stage: str | None) -> bool:
    return stage is not None and is_overridden("setup", module)


def _calls_configure_model(module: nn.Module, settings: StepSettings) -> bool:
    """Leave it to a strategy that needs a mesh for it, which is there when the step runs."""
    return is_overridden("configure_model", module) and not choose_strategy(settings.parallel).calls_configure_model
