"""Copy a module with fake tensors in place of its real ones: nothing of the user's changes, no memory is taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lightning_memplan.cuda.recurrent import flatten_weights
from lightning_memplan.cuda.rule_set import Rules
from lightning_memplan.errors import TraceError
from lightning_memplan.memory.events import Category
from lightning_memplan.settings import StepSettings
from lightning_memplan.step.fake_cuda import DEVICE
from lightning_memplan.step.first_hooks import call_first_hooks, has_first_hooks
from lightning_memplan.step.module_copy import metric_states, replicate
from lightning_memplan.step.precision import TRUE_DTYPE
from lightning_memplan.trace.fake_tensors import FakeCopies, fake_copy, fake_mode
from lightning_memplan.trace.known_values import remember
from lightning_memplan.trace.recorder import Recorder


def detached_copy(
    module: nn.Module,
    mode: FakeTensorMode,
    *,
    dtype: torch.dtype | None = None,
    trainer: Any = None,
    device: torch.device = DEVICE,
    stands_for: dict[int, torch.Tensor] | None = None,
) -> nn.Module:
    """Return a copy of the module whose parameters and buffers are fake tensors on ``device``.

    ``stands_for`` receives the real tensor of each fake one, by the fake one's id.

    Raises:
        TraceError: a part of the module cannot be copied, or its parameters are not there yet (lazy modules).
    """
    memo: dict[int, Any] = {}
    real = {} if stands_for is None else stands_for
    for path, child in module.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            raise TraceError(
                f"{path or type(module).__name__} is TorchScript, of which no copy can be trained: plan with the "
                "module that it was made of, or by method='probe'",
                reason="not_copyable",
            )
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if torch.nn.parameter.is_lazy(parameter):
            raise TraceError(
                f"{name!r} has no shape yet (a lazy module): run the module once on a batch before planning",
                reason="uninitialized",
            )
        if id(parameter) not in memo:
            fake: Any = fake_copy(parameter, mode, device, dtype).requires_grad_(parameter.requires_grad)
            fake._is_param = True  # as nn.Parameter makes one of a tensor subclass, by another copy
            own = fake.__dict__  # its mode is such an attribute, which a copy of a copy must not take over
            own.update({k: v for k, v in parameter.__dict__.items() if not k.startswith("_") and k not in own})
            memo[id(parameter)] = fake
            real[id(fake)] = parameter
    for name, buffer in module.named_buffers():
        if id(buffer) not in memo:
            memo[id(buffer)] = fake = fake_copy(buffer, mode, device, dtype)
            real[id(fake)] = buffer
            if not name.endswith("num_batches_tracked"):  # which every batch norm has, and none reads
                remember(fake, buffer)
    for state in metric_states(module):
        memo[id(state)] = fake_copy(state, mode, DEVICE)
    return replicate(module, memo, trainer=trainer, device=DEVICE, tensor_copy=FakeCopies(mode))


def prepared(module: nn.Module, settings: StepSettings, *, trainer: Any = None, stage: str | None = None) -> nn.Module:
    """Return the module as it is when training begins, which takes no memory for weights that its hooks make.

    It is the module itself, or a detached copy on which ``setup(stage)`` and ``configure_model`` have been called,
    where it has them.

    Raises:
        TraceError: a hook fails; says by which error, and at which line.
    """
    if not has_first_hooks(module, settings, stage):
        return module
    mode, dtype = fake_mode(), TRUE_DTYPE.get(settings.precision)
    copied: Any = detached_copy(module, mode, dtype=dtype, trainer=trainer)
    call_first_hooks(copied, settings, stage, _making_fakes(mode))
    for child in copied.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and not isinstance(parameter, FakeTensor):
                fake = fake_copy(parameter, mode, DEVICE, dtype)
                child._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in child._buffers.items():
            if buffer is not None and not isinstance(buffer, FakeTensor):
                child._buffers[name] = fake_copy(buffer, mode, DEVICE, dtype)
    return copied  # type: ignore[no-any-return]


@contextmanager
def _making_fakes(mode: FakeTensorMode) -> Iterator[None]:
    """Make tensors on the fake device, which takes no memory for them."""
    with Recorder(mode, Rules()), DEVICE:
        yield


def setup_order(module: nn.Module) -> Iterator[tuple[torch.Tensor, Category, str]]:
    """Yield parameters and buffers, with category and path, in the order in which ``Module.to`` moves them.

    Children come first. Recurrent networks lay their weights out anew when these have come.
    """
    for name, child in module.named_children():
        for tensor, category, path in setup_order(child):
            yield tensor, category, f"{name}.{path}" if path else name
    for parameter in module._parameters.values():
        if parameter is not None:
            yield parameter, "parameters", ""
    for buffer in module._buffers.values():
        if buffer is not None:
            yield buffer, "buffers", ""
    if isinstance(module, nn.RNNBase):
        flatten_weights(module)
