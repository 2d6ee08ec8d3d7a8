"""Agree on one batch size across ranks, and confirm it by real steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import nn

from lightning_memplan.errors import DoesNotFitError, MemplanError, explain
from lightning_memplan.lightning.compat import over_ranks
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.memory.search import MEMORY, LimitedBy, lacking
from lightning_memplan.planning.retrace import EstimateAt
from lightning_memplan.probe.clean_up import give_back
from lightning_memplan.probe.probe import TrialPeaks
from lightning_memplan.types import Plan
from lightning_memplan.units import format_bytes

#: How often a plan shrinks at most, when real steps of its batch size run out of memory
SHRINKS = 3


@dataclass(frozen=True)
class Proposal:
    """A plan, and what it follows from, so that it can follow again with less."""

    plan: Plan
    estimate_at: EstimateAt
    planned: Callable[..., Plan]  #: within a ``max_batch_size`` and a ``budget``
    tried: Callable[[Plan], TrialPeaks]  #: real steps of a plan's batch size
    ranks: int = 1
    index: int = 0  #: of the card on which real steps run
    on_the_card: bool = False  #: the module's own tensors are there already
    validated: Callable[[Proposal], Plan] | None = None  #: validation's own plan, beside training's

    @property
    def estimate(self) -> Estimate:
        return self.estimate_at(self.plan.batch_size)

    def at(self, batch_size: int) -> Proposal:
        """The same at another batch size: the one on which all ranks agreed."""
        plan, whole, estimate = self.plan, self.plan.effective_batch_size, self.estimate_at(batch_size)
        if batch_size == plan.batch_size:
            return self
        plan = replace(
            plan,
            batch_size=batch_size,
            accumulate_grad_batches=plan.accumulate_grad_batches
            if whole is None
            else whole // (batch_size * self.ranks),
            predicted_peak=estimate.peak(batch_size, plan.device.capacity),
            predicted_allocated=estimate.peak_allocated(batch_size),
            formula_peak=estimate.formula.memory(batch_size),
            methods=estimate.methods(batch_size, plan.device.capacity),
            phase=estimate.phase(batch_size),
            breakdown=estimate.breakdown(batch_size),
            reserved_range=estimate.reserved_range(batch_size, plan.device.capacity),
            confirmed=None,
        )
        return replace(self, plan=plan)

    def kept(self, batch_size: int) -> Proposal:
        """The same at the batch size of the run that is resumed, if it can run here at all.

        Raises:
            DoesNotFitError: it does not fit, whatever the margin.
        """
        whole = self.plan.effective_batch_size
        if whole is not None and whole % (batch_size * self.ranks):
            return self.noted(
                f"the checkpoint's batch size {batch_size} does not divide the effective batch size: not kept"
            )
        only = {
            "min_batch_size": batch_size,
            "max_batch_size": batch_size,
            "multiple_of": 1,
            "samples": None,
            "trace": None,
        }
        try:
            plan = self.planned(**only, budget=self.plan.device.capacity)
        except DoesNotFitError as error:
            raise DoesNotFitError(
                f"the checkpoint's batch size {batch_size} cannot be kept; resume='plan' plans another: {error}",
                needed=error.needed,
                available=error.available,
            ) from error
        return replace(self, plan=replace(plan, limited_by="checkpoint", notes=self.plan.notes))

    def noted(self, text: str) -> Proposal:
        return replace(self, plan=replace(self.plan, notes=(*self.plan.notes, text)))


def on_all_ranks(make: Callable[[], Proposal]) -> Proposal:
    """What ``make`` gives, at the smallest batch size of all ranks'.

    Where it raises on one rank, it raises on all: none waits for the word of one that is gone.

    Raises:
        MemplanError: another rank has no batch size; says which and why.
    """
    failure = None
    try:
        found = make()
        word = RankResult(found.plan.device.name, found.plan.batch_size, found.plan.limited_by)
    except Exception as error:  # noqa: BLE001 - the other ranks wait for this one's word, whatever happened
        failure, word = error, RankResult(reason=f"{type(error).__name__}: {error}")
    words = over_ranks(word)
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # else it would hold this call, and this call it, with all that the call that failed holds
    rank = agreed(words)
    decides = words[rank]
    if decides.batch_size == found.plan.batch_size:
        return found
    note = f"rank {rank} ({decides.card}) decides for all: here alone the batch size would be {found.plan.batch_size}"
    draft = found.at(decides.batch_size)
    return replace(draft, plan=replace(draft.plan, limited_by=decides.limited_by)).noted(note)


def confirmed(draft: Proposal, *, strict: bool) -> Proposal:
    """The draft at its batch size, or at a smaller one, of which real steps ran on the cards of all ranks.

    A copy that fails, other than for want of memory, is noted, or raises the user's own error where this is ``strict``.

    Raises:
        DoesNotFitError: real steps ran out of memory at each size that was tried.
    """
    for attempt in range(SHRINKS + 1):
        size = draft.plan.batch_size
        draft = on_all_ranks(partial(_tried, draft, attempt, strict))
        if draft.plan.batch_size == size:
            break
        draft = draft.noted(f"shrunk from {size} to {draft.plan.batch_size}: real steps of {size} ran out of memory")
    return draft


def _tried(draft: Proposal, attempt: int, strict: bool) -> Proposal:
    """The draft, if real steps of its batch size run on this rank's card, else at a smaller one, to be tried."""
    if draft.on_the_card:
        return draft.noted("not confirmed by real steps: the module is on the card already, beside a copy of it")
    try:
        tried = draft.tried(draft.plan)
    except Exception as error:
        if strict or isinstance(error, getattr(torch, "AcceleratorError", ())):  # a card that failed stays so
            raise
        draft = draft.noted(f"not confirmed by real steps, which failed on a copy: {explain(error)}")
        tried = None
    if tried is None:  # and the error is gone, with the memory that it kept
        give_back(torch.device("cuda", draft.index))
        return draft
    if tried.missing:
        return _shrunk(draft, tried, attempt)
    return replace(draft, plan=replace(draft.plan, confirmed=tried.reserved))


