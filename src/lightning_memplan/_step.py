"""A LightningModule's training step, run on fake tensors and recorded, detached from the user's objects.

The module is copied with fake parameters in the place of its real ones: nothing of the user's is changed, no memory is
taken for weights, and no arithmetic is done. Steps run in the order in which Lightning runs them (pytorch_lightning
2.6, ``loops/optimization/automatic.py`` and ``plugins/precision``): forward, zero_grad, backward, clipping, optimizer.
"""

from __future__ import annotations

import copy
import gc
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from lightning_memplan._cuda_rules import ORDER, WIDTHS, cuda_semantics, foreach_by_default, temporaries, workspaces
from lightning_memplan._errors import TraceError
from lightning_memplan._formula import Formula, make_formula, record_layers, sample_bytes
from lightning_memplan._lightning import (
    apply_to_collection,
    configured_optimizers,
    is_datamodule,
    is_lightning_module,
    is_overridden,
    isolated_random_state,
    move_to_device,
)
from lightning_memplan._record import DEVICE, Recorder, Rules, labelled, module_paths
from lightning_memplan._types import StepSettings, Trace

_HALF = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
_AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}

MakeOptimizer = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]

STEPS = (
    3  #: optimizer steps that a trace holds: the first, the second (with optimizer state and old gradients), a third
)


def accumulated(settings: StepSettings) -> int:
    """Batches that a traced optimizer's step holds: with more than three, those in the middle are alike."""
    return min(settings.accumulate_grad_batches, 3)


def traced_step(settings: StepSettings, batch: int) -> int:
    """Which of a trace's steps the ``batch``-th batch of training (from 0) is like.

    >>> [traced_step(StepSettings(), batch) for batch in range(5)]
    [0, 1, 2, 2, 2]
    >>> [traced_step(StepSettings(accumulate_grad_batches=4), batch) for batch in range(9)]
    [0, 1, 1, 2, 3, 4, 4, 5, 6]
    """
    whole, parts = settings.accumulate_grad_batches, accumulated(settings)
    cycle, part = divmod(batch, whole)
    place = part if part == 0 else parts - 1 if part == whole - 1 else 1
    return min(cycle, STEPS - 1) * parts + place


