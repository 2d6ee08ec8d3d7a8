"""Run steps of a replica on the GPU, and record them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from lightning_memplan.errors import TraceError
from lightning_memplan.lightning.compat import isolated_random_state
from lightning_memplan.memory.events import Event, Trace, labelled
from lightning_memplan.memory.formula import Formula
from lightning_memplan.probe.allocator_history import recording
from lightning_memplan.probe.clean_up import cuda_random_state, give_back
from lightning_memplan.probe.grad_scaler import RealLossScaler
from lightning_memplan.settings import STEPS, StepSettings
from lightning_memplan.step.backend import StepBackend
from lightning_memplan.step.begun import Begun
from lightning_memplan.step.compiled_regions import TRIED, as_written, forget_compiled, within_graphs
from lightning_memplan.step.context import EventContext, module_paths
from lightning_memplan.step.fake_cuda import DEVICE
from lightning_memplan.step.first_hooks import call_first_hooks, has_first_hooks
from lightning_memplan.step.module_copy import replicate
from lightning_memplan.step.precision import TRUE_DTYPE
from lightning_memplan.step.runner import StepRunner
from lightning_memplan.step.setup import TrainingSetup, traced_microbatches
from lightning_memplan.step.stand_ins import StandInTrainer


def real_replica(
    module: nn.Module,
    settings: StepSettings,
    trainer: Any,
    stage: str | None,
    *,
    copied: bool = False,
) -> nn.Module:
    """Return a replica on the host on which ``setup`` and ``configure_model`` were called.

    A module that has no such hook is returned itself, unless it is to be ``copied``.

    Raises:
        TraceError: a hook fails; says by which error, and at which line.
    """
    if not copied and not has_first_hooks(module, settings, stage):
        return module
    replica = replicate(module, {}, trainer=trainer, device=torch.device("cpu"))
    call_first_hooks(replica, settings, stage)
    return replica


@dataclass(frozen=True)
class ProbeRun:
    """A training setup on one GPU: makes replicas of the module, runs their steps and records them.

    Where the module has ``begun`` on fake tensors, replicas are copies of it, with real tensors.
    """

    setup: TrainingSetup
    device: torch.device
    begun: Begun | None = None

    def replicate(self) -> tuple[nn.Module, Begun | None]:
        """Return a replica that is not yet on the GPU, as a module is when its strategy takes it over.

        Beside it stand its optimizers, where its first hooks have run already.
        """
        if self.begun is not None:
            with suppress(TraceError):  # a part cannot be copied: each run calls the hooks
                begun = self.begun.copied(self.device, self._real_tensor)
                return begun.replica, begun
        module = self.setup.module
        memo = {}
        for tensor in (*module.parameters(), *module.buffers()):
            if (shared := _shared_until_moved(tensor)) is not None:
                memo[id(tensor)] = shared
        trainer = StandInTrainer(self.setup.trainer, self.setup.loaders)
        return replicate(module, memo, trainer=trainer, device=self.device), None

    def _real_tensor(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the real tensor that a fake one stands for; zeros for one that a hook has made."""
        if not isinstance(tensor, FakeTensor):
            return None
        assert self.begun is not None
        own = self.begun.stands_for.get(id(tensor))
        if own is not None:
            shared = _shared_until_moved(own)
            return copy.deepcopy(own) if shared is None else shared
        device = self.device if tensor.fake_device == DEVICE else tensor.fake_device
        zeros = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device).zero_()
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(zeros, tensor.requires_grad)
        return zeros.requires_grad_(tensor.requires_grad and tensor.is_leaf)

    def move(self, replica: nn.Module) -> nn.Module:
        """Move a replica to the GPU, unless its strategy does, and give it the type of its precision."""
        parallel = self.setup.settings.parallel
        device = None if parallel is not None and parallel.shards else self.device
        return replica.to(device=device, dtype=TRUE_DTYPE.get(self.setup.settings.precision))

    def runner(
        self,
        replica: nn.Module,
        begun: Begun | None,
        context: EventContext,
        size: int,
        events: Callable[[], Sequence[Event]] = tuple,
    ) -> StepRunner:
        """Return a runner of steps of this batch size. ``events`` returns those that it has recorded so far."""
        backend = StepBackend(context, self.device, RealLossScaler(self.device), events)
        if begun is not None:
            try:
                begun = begun.with_new_optimizers()
            except TraceError:  # the runner makes its own
                begun = None
        runner = StepRunner(replica, self.setup, backend, begun)
        runner.hold_batch_size(size)
        return runner

    def record(self, batches: Sequence[tuple[int, Any]], steps: int | None) -> tuple[list[Trace], Formula]:
        """Return one trace for each ``(batch size, batch)``, all from one replica, and the formula.

        Without ``steps``, the first batch size shows how many it takes (see ``memory.cycles``), and the others run as
        many.

        Each run begins with the same random states: a step that draws what it does draws the same, and cuDNN makes the
        random states anew that a process keeps for a recurrent network's dropout (aten/src/ATen/native/cudnn/RNN.cpp).
        """
        give_back(self.device)
        replica, begun = self.replicate()
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
                    formula = formula or self._formula(replica, begun, history.context, size, batch)
                if compiled or torch.backends.cudnn.benchmark:  # what is new is tried out, in all memory that there is
                    self.runner(replica, begun, history.context, size).run_steps(batch, 1)
                    replica.zero_grad(set_to_none=True)
                runner = self.runner(replica, begun, history.context, size, partial(history.events, number))
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

    def _formula(
        self, replica: nn.Module, begun: Begun | None, context: EventContext, size: int, batch: Any
    ) -> Formula:
        """Return the formula of a replica that is compiled, from a step that is not."""
        with as_written():
            formula = self.runner(replica, begun, context, size).run_counted(batch, size, 1)
        replica.zero_grad(set_to_none=True)
        return formula


def _shared_until_moved(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return a parameter or buffer that a replica can share with the module until it is moved to the GPU.

    It lies on the host. Nothing changes it before, and the host does not hold the weights twice. None for a tensor
    that is elsewhere, or of a class of its own.
    """
    if tensor.device.type != "cpu":
        return None
    if type(tensor) is nn.Parameter:
        shared = nn.Parameter(tensor.detach(), tensor.requires_grad)
        shared.__dict__.update(tensor.__dict__)
        return shared
    return tensor.detach() if type(tensor) is torch.Tensor else None
