"""The order in which Lightning runs a training step, without Lightning's loops: for a copy of the user's module.

Source: pytorch_lightning 2.6, ``loops/optimization/automatic.py``, ``plugins/precision/precision.py`` and ``amp.py``:
forward, zero_grad, backward, clipping, optimizer. Gradients of the last step live until zero_grad, so the forward pass
coexists with them and with the optimizer's state from the second step on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_memplan.data.batches import TiledBatch, sample_bytes
from lightning_memplan.errors import TraceError, explain
from lightning_memplan.lightning.compat import (
    apply_to_collection,
    configured_optimizers,
    is_lightning_module,
    is_overridden,
    move_to_device,
    random_states,
)
from lightning_memplan.lightning.trainer import finetuning, unfreeze
from lightning_memplan.memory.cycles import MOST, is_enough, period, shapes, until_all_were_seen
from lightning_memplan.memory.events import Category, Event, Phase
from lightning_memplan.memory.formula import Formula
from lightning_memplan.settings import STEPS, Parallel, StepSettings
from lightning_memplan.step.context import in_place_of, module_paths
from lightning_memplan.step.layers import make_formula, record_layers
from lightning_memplan.step.strategies.deepspeed import engine_around
from lightning_memplan.step.strategies.wrap import local, ranks_of, through, without_reduction, wrapped
from lightning_memplan.types import Layer

TRUE_DTYPE = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}


AUTOCAST_DTYPE = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


_TELLS = "register_step_post_hook"  # an optimizer of torch's has it, DeepSpeed's has not


Evaluation = Literal["validation", "test"]


MakeOptimizer = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


PARTS = 3  #: batches of an optimizer's step that a trace holds at most: the first, one in the middle, the last


def accumulated(settings: StepSettings) -> int:
    """Batches that a traced optimizer's step holds: with more than three, those in the middle are alike."""
    return min(settings.accumulate_grad_batches, PARTS)


class StepContext(Protocol):
    """Where a step is: stamped on what is recorded."""

    phase: Phase
    category: Category
    path: str
    step: int
    stream: int

    def empty_cache(self) -> None: ...

    def label(self, tensor: Any, category: Category) -> None: ...


