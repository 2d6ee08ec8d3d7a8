"""Run training steps of a few samples and of one large batch on the GPU, and record their events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from lightning_memplan.devices.allocator_stats import read_peaks, reset_peaks
from lightning_memplan.devices.detect import cpu_device
from lightning_memplan.errors import TraceError, explain
from lightning_memplan.lightning.compat import is_overridden, isolated_random_state
from lightning_memplan.memory.alignment import aligned, doubled, expected_to_fit, prime_up_to
from lightning_memplan.memory.events import Event, Trace, labelled
from lightning_memplan.memory.formula import Formula
from lightning_memplan.memory.program import scale
from lightning_memplan.probe.allocator_history import Place, recorded_by, recording, records_already
from lightning_memplan.probe.clean_up import as_found, cuda_random_state, give_back
from lightning_memplan.probe.out_of_memory import missing_bytes, ran_out_of_memory, refusals
from lightning_memplan.settings import STEPS, StepSettings
from lightning_memplan.step.compiled_regions import TRIED, as_written, forget_compiled, within_graphs
from lightning_memplan.step.context import module_paths
from lightning_memplan.step.module_copy import replica_of
from lightning_memplan.step.runner import TRUE_DTYPE, MakeOptimizer, StepRunner, accumulated
from lightning_memplan.step.strategies.fsdp import noted_units

#: Batch sizes that are run, and what is run instead where the larger ones do not fit on the card
SIZES = ((2, 3, 5), (1, 2, 3), (1, 2), (1,))


#: The most samples that the large batch of a probe has
LARGEST = 2**16


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
    if records_already():
        raise TraceError(
            "a probe records the allocator's history, which is being recorded already: stop that first, by "
            "torch.cuda.memory._record_memory_history(None)"
        )
    device = torch.device("cuda", index)
    run = _Run(module, device, settings, trainer, datamodule, optimizer, stage)
    with as_found(device):
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
    refused = refusals(device)
    try:
        return record()
    except Exception as error:
        if not ran_out_of_memory(error, refused=refusals(device) > refused):
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


class TrialPeaks(NamedTuple):
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
) -> TrialPeaks:
    """Run whole training steps of this very batch on a copy of the module, on ``cuda:index``.

    Two steps by default: from the second on, gradients and the optimizer's state live beside the forward pass, and
    ``beside`` bytes that training takes for what the copy has not (averaged weights). All memory is given back
    and random states are restored; the allocator's peaks (``max_memory_allocated``) begin anew. What the step raises,
    other than that memory ran out, is the user's own error and is raised unchanged.
    """
    device = torch.device("cuda", index)
    run = _Run(module, device, settings, trainer, datamodule, optimizer, stage)
    with as_found(device):
        held = torch.cuda.memory_allocated(device) + beside, torch.cuda.memory_reserved(device) + beside
        refused = refusals(device)
        reset_peaks(index)
        missing, others = 0, None
        try:
            others = torch.empty(beside, dtype=torch.uint8, device=device)
            run.runner(run.move(run.copy()), Place()).run_steps(batch, steps)
        except Exception as error:
            if not ran_out_of_memory(error, refused=refusals(device) > refused):
                raise
            missing = missing_bytes(error)
        finally:
            del others
        peaks = read_peaks(index)
        return TrialPeaks(peaks[0] - held[0], peaks[1] - held[1], missing)


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

    def runner(self, twin: Any, mark: Place) -> _Runner:
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
    with recording(run.device) as (mark, events), module_paths(twin, mark, compiled):
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
            runner.look = partial(recorded_by, events, number)
            give_back(run.device)
            mark.run = number
            with isolated_random_state(), cuda_random_state(run.device):
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
