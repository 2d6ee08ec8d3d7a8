"""A training job, and what became of it: without the planner, with it, and with ``apply=False``."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection

import lightning_memplan as mp

try:
    from pytorch_lightning import Callback
except ModuleNotFoundError:
    from lightning.pytorch import Callback

MODES = ("without", "default", "apply=False")
Train = Callable[[list[Any]], None]  # takes the callbacks


def first_dimension(batch: Any) -> int:
    """Return the length of the first tensor in a batch."""
    found: list[int] = []
    apply_to_collection(batch, torch.Tensor, lambda tensor: found.append(len(tensor)) if tensor.dim() else None)
    return found[0] if found else len(batch)


@dataclass(frozen=True)
class Job:
    """A way to train, with batches of ``size`` samples by the user's own choice.

    ``keeps`` is empty where the job can be planned; else a part of the warning with which its own size is kept.
    ``differs`` is a part of the warning where the loader has fewer samples than the plan, which nobody can know before.
    """

    name: str
    train: Train
    size: int
    keeps: str = ""
    differs: str = ""
    count: Callable[[Any], int] = first_dimension


JOBS: dict[str, Job] = {}


def job(size: int, **options: Any) -> Callable[[Train], Train]:
    """Register a function that trains with the callbacks it is given, under its own name."""

    def register(train: Train) -> Train:
        name = train.__name__
        if name in JOBS:
            raise ValueError(f"two jobs are named {name}")
        JOBS[name] = Job(name, train, size, **options)
        return train

    return register


@dataclass
class Outcome:
    """Record how a job ended in one mode."""

    error: str = ""  #: the end of the traceback, if training stopped
    sizes: list[int] = field(default_factory=list)  #: samples of each batch that training had
    planned: int = 0  #: batch size of the plan, 0 if there is none
    method: str = ""
    limited_by: str = ""
    warnings: list[str] = field(default_factory=list)  #: the planner's own
    measured: int = 0  #: steps
    predicted: bool = False  #: whether the steps have predictions
    seconds: float = 0.0


class Witness(Callback):
    """Note how many samples each training batch has."""

    def __init__(self, count: Callable[[Any], int]) -> None:
        self.count = count
        self.sizes: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.sizes.append(self.count(batch))


@contextmanager
def _noted(said: list[str]) -> Iterator[None]:
    """Collect the planner's warnings, whatever filters the job sets."""
    show, warnings.showwarning = warnings.showwarning, lambda message, *_: said.append(str(message))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_: said.append(str(message))
            yield
    finally:
        warnings.showwarning = show


def run(job: Job, mode: str) -> Outcome:
    """Train the job in one mode, and tell what became of it."""
    planner = {"without": None, "default": mp.MemoryPlanner, "apply=False": lambda: mp.MemoryPlanner(apply=False)}[mode]
    planner = planner and planner()
    witness, outcome, said = Witness(job.count), Outcome(), []
    started = time.monotonic()
    torch.manual_seed(0)
    torch.distributions.Distribution.set_default_validate_args(False)  # of the null GPU's values, which are all 0
    try:
        with _noted(said):
            job.train([witness] if planner is None else [planner, witness])
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)[-6:]
        said_first = (str(error).strip().splitlines() or [""])[0]
        calls = [f"{frame.filename}:{frame.lineno}: {frame.line}" for frame in frames]
        outcome.error = "\n".join([*calls, f"{type(error).__name__}: {said_first}"])
        if isinstance(error, KeyboardInterrupt):
            raise
    outcome.seconds = time.monotonic() - started
    outcome.sizes = witness.sizes
    if planner is not None:
        plan = planner.plan
        if plan is not None:
            outcome.planned, outcome.method, outcome.limited_by = plan.batch_size, plan.method, plan.limited_by
        outcome.measured = len(planner.measurements)
        outcome.predicted = any(measured.predicted_reserved for measured in planner.measurements)
    outcome.warnings = [text for text in said if text.startswith("MemoryPlanner")]
    return outcome


def faults(job: Job, outcomes: dict[str, Outcome]) -> list[str]:
    """Say where the planner did harm, or less than it could."""
    without, default, informs = (outcomes[mode] for mode in MODES)
    if without.error:
        return [f"does not train without the planner: {without.error.splitlines()[-1]}"]
    found = []
    for mode in MODES[1:]:
        outcome = outcomes[mode]
        if outcome.error:
            found.append(f"{mode}: training stopped: {outcome.error.splitlines()[-1]}")
        elif outcome.measured != len(outcome.sizes):
            found.append(f"{mode}: {outcome.measured} of {len(outcome.sizes)} steps were measured")
    if not informs.error and informs.sizes != without.sizes:
        found.append(f"apply=False: batches of {informs.sizes[:3]}, not {without.sizes[:3]}")
    if job.keeps:
        if not any(job.keeps in text for text in default.warnings):
            found.append(f"no warning tells {job.keeps!r}")
        if not default.error and default.sizes != without.sizes:
            found.append(f"batches of {default.sizes[:3]}, not {without.sizes[:3]}")
    elif not default.error:
        if not default.planned:
            found.append("not planned: " + " | ".join(default.warnings))
        elif job.differs and not any(job.differs in text for text in default.warnings):
            found.append(f"no warning tells {job.differs!r}")
        elif not job.differs and default.sizes[:1] != [default.planned]:
            found.append(f"announced {default.planned}, had {default.sizes[:3]}: " + " | ".join(default.warnings))
        elif not default.predicted:
            found.append("measured without predictions")
    return found


def as_row(job: Job, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Return what is kept of a job."""
    return {"job": job.name, "faults": faults(job, outcomes), **{mode: asdict(outcomes[mode]) for mode in outcomes}}
