"""Training steps of a few samples and of one large batch on the real GPU, recorded from the allocator's own history.

A probe sees what no rule has to know: cuDNN's workspaces, and every temporary of a kernel. It gives the same events as
a trace, which are scaled and replayed in the same way.

Source: torch/cuda/memory.py (``_record_memory_history``, ``_snapshot``), torch 2.11 and 2.14.
"""

from __future__ import annotations

import gc
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import accumulate, chain, groupby, takewhile
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from lightning_memplan._allocator import replay
from lightning_memplan._compiled import TRIED, as_written, forget_compiled, within_graphs
from lightning_memplan._device import cpu_device, read_peaks, reset_peaks
from lightning_memplan._formula import Formula
from lightning_memplan._lightning import is_overridden, isolated_random_state
from lightning_memplan._order import TRUE_DTYPE, MakeOptimizer, StepRunner, accumulated
from lightning_memplan._record import labelled, module_paths
from lightning_memplan._scaling import Polynomial, scale
from lightning_memplan._shards import noted_units
from lightning_memplan._twin import twin_of
from lightning_memplan.errors import TraceError, explain
from lightning_memplan.settings import STEPS, StepSettings
from lightning_memplan.types import EMPTY, FREE, Category, Event, Phase, Trace
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


def prime_up_to(number: int) -> int:
    """The largest prime that is not above ``number``, 0 where there is none.

    >>> prime_up_to(100), prime_up_to(1)
    (97, 0)
    """
    return next((n for n in range(number, 1, -1) if all(n % k for k in range(2, math.isqrt(n) + 1))), 0)


def doubled(trace: Trace, few: Sequence[Trace]) -> Trace:
    """What a trace tells of twice as many samples: what is not of a size that traces of few samples have as well grows
    with the batch, and so does what a prime number of samples divides.

    >>> large = Trace(7, (Event(0, 700), Event(1, 1000), Event(2, 65)))
    >>> [event.size for event in doubled(large, [Trace(2, (Event(0, 200), Event(1, 1000)))]).events]
    [1400, 1000, 130]
    """
    size, prime = trace.batch_size, prime_up_to(trace.batch_size)
    fixed = set.intersection(*({event.size for event in one.events} for one in few))
    grown = (
        event._replace(size=2 * event.size)
        if event.size > 0 and (event.size not in fixed or (size == prime and event.size % prime == 0))
        else event
        for event in trace.events
    )
    return replace(trace, batch_size=2 * size, events=tuple(grown))


def expected_to_fit(traces: Sequence[Trace], capacity: int) -> int:
    """The largest batch size that fits in ``capacity`` bytes, if all but workspaces grows as in these traces.

    >>> grown = [Trace(n, (Event(0, 2**20), Event(1, n * 2**20), Event(2, 7), Event(2, -1))) for n in (2, 4)]
    >>> expected_to_fit(grown, 101 * 2**20)
    100
    """
    peaks = []
    for trace in (traces[0], traces[-1]):
        events, _ = _without_workspaces(_renumbered(trace.events))
        peaks.append(replay([(e.block, e.size, e.stream) for e in events]).peak_allocated)
    growth = Fraction(peaks[1] - peaks[0], max(1, traces[-1].batch_size - traces[0].batch_size))
    if growth <= 0:
        return 0
    return max(0, int((capacity - peaks[0]) / growth) + traces[0].batch_size)


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
        twin: Any = twin_of(self.module, memo, trainer=self.trainer, device=self.device)
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

    Of as many ``steps``; by default of as many as the first batch size shows that it takes (see ``_cycle``).

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


