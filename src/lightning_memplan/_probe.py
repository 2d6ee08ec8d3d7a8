"""Training steps of a few samples on the real GPU, recorded from the allocator's own history.

A probe sees what no rule has to know: cuDNN's workspaces, and every temporary of a kernel. It gives the same events as
a trace, which are scaled and replayed in the same way.

Source: torch/cuda/memory.py (``_record_memory_history``, ``_snapshot``, ``_set_memory_metadata``), torch 2.14 and 2.15.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import nn

from lightning_memplan._errors import TraceError
from lightning_memplan._lightning import is_overridden, isolated_random_state
from lightning_memplan._order import STEPS, TRUE_DTYPE, MakeOptimizer, StepRunner
from lightning_memplan._record import labelled, module_paths
from lightning_memplan._twin import twin_of
from lightning_memplan._types import Category, Event, Phase, StepSettings, Trace

#: Batch sizes that are run, and what is run instead where the larger ones do not fit on the card
SIZES = ((2, 3, 5), (1, 2, 3), (1, 2), (1,))

_MOST_EVENTS = 10**7


def can_probe() -> bool:
    """Whether this torch can label what its allocator's history records, and there is a CUDA device.

    >>> can_probe() in (True, False)
    True
    """
    supported = getattr(torch.cuda.memory, "_memory_metadata_supported", None)
    return torch.cuda.is_available() and supported is not None and bool(supported())


def probe_steps(
    module: nn.Module,
    sample: Callable[[Sequence[int]], Sequence[tuple[int, Any]]],
    settings: StepSettings,
    index: int,
    *,
    trainer: Any = None,
    datamodule: Any = None,
    optimizer: MakeOptimizer | None = None,
    stage: str | None = None,
    steps: int = STEPS,
) -> list[Trace]:
    """One trace for each batch size that fits: setup, then whole training steps, run on ``cuda:index``.

    ``sample`` makes the batches of given sizes. The module is copied; the card is left as it was found, its caches
    empty. What the step raises, other than that memory ran out, is the user's own error and is raised unchanged.

    Raises:
        TraceError: not even one sample fits, or this torch cannot label its allocator's history.
    """
    if not can_probe():
        raise TraceError(f"a probe needs a CUDA device and torch 2.14 or later; this is torch {torch.__version__}")
    device = torch.device("cuda", index)
    for sizes in SIZES:
        try:
            with isolated_random_state(), _cuda_random_state(device):
                traces = [
                    _probe(module, size, batch, device, settings, trainer, datamodule, optimizer, stage, steps)
                    for size, batch in sample(sizes)
                ]
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            continue
        finally:
            gc.collect()
            with torch.cuda.device(device):
                torch.cuda.empty_cache()
        return aligned(traces)
    raise TraceError(f"not even a single sample's training step fits on {torch.cuda.get_device_name(device)}")


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that the device's memory is full, in any of the ways in which libraries say it.

    >>> ran_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    True
    >>> ran_out_of_memory(RuntimeError("shape mismatch"))
    False
    """
    while error is not None:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or any(part in text for part in _OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


_OUT_OF_MEMORY = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input",
    "NCCL Error 1: unhandled cuda error",
)


def _probe(
    module: nn.Module,
    size: int,
    batch: Any,
    device: torch.device,
    settings: StepSettings,
    trainer: Any,
    datamodule: Any,
    optimizer: MakeOptimizer | None,
    stage: str | None,
    steps: int,
) -> Trace:
    twin: Any = twin_of(module, {}, trainer=trainer, device=device)
    if stage is not None and is_overridden("setup", twin):
        twin.setup(stage)
    if is_overridden("configure_model", twin):
        twin.configure_model()
    mark = _Mark()
    with _history(device) as snapshot, module_paths(twin, mark):
        mark.category = "parameters"
        twin.to(device=device, dtype=TRUE_DTYPE.get(settings.precision))
        runner = _Runner(twin, mark, device, settings, datamodule=datamodule, optimizer=optimizer)
        runner.run_steps(batch, steps)
        events = _events(*snapshot())
    return Trace(size, labelled(events))


class _Mark:
    """Labels what the allocator records from here on with where the step is."""

    phase: Phase
    category: Category
    path: str
    step: int

    def __init__(self) -> None:
        self.__dict__.update(phase="setup", category="other", path="", step=0)
        self._write()

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value
        self._write()

    def _write(self) -> None:
        torch.cuda.memory._set_memory_metadata(f"{self.phase}\n{self.step}\n{self.category}\n{self.path}")


class _Runner(StepRunner):
    """Lightning's order, with the real GradScaler."""

    _scaler: torch.amp.GradScaler | None = None

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        if self._scaler is None:
            self._scaler = torch.amp.GradScaler(self.device.type)
        return self._scaler.scale(loss)

    def _unscaled_step(self, optimizer: torch.optim.Optimizer, after: Callable[[], None]) -> None:
        scaler = self._scaler
        if scaler is None:  # the step had no loss
            return
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)
        after()
        scaler.step(optimizer)
        scaler.update()


