"""The callback: plan at setup, set the batch size, measure every CUDA step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, Literal, TypeVar

from lightning_memplan.checks import check_choice, check_count, check_method
from lightning_memplan.data.holders import DEFAULT_NAME
from lightning_memplan.errors import (
    DoesNotFitError,
    PlanningFailedError,
    RankGoneError,
    StoppedByRankError,
    UnmetDemandError,
    issue_warning,
    located,
    planning_warnings,
)
from lightning_memplan.lightning.compat import CallbackBase, misconfiguration
from lightning_memplan.lightning.data_source import release_loaders
from lightning_memplan.lightning.loggers import RunLog, say, warn
from lightning_memplan.lightning.ranks import over_ranks, planning_together
from lightning_memplan.lightning.trainer import batches_into_epoch, cuda_index, is_fitting
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.monitor.history import RunSetup, history_path, remember
from lightning_memplan.monitor.meter import PHASES, Forecast, Meter
from lightning_memplan.planning.apply import names_by_stage
from lightning_memplan.planning.fit import FitOptions, FitPlanner, SizeOfTest, plan_and_set_test
from lightning_memplan.planning.job import WhichSamples, named_device, sampling_of
from lightning_memplan.planning.limits import Limits
from lightning_memplan.planning.shortage import note_shortage
from lightning_memplan.probe.out_of_memory import gpu_failed, ran_out_of_memory
from lightning_memplan.report.metrics import (
    plan_hparams,
    ranks_metrics,
    scalars_layout,
    step_metrics,
    validation_metrics,
)
from lightning_memplan.report.runs import measurement_summary
from lightning_memplan.settings import MARGIN
from lightning_memplan.types import Device, Measurement, Outcome, Peaks, Plan

#: What a run has without a plan
_USERS = "the user's own batch size, measured without predictions"

Hook = TypeVar("Hook", bound=Callable[..., None])


def _measures(hook: Hook) -> Hook:
    """Guard a hook that measures: where it fails, measuring ends with one warning, and training goes on."""

    @wraps(hook)
    def guarded(self: MemoryPlanner, *args: Any, **kwargs: Any) -> None:
        try:
            hook(self, *args, **kwargs)
        except Exception as error:
            if self.on_error == "raise":
                raise
            self._stop_measuring(error)

    return guarded  # type: ignore[return-value]


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
        samples: Samples of the dataset that the plan is made for. ``"first"`` takes the first five; ``"largest"`` takes
            copies of the largest of 64 that are spread over it; ``"auto"`` does so with as many as a few seconds allow.
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
        every_n_steps: Log the measurements of every n-th step.
        prog_bar: ``False``: metrics go to loggers alone.
        history: Keep a line of each run on a CUDA device (predicted and measured peaks, versions, settings): ``True``
            in ``~/.local/share/lightning-memplan/history.jsonl`` or where ``MEMPLAN_HISTORY`` says, or the path of a
            file.

    Attributes:
        plan: The ``Plan``, from setup on; None where nothing was planned.
        val_plan: The plan of validation, where it has a batch size of its own.
        test_plan: The plan of the last ``trainer.test``, where tests have a batch size of their own.
        estimate: The ``Estimate`` behind the plan.
        measurements: One ``Measurement`` for each CUDA step: of a long run the first three steps, the highest, and the
            last 1,000.
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
        self.plan: Plan | None = None
        self.val_plan: Plan | None = None
        self.test_plan: Plan | None = None
        self.estimate: Estimate | None = None
        self._fit: FitPlanner | None = None
        self._meter: Meter | None = None  # None once measuring has ended
        self._measured: Meter | None = None
        self._log: RunLog | None = None
        self._formula_peak = 0
        self._index: int | None = None
        self._applies = False  # whether this run's batch size is set
        self._test: SizeOfTest | None = None  # as long as it runs
        self._planned_for: int | None = None  # samples of the batches that are predicted, once training has begun
        self._accumulated = 1  # batches, as an earlier plan has set
        self._check()

    def _check(self) -> None:
        """Raise ValueError for an option that is wrong in itself, before any work is done."""
        check_method(self.method)
        if self.margin == "learned" and self.history is False:
            raise ValueError("margin='learned' learns from earlier runs: pass history=True or the path of a file")
        if not isinstance(self.history, (bool, str, os.PathLike)):
            raise ValueError(f"history is True, False or the path of a file, not {self.history!r}")
        check_choice("apply", self.apply, (None, True, False))
        check_choice("confirm", self.confirm, (None, True, False))
        check_choice("objective", self.objective, ("largest",))
        check_choice("on_error", self.on_error, ("warn", "raise"))
        check_choice("resume", self.resume, ("keep", "plan"))
        check_choice("prog_bar", self.prog_bar, (False,))
        check_count("every_n_steps", self.every_n_steps)
        self._options().limits.check()

    def _options(self) -> FitOptions:
        """Return what the options ask of a plan."""
        return FitOptions(
            Limits(
                MARGIN if self.margin == "learned" else self.margin,
                self.min_batch_size,
                self.max_batch_size,
                self.multiple_of,
                self.effective_batch_size,
            ),
            method=self.method,
            device=self.device,
            sampling=sampling_of(self.samples),
            names=names_by_stage(self.batch_arg_name),
            applies=self._applies,
            confirm=self.confirm,
            learns_margin=self.margin == "learned",
            history=history_path(self.history),
            is_fatal=self._is_fatal,
        )

    # -- plan, at setup: before any loader is built

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "test":
            with self._softly("the batch size of the test is not planned", "The test goes on"):
                self._plan_test(trainer, pl_module)
        elif stage == "fit":
            self._forget_plan()
            with self._softly("the batch size is not planned", "Training goes on"):
                self._plan_fit(trainer, pl_module)

    def _plan_test(self, trainer: Any, module: Any) -> None:
        options = self._options_on(trainer)
        if "test" in options.names and self._applies and not trainer.fast_dev_run:
            self.test_plan = None
            with planning_together(), planning_warnings():
                self._test = plan_and_set_test(trainer, module, options)
            self.test_plan = self._test.plan
            say(f"MemoryPlanner: the batch size of the test is {self._test.batch_size}")

    def _plan_fit(self, trainer: Any, module: Any) -> None:
        options = self._options_on(trainer)
        if trainer.fast_dev_run:
            say("MemoryPlanner is disabled when fast_dev_run is set: it runs a few batches of the user's size")
            return
        self._index, self._log = cuda_index(trainer), RunLog(trainer, strict=self.on_error == "raise")
        with planning_together(), planning_warnings():
            fit = FitPlanner(trainer, module, options, self._accumulated)
            fit.run()
            self._take_plan(fit)
        if self._index is not None:
            self._log.layout(scalars_layout(PHASES))

    def _options_on(self, trainer: Any) -> FitOptions:
        self._applies = cuda_index(trainer) is not None if self.apply is None else self.apply
        return self._options()

    def _take_plan(self, fit: FitPlanner) -> None:
        self._fit, self.plan, self.val_plan, self.estimate = fit, fit.plan, fit.val_plan, fit.estimate
        self._accumulated = fit.accumulated
        self._formula_peak = 0 if fit.plan is None else fit.plan.formula_peak

    def _is_fatal(self, error: Exception) -> bool:
        """Decide whether an error of planning stops training: an unmet demand does, and a GPU that failed."""
        if self.on_error == "raise" or gpu_failed(error):
            return True
        if not self._applies:
            return False
        if isinstance(error, DoesNotFitError):
            return error.tried or self.min_batch_size > 1
        demands = self.effective_batch_size is not None or self.min_batch_size > 1
        return demands and isinstance(error, (UnmetDemandError, type(misconfiguration(""))))

    @contextmanager
    def _softly(self, what: str, then: str, size: str = _USERS) -> Iterator[None]:
        """Turn a planning failure into one warning: the batch size stays."""
        try:
            yield
        except Exception as error:
            agreed = isinstance(error, PlanningFailedError) and not isinstance(error, RankGoneError)
            if not agreed and (isinstance(error, StoppedByRankError) or self._is_fatal(error)):
                raise
            warn(
                f"{what}: {located(error)}. {then} with {size}; MemoryPlanner(on_error='raise') stops here instead",
                on_each_rank=isinstance(error, RankGoneError) and error.is_first,
            )

    def _forget_plan(self) -> None:
        self.plan = self.val_plan = self.estimate = self._fit = self._meter = self._measured = None
        self._index, self._formula_peak, self._planned_for = None, 0, None

    # -- resume: Lightning restores after setup, and before any loader is built

    def state_dict(self) -> dict[str, Any]:
        return {} if self.plan is None or not self._applies else {"batch_size": self.plan.batch_size}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        fit, planned = self._fit, None if self._fit is None else self._fit.planned_size
        if fit is None or planned is None:
            return
        with self._softly(
            "the checkpoint's batch size is not kept", "Training resumes", f"the planned batch size {planned}"
        ):
            size = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("batch_size")
            if size in (None, planned):
                return
            if self.resume == "keep":
                with planning_together(), planning_warnings():
                    fit.keep(size, lambda _: self.on_error == "raise")
                    self._take_plan(fit)
            elif count := batches_into_epoch(checkpoint):
                warn(
                    f"the checkpoint was made within an epoch, after {count} batches of {size}, and resume='plan' goes "
                    f"on with batches of {planned}: some of that epoch's samples are left out or seen again, as its "
                    "loader may have it; resume='keep' goes on at the same sample"
                )

    @_measures
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self._fit is not None and self.plan is not None and self._log is not None:
            self._fit.release()
            self._log.first_hyperparams(pl_module, plan_hparams(self.plan) | self._fit.hyperparameters())

    # -- measure, at every CUDA step

    @_measures
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._index is not None:
            self._meter = self._measured = Meter(
                self._index,
                self._forecast(),
                every_n_steps=self.every_n_steps,
                manual=not pl_module.automatic_optimization,
                margin=None if self.plan is None or self.plan.method == "formula" else self.plan.margin,
                limit=None if self._fit is None else self._fit.limit,
            )
        elif self.plan is not None and trainer.is_global_zero:
            issue_warning(
                f"MemoryPlanner measures nothing: the Trainer runs on {trainer.strategy.root_device}, and only CUDA "
                "devices tell their peak memory; use Trainer(accelerator='gpu') on a machine that has one"
            )
        if self._fit is not None and self.plan is not None and self._log is not None:
            self._fit.check_loaders(self.plan, strict=self.on_error == "raise")
            self._log.hyperparams(plan_hparams(self.plan) | self._fit.hyperparameters())
            self._log.figure("memplan/timeline", self._fit.timeline)

    def _forecast(self, batch_size: int | None = None) -> Forecast:
        """Return the predicted peaks of each batch; none where there is no plan, or where it cannot be replayed."""
        try:
            return Forecast(()) if self._fit is None else self._fit.forecast(batch_size)
        except Exception as error:
            if self.on_error == "raise":
                raise
            warn(f"steps are measured without predictions: {located(error)}")
            return Forecast(())

    @property
    def measurements(self) -> list[Measurement]:
        return [] if self._measured is None else self._measured.measurements

    @property
    def validations(self) -> list[Peaks]:
        return [] if self._measured is None else self._measured.validations

    def _stop_measuring(self, error: Exception) -> None:
        meter, self._meter = self._meter, None
        if meter is not None:
            warn(f"memory is not measured from here on: {located(error)}. Training goes on")
            with suppress(Exception):
                meter.close()

    @_measures
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._fit is not None and self.plan is not None:
            first = self._planned_for is None
            if first or (not batch_idx and trainer.reload_dataloaders_every_n_epochs):
                self._follow(self._fit, self.plan, self._fit.size_of(batch), first)
        if self._meter is not None:
            self._meter.begin()

    def _follow(self, fit: FitPlanner, plan: Plan, size: int | None, first: bool) -> None:
        """Predict for batches of as many samples as this one has; say of the first whether that is what was set.

        The loaders may be made anew in later epochs, with other batches.
        """
        planned, is_set = self._planned_for or plan.batch_size, fit.place is not None
        self._planned_for = size or planned  # the planned size is as good a guess as any
        if first and is_set and size == planned:
            with suppress(Exception):  # a text that cannot be printed ends no measuring
                say(f"MemoryPlanner: batch size {size} is set")
        if self._planned_for == planned or self.estimate is None:
            return
        if self._meter is not None:
            self._meter.forecast = self._forecast(size)
        self._formula_peak = self.estimate.formula.memory(self._planned_for)
        if first and is_set:
            warn(
                f"{planned} samples a batch were planned and set, and the first batch has {size}: its loader decides "
                "otherwise. Predictions follow the batch"
            )
        elif self._meter is not None:
            with suppress(Exception):
                say(f"MemoryPlanner predicts for batches of {size}, as training has them")

    @_measures
    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if self._meter is not None and self._meter.phase:
            self._meter.enter("backward")

    @_measures
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self._meter is not None and self._meter.phase:
            self._meter.enter("optimizer" if pl_module.automatic_optimization else "forward")

    @_measures
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._meter is not None and not pl_module.automatic_optimization:
            self._meter.enter("optimizer")

    @_measures
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._meter is None:
            return
        measured = self._meter.end()
        if remark := self._meter.remark(trainer.num_training_batches - batch_idx - 1):
            issue_warning(f"MemoryPlanner: {remark}")
        if self._meter.logs(measured.step) and trainer.loggers and self._log is not None:
            self._log.metrics(step_metrics(measured, self._formula_peak))

    @_measures
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if self._meter is not None and is_fitting(trainer):
            self._meter.begin_validation()

    @_measures
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._meter is not None and is_fitting(trainer) and self._log is not None:
            self._log.metrics(validation_metrics(self._meter.end_validation()))

    @_measures
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._index is None:
            return
        highest = Peaks(0, 0) if self._measured is None else self._measured.highest
        try:  # also where this rank measures nothing: the others wait
            ranks = over_ranks(highest)
        except RankGoneError:
            ranks = [highest]
        if len(ranks) > 1 and self._log is not None:
            self._log.metrics(ranks_metrics(ranks))
        if self.measurements:
            meter = self._measured
            assert meter is not None
            say(measurement_summary(meter.measurements, ranks, meter.validations, meter.step, meter.retries))
        self._remember(trainer, pl_module, "done")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        with suppress(Exception):  # the user's own error is on its way
            if self._meter is not None:
                out = ran_out_of_memory(exception) and not self._meter.validates
                self._remember(trainer, pl_module, "out of memory" if out else "stopped")
        with suppress(Exception):
            if self._index is not None and self._fit is not None and ran_out_of_memory(exception):
                note_shortage(exception, trainer.lightning_module, self._fit, self._meter, self._index)
        with suppress(Exception):
            self._release(trainer)

    def _remember(self, trainer: Any, module: Any, outcome: Outcome) -> None:
        """Add this run to the history, once; not where its figures are not those of its plan."""
        fit, path, meter = self._fit, history_path(self.history), self._meter
        if fit is None or self.plan is None or meter is None:
            return
        if not (fit.structure and self._applies and self.device is None):
            return
        structure, fit.structure = fit.structure, ""
        setup = RunSetup(
            structure, type(module).__name__, fit.settings, rank=trainer.global_rank, ranks=trainer.world_size
        )
        remember(path, meter, self.plan, setup, outcome)

    @_measures
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._release(trainer)

    def _release(self, trainer: Any) -> None:
        test, self._test = self._test, None
        if test is not None or (self._fit is not None and self._fit.place is not None):
            release_loaders(trainer)
        if test is not None:
            test.put_back()
        if self._fit is not None:
            self._fit.place = None
            self._fit.release()
        if self._meter is not None:
            self._meter.close()
