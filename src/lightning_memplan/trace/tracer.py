"""Record a LightningModule's training step on fake tensors, detached from the user's objects.

The module is copied with fake parameters in place of its real ones: nothing of the user's is changed, no memory is
taken for weights, and no arithmetic is done. Steps run in the order in which Lightning runs them (pytorch_lightning
2.6, ``loops/optimization/automatic.py`` and ``plugins/precision``): forward, zero_grad, backward, clipping, optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

import torch

from lightning_memplan.cuda.dispatch import foreach_by_default
from lightning_memplan.cuda.rule_set import Gpu
from lightning_memplan.cuda.rules import rules_for
from lightning_memplan.data.batches import sample_bytes
from lightning_memplan.errors import TraceError, as_trace_errors, explain
from lightning_memplan.lightning.compat import is_lightning_module, isolated_random_state, random_states
from lightning_memplan.memory.events import Trace, labelled
from lightning_memplan.memory.formula import Formula
from lightning_memplan.memory.program import extended
from lightning_memplan.settings import STEPS, Parallel
from lightning_memplan.step.backend import StepBackend
from lightning_memplan.step.begun import Begun
from lightning_memplan.step.compiled_regions import compiled_parts
from lightning_memplan.step.context import module_paths
from lightning_memplan.step.fake_cuda import DEVICE, fake_cuda
from lightning_memplan.step.layers import make_formula, record_layers
from lightning_memplan.step.precision import TRUE_DTYPE, FakeGradScaler
from lightning_memplan.step.runner import StepRunner
from lightning_memplan.step.setup import TrainingSetup, traced_microbatches
from lightning_memplan.step.stand_ins import StandInTrainer
from lightning_memplan.step.strategies.choose import choose_strategy
from lightning_memplan.trace.compiled import CompiledReport, Graphs, as_graphs
from lightning_memplan.trace.detached import detached_copy, setup_order
from lightning_memplan.trace.fake_tensors import FakeCopies
from lightning_memplan.trace.isolation import as_on_gpu, explained, no_collection
from lightning_memplan.trace.known_values import has_values, largest_numbers
from lightning_memplan.trace.recorder import Recorder

Batch = tuple[int, Any]  #: how many samples, and the batch of them


@dataclass(frozen=True)
class TraceResult:
    """Traces of one step, each at a batch size of its own.

    >>> TraceResult((Trace(2, (), ("the step draws numbers",)), Trace(3, ()))).notes
    ('the step draws numbers',)
    """

    traces: tuple[Trace, ...]
    fused: bool = False  #: ``torch.compile`` fuses parts of the step, so that a trace is of its upper or lower bound

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes of the first trace: assumptions that the plan rests on."""
        return self.traces[0].notes


@dataclass(frozen=True, kw_only=True)
class CountedResult(TraceResult):
    """Traces of one step, with the formula of its network.

    >>> CountedResult(traces=(Trace(2, ()),), formula=Formula((), 8, 8, 0, 0)).formula.memory(2)
    16
    """

    formula: Formula


@dataclass(frozen=True)
class FormulaResult:
    """The formula of a network, and how far it was counted.

    >>> FormulaResult(Formula((), 8, 8, 0, 0), stopped="the step failed").notes()
    ('the formula counts the layers that ran before the step stopped: the step failed',)
    >>> FormulaResult(Formula((), 8, 8, 0, 0), stopped="the step failed").notes(known="the step failed")
    ('the formula counts the layers that ran before the step stopped',)
    """

    formula: Formula
    stopped: str = ""  #: why the forward pass stopped half-way
    stateless: str = ""  #: why the optimizer's state is not counted

    def notes(self, known: str = "") -> tuple[str, ...]:
        """Return notes for a plan; an explanation that is ``known`` is not repeated."""
        found = (
            ("the formula counts the layers that ran before the step stopped", self.stopped),
            ("the optimizer's state is not counted", self.stateless),
        )
        return tuple(text if why == known else f"{text}: {why}" for text, why in found if why)


@dataclass(frozen=True)
class Beginning:
    """A replica on fake tensors at its first step, and the memory that it has: runs train copies of it."""

    begun: Begun
    recorder: Recorder
    drew: bool = False  #: its hooks drew random numbers


