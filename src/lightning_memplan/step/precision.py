"""Say which types a Trainer's ``precision`` computes in, and scale the loss of float16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from lightning_memplan.lightning.compat import apply_to_collection
from lightning_memplan.settings import Precision
from lightning_memplan.step.context import EventContext

#: Type of the parameters, where it is not float32
TRUE_DTYPE: Mapping[Precision, torch.dtype] = {
    "16-true": torch.float16,
    "bf16-true": torch.bfloat16,
    "64-true": torch.float64,
}


#: Type in which autocast computes
AUTOCAST_DTYPE: Mapping[Precision, torch.dtype] = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


def convert(batch: Any, dtype: torch.dtype) -> Any:
    """Return the batch with its floating-point tensors in ``dtype``.

    >>> [tensor.dtype for tensor in convert([torch.zeros(2), torch.arange(2)], torch.float64)]
    [torch.float64, torch.int64]
    """
    return apply_to_collection(batch, torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors in ``dtype``, as Lightning's precision plugins do during a step."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class LossScaler(Protocol):
    """Scales the loss of ``16-mixed``, and steps an optimizer whose gradients are scaled."""

    def scale(self, loss: torch.Tensor) -> torch.Tensor: ...

    def step(self, optimizer: torch.optim.Optimizer, before_step: Callable[[], None]) -> None:
        """Unscale the gradients, call ``before_step`` (which clips them), and step."""


class FakeGradScaler:
    """Allocate what ``torch.amp.GradScaler`` allocates, without its values (torch/amp/grad_scaler.py)."""

    def __init__(self, context: EventContext, device: torch.device) -> None:
        self._context, self._device = context, device
        self._scale: torch.Tensor | None = None

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        if self._scale is None:  # both scalars are made when they are first needed
            self._context.update(category="other")
            self._scale = torch.zeros((), device=self._device)
            self._growth = torch.zeros((), dtype=torch.int32, device=self._device)
            self._context.update(category="temporaries")
        return loss * self._scale

    def step(self, optimizer: torch.optim.Optimizer, before_step: Callable[[], None]) -> None:
        if self._scale is None:  # the step had no loss
            return
        found_inf = self._unscale(self._scale)
        before_step()
        optimizer.step()
        del found_inf  # it lives until the optimizer has stepped

    def _unscale(self, scale: torch.Tensor) -> torch.Tensor:
        inverse = scale.double().reciprocal().float()
        found_inf = torch.zeros((), device=self._device)
        of_this_device, _ = found_inf.clone(), inverse.clone()  # GradScaler keeps a copy for each device
        return of_this_device
