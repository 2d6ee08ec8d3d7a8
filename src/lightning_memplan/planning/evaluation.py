"""Plan validation and tests, where they have a batch size of their own."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import ceil

from lightning_memplan.errors import TraceError, issue_warning
from lightning_memplan.memory.search import SizeLimits, largest_fitting
from lightning_memplan.planning.job import DataSource, TrainingJob
from lightning_memplan.planning.limits import Limits
from lightning_memplan.planning.plan import make_plan
from lightning_memplan.planning.predict import predict_test, trace_of_validation
from lightning_memplan.planning.predictor import OneEstimate
from lightning_memplan.planning.proposal import IsFatal, RankResult, always, on_each_rank
from lightning_memplan.planning.session import PlanningSession
from lightning_memplan.types import Device, Plan


def plan_validation(session: PlanningSession, training: Plan, validation: DataSource) -> Plan:
    """Return the plan of validation's batch size, beside training at the planned size.

    Raises:
        DoesNotFitError: not even one sample of validation fits beside training.
        TraceError: validation cannot be traced.
    """
    job, size = session.job, training.batch_size
    found = trace_of_validation(job, validation).beside(session.estimate_at(size), size)
    limits = Limits(
        margin=session.limits.margin,
        max_batch_size=session.limits.max_batch_size,
        multiple_of=session.limits.multiple_of,
    )
    limits = validation.within(limits, job.ranks)
    assert found.program is not None
    if (own := validation.batch_size) is not None and found.program.batch_sizes == (own,):
        limits = limits.exactly(own)  # known at this size alone: it stays
    return make_plan(OneEstimate(found, f"{job.name} in validation"), session.device, limits, nccl=job.nccl)


def most_beside_validation(session: PlanningSession, most: int, validation: DataSource, share: Fraction) -> int:
    """Return the largest batch size up to ``most`` beside which validation fits; 0 where none does.

    Validation has ``share`` times the samples of training in a batch, and no more than it has at all.

    Raises:
        TraceError: validation cannot be traced.
    """
    traced = trace_of_validation(session.job, validation)
    budget, limits, samples = session.limits.budget_of(session.device), session.limits, validation.size
    if len(traced.program.batch_sizes) == 1:
        raise TraceError("its events depend on the batch size, and are known at its own alone")

    def fits(batch_size: int) -> bool:
        own = ceil(batch_size * share) if samples is None else min(ceil(batch_size * share), samples)
        return traced.beside(session.estimate_at(batch_size), batch_size).fits(max(1, own), budget)

    sizes = SizeLimits(limits.smallest, most, multiple_of=limits.multiple_of)
    return largest_fitting(fits, sizes, near=most).batch_size


def plan_test(job: TrainingJob, device: Device, limits: Limits) -> Plan:
    """Return the plan of a test, with nothing but the module on the GPU.

    Raises:
        DoesNotFitError: not even one sample fits.
        TraceError: the test cannot be traced.
    """
    found = OneEstimate(predict_test(job), f"{job.name} in a test")
    return make_plan(found, device, job.source.within(limits, job.ranks))


def agreed_plan(
    make: Callable[[], Plan], what: str, otherwise: int | None = None, is_fatal: IsFatal = always
) -> tuple[Plan | None, int]:
    """Return the plan that ``make`` makes, and the smallest batch size of all ranks' plans.

    Where the step cannot be traced the size is ``otherwise``, with a warning. A rank whose ``make`` raises tells the
    others first: none waits for it.

    Raises:
        PlanningFailedError: a rank has failed, for no reason that ``is_fatal``.
        StoppedByRankError: another rank has no batch size.
    """

    def made() -> Plan | None:
        try:
            return make()
        except TraceError as error:
            if otherwise is None:
                raise
            issue_warning(f"MemoryPlanner: {what} gets training's batch size, since it cannot be traced: {error}")
            return None

    def result_of(plan: Plan | None) -> RankResult:
        return RankResult(batch_size=(otherwise or 0) if plan is None else plan.batch_size)

    plan, results = on_each_rank(made, result_of, is_fatal, f"{what}: ")
    return plan, min(each.batch_size for each in results)
