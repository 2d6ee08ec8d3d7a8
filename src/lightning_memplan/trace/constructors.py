"""Place tensors that a step constructs on the fake GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_memplan.step.fake_cuda import DEVICE
from lightning_memplan.trace.known_values import NUMBERS

_FUNCTIONAL = torch._C._TorchDispatchModeKey.FUNCTIONAL


if TYPE_CHECKING:
    from lightning_memplan.trace.recorder import Recorder


class Constructors(TorchFunctionMode):
    """Where tensors are made and moved to, by the user's code.

    What it puts on ``"cuda"`` is put on ``DEVICE``. Tensors that are made of Python's numbers are made on the host by
    torch, which forgets ``DEVICE``'s index there. A fake tensor whose data are replaced is where these are. Values that
    are read all at once, for NumPy or a list, are 0.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def _values(self, tensor: Any) -> torch.Tensor:
        known = tensor.__dict__.get(NUMBERS)
        self._recorder.values_read += known is None
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if known is None else known

    @staticmethod
    def _number(value: float, dtype: torch.dtype) -> Any:
        """What is written to a part of a GPU's tensor is on the host, but where a graph is made.

        Source: torch/csrc/autograd/python_variable_indexing.cpp (2.14).
        """
        return value if torch._C._get_dispatch_mode(_FUNCTIONAL) is not None else torch.tensor(value, dtype=dtype)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ALL_VALUES and isinstance(args[0], FakeTensor) and args[0].device != DEVICE:
            return func(self._values(args[0]).requires_grad_(args[0].requires_grad), *args[1:], **kwargs)
        if func is torch.Tensor.tolist and isinstance(args[0], FakeTensor):
            return self._values(args[0]).tolist()
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": DEVICE}
        if func is torch.Tensor.cuda:
            return args[0].to(DEVICE)
        if func is torch.Tensor.pin_memory and isinstance(args[0], FakeTensor):
            return args[0]  # on the host, pinned or not
        if func == _SET_DATA and isinstance(args[0], FakeTensor) and isinstance(args[1], FakeTensor):
            args[0].fake_device = args[1].fake_device
        if func is torch.Tensor.data_ptr and isinstance(args[0], FakeTensor):
            return args[0].untyped_storage().data_ptr() + args[0].storage_offset() * args[0].element_size()
        if func == _SET_ITEM and type(args[2]) in (bool, int, float) and args[0].device == DEVICE:
            args = (*args[:2], self._number(args[2], args[0].dtype))
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], DEVICE, *args[2:])
        if func not in _FROM_NUMBERS:
            return func(*args, **kwargs)
        of_tensor = func is torch.Tensor.new_tensor
        device = kwargs.get("device", args[0].device if of_tensor else None)
        data = args[1 if of_tensor else 0] if len(args) > of_tensor else kwargs.get("data")
        if isinstance(data, (list, tuple)) and any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(data)):
            data = tree_map(lambda leaf: self._values(leaf) if isinstance(leaf, FakeTensor) else leaf, data)
            args, kwargs = (*args[:of_tensor], data, *args[of_tensor + 1 :]), {**kwargs}
            kwargs.pop("data", None)
        if device is None or torch.device(device) != DEVICE or isinstance(data, torch.Tensor):
            return func(*args, **kwargs)
        grad = kwargs.pop("requires_grad", False)
        made = func(*args, **{**kwargs, "device": "cpu"})
        if torch._C._get_dispatch_mode(_FUNCTIONAL) is None:
            made = made.to(DEVICE)
        else:  # a graph is made, of which a number would be a constant that stays on the host
            made = torch.empty(made.shape, dtype=made.dtype, device=DEVICE)
        return made.requires_grad_() if grad else made


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return type(device) is int or (isinstance(device, str) and device.partition(":")[0] == "cuda")


_ALL_VALUES = frozenset[Any]((torch.Tensor.numpy, torch.Tensor.__array__))


_SET_ITEM = torch.Tensor.__setitem__


_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


_FROM_NUMBERS = frozenset({torch.tensor, torch.as_tensor, torch.Tensor.new_tensor})
