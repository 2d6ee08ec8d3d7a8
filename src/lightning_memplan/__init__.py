"""GPU memory planning for PyTorch Lightning: the largest batch size that fits, before the first step runs."""

from lightning_memplan.callback import MemoryPlanner
from lightning_memplan.devices.catalogue import gpu, gpus
from lightning_memplan.devices.detect import cpu_device, detect_devices
from lightning_memplan.errors import ApplyError, DoesNotFitError, MemplanError, TraceError
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.monitor.history import history
from lightning_memplan.planning.api import advise, cards_for, estimate, plan, plan_lengths
from lightning_memplan.report.figures import plot_batch_sizes, plot_layers, plot_measurements, plot_timeline
from lightning_memplan.report.plans import layers_table, plan_table
from lightning_memplan.types import Advice, Device, Layer, Length, Lengths, Measurement, Peaks, Plan, Run

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
    "Run",
    "TraceError",
    "advise",
    "cards_for",
    "cpu_device",
    "detect_devices",
    "estimate",
    "gpu",
    "gpus",
    "history",
    "layers_table",
    "plan",
    "plan_lengths",
    "plan_table",
    "plot_batch_sizes",
    "plot_layers",
    "plot_measurements",
    "plot_timeline",
]