def begin_training(setup: TrainingSetup) -> Beginning | None:
    """Call the hooks of a LightningModule before its first step, once for all runs that train a copy of the result.

    Return None where each run calls them itself: the strategy makes parameters anew, or there are no hooks.

    Raises:
        TraceError: a hook needs what a fake tensor cannot give; names the line of the user's code.
    """
    if not is_lightning_module(setup.module) or choose_strategy(setup.settings.parallel).remakes_parameters:
        return None
    with as_on_gpu(setup.module, setup.settings.capability), no_collection():
        return _Run(setup, Graphs()).begin()


@dataclass(frozen=True)
class _Step:
    """A step to be traced: what is trained, and the graphs of its compiled parts."""

    setup: TrainingSetup
    graphs: Graphs = field(default_factory=Graphs)
    beginning: Beginning | None = None

    def begin(self, numbers: Mapping[int, torch.Tensor] | None = None) -> _Run:
        """Copy the module for one recording, in which ``numbers`` stand for those of the batch."""
        try:
            run = _Run(self.setup, self.graphs, self.beginning)
        except TraceError as error:
            if self.beginning is None or error.reason != "not_copyable":
                raise
            run = _Run(self.setup, self.graphs)  # which calls the hooks itself
        run.recorder.values.numbers = numbers or {}
        return run


def trace_steps(
    setup: TrainingSetup,
    batches: Sequence[Batch],
    *,
    steps: int | None = None,
    graphs: Graphs | None = None,
    beginning: Beginning | None = None,
) -> TraceResult:
    """Trace setup and whole training steps, as many as it takes, at each batch size.

    The module is a LightningModule, of which ``training_step`` and ``configure_optimizers`` run, or any module, whose
    forward is run on the batch and whose outputs' sum is the loss (``setup.optimizer`` makes its optimizer).

    Args:
        setup: The module, which is copied, and how it is trained.
        batches: Batch sizes, and a batch of each.
        steps: How many optimizer steps to run; by default until another would show nothing new.
        graphs: Graphs of compiled parts that another trace made, and the bound that is traced.
        beginning: The module at its first step, of which each run trains a copy.

    Raises:
        TraceError: the step needs what a fake tensor cannot give; names the line of the user's code.
    """
    return _trace(_Step(setup, graphs or Graphs(), beginning), batches, steps)[0]


def trace_counted(
    setup: TrainingSetup,
    batches: Sequence[Batch],
    *,
    graphs: Graphs | None = None,
    beginning: Beginning | None = None,
) -> CountedResult:
    """Trace as ``trace_steps`` does, and count the layers in the first step of the first batch.

    Where a strategy wraps the module the formula is that of the whole module, from a pass of its own; and so it is
    where something is compiled, whose layers run more than once to make its graphs.
    """
    step = _Step(setup, graphs or Graphs(), beginning)
    counted = setup.settings.parallel is None and not compiled_parts(setup.module)
    result, formula = _trace(step, batches, counted=counted)
    formula = formula or _formula_of(replace(step, graphs=Graphs()), batches[0]).formula
    return CountedResult(traces=result.traces, fused=result.fused, formula=formula)


def _trace(
    step: _Step, batches: Sequence[Batch], steps: int | None = None, *, counted: bool = False
) -> tuple[TraceResult, Formula | None]:
    settings, largest = step.setup.settings, max(batches, key=itemgetter(0))[1]

    def begin(batch: Any) -> _Run:
        return step.begin(largest_numbers(batch, largest))

    with as_on_gpu(step.setup.module, settings.capability), no_collection():
        if steps is None and compiled_parts(step.setup.module):  # graphs are warmed up and recorded step by step
            steps = STEPS
        (size, batch), *others = batches
        run = begin(batch)
        traces = [run.record(size, batch, steps, counted=counted)]
        for size, batch in others:
            few = begin(batch).record(size, batch, run.runner.kinds)
            traces.append(extended(traces[0], few) or begin(batch).record(size, batch, run.runner.steps))
    microbatches = traced_microbatches(settings)
    whole = tuple(replace(trace, microbatches=microbatches, period=run.runner.period) for trace in traces)
    return TraceResult(whole, run.compiled.fused), run.formula


def trace_validation(
    setup: TrainingSetup, training: Any, batches: Sequence[Batch], beginning: Beginning | None = None
) -> TraceResult:
    """Trace a step of training, then one of validation, at each batch size of validation.

    The batch of training is the same in all, so that what it leaves behind (gradients, the optimizer's state) stays as
    it is, and only validation grows with the batch size.

    Raises:
        TraceError: a step needs what a fake tensor cannot give; names the line of the user's code.
    """
    settings = replace(setup.settings, accumulate_grad_batches=1)
    step = _Step(replace(setup, settings=settings), beginning=beginning)
    largest, traces, fused = max(batches, key=itemgetter(0))[1], [], False
    with as_on_gpu(setup.module, settings.capability), no_collection():
        for size, batch in batches:
            run = step.begin(largest_numbers(training, training) | largest_numbers(batch, largest))
            traces.append(run.record(size, training, 1, validated=batch))
            fused |= run.compiled.fused
    return TraceResult(tuple(traces), fused)


