"""The callback: plan at setup, set the batch size, measure every CUDA step."""

from __future__ import annotations

import copy
import warnings
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning_memplan.checks import check_count, check_margin, check_method
from lightning_memplan.data.batches import batch_size_of
from lightning_memplan.data.loaders import dataset_size, unit_of
from lightning_memplan.data.samples import SAMPLE_SIZE, Which, check_sample, read_samples
from lightning_memplan.devices.detect import cpu_device, detect_devices
from lightning_memplan.errors import MemplanError, TraceError
from lightning_memplan.lightning.compat import CallbackBase, agree_on_smallest, misconfiguration, over_ranks
from lightning_memplan.lightning.data_source import loader_source, release_loaders
from lightning_memplan.lightning.loggers import (
    log_first_hyperparams,
    log_hyperparams,
    logged_step,
    say,
    tensorboard_writers,
)
from lightning_memplan.lightning.trainer import (
    averaging_bytes,
    batches_into_epoch,
    check_accumulation,
    check_alone,
    cuda_index,
    is_fitting,
    trainer_settings,
    validates,
)
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.monitor.history import Lesson, append, history, history_path, lesson, run_record
from lightning_memplan.monitor.meter import PHASES, Meter, traced_step
from lightning_memplan.planning.apply import Holder, Place, find_holders, find_place
from lightning_memplan.planning.job import named_device, nccl_allowance, samples_of_a_rank
from lightning_memplan.planning.plan import MARGIN, advised_step, plan_estimate
from lightning_memplan.planning.predict import estimate_step, estimate_test, estimate_validation
from lightning_memplan.planning.proposal import Proposal, confirmed, held_bytes, on_all_ranks
from lightning_memplan.planning.retrace import EstimateCache, retrace_at
from lightning_memplan.probe.out_of_memory import ran_out_of_memory
from lightning_memplan.probe.probe import TrialPeaks, try_step
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
from lightning_memplan.settings import STEPS, StepSettings
from lightning_memplan.step.setup import TrainingSetup
from lightning_memplan.step.strategies.fsdp import named_ignored
from lightning_memplan.trace.tracer import prepared
from lightning_memplan.types import Device, Measurement, Outcome, Peaks, Plan


