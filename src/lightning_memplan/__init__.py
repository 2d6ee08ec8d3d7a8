"""GPU memory planning for PyTorch Lightning: the largest batch size that fits, before the first step runs.

A name is imported when it is first used: ``import lightning_memplan`` takes milliseconds, and torch and Lightning are
imported by the names that need them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_memplan.callback import MemoryPlanner
    from lightning_memplan.devices.catalogue import gpu, gpus
    from lightning_memplan.devices.detect import cpu_device, detect_devices
    from lightning_memplan.errors import ApplyError, DoesNotFitError, MemplanError, TraceError
    from lightning_memplan.memory.estimate import Estimate
    from lightning_memplan.monitor.history import load_history
    from lightning_memplan.planning.api import advise, cards_for, estimate, plan, plan_lengths
    from lightning_memplan.report.figures import plot_batch_sizes, plot_layers, plot_measurements, plot_timeline
    from lightning_memplan.report.formula import layers_table
    from lightning_memplan.report.plans import plan_table
    from lightning_memplan.types import (
        Advice,
        Device,
        Layer,
        Length,
        Lengths,
        Measurement,
        Peaks,
        Plan,
        RunRecord,
        as_dict,
    )

__all__ = [
    "Advice",
    "ApplyError",
    "Device",
    "DoesNotFitError",
    "Estimate",
    "Layer",
    "Length",
    "Lengths",
    "Measurement",
    "MemoryPlanner",
    "MemplanError",
    "Peaks",
    "Plan",
    "RunRecord",
    "TraceError",
    "advise",
    "as_dict",
    "cards_for",
    "cpu_device",
    "detect_devices",
    "estimate",
    "gpu",
    "gpus",
    "layers_table",
    "load_history",
    "plan",
    "plan_lengths",
    "plan_table",
    "plot_batch_sizes",
    "plot_layers",
    "plot_measurements",
    "plot_timeline",
]

#: The public names of each module, as type checkers read them above
_MODULES = {
    "callback": "MemoryPlanner",
    "devices.catalogue": "gpu gpus",
    "devices.detect": "cpu_device detect_devices",
    "errors": "ApplyError DoesNotFitError MemplanError TraceError",
    "memory.estimate": "Estimate",
    "monitor.history": "load_history",
    "planning.api": "advise cards_for estimate plan plan_lengths",
    "report.figures": "plot_batch_sizes plot_layers plot_measurements plot_timeline",
    "report.formula": "layers_table",
    "report.plans": "plan_table",
    "types": "Advice Device Layer Length Lengths Measurement Peaks Plan RunRecord as_dict",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}

if not TYPE_CHECKING:  # a type checker would take every name for one that there is

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used (PEP 562)."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value  # from now on without this function
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
