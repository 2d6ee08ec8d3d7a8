"""Hold the result of a closure: the loss with its graph, and the other outputs of training_step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class ClosureResult:
    """The result of a closure. It is held until the optimizer has stepped.

    Source: pytorch_lightning 2.6, loops/optimization/automatic.py (``ClosureResult``).
    """

    closure_loss: torch.Tensor
    loss: torch.Tensor  #: a detached copy
    extra: Mapping[str, Any]

    def outputs(self) -> dict[str, Any]:
        """Return the outputs that ``on_train_batch_end`` gets."""
        return {"loss": self.loss, **self.extra}


def split_outputs(outputs: Any) -> tuple[Any, dict[str, Any]]:
    """Split what training_step returned, a loss or a mapping with one, into the loss and the rest.

    >>> split_outputs({"loss": 2.0, "accuracy": 0.5}), split_outputs(None)
    ((2.0, {'accuracy': 0.5}), (None, {}))
    """
    extra = dict(outputs) if isinstance(outputs, Mapping) else {"loss": outputs}
    return extra.pop("loss"), extra