def _shrunk(draft: Proposal, tried: TrialPeaks, attempt: int) -> Proposal:
    plan = draft.plan
    budget = plan.predicted_peak - lacking(plan.predicted_peak, tried.reserved, tried.missing, attempt)
    most = min(plan.batch_size - 1, plan.batch_size * budget // plan.predicted_peak)
    try:
        if attempt == SHRINKS or most < 1:
            raise ValueError("there is no smaller batch size to try")
        smaller = draft.planned(max_batch_size=most, budget=budget)
    except (ValueError, DoesNotFitError) as error:
        needed = tried.reserved + tried.missing
        message = (
            f"real steps of batch size {plan.batch_size} ran out of memory on {plan.device.name}: they were predicted "
            f"to reserve {format_bytes(plan.predicted_peak)}, and asked for {format_bytes(needed)} at least"
        )
        raise DoesNotFitError(message, needed=needed, available=tried.reserved) from error
    return replace(draft, plan=replace(smaller, limited_by="memory", notes=plan.notes))


def held_bytes(index: int | None, module: nn.Module) -> tuple[int, int]:
    """Bytes of a CUDA device that this process holds already: those that no plan can have, and the module's own."""
    if index is None or not torch.cuda.is_initialized():
        return 0, 0
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [p.grad for p in module.parameters() if p.grad is not None]
    blocks = {t.data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device == torch.device("cuda", index)}
    own = sum(blocks.values())
    return max(0, torch.cuda.memory_allocated(index) - own), own


class RankResult(NamedTuple):
    """What one rank says to the others: the batch size that it found for its card, or the ``reason`` why none."""

    card: str = ""
    batch_size: int = 0
    limited_by: LimitedBy | Literal["checkpoint"] = MEMORY
    reason: str = ""


def agreed(words: Sequence[RankResult]) -> int:
    """The rank that decides for all, by the smallest batch size: the first of them where several have it.

    >>> agreed([RankResult("RTX 3090", 96), RankResult("RTX 4080", 61), RankResult("RTX 4080", 61)])
    1

    Raises:
        MemplanError: a rank has no batch size; says which and why.
    """
    failed = [f"rank {rank}: {word.reason}" for rank, word in enumerate(words) if word.reason]
    if failed:
        raise MemplanError(f"there is no batch size for all {len(words)} ranks; {'; '.join(failed)}")
    return min(range(len(words)), key=lambda rank: words[rank].batch_size)
