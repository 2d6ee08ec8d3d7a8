"""A LightningModule's training step, run on fake tensors and recorded, detached from the user's objects.

The module is copied with fake parameters in the place of its real ones: nothing of the user's is changed, no memory is
taken for weights, and no arithmetic is done. Steps run in the order in which Lightning runs them (pytorch_lightning
2.6, ``loops/optimization/automatic.py`` and ``plugins/precision``): forward, zero_grad, backward, clipping, optimizer.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lightning_memplan.cuda.dispatch import cuda_semantics, foreach_by_default
from lightning_memplan.cuda.recurrent import flatten_weights
from lightning_memplan.cuda.rule_set import Gpu, Rules
from lightning_memplan.cuda.rules import rules_for
from lightning_memplan.data.batches import sample_bytes, tensors_of
from lightning_memplan.errors import TraceError, explain
from lightning_memplan.lightning.compat import is_overridden, isolated_random_state, random_states
from lightning_memplan.memory.events import Event, Trace, labelled
from lightning_memplan.memory.formula import Formula
from lightning_memplan.memory.program import extended
from lightning_memplan.settings import STEPS, Parallel, StepSettings
from lightning_memplan.step.compiled_regions import as_written, compiled_parts
from lightning_memplan.step.context import module_paths
from lightning_memplan.step.fake_cuda import DEVICE, fake_cuda
from lightning_memplan.step.layers import make_formula, record_layers
from lightning_memplan.step.module_copy import metric_states, replica_of
from lightning_memplan.step.runner import TRUE_DTYPE, MakeOptimizer, StepRunner, accumulated
from lightning_memplan.step.strategies.deepspeed import rests_on
from lightning_memplan.step.strategies.fsdp import noted_units, waiting
from lightning_memplan.step.strategies.wrap import ranks_of, unparallelized, wrapped
from lightning_memplan.trace.compiled import Graphs, as_graphs
from lightning_memplan.trace.known_values import fake_mode, has_values, tell
from lightning_memplan.trace.recorder import Recorder


def _fake(tensor: torch.Tensor, mode: FakeTensorMode, device: torch.device, dtype: torch.dtype | None) -> FakeTensor:
    if dtype is None or not tensor.is_floating_point():
        dtype = tensor.dtype
    # no memory: a meta tensor of the same shape and strides
    meta = torch.empty_strided(tensor.size(), tensor.stride(), dtype=dtype, device="meta")
    return FakeTensor(mode, meta, device)


def detached_copy(
    module: nn.Module,
    mode: FakeTensorMode,
    *,
    dtype: torch.dtype | None = None,
    trainer: Any = None,
    device: torch.device = DEVICE,
) -> nn.Module:
    """A copy of the module whose parameters and buffers are fake tensors on ``device``; the original stays as it is.

    Raises:
        TraceError: a part of the module cannot be copied, or its parameters are not there yet (lazy modules).
    """
    memo: dict[int, Any] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if torch.nn.parameter.is_lazy(parameter):
            raise TraceError(
                f"{name!r} has no shape yet (a lazy module): run the module once on a batch before planning"
            )
        if id(parameter) not in memo:
            fake: Any = _fake(parameter, mode, device, dtype).requires_grad_(parameter.requires_grad)
            fake._is_param = True  # as nn.Parameter makes one of a tensor subclass, by another copy
            own = fake.__dict__  # a fake tensor's mode is such an attribute, and that of a copy's copy is not its own
            own.update({k: v for k, v in parameter.__dict__.items() if not k.startswith("_") and k not in own})
            memo[id(parameter)] = fake
    for name, buffer in module.named_buffers():
        if id(buffer) not in memo:
            memo[id(buffer)] = fake = _fake(buffer, mode, device, dtype)
            if not name.endswith("num_batches_tracked"):  # which every batch norm has, and none reads
                tell(fake, buffer)
    for state in metric_states(module):
        memo[id(state)] = _fake(state, mode, DEVICE, None)
    return replica_of(module, memo, trainer=trainer, device=DEVICE)


def prepared(module: nn.Module, settings: StepSettings, *, trainer: Any = None, stage: str | None = None) -> nn.Module:
    """The module as it will be when training begins: itself, or a detached copy on which ``setup(stage)`` and
    ``configure_model`` have been called, where it has them. Weights that these make take no memory."""
    parallel = settings.parallel
    calls_setup = stage is not None and is_overridden("setup", module)
    configures = is_overridden("configure_model", module)
    configures = configures and (
        parallel is None or parallel.kind != "model_parallel"
    )  # that needs a mesh, at its time
    if not calls_setup and not configures:
        return module
    mode = fake_mode()
    twin: Any = detached_copy(module, mode, dtype=TRUE_DTYPE.get(settings.precision), trainer=trainer)
    try:
        with isolated_random_state(), _no_warnings():
            if calls_setup:
                twin.setup(stage)
            if configures:
                shards = parallel is not None and parallel.shards
                with Recorder(mode, Rules()), DEVICE, noted_units() if shards else nullcontext():
                    twin.configure_model()
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(explain(error)) from error
    for child in twin.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and not isinstance(parameter, FakeTensor):
                fake = _fake(parameter, mode, DEVICE, TRUE_DTYPE.get(settings.precision))
                child._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in child._buffers.items():
            if buffer is not None and not isinstance(buffer, FakeTensor):
                child._buffers[name] = _fake(buffer, mode, DEVICE, TRUE_DTYPE.get(settings.precision))
    return twin  # type: ignore[no-any-return]


def _setup_order(module: nn.Module) -> Iterator[tuple[torch.Tensor, str, str]]:
    """Parameters and buffers in the order in which ``Module.to`` moves them: children first.

    Recurrent networks lay their weights out anew when these have come.
    """
    for name, child in module.named_children():
        for tensor, kind, path in _setup_order(child):
            yield tensor, kind, f"{name}.{path}" if path else name
    for parameter in module._parameters.values():
        if parameter is not None:
            yield parameter, "parameters", ""
    for buffer in module._buffers.values():
        if buffer is not None:
            yield buffer, "buffers", ""
    if isinstance(module, nn.RNNBase):
        flatten_weights(module)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage collection off: frees come when the last reference goes, not at random."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _no_warnings() -> Iterator[None]:
    """What the user's code warns of is said when it really runs, and not twice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _counts_as_asked() -> Iterator[None]:
    """``bincount(x, minlength=n)`` counts n values: a fake tensor cannot tell that there are no larger ones.

    torchmetrics counts pairs of classes so, in updates that most training steps make.
    """

    def bincount(x: torch.Tensor, weights: torch.Tensor | None = None, minlength: int = 0) -> torch.Tensor:
        if minlength and isinstance(x, FakeTensor):
            return x.new_zeros(minlength, dtype=torch.int64 if weights is None else weights.dtype)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.aten.bincount(x, weights, minlength)  # type: ignore[no-any-return]

    library = torch.library.Library("aten", "IMPL")
    try:
        with _no_warnings():  # "Overriding a previously registered kernel": that is the purpose
            library.impl("bincount", bincount, "AutogradCPU")
        yield
    finally:
        library._destroy()


