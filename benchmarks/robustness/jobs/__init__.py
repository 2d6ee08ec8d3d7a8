"""The jobs by theme; importing this package registers them all."""

from benchmarks.robustness.job import JOBS
from benchmarks.robustness.jobs import (
    batches,
    callbacks,
    datamodules,
    fields,
    hooks,
    language,
    libraries,
    loaders,
    modules,
    objects,
    optimizers,
    settings,
    steps,
    surface,
    tensors,
    values,
    vision,
)

__all__ = [
    "JOBS",
    "batches",
    "callbacks",
    "datamodules",
    "fields",
    "hooks",
    "language",
    "libraries",
    "loaders",
    "modules",
    "objects",
    "optimizers",
    "settings",
    "steps",
    "surface",
    "tensors",
    "values",
    "vision",
]