class StandInTrainer:
    """What a copied module sees as its trainer: the real one's settings to read, none of its effects.

    ``real`` may be None: then only what every step can ask for is there.
    """

    def __init__(self, real: Any = None) -> None:
        self.__dict__["_real"] = real
        self.__dict__["_own"] = {
            "estimated_stepping_batches": 1000,  # asking the real one would build the user's loaders
            "num_training_batches": 1000,
            "logger": None,
            "loggers": [],
            "callbacks": [],
            "training": True,
            "barebones": False,
            "global_step": 0,
            "current_epoch": 0,
            "world_size": getattr(real, "world_size", 1),
            "strategy": None,
            "lr_scheduler_configs": [],
            "callback_metrics": {},
            "logged_metrics": {},
            "progress_bar_metrics": {},
            "sanity_checking": False,
            "is_global_zero": True,
        }

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__["_own"]
        if name in own:
            return own[name]
        if name.startswith("__") or self.__dict__["_real"] is None:
            raise AttributeError(f"the trainer has no {name!r} before training has begun")
        return getattr(self.__dict__["_real"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["_own"][name] = value

    def __deepcopy__(self, memo: Any) -> StandInTrainer:
        return self


def _fake(tensor: torch.Tensor, mode: FakeTensorMode, device: torch.device, dtype: torch.dtype | None) -> FakeTensor:
    if dtype is None or not tensor.is_floating_point():
        dtype = tensor.dtype
    # no memory: a meta tensor of the same shape and strides
    meta = torch.empty_strided(tensor.size(), tensor.stride(), dtype=dtype, device="meta")
    return FakeTensor(mode, meta, device)


def detached_copy(
    module: nn.Module, mode: FakeTensorMode, *, dtype: torch.dtype | None = None, trainer: Any = None
) -> nn.Module:
    """A copy of the module whose parameters and buffers are fake tensors on ``DEVICE``; the original stays as it is.

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
            fake = nn.Parameter(_fake(parameter, mode, DEVICE, dtype), requires_grad=parameter.requires_grad)
            fake.__dict__.update({k: v for k, v in parameter.__dict__.items() if not k.startswith("_")})
            memo[id(parameter)] = fake
    for buffer in module.buffers():
        if id(buffer) not in memo:
            memo[id(buffer)] = _fake(buffer, mode, DEVICE, dtype)
    stand_in = StandInTrainer(trainer)
    for child in module.modules():
        for value in child.__dict__.values():
            if isinstance(value, (Dataset, DataLoader)) or is_datamodule(value):
                memo[id(value)] = value  # data is read, never written: no copy
        real = child.__dict__.get("_trainer")
        if real is not None:
            memo[id(real)] = stand_in
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin = copy.deepcopy(module, memo)
    except Exception as error:
        raise TraceError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}): "
            "what cannot be copied should be made in setup() or training_step(), not kept on the module"
        ) from error
    for child in twin.modules():
        if is_lightning_module(child):
            child.__dict__["_trainer"] = stand_in
            _quiet(child)
        if "_device" in child.__dict__:
            child.__dict__["_device"] = DEVICE
        if getattr(child, "validate_args", None) is True and hasattr(child, "_computed"):
            child.__dict__["validate_args"] = False  # torchmetrics: checks of values, which fake tensors do not have
    return twin


def prepared(module: nn.Module, settings: StepSettings, *, trainer: Any = None, stage: str | None = None) -> nn.Module:
    """The module as it will be when training begins: itself, or a detached copy on which ``setup(stage)`` and
    ``configure_model`` have been called, where it has them. Weights that these make take no memory."""
    calls_setup = stage is not None and is_overridden("setup", module)
    if not calls_setup and not is_overridden("configure_model", module):
        return module
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin: Any = detached_copy(module, mode, dtype=_HALF.get(settings.precision), trainer=trainer)
    try:
        with isolated_random_state():
            if calls_setup:
                twin.setup(stage)
            if is_overridden("configure_model", module):
                with Recorder(mode, Rules()), DEVICE:
                    twin.configure_model()
    except Exception as error:
        raise TraceError(_explain(error)) from error
    for child in twin.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and not isinstance(parameter, FakeTensor):
                fake = _fake(parameter, mode, DEVICE, _HALF.get(settings.precision))
                child._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in child._buffers.items():
            if buffer is not None and not isinstance(buffer, FakeTensor):
                child._buffers[name] = _fake(buffer, mode, DEVICE, _HALF.get(settings.precision))
    return twin  # type: ignore[no-any-return]


def _quiet(module: Any) -> None:
    """A copied LightningModule logs nothing."""

    def nothing(self: Any, *args: Any, **kwargs: Any) -> None:
        return None

    for name in ("log", "log_dict", "print"):
        module.__dict__[name] = MethodType(nothing, module)


def _setup_order(module: nn.Module) -> Iterator[tuple[torch.Tensor, str, str]]:
    """Parameters and buffers in the order in which ``Module.to`` moves them: children first."""
    for name, child in module.named_children():
        for tensor, kind, path in _setup_order(child):
            yield tensor, kind, f"{name}.{path}" if path else name
    for parameter in module._parameters.values():
        if parameter is not None:
            yield parameter, "parameters", ""
    for buffer in module._buffers.values():
        if buffer is not None:
            yield buffer, "buffers", ""


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage collection off: frees come when the last reference goes, not at random."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def trace_steps(
    module: nn.Module,
    batches: Sequence[tuple[int, Any]],
    settings: StepSettings,
    *,
    trainer: Any = None,
    datamodule: Any = None,
    optimizer: MakeOptimizer | None = None,
    steps: int = STEPS,
) -> list[Trace]:
    """One trace for each ``(batch size, batch)``: setup, then whole training steps.

    ``module`` is a LightningModule, which is asked for its ``training_step`` and ``configure_optimizers``, or any
    module, whose forward is run on the batch and whose outputs' sum is the loss (``optimizer`` makes its optimizer).

    Raises:
        TraceError: the step needs what a fake tensor cannot give; names the line of the user's code.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    traces = []
    with ExitStack() as stack:
        stack.enter_context(_no_collection())
        stack.enter_context(isolated_random_state())
        stack.enter_context(cuda_semantics(_AUTOCAST.get(settings.precision), settings.capability))
        for size, batch in batches:
            run = _Run(module, mode, settings, trainer, datamodule, optimizer)
            try:
                traces.append(run.record(size, batch, steps))
            except TraceError:
                raise
            except Exception as error:
                raise TraceError(_explain(error)) from error
            finally:
                run.close()
    return traces


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
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    notes: tuple[str, ...] = ()
    with isolated_random_state(), cuda_semantics(_AUTOCAST.get(settings.precision), settings.capability):
        run = _Run(module, mode, settings, trainer, datamodule, optimizer)
        failed: list[Exception] = []

        def forward() -> None:
            try:
                with run.recorder:
                    run.forward(batch)
            except Exception as error:  # noqa: BLE001 - whatever the user's step raises
                failed.append(error)

        layers = record_layers(run.twin, forward, size)
        if failed and not any(layer.feature_bytes for layer in layers):
            raise TraceError(_explain(failed[0])) from failed[0]
        if failed:
            notes = (f"the formula counts the layers that ran before the step stopped: {_explain(failed[0])}",)
        try:
            state = run.optimizer_bytes()
        except Exception as error:  # noqa: BLE001
            state = 0
            notes += (f"the optimizer's state is not counted: {_explain(error)}",)
        run.close()
        return make_formula(run.twin, layers, sample_bytes(batch, size), state), notes


class _Run:
    """One recording, at one batch size.

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
    ) -> None:
        self.settings = settings
        self.datamodule = datamodule
        self.mode = mode
        self.recorder = Recorder(
            mode, Rules(temporaries(settings.capability), workspaces(settings.capability), WIDTHS, ORDER)
        )
        self.dtype = _HALF.get(settings.precision)
        self.twin: Any = detached_copy(module, mode, dtype=self.dtype, trainer=trainer)
        self.lightning = is_lightning_module(self.twin)
        self._optimizer = optimizer
        self.optimizers: list[torch.optim.Optimizer] = []
        self._scale: torch.Tensor | None = None

    def close(self) -> None:
        self.recorder._deaths.clear()

    def record(self, size: int, batch: Any, steps: int) -> Trace:
        recorder, twin = self.recorder, self.twin
        with recorder, module_paths(twin, recorder):
            for tensor, kind, path in _setup_order(twin):
                recorder.category, recorder.path = kind, path  # type: ignore[assignment]
                recorder.adopt(tensor)
            recorder.category, recorder.path = "optimizer", ""
            self.optimizers = self._configure()
            parts = accumulated(self.settings)
            for index in range(steps * parts):
                recorder.step = index + 1
                self._batch(batch, index, first=index % parts == 0, last=index % parts == parts - 1)
            recorder.stop()
        events = labelled(recorder.events)
        notes: tuple[str, ...] = ()
        if recorder.values_read:
            notes = (f"the step reads values of tensors ({recorder.values_read} times in {steps} steps): taken as 0",)
        return Trace(size, events, notes)

    def forward(self, batch: Any) -> None:
        """The forward pass alone."""
        with torch.enable_grad(), self._precision():
            self._training_step(self._to_device(batch), 0)

    def optimizer_bytes(self) -> int:
        """Bytes of the optimizers' state after a first step."""
        with self.recorder:
            for parameter in self.twin.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            optimizers = self.optimizers or self._configure()
            for optimizer in optimizers:
                optimizer.step()
        state = {
            id(leaf.untyped_storage()): leaf.untyped_storage().nbytes()
            for optimizer in optimizers
            for leaf in tree_leaves([list(s.values()) for s in optimizer.state.values()])
            if isinstance(leaf, torch.Tensor) and leaf.device == DEVICE
        }
        return sum(state.values())

    def _configure(self) -> list[torch.optim.Optimizer]:
        if self.lightning:
            optimizers = configured_optimizers(self.twin)
            if not self.twin.automatic_optimization:
                self._manual(optimizers)
        elif self._optimizer is not None:
            optimizers = [self._optimizer(p for p in self.twin.parameters() if p.requires_grad)]
        else:
            optimizers = []
        for optimizer in optimizers:
            foreach_by_default(optimizer)
        return optimizers

    # -- one batch, in Lightning's order

    def _batch(self, batch: Any, index: int, *, first: bool, last: bool) -> None:
        recorder = self.recorder
        recorder.phase, recorder.category = "batch", "batch"
        moved = self._to_device(batch)
        recorder.phase, recorder.category = "forward", "activations"
        if not self.lightning or self.twin.automatic_optimization:
            outputs = self._automatic(moved, index, first=first, last=last)
        else:
            self._hook("on_train_batch_start", moved, index)
            with self._precision():
                outputs = self._training_step(moved, index)
        self._hook("on_train_batch_end", outputs, moved, index)

    def _automatic(self, moved: Any, index: int, *, first: bool, last: bool) -> Any:
        recorder = self.recorder
        self._hook("on_train_batch_start", moved, index)
        result: list[Any] = []

        def closure() -> Any:
            recorder.phase, recorder.category = "forward", "activations"
            with torch.enable_grad():
                with self._precision():
                    outputs = self._training_step(moved, index)
                loss = outputs["loss"] if isinstance(outputs, dict) else outputs
                if loss is None:
                    return None
                loss = loss / self.settings.accumulate_grad_batches
                result.append(loss.detach().clone())
                if first:
                    for optimizer in self.optimizers:
                        self._hook("on_before_zero_grad", optimizer)
                        self._zero_grad(index, optimizer)
                recorder.phase, recorder.category, recorder.path = "backward", "temporaries", ""
                if self.settings.precision == "16-mixed":
                    loss = self._scaled(loss)
                self._backward(loss)
                self._hook("on_after_backward")
            recorder.phase, recorder.category = "optimizer", "temporaries"
            return result[0]

        if not last or not self.optimizers:
            closure()
        else:
            self._optimizer_step(index, closure)
        return {"loss": result[0]} if result else {}

    def _optimizer_step(self, index: int, closure: Callable[[], Any]) -> None:
        optimizer = self.optimizers[0]

        def after() -> None:
            self._hook("on_before_optimizer_step", optimizer)
            self._clip(optimizer)
            self.recorder.category = "optimizer"

        if self.settings.precision == "16-mixed":  # GradScaler: the closure first, then unscale, then the step
            closure()
            inverse = self._scale.double().reciprocal().float()  # type: ignore[union-attr]
            found = torch.zeros((), device=DEVICE)
            after()
            del inverse
            optimizer.step()
            del found
            return

        def whole() -> Any:
            value = closure()
            after()
            return value

        step = getattr(self.twin, "optimizer_step", None) if self.lightning else None
        if step is not None and is_overridden("optimizer_step", self.twin):
            step(0, index, optimizer, whole)
        else:
            optimizer.step(whole)

    def _clip(self, optimizer: torch.optim.Optimizer) -> None:
        value, algorithm = self.settings.gradient_clip_val, self.settings.gradient_clip_algorithm
        if self.lightning and is_overridden("configure_gradient_clipping", self.twin):
            self.twin.configure_gradient_clipping(optimizer, value, algorithm)
        elif value:
            _clip_gradients(optimizer, value, algorithm)

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        if self._scale is None:  # GradScaler's two scalars, made when they are first needed
            self.recorder.category = "other"
            self._scale = torch.zeros((1,), device=DEVICE)
            self._growth = torch.zeros((1,), dtype=torch.int32, device=DEVICE)
            self.recorder.category = "temporaries"
        return loss * self._scale

    # -- the user's code

    def _to_device(self, batch: Any) -> Any:
        if self.dtype is not None:
            batch = _convert(batch, self.dtype)
        batch = self._data_hook("on_before_batch_transfer", batch, 0)
        if self._overrides("transfer_batch_to_device"):
            batch = self._data_hook("transfer_batch_to_device", batch, DEVICE, 0)
        else:
            batch = move_to_device(batch, DEVICE)
        return self._data_hook("on_after_batch_transfer", batch, 0)

    def _overrides(self, name: str) -> bool:
        return is_overridden(name, self.datamodule) or is_overridden(name, self.twin)

    def _data_hook(self, name: str, batch: Any, *args: Any) -> Any:
        """A hook of the datamodule's, if it has it, else of the module's, else nothing: as Lightning chooses."""
        for owner in (self.datamodule, self.twin):
            if is_overridden(name, owner):
                return getattr(owner, name)(batch, *args)
        return batch

    def _precision(self) -> AbstractContextManager[Any]:
        autocast = _AUTOCAST.get(self.settings.precision)
        if autocast is not None:
            return torch.autocast("cpu", dtype=autocast, cache_enabled=False)
        return _default_dtype(self.dtype) if self.dtype is not None else nullcontext()

    def _training_step(self, moved: Any, index: int) -> Any:
        if not self.lightning:
            return _plain_loss(self.twin, moved)
        takes_index = self.twin.training_step.__code__.co_argcount > 2 if _plain(self.twin.training_step) else True
        return self.twin.training_step(moved, index) if takes_index else self.twin.training_step(moved)

    def _zero_grad(self, index: int, optimizer: torch.optim.Optimizer) -> None:
        if self.lightning:
            self.twin.optimizer_zero_grad(0, index, optimizer)
        else:
            optimizer.zero_grad()

    def _backward(self, loss: torch.Tensor) -> None:
        if self.lightning and is_overridden("backward", self.twin):
            self.twin.backward(loss)
        else:
            loss.backward()

    def _hook(self, name: str, *args: Any) -> None:
        if self.lightning and is_overridden(name, self.twin):
            getattr(self.twin, name)(*args)

    def _manual(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Manual optimization: the step calls these itself."""
        recorder, twin = self.recorder, self.twin

        def backward(loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            recorder.phase, recorder.category = "backward", "temporaries"
            if self.settings.precision == "16-mixed":
                loss = self._scaled(loss)
            loss.backward(*args, **kwargs)
            recorder.phase, recorder.category = "forward", "activations"

        for optimizer in optimizers:
            step = optimizer.step

            def stepped(*args: Any, step: Callable[..., Any] = step, **kwargs: Any) -> Any:
                recorder.phase, recorder.category = "optimizer", "optimizer"
                try:
                    return step(*args, **kwargs)
                finally:
                    recorder.phase, recorder.category = "forward", "activations"

            optimizer.step = stepped  # type: ignore[method-assign]
            optimizer.toggle_model = lambda sync_grad=True: nullcontext()  # type: ignore[attr-defined]
        own: dict[str, Any] = {
            "optimizers": lambda use_pl_optimizer=True: optimizers[0] if len(optimizers) == 1 else optimizers,
            "manual_backward": backward,
            "lr_schedulers": lambda: None,
            "clip_gradients": lambda optimizer, gradient_clip_val=None, gradient_clip_algorithm="norm": (
                _clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm or "norm")
                if gradient_clip_val
                else None
            ),
        }
        twin.__dict__.update(own)


def _plain(method: Any) -> bool:
    return hasattr(method, "__code__") and not method.__code__.co_flags & 0x0C  # neither *args nor **kwargs


def _plain_loss(module: nn.Module, batch: Any) -> torch.Tensor:
    """The loss of a module without a training step: the ``loss`` it returns, or its outputs' sum."""
    if isinstance(batch, dict) or hasattr(batch, "keys"):
        out = module(**batch)
    else:
        out = module(batch[0] if isinstance(batch, (tuple, list)) else batch)
    loss = out.get("loss") if isinstance(out, dict) else getattr(out, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    leaves = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
    if not leaves:
        raise TraceError(f"{type(module).__name__} returned no tensor with a gradient: there is nothing to train")
    return torch.stack([leaf.float().sum() for leaf in leaves]).sum() if len(leaves) > 1 else leaves[0].sum()


def _clip_gradients(optimizer: torch.optim.Optimizer, value: float, algorithm: str) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if algorithm == "value":
        torch.nn.utils.clip_grad_value_(parameters, value, foreach=True)
    else:
        torch.nn.utils.clip_grad_norm_(parameters, value, foreach=True)


def _convert(batch: Any, dtype: torch.dtype) -> Any:
    return apply_to_collection(batch, torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# ------------------------------------------------------------------------------------------------------------- errors

_OURS = ("/torch/", "/lightning_memplan/", "/pytorch_lightning/", "/lightning/", "/torchmetrics/", "/lightning_fabric/")


def _explain(error: BaseException) -> str:
    """What the step needs, and the line of the user's code that needs it."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if not any(part in frame.filename for part in _OURS)]
    where = (
        f"{users[-1].filename}:{users[-1].lineno}: {users[-1].line}" if users else "no line of the module's own code"
    )
    kind = type(error).__name__
    if kind in ("DataDependentOutputException", "DynamicOutputShapeException", "GuardOnDataDependentSymNode"):
        what = (
            f"the step needs the value of a tensor ({kind} in {getattr(error, 'func', error)}), which a trace has not"
        )
    else:
        text = str(error).strip().splitlines()
        what = f"the step failed in a trace ({kind}: {text[0] if text else 'no message'})"
    return f"{what}; at {where}"