@contextmanager
def _as_on_the_card(settings: StepSettings) -> Iterator[None]:
    """The user's code, run as it would be on the card, leaves nothing behind and says nothing."""
    semantics = cuda_semantics(settings.capability)
    with isolated_random_state(), _no_warnings(), _counts_as_asked(), as_written(), semantics:
        yield


@contextmanager
def _explained(recorder: Recorder) -> Iterator[None]:
    """What fails while it is recorded is a TraceError that names the line of the user's code."""
    try:
        yield
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(explain(error)) from error
    finally:
        recorder.stop()


def _numbers(batch: Any, most: Any) -> dict[int, torch.Tensor]:
    """For each tensor of the batch that has a whole number a sample (a length): as many times the largest of them, of
    all that the batch of the ``most`` samples has. So that batches of every size are alike, and none is too small."""
    pairs = list(
        zip(tensors_of(batch), tensors_of(most), strict=False)
    )  # a list of samples is as long as they are many
    return {
        id(own): torch.full_like(own, int(whole.max()))
        for own, whole in pairs
        if own.dim() == whole.dim() == 1
        and min(own.numel(), whole.numel())
        and len({own.dtype, whole.dtype}) == 1
        and not own.is_floating_point()
        and own.dtype is not torch.bool
    }


def trace_steps(
    module: nn.Module,
    batches: Sequence[tuple[int, Any]],
    settings: StepSettings,
    *,
    steps: int | None = None,
    **common: Any,
) -> list[Trace]:
    """One trace for each ``(batch size, batch)``: setup, then whole training steps, as many as it takes.

    ``module`` is a LightningModule, which is asked for its ``training_step`` and ``configure_optimizers``, or any
    module, whose forward is run on the batch and whose outputs' sum is the loss (``optimizer`` makes its optimizer;
    ``trainer`` and ``datamodule`` are what it is trained with). ``graphs`` are those of what is compiled, made in
    another trace of it, and say which end is traced.

    Raises:
        TraceError: the step needs what a fake tensor cannot give; names the line of the user's code.
    """
    traces, _ = _trace_steps(module, batches, settings, steps, counted=False, **common)
    return traces


