"""Run jobs in this process, each without the planner and with it, and print a JSON line for each run.

``python -m benchmarks.robustness.worker JOB...``, on a GPU or on the null GPU.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

import lightning_memplan as mp
from benchmarks.robustness.job import Job

#: ways to train: without the planner, and with it and these arguments
WAYS: dict[str, dict[str, Any] | None] = {"without": None, "default": {}, "apply=False": {"apply": False}}


class Counts(pl.Callback):
    """Count what training itself sees: samples of each batch by epoch, and validations."""

    def __init__(self, count: Any) -> None:
        self.count = count or samples_in
        self.epochs: list[list[int]] = []
        self.validations = 0

    def on_train_epoch_start(self, *_: Any) -> None:
        self.epochs.append([])

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.epochs[-1].append(self.count(batch))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.validations += not trainer.sanity_checking


def samples_in(batch: Any) -> int:
    """Return the number of samples of a batch of tensors: the length of the first."""
    while not isinstance(batch, torch.Tensor):
        batch = next(iter(batch.values())) if hasattr(batch, "values") else batch[0]
    return len(batch)


def run(job: Job, options: dict[str, Any] | None) -> dict[str, Any]:
    """Train, and say what happened."""
    seed()
    found: dict[str, Any] = {"error": "", "epochs": [], "said": []}
    start, counts, planner = time.perf_counter(), None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            training = job.make()
            counts = Counts(training.count)
            if options is not None:
                planner = mp.MemoryPlanner(**{"history": False, **training.options, **options})
            trainer = training.train([counts, *([planner] if planner else [])])
            found["steps"] = getattr(trainer, "global_step", None)
        except BaseException as error:  # noqa: BLE001 - what training raises is what is looked for
            found["error"] = f"{type(error).__name__}: {error}"[:1000]
            found["traceback"] = traceback.format_exc()[-6000:]
    found["seconds"] = round(time.perf_counter() - start, 2)
    if counts is not None:
        found |= {"epochs": counts.epochs, "validations": counts.validations}
    texts = [str(each.message) for each in caught]
    found["said"] = list(dict.fromkeys(text for text in texts if text.startswith("MemoryPlanner")))
    if planner is not None:
        found |= described(planner)
    return found


def described(planner: mp.MemoryPlanner) -> dict[str, Any]:
    plan = planner.plan
    found: dict[str, Any] = {"measured": len(planner.measurements), "method": None}
    if plan is not None:
        found |= {"method": plan.method, "batch_size": plan.batch_size, "notes": list(plan.notes)}
        found |= {"confirmed": plan.confirmed is not None, "limited_by": plan.limited_by}
    return found


def seed() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def serve(jobs: Iterable[Job], ways: Mapping[str, dict[str, Any] | None]) -> None:
    """Run each job in each way, in a folder of its own, and print a line for each run."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    home, environment = os.getcwd(), dict(os.environ)
    for job in jobs:
        for way, options in ways.items():
            print("BEGIN", job.name, way, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)
                found = run(job, options)
                os.chdir(home)
            clean_up(environment)
            print("RAN", json.dumps({"name": job.name, "way": way, **found}), flush=True)


def clean_up(environment: dict[str, str]) -> None:
    """Put back what a job may leave behind in the process."""
    os.environ.clear()
    os.environ.update(environment)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    from benchmarks.robustness.jobs import JOBS

    serve([JOBS[name] for name in sys.argv[1:]], WAYS)
