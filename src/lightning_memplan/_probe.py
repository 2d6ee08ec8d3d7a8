"""Training steps of a few samples and of one large batch on the real GPU, recorded from the allocator's own history.

A probe sees what no rule has to know: cuDNN's workspaces, and every temporary of a kernel. It gives the same events as
a trace, which are scaled and replayed in the same way.

Source: torch/cuda/memory.py (``_record_memory_history``, ``memory.snapshot``), torch 2.11 and 2.14.
"""

from __future__ import annotations

import gc
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from lightning_memplan.devices.allocator_stats import read_peaks, reset_peaks
from lightning_memplan.devices.detect import cpu_device
from lightning_memplan.errors import TraceError, explain
from lightning_memplan.lightning.compat import is_overridden, isolated_random_state
from lightning_memplan.memory.alignment import aligned, doubled, expected_to_fit, prime_up_to
from lightning_memplan.memory.events import EMPTY, FREE, Category, Event, Phase, Trace, labelled
from lightning_memplan.memory.formula import Formula
from lightning_memplan.memory.program import scale
from lightning_memplan.settings import STEPS, StepSettings
from lightning_memplan.step.compiled_regions import TRIED, as_written, forget_compiled, within_graphs
from lightning_memplan.step.context import module_paths
from lightning_memplan.step.module_copy import replica_of
from lightning_memplan.step.runner import TRUE_DTYPE, MakeOptimizer, StepRunner, accumulated
from lightning_memplan.step.strategies.fsdp import noted_units
from lightning_memplan.units import parse_bytes

#: Batch sizes that are run, and what is run instead where the larger ones do not fit on the card
SIZES = ((2, 3, 5), (1, 2, 3), (1, 2), (1,))


#: The most samples that the large batch of a probe has
LARGEST = 2**16


_MOST_EVENTS = 10**7


MakeBatches = Callable[[Sequence[int]], Sequence[tuple[int, Any]]]  #: batches of given sizes


_T = TypeVar("_T")


def can_probe() -> bool:
    """Whether there is a CUDA device, whose memory PyTorch's own caching allocator keeps.

    >>> can_probe() in (True, False)
    True
    """
    return torch.cuda.is_available() and torch.cuda.get_allocator_backend() == "native"


def probe_steps(
    module: nn.Module,
    sample: MakeBatches,
    settings: StepSettings,
    index: int,
    *,
    capacity: int | None = None,
    largest: int | None = None,
    trainer: Any = None,
    datamodule: Any = None,
    optimizer: MakeOptimizer | None = None,
    stage: str | None = None,
    steps: int | None = None,
) -> tuple[list[Trace], Formula]:
    """The formula, and one trace for each batch size that ran: setup, then training steps, on ``cuda:index``.

    ``sample`` makes the batches of given sizes: a few samples, and half of what the tensors of these let expect in
    ``capacity`` bytes, since libraries choose other kernels for large batches, with other workspaces; at most
    ``largest``, where a plan has such a limit. The module is copied; the card is left as it was found, its caches
    empty. What the step raises, other than that memory ran out, is the user's own error and is raised unchanged.

    Raises:
        TraceError: not even one sample fits, the module cannot be copied, there is no device whose allocator keeps a
            history, or someone else has it record one.
    """
    if not torch.cuda.is_available():
        raise TraceError("a probe needs a CUDA device, and torch.cuda.is_available() is False")
    if not can_probe():
        raise TraceError(f"a probe needs PyTorch's own allocator, not {torch.cuda.get_allocator_backend()!r}")
    if _records_already():
        raise TraceError(
            "a probe records the allocator's history, which is being recorded already: stop that first, by "
            "torch.cuda.memory._record_memory_history(None)"
        )
    device = torch.device("cuda", index)
    run = _Run(module, device, settings, trainer, datamodule, optimizer, stage)
    with _as_found(device):
        for sizes in SIZES:
            found = _unless_out_of_memory(device, partial(_recorded, run, sample, sizes, steps))
            if found is not None:
                traces, formula = found
                ranks = 1 if settings.parallel is None else settings.parallel.ranks  # which all may share this host
                on_the_host = cpu_device().capacity // (4 * ranks * max(1, formula.input_bytes))
                most = 0 if capacity is None else min(_most(traces, capacity), largest or LARGEST, on_the_host)
                try:
                    more = _larger(run, sample, traces, most, largest)
                except Exception as error:  # of a batch that no plan may come to: real steps confirm the one that does
                    if isinstance(error, getattr(torch, "AcceleratorError", ())):  # a card that failed stays so
                        raise
                    note = f"no large batch was probed: {explain(error, f'a probe of up to {most} samples')}"
                    traces, more = [replace(trace, notes=(*trace.notes, note)) for trace in traces], None
                return more or aligned(traces) or traces, formula  # where they differ, whoever scales them says where
    raise TraceError(f"not even a single sample's training step fits on {torch.cuda.get_device_name(device)}")