class StepRunner:
    """Runs training steps of ``twin``, a copy of the user's module, on ``device``, and marks where it is."""

    def __init__(
        self,
        twin: nn.Module,
        mark: StepContext,
        device: torch.device,
        settings: StepSettings,
        *,
        datamodule: Any = None,
        optimizer: MakeOptimizer | None = None,
    ) -> None:
        sync = None if settings.parallel is None else settings.parallel.layer_sync
        self.twin: Any = twin if sync is None else sync.apply(twin)
        self.mark = mark
        self.device = device
        self.settings = settings
        self.datamodule = datamodule
        self.dtype = TRUE_DTYPE.get(settings.precision)
        if settings.parallel is not None and settings.parallel.kind == "deepspeed":
            self.dtype = self.dtype or AUTOCAST_DTYPE.get(settings.precision)  # DeepSpeedPrecision.convert_input
        self.lightning = is_lightning_module(twin)
        self.optimizers: list[torch.optim.Optimizer] = []
        self.layers: tuple[Layer, ...] = ()
        self.left_out: tuple[str, ...] = ()  #: of the hooks before the first step, and why
        self.steps = 0  #: how many ran
        self.period = 0  #: after how many batches they are alike again, where it is known
        self.kinds = 1  #: steps after which all kinds of steps have been seen
        self._stepped: dict[Any, list[int]] = {}  # in which steps each optimizer has stepped
        self._counted_size = 0
        self._make_optimizer = optimizer
        self._scale: torch.Tensor | None = None
        self._wrapper: Any = None
        self._engine: Any = None  #: DeepSpeed's, which is the wrapper, and which steps by itself

    def run_steps(self, batch: Any, steps: int | None = None) -> None:
        """The strategy wraps the module, optimizers are made, then ``steps`` optimizer steps run, each of as many
        batches as are accumulated; by default three, and more where they take turns."""
        parallel = self.settings.parallel
        with ranks_of(parallel, self.device, self.mark), ExitStack() as stack:
            if parallel is not None:
                self._wrap(parallel)
                if self._engine is not None and self.device.type == "cuda":
                    stack.callback(self._engine.destroy)  # its hooks would hold the copy, and this the card's memory
                if self.lightning:
                    self.twin._trainer.model = self.twin if self._wrapper is None else self._wrapper
                if parallel.kind == "model_parallel":  # whose layers are there only now
                    stack.enter_context(module_paths(self.twin, self.mark))
            if self._engine is None:
                self.mark.category, self.mark.path = "optimizer", ""
                self.optimizers = self.configure()
            if self.lightning:
                self.twin._trainer.global_step = 0
                self._begun("on_fit_start")
                self.mark.empty_cache()  # when all states have been restored: checkpoint_connector.py, resume_end
                self._begun("on_train_start")
                self._begun("on_train_epoch_start")
            parts, drawn = accumulated(self.settings), random_states()
            self._stepped = {optimizer: [] for optimizer in self.optimizers if hasattr(optimizer, _TELLS)}
            for optimizer in self._stepped:
                stack.callback(getattr(optimizer, _TELLS)(self._note).remove)
            self.steps = 0
            while self.steps < (steps or STEPS) or (steps is None and not self._repeats(drawn != random_states())):
                for part in range(parts):
                    self.mark.step = self.steps * parts + part + 1
                    self.run(batch, self.mark.step - 1, first=part == 0, last=part == parts - 1)
                self.steps += 1

    def seen(self) -> Sequence[Event]:
        """What has been recorded, where that tells whether steps take turns."""
        return ()

    def _note(self, optimizer: Any, *_: Any) -> None:
        self._stepped[optimizer].append(self.steps)

    def _repeats(self, by_chance: bool) -> bool:
        """Whether another step would show nothing new; notes after how many they are alike again.

        Where chance decides what a step does, only the optimizers tell whether it takes turns.
        """
        parts, made = accumulated(self.settings), shapes(() if by_chance else self.seen())
        kinds = [
            (made[step * parts : (step + 1) * parts], *(step in steps for steps in self._stepped.values()))
            for step in range(self.steps)
        ]
        self.period, self.kinds = parts * period(kinds), until_all_were_seen(kinds)
        if self.steps < _RECTIFIED and any(map(_is_rectified_in_turn, self.optimizers)):
            return False
        return self.steps >= MOST or (is_enough(kinds) and all(self._stepped.values()))

    def _wrap(self, parallel: Parallel) -> None:
        if parallel.kind != "deepspeed":
            self._wrapper = wrapped(self.twin, parallel, self.device, self.mark, self.settings.precision)
            return
        self.mark.category, self.mark.path = "optimizer", ""
        self._wrapper = self._engine = engine_around(
            self.twin,
            parallel,
            self.configure(),
            self.device,
            self.mark,
            precision=self.settings.precision,
            gradient_clip_val=self.settings.gradient_clip_val,
            parts=accumulated(self.settings),
        )
        self.optimizers = [self._engine.optimizer]

    def evaluate(self, batch: Any, kind: Evaluation = "validation") -> None:
        """A step of validation between those of training, with the optimizer's state alive and the gradients of the
        last step gone; or one of a test.

        Source: pytorch_lightning 2.6, loops/training_epoch_loop.py (``on_validation_model_zero_grad``) and
        loops/evaluation_loop.py (``_evaluation_step``).
        """
        mark, twin = self.mark, self.twin
        mark.step, mark.phase, mark.category, mark.path = mark.step + 1, "batch", "batch", ""
        if kind == "validation":
            twin.on_validation_model_zero_grad()
        twin.eval()
        twin._trainer.training, twin._trainer.validating = False, kind == "validation"
        twin._trainer.testing = kind == "test"
        step = getattr(twin, f"{kind}_step")
        indices = [0] * _indices(step)
        with torch.no_grad():
            moved = self._to_device(batch)
            mark.phase, mark.category = "forward", "activations"
            self._hook(f"on_{kind}_batch_start", moved, 0)
            with self._precision(), ranks_of(self.settings.parallel, self.device, mark):
                outputs = self._through(moved, lambda moved: step(moved, *indices))
            self._hook(f"on_{kind}_batch_end", outputs, moved, 0)

    def run_counted(self, batch: Any, batch_size: int, steps: int | None = None) -> Formula:
        """``run_steps``, and the formula, whose layers are written down in the first step."""
        self._counted_size = batch_size
        self.run_steps(batch, steps)
        few = (batch.few, batch.samples) if isinstance(batch, TiledBatch) else (batch, batch_size)
        return make_formula(self.twin, self.layers, sample_bytes(*few), self.state_bytes())

    def state_bytes(self) -> int:
        """Bytes on the device of the optimizers' state."""
        sizes = {
            leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes()
            for optimizer in self.optimizers
            for leaf in map(local, tree_leaves([list(state.values()) for state in optimizer.state.values()]))
            if isinstance(leaf, torch.Tensor) and leaf.device == self.device
        }
        return sum(sizes.values())

    def forward(self, batch: Any) -> None:
        """The forward pass alone; with manual optimization, the step as it is written."""
        if self.lightning and not self.twin.automatic_optimization:
            self.optimizers = self.configure()
        with torch.enable_grad(), self._precision():
            self._training_step(self._to_device(batch), 0)

    def configure(self) -> list[torch.optim.Optimizer]:
        if self.lightning:
            callbacks = finetuning(self.twin)
            for callback in callbacks:
                callback.freeze_before_training(self.twin)
            optimizers, schedulers = configured_optimizers(self.twin)
            unfreeze(callbacks, self.twin, optimizers)
            self.twin._trainer.optimizers = optimizers
            self.twin.__dict__["optimizers"] = lambda use_pl_optimizer=True: _one_or_all(optimizers)
            self.twin.__dict__["lr_schedulers"] = lambda: _one_or_all(schedulers) or None
            if not self.twin.automatic_optimization:
                self._manual(optimizers)
        elif self._make_optimizer is not None:
            module = self.twin if self._wrapper is None else self._wrapper
            optimizers = [self._make_optimizer(p for p in module.parameters() if p.requires_grad)]
        else:
            optimizers = []
        return optimizers

    # -- one batch, in Lightning's order

    def run(self, batch: Any, index: int, *, first: bool, last: bool) -> None:
        mark = self.mark
        mark.phase, mark.category = "batch", "batch"
        moved = self._to_device(batch)
        mark.phase, mark.category = "forward", "activations"
        if not self.lightning or self.twin.automatic_optimization:
            outputs = self._automatic(moved, index, first=first, last=last)
        else:
            self._hook("on_train_batch_start", moved, index)
            with self._precision():
                outputs = self._training_step(moved, index)
        self._hook("on_train_batch_end", outputs, moved, index)
        del outputs  # before the batch

    def _automatic(self, moved: Any, index: int, *, first: bool, last: bool) -> Any:
        mark = self.mark
        self._hook("on_train_batch_start", moved, index)
        kept: list[Any] = []  # what Lightning's ClosureResult holds until the optimizer has stepped

        def closure() -> Any:
            mark.phase, mark.category = "forward", "activations"
            with torch.enable_grad():
                with self._precision():
                    outputs = self._training_step(moved, index)
                extra = dict(outputs) if isinstance(outputs, Mapping) else {"loss": outputs}
                loss = extra.pop("loss")
                if loss is None:
                    return None
                if self._engine is None:
                    loss = loss / self.settings.accumulate_grad_batches
                kept.extend((loss, loss.detach().clone(), extra))
                del outputs
                if first:
                    for optimizer in self.optimizers:
                        self._hook("on_before_zero_grad", optimizer)
                        self._zero_grad(index, optimizer)
                mark.phase, mark.category, mark.path = "backward", "temporaries", ""
                if self.settings.precision == "16-mixed" and self._engine is None:
                    loss = self._scaled(loss)
                self._backward(loss)
                self._hook("on_after_backward")
            mark.phase, mark.category = "optimizer", "temporaries"
            return kept[1]

        if self._engine is not None:  # which counts batches by itself (DeepSpeedPrecision.optimizer_step)
            closure()
            self._hook("on_before_optimizer_step", self.optimizers[0])
            mark.category = "optimizer"
            self._engine.step()
        elif not last:
            with without_reduction(self._wrapper):
                closure()
        elif not self.optimizers:
            closure()
        else:
            self._optimizer_step(index, closure)
            if self.lightning:
                self.twin._trainer.global_step += 1
        return {"loss": kept[1], **kept[2]} if kept else {}

    def _optimizer_step(self, index: int, closure: Callable[[], Any]) -> None:
        optimizer: Any = self.optimizers[0]
        step = optimizer.step

        def stepped(given: Callable[[], Any] | None = None, **_: Any) -> Any:
            return self._clipped_step(optimizer, step, given or closure)

        if not (self.lightning and is_overridden("optimizer_step", self.twin)):
            stepped()
            return
        with in_place_of(optimizer, "step", stepped):  # which the module's own calls, or not
            self.twin.optimizer_step(0, index, optimizer, closure)

    def _clipped_step(self, optimizer: Any, step: Callable[..., Any], closure: Callable[[], Any]) -> Any:
        """What a LightningOptimizer does: gradients are clipped when they are there."""

        def after() -> None:
            self._hook("on_before_optimizer_step", optimizer)
            self._clip(optimizer)
            self.mark.category = "optimizer"

        def whole() -> Any:
            value = closure()
            after()
            return value

        with in_place_of(optimizer, "step", step):
            if self.settings.precision != "16-mixed":
                return step(whole)
            value = closure()
            self._unscaled_step(optimizer, after)
            return value

    def _clip(self, optimizer: torch.optim.Optimizer) -> None:
        value, algorithm = self.settings.gradient_clip_val, self.settings.gradient_clip_algorithm
        if self.lightning and is_overridden("configure_gradient_clipping", self.twin):
            self.twin.configure_gradient_clipping(optimizer, value, algorithm)
        elif value:
            _clip_gradients(optimizer, value, algorithm)

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        if self._scale is None:  # GradScaler's two scalars, made when they are first needed
            self.mark.category = "other"
            self._scale = torch.zeros((), device=self.device)
            self._growth = torch.zeros((), dtype=torch.int32, device=self.device)
            self.mark.category = "temporaries"
        return loss * self._scale

    def _unscaled_step(self, optimizer: torch.optim.Optimizer, after: Callable[[], None]) -> None:
        """What GradScaler allocates until the optimizer's step ends (torch/amp/grad_scaler.py)."""

        def unscale() -> torch.Tensor:
            inverse = self._scale.double().reciprocal().float()  # type: ignore[union-attr]
            found = torch.zeros((), device=self.device)
            found_here, _ = found.clone(), inverse.clone()  # each device's own
            return found_here

        found = unscale()
        after()
        optimizer.step()
        del found

    # -- the user's code

    def _to_device(self, batch: Any) -> Any:
        repeated = batch if isinstance(batch, TiledBatch) else None
        if repeated is not None:
            hooked = self._overrides("on_before_batch_transfer") or self._overrides("transfer_batch_to_device")
            batch, repeated = (repeated.whole(), None) if hooked else (repeated.few, repeated)
        if self.dtype is not None:
            batch = _convert(batch, self.dtype)
        batch = self._data_hook("on_before_batch_transfer", batch, 0)
        if self._overrides("transfer_batch_to_device"):
            batch = self._data_hook("transfer_batch_to_device", batch, self.device, 0)
        elif repeated is not None:
            batch = repeated.on(self.device, batch)
        else:
            batch = move_to_device(batch, self.device)
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
        autocast, parallel = AUTOCAST_DTYPE.get(self.settings.precision), self.settings.parallel
        if self._engine is not None:
            return nullcontext()  # the parameters are in half precision, and so is the batch
        if autocast is not None:
            cache = parallel is not None and parallel.kind == "fsdp"  # FSDPPrecision.forward_context
            return torch.autocast(self.device.type, dtype=autocast, cache_enabled=cache)
        return _default_dtype(self.dtype) if self.dtype is not None else nullcontext()

    def _training_step(self, moved: Any, index: int) -> Any:
        if not self._counted_size:
            return self._wrapped_step(moved, index)
        outputs: list[Any] = []
        size, self._counted_size = self._counted_size, 0
        self.layers = record_layers(self.twin, lambda: outputs.append(self._wrapped_step(moved, index)), size)
        return outputs.pop()

    def _wrapped_step(self, moved: Any, index: int) -> Any:
        return self._through(moved, lambda moved: self._user_step(moved, index))

    def _through(self, moved: Any, step: Callable[[Any], Any]) -> Any:
        return step(moved) if self._wrapper is None else through(self._wrapper, self.twin, step, moved, self.mark)

    def _user_step(self, moved: Any, index: int) -> Any:
        if not self.lightning:
            return _plain_loss(self.twin, moved)
        return self.twin.training_step(moved, *[index] * min(1, _indices(self.twin.training_step)))

    def _zero_grad(self, index: int, optimizer: torch.optim.Optimizer) -> None:
        if self.lightning:
            self.twin.optimizer_zero_grad(0, index, optimizer)
        else:
            optimizer.zero_grad()

    def _backward(self, loss: torch.Tensor) -> None:
        if self._engine is not None:
            self._engine.backward(loss)
        elif self.lightning and is_overridden("backward", self.twin):
            self.twin.backward(loss)
        else:
            loss.backward()

    def _hook(self, name: str, *args: Any) -> None:
        if self.lightning and is_overridden(name, self.twin):
            getattr(self.twin, name)(*args)

    def _begun(self, name: str) -> None:
        """A hook of the module's own before its first step; a copy does without one that fails on it."""
        self.mark.category, self.mark.path = "other", ""
        try:
            self._hook(name)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - of the user's code, which may do anything there
            self.left_out += (f"{name} was left out: {explain(error, 'a copy', 'it')}",)

    def _manual(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Manual optimization: the step calls these itself."""
        mark, twin = self.mark, self.twin

        def backward(loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            mark.phase, mark.category = "backward", "temporaries"
            if self.settings.precision == "16-mixed":
                loss = self._scaled(loss)
            loss.backward(*args, **kwargs)
            mark.phase, mark.category = "forward", "activations"

        for optimizer in optimizers:
            step = optimizer.step

            @wraps(step)
            def stepped(
                closure: Callable[[], Any] | None = None, *, step: Callable[..., Any] = step, **kwargs: Any
            ) -> Any:
                def whole() -> Any:
                    value = None if closure is None else closure()
                    mark.phase, mark.category = "optimizer", "optimizer"
                    return value

                try:
                    return step(whole, **kwargs)
                finally:
                    mark.phase, mark.category = "forward", "activations"
                    twin._trainer.global_step += 1

            optimizer.step = stepped  # type: ignore[method-assign]
            optimizer.toggle_model = lambda sync_grad=True: nullcontext()  # type: ignore[attr-defined]
        own: dict[str, Any] = {
            "manual_backward": backward,
            "clip_gradients": lambda optimizer, gradient_clip_val=None, gradient_clip_algorithm="norm": (
                _clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm or "norm")
                if gradient_clip_val
                else None
            ),
        }
        twin.__dict__.update(own)


_RECTIFIED = 7  #: steps until RAdam has computed its term for the variance, and once more with all it keeps


def _is_rectified_in_turn(optimizer: Any) -> bool:
    """Whether it is RAdam without foreach, which does so from its sixth step on (torch/optim/radam.py, ``rho_t``)."""
    return isinstance(optimizer, torch.optim.RAdam) and any(
        group["foreach"] is False and not group["capturable"] for group in optimizer.param_groups
    )


def _one_or_all(things: list[Any]) -> Any:
    return things[0] if len(things) == 1 else things


def _indices(step: Any) -> int:
    """How many indices a step takes after its batch: of the batch, and of the loader where there are several."""
    code = getattr(step, "__code__", None)
    if code is None or code.co_flags & 0x0C:  # *args or **kwargs
        return 1
    return min(2, int(code.co_argcount) - 2)


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
        message = f"{type(module).__name__} returned no tensor with a gradient: there is nothing to train"
        raise TraceError(message, reason="no_loss")
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
