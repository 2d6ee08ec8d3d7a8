"""Agree on one batch size across ranks, and confirm it by real steps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Literal, NamedTuple, Protocol, TypeVar

import torch

from lightning_memplan.errors import (
    DoesNotFitError,
    MemplanError,
    PlanningFailedError,
    StoppedByRankError,
    explain,
    located,
)
from lightning_memplan.lightning.ranks import over_ranks
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.memory.search import MEMORY, LimitedBy, lacking
from lightning_memplan.planning.limits import Limits
from lightning_memplan.planning.plan import needed_bytes
from lightning_memplan.probe.clean_up import give_back
from lightning_memplan.probe.out_of_memory import gpu_failed
from lightning_memplan.probe.probe import TrialPeaks
from lightning_memplan.types import Plan
from lightning_memplan.units import format_bytes

T = TypeVar("T")

#: How often a plan shrinks by the bytes that were missing in real steps; then it is halved
SHRINKS = 3


class Planner(Protocol):
    """Interface of the session that made a proposal, and that can plan again with less."""

    @property
    def limits(self) -> Limits:
        """Limits of the plan."""

    @property
    def index(self) -> int:
        """Index of the CUDA device on which real steps run."""

    @property
    def module_is_on_gpu(self) -> bool:
        """True where the module's own tensors are on the GPU already: a replica would stand beside them."""

    def estimate_at(self, batch_size: int) -> Estimate:
        """Return the estimate that holds at a batch size."""

    def plan(self, limits: Limits | None = None, *, retrace: bool = True) -> Plan:
        """Return the plan within other limits."""

    def trial(self, plan: Plan) -> TrialPeaks:
        """Run real steps of a plan's batch size."""


@dataclass(frozen=True)
class Proposal:
    """A plan, and the session that can plan again with less."""

    plan: Plan
    session: Planner

    @property
    def estimate(self) -> Estimate:
        """The estimate that holds at the planned batch size."""
        return self.session.estimate_at(self.plan.batch_size)

    def at(self, batch_size: int) -> Proposal:
        """Return the same proposal at another batch size: the one on which all ranks agreed."""
        plan, whole, estimate = self.plan, self.plan.effective_batch_size, self.session.estimate_at(batch_size)
        if batch_size == plan.batch_size:
            return self
        plan = replace(
            plan,
            batch_size=batch_size,
            accumulate_grad_batches=plan.accumulate_grad_batches
            if whole is None
            else whole // (batch_size * self.session.limits.ranks),
            peak_reserved=estimate.peak(batch_size, plan.device.capacity),
            peak_allocated=estimate.peak_allocated(batch_size),
            formula_peak=estimate.formula.memory(batch_size),
            methods=estimate.methods(batch_size, plan.device.capacity),
            phase=estimate.phase(batch_size),
            breakdown=estimate.breakdown(batch_size),
            needed=needed_bytes(estimate, batch_size, plan.budget, plan.device.capacity),
            reserved_range=estimate.reserved_range(batch_size, plan.device.capacity),
            confirmed=None,
        )
        return replace(self, plan=plan)

    def kept(self, batch_size: int) -> Proposal:
        """Return the proposal at the batch size of the run that is resumed, if it can run here at all.

        Raises:
            DoesNotFitError: it does not fit, whatever the margin.
        """
        whole, limits = self.plan.effective_batch_size, self.session.limits
        if whole is not None and whole % (batch_size * limits.ranks):
            return self.noted(
                f"the checkpoint's batch size {batch_size} does not divide the effective batch size: not kept"
            )
        try:
            limits = replace(limits.exactly(batch_size), budget=self.plan.device.capacity)
            plan = self.session.plan(limits, retrace=False)  # the run that is resumed had that size
        except DoesNotFitError as error:
            raise DoesNotFitError(
                f"the checkpoint's batch size {batch_size} cannot be kept; resume='plan' plans another: {error}",
                needed=error.needed,
                available=error.available,
            ) from error
        return replace(self, plan=replace(plan, limited_by="checkpoint", notes=self.plan.notes))

    def noted(self, text: str) -> Proposal:
        """Return the proposal with one more note on its plan."""
        return replace(self, plan=replace(self.plan, notes=(*self.plan.notes, text)))


#: Decide whether an error of planning stops training
IsFatal = Callable[[Exception], bool]


def always(error: Exception) -> bool:
    """Return True: every error of planning stops training."""
    return True


class RankResult(NamedTuple):
    """One rank's result, for the other ranks: the batch size for its GPU, or the ``reason`` why it has none.

    Training stops for a reason that is ``fatal``; it goes on with the user's own batch size for any other.

    >>> RankResult("RTX 3090", 96).reason
    ''
    """

    card: str = ""
    batch_size: int = 0
    limited_by: LimitedBy | Literal["validation", "checkpoint"] = MEMORY
    reason: str = ""
    fatal: bool = False


def deciding_rank(results: Sequence[RankResult]) -> int:
    """Return the rank that decides for all: the first of those with the smallest batch size.

    >>> deciding_rank([RankResult("RTX 3090", 96), RankResult("RTX 4080", 61), RankResult("RTX 4080", 61)])
    1
    """
    return min(range(len(results)), key=lambda rank: results[rank].batch_size)


def see_failures(results: Sequence[RankResult], failure: Exception | None = None) -> None:
    """Raise where a rank has failed: ``failure``, this rank's own error, or one that names the ranks that failed.

    All ranks raise alike: a ``PlanningFailedError`` where no reason is fatal.
    """
    failed = [(rank, result) for rank, result in enumerate(results) if result.reason]
    if not failed:
        return
    try:
        reasons = "; ".join(
            f"rank {rank}: {result.reason}" if len(results) > 1 else result.reason for rank, result in failed
        )
        if not any(result.fatal for _, result in failed):
            raise PlanningFailedError(reasons) from failure
        if failure is not None:
            raise failure
        raise StoppedByRankError(f"there is no batch size for all {len(results)} ranks; {reasons}")
    finally:
        del failure  # break the reference cycle failure → traceback → this frame