def trace_counted(
    module: nn.Module,
    batches: Sequence[tuple[int, Any]],
    settings: StepSettings,
    *,
    graphs: Graphs | None = None,
    **common: Any,
) -> tuple[list[Trace], Formula]:
    """``trace_steps``, and the formula, whose layers are written down in the first step of the first batch.

    Where a strategy wraps the module the formula is that of the whole module, from a pass of its own; and so it is
    where something is compiled, whose layers run more than once to make its graphs.
    """
    counted = settings.parallel is None and not compiled_parts(module)
    traces, formula = _trace_steps(module, batches, settings, None, counted=counted, graphs=graphs, **common)
    return traces, formula or run_formula(module, batches[0], settings, **common)[0]


def _trace_steps(
    module: nn.Module,
    batches: Sequence[tuple[int, Any]],
    settings: StepSettings,
    steps: int | None,
    *,
    counted: bool,
    trainer: Any = None,
    datamodule: Any = None,
    optimizer: MakeOptimizer | None = None,
    graphs: Graphs | None = None,
) -> tuple[list[Trace], Formula | None]:
    graphs = graphs or Graphs()
    mode = graphs.mode
    most = max(batches, key=itemgetter(0))[1]

    def begun(batch: Any) -> _Run:
        run = _Run(module, mode, settings, trainer, datamodule, optimizer, graphs)
        run.recorder.numbers = _numbers(batch, most)
        return run

    with _as_on_the_card(settings), _no_collection():
        if steps is None and compiled_parts(module):  # graphs are warmed up and recorded step by step
            steps = STEPS
        (size, batch), *others = batches
        run = begun(batch)
        traces = [run.record(size, batch, steps, counted=counted)]
        for size, batch in others:
            few = begun(batch).record(size, batch, run.kinds)
            traces.append(extended(traces[0], few) or begun(batch).record(size, batch, run.steps))
    parts = accumulated(settings)
    return [replace(trace, parts=parts, period=run.period) for trace in traces], run.formula


