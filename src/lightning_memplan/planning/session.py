"""Plan one run: ``PlanningSession`` is used by the callback, by ``plan()`` and by the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from lightning_memplan.checks import Method
from lightning_memplan.lightning.trainer import check_accumulation, cuda_index
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.planning.advice import advise_job
from lightning_memplan.planning.job import TrainingJob
from lightning_memplan.planning.limits import Limits
from lightning_memplan.planning.plan import largest_batch_size, make_plan
from lightning_memplan.planning.predict import predict
from lightning_memplan.planning.proposal import Proposal
from lightning_memplan.planning.retrace import retrace_at
from lightning_memplan.probe.probe import TrialPeaks, try_step
from lightning_memplan.settings import STEPS
from lightning_memplan.step.setup import MAX_MICROBATCHES
from lightning_memplan.types import Advice, Device, Plan


class Allocated(NamedTuple):
    """Bytes of a GPU that this process has allocated before planning: the module's own tensors, and all others.

    >>> Allocated(module_bytes=100, other_bytes=20).other_bytes
    20
    """

    module_bytes: int = 0
    other_bytes: int = 0


NOTHING_ALLOCATED = Allocated()


@dataclass
class PlanningSession:
    """Plan one run. Estimates are made once, when they are first asked for.

    ``extra_bytes`` are those that callbacks hold while training (a moving average of the weights). The session is the
    ``Predictor`` of its own search.

    >>> import torch
    >>> from lightning_memplan.planning.job import training_job
    >>> job = training_job(torch.nn.Linear(1000, 1000), torch.zeros(4, 1000), device="T4")
    >>> session = PlanningSession(job, Limits(max_batch_size=256), method="trace")
    >>> session.propose().plan.batch_size
    256
    """

    job: TrainingJob
    limits: Limits
    method: Method = "auto"
    allocated: Allocated = NOTHING_ALLOCATED
    extra_bytes: int = 0

    def __post_init__(self) -> None:
        self.job = replace(self.job, method=self.method)
        self.limits = self.job.source.within(self.limits, self.job.ranks)
        self._estimates: dict[int, Estimate] = {}

    @property
    def name(self) -> str:
        """Class of the module."""
        return self.job.name

    @property
    def already_allocated(self) -> int:
        """Bytes that this process holds beside the step: they are in the measured peaks, and in no estimate."""
        return self.allocated.other_bytes + self.extra_bytes

    @property
    def device(self) -> Device:
        """The device with what a plan can have of it: less what NCCL, callbacks and this process take."""
        device = self.job.device
        return replace(device, context=device.context + self.already_allocated + self.job.nccl)

    def estimate(self, microbatches: int) -> Estimate:
        """Return the estimate of a step that accumulates gradients over that many batches."""
        if microbatches not in self._estimates:
            self._estimates[microbatches] = predict(self.job.accumulating(microbatches), self.limits.largest)
        return self._estimates[microbatches]

    def estimate_at(self, batch_size: int) -> Estimate:
        """Return the estimate that holds at a batch size.

        Under an effective batch size there are two: without accumulation, and with it. All batches in the middle of an
        accumulation are alike, so that three stand for any number.
        """
        return self.estimate(self._microbatches(batch_size))

    def retrace(self, batch_size: int) -> None:
        """Trace the step at exactly this batch size; ``estimate_at`` has the result from then on.

        Raises:
            TraceError: the step refuses so many samples.
        """
        microbatches = self._microbatches(batch_size)
        found = self.estimate(microbatches)
        self._estimates[microbatches] = retrace_at(found, batch_size, self.job.accumulating(microbatches))

    def _microbatches(self, batch_size: int) -> int:
        whole = self.limits.effective_batch_size
        if whole is None:
            return self.job.settings.accumulate_grad_batches
        return 1 if batch_size * self.limits.ranks == whole else MAX_MICROBATCHES

    def advise(
        self, estimate: Estimate, batch_size: int, budget: int, capacity: int | None = None
    ) -> tuple[Advice, ...]:
        """Return the changes that save memory at a batch size; see ``advise_job``."""
        return advise_job(self.job, estimate, batch_size, budget, capacity)

    def plan(self, limits: Limits | None = None, *, retrace: bool = True) -> Plan:
        """Return the plan within ``limits``, or within the session's own.

        Without ``retrace`` the size that is found is not traced again: it is known to run.

        Raises:
            DoesNotFitError: not even the smallest batch size fits.
            MemplanError: the step refuses all allowed batch sizes that fit.
        """
        plan = make_plan(
            self,
            self.device,
            limits or self.limits,
            nccl=self.job.nccl,
            accumulate_grad_batches=self.job.settings.accumulate_grad_batches,
            retrace=retrace,
        )
        return self.job.source.explained(plan)

    def check(self, batch_size: int) -> Plan:
        """Return the plan of this batch size alone, whatever the size of the dataset.

        Raises:
            DoesNotFitError: it does not fit.
            MemplanError: the step refuses it.
        """
        self.limits = replace(self.limits, max_batch_size=batch_size)
        return self.plan(self.limits.exactly(batch_size))

    def advice(self, batch_size: int | None = None) -> tuple[Advice, ...]:
        """Return the changes that save memory at a batch size; without one at the largest that fits."""
        estimate, device = self.estimate(self.job.settings.accumulate_grad_batches), self.device
        if batch_size is None:
            limits = self.job.source.within(Limits(self.limits.margin), 1)
            batch_size = largest_batch_size(estimate, device, limits) or 1
        return self.advise(estimate, batch_size, self.limits.budget_of(device), device.capacity)

    def propose(self) -> Proposal:
        """Search the largest batch size, and trace the step at exactly that size."""
        return Proposal(self.plan(), self)

    def trial(self, plan: Plan) -> TrialPeaks:
        """Run real steps of a plan's batch size on the GPU, on a replica; steps that take turns run all their turns."""
        program = self.estimate_at(plan.batch_size).program
        recorded = 0 if program is None else program.recorded()
        job = self.job.accumulating(plan.accumulate_grad_batches)
        return try_step(
            job.setup,
            (plan.batch_size, job.source.samples.large(plan.batch_size)),
            self.index,
            extra_bytes=self.extra_bytes,
            steps=recorded if recorded > STEPS else 2,
            begun=job.begun_replica(),
        )

    @property
    def module_is_on_gpu(self) -> bool:
        """True where the module's own tensors are on the GPU already."""
        return self.allocated.module_bytes > 0

    @property
    def index(self) -> int:
        """Index of the CUDA device on which the job runs, 0 where it runs on none."""
        return (None if self.job.trainer is None else cuda_index(self.job.trainer)) or 0


