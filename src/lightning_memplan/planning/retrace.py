"""Check that the step accepts the chosen batch size by tracing it at exactly that size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

from torch import nn

from lightning_memplan.cuda.workspaces import Choice
from lightning_memplan.data.batches import sample_bytes
from lightning_memplan.data.samples import SAMPLE_SIZE, Samples, Which, read_samples
from lightning_memplan.devices.detect import cpu_device
from lightning_memplan.errors import MemplanError, TraceError
from lightning_memplan.memory.estimate import Estimate, largest_on_card
from lightning_memplan.memory.events import Trace
from lightning_memplan.memory.program import extended, scale
from lightning_memplan.memory.search import Found, LimitedBy, largest_suited
from lightning_memplan.settings import StepSettings
from lightning_memplan.step.setup import MAX_MICROBATCHES, MakeOptimizer
from lightning_memplan.trace.compiled import Graphs
from lightning_memplan.trace.tracer import prepared, trace_steps
from lightning_memplan.types import Device

#: Batch sizes of traces, where those of few samples cannot be had or are of unlike steps: each has 2 to 32 equal parts,
#: or 2 to 6, 10, 12, 15, 20, 30 and 60
MANY = ((32, 64, 128), (60, 120, 240))


#: What a step raises of a batch that it cannot cut, or has no room for
OF_FEW = (AssertionError, IndexError, RuntimeError, ValueError)


#: Bytes of a batch that is made for it, where nothing says that the step may refuse it
CHEAP = 2**28


EstimateAt = Callable[[int], Estimate]


class EstimateCache:
    """The estimate that holds at a batch size, made when it is first asked for.

    ``estimated`` makes one for a number of accumulated batches: ``parts``, or what makes up the effective batch size.
    There are two then, since all batches in the middle of an accumulation are alike: without, and with three batches.
    ``traced`` adds to one what a trace of a batch size says (``traced_at``), for the same number of batches.
    """

    def __init__(
        self,
        estimated: Callable[[int], Estimate],
        traced: Callable[[Estimate, int, int], Estimate],
        parts: int,
        effective_batch_size: int | None = None,
        ranks: int = 1,
    ) -> None:
        self._estimated, self._traced, self._parts = estimated, traced, parts
        self._whole, self._ranks = effective_batch_size, ranks
        self._made: dict[int, Estimate] = {}

    def __call__(self, batch_size: int) -> Estimate:
        parts = self._accumulated(batch_size)
        if parts not in self._made:
            self._made[parts] = self._estimated(parts)
        return self._made[parts]

    def trace(self, batch_size: int) -> None:
        """See what the step does at that batch size: from then on the estimate knows.

        Raises:
            TraceError: the step refuses so many samples.
        """
        parts, found = self._accumulated(batch_size), self(batch_size)
        self._made[parts] = self._traced(found, batch_size, parts)

    def _accumulated(self, batch_size: int) -> int:
        if self._whole is None:
            return self._parts
        return 1 if batch_size * self._ranks == self._whole else MAX_MICROBATCHES


def of_many(samples: Samples, sizes: Sequence[int]) -> list[tuple[int, Any]]:
    """Batches of which a step that cuts them in parts makes as many of each.

    Raises:
        TraceError: they would take more than a quarter of the host's memory.
    """
    if sum(sizes) * _bytes_of_one(samples) > cpu_device().capacity // 4:
        raise TraceError(f"{sizes[-1]} samples take too much of the host's memory to try them")
    return samples.batches(sizes)


def is_of_many(found: Estimate, samples: Samples) -> bool:
    """Whether it is of a trace of ``MANY`` samples, since the step does something else with few, or refuses them."""
    sizes = () if found.traced is None or found.traced.program is None else found.traced.program.batch_sizes
    return any(sizes == tuple(size * samples.multiple for size in many) for many in MANY)


def _bytes_of_one(samples: Samples) -> int:
    size, batch = samples.batches((1,))[0]
    return samples.multiple * sample_bytes(batch, size)


def retrace_at(
    found: Estimate,
    batch_size: int,
    module: nn.Module,
    source: Any,
    settings: StepSettings,
    *,
    device: Device | None = None,
    trainer: Any = None,
    datamodule: Any = None,
    optimizer: MakeOptimizer | None = None,
    stage: str | None = None,
    sample: Which = "first",
    sample_size: int = SAMPLE_SIZE,
) -> Estimate:
    """The estimate, with what a trace of this very batch size says (``exact``) where that is something else.

    ``estimate_step`` made it of the same. It stays as it is where no trace is part of it, where a batch takes more of
    the host's memory than is worth it, and where the step loops over its samples.

    Raises:
        TraceError: the step refuses a batch of that size; says by which error, and at which line.
    """
    traced = found.traced
    if traced is None or traced.program is None or traced.turns or batch_size in traced.program.batch_sizes:
        return found
    samples = read_samples(source, sample, sample_size)
    many = is_of_many(found, samples)
    if batch_size * _bytes_of_one(samples) > (cpu_device().capacity // 4 if many else CHEAP):
        unseen = f"{batch_size} samples take too much of the host's memory to see whether the step refuses them"
        return _noted(found, unseen) if many else found
    module = prepared(module, settings, trainer=trainer, stage=stage)
    batches, graphs = [(batch_size, samples.make(batch_size))], Graphs()
    again = partial(trace_steps, trainer=trainer, datamodule=datamodule, optimizer=optimizer, graphs=graphs)
    before = [program for program in (traced.program, traced.least) if program is not None]
    after = []
    try:
        for program in before:
            (begun,) = again(module, batches, settings, steps=1)
            whole = extended(Trace(program.batch_sizes[0], program.events), begun)
            after.append(scale([whole or again(module, batches, settings)[0]]))
            graphs.least = True
    except TraceError as error:
        if isinstance(error.__cause__, OF_FEW):
            raise
        return _noted(found, f"what the step does with {batch_size} samples could not be traced: {error}")
    ends = [[program.at(batch_size, choice) for choice in get_args(Choice)] for program in (*before, *after)]
    if ends[: len(before)] == ends[len(before) :] or found is not traced:
        return found
    own = replace(found, program=after[0], least=after[1] if traced.least else None, _replays={})
    return replace(found, exact={**found.exact, batch_size: own})


def _noted(found: Estimate, text: str) -> Estimate:
    return replace(found, notes=tuple(dict.fromkeys((*found.notes, text))))


def retrace(
    search: Found,
    estimate_at: EstimateAt,
    trace: Callable[[int], None],
    budget: int,
    capacity: int,
    *,
    min_batch_size: int,
    multiple_of: int,
    whole: int | None,
) -> tuple[int, LimitedBy, tuple[str, ...]]:
    """The batch size that was found to fit, or the largest below it that suits: its own trace runs, and fits as well.

    And by what it is limited, and what there is to say of it. ``trace`` is ``Estimates.trace``; the limits are those of
    ``largest_suited``.

    Raises:
        MemplanError: no allowed batch size suits; says why the one that was found does not.
    """

    def why_not(batch_size: int) -> str:
        try:
            trace(batch_size)
        except TraceError as error:
            return str(error)
        only: dict[str, Any] = {"min_batch_size": batch_size, "max_batch_size": batch_size}
        return "" if largest_on_card(estimate_at, budget, capacity, **only).batch_size else _TOO_LARGE

    size, limited_by = search.batch_size, search.limited_by
    reason = why_not(size)
    if not reason:
        return size, limited_by, (_EXACT,) if size in estimate_at(size).exact else ()
    traced = estimate_at(size).traced
    smaller = largest_suited(
        lambda batch_size: not why_not(batch_size),
        size,
        min_batch_size=min_batch_size,
        multiple_of=multiple_of,
        like=1 if traced is None or traced.program is None else min(traced.program.batch_sizes),
        whole=whole,
    )
    what = f"{size} samples were expected to fit, and {_TOO_LARGE}"
    if reason != _TOO_LARGE:
        limited_by, what = "step", f"{size} samples fit, and the step refuses them ({reason})"
    if not smaller:
        raise MemplanError(f"{what}; no smaller batch size that is allowed was found to suit it")
    return smaller, limited_by, (f"{what}: {smaller} is the largest of those tried that suits it",)


_TOO_LARGE = "a trace of so many takes more memory than those of others let expect"


_EXACT = (
    "the step does something else at the batch size that is planned: it is traced at that very size, and more may fit"
)
