"""Run the user's code as on a GPU, so that it leaves nothing behind and warns of nothing."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from lightning_memplan.cuda.dispatch import cuda_semantics
from lightning_memplan.errors import as_trace_errors
from lightning_memplan.lightning.compat import isolated_random_state
from lightning_memplan.step.compiled_regions import as_written
from lightning_memplan.step.quiet import leaving_no_trace
from lightning_memplan.trace.recorder import Recorder


@contextmanager
def no_collection() -> Iterator[None]:
    """Turn garbage collection off: a block is freed when its last reference goes, not at random."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def no_warnings() -> Iterator[None]:
    """Silence the warnings of the user's code, which come when it really runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def as_on_gpu(module: nn.Module, capability: tuple[int, int]) -> Iterator[None]:
    """Run a module's code as a GPU would, uncompiled, and put back its random state and its classes."""
    with (
        isolated_random_state(),
        leaving_no_trace(module),
        no_warnings(),
        _counts_of_asked_length(),
        as_written(),
        cuda_semantics(capability),
    ):
        yield


@contextmanager
def explained(recorder: Recorder) -> Iterator[None]:
    """Record until the end, and turn an error of the user's code into a TraceError that names its line."""
    try:
        with as_trace_errors():
            yield
    finally:
        recorder.stop()


@contextmanager
def _counts_of_asked_length() -> Iterator[None]:
    """Let ``bincount(x, minlength=n)`` count n values: a fake tensor cannot tell that there are no larger ones.

    torchmetrics counts pairs of classes so, in updates that most training steps make.
    """

    def bincount(x: torch.Tensor, weights: torch.Tensor | None = None, minlength: int = 0) -> torch.Tensor:
        if minlength and isinstance(x, FakeTensor):
            return x.new_zeros(minlength, dtype=torch.int64 if weights is None else weights.dtype)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.aten.bincount(x, weights, minlength)  # type: ignore[no-any-return]

    library = torch.library.Library("aten", "IMPL")
    try:
        with no_warnings():  # "Overriding a previously registered kernel": that is the purpose
            library.impl("bincount", bincount, "AutogradCPU")
        yield
    finally:
        library._destroy()
