"""Run a step of validation or of a test on the replica."""

from __future__ import annotations

from typing import Any, Literal

import torch

from lightning_memplan.step.optimization.automatic import count_indices
from lightning_memplan.step.optimization.plain import PlainStep
from lightning_memplan.step.transfer import BatchTransfer

Evaluation = Literal["validation", "test"]


def evaluate(step: PlainStep, transfer: BatchTransfer, batch: Any, kind: Evaluation) -> None:
    """Run one step of evaluation of the module that ``step`` trains.

    Validation comes between training steps: the optimizer's state is alive, the gradients of the last step are gone.

    Source: pytorch_lightning 2.6, loops/training_epoch_loop.py (``on_validation_model_zero_grad``) and
    loops/evaluation_loop.py (``_evaluation_step``).
    """
    context, replica, strategy = step.context, step.replica, step.strategy
    context.update(step=context.step + 1, phase="batch", category="batch", path="")
    if kind == "validation":
        replica.on_validation_model_zero_grad()
    replica.eval()
    replica._trainer.training, replica._trainer.validating = False, kind == "validation"
    replica._trainer.testing = kind == "test"
    users_step = getattr(replica, f"{kind}_step")
    indices = [0] * count_indices(users_step)
    with torch.no_grad():
        moved = transfer(batch)
        context.update(phase="forward", category="activations")
        step.hook(f"on_{kind}_batch_start", moved, 0)
        with (
            strategy.forward_context(step.settings.precision, step.backend.device),
            strategy.environment(step.backend),
        ):
            outputs = strategy.run_step(replica, lambda moved: users_step(moved, *indices), moved, context)
        step.hook(f"on_{kind}_batch_end", outputs, moved, 0)
