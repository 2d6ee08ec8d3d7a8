"""Make the replicas of one session's module, each once: the user's hooks are called once more than without planning."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lightning_memplan.errors import TraceError
from lightning_memplan.probe.run import real_replica
from lightning_memplan.settings import StepSettings
from lightning_memplan.step.lazy import initialize
from lightning_memplan.step.setup import TrainingSetup
from lightning_memplan.trace.detached import prepared
from lightning_memplan.trace.tracer import Beginning, begin_training


@dataclass
class Replicas:
    """The replicas of one module, made when they are first asked for.

    >>> replicas, net = Replicas(), nn.Linear(2, 1)
    >>> replicas.set_up(net, StepSettings(), None, None) is net  # it has no hooks
    True
    """

    why_not_real: str = ""  #: why there is no replica whose tensors are real
    _set_up: dict[Any, nn.Module] = field(default_factory=dict)
    _beginnings: dict[Any, Beginning | TraceError | None] = field(default_factory=dict)

    def set_up(
        self,
        module: nn.Module,
        settings: StepSettings,
        trainer: Any,
        stage: str | None,
        real: bool = False,
    ) -> nn.Module:
        """Return the module after its ``setup`` and ``configure_model``: itself, where it has no such hooks.

        A ``real`` replica has real tensors on the host; else it has fake ones.

        Raises:
            TraceError: a hook fails; says by which error, and at which line.
        """
        if real and not self.why_not_real:
            key: Any = (module, "real")
            try:
                if key not in self._set_up:
                    self._set_up[key] = real_replica(module, settings, trainer, stage)
                return self._set_up[key]
            except TraceError as error:
                self.why_not_real = str(error)
        key = (module, settings.precision, settings.parallel and settings.parallel.kind)
        if key not in self._set_up:
            try:
                self._set_up[key] = prepared(module, settings, trainer=trainer, stage=stage)
            except TraceError as error:
                if self.why_not_real:  # it has been tried
                    raise
                try:
                    self._set_up[key] = real_replica(module, settings, trainer, stage)
                except TraceError:
                    raise error from None
        return self._set_up[key]

    def initialized(self, setup: TrainingSetup, stage: str | None, source: Any) -> nn.Module:
        """Return a replica of a setup's module whose lazy layers have the shapes that a batch of the source gives them.

        It has real tensors. Where the step fails on the host, its layers stay as they are, and a trace says so.
        """
        key = (setup.module, "initialized")
        if key not in self._set_up:
            replica = real_replica(setup.module, setup.settings, setup.trainer, stage, copied=True)
            self._set_up[key] = replica
            with suppress(Exception):  # whatever the user's step raises
                initialize(replace(setup, module=replica), source.samples.batches((2,))[0][1])
        return self._set_up[key]

    def beginning(self, setup: TrainingSetup) -> Beginning | None:
        """Return the module of a setup at its first step; None where each run calls the hooks before it.

        Raises:
            TraceError: a hook fails, as it did when it was called first.
        """
        settings = setup.settings
        key = setup.module, settings.precision, settings.capability, settings.parallel is not None
        if key not in self._beginnings:
            try:
                self._beginnings[key] = begin_training(setup)
            except TraceError as error:
                self._beginnings[key] = error.with_traceback(None)
        found = self._beginnings[key]
        if isinstance(found, TraceError):
            raise found
        return found
