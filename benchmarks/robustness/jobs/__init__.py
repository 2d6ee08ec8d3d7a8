"""The jobs by theme; importing this package registers them all."""

from benchmarks.robustness.job import JOBS
from benchmarks.robustness.jobs import (
    callbacks,
    datamodules,
    domains,
    hooks,
    loaders,
    modules,
    objects,
    optimizers,
    settings,
    steps,
    surface,
    tensors,
)

__all__ = [
    "JOBS",
    "callbacks",
    "datamodules",
    "domains",
    "hooks",
    "loaders",
    "modules",
    "objects",
    "optimizers",
    "settings",
    "steps",
    "surface",
    "tensors",
]