def trace_test(setup: TrainingSetup, batches: Sequence[Batch]) -> CountedResult:
    """Trace a test step, before which nothing was trained, at each batch size; the formula has no gradients.

    Raises:
        TraceError: the step needs what a fake tensor cannot give; names the line of the user's code.
    """
    settings = setup.settings
    if settings.parallel is not None and settings.parallel.shards:
        raise TraceError("what each rank holds of sharded parameters in a test is not modelled")
    # no strategy wraps a module that is not trained
    settings = replace(settings, accumulate_grad_batches=1, parallel=None)
    step = _Step(replace(setup, settings=settings))
    traces, fused = [], False
    with as_on_gpu(setup.module, settings.capability), no_collection():
        for size, batch in batches:
            run = step.begin()
            traces.append(run.record(size, batch, 0, tested=True))
            fused |= run.compiled.fused
        (size, batch), run = batches[0], step.begin()

        def once() -> None:
            with explained(run.recorder), fake_cuda(run.recorder, settings.capability), run.recorder:
                run.runner.evaluate(batch, "test")

        replica = run.runner.replica
        formula = make_formula(replica, record_layers(replica, once, size), sample_bytes(batch, size))
    formula = replace(formula, gradient_bytes=0)
    return CountedResult(traces=tuple(traces), fused=fused, formula=formula)


def run_formula(setup: TrainingSetup, sample: Batch, beginning: Beginning | None = None) -> FormulaResult:
    """Count the layers of the module in one forward pass on fake tensors.

    Where the step fails half-way (it reads a value, say), the layers that ran until then count.

    Raises:
        TraceError: no layer has run before the step failed.
    """
    return _formula_of(_Step(setup, beginning=beginning), sample)


def _formula_of(step: _Step, sample: Batch) -> FormulaResult:
    size, batch = sample
    settings, stateless = step.setup.settings, ""
    with as_on_gpu(step.setup.module, settings.capability), ExitStack() as stack:
        if settings.parallel is not None:  # a single rank, which asks no other, and whose mesh has no more
            meshed = choose_strategy(settings.parallel).calls_configure_model
            settings = replace(settings, parallel=Parallel("model_parallel" if meshed else "ddp", ranks=1))
            step = replace(step, beginning=None)
        run = replace(step, setup=replace(step.setup, settings=settings)).begin(largest_numbers(batch, batch))
        stack.enter_context(run.alone())
        failed: list[Exception] = []

        def forward() -> None:
            try:
                with fake_cuda(run.recorder, settings.capability), run.recorder:
                    run.runner.forward(batch)
            except Exception as error:  # noqa: BLE001 - whatever the user's step raises
                failed.append(error)

        layers = record_layers(run.runner.replica, forward, size)
        if failed and not any(layer.feature_bytes for layer in layers):
            raise TraceError.of(failed[0]) from failed[0]
        try:
            state = run.optimizer_bytes()
        except Exception as error:  # noqa: BLE001
            state, stateless = 0, explain(error)
        run.recorder.stop()
        formula = make_formula(run.runner.replica, layers, sample_bytes(batch, size), state)
        return FormulaResult(formula, explain(failed[0]) if failed else "", stateless)