def plan_each(
    job: TrainingJob, devices: Sequence[Device], limits: Limits, method: Method = "auto"
) -> tuple[tuple[Device, int], ...]:
    """Return each device with the largest batch size that fits on it (0: none fits), the smallest device first.

    The step is traced once for each compute capability.
    """
    limits = job.source.within(limits, 1)
    nccl = 0 if job.settings.parallel is None else job.settings.parallel.nccl

    @cache
    def estimate(capability: tuple[int, int] | None) -> Estimate:
        settings = job.settings if capability is None else replace(job.settings, capability=capability)
        gpu = Device("a GPU", total=1, capability=capability)  # it chooses the kernels, whatever its memory
        return predict(replace(job, settings=settings, device=gpu, method=method))

    @cache
    def largest(capability: tuple[int, int] | None, capacity: int) -> int:
        return largest_batch_size(estimate(capability), Device("a GPU", total=max(1, capacity)), limits)

    ordered = sorted(devices, key=lambda device: device.capacity)
    return tuple((device, largest(device.capability, max(0, device.capacity - nccl))) for device in ordered)


def check_effective_batch_size(job: TrainingJob, limits: Limits) -> None:
    """See that nothing but ``effective_batch_size`` decides how many batches are accumulated.

    Raises:
        MisconfigurationException: manual optimization, the Trainer, a scheduler or DeepSpeed does.
        ValueError: it is not a multiple of the number of ranks.
    """
    if limits.effective_batch_size is not None:
        check_accumulation(
            limits.effective_batch_size, job.module, job.trainer, job.settings.accumulate_grad_batches, job.ranks
        )


def allocated_on(index: int | None, module: nn.Module) -> Allocated:
    """Return the bytes of a CUDA device that this process has allocated already."""
    if index is None or not torch.cuda.is_initialized():
        return Allocated()
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [p.grad for p in module.parameters() if p.grad is not None]
    blocks = {t.data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device == torch.device("cuda", index)}
    own = sum(blocks.values())
    return Allocated(own, max(0, torch.cuda.memory_allocated(index) - own))
