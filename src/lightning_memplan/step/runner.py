"""Run training steps of a replica in Lightning's order, without Lightning's loops, on any backend.

Source: pytorch_lightning 2.6, ``loops/fit_loop.py`` and ``loops/training_epoch_loop.py``. Gradients of the last step
live until zero_grad, so from the second step on the forward pass coexists with them and with the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from lightning_memplan.data.batches import sample_bytes
from lightning_memplan.data.holders import hold_batch_size
from lightning_memplan.data.loaders import unit_of
from lightning_memplan.data.tiling import TiledBatch
from lightning_memplan.lightning.compat import is_lightning_module, random_states
from lightning_memplan.memory.cycles import MOST, is_enough, period, shapes, until_all_were_seen
from lightning_memplan.memory.formula import Formula
from lightning_memplan.settings import STEPS
from lightning_memplan.step.backend import StepBackend
from lightning_memplan.step.begun import Begun
from lightning_memplan.step.context import module_paths
from lightning_memplan.step.evaluation import Evaluation, evaluate
from lightning_memplan.step.layers import make_formula
from lightning_memplan.step.optimization.automatic import AutomaticStep
from lightning_memplan.step.optimization.manual import ManualStep
from lightning_memplan.step.optimization.plain import PlainStep
from lightning_memplan.step.setup import TrainingSetup, traced_microbatches
from lightning_memplan.step.stand_ins import StandInTrainer
from lightning_memplan.step.strategies.base import Strategy
from lightning_memplan.step.strategies.choose import choose_strategy
from lightning_memplan.step.strategies.model_parallel import local_part
from lightning_memplan.step.transfer import BatchTransfer


class StepRunner:
    """Run steps of a replica of ``setup.module`` on a backend, and tell its context where they are.

    ``step`` is one of AutomaticStep, ManualStep and PlainStep. Where the replica has ``begun``, its optimizers are
    there, and hooks before the first epoch are not called again.
    """

    def __init__(
        self, replica: torch.nn.Module, setup: TrainingSetup, backend: StepBackend, begun: Begun | None = None
    ) -> None:
        self.settings, self.backend, self.context = setup.settings, backend, backend.context
        self.strategy = choose_strategy(setup.settings.parallel)
        self.replica: Any = self.strategy.synchronize_layers(replica)
        dtype = self.strategy.input_dtype(setup.settings.precision)
        trainer = getattr(self.replica, "_trainer", None)
        datamodule = getattr(trainer, "datamodule", None) or setup.datamodule
        self.transfer = BatchTransfer(self.replica, datamodule, backend.device, dtype)
        self.step = _choose_step(self.replica, setup, self.strategy, backend)
        self._setup, self._begun = setup, begun
        #: Notes on hooks before the first step that were left out
        self.left_out: tuple[str, ...] = () if begun is None else begun.left_out
        self.steps = 0  #: optimizer steps that ran
        self.period = 0  #: batches after which steps are alike again, 0 where that is not known
        self.kinds = 1  #: steps after which every kind of step has been seen
        self._stepped: dict[Any, list[int]] = {}  # in which steps each optimizer has stepped

    def run_steps(self, batch: Any, steps: int | None = None) -> None:
        """Set up as a Trainer does, then run optimizer steps, each of as many microbatches as are traced.

        Without ``steps``, run three, and more where steps take turns.
        """
        with self.strategy.environment(self.backend), ExitStack() as stack:
            self._set_up(stack)
            if self._begun is None:
                self.left_out += self.step.begin()
            if is_lightning_module(self.replica):  # Lightning does, once states are restored (_CheckpointConnector)
                self.context.empty_cache()
            self.left_out += self.step.begin_epoch()
            microbatches, drawn = traced_microbatches(self.settings), random_states()
            self._note_steps(stack)
            self.steps = 0
            while self.steps < (steps or STEPS) or (steps is None and not self._repeats(drawn != random_states())):
                for number in range(microbatches):
                    index = self.steps * microbatches + number
                    self.context.update(step=index + 1)
                    self._run_batch(batch, index, first=number == 0, last=number == microbatches - 1)
                self.steps += 1

    def _set_up(self, stack: ExitStack) -> None:
        """Wrap the replica and make its optimizers; ``stack`` undoes what must not outlive the steps."""
        configure = self.step.configure if self._begun is None else partial(self.step.resume, self._begun)
        self.step.optimizers = self.strategy.setup(self.replica, self.backend, self.settings, configure)
        stack.callback(self.strategy.release, self.backend)
        if self.strategy.calls_configure_model:  # the layers are there only now
            stack.enter_context(module_paths(self.replica, self.context))

    def begin(self) -> Begun:
        """Make optimizers and call the hooks before the first epoch, on a replica that is only copied from here on."""
        with self.strategy.environment(self.backend):
            self.context.update(category="optimizer", path="")
            optimizers = self.step.make_optimizers()
            left_out = self.step.begin()
        for name in ("optimizers", "lr_schedulers"):  # each copy finds its own
            self.replica.__dict__.pop(name, None)
        return Begun(self.replica, optimizers, self.replica._trainer.lr_scheduler_configs, left_out)

    def _run_batch(self, batch: Any, index: int, *, first: bool, last: bool) -> None:
        self.context.update(phase="batch", category="batch")
        moved = self._moved(batch)
        self.context.update(phase="forward", category="activations")
        outputs = self.step.run(moved, index, first=first, last=last)
        self.step.hook("on_train_batch_end", outputs, moved, index)
        del outputs  # before the batch

    def _moved(self, batch: Any) -> Any:
        """Return the batch on the device, or where it is if the step moves it."""
        if not self.step.takes_iterator:
            return self.transfer(batch)
        return batch.whole() if isinstance(batch, TiledBatch) else batch

    def hold_batch_size(self, batch_size: int) -> None:
        """Let the step read the size of its batches: attributes, hyperparameters and loaders have it."""
        setup, replica = self._setup, self.replica
        unit = None if setup.loaders is None else unit_of(setup.loaders)
        trainer = getattr(replica, "_trainer", None)
        hold_batch_size(setup.batch_size_name, batch_size, unit, replica, getattr(trainer, "datamodule", None))
        if isinstance(trainer, StandInTrainer):
            trainer.train_batches_of(batch_size)

    def run_counted(self, batch: Any, batch_size: int, steps: int | None = None) -> Formula:
        """Run steps, and return the formula, whose layers are recorded in the first."""
        self.step.record_layers_of = batch_size
        self.run_steps(batch, steps)
        few = (batch.few, batch.samples) if isinstance(batch, TiledBatch) else (batch, batch_size)
        return make_formula(self.replica, self.step.layers, sample_bytes(*few), self.state_bytes())

    def evaluate(self, batch: Any, kind: Evaluation = "validation") -> None:
        """Run a step of validation, after training steps, or of a test."""
        evaluate(self.step, self.transfer, batch, kind)

    def forward(self, batch: Any) -> None:
        """Run the forward pass alone; with manual optimization, all of training_step."""
        if self.step.steps_optimizers_itself:
            self.step.optimizers = self.step.configure()
        with torch.enable_grad():
            self.step.forward(self._moved(batch), 0)

    def state_bytes(self) -> int:
        """Return the bytes of the optimizers' state on the device."""
        sizes = {
            leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes()
            for optimizer in self.step.optimizers
            for leaf in map(local_part, tree_leaves([list(state.values()) for state in optimizer.state.values()]))
            if isinstance(leaf, torch.Tensor) and leaf.device == self.backend.device
        }
        return sum(sizes.values())

    # -- how many steps

    def _note_steps(self, stack: ExitStack) -> None:
        """Note in which steps each optimizer of torch's steps; DeepSpeed's has no hook for it."""
        hooked: Iterable[Any] = (o for o in self.step.optimizers if hasattr(o, "register_step_post_hook"))
        self._stepped = {optimizer: [] for optimizer in hooked}
        for optimizer in self._stepped:
            stack.callback(optimizer.register_step_post_hook(self._note_step).remove)

    def _note_step(self, optimizer: Any, *_: Any) -> None:
        self._stepped[optimizer].append(self.steps)

    def _repeats(self, by_chance: bool) -> bool:
        """Tell whether another step would show nothing new, and note after how many steps they repeat.

        Where chance decides what a step does, only the optimizers tell whether steps take turns.
        """
        microbatches = traced_microbatches(self.settings)
        made = shapes(() if by_chance else self.backend.events())
        kinds = [
            (made[step * microbatches : (step + 1) * microbatches], *(step in own for own in self._stepped.values()))
            for step in range(self.steps)
        ]
        self.period, self.kinds = microbatches * period(kinds), until_all_were_seen(kinds)
        if self.steps < _RECTIFIED and any(map(_is_rectified_later, self.step.optimizers)):
            return False
        return self.steps >= MOST or (is_enough(kinds) and all(self._stepped.values()))


def _choose_step(replica: Any, setup: TrainingSetup, strategy: Strategy, backend: StepBackend) -> PlainStep:
    """Return the step in which Lightning would train the module.

    A module that is no LightningModule is trained in the same order, without hooks.
    """
    kind = PlainStep
    if is_lightning_module(replica):
        kind = AutomaticStep if replica.automatic_optimization else ManualStep
    return kind(replica, setup, strategy, backend)


_RECTIFIED = 7  #: steps until RAdam has computed its term for the variance, and once more with all that it keeps


def _is_rectified_later(optimizer: Any) -> bool:
    """Tell RAdam without foreach, which rectifies from its sixth step on (torch/optim/radam.py, ``rho_t``)."""
    return isinstance(optimizer, torch.optim.RAdam) and any(
        group["foreach"] is False and not group["capturable"] for group in optimizer.param_groups
    )
