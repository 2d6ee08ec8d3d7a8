"""The callback: plan at setup, set the batch size, measure every CUDA step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_memplan.checks import check_choice, check_count, check_method
from lightning_memplan.data.batches import batch_size_of
from lightning_memplan.errors import (
    ApplyError,
    DoesNotFitError,
    MemplanError,
    PlanningFailedError,
    UnmetDemandError,
    located,
    planning_warnings,
)
from lightning_memplan.lightning.compat import CallbackBase, misconfiguration, over_ranks
from lightning_memplan.lightning.data_source import release_loaders
from lightning_memplan.lightning.loggers import (
    log_first_hyperparams,
    log_hyperparams,
    logged_step,
    say,
    tensorboard_writers,
    warn,
)
from lightning_memplan.lightning.trainer import (
    averaging_bytes,
    batches_into_epoch,
    check_alone,
    cuda_index,
    is_fitting,
    validates,
)
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.memory.structure import structure_of
from lightning_memplan.monitor.history import Lesson, RunSetup, history_path, learn, remember
from lightning_memplan.monitor.meter import PHASES, Forecast, Meter
from lightning_memplan.planning.apply import (
    DEFAULT_NAME,
    Holder,
    Place,
    find_holders,
    find_place,
    names_by_stage,
    write_together,
)
from lightning_memplan.planning.evaluation import agreed_plan, plan_test, plan_validation
from lightning_memplan.planning.job import (
    DataSource,
    WhichSamples,
    device_of_trainer,
    job_of_trainer,
    named_device,
    sampling_of,
    source_of_trainer,
)
from lightning_memplan.planning.limits import Limits
from lightning_memplan.planning.proposal import Proposal, confirmed, on_all_ranks
from lightning_memplan.planning.session import PlanningSession, allocated_on, check_effective_batch_size
from lightning_memplan.probe.out_of_memory import ran_out_of_memory
from lightning_memplan.report.figures import plot_timeline
from lightning_memplan.report.metrics import (
    plan_hparams,
    ranks_metrics,
    scalars_layout,
    step_metrics,
    validation_metrics,
)
from lightning_memplan.report.plans import plan_table, validation_text
from lightning_memplan.report.runs import measurement_summary
from lightning_memplan.settings import MARGIN, StepSettings
from lightning_memplan.types import Device, Measurement, Outcome, Peaks, Plan


class MemoryPlanner(CallbackBase):
    """Plan the memory of training at setup, set the largest batch size that fits, and measure every CUDA step.

    >>> from lightning_memplan import MemoryPlanner
    >>> planner = MemoryPlanner(margin=0.1, max_batch_size=512, multiple_of=8)
    >>> planner.plan is None, planner.measurements
    (True, [])

    Args:
        method: How to predict. ``"probe"`` runs the training step on the GPU, ``"trace"`` runs it on fake tensors,
            ``"formula"`` adds up ``params + grads + bs * (I1 + 2 * sum(Ii))``. ``"auto"`` traces, and probes too where
            the GPU is here (with several ranks under DDP only). It plans by the probe if that has run a large batch,
            else by the one with which fewer samples fit, and by the formula where neither can be had.
        device: GPU to plan for: a name such as ``"RTX 3090"``, or a ``Device``. By default the device on which the
            Trainer runs.
        margin: Fraction of GPU memory to leave free, in ``[0, 1)``; or ``"learned"``: the margin that earlier runs like
            this one justify (needs ``history``).
        min_batch_size: Smallest batch size allowed. Above 1 it is a demand: training stops where it cannot be had.
        max_batch_size: Largest batch size allowed.
        multiple_of: Number of which the batch size must be a multiple.
        batch_arg_name: Attribute or hyperparameter of the module or datamodule that holds the batch size, such as
            ``"batch_size"`` or ``"data.batch_size"``; all holders are set. Or names by stage, such as
            ``{"train": "batch_size", "val": "val_batch_size", "test": "test_batch_size"}``, where validation and tests
            have sizes of their own. Loaders that follow no holder are replaced by copies of the planned batch size.
        effective_batch_size: Samples that one optimizer step sees, on all devices together. The largest batch size that
            divides it and fits is set, and ``trainer.accumulate_grad_batches`` with it.
        samples: Samples of the dataset that the plan is made for. ``"auto"`` and ``"first"`` take the first five;
            ``"largest"`` takes copies of the largest of 64 that are spread over the dataset.
        apply: Set the batch size. By default on a GPU; on the CPU the plan is for information. With ``False``
            nothing is set, nothing of planning stops training, and predictions are for the batches that training has.
        confirm: Run two real steps of the batch size on the GPU before it is set, on a replica. If they run out of
            memory, the plan shrinks. By default where the Trainer runs on the GPU that is planned for.
        objective: ``"largest"``, the batch size that fills the GPU.
        on_error: What a failure of planning does, whatever its cause. ``"warn"`` says in one warning what could not be
            planned and why; training goes on with the user's own batch size, and its steps are measured. ``"raise"``
            raises it. Both raise where a size that was demanded cannot be had, and where real steps of the smallest
            batch size ran out of memory.
        resume: Where training resumes from a checkpoint: ``"keep"`` its batch size, so that a resumed epoch goes on at
            the same sample, or ``"plan"`` again.
        every_n_steps: Log the measurements of every n-th step; all are kept in ``measurements``.
        prog_bar: ``False``: metrics go to loggers alone.
        history: Keep a line of each run on a CUDA device (predicted and measured peaks, versions, settings): ``True``
            in ``~/.local/share/lightning-memplan/history.jsonl`` or where ``MEMPLAN_HISTORY`` says, or the path of a
            file.

    Attributes:
        plan: The ``Plan``, from setup on; None where nothing was planned.
        val_plan: The plan of validation, where it has a batch size of its own.
        test_plan: The plan of the last ``trainer.test``, where tests have a batch size of their own.
        estimate: The ``Estimate`` behind the plan.
        measurements: One ``Measurement`` for each CUDA step.
        validations: The ``Peaks`` of each validation on a CUDA device.

    Raises:
        ValueError: An argument is wrong in itself.
        MisconfigurationException: At setup: ``effective_batch_size``, where something else decides how much is
            accumulated (manual optimization, the Trainer, a scheduler, DeepSpeed).
        UnmetDemandError: At setup: no batch size meets ``effective_batch_size`` or ``min_batch_size``.
        DoesNotFitError: At setup: real steps of the smallest batch size ran out of memory.
    """

    def __init__(
        self,
        method: Literal["auto", "trace", "formula", "probe"] = "auto",
        device: str | Device | None = None,
        margin: float | Literal["learned"] = MARGIN,
        min_batch_size: int = 1,
        max_batch_size: int | None = None,
        multiple_of: int = 1,
        batch_arg_name: str | dict[str, str] = DEFAULT_NAME,
        effective_batch_size: int | None = None,
        samples: WhichSamples = "auto",
        apply: bool | None = None,
        confirm: bool | None = None,
        objective: Literal["largest"] = "largest",
        on_error: Literal["warn", "raise"] = "warn",
        resume: Literal["keep", "plan"] = "keep",
        every_n_steps: int = 1,
        prog_bar: bool = False,
        history: bool | str | Path = False,
    ) -> None:
        super().__init__()
        check_method(method)
        if margin == "learned" and history is False:
            raise ValueError("margin='learned' learns from earlier runs: pass history=True or the path of a file")
        check_choice("objective", objective, ("largest",))
        check_choice("on_error", on_error, ("warn", "raise"))
        check_choice("resume", resume, ("keep", "plan"))
        check_choice("prog_bar", prog_bar, (False,))
        check_count("every_n_steps", every_n_steps)
        self._names = names_by_stage(batch_arg_name)
        self._sampling = sampling_of(samples)
        self.method = method
        self.device = named_device(device)
        self.margin = margin
        self.min_batch_size = min_batch_size
        self.max_batch_size = max_batch_size
        self.multiple_of = multiple_of
        self.batch_arg_name = batch_arg_name
        self.effective_batch_size = effective_batch_size
        self.samples = samples
        self.apply = apply
        self.confirm = confirm
        self.objective = objective
        self.on_error = on_error
        self.resume = resume
        self.every_n_steps = every_n_steps
        self.prog_bar = prog_bar
        self.history = history
        self._limits()  # checked before any work is done
        self.plan: Plan | None = None
        self.val_plan: Plan | None = None
        self.test_plan: Plan | None = None
        self.estimate: Estimate | None = None
        self._meter: Meter | None = None
        self._forecast = Forecast(())  # at the batch size that training has
        self._formula_peak = 0
        self._index: int | None = None
        self._settings = StepSettings()
        self._already_allocated = 0
        self._session: PlanningSession | None = None
        self._validation: DataSource | None = None
        self._structure = ""
        self._lesson = Lesson(MARGIN)
        self._place: Place | None = None
        self._val_place: Place | None = None
        self._test_place: Place | None = None
        self._accumulates = 1
        self._applies = False  # whether this run's batch size is set
        self._proposal: Proposal | None = None

    # -- plan, at setup: before any loader is built

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._applies = cuda_index(trainer) is not None if self.apply is None else self.apply
        if stage == "test" and "test" in self._names and self._applies and not trainer.fast_dev_run:
            with self._softly("the batch size of the test is not planned"), planning_warnings():
                self._plan_test(trainer, pl_module, self._names["test"])
        if stage != "fit":
            return
        self._forget_plan()
        self._index = None if trainer.fast_dev_run else cuda_index(trainer)
        if trainer.fast_dev_run:
            say("MemoryPlanner is disabled when fast_dev_run is set: it runs a few batches of the user's size")
            return
        with self._softly("the batch size is not planned"), planning_warnings():
            self._plan_fit(trainer, pl_module)

    def _plan_fit(self, trainer: Any, module: Any) -> None:
        """Propose a plan on all ranks, confirm it by real steps, and write it."""
        proposal = on_all_ranks(partial(self._propose, trainer, module), self._is_fatal)
        if self.confirm or (self.confirm is None and self.device is None and self._index is not None):
            proposal = confirmed(proposal, strict=self.confirm is True, is_fatal=self._is_fatal)
        self._apply_plan(trainer, proposal)
        self._proposal = proposal if self._place is not None else None
        if self._index is not None:
            for writer in tensorboard_writers(trainer):  # now: the last layout counts, and the user's may come later
                writer.add_custom_scalars(scalars_layout(PHASES))

    def _is_fatal(self, error: Exception) -> bool:
        """Decide whether an error of planning stops training: an unmet demand does, and a GPU that failed."""
        if self.on_error == "raise" or isinstance(error, getattr(torch, "AcceleratorError", ())):
            return True
        if not self._applies:
            return False
        if isinstance(error, DoesNotFitError):
            return error.tried or self.min_batch_size > 1
        demands = self.effective_batch_size is not None or self.min_batch_size > 1
        return demands and isinstance(error, (UnmetDemandError, type(misconfiguration(""))))

    @contextmanager
    def _softly(self, what: str) -> Iterator[None]:
        """Turn a planning failure into one warning: the user's batch size stays, and steps are measured."""
        try:
            yield
        except PlanningFailedError as error:
            self._forget_plan()
            warn(
                f"{what}: {error}. Training goes on with the user's own batch size, measured without predictions; "
                "MemoryPlanner(on_error='raise') stops here instead"
            )
        except Exception as error:
            self._forget_plan()
            if self._is_fatal(error) or isinstance(error, MemplanError):
                raise
            warn(f"{what}: {located(error)}. Training goes on with the user's own batch size")

    def _forget_plan(self) -> None:
        self.plan = self.val_plan = self.estimate = self._place = self._val_place = self._meter = None
        self._forecast = Forecast(())
        self._formula_peak = 0
        self._structure = ""
        self._release_planning()

    def _propose(self, trainer: Any, module: Any) -> Proposal:
        """Plan this rank's run: find where the batch size is kept, and the largest that fits."""
        if self.confirm and self._index is None:
            raise misconfiguration(
                f"confirm=True runs real steps on a CUDA device, and the Trainer runs on {trainer.strategy.root_device}"
            )
        if self._applies:
            check_alone(trainer)
        holders = find_holders(self._names["train"], module, trainer.datamodule) if self._applies else ()
        val_holders: tuple[Holder, ...] = ()
        if "val" in self._names and self._applies:
            val_holders = find_holders(self._names["val"], module, trainer.datamodule)
        job = job_of_trainer(trainer, module, "fit", self.device or device_of_trainer(trainer), self._sampling)
        limits = self._limits()
        if self.effective_batch_size is not None and job.settings.accumulate_grad_batches == self._accumulates:
            job = job.accumulating(1)  # set by an earlier plan
        check_effective_batch_size(job, limits)
        self._place = find_place(trainer, job.source.data, holders) if self._applies else None
        session = PlanningSession(job, limits, self.method, allocated_on(self._index, module))
        self._session, ranks = session, job.ranks
        first = session.estimate_at((self.effective_batch_size or ranks) // ranks)
        session.extra_bytes = averaging_bytes(trainer, job.begun) if self._index is not None else 0
        if self.method == "auto" and first.method == "formula" and trainer.is_global_zero:
            warnings.warn(f"MemoryPlanner: {'; '.join(first.notes)}", stacklevel=2)
        self._settings, self._already_allocated = job.settings, session.already_allocated
        self._structure = structure_of(first, job.name, job.settings, ranks)
        self._lesson = self._learn(session.device, first.method)
        session.limits = replace(session.limits, margin=self._lesson.margin, failed=self._lesson.failed)
        proposal = session.propose()
        if val_holders and validates(trainer):
            self._validation = source_of_trainer(job, "val", self._sampling)
            self._val_place = find_place(trainer, self._validation.data, val_holders, "val")
        return proposal

    def _limits(self) -> Limits:
        """Return the limits that the options set."""
        return Limits(
            MARGIN if self.margin == "learned" else self.margin,
            self.min_batch_size,
            self.max_batch_size,
            self.multiple_of,
            self.effective_batch_size,
        )

    def _apply_plan(self, trainer: Any, proposal: Proposal) -> None:
        """Set what is planned: all of it, or nothing."""
        plan, estimate = proposal.plan, proposal.estimate
        val_plan, val_size = None, 0
        if self._validation is not None:
            assert self._session is not None
            make = partial(plan_validation, self._session, plan, self._validation)
            val_plan, val_size = agreed_plan(make, "validation", otherwise=plan.batch_size, is_fatal=self._is_fatal)
        forecast = self._foreseen(estimate, plan.batch_size, plan)
        sizes = [(self._place, plan.batch_size), (self._val_place, val_size)]
        accumulate = None if self.effective_batch_size is None else plan.accumulate_grad_batches
        written = [(place, size) for place, size in sizes if place is not None]
        with write_together(written, trainer, accumulate, self._is_fatal):
            say(plan_table(plan, [("earlier runs", self._lesson.text)] if self._lesson.text else ()))
            if self._val_place is not None:
                say(validation_text(val_size, plan, val_plan))
        if self._place is not None and accumulate is not None:
            self._accumulates = accumulate
        self.plan, self.val_plan, self.estimate, self._forecast = plan, val_plan, estimate, forecast
        self._formula_peak = plan.formula_peak

    def _foreseen(self, estimate: Estimate, batch_size: int, plan: Plan) -> Forecast:
        capacity, accumulate = plan.device.capacity, plan.accumulate_grad_batches
        return Forecast.of(
            estimate, batch_size, capacity, accumulate=accumulate, already_allocated=self._already_allocated
        )

    def _foresee(self, batch: Any) -> None:
        """Predict for batches of as many samples as the first one has, where none were set."""
        plan, estimate = self.plan, self.estimate
        assert plan is not None
        assert estimate is not None
        try:
            size = batch_size_of(batch)
        except ValueError:  # it is not told: what was planned with is as good as another
            return
        if size == plan.batch_size:
            return
        assert self._meter is not None
        self._meter.forecast = self._foreseen(estimate, size, plan)
        self._formula_peak = estimate.formula.memory(size)
        say(f"MemoryPlanner predicts for batches of {size}, as training has them")

    def _learn(self, device: Device, method: str) -> Lesson:
        """Return what earlier runs teach of the margin, where it is to be learned."""
        margin = None if self.margin == "learned" else self._limits().margin
        return learn(history_path(self.history), self._structure, device, method=method, margin=margin, prior=MARGIN)

    def _plan_test(self, trainer: Any, module: Any, name: str) -> None:
        """Plan and set the batch size of the test that is to come."""
        holders = find_holders(name, module, trainer.datamodule)
        device = self.device or device_of_trainer(trainer)
        held = allocated_on(cuda_index(trainer), module).other_bytes
        job = job_of_trainer(trainer, module, "test", device, self._sampling)
        place = find_place(trainer, job.source.data, holders, "test")
        limits = Limits(self._limits().margin, max_batch_size=self.max_batch_size)
        make = partial(plan_test, job, replace(device, context=device.context + held), limits)
        self.test_plan, size = agreed_plan(make, "a test", is_fatal=self._is_fatal)
        with write_together([(place, size)], trainer, is_fatal=self._is_fatal):
            say(f"MemoryPlanner: the batch size of the test is {size}")
        self._test_place = place

    # -- resume: Lightning restores after setup, and before any loader is built

    def state_dict(self) -> dict[str, Any]:
        return {} if self.plan is None or not self._applies else {"batch_size": self.plan.batch_size}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        size = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("batch_size")
        if self._proposal is None or size in (None, self._proposal.plan.batch_size):
            return
        if self.resume == "keep":
            self._keep(trainer, self._proposal, size)
        elif (count := batches_into_epoch(checkpoint)) and trainer.is_global_zero:
            warnings.warn(
                f"MemoryPlanner: the checkpoint was made within an epoch, after {count} batches of {size}, and "
                f"resume='plan' goes on with batches of {self._proposal.plan.batch_size}: some of that epoch's samples "
                "are left out or seen again, as its loader may have it; resume='keep' goes on at the same sample",
                stacklevel=2,
            )

    def _keep(self, trainer: Any, proposal: Proposal, batch_size: int) -> None:
        """Set the checkpoint's batch size on all ranks; where it cannot be had, what was planned stays."""
        try:
            with planning_warnings():
                self._apply_plan(trainer, on_all_ranks(partial(proposal.kept, batch_size), self._is_fatal))
        except PlanningFailedError as error:
            warn(f"{error}. Training resumes with the planned batch size {proposal.plan.batch_size}")

    def _release_planning(self) -> None:
        """Let go of samples and estimates that only planning needs."""
        self._proposal = self._session = self._validation = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._release_planning()
        if self.plan is not None:
            log_first_hyperparams(trainer, pl_module, plan_hparams(self.plan) | self._applied())

    # -- measure, at every CUDA step

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.plan is not None:
            self._announce(trainer, self.plan)
        if self._index is None:
            if self.plan is not None and trainer.is_global_zero:
                warnings.warn(
                    f"MemoryPlanner measures nothing: the Trainer runs on {trainer.strategy.root_device}, and only "
                    "CUDA devices tell their peak memory; use Trainer(accelerator='gpu') on a machine that has one",
                    stacklevel=2,
                )
            return
        self._meter = Meter(
            self._index,
            self._forecast,
            every_n_steps=self.every_n_steps,
            manual=not pl_module.automatic_optimization,
            margin=None if self.plan is None or self.plan.method == "formula" else self.plan.margin,
        )

    def _announce(self, trainer: Any, plan: Plan) -> None:
        """Check that the loaders have the planned size, and log the plan."""
        if self._place is not None:
            try:
                self._place.check(plan.batch_size)
            except ApplyError as error:
                if self.on_error == "raise":
                    raise
                warn(str(error))
        log_hyperparams(trainer, plan_hparams(plan) | self._applied())
        self._draw(trainer)

    @property
    def measurements(self) -> list[Measurement]:
        return [] if self._meter is None else self._meter.measurements

    @property
    def validations(self) -> list[Peaks]:
        return [] if self._meter is None else self._meter.validations

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._meter is not None:
            if not self._applies and not self._meter.step and self.plan is not None:
                self._foresee(batch)
            self._meter.begin()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if self._meter is not None and self._meter.phase:
            self._meter.enter("backward")

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self._meter is not None and self._meter.phase:
            self._meter.enter("optimizer" if pl_module.automatic_optimization else "forward")

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._meter is not None and not pl_module.automatic_optimization:
            self._meter.enter("optimizer")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._meter is None:
            return
        measured = self._meter.end()
        if remark := self._meter.remark():
            warnings.warn(f"MemoryPlanner: {remark}", stacklevel=2)
        if self._meter.logs(measured.step):
            self._log_step(trainer, measured)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if self._meter is not None and is_fitting(trainer):
            self._meter.begin_validation()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._meter is not None and is_fitting(trainer):
            self._log(trainer, validation_metrics(self._meter.end_validation()))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._meter is None:
            return
        self._remember(trainer, pl_module, "done")
        ranks = over_ranks(self._meter.highest)
        if len(ranks) > 1:
            self._log(trainer, ranks_metrics(ranks))
        if self.measurements:
            say(measurement_summary(self.measurements, ranks, self.validations))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._meter is not None:
            out = ran_out_of_memory(exception) and not self._meter.validates
            self._remember(trainer, pl_module, "out of memory" if out else "stopped")
        self._release(trainer)

    def _remember(self, trainer: Any, module: Any, outcome: Outcome) -> None:
        """Add this run to the history, once; not where its figures are not those of its plan."""
        structure, self._structure = self._structure, ""
        if not (structure and self.plan and self._applies and self.device is None):
            return
        assert self._meter is not None
        setup = RunSetup(
            structure, type(module).__name__, self._settings, rank=trainer.global_rank, ranks=trainer.world_size
        )
        remember(history_path(self.history), self._meter, self.plan, setup, outcome)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._release(trainer)

    def _release(self, trainer: Any) -> None:
        if self._place is not None or self._test_place is not None:
            release_loaders(trainer)
        self._place = self._val_place = self._test_place = None
        self._release_planning()
        if self._meter is not None:
            self._meter.close()

    def _log_step(self, trainer: Any, measured: Measurement) -> None:
        if trainer.loggers:
            self._log(trainer, step_metrics(measured, self._formula_peak))

    @staticmethod
    def _log(trainer: Any, metrics: dict[str, float]) -> None:
        loggers, step = trainer.loggers, logged_step(trainer)
        for logger in loggers:
            logger.log_metrics(metrics if len(loggers) == 1 else dict(metrics), step=step)

    def _draw(self, trainer: Any) -> None:
        """The plan's step as a figure for TensorBoard; none without matplotlib, or where there is no step to draw."""
        assert self.plan is not None
        assert self.estimate is not None
        for writer in tensorboard_writers(trainer):
            try:
                limits: dict[str, Any] = {"device": self.plan.device, "budget": self.plan.budget}
                writer.add_figure("memplan/timeline", plot_timeline(self.estimate, self.plan.batch_size, **limits))
            except (ModuleNotFoundError, ValueError):  # by the formula; or a checkpoint's size, which does not fit
                return

    def _applied(self) -> dict[str, int]:
        assert self.plan is not None
        if self._place is None:
            return {}
        applied = {self._names["train"]: self._place.held(self.plan.batch_size)}
        if self.val_plan is not None:
            applied[self._names["val"]] = self.val_plan.batch_size
        if self.plan.effective_batch_size is not None:
            applied["accumulate_grad_batches"] = self.plan.accumulate_grad_batches
            applied["effective_batch_size"] = self.plan.effective_batch_size
        return applied
