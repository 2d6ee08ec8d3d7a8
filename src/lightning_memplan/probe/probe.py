"""Run training steps of a few samples and of one large batch on the GPU, and record their events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from lightning_memplan.devices.allocator_stats import read_peaks, reset_peaks
from lightning_memplan.devices.detect import cpu_device
from lightning_memplan.errors import REFUSALS, TraceError, explain
from lightning_memplan.memory.alignment import aligned, doubled, expected_to_fit, prime_up_to
from lightning_memplan.memory.events import Trace
from lightning_memplan.memory.formula import Formula
from lightning_memplan.memory.program import scale
from lightning_memplan.probe.allocator_history import GpuContext, records_already
from lightning_memplan.probe.clean_up import as_found, give_back
from lightning_memplan.probe.out_of_memory import gpu_failed, missing_bytes, ran_out_of_memory, refusals
from lightning_memplan.probe.run import ProbeRun
from lightning_memplan.step.begun import Begun
from lightning_memplan.step.quiet import leaving_no_trace
from lightning_memplan.step.setup import TrainingSetup

#: Batch sizes that are run. Each row follows where the one before does not fit on the GPU
SIZES = ((2, 3, 5), (1, 2, 3), (1, 2), (1,))


LARGEST = 2**16  #: samples of the large batch, at most


MakeBatches = Callable[[Sequence[int]], Sequence[tuple[int, Any]]]  #: batches of given sizes


_T = TypeVar("_T")


def can_probe() -> bool:
    """Tell whether there is a CUDA device whose memory is managed by PyTorch's own caching allocator.

    >>> can_probe() in (True, False)
    True
    """
    return torch.cuda.is_available() and torch.cuda.get_allocator_backend() == "native"


def probe_steps(
    setup: TrainingSetup,
    sample: MakeBatches,
    index: int,
    *,
    capacity: int | None = None,
    largest: int | None = None,
    begun: Begun | None = None,
) -> tuple[list[Trace], Formula]:
    """Run training steps on ``cuda:index``, and return one trace for each batch size that ran, and the formula.

    ``sample`` makes batches of given sizes. A few samples are run, and then a large batch, for which libraries choose
    other kernels with other workspaces: half of what is expected to fit in ``capacity`` bytes, and at most ``largest``,
    where a plan has such a limit. Where the module has ``begun``, its first hooks are not called again.
    The module is copied, and the GPU is left as it was found, with an empty cache. An
    error of the step, other than that memory ran out, is the user's own and is raised unchanged.

    Raises:
        TraceError: not even one sample fits, the module cannot be copied, there is no device whose allocator keeps a
            history, or someone else has it record one.
    """
    _check_allocator()
    device = torch.device("cuda", index)
    run = ProbeRun(setup, device, begun)
    with as_found(device), leaving_no_trace(setup.module):
        for sizes in SIZES:
            try:
                found = _unless_out_of_memory(device, partial(_record, run, sample, sizes))
            except REFUSALS as error:
                if sizes == SIZES[0] or gpu_failed(error):
                    raise
                # larger batches ran out of memory: that so few are refused is no mistake of the user's
                raise TraceError(explain(error, f"a probe of {sizes[0]} samples"), reason="refused") from error
            if found is not None:
                traces, formula = found
                limit = _limit(run, traces, formula, capacity, largest)
                try:
                    more = _record_large(run, sample, traces, limit, largest)
                except Exception as error:  # of a batch that no plan may come to: real steps confirm the one that does
                    if gpu_failed(error):
                        raise
                    note = f"no large batch was probed: {explain(error, f'a probe of up to {limit} samples')}"
                    traces, more = [replace(trace, notes=(*trace.notes, note)) for trace in traces], None
                return more or aligned(traces) or traces, formula  # where they differ, whoever scales them says where
    raise TraceError(f"not even a single sample's training step fits on {torch.cuda.get_device_name(device)}")


def _check_allocator() -> None:
    """Raise TraceError unless the allocator can record its history for a probe."""
    if not torch.cuda.is_available():
        raise TraceError("a probe needs a CUDA device, and torch.cuda.is_available() is False")
    if not can_probe():
        raise TraceError(f"a probe needs PyTorch's own allocator, not {torch.cuda.get_allocator_backend()!r}")
    if records_already():
        raise TraceError(
            "a probe records the allocator's history, which is being recorded already: stop that first, by "
            "torch.cuda.memory._record_memory_history(None)"
        )


def _unless_out_of_memory(device: torch.device, record: Callable[[], _T]) -> _T | None:
    """Return what ``record`` returns, None where memory runs out. All that it took is given back."""
    refused = refusals(device)
    try:
        return record()
    except Exception as error:
        if not ran_out_of_memory(error, refused=refusals(device) > refused):
            raise
    finally:
        give_back(device)
    return None


def _record(
    run: ProbeRun, sample: MakeBatches, sizes: Sequence[int], steps: int | None = None
) -> tuple[list[Trace], Formula]:
    """Record all batch sizes on one replica, or each on one of its own if one does not run a step twice alike."""
    batches = sample(sizes)
    try:
        traces, formula = run.record(batches, steps)
    except REFUSALS as error:
        if len(batches) == 1 or ran_out_of_memory(error):
            raise
        traces, formula = run.record(batches[:1], steps)  # what it keeps of one batch may not suit the next
        alike = False
    else:
        alike = aligned(traces) is not None
    if not alike:
        steps = scale(traces[:1]).recorded()
        traces = [trace for batch in batches for trace in run.record([batch], steps)[0]]
    return traces, formula


def _limit(run: ProbeRun, few: Sequence[Trace], formula: Formula, capacity: int | None, largest: int | None) -> int:
    """Return how many samples the large batch may have: half of what is expected to fit on the GPU, at most."""
    if capacity is None:
        return 0
    parallel = run.setup.settings.parallel
    ranks = 1 if parallel is None else parallel.ranks  # all of which may share this host
    on_the_host = cpu_device().capacity // (4 * ranks * max(1, formula.input_bytes))
    return min(LARGEST, expected_to_fit(few, capacity) // 2, largest or LARGEST, on_the_host)


def _record_large(
    run: ProbeRun, sample: MakeBatches, few: Sequence[Trace], limit: int, largest: int | None
) -> list[Trace] | None:
    """Record a large batch, and return its trace beside those of few samples, or alone; None if no such batch runs.

    Its size is the largest that a plan may come to, if that is within the limit, and else a prime number.
    """
    least = 2 * few[-1].batch_size if aligned(few) else 1
    first, steps = limit if limit == largest else prime_up_to(limit), scale(few[:1]).recorded()
    for size in (first, *map(prime_up_to, (limit // 2, limit // 4))):
        if size < least and not (size == largest and size > few[-1].batch_size):
            break
        found = _unless_out_of_memory(run.device, partial(_record, run, sample, (size,), steps))
        if found is not None:
            (large,), _ = found
            return aligned([*few, large]) or [large, doubled(large, few)]
    return None


class TrialPeaks(NamedTuple):
    """Peaks of real training steps: bytes beside what was held before.

    ``missing`` is 0 if they ran. If memory ran out, it is how much more the failed request asked for than the GPU had
    free: at least 1, and 1 where a library failed that does not say what it asked for.
    """

    allocated: int
    reserved: int
    missing: int = 0


def try_step(
    setup: TrainingSetup,
    batch: tuple[int, Any],
    index: int,
    *,
    extra_bytes: int = 0,
    steps: int = 2,
    begun: Begun | None = None,
) -> TrialPeaks:
    """Train on this very batch, given with its size, for a few steps on a replica on ``cuda:index``; return the peaks.

    Two steps by default: from the second on, gradients and the optimizer's state coexist with the forward pass.
    ``extra_bytes`` stand for what training holds and the replica does not (averaged weights). All memory is given back
    and random states are restored; the allocator's peaks (``max_memory_allocated``) begin anew. An error of the step,
    other than that memory ran out, is the user's own and is raised unchanged.
    """
    device = torch.device("cuda", index)
    run, (size, large) = ProbeRun(setup, device, begun), batch
    with as_found(device), leaving_no_trace(setup.module):
        before = [torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)]
        refused = refusals(device)
        reset_peaks(index)
        missing, extra = 0, None
        try:
            extra = torch.empty(extra_bytes, dtype=torch.uint8, device=device)
            replica, own = run.replicate()
            run.runner(run.move(replica), own, GpuContext(), size).run_steps(large, steps)
        except Exception as error:
            if not ran_out_of_memory(error, refused=refusals(device) > refused):
                raise
            missing = missing_bytes(error)
        finally:
            del extra
            replica = own = None  # type: ignore[assignment]
        allocated, reserved = (peak - held - extra_bytes for peak, held in zip(read_peaks(index), before, strict=True))
        return TrialPeaks(allocated, reserved, missing)
