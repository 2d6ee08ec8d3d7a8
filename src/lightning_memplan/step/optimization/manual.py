"""Train a LightningModule with manual optimization: training_step does all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch

from lightning_memplan.step.optimization.automatic import AutomaticStep
from lightning_memplan.step.optimization.plain import clip_gradients


class ManualStep(AutomaticStep):
    """Run training_step, whose backward passes and optimizer steps tell the context when they begin and end.

    Source: pytorch_lightning 2.6, ``loops/optimization/manual.py``.
    """

    steps_optimizers_itself = True

    def run(self, batch: Any, index: int, *, first: bool, last: bool) -> Any:
        self.hook("on_train_batch_start", batch, index)
        return self.forward(batch, index)

    def take_optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        super().take_optimizers(optimizers)
        for optimizer in optimizers:
            self._mark_steps(optimizer)
        self.replica.__dict__.update(manual_backward=self._manual_backward, clip_gradients=_clip_gradients)

    def _manual_backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        self.context.update(phase="backward", category="temporaries")
        loss = self.scaled(loss)
        loss.backward(*args, **kwargs)
        self.context.update(phase="forward", category="activations")

    def _mark_steps(self, optimizer: Any) -> None:
        """Let the optimizer's ``step`` tell the context, and count global steps."""
        own_step = optimizer.step

        @wraps(own_step)
        def step(closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
            def whole() -> Any:
                value = None if closure is None else closure()
                self.context.update(phase="optimizer", category="optimizer")
                return value

            try:
                return own_step(whole, **kwargs)
            finally:
                self.context.update(phase="forward", category="activations")
                self.replica._trainer.global_step += 1

        optimizer.step = step
        optimizer.toggle_model = lambda sync_grad=True: nullcontext()


def _clip_gradients(
    optimizer: torch.optim.Optimizer,
    gradient_clip_val: float | None = None,
    gradient_clip_algorithm: str | None = "norm",
) -> None:
    """Stand for the module's ``clip_gradients``."""
    if gradient_clip_val:
        clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm or "norm")