def trace_validation(
    module: nn.Module,
    training: Any,
    batches: Sequence[tuple[int, Any]],
    settings: StepSettings,
    *,
    trainer: Any = None,
    datamodule: Any = None,
) -> list[Trace]:
    """One trace for each ``(batch size, batch)`` of validation: a step of training, then one of validation.

    The batch of training is the same in all, so that what it leaves behind (gradients, the optimizer's state) stays as
    it is, and only validation grows with the batch size.

    Raises:
        TraceError: a step needs what a fake tensor cannot give; names the line of the user's code.
    """
    mode = fake_mode()
    settings = replace(settings, accumulate_grad_batches=1)
    with _as_on_the_card(settings), _no_collection():
        most, traces = max(batches, key=itemgetter(0))[1], []
        for size, batch in batches:
            run = _Run(module, mode, settings, trainer, datamodule, None)
            run.recorder.numbers = _numbers(training, training) | _numbers(batch, most)
            traces.append(run.record(size, training, 1, validated=batch))
    return traces


def trace_test(
    module: nn.Module,
    batches: Sequence[tuple[int, Any]],
    settings: StepSettings,
    *,
    trainer: Any = None,
    datamodule: Any = None,
) -> tuple[list[Trace], Formula]:
    """One trace for each ``(batch size, batch)`` of a test step, before which nothing was trained; and the formula,
    without gradients.

    Raises:
        TraceError: the step needs what a fake tensor cannot give; names the line of the user's code.
    """
    mode = fake_mode()
    if settings.parallel is not None and settings.parallel.shards:
        raise TraceError("what each rank holds of sharded parameters in a test is not modelled")
    settings = replace(settings, accumulate_grad_batches=1, parallel=None)  # no strategy wraps what is not trained
    size, batch = batches[0]
    with _as_on_the_card(settings), _no_collection():
        traces = [
            _Run(module, mode, settings, trainer, datamodule, None).record(*one, 0, tested=True) for one in batches
        ]
        run = _Run(module, mode, settings, trainer, datamodule, None)

        def once() -> None:
            with _explained(run.recorder), fake_cuda(run.recorder, settings.capability), run.recorder:
                run.evaluate(batch, "test")

        formula = make_formula(run.twin, record_layers(run.twin, once, size), sample_bytes(batch, size))
    return traces, replace(formula, gradient_bytes=0)


def run_formula(
    module: nn.Module,
    sample: tuple[int, Any],
    settings: StepSettings,
    *,
    trainer: Any = None,
    datamodule: Any = None,
    optimizer: MakeOptimizer | None = None,
) -> tuple[Formula, tuple[str, ...]]:
    """The formula of the module, from one forward pass on fake tensors, and notes on it.

    Where the step fails half-way (it reads a value, say), the layers that ran until then count, and a note says so.

    Raises:
        TraceError: no layer has run before the step failed.
    """
    size, batch = sample
    mode = fake_mode()
    notes: tuple[str, ...] = ()
    with _as_on_the_card(settings), ExitStack() as stack:
        parallel = settings.parallel
        if parallel is not None:  # a single rank, which asks no other, and whose mesh has no more
            meshed = parallel.kind == "model_parallel"
            settings = replace(settings, parallel=Parallel("model_parallel" if meshed else "ddp", ranks=1))
        run = _Run(module, mode, settings, trainer, datamodule, optimizer)
        run.recorder.numbers = _numbers(batch, batch)
        stack.enter_context(run.alone())
        failed: list[Exception] = []

        def forward() -> None:
            try:
                with fake_cuda(run.recorder, settings.capability), run.recorder:
                    run.forward(batch)
            except Exception as error:  # noqa: BLE001 - whatever the user's step raises
                failed.append(error)

        layers = record_layers(run.twin, forward, size)
        if failed and not any(layer.feature_bytes for layer in layers):
            raise TraceError(explain(failed[0])) from failed[0]
        if failed:
            notes = (f"the formula counts the layers that ran before the step stopped: {explain(failed[0])}",)
        try:
            state = run.optimizer_bytes()
        except Exception as error:  # noqa: BLE001
            state = 0
            notes += (f"the optimizer's state is not counted: {explain(error)}",)
        run.recorder.stop()
        return make_formula(run.twin, layers, sample_bytes(batch, size), state), notes


