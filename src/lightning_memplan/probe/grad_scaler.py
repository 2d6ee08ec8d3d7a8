"""Scale the loss with torch's own GradScaler, whose optimizer steps whatever the gradients are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class UnskippedGradScaler(torch.amp.GradScaler):
    """Step even where gradients are infinite or NaN (torch/amp/grad_scaler.py, 2.11 and 2.14)."""

    def _maybe_opt_step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        _, *others = args  # the optimizer's state in the scaler
        return optimizer.step(*others, **kwargs)


class RealLossScaler:
    """Scale by 1: at the usual scale the first gradients overflow, and a step that is skipped makes no state."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._scaler: UnskippedGradScaler | None = None

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        if self._scaler is None:
            self._scaler = UnskippedGradScaler(self._device.type, init_scale=1.0)
        return self._scaler.scale(loss)

    def step(self, optimizer: torch.optim.Optimizer, before_step: Callable[[], None]) -> None:
        if self._scaler is None:  # the step had no loss
            return
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            self._scaler.unscale_(optimizer)
        before_step()
        self._scaler.step(optimizer)
        self._scaler.update()