# -------------------------------------------------------------------------------------------------- different sizes
def aligned(traces: Sequence[Trace]) -> list[Trace] | None:
    """Traces with the same events, where they differ only in workspaces; None where they differ in more.

    A library may choose another algorithm at another batch size, and take another workspace, or none. Where traces
    differ in such blocks (freed before anything else happens), each place has the largest workspace that was taken
    there. What does not grow as a tensor does is taken as measured, on lines between (``_kernels.measured``).

    >>> a = Trace(2, (Event(0, 100), Event(1, 64), Event(1, -1)))
    >>> b = Trace(3, (Event(0, 150),))
    >>> [[event.size for event in trace.events] for trace in aligned([a, b])]
    [[100, 64, -1], [150, 0, -1]]
    >>> aligned([a, b])[1].events[1].rule
    ('measured', 3, 2, 64, 3, 0)
    """
    points = [trace.batch_size for trace in traces]
    columns = [_renumbered(trace.events) for trace in traces]
    if len(set(map(_shape, columns))) > 1:
        split = [_without_workspaces(events) for events in columns]
        if len({_shape(events) for events, _ in split}) > 1:
            return None
        seen_at: dict[int, list[list[Event]]] = {}
        for _, found in split:
            for place, events in found.items():
                seen_at.setdefault(place, []).append(events)
        alike = {p: some[0] for p, some in seen_at.items() if len({_shape(_renumbered(one)) for one in some}) == 1}
        columns = [
            _with_workspaces(
                left,
                {
                    p: found.get(p) or _none(alike[p]) if p in alike else _as_one(found.get(p, ()), (*left, last)[p])
                    for p in seen_at
                },
            )
            for (left, found), (*_, last) in zip(split, columns, strict=True)
        ]
    rows = [tuple(event.size for event in row) for row in zip(*columns, strict=True)]
    seen = {row: tuple(chain(*zip(points, row, strict=True))) for row in set(rows) if not _grows(points, row)}
    return [
        replace(
            trace,
            events=tuple(
                event._replace(rule=("measured", trace.batch_size, *seen[row])) if row in seen else event
                for event, row in zip(column, rows, strict=True)
            ),
        )
        for trace, column in zip(traces, columns, strict=True)
    ]


def _shape(events: Sequence[Event]) -> tuple[tuple[int, bool, int], ...]:
    return tuple((e.block, e.is_free, e.stream) for e in events)


def _renumbered(events: Sequence[Event]) -> tuple[Event, ...]:
    numbers: dict[int, int] = {}
    return tuple(Event(numbers.setdefault(e[0], len(numbers)), *e[1:]) for e in events)


def _without_workspaces(events: Sequence[Event]) -> tuple[tuple[Event, ...], dict[int, list[Event]]]:
    """The events without blocks that are freed before anything else happens, and these, by the place they are before.

    Blocks that live within such a block's life go with it.
    """
    left: list[Event] = []
    found: dict[int, list[Event]] = {}
    for event in _latest_freed_first(events):
        if event.is_free and left and left[-1].block == event.block and not left[-1].is_free:
            place = len(left) - 1
            within = found.pop(place + 1, [])
            found.setdefault(place, []).extend((left.pop(), *within, event))
        else:
            left.append(event)
    return _renumbered(left), found


def _none(like: Sequence[Event]) -> list[Event]:
    """Workspaces as these, of no bytes."""
    return [event if event.is_free else event._replace(size=0, rule=()) for event in like]


def _as_one(events: Sequence[Event], before: Event) -> list[Event]:
    """Workspaces as a single one, of as many bytes as they take together at most; ``before`` is what comes after."""
    sizes = {event.block: event.size for event in events if not event.is_free}
    most = max(accumulate(sizes[event.block] * (-1 if event.is_free else 1) for event in events), default=0)
    taken = (*events, before)[0]._replace(block=0, size=most, category="workspaces", op="")
    return [taken, taken._replace(size=FREE)]


def _latest_freed_first(events: Sequence[Event]) -> Iterator[Event]:
    """The events with each run of frees in the order in which blocks on a stack are freed: no peak is changed by it."""
    made = {event.block: number for number, event in enumerate(events) if not event.is_free}
    for free, group in groupby(events, lambda event: event.is_free):
        run = list(group)
        yield from sorted(run, key=lambda event: -made.get(event.block, -1)) if free else run


def _with_workspaces(events: Sequence[Event], workspaces: Mapping[int, Sequence[Event]]) -> tuple[Event, ...]:
    """The events, with those of workspaces before each of these places."""
    result: list[Event] = []
    for place in range(len(events) + 1):
        inserted = workspaces.get(place, ())
        result += [one._replace(block=(place, one.block)) for one in inserted]  # type: ignore[arg-type]
        result += events[place : place + 1]
    return _renumbered(result)


def _grows(points: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether sizes grow with the batch as a tensor's bytes do.

    Those are a polynomial without negative or broken coefficients, or that of all pairs of two samples. A workspace's
    may be anything, and a parabola through them would tell nothing of a batch a hundred times as large.
    """
    if len(set(sizes)) == 1:
        return True
    polynomial = Polynomial.through(points, sizes)
    constant, *growing = polynomial.coefficients
    if polynomial.degree == 1:
        return growing[0] > 0
    whole = all(c % polynomial.divisor == 0 for c in polynomial.coefficients)
    pairs = (constant, growing[0]) == (0, -growing[1])
    return polynomial.degree == 2 and whole and (min(constant, *growing) >= 0 or pairs)
