"""Train a LightningModule with automatic optimization: Lightning's order, with the module's own hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_memplan.errors import TraceError, explain
from lightning_memplan.lightning.compat import configured_optimizers, is_overridden
from lightning_memplan.lightning.trainer import finetuning, unfreeze
from lightning_memplan.step.optimization.plain import PlainStep
from lightning_memplan.step.patch import patched


class AutomaticStep(PlainStep):
    """Call what the module overrides: training_step, its hooks, backward, clipping, optimizer_step."""

    @property
    def takes_iterator(self) -> bool:  # type: ignore[override]
        code = getattr(self.replica.training_step, "__code__", None)
        return code is not None and "dataloader_iter" in code.co_varnames[: code.co_argcount]

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        replica = self.replica
        replica._trainer.train(self.model, replica)
        callbacks = finetuning(replica)
        for callback in callbacks:
            callback.freeze_before_training(replica)
        optimizers, self.schedulers = configured_optimizers(replica)
        self._check_trained(optimizers)
        unfreeze(callbacks, replica, optimizers)
        self.name_optimizers(optimizers, self.schedulers)
        return optimizers

    def _check_trained(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Raise TraceError for an optimizer that would change the user's own module."""
        setup = self._setup
        users = (setup.module, getattr(setup.trainer, "lightning_module", None))
        others = [module for module in users if module is not None and module is not self.replica]
        theirs = {id(p) for module in others for p in module.parameters()}
        for optimizer in optimizers:
            if any(id(p) in theirs for group in optimizer.param_groups for p in group["params"]):
                raise TraceError(
                    f"configure_optimizers gives {type(optimizer).__name__} parameters that are not self's: make it of "
                    "self.parameters()",
                    reason="failed",
                )

    def name_optimizers(self, optimizers: list[torch.optim.Optimizer], schedulers: list[Any]) -> None:
        replica, made = self.replica, [config.scheduler for config in schedulers]
        replica._trainer.optimizers, replica._trainer.lr_scheduler_configs = optimizers, schedulers
        replica.__dict__["optimizers"] = lambda use_pl_optimizer=True: _one_or_all(optimizers)
        replica.__dict__["lr_schedulers"] = lambda: _one_or_all(made) or None

    def begin(self) -> tuple[str, ...]:
        self.replica._trainer.train(self.model, self.replica)  # DeepSpeed wraps it after the optimizers were made
        return self._begin_with("on_fit_start") + self._begin_with("on_train_start")

    def begin_epoch(self) -> tuple[str, ...]:
        self.replica._trainer.train(self.model, self.replica)
        self.replica._trainer.global_step = 0
        return self._begin_with("on_train_epoch_start")

    def _begin_with(self, name: str) -> tuple[str, ...]:
        """Call a hook before the first step. Where it fails on a replica, say so and go on without it."""
        self.context.update(category="other", path="")
        try:
            self.hook(name)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - it is the user's code, which may do anything there
            return (f"{name} was left out: {explain(error, 'a copy', 'it')}",)
        return ()

    def hook(self, name: str, *args: Any) -> None:
        if is_overridden(name, self.replica):
            getattr(self.replica, name)(*args)

    def training_step(self, batch: Any, index: int) -> Any:
        step = self.replica.training_step
        if self.takes_iterator:  # Lightning's yields the indices of the batch and of its loader, too
            return step(iter([(batch, index, 0)]))
        return step(batch, *[index] * min(1, count_indices(step)))

    def zero_grad(self, optimizer: torch.optim.Optimizer, index: int) -> None:
        self.replica.optimizer_zero_grad(0, index, optimizer)

    def backward(self, loss: torch.Tensor) -> None:
        if self.strategy.engine is None and is_overridden("backward", self.replica):
            self.replica.backward(loss)
        else:
            super().backward(loss)

    def clip(self, optimizer: torch.optim.Optimizer) -> None:
        if is_overridden("configure_gradient_clipping", self.replica):
            value, algorithm = self.settings.gradient_clip_val, self.settings.gradient_clip_algorithm
            self.replica.configure_gradient_clipping(optimizer, value, algorithm)
        else:
            super().clip(optimizer)

    def step_optimizer(self, optimizer: Any, index: int, closure: Callable[[], Any]) -> None:
        if is_overridden("optimizer_step", self.replica):
            own_step = optimizer.step

            def step(given: Callable[[], Any] | None = None, **_: Any) -> Any:
                return self.clipped_step(optimizer, own_step, given or closure)

            with patched(optimizer, "step", step):  # the module's own calls it, or not
                self.replica.optimizer_step(0, index, optimizer, closure)
        else:
            super().step_optimizer(optimizer, index, closure)
        self.replica._trainer.global_step += 1


def count_indices(step: Any) -> int:
    """Return how many indices a step takes after its batch: of the batch, and of the loader among several.

    >>> class Net:
    ...     def training_step(self, batch): ...
    ...     def validation_step(self, batch, batch_idx, dataloader_idx=0): ...
    >>> count_indices(Net().training_step), count_indices(Net().validation_step)
    (0, 2)
    """
    code = getattr(step, "__code__", None)
    if code is None or code.co_flags & 0x0C:  # *args or **kwargs
        return 1
    return min(2, int(code.co_argcount) - 2)


def _one_or_all(things: list[Any]) -> Any:
    return things[0] if len(things) == 1 else things