@contextmanager
def _history(device: torch.device) -> Iterator[Callable[[], tuple[list[Any], list[Any]]]]:
    """The allocator's history from here on: gives the blocks that lived before, and what has happened since."""
    gc.collect()  # what an earlier probe left in cycles
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = [
        block
        for segment in torch.cuda.memory._snapshot(device)["segments"]
        if segment["device"] == device.index
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    ]
    torch.cuda.memory._record_memory_history("all", context=None, max_entries=_MOST_EVENTS, clear_history=True)
    collects = gc.isenabled()
    gc.disable()
    try:
        yield lambda: (before, torch.cuda.memory._snapshot(device)["device_traces"][device.index])
    finally:
        torch.cuda.memory._record_memory_history(None)
        torch.cuda.memory._set_memory_metadata("")
        if collects:
            gc.enable()


@contextmanager
def _cuda_random_state(device: torch.device) -> Iterator[None]:
    state = torch.cuda.get_rng_state(device)
    try:
        yield
    finally:
        torch.cuda.set_rng_state(state, device)


def _events(before: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, Any]]) -> list[Event]:
    """The allocator's history as events. A thread of autograd's carries no label: it has the last one's."""
    blocks: dict[int, int] = {}
    events = []
    for number, block in enumerate(before):
        blocks[block["address"]] = number
        events.append(Event(number, int(block["requested_size"]), "setup"))
    count = len(events)
    label: tuple[Phase, int, Category, str] = ("setup", 0, "other", "")
    for entry in history:
        text = entry.get("user_metadata", "")
        if text:
            phase, step, category, path = text.split("\n")
            label = (phase, int(step), category, path)
        phase, step, category, path = label
        if entry["action"] == "alloc":
            blocks[entry["addr"]] = count
            events.append(Event(count, entry["size"], phase, step, category, path, stream=entry["stream"]))
            count += 1
        elif entry["action"] == "free_completed" and entry["addr"] in blocks:
            events.append(Event(blocks.pop(entry["addr"]), -1, phase, step))
    return events


# -------------------------------------------------------------------------------------------------- different sizes


def aligned(traces: Sequence[Trace]) -> list[Trace]:
    """Traces with the same events, where they differ only in workspaces.

    A library may choose another algorithm at another batch size, and take another workspace, or none. Where traces
    differ in such blocks (freed before anything else happens), each place is given the largest workspace that was
    taken there, as a line through or above all sizes seen.

    >>> a = Trace(2, (Event(0, 100), Event(1, 64), Event(1, -1)))
    >>> b = Trace(3, (Event(0, 150),))
    >>> [[event.size for event in trace.events] for trace in aligned([a, b])]
    [[100, 64, -1], [150, 64, -1]]
    """
    if len({_shape(trace.events) for trace in traces}) == 1:
        return list(traces)
    split = [_without_workspaces(trace.events) for trace in traces]
    if len({_shape(events) for events, _ in split}) != 1:
        return list(traces)  # they differ in more: whoever scales them says so
    points = [trace.batch_size for trace in traces]
    places = sorted({place for _, found in split for place in found})
    lines = {place: _line_above(points, [found.get(place, 0) for _, found in split]) for place in places}
    result = []
    for k, trace in enumerate(traces):
        left = split[k][0]
        events: list[Event] = []
        for place in range(len(left) + 1):
            if place in lines:
                events += _workspace(-1 - place, lines[place][k], (*left, trace.events[-1])[place])
            events += left[place : place + 1]
        result.append(Trace(trace.batch_size, _renumbered(events), trace.notes))
    return result


def _shape(events: Sequence[Event]) -> tuple[tuple[int, bool, int], ...]:
    return tuple((e.block, e.is_free, e.stream) for e in _renumbered(events))


def _renumbered(events: Sequence[Event]) -> tuple[Event, ...]:
    numbers: dict[int, int] = {}
    return tuple(e._replace(block=numbers.setdefault(e.block, len(numbers))) for e in events)


def _without_workspaces(events: Sequence[Event]) -> tuple[tuple[Event, ...], dict[int, int]]:
    """The events without blocks that are freed before anything else happens, and what these took before each place.

    Blocks that live within such a block's life go with it: what they take together counts.
    """
    left: list[Event] = []
    found: dict[int, int] = {}
    for event in _latest_freed_first(events):
        if event.is_free and left and left[-1].block == event.block and not left[-1].is_free:
            place = len(left) - 1
            within = found.pop(place + 1, 0)
            found[place] = max(found.get(place, 0), left.pop().size + within)
        else:
            left.append(event)
    return _renumbered(left), found


def _latest_freed_first(events: Sequence[Event]) -> Iterator[Event]:
    """The events with each run of frees in the order in which blocks on a stack are freed: no peak is changed by it."""
    made = {event.block: number for number, event in enumerate(events) if not event.is_free}
    for free, group in groupby(events, lambda event: event.is_free):
        run = list(group)
        yield from sorted(run, key=lambda event: -made.get(event.block, -1)) if free else run


def _workspace(block: int, size: int, beside: Event) -> list[Event]:
    taken = beside._replace(block=block, size=size, category="workspaces", op="")
    return [taken, taken._replace(size=-1)]


def _line_above(points: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Sizes on a line that grows no slower than from the smallest to the largest batch, and lies on or above all."""
    span = points[-1] - points[0]
    slope = max(0, -(-(sizes[-1] - sizes[0]) // span)) if span else 0
    base = max(size - slope * point for point, size in zip(points, sizes, strict=True))
    return [base + slope * point for point in points]
