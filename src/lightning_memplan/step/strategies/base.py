"""Define what a Trainer's strategy does around a replica."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules._functions import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

from lightning_memplan.errors import TraceError
from lightning_memplan.memory.events import Category, Event
from lightning_memplan.settings import Parallel, Precision, StepSettings
from lightning_memplan.step.backend import StepBackend
from lightning_memplan.step.context import EventContext
from lightning_memplan.step.patch import patched
from lightning_memplan.step.precision import AUTOCAST_DTYPE, TRUE_DTYPE, default_dtype
from lightning_memplan.step.strategies.process_group import fake_ranks

Configure = Callable[[], list[torch.optim.Optimizer]]  #: makes the optimizers of the replica


class Strategy:
    """Train a replica on one device, with nothing around it. Other strategies override some of this.

    A strategy is made for one replica: it holds the ``wrapper`` that it puts around it.
    """

    calls_configure_model = False  #: ``wrap`` calls the module's ``configure_model``, so nothing else does before
    wrapper: Any = None  #: torch's or DeepSpeed's module around the replica, None where the replica stands alone
    remakes_parameters = False  #: optimizers are made of parameters that exist only once it has wrapped the replica
    engine: Any = None  #: DeepSpeed's: scales the loss, reduces and steps by itself
    caches_casts = False  #: autocast keeps what it has cast

    @contextmanager
    def environment(self, backend: StepBackend) -> Iterator[None]:
        """Let steps of the wrapped replica run in this one process. Enter it before ``setup`` and around steps."""
        yield

    def note_units(self) -> AbstractContextManager[None]:
        """Note which layers the module's ``configure_model`` wraps, where the strategy wraps these alone."""
        return nullcontext()

    def synchronize_layers(self, replica: nn.Module) -> nn.Module:
        """Replace layers that compute over all ranks (``sync_batchnorm=True``)."""
        return replica

    def setup(
        self, replica: nn.Module, backend: StepBackend, settings: StepSettings, configure: Configure
    ) -> list[torch.optim.Optimizer]:
        """Wrap the replica and make its optimizers, in the strategy's own order.

        Raises:
            TraceError: the strategy's memory is not modelled.
        """
        self.wrap(replica, backend, settings.precision)
        backend.context.update(category="optimizer", path="")
        return configure()

    def wrap(self, replica: nn.Module, backend: StepBackend, precision: Precision) -> None:
        """Set ``wrapper``, or change the replica in its place."""

    def make_layers(self, replica: nn.Module, backend: StepBackend, precision: Precision) -> None:
        """Make the layers that only ``wrap`` makes, as plain ones, for a forward pass of the replica alone."""

    def release(self, backend: StepBackend) -> None:
        """Let go of the replica after its last step."""

    # -- a step

    def run_step(self, replica: nn.Module, step: Callable[[Any], Any], batch: Any, context: EventContext) -> Any:
        """Run a step of the replica through the wrapper."""
        return step(batch)

    def block_backward_sync(self) -> AbstractContextManager[Any]:
        """Skip the reduction of gradients that are only accumulated (``ParallelStrategy.block_backward_sync``)."""
        return nullcontext()

    def forward_context(self, precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
        """Compute in the types of the precision (``Precision.forward_context``)."""
        if precision in AUTOCAST_DTYPE:
            return torch.autocast(device.type, dtype=AUTOCAST_DTYPE[precision], cache_enabled=self.caches_casts)
        return default_dtype(TRUE_DTYPE[precision]) if precision in TRUE_DTYPE else nullcontext()

    def input_dtype(self, precision: Precision) -> torch.dtype | None:
        """Return the type to which batches are converted, None where they stay (``Precision.convert_input``)."""
        return TRUE_DTYPE.get(precision)

    def normalize(self, loss: torch.Tensor, microbatches: int) -> torch.Tensor:
        """Divide the loss of a microbatch by their number."""
        return loss / microbatches

    def scales_loss(self, precision: Precision) -> bool:
        """Tell whether a GradScaler scales the loss."""
        return precision == "16-mixed"

    def notes(self, events: Sequence[Event]) -> tuple[str, ...]:
        """Say what the GPU may reserve beyond these traced events, or on what a trace rests."""
        return ()


class SingleDeviceStrategy(Strategy):
    """Train on one device."""


class ParallelStrategy(Strategy):
    """Train on several ranks, of which this process stands for one. The others are fake."""

    around_forward: Category | None = None  #: of what the wrapper allocates before and after the replica's forward

    def __init__(self, parallel: Parallel) -> None:
        self.parallel = parallel

    @contextmanager
    def environment(self, backend: StepBackend) -> Iterator[None]:
        parallel = self.parallel
        with ExitStack() as stack:
            stack.enter_context(fake_ranks(parallel.ranks, parallel.rank, parallel.backend))
            if not backend.is_gpu:
                stack.enter_context(patched(nn.SyncBatchNorm, "forward", _fake_sync_batch_norm(backend.context)))
                # DistributedDataParallel would ask whether such layers are on a GPU
                stack.enter_context(patched(DistributedDataParallel, "_passing_sync_batchnorm_handle", _ask_nothing))
            self._enter(stack, backend)
            yield

    def _enter(self, stack: ExitStack, backend: StepBackend) -> None:
        """Enter what this strategy needs beside fake ranks."""

    def synchronize_layers(self, replica: nn.Module) -> nn.Module:
        sync = self.parallel.layer_sync
        return replica if sync is None else sync.apply(replica)

    def run_step(self, replica: nn.Module, step: Callable[[Any], Any], batch: Any, context: EventContext) -> Any:
        """Run a step through the wrapper's forward, as Lightning redirects ``training_step``."""
        if self.wrapper is None:
            return step(batch)
        own, category = replica.__dict__.get("forward"), context.category

        def forward(*args: Any) -> Any:
            del replica.__dict__["forward"]
            if own is not None:
                replica.__dict__["forward"] = own
            context.update(category=category)
            try:
                return step(*args)
            finally:
                context.update(category=around)

        replica.__dict__["forward"] = forward
        context.update(category="communication")
        self._begin_forward()
        around = self.around_forward or category
        context.update(category=around)
        try:
            return self.wrapper(batch)
        finally:
            context.update(category=category)

    def _begin_forward(self) -> None:
        """Do what a wrapper does once, at the beginning of its first forward pass."""

    def block_backward_sync(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.wrapper is None else self.wrapper.no_sync()


def _fake_sync_batch_norm(context: EventContext) -> Callable[[nn.SyncBatchNorm, torch.Tensor], torch.Tensor]:
    """Return ``SyncBatchNorm.forward`` without its checks, which refuse a traced tensor since it is on no GPU.

    Source: torch/nn/modules/batchnorm.py (2.11 to 2.14).
    """

    def forward(norm: nn.SyncBatchNorm, input: torch.Tensor) -> torch.Tensor:
        kept = not norm.training or norm.track_running_stats
        mean, var = (norm.running_mean, norm.running_var) if kept else (None, None)
        ranks, factor, taken = torch.distributed.get_world_size(), norm.momentum or 0.0, context.lengths_taken
        if not norm.training or ranks == 1:
            training = norm.training or mean is None
            return functional.batch_norm(input, mean, var, norm.weight, norm.bias, training, factor, norm.eps)
        group = torch.distributed.group.WORLD
        out = SyncBatchNorm.apply(input, norm.weight, norm.bias, mean, var, norm.eps, factor, group, ranks)
        context.lengths_taken = taken  # it selects the ranks that have samples: all do
        return out  # type: ignore[no-any-return]

    return forward


def _ask_nothing(*_: Any) -> None:
    """Stand for a check that needs a GPU."""


class UnmodelledStrategy(ParallelStrategy):
    """A strategy whose memory is not modelled."""

    remakes_parameters = True

    def wrap(self, replica: nn.Module, backend: StepBackend, precision: Precision) -> None:
        raise TraceError(
            f"what {self.parallel.name} keeps on each of {self.parallel.ranks} GPUs is not modelled; what DDP, FSDP "
            "and DeepSpeed keep is"
        )