class _Run:
    """Record one run on fake tensors, at one batch size.

    ``step`` of its events counts microbatches: with gradient accumulation several make an optimizer step.
    """

    def __init__(self, setup: TrainingSetup, graphs: Graphs, beginning: Beginning | None = None) -> None:
        settings, mode = setup.settings, graphs.mode
        self.recorder = recorder = Recorder(mode, rules_for(Gpu(settings.capability)))
        self.setup, self.graphs, self.beginning = setup, graphs, beginning
        self.formula: Formula | None = None
        self.compiled = CompiledReport()
        shards = settings.parallel is not None and settings.parallel.shards
        begun, replica = None, None
        self.stands_for: dict[int, torch.Tensor] = {}
        if beginning is None:
            replica = detached_copy(
                setup.module,
                mode,
                dtype=TRUE_DTYPE.get(settings.precision),
                trainer=StandInTrainer(setup.trainer, setup.loaders),
                device=torch.device("cpu") if shards else DEVICE,  # a wrapper that shards moves its parameters itself
                stands_for=self.stands_for,
            )
        else:
            copies = FakeCopies(mode)
            begun = beginning.begun.copied(DEVICE, copies)
            replica = begun.replica
            recorder.resume(beginning.recorder, copies.storages)
        recorder.values.knows_buffers = any(map(has_values, replica.buffers()))
        self.backend = StepBackend(
            recorder,
            DEVICE,
            FakeGradScaler(recorder, DEVICE),
            events=lambda: recorder.events,
            prepare_optimizer=foreach_by_default,
        )
        self.runner = StepRunner(replica, setup, self.backend, begun)

    def begin(self) -> Beginning:
        """Return the replica at its first step. This run is over then."""
        recorder, states = self.recorder, random_states()
        capability = self.setup.settings.capability
        with as_trace_errors(), isolated_random_state(), fake_cuda(recorder, capability), recorder:
            self._adopt()
            begun = self.runner.begin()
            drew = random_states() != states
        return Beginning(replace(begun, stands_for=self.stands_for), recorder, drew)

    def _adopt(self) -> None:
        """Record parameters and buffers as they are moved to the GPU."""
        for tensor, kind, path in setup_order(self.runner.replica):
            self.recorder.update(category=kind, path=path)
            self.recorder.adopt(tensor)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let a forward pass run by itself, on layers that are there."""
        runner = self.runner
        with runner.strategy.environment(self.backend):
            with self.recorder:
                runner.strategy.make_layers(runner.replica, self.backend, runner.settings.precision)
            yield

    def record(
        self,
        size: int,
        batch: Any,
        steps: int | None,
        validated: Any = None,
        *,
        tested: bool = False,
        counted: bool = False,
    ) -> Trace:
        """Return whole steps as a trace. With ``counted``, set ``formula`` as well."""
        recorder, runner, states = self.recorder, self.runner, random_states()
        runner.hold_batch_size(size)
        capability = runner.settings.capability
        compiled = as_graphs(runner.replica, recorder, self.graphs, capability)
        # a step that draws what it does draws the same at each batch size
        around = isolated_random_state(), explained(recorder), fake_cuda(recorder, capability)
        with ExitStack() as stack:
            for context in (*around, recorder, module_paths(runner.replica, recorder)):
                stack.enter_context(context)
            self.compiled = stack.enter_context(compiled)
            if self.beginning is None:
                self._adopt()
            if tested:
                runner.evaluate(batch, "test")
            elif counted:
                self.formula = runner.run_counted(batch, size, steps)
            else:
                runner.run_steps(batch, steps)
            if validated is not None:
                runner.evaluate(validated)
            recorder.stop()
            drawn = random_states() != states or (self.beginning is not None and self.beginning.drew)
        notes = (*sorted(self.compiled.notes), *runner.left_out)
        if drawn:
            notes += ("the step draws numbers (random, NumPy): planned for what it did with those of the trace",)
        notes += self._notes_on_values(tested=tested)
        return Trace(size, labelled(recorder.events), notes + runner.strategy.notes(recorder.events))

    def _notes_on_values(self, *, tested: bool) -> tuple[str, ...]:
        """Say which values the step read that fake tensors do not have."""
        values, notes = self.recorder.values, []
        if values.values_read:
            automatic = not self.runner.step.steps_optimizers_itself
            if automatic and not tested and not any(event.phase == "backward" for event in self.recorder.events):
                message = "the step returns no loss, since it read values of tensors, which a trace has not"
                raise TraceError(message, reason="no_loss")
            often = f"{values.values_read} times in {self.runner.steps} steps"
            notes.append(f"the step reads values of tensors ({often}): taken as 0")
        if values.numbers_taken:
            notes.append("the step reads whole numbers of the batch (lengths): taken as the largest of its samples")
        if values.lengths_taken:
            what = "a mask, nonzero, unique, coalesce"
            notes.append(f"the step selects by values ({what}): planned as if all were selected")
        return tuple(notes)

    def optimizer_bytes(self) -> int:
        """Return the bytes of the optimizers' state after a first step."""
        step = self.runner.step
        with self.recorder:
            for parameter in self.runner.replica.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            step.optimizers = step.optimizers or step.configure()
            for optimizer in step.optimizers:
                optimizer.step()
        return self.runner.state_bytes()