def _unless_out_of_memory(device: torch.device, record: Callable[[], _T]) -> _T | None:
    """What ``record`` gives, None where memory runs out; all that it took is given back."""
    refused = _refusals(device)
    try:
        return record()
    except Exception as error:
        if not ran_out_of_memory(error, refused=_refusals(device) > refused):
            raise
    finally:
        give_back(device)
    return None


def _recorded(run: _Run, sample: MakeBatches, sizes: Sequence[int], steps: int | None) -> tuple[list[Trace], Formula]:
    """All on one copy, or each on a copy of its own, for a step that one copy does not run twice in the same way."""
    batches = sample(sizes)
    traces, formula = _record(run, batches, steps)
    if aligned(traces) is None:
        steps = scale(traces[:1]).recorded()
        traces = [trace for batch in batches for trace in _record(run, [batch], steps)[0]]
    return traces, formula


def _most(few: Sequence[Trace], capacity: int) -> int:
    """How many samples the large batch may have on the card: half of what is expected to fit."""
    return min(LARGEST, expected_to_fit(few, capacity) // 2)


def _larger(run: _Run, sample: MakeBatches, few: Sequence[Trace], most: int, largest: int | None) -> list[Trace] | None:
    """Traces of which one is of a large batch, if there can be: beside those of few samples, or alone.

    That is the largest which a plan may come to, where it is no more than may be run; else a prime number of samples.
    """
    least = 2 * few[-1].batch_size if aligned(few) else 1
    first, steps = most if most == largest else prime_up_to(most), scale(few[:1]).recorded()
    for size in (first, *map(prime_up_to, (most // 2, most // 4))):
        if size < least and not (size == largest and size > few[-1].batch_size):
            break
        found = _unless_out_of_memory(run.device, partial(_recorded, run, sample, (size,), steps))
        if found is not None:
            (large,), _ = found
            return aligned([*few, large]) or [large, doubled(large, few)]
    return None


class Tried(NamedTuple):
    """What real training steps took of the card at most (bytes, beside what was held before).

    ``missing`` is 0 where they ran. Where memory ran out it is what the request that failed lacked of the card's free
    bytes: at least 1, and 1 where a library failed that does not say what it asked for.
    """

    allocated: int
    reserved: int
    missing: int = 0


def try_step(
    module: nn.Module,
    batch: Any,
    settings: StepSettings,
    index: int,
    *,
    trainer: Any = None,
    datamodule: Any = None,
    optimizer: MakeOptimizer | None = None,
    stage: str | None = None,
    beside: int = 0,
    steps: int = 2,
) -> Tried:
    """Run whole training steps of this very batch on a copy of the module, on ``cuda:index``.

    Two steps by default: from the second on, gradients and the optimizer's state live beside the forward pass, and
    ``beside`` bytes that training takes for what the copy has not (averaged weights). All memory is given back
    and random states are restored; the allocator's peaks (``max_memory_allocated``) begin anew. What the step raises,
    other than that memory ran out, is the user's own error and is raised unchanged.
    """
    device = torch.device("cuda", index)
    run = _Run(module, device, settings, trainer, datamodule, optimizer, stage)
    with _as_found(device):
        held = torch.cuda.memory_allocated(device) + beside, torch.cuda.memory_reserved(device) + beside
        refused = _refusals(device)
        reset_peaks(index)
        missing, others = 0, None
        try:
            others = torch.empty(beside, dtype=torch.uint8, device=device)
            run.runner(run.move(run.copy()), _Place()).run_steps(batch, steps)
        except Exception as error:
            if not ran_out_of_memory(error, refused=_refusals(device) > refused):
                raise
            missing = _missing(error)
        finally:
            del others
        peaks = read_peaks(index)
        return Tried(peaks[0] - held[0], peaks[1] - held[1], missing)


def ran_out_of_memory(error: BaseException | None, *, refused: bool = False) -> bool:
    """Whether an error says that the device's memory is full, in any of the ways in which libraries say it.

    An error that another one was raised from, or while handling, counts as well. ``refused`` says that the allocator
    has refused memory since the step began (``num_ooms`` of ``torch.cuda.memory_stats``): then errors count that have
    other causes too. cuDNN's callers pass over algorithms that get no workspace, and in the end find none; a library
    that cannot allocate its handle says that it is not initialized.

    >>> ran_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    True
    >>> error = RuntimeError("GET was unable to find an engine to execute this computation")
    >>> ran_out_of_memory(error), ran_out_of_memory(error, refused=True)
    (False, True)
    """
    for one in _chain(error):
        text = str(one)
        if isinstance(one, torch.OutOfMemoryError):
            return True
        if isinstance(one, RuntimeError) and any(part in text for part in _OUT_OF_MEMORY):
            return True
        if refused and any(part in text for part in _PERHAPS_OUT_OF_MEMORY):
            return True
    return False


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those from which it was raised or while they were handled."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


_OUT_OF_MEMORY = (
    "out of memory",  # cudaErrorMemoryAllocation, whoever met it: CUDA, NCCL, Triton
    "_ALLOC_FAILED",  # CUBLAS_STATUS_, CUDNN_STATUS_, CUSOLVER_STATUS_, CUFFT_
    "DEVICE_ALLOCATION_FAILED",  # CUDNN_STATUS_INTERNAL_ERROR_, from cuDNN 9 on
)


_PERHAPS_OUT_OF_MEMORY = (
    "unable to find an engine to execute this computation",  # aten/src/ATen/native/cudnn/Conv_v8.cpp: GET or FIND
    "Unable to find a valid cuDNN algorithm to run convolution",  # Conv_v7.cpp
    "CUDNN_STATUS_NOT_SUPPORTED",
    "CUDNN_STATUS_INTERNAL_ERROR",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUBLAS_STATUS_INTERNAL_ERROR",
    "unhandled cuda error",  # NCCL
)


def _refusals(device: torch.device) -> int:
    return int(torch.cuda.memory_stats(device).get("num_ooms", 0))


def _missing(error: BaseException | None) -> int:
    """What a failed request lacked of the card's free bytes, by the allocator's message (CUDACachingAllocator.cpp)."""
    for one in _chain(error):
        found = re.search(r"Tried to allocate (\S+ \w+?)\. .*?of which (\S+ \w+) is free", str(one), re.DOTALL)
        if found is not None:
            return max(1, parse_bytes(found[1].replace("bytes", "B")) - parse_bytes(found[2].replace("bytes", "B")))
    return 1


@contextmanager
def _as_found(device: torch.device) -> Iterator[None]:
    """Whatever happens inside, random states are restored, and the card is left with what was on it, no cache more."""
    handled = sys.exc_info()[1]  # while this one is, all that follows happens
    with torch.cuda.device(device), _only_new_garbage():
        forget_compiled()
        give_back(device)
        try:
            with isolated_random_state(), _cuda_random_state(device):
                yield
        except BaseException as error:
            _let_go(takewhile(lambda one: one is not handled, _chain(error)))
            raise
        finally:
            forget_compiled()
            give_back(device)


def _let_go(errors: Iterable[BaseException]) -> None:
    """Errors keep their lines, and no longer the tensors in the calls that they ended.

    Who catches one may hold it long: a notebook does (``sys.last_exc``), and on Ctrl+C so does the SystemExit that
    Lightning makes of it.
    """
    ended = []
    for error in errors:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            with suppress(RuntimeError):  # it runs yet
                frame.clear()
                ended.append(frame)
    for frame in ended:
        for function in gc.get_referents(frame):  # from Python 3.11 on a frame holds its function
            if isinstance(function, FunctionType) and sys.getrefcount(function) <= _IN_ITS_FRAME_ONLY:
                for cell in function.__closure__ or ():
                    with suppress(ValueError):  # it is empty
                        del cell.cell_contents


_IN_ITS_FRAME_ONLY = 4  #: the frame, the list of what it refers to, a name, and the argument of getrefcount


@contextmanager
def _only_new_garbage() -> Iterator[None]:
    """Garbage is collected where it is asked for, and only what was made inside: all that a process holds takes half a
    second to go through."""
    collects, freeze = gc.isenabled(), not gc.get_freeze_count()
    gc.disable()
    if freeze:
        gc.freeze()
    try:
        yield
    finally:
        if freeze:
            gc.unfreeze()
        if collects:
            gc.enable()


def give_back(device: torch.device) -> None:
    """Give what no one holds of the card's memory back to it."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()  # each run takes its own, as a process does that has just begun
    torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Run:
    """What is run, and on which card."""

    module: nn.Module
    device: torch.device
    settings: StepSettings
    trainer: Any
    datamodule: Any
    optimizer: MakeOptimizer | None
    stage: str | None

    def copy(self) -> Any:
        """A copy that is set up and not yet moved to the card, as the module is before a Trainer's strategy is."""
        sets_up = self.stage is not None and is_overridden("setup", self.module)
        parallel = self.settings.parallel
        meshed = parallel is not None and parallel.kind == "model_parallel"  # configured with its mesh, and not before
        configures = is_overridden("configure_model", self.module) and not meshed
        memo = {} if sets_up or configures or meshed else _shared(self.module)
        twin: Any = replica_of(self.module, memo, trainer=self.trainer, device=self.device)
        if sets_up:
            twin.setup(self.stage)
        if configures:
            with noted_units() if parallel is not None and parallel.shards else nullcontext():
                twin.configure_model()
        return twin

    def move(self, twin: Any) -> Any:
        parallel = self.settings.parallel
        device = None if parallel is not None and parallel.shards else self.device  # a wrapper that shards moves it
        return twin.to(device=device, dtype=TRUE_DTYPE.get(self.settings.precision))

    def runner(self, twin: Any, mark: _Place) -> _Runner:
        return _Runner(twin, mark, self.device, self.settings, datamodule=self.datamodule, optimizer=self.optimizer)


def _shared(module: nn.Module) -> dict[int, Any]:
    """Parameters and buffers that a copy shares with the module until it is moved to the card: those on the host, of
    which nothing is changed before, so that weights are not in the host's memory twice."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type != "cpu":
            continue
        if type(tensor) is nn.Parameter:
            memo[id(tensor)] = nn.Parameter(tensor.detach(), tensor.requires_grad)
            memo[id(tensor)].__dict__.update(tensor.__dict__)
        elif type(tensor) is torch.Tensor:
            memo[id(tensor)] = tensor.detach()
    return memo


# -------------------------------------------------------------------------------------------------------- recording
@dataclass
class _Place:
    """Where a step is. ``run`` counts the batch sizes: 0 is before the first one's steps, -1 between two."""

    phase: Phase = "setup"
    category: Category = "other"
    path: str = ""
    step: int = 0
    run: int = 0
    stream: int = 0  # the allocator's history knows it

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def label(self, tensor: Any, category: Category) -> None:
        """The allocator's history tells no tensor from another."""


class _Mark(_Place):
    """Where a step is, marked in the allocator's history: by a block of ``_MARK`` bytes that is taken and given back.

    ``labels`` has the address of each such block, and where the step is from there on.
    """

    def __init__(self, device: torch.device) -> None:
        self.__dict__.update(labels=[], device=device)
        super().__init__()

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value
        address = torch.cuda.caching_allocator_alloc(_MARK, self.device, 0)
        torch.cuda.caching_allocator_delete(address)
        self.labels.append((address, (self.run, self.phase, self.step, self.category, self.path)))

    def empty_cache(self) -> None:
        super().empty_cache()
        self.path = _EMPTIED
        self.path = ""

    device: torch.device
    labels: list[_Label]


_Label = tuple[int, tuple[int, Phase, int, Category, str]]


_EMPTIED = "(the cache was emptied)"  # the path of a mark that says so


_MARK = 331  # bytes: a prime, which no tensor of the step is likely to have at the place of the very next mark


def _record(run: _Run, batches: Sequence[tuple[int, Any]], steps: int | None) -> tuple[list[Trace], Formula]:
    """One trace for each ``(batch size, batch)``, all on one copy of the module, and the formula.

    Of as many ``steps``; by default of as many as the first batch size shows that it takes (see ``memory.cycles``).

    Each begins with the same random states: a step that draws what it does draws the same, and cuDNN makes its states
    for a recurrent network's dropout, which a process keeps, anew (aten/src/ATen/native/cudnn/RNN.cpp).
    """
    give_back(run.device)
    twin = run.copy()
    formula, compiled, period = None, within_graphs(twin), 0
    left_out: tuple[str, ...] = ()
    if compiled:
        steps = steps or STEPS
    with _recording(run.device) as (mark, events), module_paths(twin, mark, compiled):
        mark.category = "parameters"
        run.move(twin)
        for number, (size, batch) in enumerate(batches, 1):
            mark.run = -1  # from here on the last run's gradients are freed, and its optimizer
            twin.zero_grad(set_to_none=True)
            forget_compiled()
            if compiled and formula is None:
                with as_written():
                    formula = run.runner(twin, mark).run_counted(batch, size, 1)
                twin.zero_grad(set_to_none=True)
            # what is new is tried out, in as much memory as there is: algorithms, kernels that are compiled
            if torch.backends.cudnn.benchmark or compiled:
                run.runner(twin, mark).run_steps(batch, 1)
                twin.zero_grad(set_to_none=True)
            runner = run.runner(twin, mark)
            runner.look = partial(_recorded_by, events, number)
            give_back(run.device)
            mark.run = number
            with isolated_random_state(), _cuda_random_state(run.device):
                if compiled:
                    runner.run_steps(batch, steps)
                else:
                    formula = runner.run_counted(batch, size, steps)
            left_out = runner.left_out
            if steps is None:
                steps, period = runner.steps, runner.period
        recorded = events()
    assert formula is not None  # there are batches
    notes = (*((TRIED,) if compiled else ()), *left_out)
    parts, sizes = accumulated(run.settings), enumerate((size for size, _ in batches), 1)
    return [Trace(size, labelled(recorded(number)), notes, parts, period) for number, size in sizes], formula


class _Runner(StepRunner):
    """Lightning's order, with the real GradScaler.

    Its optimizer steps whatever the gradients are: at the usual scale those of the first steps overflow, and a step
    that is passed over makes no state.
    """

    _scaler: torch.amp.GradScaler | None = None
    look: Callable[[], Sequence[Event]] | None = None  #: gives what has been recorded

    def seen(self) -> Sequence[Event]:
        return () if self.look is None else self.look()

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        if self._scaler is None:
            self._scaler = _Scaler(self.device.type, init_scale=1.0)
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


class _Scaler(torch.amp.GradScaler):
    """Steps where gradients are infinite or no numbers as well (torch/amp/grad_scaler.py, 2.11 and 2.14)."""

    def _maybe_opt_step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        _, *others = args  # the optimizer's state in the scaler
        return optimizer.step(*others, **kwargs)


@contextmanager
def _recording(device: torch.device) -> Iterator[tuple[_Mark, Callable[[], _Recorded]]]:
    """The allocator's history from here on: what marks the places in it, and what gives its events."""
    record = torch.cuda.memory._record_memory_history
    record("all", context=None, max_entries=_MOST_EVENTS)
    try:
        mark = _Mark(device)
        yield mark, lambda: _events(torch.cuda.memory._snapshot(device)["device_traces"][device.index], mark.labels)
    finally:
        record(None)


def _records_already() -> bool:
    return torch.cuda.is_initialized() and bool(torch._C._cuda_isHistoryEnabled())


@contextmanager
def _cuda_random_state(device: torch.device) -> Iterator[None]:
    state = torch.cuda.get_rng_state(device)
    try:
        yield
    finally:
        torch.cuda.set_rng_state(state, device)


_Recorded = Callable[[int], list[Event]]


def _recorded_by(events: Callable[[], _Recorded], number: int) -> list[Event]:
    return events()(number)


def _events(history: Sequence[Mapping[str, Any]], labels: Sequence[_Label]) -> _Recorded:
    """The allocator's history as events: gives those of a run, which begin with the setup that all have in common.

    An entry's label is that of the last mark before it, whichever thread it is of. A block is free when that is asked
    for: when a stream is done with it (``free_completed``) is a matter of time, which is another one at another batch
    size. What was there before is no one's here.
    """
    events: dict[int, list[Event]] = {0: []}
    blocks: dict[int, tuple[int, int]] = {}  # address -> run and block
    streams: dict[int, int] = {0: 0}  # in the order in which they are met: a copy may make its own
    marks = iter(labels)
    mark, label = next(marks)
    run, phase, step, category, path = label
    count = 0
    for entry in history:
        address = entry["addr"]
        if entry["action"] == "alloc" and (address, entry["size"]) == (mark, _MARK):
            run, phase, step, category, path = label
            mark, label = next(marks, (-1, label))
            if path == _EMPTIED:
                events.setdefault(run, []).append(Event(-1, EMPTY, phase, step))
        elif entry["action"] == "alloc":
            stream = streams.setdefault(entry["stream"], len(streams))
            blocks[address] = run, count
            event = Event(count, entry["size"], phase, step, category, path, stream=stream)
            events.setdefault(run, []).append(event)
            count += 1
        elif entry["action"] == "free_requested" and address in blocks:
            made, block = blocks.pop(address)
            if made in (0, run):
                events.setdefault(run, []).append(Event(block, FREE, phase, step))
    return lambda run: events[0] + events.get(run, [])
