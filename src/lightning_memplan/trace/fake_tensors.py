"""Make fake tensors, and ask torch which of its dispatch modes are active."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lightning_memplan.step.fake_cuda import DEVICE
from lightning_memplan.trace.storages import key_of

_FAKE = torch._C._TorchDispatchModeKey.FAKE
_FUNCTIONAL = torch._C._TorchDispatchModeKey.FUNCTIONAL


def fake_mode() -> FakeTensorMode:
    """Return a mode that deep copies of its tensors share, although copying a tensor copies its attributes."""
    mode: Any = FakeTensorMode(allow_non_fake_inputs=True)
    mode.__deepcopy__ = lambda memo: mode
    return mode  # type: ignore[no-any-return]


def is_fake_mode_active() -> bool:
    """Check for a fake mode of somebody else's, which asks for shapes alone (torch 2.13 and 2.14)."""
    return torch._C._get_dispatch_mode(_FAKE) is not None


def is_graph_made() -> bool:
    """Check that operators are written into a graph, by AOTAutograd's functional mode (torch 2.13 and 2.14)."""
    return torch._C._get_dispatch_mode(_FUNCTIONAL) is not None


def fake_copy(
    tensor: torch.Tensor, mode: FakeTensorMode, device: torch.device, dtype: torch.dtype | None = None
) -> FakeTensor:
    """Return a fake tensor of the same shape and strides, which takes no memory.

    Floating point numbers are of ``dtype``, where one is given.

    >>> fake = fake_copy(torch.zeros(2, 3), fake_mode(), DEVICE, torch.float16)
    >>> tuple(fake.shape), fake.dtype, fake_copy(torch.arange(3), fake_mode(), DEVICE, torch.float16).dtype
    ((2, 3), torch.float16, torch.int64)
    """
    if dtype is None or not tensor.is_floating_point():
        dtype = tensor.dtype
    meta = torch.empty_strided(tensor.size(), tensor.stride(), dtype=dtype, device="meta")
    return FakeTensor(mode, meta, device)


class FakeCopies:
    """Copy fake tensors to another mode: those that share a storage do so afterwards, too.

    >>> weight, copies = fake_copy(torch.zeros(2, 3), fake_mode(), DEVICE), FakeCopies(fake_mode())
    >>> copies(weight).untyped_storage()._cdata == copies(weight.t()).untyped_storage()._cdata
    True
    >>> copies(torch.zeros(2)) is None
    True
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self.storages: dict[int, torch.UntypedStorage] = {}  #: key of a storage -> its copy
        self._kept: list[torch.UntypedStorage] = []  # whose keys are theirs as long as they are there

    def __call__(self, tensor: torch.Tensor) -> FakeTensor | None:
        """Return the copy of a fake tensor, None for any other tensor, and for one that has no storage."""
        if not isinstance(tensor, FakeTensor) or tensor.layout is not torch.strided:
            return None
        storage: Any = tensor.untyped_storage()
        if key_of(storage) not in self.storages:
            self._kept.append(storage)
            self.storages[key_of(storage)] = torch.UntypedStorage(storage.nbytes(), device="meta")
        meta = torch.empty(0, dtype=tensor.dtype, device="meta")
        meta.set_(self.storages[key_of(storage)], tensor.storage_offset(), tensor.size(), tensor.stride())
        made = FakeTensor(self._mode, meta, tensor.fake_device)
        if tensor.is_leaf:
            made.requires_grad_(tensor.requires_grad)
        own = made.__dict__
        own.update({name: _own(value) for name, value in tensor.__dict__.items() if name not in own})
        return made


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def are_plain(args: Sequence[Any]) -> bool:
    """Check that all tensors among an operator's arguments are fake and on one device; the first argument is one."""
    device = getattr(args[0], "fake_device", None)
    return device is not None and all(
        not isinstance(arg, torch.Tensor)
        or (isinstance(arg, FakeTensor) and arg.constant is None and arg.fake_device == device)
        for arg in args
    )


class FakeFactory:
    """Make fake tensors of a mode on ``DEVICE`` without the time that ``FakeTensor``'s constructor takes.

    The constructor's work (torch 2.11 to 2.14) is done once, on an example whose attributes all others have.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._attributes = dict(FakeTensor(mode, torch.empty(0, device="meta"), DEVICE).__dict__)
        self._device_name = next(name for name, value in self._attributes.items() if value == DEVICE)
        unsafe = mode._allow_unsafe_data_ptr_access
        self._guard: Callable[[torch.Tensor], None] = (
            torch._C._set_warn_deprecated_on_mutable_data_ptr if unsafe else torch._C._set_throw_on_mutable_data_ptr
        )

    def wrap(self, meta: torch.Tensor, device: torch.device = DEVICE) -> FakeTensor:
        """Return ``FakeTensor(mode, meta, device)``."""
        made: Any = torch.Tensor._make_subclass(
            FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=device
        )
        self._guard(made)
        made.__dict__.update(self._attributes)
        made.__dict__[self._device_name] = device
        return made  # type: ignore[no-any-return]

    def like(self, like: torch.Tensor | torch.Size, dtype: torch.dtype) -> FakeTensor:
        """Return a tensor of a shape, or of a tensor's shape and strides; a meta tensor is wrapped as it is."""
        if isinstance(like, torch.Size):
            return self.wrap(torch.empty(like, dtype=dtype, device="meta"))
        if like.is_meta:
            return self.wrap(like)
        return self.wrap(torch.empty_strided(like.size(), like.stride(), dtype=dtype, device="meta"))
