"""Copy a replica at its first step, so that hooks that come before it are called once for all runs of a session."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import nn

from lightning_memplan.errors import TraceError, message_of
from lightning_memplan.step.module_copy import rebound, replicate

TensorCopy = Callable[[torch.Tensor], "torch.Tensor | None"]  #: return what stands for a tensor; None: a copy does


@dataclass(frozen=True)
class Begun:
    """A LightningModule at its first step: ``configure_optimizers``, ``on_fit_start``, ``on_train_start`` have run.

    It is never trained: each run trains a copy.
    """

    replica: nn.Module
    optimizers: list[torch.optim.Optimizer]
    schedulers: list[Any]  #: Lightning's configs of them
    left_out: tuple[str, ...] = ()  #: notes on hooks that failed
    stands_for: Mapping[int, torch.Tensor] = field(default_factory=dict)  #: id of a fake tensor -> the real one

    def copied(self, device: torch.device, tensor_copy: TensorCopy) -> Begun:
        """Return a copy, to be trained on ``device``: module, optimizers and schedulers together.

        Raises:
            TraceError: a part of them cannot be copied.
        """
        memo: dict[int, Any] = {}
        made = [_unmade(optimizer, memo) for optimizer in self.optimizers]
        parts = [*(vars(optimizer) for optimizer in self.optimizers), self.schedulers]
        trainer = self.replica.__dict__["_trainer"]
        replica = replicate(self.replica, memo, trainer=trainer, device=device, beside=parts, tensor_copy=tensor_copy)
        return Begun(replica, *self._filled(made, memo), self.left_out)

    def with_new_optimizers(self) -> Begun:
        """Return the same replica with copies of its optimizers, as they are before their first step.

        Raises:
            TraceError: they cannot be copied.
        """
        replica: Any = self.replica
        trained = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        shared = (*replica.modules(), *replica.parameters(), *replica.buffers(), *trained, replica._trainer)
        memo: dict[int, Any] = {id(each): each for each in shared}
        made = [_unmade(optimizer, memo) for optimizer in self.optimizers]
        return Begun(replica, *self._filled(made, memo), self.left_out)

    def _filled(
        self, made: list[torch.optim.Optimizer], memo: dict[int, Any]
    ) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """Fill the empty copies of the optimizers, and return them with copies of the schedulers."""
        try:
            for optimizer, own in zip(self.optimizers, made, strict=True):
                _fill(own, vars(optimizer), memo)
            return made, copy.deepcopy(self.schedulers, memo)
        except Exception as error:
            raise TraceError(
                f"the optimizers of {type(self.replica).__name__} cannot be copied ({type(error).__name__}: "
                f"{message_of(error)})",
                reason="not_copyable",
            ) from error


def _unmade(optimizer: torch.optim.Optimizer, memo: dict[int, Any]) -> torch.optim.Optimizer:
    """Return an empty optimizer, and note in ``memo`` that it is the copy of another.

    An optimizer's own copy would lose what ``Optimizer.__getstate__`` leaves out.
    """
    memo[id(optimizer)] = made = type(optimizer).__new__(type(optimizer))
    return made


def _fill(made: Any, attributes: Mapping[str, Any], memo: dict[int, Any]) -> None:
    """Give an optimizer copies of the attributes of another; functions refer to copies (schedulers wrap ``step``)."""
    for name, value in attributes.items():
        copied = rebound(value, memo) if type(value) is FunctionType else copy.deepcopy(value, memo)
        if isinstance(copied, dict):
            for key, each in copied.items():
                if type(each) is FunctionType:
                    copied[key] = rebound(each, memo)
        vars(made)[name] = copied
