"""Run steps of a replica on the GPU, and record them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_memplan.lightning.compat import is_overridden, isolated_random_state
from lightning_memplan.memory.events import Event, Trace, labelled
from lightning_memplan.memory.formula import Formula
from lightning_memplan.probe.allocator_history import recording
from lightning_memplan.probe.clean_up import cuda_random_state, give_back
from lightning_memplan.probe.grad_scaler import RealLossScaler
from lightning_memplan.settings import STEPS
from lightning_memplan.step.backend import StepBackend
from lightning_memplan.step.compiled_regions import TRIED, as_written, forget_compiled, within_graphs
from lightning_memplan.step.context import EventContext, module_paths
from lightning_memplan.step.module_copy import replicate
from lightning_memplan.step.precision import TRUE_DTYPE
from lightning_memplan.step.runner import StepRunner
from lightning_memplan.step.setup import TrainingSetup, traced_microbatches
from lightning_memplan.step.strategies.choose import choose_strategy


@dataclass(frozen=True)
class ProbeRun:
    """A training setup on one GPU: makes replicas of the module, runs their steps and records them."""

    setup: TrainingSetup
    device: torch.device

    def replicate(self) -> nn.Module:
        """Return a replica that is set up but not yet on the GPU, as a module is when its strategy takes it over."""
        module, stage = self.setup.module, self.setup.stage
        strategy = choose_strategy(self.setup.settings.parallel)
        sets_up = stage is not None and is_overridden("setup", module)
        has_model = is_overridden("configure_model", module) or strategy.calls_configure_model
        memo = {} if sets_up or has_model else _shared_until_moved(module)
        replica: Any = replicate(module, memo, trainer=self.setup.trainer, device=self.device)
        if sets_up:
            replica.setup(stage)
        if has_model and not strategy.calls_configure_model:
            with strategy.note_units():
                replica.configure_model()
        return replica  # type: ignore[no-any-return]

    def move(self, replica: nn.Module) -> nn.Module:
        """Move a replica to the GPU, unless its strategy does, and give it the type of its precision."""
        parallel = self.setup.settings.parallel
        device = None if parallel is not None and parallel.shards else self.device
        return replica.to(device=device, dtype=TRUE_DTYPE.get(self.setup.settings.precision))

    def runner(
        self, replica: nn.Module, context: EventContext, events: Callable[[], Sequence[Event]] = tuple
    ) -> StepRunner:
        """Return a runner of steps. ``events`` returns those that it has recorded so far."""
        backend = StepBackend(context, self.device, RealLossScaler(self.device), events)
        return StepRunner(replica, self.setup, backend)

    def record(self, batches: Sequence[tuple[int, Any]], steps: int | None) -> tuple[list[Trace], Formula]:
        """Return one trace for each ``(batch size, batch)``, all from one replica, and the formula.

        Without ``steps``, the first batch size shows how many it takes (see ``memory.cycles``), and the others run as
        many.

        Each run begins with the same random states: a step that draws what it does draws the same, and cuDNN makes the
        random states anew that a process keeps for a recurrent network's dropout (aten/src/ATen/native/cudnn/RNN.cpp).
        """
        give_back(self.device)
        replica = self.replicate()
        formula, compiled, period = None, within_graphs(replica), 0
        left_out: tuple[str, ...] = ()
        if compiled:
            steps = steps or STEPS
        with recording(self.device) as history, module_paths(replica, history.context, compiled):
            history.context.update(category="parameters")
            self.move(replica)
            for number, (size, batch) in enumerate(batches, 1):
                history.context.begin_run(-1)  # the last run's gradients and optimizer are freed in no run
                replica.zero_grad(set_to_none=True)
                forget_compiled()
                if compiled:
                    formula = formula or self._formula(replica, history.context, size, batch)
                if compiled or torch.backends.cudnn.benchmark:  # what is new is tried out, in all memory that there is
                    self.runner(replica, history.context).run_steps(batch, 1)
                    replica.zero_grad(set_to_none=True)
                runner = self.runner(replica, history.context, partial(history.events, number))
                give_back(self.device)
                history.context.begin_run(number)
                with isolated_random_state(), cuda_random_state(self.device):
                    if compiled:
                        runner.run_steps(batch, steps)
                    else:
                        formula = runner.run_counted(batch, size, steps)
                left_out = runner.left_out
                if steps is None:
                    steps, period = runner.steps, runner.period
            recorded = history.read()
        assert formula is not None  # there are batches
        notes = (*((TRIED,) if compiled else ()), *left_out)
        microbatches = traced_microbatches(self.setup.settings)
        traces = [
            Trace(size, labelled(recorded.events(number)), notes, microbatches, period)
            for number, (size, _) in enumerate(batches, 1)
        ]
        return traces, formula

    def _formula(self, replica: nn.Module, context: EventContext, size: int, batch: Any) -> Formula:
        """Return the formula of a replica that is compiled, from a step that is not."""
        with as_written():
            formula = self.runner(replica, context).run_counted(batch, size, 1)
        replica.zero_grad(set_to_none=True)
        return formula


def _shared_until_moved(module: nn.Module) -> dict[int, Any]:
    """Map the parameters and buffers that a replica can share with the module until it is moved to the GPU.

    They lie on the host. Nothing changes them before, and the host does not hold the weights twice.
    """
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type != "cpu":
            continue
        if type(tensor) is nn.Parameter:
            memo[id(tensor)] = nn.Parameter(tensor.detach(), tensor.requires_grad)
            memo[id(tensor)].__dict__.update(tensor.__dict__)
        elif type(tensor) is torch.Tensor:
            memo[id(tensor)] = tensor.detach()
    return memo
