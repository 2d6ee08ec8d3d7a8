"""Train a module without hooks, in Lightning's order: forward, zero_grad, backward, clipping, optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_memplan.errors import TraceError
from lightning_memplan.step.backend import StepBackend
from lightning_memplan.step.begun import Begun
from lightning_memplan.step.layers import record_layers
from lightning_memplan.step.optimization.closure import ClosureResult, split_outputs
from lightning_memplan.step.patch import patched
from lightning_memplan.step.setup import TrainingSetup
from lightning_memplan.step.strategies.base import Strategy
from lightning_memplan.types import Layer


class PlainStep:
    """Train on one batch after another. The other kinds of steps override what a LightningModule does in its own way.

    Source: pytorch_lightning 2.6, ``loops/optimization/automatic.py``, ``plugins/precision/precision.py``, ``amp.py``.
    """

    steps_optimizers_itself = False  #: the user's step calls its optimizers, and so needs them
    takes_iterator = False  #: the user's step takes its batches from an iterator, and moves them itself

    def __init__(self, replica: Any, setup: TrainingSetup, strategy: Strategy, backend: StepBackend) -> None:
        self.replica, self.settings, self.strategy, self.backend = replica, setup.settings, strategy, backend
        self.context = backend.context
        self._setup, self._make_optimizer = setup, setup.optimizer
        self.optimizers: list[torch.optim.Optimizer] = []
        self.layers: tuple[Layer, ...] = ()
        self.record_layers_of = 0  #: batch size of the next forward pass, if its layers are to be recorded

    def run(self, batch: Any, index: int, *, first: bool, last: bool) -> Any:
        """Train on a microbatch that is on the device: the ``first`` or the ``last`` of an optimizer step, or both.

        Return what training_step returned.
        """
        results: list[ClosureResult] = []
        closure = partial(self._closure, results, batch, index, zero_grad=first)
        self.hook("on_train_batch_start", batch, index)
        if self.strategy.engine is not None:  # it counts microbatches by itself (DeepSpeedPrecision.optimizer_step)
            closure()
            self.hook("on_before_optimizer_step", self.optimizers[0])
            self.context.update(category="optimizer")
            self.strategy.engine.step()
        elif not last:
            with self.strategy.block_backward_sync():
                closure()
        elif not self.optimizers:
            closure()
        else:
            self.step_optimizer(self.optimizers[0], index, closure)
        return results[0].outputs() if results else {}

    def _closure(self, results: list[ClosureResult], batch: Any, index: int, *, zero_grad: bool) -> torch.Tensor | None:
        """Run forward, zero_grad and backward; return the loss, None if there is none."""
        context = self.context
        context.update(phase="forward", category="activations")
        with torch.enable_grad():
            outputs = self.forward(batch, index)
            loss, extra = split_outputs(outputs)
            if loss is None:
                return None
            loss = self.strategy.normalize(loss, self.settings.accumulate_grad_batches)
            results.append(ClosureResult(loss, loss.detach().clone(), extra))
            del outputs
            if zero_grad:
                for optimizer in self.optimizers:
                    self.hook("on_before_zero_grad", optimizer)
                    self.zero_grad(optimizer, index)
            context.update(phase="backward", category="temporaries", path="")
            loss = self.scaled(loss)
            self.backward(loss)
            self.hook("on_after_backward")
        context.update(phase="optimizer", category="temporaries")
        return results[0].loss

    def forward(self, batch: Any, index: int) -> Any:
        """Run the user's step through the strategy's wrapper, and record its layers if that is asked for."""
        with self.strategy.forward_context(self.settings.precision, self.backend.device):
            if not self.record_layers_of:
                return self._wrapped_step(batch, index)
            size, self.record_layers_of = self.record_layers_of, 0
            outputs: list[Any] = []
            self.layers = record_layers(self.replica, lambda: outputs.append(self._wrapped_step(batch, index)), size)
            return outputs.pop()

    def _wrapped_step(self, batch: Any, index: int) -> Any:
        step = partial(self.training_step, index=index)
        return self.strategy.run_step(self.replica, step, batch, self.context)

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        return self.backend.scaler.scale(loss) if self.strategy.scales_loss(self.settings.precision) else loss

    def clipped_step(self, optimizer: Any, step: Callable[..., Any], closure: Callable[[], Any]) -> Any:
        """Step as a LightningOptimizer does: gradients are clipped once the closure has computed them.

        ``step`` is the optimizer's own, which stands in for what may have replaced it.
        """

        def before_step() -> None:
            self.hook("on_before_optimizer_step", optimizer)
            self.clip(optimizer)
            self.context.update(category="optimizer")

        def whole() -> Any:
            value = closure()
            before_step()
            return value

        with patched(optimizer, "step", step):
            if not self.strategy.scales_loss(self.settings.precision):
                return step(whole)
            value = closure()
            self.backend.scaler.step(optimizer, before_step)
            return value

    def configure(self) -> list[torch.optim.Optimizer]:
        """Make the optimizers, as they step on a GPU."""
        optimizers = self.make_optimizers()
        self.take_optimizers(optimizers)
        return optimizers

    def resume(self, begun: Begun) -> list[torch.optim.Optimizer]:
        """Take the optimizers of a replica whose first hooks have run."""
        self.name_optimizers(begun.optimizers, begun.schedulers)
        self.take_optimizers(begun.optimizers)
        return begun.optimizers

    def take_optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Prepare optimizers for their first step."""
        for optimizer in optimizers:
            self.backend.prepare_optimizer(optimizer)

    def name_optimizers(self, optimizers: list[torch.optim.Optimizer], schedulers: list[Any]) -> None:
        """Let the user's step find its optimizers."""

    # -- what a LightningModule does in its own way

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        if self._make_optimizer is None:
            return []
        return [self._make_optimizer(p for p in self.model.parameters() if p.requires_grad)]

    @property
    def model(self) -> Any:
        """The replica with what the strategy has wrapped around it."""
        return self.replica if self.strategy.wrapper is None else self.strategy.wrapper

    def begin(self) -> tuple[str, ...]:
        """Call the hooks before the first epoch; return notes on those that were left out."""
        return ()

    def begin_epoch(self) -> tuple[str, ...]:
        """Call the hooks before the first step of an epoch; return notes on those that were left out."""
        return ()

    def hook(self, name: str, *args: Any) -> None:
        """Call a hook of the module's own, if it has it."""

    def training_step(self, batch: Any, index: int) -> Any:
        return plain_loss(self.replica, batch)

    def zero_grad(self, optimizer: torch.optim.Optimizer, index: int) -> None:
        optimizer.zero_grad()

    def backward(self, loss: torch.Tensor) -> None:
        if self.strategy.engine is not None:
            self.strategy.engine.backward(loss)
        else:
            loss.backward()

    def clip(self, optimizer: torch.optim.Optimizer) -> None:
        if self.settings.gradient_clip_val:
            clip_gradients(optimizer, self.settings.gradient_clip_val, self.settings.gradient_clip_algorithm)

    def step_optimizer(self, optimizer: Any, index: int, closure: Callable[[], Any]) -> None:
        self.clipped_step(optimizer, optimizer.step, closure)


def plain_loss(module: nn.Module, batch: Any) -> torch.Tensor:
    """Return the loss of a module without a training step: the ``loss`` in its outputs, or else their sum.

    >>> plain_loss(nn.Linear(2, 1), torch.zeros(3, 2)).shape
    torch.Size([])
    """
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


def clip_gradients(optimizer: torch.optim.Optimizer, value: float, algorithm: str) -> None:
    """Clip the gradients of the optimizer's parameters as Lightning's Precision does, by norm or by value."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if algorithm == "value":
        torch.nn.utils.clip_grad_value_(parameters, value, foreach=True)
    else:
        torch.nn.utils.clip_grad_norm_(parameters, value, foreach=True)