class MemoryPlanner(CallbackBase):
    """Plans the memory of training at setup, sets the largest batch size that fits, and measures every CUDA step.

    >>> from lightning_memplan import MemoryPlanner
    >>> planner = MemoryPlanner(margin=0.1, max_batch_size=512, multiple_of=8)
    >>> planner.plan is None, planner.measurements
    (True, [])

    Args:
        method: ``"probe"`` runs the training step on the GPU, ``"trace"`` on fake tensors, ``"formula"`` adds up
            ``params + grads + bs * (I1 + 2 * sum(Ii))``. ``"auto"`` traces, and probes too where the card is here
            (with several ranks, under DDP only): it plans by the probe if that has run a large batch, else by the one
            with which fewer samples fit, and by the formula, with a warning, where neither can be had. The plan says
            what each found, and why one was not to be had.
        device: The card to plan for: a name such as ``"RTX 3090"``, or a ``Device``. Where nothing is said, the one
            on which the Trainer runs, and on the CPU the host's memory.
        margin: The part of the card's memory to leave free, at least 0 and below 1. Where nothing is said, what earlier
            runs like this one justify (see ``history``), and 0.05 where there are none; a number is kept to.
        max_batch_size: The largest batch size allowed.
        multiple_of: What the batch size must be a multiple of.
        batch_arg_name: The attribute or hyperparameter of the module or datamodule that holds the batch size, such as
            ``"batch_size"`` or ``"data.batch_size"``; all that have it are set. Loaders that do not follow one, since
            they were passed to ``fit`` or made with a number, are replaced by copies of the planned batch size.
        apply: Whether to set the batch size; ``False`` plans for information only, and predicts for the batches that
            training has.
        every_n_steps: Log the measurements of every n-th step; all are kept in ``measurements``.
        min_batch_size: The smallest batch size allowed; ``DoesNotFitError`` where it does not fit.
        sample: Which samples of the dataset are planned with: ``"first"``, its first five, or ``"largest"``, copies of
            the largest of ``sample_size`` that are spread over it, where samples differ in size (texts, graphs, boxes).
        sample_size: How many samples ``"largest"`` looks at.
        effective_batch_size: Samples that the optimizer is to see a step, on all devices together: the largest batch
            size that divides them and fits is set, and ``trainer.accumulate_grad_batches`` with it.
        confirm: Whether two real steps of the batch size run on the card before it is set, on a copy of the module. If
            they run out of memory, the plan shrinks, three times at most. Where nothing is said it is done on the card
            on which the Trainer runs, and a copy that fails otherwise is noted; with ``True`` its error is raised.
        resume: Where training resumes from a checkpoint: ``"keep"`` its batch size, so that a resumed epoch goes on at
            the same sample, or ``"plan"`` again.
        reset_peaks: Whether the allocator's peaks are reset in every step, which others who read them see
            (``DeviceStatsMonitor``, ``torch.cuda.max_memory_allocated``); ``False`` measures the highest peak so far.
        val_batch_arg_name: The attribute or hyperparameter that holds validation's own batch size, which is planned for
            a validation step and set; where nothing is said, validation's loaders are left as they are.
        test_batch_arg_name: The attribute or hyperparameter that holds the batch size of tests, which is planned and
            set when ``trainer.test`` is called: with nothing but the module on the card.
        nvml: Whether NVML is asked, in the steps that are logged, for the bytes of this process and of the card.
        history: Whether a line is kept of each run on a CUDA device (predicted and measured peaks, versions, settings):
            ``True`` in ``~/.local/share/lightning-memplan/history.jsonl`` or where ``MEMPLAN_HISTORY`` says, or the
            path of a file. ``False`` keeps and reads none.

    Attributes:
        plan: The ``Plan``, from setup on.
        val_plan: Validation's own, where ``val_batch_arg_name`` is given.
        test_plan: That of the last ``trainer.test``, where ``test_batch_arg_name`` is given.
        estimate: The ``Estimate`` behind it.
        measurements: One ``Measurement`` for each CUDA step.
        validations: The ``Peaks`` of each validation on a CUDA device.

    Raises:
        ApplyError: At setup: nothing holds a batch size of that name, or a loader's cannot be set; says what to change.
        MisconfigurationException: At setup: ``effective_batch_size``, where something else decides how much is
            accumulated (manual optimization, the Trainer, a scheduler, DeepSpeed).
        DoesNotFitError: At setup: the smallest batch size does not fit; says what it needs and what the card has.
        ValueError: An argument that is wrong in itself.
    """

    def __init__(
        self,
        method: Literal["auto", "trace", "formula", "probe"] = "auto",
        device: str | Device | None = None,
        margin: float | None = None,
        max_batch_size: int | None = None,
        multiple_of: int = 1,
        batch_arg_name: str = "batch_size",
        apply: bool = True,
        every_n_steps: int = 1,
        min_batch_size: int = 1,
        sample: Which = "first",
        sample_size: int = SAMPLE_SIZE,
        effective_batch_size: int | None = None,
        confirm: bool | None = None,
        resume: Literal["keep", "plan"] = "keep",
        reset_peaks: bool = True,
        nvml: bool = False,
        val_batch_arg_name: str | None = None,
        history: bool | str | Path = True,
        test_batch_arg_name: str | None = None,
    ) -> None:
        super().__init__()
        if margin is not None:
            check_margin(margin)
        check_sample(sample, sample_size)
        check_method(method)
        if val_batch_arg_name == batch_arg_name:
            raise ValueError(
                f"{batch_arg_name!r} is training's batch size: leave val_batch_arg_name out, or name its own"
            )
        if resume not in ("keep", "plan"):
            raise ValueError(f"resume is 'keep' or 'plan', not {resume!r}")
        for name, value in (("min_batch_size", min_batch_size), ("multiple_of", multiple_of)):
            check_count(name, value)
        check_count("every_n_steps", every_n_steps)
        for name, limit in (("max_batch_size", max_batch_size), ("effective_batch_size", effective_batch_size)):
            if limit is not None:
                check_count(name, limit)
        self.method = method
        self.device = named_device(device)
        self.margin = margin
        self.min_batch_size = min_batch_size
        self.max_batch_size = max_batch_size
        self.multiple_of = multiple_of
        self.batch_arg_name = batch_arg_name
        self.apply = apply
        self.every_n_steps = every_n_steps
        self.sample: Which = sample
        self.sample_size = sample_size
        self.effective_batch_size = effective_batch_size
        self.confirm = confirm
        self.resume = resume
        self.reset_peaks = reset_peaks
        self.nvml = nvml
        self.val_batch_arg_name = val_batch_arg_name
        self.test_batch_arg_name = test_batch_arg_name
        self.history = history
        self.plan: Plan | None = None
        self.val_plan: Plan | None = None
        self.test_plan: Plan | None = None
        self.estimate: Estimate | None = None
        self._meter: Meter | None = None
        self._predicted: list[Peaks] = []  # of each step, at the batch size that training has
        self._formula_peak = 0
        self._parts = 1  # batches of one of the optimizer's steps, as recorded
        self._cycle = 1  # steps of the optimizer that take turns
        self._index: int | None = None
        self._held = 0
        self._settings = StepSettings()
        self._structure = ""
        self._lesson = Lesson(MARGIN)
        self._place: Place | None = None
        self._val_place: Place | None = None
        self._test_place: Place | None = None
        self._accumulates = 1
        self._draft: Proposal | None = None

    # -- plan, at setup: before any loader is built

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "test" and self.test_batch_arg_name is not None and self.apply and not trainer.fast_dev_run:
            self._plan_test(trainer, pl_module, self.test_batch_arg_name)
        if stage != "fit":
            return
        self.plan = self.val_plan = self._place = self._val_place = self._draft = self._meter = None
        self._index = cuda_index(trainer)
        if trainer.fast_dev_run:
            say("MemoryPlanner plans nothing: fast_dev_run runs a few batches of the size that is set")
            return
        if self.confirm and self._index is None:
            raise misconfiguration(
                f"confirm=True runs real steps on a CUDA device, and the Trainer runs on {trainer.strategy.root_device}"
            )
        if self.apply:
            check_alone(trainer)
        draft = on_all_ranks(partial(self._make_draft, trainer, pl_module))
        if self.confirm or (self.confirm is None and self.device is None and self._index is not None):
            draft = confirmed(draft, strict=self.confirm is True)
        self._apply_plan(trainer, draft)
        self._draft = draft if self._place is not None else None
        if self._index is not None:
            for writer in tensorboard_writers(trainer):  # now: the last layout counts, and the user's may come later
                writer.add_custom_scalars(scalars_layout(PHASES if self.reset_peaks else ()))

    def _make_draft(self, trainer: Any, module: Any) -> Proposal:
        holders = find_holders(self.batch_arg_name, module, trainer.datamodule) if self.apply else ()
        val_holders = self._val_holders(trainer, module)
        device = self._device_of(trainer)
        settings = trainer_settings(trainer, device.capability)
        settings = replace(settings, parallel=named_ignored(settings.parallel, module))
        parts, ranks, index = settings.accumulate_grad_batches, trainer.world_size, self._index or 0
        if self.effective_batch_size is not None:
            parts = 1 if parts == self._accumulates else parts  # what an earlier plan set is no obstacle
            check_accumulation(self.effective_batch_size, module, trainer, parts, ranks)
        datamodule = copy.copy(trainer.datamodule)
        begun = partial(prepared, module, settings, trainer=trainer, stage="fit")
        source = loader_source(trainer, begun, datamodule)
        self._place = find_place(trainer, source, holders) if self.apply else None

        where: dict[str, Any] = {"trainer": trainer, "datamodule": datamodule, "stage": "fit"}
        how: dict[str, Any] = {"sample": self.sample, "sample_size": self.sample_size, **where}

        samples = samples_of_a_rank(dataset_size(source), ranks)
        most = min((size for size in (self.max_batch_size, samples) if size is not None), default=None)

        def estimated(parts: int) -> Estimate:
            accumulating = replace(settings, accumulate_grad_batches=parts)
            return estimate_step(module, source, accumulating, method=self.method, device=device, largest=most, **how)

        def traced(found: Estimate, size: int, parts: int) -> Estimate:
            accumulating = replace(settings, accumulate_grad_batches=parts)
            return retrace_at(found, size, module, source, accumulating, device=device, **how)

        def tried(plan: Plan) -> TrialPeaks:
            program = estimate_at(plan.batch_size).program
            recorded = 0 if program is None else program.recorded()
            accumulating = replace(settings, accumulate_grad_batches=plan.accumulate_grad_batches)
            return try_step(
                TrainingSetup(module, accumulating, **where),
                read_samples(source, self.sample, self.sample_size).large(plan.batch_size),
                index,
                extra_bytes=beside,
                steps=recorded if recorded > STEPS else 2,  # where they take turns, all of them
            )

        estimate_at = EstimateCache(estimated, traced, parts, self.effective_batch_size, ranks)
        held, own = held_bytes(self._index, module)  # before a probe, whose estimate has what it leaves
        first = estimate_at((self.effective_batch_size or ranks) // ranks)
        beside = averaging_bytes(trainer, begun) if self._index is not None else 0
        self._held = held + beside
        if self.method == "auto" and first.method == "formula" and trainer.is_global_zero:
            warnings.warn(f"MemoryPlanner: {'; '.join(first.notes)}", stacklevel=2)
        nccl = nccl_allowance(settings, device)
        card = replace(device, context=device.context + self._held + nccl)
        self._settings, self._structure = settings, first.structure(type(module).__name__, settings, ranks)
        self._lesson = self._learn(card, first.method)
        limits: dict[str, Any] = {"device": card, "margin": self._lesson.margin, "multiple_of": self.multiple_of}
        limits["nccl"] = nccl
        planned = partial(
            plan_estimate,
            estimate_at,
            trace=estimate_at.trace,
            **limits,
            failed=self._lesson.failed,
            min_batch_size=self.min_batch_size,
            samples=samples,
            accumulate_grad_batches=parts,
            effective_batch_size=self.effective_batch_size,
            ranks=ranks,
            model=type(module).__name__,
            advised=advised_step(module, source, settings, device=device, **how),
        )
        plan = planned(max_batch_size=self.max_batch_size)
        draft = Proposal(plan, estimate_at, planned, tried, ranks, index, on_the_card=own > 0)
        if not val_holders:
            return draft
        val_source = loader_source(trainer, begun, datamodule, "val")
        self._val_place = find_place(trainer, val_source, val_holders, "val")
        limits |= {"max_batch_size": self.max_batch_size, "model": f"{type(module).__name__} in validation"}
        limits["samples"] = samples_of_a_rank(dataset_size(val_source), ranks)

        def validated(draft: Proposal) -> Plan:
            size, own = draft.plan.batch_size, unit_of(val_source)
            found = estimate_validation(draft.estimate, size, module, source, val_source, settings, own=own, **how)
            assert found.program is not None
            if found.program.batch_sizes == (own,):  # known at this size alone: it stays
                limits.update(min_batch_size=own, max_batch_size=own, samples=None)
            return plan_estimate(lambda batch_size: found, **limits)

        return replace(draft, validated=validated)

    def _val_holders(self, trainer: Any, module: Any) -> tuple[Holder, ...]:
        """What holds validation's own batch size, nothing where it has none or there is no validation."""
        if self.val_batch_arg_name is None or not self.apply:
            return ()
        holders = find_holders(self.val_batch_arg_name, module, trainer.datamodule)
        return holders if validates(trainer) else ()

    def _apply_plan(self, trainer: Any, draft: Proposal) -> None:
        """Set what is planned: all of it, or nothing."""
        plan, estimate, capacity = draft.plan, draft.estimate, draft.plan.device.capacity
        val_plan, val_size = self._plan_validation(draft)
        predicted = self._foreseen(estimate, plan.batch_size, capacity)
        with ExitStack() as undo:
            if self._place is not None:
                self._place.write(plan.batch_size, undo)
            if self._place is not None and self.effective_batch_size is not None:
                undo.callback(setattr, trainer, "accumulate_grad_batches", trainer.accumulate_grad_batches)
                trainer.accumulate_grad_batches = plan.accumulate_grad_batches
                self._accumulates = plan.accumulate_grad_batches
            if self._val_place is not None:
                self._val_place.write(val_size, undo)
            say(plan_table(plan, [("earlier runs", self._lesson.text)] if self._lesson.text else ()))
            if self._val_place is not None:
                say(validation_text(val_size, plan, val_plan))
            undo.pop_all()
        self.plan, self.val_plan, self.estimate, self._predicted = plan, val_plan, estimate, predicted
        self._formula_peak = plan.formula_peak
        program = estimate.program  # the formula has none, and but one step
        self._parts = 1 if program is None else program.parts
        self._cycle = 1 if program is None else max(1, program.period // program.parts)

    def _foreseen(self, estimate: Estimate, batch_size: int, capacity: int) -> list[Peaks]:
        return [
            Peaks(
                step.allocated + self._held,
                step.reserved + self._held,
                {name: peak + self._held for name, peak in step.phases.items()},
            )
            for step in estimate.step_peaks(batch_size, capacity)
        ]

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
        self._predicted = self._foreseen(estimate, size, plan.device.capacity)
        self._formula_peak = estimate.formula.memory(size)
        say(f"MemoryPlanner predicts for batches of {size}, as training has them: apply=False sets nothing")

    def _learn(self, device: Device, method: str) -> Lesson:
        """What earlier runs teach, unless the margin was named."""
        path = history_path(self.history)
        if self.margin is not None or path is None:
            return Lesson(MARGIN if self.margin is None else self.margin)
        try:
            runs = history(path)
        except OSError as error:
            warnings.warn(f"MemoryPlanner: the history of earlier runs cannot be read: {error}", stacklevel=2)
            runs = []
        return lesson(runs, self._structure, device.name, method=method, capacity=device.capacity, prior=MARGIN)

    def _plan_validation(self, draft: Proposal) -> tuple[Plan | None, int]:
        """Validation's plan and batch size: training's where it cannot be traced, 0 where none is asked for."""
        if draft.validated is None:
            return None, 0
        plan, size = None, 0
        try:
            plan = draft.validated(draft)
            size = plan.batch_size
        except TraceError as error:
            size = draft.plan.batch_size
            remark = f"validation gets training's batch size, since it cannot be traced: {error}"
            warnings.warn(f"MemoryPlanner: {remark}", stacklevel=2)
        finally:  # the other ranks wait for this one
            size = agree_on_smallest(size)
        if not size:
            raise MemplanError("there is no batch size of validation for all ranks: another rank says why")
        return plan, size

    def _plan_test(self, trainer: Any, module: Any, name: str) -> None:
        """The batch size of the test that is to come."""
        holders = find_holders(name, module, trainer.datamodule)
        device = self._device_of(trainer)
        card = replace(device, context=device.context + held_bytes(cuda_index(trainer), module)[0])
        settings = trainer_settings(trainer, device.capability)
        where: dict[str, Any] = {"trainer": trainer, "datamodule": copy.copy(trainer.datamodule), "stage": "test"}
        begun = partial(prepared, module, settings, trainer=trainer, stage="test")
        source = loader_source(trainer, begun, where["datamodule"], "test")
        place = find_place(trainer, source, holders, "test")
        size = 0
        try:
            estimate = estimate_test(
                module, source, settings, sample=self.sample, sample_size=self.sample_size, **where
            )
            self.test_plan = plan_estimate(
                lambda batch_size: estimate,
                card,
                margin=MARGIN if self.margin is None else self.margin,
                max_batch_size=self.max_batch_size,
                samples=samples_of_a_rank(dataset_size(source), trainer.world_size),
                model=f"{type(module).__name__} in a test",
            )
            size = self.test_plan.batch_size
        finally:  # the other ranks wait for this one
            size = agree_on_smallest(size)
        if not size:
            raise MemplanError("there is no batch size of a test for all ranks: another rank says why")
        with ExitStack() as undo:
            place.write(size, undo)
            say(f"MemoryPlanner: the batch size of the test is {size}")
            undo.pop_all()
        self._test_place = place

    def _device_of(self, trainer: Any) -> Device:
        if self.device is not None:
            return self.device
        index = cuda_index(trainer)
        if index is None:
            return cpu_device()
        devices = detect_devices()
        for device in devices:
            if device.index == index:
                return device
        raise misconfiguration(f"the Trainer runs on cuda:{index}, and the devices found are {devices}")

    # -- resume: Lightning restores after setup, and before any loader is built

    def state_dict(self) -> dict[str, Any]:
        return {} if self.plan is None or not self.apply else {"batch_size": self.plan.batch_size}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        size = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("batch_size")
        if self._draft is None or size in (None, self._draft.plan.batch_size):
            return
        if self.resume == "keep":
            self._apply_plan(trainer, self._draft.kept(size))
        elif (count := batches_into_epoch(checkpoint)) and trainer.is_global_zero:
            warnings.warn(
                f"MemoryPlanner: the checkpoint was made within an epoch, after {count} batches of {size}, and "
                f"resume='plan' goes on with batches of {self._draft.plan.batch_size}: some of that epoch's samples "
                "are left out or seen again, as its loader may have it; resume='keep' goes on at the same sample",
                stacklevel=2,
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._draft = None
        if self.plan is not None:
            log_first_hyperparams(trainer, pl_module, plan_hparams(self.plan) | self._applied())

    # -- measure, at every CUDA step

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.plan is None:
            return
        if self._place is not None:
            self._place.check(self.plan.batch_size)
        log_hyperparams(trainer, plan_hparams(self.plan) | self._applied())
        self._draw(trainer)
        if self._index is None:
            if trainer.is_global_zero:
                warnings.warn(
                    f"MemoryPlanner measures nothing: the Trainer runs on {trainer.strategy.root_device}, and only "
                    "CUDA devices tell their peak memory; use Trainer(accelerator='gpu') on a machine that has one",
                    stacklevel=2,
                )
            return
        self._meter = Meter(
            self._index,
            self._predict,
            every_n_steps=self.every_n_steps,
            manual=not pl_module.automatic_optimization,
            resets=self.reset_peaks,
            nvml=self.nvml,
            margin=None if self.plan.method == "formula" else self.plan.margin,
        )

    def _predict(self, batch: int) -> Peaks:
        """What a batch of training, from 0, is predicted to take; those beyond what was replayed are like the last,
        or like the last of those that take turns."""
        assert self.plan is not None
        whole, last = self.plan.accumulate_grad_batches, len(self._predicted) - 1
        steps = len(self._predicted) // self._parts
        beyond, cycle = batch - steps * whole, self._cycle * whole
        if beyond >= 0:
            batch = (steps - self._cycle) * whole + beyond % cycle
        return self._predicted[min(traced_step(batch, whole, self._parts, steps), last)]

    @property
    def measurements(self) -> list[Measurement]:
        return [] if self._meter is None else self._meter.measurements

    @property
    def validations(self) -> list[Peaks]:
        return [] if self._meter is None else self._meter.validations

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._meter is not None:
            if not self.apply and not self._meter.step:
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
        if self._meter is None or self.plan is None:
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
        if self._meter is None or self.plan is None:
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
        path, structure = history_path(self.history), self._structure
        self._structure = ""
        planned = self.plan is not None and self.apply and self.device is None and self.reset_peaks
        if path is None or not structure or not planned or not (self.measurements or outcome == "out of memory"):
            return
        assert self._meter is not None
        assert self.plan is not None
        run = run_record(
            self._meter,
            self.plan,
            structure=structure,
            model=type(module).__name__,
            outcome=outcome,
            settings=_on_record(self._settings),
            rank=trainer.global_rank,
            ranks=trainer.world_size,
            held=self._held,
        )
        try:
            append(run, path)
        except OSError as error:
            warnings.warn(
                f"MemoryPlanner: this run is not kept in the history: {error}; name a file by history='...', or pass "
                "history=False",
                stacklevel=2,
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._release(trainer)

    def _release(self, trainer: Any) -> None:
        if self._place is not None or self._test_place is not None:
            release_loaders(trainer)
        self._place = self._val_place = self._test_place = self._draft = None
        if self._meter is not None:
            self._meter.close()

    def _log_step(self, trainer: Any, measured: Measurement) -> None:
        if trainer.loggers and self.plan is not None:
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
        applied = {self.batch_arg_name: self._place.held(self.plan.batch_size)}
        if self.val_plan is not None and self.val_batch_arg_name is not None:
            applied[self.val_batch_arg_name] = self.val_plan.batch_size
        if self.plan.effective_batch_size is not None:
            applied["accumulate_grad_batches"] = self.plan.accumulate_grad_batches
            applied["effective_batch_size"] = self.plan.effective_batch_size
        return applied


def _on_record(settings: StepSettings) -> dict[str, Any]:
    """The settings as history keeps them: what a strategy's arguments hold cannot always be copied."""
    parallel = settings.parallel
    ranks = None if parallel is None else f"{parallel.kind} on {parallel.ranks} ranks"
    return asdict(replace(settings, parallel=None)) | {"parallel": ranks}
