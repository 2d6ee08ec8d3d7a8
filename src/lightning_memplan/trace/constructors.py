"""Place tensors that a step constructs on the fake GPU, and give their values to Python."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_memplan.step.fake_cuda import DEVICE
from lightning_memplan.trace.fake_tensors import is_graph_made
from lightning_memplan.trace.known_values import KnownValues

_ALL_VALUES = frozenset[Any]((torch.Tensor.numpy, torch.Tensor.__array__))
_SET_ITEM = torch.Tensor.__setitem__
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_FROM_NUMBERS = frozenset({torch.tensor, torch.as_tensor, torch.Tensor.new_tensor})


class Constructors(TorchFunctionMode):
    """See where the user's code makes tensors and moves them to.

    Tensors for ``"cuda"`` are put on ``DEVICE``. torch makes tensors of Python's numbers on the host, where it forgets
    ``DEVICE``'s index; they are moved. A fake tensor whose data are replaced is where its new data are. All values at
    once, for NumPy or a list, are those that ``values`` knows, or 0.
    """

    def __init__(self, values: KnownValues) -> None:
        super().__init__()
        self._values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ALL_VALUES and isinstance(args[0], FakeTensor) and args[0].device != DEVICE:
            return func(self._values.all_of(args[0]).requires_grad_(args[0].requires_grad), *args[1:], **kwargs)
        if func is torch.Tensor.tolist and isinstance(args[0], FakeTensor):
            return self._values.all_of(args[0]).tolist()
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
            args = (*args[:2], _number(args[2], args[0].dtype))
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], DEVICE, *args[2:])
        return self._from_numbers(func, args, kwargs) if func in _FROM_NUMBERS else func(*args, **kwargs)

    def _from_numbers(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        of_tensor = func is torch.Tensor.new_tensor
        device = kwargs.get("device", args[0].device if of_tensor else None)
        data = args[1 if of_tensor else 0] if len(args) > of_tensor else kwargs.get("data")
        if isinstance(data, (list, tuple)) and any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(data)):
            data = tree_map(lambda leaf: self._values.all_of(leaf) if isinstance(leaf, FakeTensor) else leaf, data)
            args, kwargs = (*args[:of_tensor], data, *args[of_tensor + 1 :]), {**kwargs}
            kwargs.pop("data", None)
        if device is None or torch.device(device) != DEVICE or isinstance(data, torch.Tensor):
            return func(*args, **kwargs)
        grad = kwargs.pop("requires_grad", False)
        made = func(*args, **{**kwargs, "device": "cpu"})
        # in a graph, numbers would be a constant that stays on the host
        made = torch.empty(made.shape, dtype=made.dtype, device=DEVICE) if is_graph_made() else made.to(DEVICE)
        return made.requires_grad_() if grad else made


def _number(value: float, dtype: torch.dtype) -> Any:
    """Return a number that is written to a part of a GPU's tensor: a tensor of the host, but where a graph is made.

    Source: torch/csrc/autograd/python_variable_indexing.cpp (2.14).
    """
    return value if is_graph_made() else torch.tensor(value, dtype=dtype)


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return type(device) is int or (isinstance(device, str) and device.partition(":")[0] == "cuda")