def on_each_rank(
    make: Callable[[], T], result_of: Callable[[T], RankResult], is_fatal: IsFatal = always, what: str = ""
) -> tuple[T, list[RankResult]]:
    """Return what ``make`` makes on this rank, and the results of all ranks.

    Where ``make`` raises on one rank, this raises on all: no rank waits for the result of one that has failed.

    Raises:
        PlanningFailedError: a rank has failed, for no reason that ``is_fatal``, or is gone.
        StoppedByRankError: another rank has failed; says which and why.
    """
    failure = None
    try:
        made = make()
        result = result_of(made)
    except Exception as error:  # noqa: BLE001 - the other ranks wait for this rank's result, whatever happened
        failure, result = error, RankResult(reason=what + located(error), fatal=is_fatal(error))
    try:
        results = over_ranks(result)
        see_failures(results, failure)
    finally:
        del failure  # break the reference cycle failure → traceback → this frame
    return made, results


def on_all_ranks(make: Callable[[], Proposal], is_fatal: IsFatal = always) -> Proposal:
    """Return the proposal that ``make`` makes, at the smallest batch size of all ranks; see ``on_each_rank``."""

    def result_of(found: Proposal) -> RankResult:
        return RankResult(found.plan.device.name, found.plan.batch_size, found.plan.limited_by)

    found, results = on_each_rank(make, result_of, is_fatal)
    rank = deciding_rank(results)
    decides = results[rank]
    if decides.batch_size == found.plan.batch_size:
        return found
    note = f"rank {rank} ({decides.card}) decides for all: here alone the batch size would be {found.plan.batch_size}"
    proposal = found.at(decides.batch_size)
    return replace(proposal, plan=replace(proposal.plan, limited_by=decides.limited_by)).noted(note)


def confirmed(proposal: Proposal, *, strict: bool, is_fatal: IsFatal = always) -> Proposal:
    """Return the proposal at its batch size, or at a smaller one, at which real steps ran on the GPUs of all ranks.

    A replica that fails other than for want of memory is noted; where this is ``strict``, the user's error is raised.

    Raises:
        DoesNotFitError: real steps of the smallest batch size ran out of memory.
    """
    for attempt in count():
        size = proposal.plan.batch_size
        proposal = on_all_ranks(partial(_tried, proposal, attempt, strict), is_fatal)
        if proposal.plan.batch_size == size:
            break
        proposal = proposal.noted(
            f"shrunk from {size} to {proposal.plan.batch_size}: real steps of {size} ran out of memory"
        )
    return proposal


def _tried(proposal: Proposal, attempt: int, strict: bool) -> Proposal:
    """Return the proposal if real steps of its batch size run on this rank's GPU, else one of a smaller size."""
    if proposal.session.module_is_on_gpu:
        return proposal.noted("not confirmed by real steps: the module is on the GPU already, beside a copy of it")
    try:
        peaks = proposal.session.trial(proposal.plan)
    except Exception as error:
        if strict or gpu_failed(error):  # a GPU that failed stays so
            raise
        why = explain(error, "real steps")
        if proposal.plan.method == "formula":
            raise PlanningFailedError(
                f"only the formula gives a batch size, and no real step confirms it: {why}"
            ) from error
        proposal = proposal.noted(f"not confirmed by real steps, which failed on a copy: {why}")
        peaks = None
    if peaks is None:  # and the error is gone, with the memory that it kept
        give_back(torch.device("cuda", proposal.session.index))
        return proposal
    if peaks.missing:
        return _shrunk(proposal, peaks, attempt)
    return replace(proposal, plan=replace(proposal.plan, confirmed=peaks.reserved))


def _shrunk(proposal: Proposal, peaks: TrialPeaks, attempt: int) -> Proposal:
    """Return a smaller proposal: by the bytes that were missing at first, then halved down to the smallest allowed."""
    plan, session = proposal.plan, proposal.session
    if attempt < SHRINKS:
        budget = plan.peak_reserved - lacking(plan.peak_reserved, peaks.reserved, peaks.missing, attempt)
        most = min(plan.batch_size - 1, plan.batch_size * budget // plan.peak_reserved)
    else:
        budget, most = plan.peak_reserved, plan.batch_size // 2
    for limits in _smaller(session.limits, plan.batch_size, most, budget):
        with suppress(ValueError, MemplanError):  # no such size fits, or the step refuses those that do
            smaller = session.plan(limits)
            return replace(proposal, plan=replace(smaller, limited_by="memory", notes=plan.notes))
    needed = peaks.reserved + peaks.missing
    message = (
        f"real steps of batch size {plan.batch_size} ran out of memory on {plan.device.name}: they were predicted "
        f"to reserve {format_bytes(plan.peak_reserved)}, and asked for {format_bytes(needed)} at least"
    )
    raise DoesNotFitError(message, needed=needed, available=peaks.reserved, tried=True)


def _smaller(limits: Limits, batch_size: int, most: int, budget: int) -> Iterator[Limits]:
    """Return limits for smaller sizes: at most ``most`` within a budget, then half of the size, then the smallest."""
    if most >= 1:
        yield replace(limits, max_batch_size=most, budget=budget)
    if batch_size // 2 >= limits.smallest:
        yield replace(limits, max_batch_size=batch_size // 2, budget=sys.maxsize)
    if (smallest := limits.smallest) < batch_size:
        yield replace(limits.exactly(smallest), budget=sys.maxsize)