class _Run(StepRunner):
    """One recording on fake tensors, at one batch size.

    ``step`` of its events counts batches: with gradient accumulation several make an optimizer's step.
    """

    def __init__(
        self,
        module: nn.Module,
        mode: FakeTensorMode,
        settings: StepSettings,
        trainer: Any,
        datamodule: Any,
        optimizer: MakeOptimizer | None,
        graphs: Graphs | None = None,
    ) -> None:
        rules = rules_for(Gpu(settings.capability))
        self.recorder = Recorder(mode, rules)
        self.graphs = graphs or Graphs()
        self.formula: Formula | None = None
        shards = settings.parallel is not None and settings.parallel.shards
        twin = detached_copy(
            module,
            mode,
            dtype=TRUE_DTYPE.get(settings.precision),
            trainer=trainer,
            device=torch.device("cpu") if shards else DEVICE,  # a wrapper that shards moves what it shards
        )
        self.recorder.knows_buffers = any(map(has_values, twin.buffers()))
        super().__init__(twin, self.recorder, DEVICE, settings, datamodule=datamodule, optimizer=optimizer)

    def seen(self) -> Sequence[Event]:
        return self.recorder.events

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Where a forward pass can run by itself: the twin's layers are there."""
        parallel = self.settings.parallel
        with ranks_of(parallel, DEVICE, self.recorder):
            if parallel is not None and parallel.kind == "model_parallel":
                with self.recorder:
                    wrapped(self.twin, parallel, DEVICE, self.recorder, self.settings.precision)
                    unparallelized(self.twin)
            yield

    def configure(self) -> list[torch.optim.Optimizer]:
        optimizers = super().configure()
        for optimizer in optimizers:
            foreach_by_default(optimizer)
        return optimizers

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
        """Whole steps, as a trace; ``counted``, the formula is there afterwards as well."""
        recorder, twin, states = self.recorder, self.twin, random_states()
        compiled = as_graphs(twin, recorder, self.graphs, self.settings.capability)
        # a step that draws what it does draws the same at each batch size
        around = isolated_random_state(), _explained(recorder), fake_cuda(recorder, self.settings.capability)
        with ExitStack() as stack:
            for context in (*around, recorder, module_paths(twin, recorder)):
                stack.enter_context(context)
            said = stack.enter_context(compiled)
            for tensor, kind, path in _setup_order(twin):
                recorder.category, recorder.path = kind, path  # type: ignore[assignment]
                recorder.adopt(tensor)
            if tested:
                self.evaluate(batch, "test")
            elif counted:
                self.formula = self.run_counted(batch, size, steps)
            else:
                self.run_steps(batch, steps)
            if validated is not None:
                self.evaluate(validated)
            recorder.stop()
            drawn = random_states() != states
        notes: tuple[str, ...] = tuple(sorted(said))
        notes += self.left_out
        if drawn:
            notes += ("the step draws numbers (random, NumPy): planned for what it did with those of the trace",)
        if recorder.values_read:
            automatic = self.lightning and twin.automatic_optimization
            if automatic and not tested and not any(event.phase == "backward" for event in recorder.events):
                raise TraceError("the step returns no loss, since it read values of tensors, which a trace has not")
            often = f"{recorder.values_read} times in {self.steps} steps"
            notes += (f"the step reads values of tensors ({often}): taken as 0",)
        if recorder.numbers_taken:
            notes += ("the step reads whole numbers of the batch (lengths): taken as the largest of its samples",)
        if recorder.lengths_taken:
            what = "a mask, nonzero, unique, coalesce"
            notes += (f"the step selects by values ({what}): planned as if all were selected",)
        if self.settings.parallel is not None:
            notes += waiting(self.settings.parallel, recorder.events) + rests_on(self.settings.parallel)
        return Trace(size, labelled(recorder.events), notes)

    def optimizer_bytes(self) -> int:
        """Bytes of the optimizers' state after a first step."""
        with self.recorder:
            for parameter in self.twin.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            self.optimizers = self.optimizers or self.configure()
            for optimizer in self.optimizers:
                optimizer.step()
        return self.state_bytes()
