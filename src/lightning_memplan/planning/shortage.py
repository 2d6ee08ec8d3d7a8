"""Find out why a step of training ran out of memory, beside what was planned."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from torch import nn

from lightning_memplan.data.batches import hidden_tensors, tensor_bytes
from lightning_memplan.devices.detect import NvmlMeter
from lightning_memplan.errors import issue_warning
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.memory.fitting import largest_on_device
from lightning_memplan.memory.search import SizeLimits
from lightning_memplan.monitor.floor import FIRST
from lightning_memplan.monitor.meter import Meter
from lightning_memplan.planning.fit import FitPlanner
from lightning_memplan.report.shortage import Shortage, shortage_text
from lightning_memplan.types import Plan

#: How many owners of memory are named
OWNERS = 10

#: Part by which a batch has more bytes than the samples that were planned with, from which on they are said to differ
LARGER = 0.05

#: How many tensors of a batch are named
_TENSORS = 6


def note_shortage(error: BaseException, module: nn.Module, fit: FitPlanner, meter: Meter | None, index: int) -> None:
    """Add a note to an error of memory, whose type and text stay; before Python 3.11, which has no notes, warn."""
    text = shortage_text(_find(error, module, fit, meter, index))
    if sys.version_info >= (3, 11):
        error.add_note(text)
    else:
        issue_warning(text)


def _find(error: BaseException, module: nn.Module, fit: FitPlanner, meter: Meter | None, index: int) -> Shortage:
    """Return what is known of a step that ran out of memory on a CUDA device; what cannot be found out is left out."""
    frames = list(_frames(error))
    found: dict[str, Any] = {"where": _where(module, meter)}
    batch = _batch(frames)
    with suppress(Exception):
        found["module"] = _innermost(frames, module)
        found["batch"] = _shapes(batch)
    free, total = torch.cuda.mem_get_info(index)
    here = free + torch.cuda.memory_reserved(index)
    with suppress(Exception):
        found["others"] = _others(index)
    if fit.plan is not None and fit.estimate is not None and module.training:
        # what the plan counted on, of which this process's own blocks had taken their part
        limit = total if fit.plan.device.limit is None else fit.plan.device.limit
        now = min(here, limit) - fit.already_allocated
        found["lost"] = max(0, fit.plan.device.capacity - now)
        with suppress(Exception):
            found.update(_beside_the_plan(fit.plan, fit.estimate, batch, fit.size_of(batch), now))
    if meter is not None and len(meter.measurements) > FIRST:
        found["grown"] = max(0, meter.measurements[-1].floor - meter.measurements[FIRST - 1].floor)
    return Shortage(**found)


def _where(module: nn.Module, meter: Meter | None) -> str:
    if not module.training:
        return "validation"
    if meter is None:  # measuring has ended
        return "training"
    phase = f"the {meter.phase} phase of " if meter.phase else ""
    return f"{phase}step {meter.step}"


def _frames(error: BaseException) -> Iterator[FrameType]:
    """Yield the frames that an error passed, the innermost last."""
    at = error.__traceback__
    while at is not None:
        yield at.tb_frame
        at = at.tb_next


def _batch(frames: list[FrameType]) -> Any:
    """Return the batch of Lightning's loop, the outermost local variable of that name; None without one."""
    return next((frame.f_locals["batch"] for frame in frames if frame.f_locals.get("batch") is not None), None)


def _innermost(frames: list[FrameType], module: nn.Module) -> str:
    """Return the dotted name and class of the innermost part of a module that ran; "" for the module itself.

    In the backward phase, which torch runs outside of Python, no part of it runs.
    """
    names = {id(part): name for name, part in module.named_modules() if name}
    parts = [part for frame in frames if id(part := frame.f_locals.get("self")) in names]
    return f"{names[id(parts[-1])]} ({type(parts[-1]).__name__})" if parts else ""


def _shapes(batch: Any) -> str:
    """Return the shapes and types of a batch's tensors.

    >>> _shapes({"x": torch.zeros(2, 3), "y": torch.zeros(2, dtype=torch.int64)})
    '(2, 3) float32, (2,) int64'
    """
    tensors = {id(tensor): tensor for tensor in hidden_tensors(batch)}.values()
    shapes = [f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in tensors]
    more = len(shapes) - _TENSORS
    return ", ".join([*shapes[:_TENSORS], *([f"and {more} more"] if more > 0 else [])])


def _owners(estimate: Estimate, batch_size: int) -> list[tuple[str, int]]:
    """Return the largest owners of memory at the peak, by category and module."""
    replayer = estimate.at(batch_size).replayer
    sums: dict[str, int] = {}
    for event, size in replayer.live_at_peak(batch_size) if replayer is not None else ():
        owner = f"{event.category} of {event.path}" if event.path else event.category
        sums[owner] = sums.get(owner, 0) + size
    worth = sum(sums.values()) / 1000
    return sorted((item for item in sums.items() if item[1] > worth), key=lambda item: -item[1])[:OWNERS]


def _beside_the_plan(plan: Plan, estimate: Estimate, batch: Any, size: int | None, capacity: int) -> dict[str, Any]:
    """Return what was predicted for a batch, and a batch size that fits in ``capacity``."""
    size = size or plan.batch_size
    needed = estimate.peak(size, plan.device.capacity)
    found = {
        "batch_size": size,
        "predicted": needed,
        "planned": plan.batch_size,
        "planned_bytes": plan.needed or plan.peak_reserved,
        "owners": _owners(estimate, size),
    }
    expected, got = size * estimate.formula.input_bytes, tensor_bytes(batch)
    if got > (1 + LARGER) * expected > 0:
        return found | {"times": got / expected}
    if not estimate.fits(size, max(1, capacity)) and size > 1:
        fits = largest_on_device(lambda _: estimate, capacity, capacity, SizeLimits(max_batch_size=size - 1)).batch_size
        found |= {"fits": fits, "saved": max(0, needed - estimate.peak(fits, capacity)) if fits else 0}
    return found


def _others(index: int) -> int:
    """Return the bytes that other processes hold on a device; 0 where NVML does not tell."""
    meter = NvmlMeter(index)
    try:
        process, used = meter.read()
    finally:
        meter.close()
    return 0 if process is None or used is None else max(0, used - process)
