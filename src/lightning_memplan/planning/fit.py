"""Plan a Trainer's ``fit`` or ``test`` and write its batch size: what ``MemoryPlanner`` does at setup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lightning_memplan.checks import Method
from lightning_memplan.data.batches import batch_size_of
from lightning_memplan.data.holders import DEFAULT_NAME, Holder
from lightning_memplan.data.streams import unsized_loaders
from lightning_memplan.errors import ApplyError, MemplanError, located
from lightning_memplan.lightning.compat import misconfiguration
from lightning_memplan.lightning.loggers import say, warn
from lightning_memplan.lightning.ranks import over_ranks
from lightning_memplan.lightning.trainer import averaging_bytes, check_alone, cuda_index, validates
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.memory.structure import structure_of
from lightning_memplan.monitor.history import Lesson, learn
from lightning_memplan.monitor.meter import Forecast
from lightning_memplan.planning.apply import (
    Place,
    find_holders,
    find_place,
    has_batch_norm,
    leaves_one_sample,
    most_within_epochs,
    training_remarks,
    write_together,
)
from lightning_memplan.planning.evaluation import agreed_plan, most_beside_validation, plan_test, plan_validation
from lightning_memplan.planning.job import (
    DataSource,
    Sampling,
    TrainingJob,
    device_of_trainer,
    job_of_trainer,
    share_of_validation,
    source_of_trainer,
)
from lightning_memplan.planning.limits import Limits
from lightning_memplan.planning.plan import growth_notes
from lightning_memplan.planning.proposal import IsFatal, Proposal, always, confirmed, on_all_ranks
from lightning_memplan.planning.remarks import few_steps, smaller_gpu
from lightning_memplan.planning.session import PlanningSession, allocated_on, check_effective_batch_size
from lightning_memplan.probe.out_of_memory import gpu_failed
from lightning_memplan.report.figures import plot_timeline
from lightning_memplan.report.plans import plan_texts
from lightning_memplan.settings import MARGIN, StepSettings
from lightning_memplan.types import Device, Plan


@dataclass(frozen=True)
class FitOptions:
    """Options of a plan, as a user sets them; see ``MemoryPlanner``.

    >>> FitOptions(Limits(max_batch_size=64)).names["train"]
    'batch_size'
    """

    limits: Limits
    method: Method = "auto"
    device: Device | None = None
    sampling: Sampling = field(default_factory=Sampling)
    names: Mapping[str, str] = field(default_factory=lambda: {"train": DEFAULT_NAME})
    applies: bool = True  #: the batch size is set
    confirm: bool | None = None
    learns_margin: bool = False
    history: Path | None = None
    is_fatal: IsFatal = always


class FitPlanner:
    """Plan one ``fit``: find where the batch size is kept, propose the largest that fits, confirm it, write it.

    ``accumulated`` is the number of accumulated batches that an earlier plan has set, which is no obstacle.
    """

    def __init__(self, trainer: Any, module: nn.Module, options: FitOptions, accumulated: int = 1) -> None:
        self.options, self.accumulated = options, accumulated
        self.plan: Plan | None = None
        self.val_plan: Plan | None = None
        self.estimate: Estimate | None = None
        self.lesson = Lesson(options.limits.margin)
        self.settings = StepSettings()
        self.structure = ""  #: hash of the step, by which history knows runs alike
        self.already_allocated = 0
        self.place: Place | None = None
        self.own_size: int | None = None  #: number of samples in a batch of the user's, where it is known
        self._stays = False  # the batch size cannot be set
        self._doubts: tuple[str, ...] = ()  # notes on a plan by the formula
        self._rows_are_samples = True
        self._trainer, self._module, self._index = trainer, module, cuda_index(trainer)
        self._val_place: Place | None = None
        self._validation: DataSource | None = None
        self._session: PlanningSession | None = None
        self._proposal: Proposal | None = None

    @property
    def planned_size(self) -> int | None:
        """The proposed batch size, as long as another can be set in its place."""
        return None if self._proposal is None or self.place is None else self._proposal.plan.batch_size

    @property
    def limit(self) -> int | None:
        """Most bytes that this process may have allocated, None where nothing was planned for the GPU that trains."""
        if self.plan is None or self.options.device is not None:
            return None
        return self.plan.device.capacity + self.already_allocated

    def run(self) -> None:
        """Propose a plan on all ranks, confirm it by real steps, and write it.

        Raises:
            PlanningFailedError: a rank has failed, for no fatal reason.
        """
        options = self.options
        proposal = on_all_ranks(self._propose, options.is_fatal)
        confirm = options.confirm or (options.confirm is None and options.device is None and self._index is not None)
        if confirm and not any(over_ranks(self._stays)):
            proposal = confirmed(proposal, strict=options.confirm is True, is_fatal=options.is_fatal)
        self._proposal = proposal
        self._write(proposal, options.is_fatal)

    def keep(self, batch_size: int, is_fatal: IsFatal = always) -> None:
        """Set a checkpoint's batch size in place of the planned one, on all ranks.

        Raises:
            PlanningFailedError: it cannot be had here, which is not fatal; what was planned stays.
        """
        assert self._proposal is not None
        self._write(on_all_ranks(partial(self._proposal.kept, batch_size), is_fatal), is_fatal)

    def forecast(self, batch_size: int | None = None) -> Forecast:
        """Return the predicted peaks of each batch, at the planned batch size or at another."""
        if self.plan is None or self.estimate is None:
            return Forecast(())
        return Forecast.of(
            self.estimate,
            batch_size or self.plan.batch_size,
            self.plan.device.capacity,
            accumulate=self.plan.accumulate_grad_batches,
            already_allocated=self.already_allocated,
        )

    def size_of(self, batch: Any) -> int | None:
        """Return the number of samples in a batch of training, None where its tensors do not tell."""
        if not self._rows_are_samples:
            return None if self.place is not None else self.own_size
        try:
            return batch_size_of(batch)
        except ValueError:
            return None

    def timeline(self) -> Any:
        """Return a figure of the plan's step; None without matplotlib, or where there is no step to draw."""
        assert self.plan is not None
        assert self.estimate is not None
        plan = self.plan
        try:
            return plot_timeline(self.estimate, plan.batch_size, device=plan.device, budget=plan.budget)
        except (ModuleNotFoundError, ValueError):  # by the formula; or a checkpoint's size, which does not fit
            return None

    def check_loaders(self, plan: Plan, *, strict: bool) -> None:
        """See that the loaders have the planned size, now that they are there; warn where they have not, or raise."""
        try:
            if self.place is not None:
                self.place.check(plan.batch_size)
        except Exception as error:
            if strict:
                raise
            warn(f"the loaders may not give the planned batch size {plan.batch_size}: {located(error)}")

    def hyperparameters(self) -> dict[str, int]:
        """Return what was set, under the names that the user knows."""
        if self.place is None or self.plan is None:
            return {}
        applied = {self.options.names["train"]: self.place.held(self.plan.batch_size)}
        if self.val_plan is not None:
            applied[self.options.names["val"]] = self.val_plan.batch_size
        if self.plan.effective_batch_size is not None:
            applied["accumulate_grad_batches"] = self.plan.accumulate_grad_batches
            applied["effective_batch_size"] = self.plan.effective_batch_size
        return applied

    def release(self) -> None:
        """Let go of samples and traces that only planning needs."""
        self._proposal = self._session = self._validation = None

    def _propose(self) -> Proposal:
        options, trainer, module = self.options, self._trainer, self._module
        if options.confirm and self._index is None:
            raise misconfiguration(
                f"confirm=True runs real steps on a CUDA device, and the Trainer runs on {trainer.strategy.root_device}"
            )
        if options.applies:
            check_alone(trainer)
        holders, val_holders = self._holders("train"), self._holders("val")
        job = job_of_trainer(
            trainer,
            module,
            "fit",
            options.device or device_of_trainer(trainer),
            options.sampling,
            options.method,
            options.names["train"],
        )
        whole = options.limits.effective_batch_size
        if whole is not None and job.settings.accumulate_grad_batches == self.accumulated:
            job = job.accumulating(1)
        check_effective_batch_size(job, options.limits)
        self.own_size, self._rows_are_samples = job.source.own_size, job.source.samples.rows_are_samples
        session = PlanningSession(job, options.limits, options.method, allocated_on(self._index, module))
        stays = self._find_place(job, holders)
        if stays:
            session.limits = session.limits.exactly(self.own_size or 1)
        else:
            self._limit_to_epochs(session, job.source)
        first = session.estimate_at((whole or job.ranks) // job.ranks)
        session.extra_bytes = averaging_bytes(trainer, job.begun) if self._index is not None else 0
        self._doubts = first.notes if options.method == "auto" and first.method == "formula" else ()
        self._session, self.settings, self.already_allocated = session, job.settings, session.already_allocated
        self.structure = structure_of(first, job.name, job.settings, job.ranks)
        margin = None if options.learns_margin else options.limits.margin
        self.lesson = learn(
            options.history, self.structure, session.device, method=first.method, margin=margin, prior=MARGIN
        )
        session.limits = replace(session.limits, margin=self.lesson.margin, failed=self.lesson.failed)
        proposal = self._without_a_last_sample(session.propose(), session)
        if not val_holders and self.place is not None and holders and validates(trainer):
            proposal = self._beside_validation(proposal, session)
        if stays:
            plan = replace(proposal.plan, limited_by="dataset")
            proposal = replace(proposal, plan=plan).noted(f"the batch size stays: {stays}")
        if val_holders and validates(trainer):
            self._validation = source_of_trainer(job, "val", options.sampling)
            self._val_place = find_place(trainer, self._validation.data, val_holders, "val")
        return proposal

    def _beside_validation(self, proposal: Proposal, session: PlanningSession) -> Proposal:
        """Return the proposal, or a smaller one where validation's batches grow with training's, and do not fit."""
        job, plan, own = session.job, proposal.plan, self.own_size
        if own is None or plan.method == "formula":
            return proposal
        smallest = session.limits.smallest
        try:
            validation = source_of_trainer(job, "val", self.options.sampling)
            share = share_of_validation(job, validation, own)
            if share is None:
                return proposal
            most = most_beside_validation(session, plan.batch_size, validation, share)
        except Exception as error:  # training is planned all the same
            if gpu_failed(error):
                raise
            return proposal.noted(f"validation is not planned beside training: {located(error)}")
        if most == plan.batch_size:
            return proposal
        plan = session.plan(replace(session.limits, max_batch_size=max(most, smallest)))
        proposal = replace(proposal, plan=replace(plan, limited_by="validation"))
        few = f"{smallest} samples of validation may not fit beside training"
        return proposal if most else proposal.noted(few)

    def _limit_to_epochs(self, session: PlanningSession, source: DataSource) -> None:
        """Lower the limits to batch sizes with which epochs have the batches that the Trainer needs.

        Where the length of the data is not known, ``max_batch_size`` allows more.
        """
        most = session.limits.largest
        if self.place is None or most is None or most <= 1:
            return
        allowed = self.options.limits.max_batch_size is not None and unsized_loaders(source.data, source.samples)
        within = most_within_epochs(self._trainer, source.data, most, None if allowed else self.own_size)
        if session.limits.smallest <= within < most:
            session.limits = replace(session.limits, max_batch_size=within)

    def _without_a_last_sample(self, proposal: Proposal, session: PlanningSession) -> Proposal:
        """Return the proposal, or a smaller one where a last batch of one sample may stop training.

        Batch norm refuses it. Other steps may: for these the batch size shrinks by an eighth at most.
        """
        if self.place is None:
            return proposal
        source, first = self.place.source, proposal.plan
        plan = first
        while leaves_one_sample(self._trainer, source, plan.batch_size, self.own_size):
            try:
                plan = session.plan(replace(session.limits, max_batch_size=plan.batch_size - 1))
            except (MemplanError, ValueError):  # there is no smaller one: said in a warning, where it is set
                return proposal
        if plan is first or (8 * plan.batch_size < 7 * first.batch_size and not has_batch_norm(self._module)):
            return proposal
        return replace(proposal, plan=replace(plan, limited_by=first.limited_by)).noted(
            f"{first.batch_size} samples a batch leave a last batch of one, which a step may refuse: "
            f"{plan.batch_size} do not"
        )

    def _find_place(self, job: TrainingJob, holders: tuple[Holder, ...]) -> str:
        """Find the place of the batch size; where it cannot be set and stays, return why.

        Raises:
            ApplyError: it cannot be set, and its own size is not known, or is none that was asked for.
        """
        options, own = self.options, self.own_size
        self.place = None
        if not options.applies:
            return ""
        try:
            self.place = find_place(self._trainer, job.source.data, holders, own=own)
        except ApplyError as error:
            demands = options.limits.effective_batch_size is not None or options.limits.min_batch_size > 1
            if own is None or demands or options.is_fatal(error):
                raise
            warn(f"the batch size stays {own}, and its steps are predicted: {error}")
            self._stays = True
            return str(error)
        return ""

    def _holders(self, stage: str) -> tuple[Holder, ...]:
        if not self.options.applies or stage not in self.options.names:
            return ()
        return find_holders(self.options.names[stage], self._module, getattr(self._trainer, "datamodule", None))

    def _write(self, proposal: Proposal, is_fatal: IsFatal) -> None:
        """Set all that is planned, or nothing; say so, once it is set on all ranks."""
        plan, val_plan, val_size = proposal.plan, None, 0
        estimate = proposal.estimate  # before anything is set: it may have to be made
        if self._validation is not None:
            assert self._session is not None
            make = partial(plan_validation, self._session, plan, self._validation)
            val_plan, val_size = agreed_plan(make, "validation", otherwise=plan.batch_size, is_fatal=is_fatal)
        accumulate = None if plan.effective_batch_size is None else plan.accumulate_grad_batches
        if self.place is not None:
            self.place = replace(self.place, fits=lambda size: estimate.fits(size, plan.budget))
        sizes = [(self.place, plan.batch_size), (self._val_place, val_size)]
        written = [(place, size) for place, size in sizes if place is not None]
        texts: list[str] = []
        remarks: list[str] = []

        def prepare() -> None:
            texts.extend(plan_texts(plan, self.lesson.text, val_plan, val_size))
            texts.extend(f"MemoryPlanner: {advice}" for advice in self._advice(plan))
            remarks.extend(self._remarks(plan))
            remarks.extend(growth_notes(estimate, plan.batch_size, plan.device.capacity))

        with write_together(written, self._trainer, accumulate, is_fatal, prepare):
            self._say(texts, is_fatal)
        for remark in remarks:
            warn(remark)
        if self.place is not None and accumulate is not None:
            self.accumulated = accumulate
        self.plan, self.val_plan, self.estimate = plan, val_plan, estimate

    @staticmethod
    def _say(texts: Sequence[str], is_fatal: IsFatal) -> None:
        """Print texts. What is set on all ranks stays so where one of them cannot print."""
        try:
            for text in texts:
                say(text)
        except Exception as error:
            if is_fatal(error):
                raise
            warn(f"the plan is not printed: {located(error)}")

    def _remarks(self, plan: Plan) -> list[str]:
        """Return doubts about the plan, and what it changes in training beside memory."""
        remarks = ["; ".join(self._doubts)] if self._doubts else []
        if self.place is None:
            return remarks
        own, accumulates = self.own_size, plan.effective_batch_size is None  # what the plan sets is no surprise
        source = self.place.source
        remarks += training_remarks(self._trainer, self._module, source, plan.batch_size, own, accumulates)
        if self._index is not None and self.options.device is not None:
            remarks += smaller_gpu(plan, device_of_trainer(self._trainer))
        return remarks

    def _advice(self, plan: Plan) -> list[str]:
        """Return what to do where the batch size makes the training another one, as texts to print."""
        asked_for = plan.effective_batch_size is not None or plan.limited_by == "checkpoint"
        if self.place is None or self.own_size is None or asked_for:
            return []
        advice = few_steps(self._trainer, self.place.source, plan.batch_size, self.own_size)
        return [advice] if advice else []


@dataclass(frozen=True, slots=True)
class SizeOfTest:
    """The batch size of a test, as it was set; ``plan`` is None where the test cannot be traced."""

    plan: Plan | None
    batch_size: int
    place: Place

    def put_back(self) -> None:
        """Give the attributes what they held before the test."""
        self.place.put_back(self.batch_size)


def plan_and_set_test(trainer: Any, module: nn.Module, options: FitOptions) -> SizeOfTest:
    """Plan the batch size of the test that is to come, write it, and return what was set.

    Raises:
        PlanningFailedError: a rank has failed, for no fatal reason.
    """
    holders = find_holders(options.names["test"], module, getattr(trainer, "datamodule", None))
    device = options.device or device_of_trainer(trainer)
    held = allocated_on(cuda_index(trainer), module).other_bytes
    job = job_of_trainer(trainer, module, "test", device, options.sampling)
    place = find_place(trainer, job.source.data, holders, "test")
    limits = Limits(options.limits.margin, max_batch_size=options.limits.max_batch_size)
    make = partial(plan_test, job, replace(device, context=device.context + held), limits)
    plan, size = agreed_plan(make, "a test", is_fatal=options.is_fatal)
    with write_together([(place, size)], trainer, is_fatal=options.is_fatal):
        return SizeOfTest(plan, size, place)
