"""The dispatch mode that turns tensors' storages into events.

It only intercepts: sizes, categories and tables are made elsewhere. Tensors are fake (they have a shape and a storage
of known size, but no data) and lie on ``DEVICE``, a CPU device with an index. An ordinary CPU tensor's device has
none, so what the user's code leaves on the host is told apart from what it puts on the device, and mixing the two is
the error that it is on a GPU.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_memplan._kernels import kernel_bytes
from lightning_memplan._types import Category, Event, Phase

DEVICE = torch.device("cpu", 0)  #: where traced tensors lie: the stand-in for the GPU


class Rules(NamedTuple):
    """What the GPU's kernels allocate that a fake tensor's do not show. Each is keyed by the operator."""

    #: bytes that the kernel allocates beside its outputs, and frees when it returns
    temporaries: Mapping[Any, Callable[[Sequence[Any], Mapping[str, Any], Any], Sequence[int | tuple[Any, ...]]]] = {}
    #: name and bytes of a workspace that the first call in a thread allocates, and that stays
    workspaces: Mapping[Any, tuple[str, int]] = {}
    #: output -> bytes of one of its elements, where that differs from the fake tensor's
    widths: Mapping[Any, Mapping[int, int]] = {}
    #: the order in which the outputs are allocated, where it is not theirs
    order: Mapping[Any, Sequence[int]] = {}


_DEVICE_OF = torch.ops.prim.device.default
_ADD = torch.ops.aten.add.Tensor
_READ_VALUE = torch.ops.aten._local_scalar_dense.default


class Recorder(TorchDispatchMode):
    """Records every block that operators allocate and free on ``DEVICE``, while it is entered.

    ``phase``, ``step``, ``path`` and ``category`` are set by who runs the step, and stamped on each event.
    """

    def __init__(self, mode: FakeTensorMode, rules: Rules) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode
        self.events: list[Event] = []
        self.phase: Phase = "setup"
        self.category: Category = "other"
        self.step = 0
        self.path = ""
        self.values_read = 0  #: how often the step read a value of a tensor, and was given 0
        self._temporaries = rules.temporaries
        self._workspaces = rules.workspaces
        self._widths = rules.widths
        self._order = rules.order
        self._made: set[tuple[str, bool]] = set()
        self._blocks: dict[int, int] = {}  # a live storage's address -> its block
        self._owners: dict[int, int] = {}  # a block -> the number of storages that stand for it
        self._deaths: dict[int, weakref.ref[Any]] = {}
        self._next = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch wraps every dispatch in two Python frames

    # -- what it sees

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE_OF:
            return args[0].device
        kwargs = kwargs or {}
        if FakeTensor not in types and kwargs.get("device") != DEVICE:
            return func(*args, **kwargs)  # on the host: real tensors, real values
        if func is _READ_VALUE and args[0].is_floating_point():
            self.values_read += 1
            return 0.0
        out: Any = self._mode.__torch_dispatch__(func, types, args, kwargs)
        if func is _ADD and self._adds_in_place(args):
            self._take_over(out, args[0])
            return out
        if type(out) is torch.Tensor or isinstance(out, torch.Tensor):
            self._see(out, func)
        elif out is not None:
            widths = self._widths.get(func, {})
            leaves = out if isinstance(out, (tuple, list)) else tree_leaves(out)
            for k in self._order.get(func) or range(len(leaves)):
                leaf = leaves[k]
                if isinstance(leaf, torch.Tensor):
                    self._see(leaf, func, widths.get(k))
                elif isinstance(leaf, (list, tuple)):
                    for inner in leaf:
                        if isinstance(inner, torch.Tensor):
                            self._see(inner, func)
        rule = self._temporaries.get(func)
        if rule is not None:
            self._pass(rule(args, kwargs, out), func)
        workspace = self._workspaces.get(func)
        if workspace is not None:
            self._stay(workspace, func)
        return out

    def adopt(self, tensor: torch.Tensor) -> None:
        """Record a tensor that was made outside: a parameter, a buffer, a batch."""
        self._see(tensor, None)

    def stop(self) -> None:
        """Write nothing more: what is freed from here on is the end of the recording."""
        self._deaths.clear()

    # -- how it writes it down

    def _write(self, block: int, size: int, category: Category, func: Any) -> None:
        self.events.append(Event(block, size, self.phase, self.step, category, self.path, func))

    def _see(self, tensor: torch.Tensor, func: Any, width: int | None = None) -> None:
        if tensor.device != DEVICE:
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self._blocks:
            return
        size = storage.nbytes() if width is None else tensor.numel() * width
        if not size:
            return
        block = self._next
        self._next += 1
        self._write(block, size, self.category, func)
        self._own(storage, block)

    def _own(self, storage: torch.UntypedStorage, block: int) -> None:
        key = storage._cdata
        self._blocks[key] = block
        self._owners[block] = self._owners.get(block, 0) + 1

        def died(_: object, key: int = key, block: int = block) -> None:
            del self._blocks[key], self._deaths[key]
            self._owners[block] -= 1
            if not self._owners[block]:
                del self._owners[block]
                self._write(block, -1, "other", None)

        self._deaths[key] = weakref.ref(storage, died)

    def _pass(self, sizes: Sequence[int | tuple[Any, ...]], func: Any) -> None:
        first = self._next
        self._next += len(sizes)
        for k, size in enumerate(sizes):
            rule = size if isinstance(size, tuple) else ()
            size = kernel_bytes(size) if isinstance(size, tuple) else size
            self.events.append(Event(first + k, size, self.phase, self.step, "temporaries", self.path, func, rule=rule))
        for k in range(len(sizes)):
            self._write(first + k, -1, "other", func)

    def _stay(self, workspace: tuple[str, int], func: Any) -> None:
        name, size = workspace
        made = (name, self.phase == "backward")  # autograd's thread has handles of its own
        if made not in self._made:
            self._made.add(made)
            self._write(self._next, size, "workspaces", func)
            self._next += 1

    # -- autograd's sums of gradients

    def _adds_in_place(self, args: Sequence[Any]) -> bool:
        """Whether autograd is adding up gradients, which it does in place where it may.

        torch/csrc/autograd/input_buffer.cpp (``can_accumulate_inplace``) leaves tensor subclasses out, and a fake
        tensor is one; on a GPU the first gradient's memory is reused, if nothing else holds it.
        """
        if self.phase != "backward" or len(args) != 2 or not isinstance(args[1], torch.Tensor):
            return False
        if sys._getframe(2).f_code is not _ENGINE:
            return False
        first = args[0]
        return bool(first.is_contiguous() or _dense(first)) and _sole_owner(first)

    def _take_over(self, out: torch.Tensor, first: torch.Tensor) -> None:
        block = self._blocks.get(first.untyped_storage()._cdata)
        if block is not None:
            self._own(out.untyped_storage(), block)


def _dense(tensor: torch.Tensor) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense.default(tensor))


def _sole_owner(tensor: torch.Tensor) -> bool:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)) <= 2


_ENGINE = torch.autograd.graph._engine_run_backward.__code__


class HasPath(Protocol):
    """What is told which submodule is running."""

    path: str


@contextmanager
def module_paths(module: torch.nn.Module, recorder: HasPath) -> Iterator[None]:
    """Stamp events with the dotted name of the submodule whose forward is running."""
    stack: list[str] = []
    handles = []
    for path, child in module.named_modules():

        def enter(_: Any, __: Any, path: str = path) -> None:
            stack.append(recorder.path)
            recorder.path = path

        def leave(_: Any, __: Any, ___: Any) -> None:
            recorder.path = stack.pop() if stack else ""

        handles.append(child.register_forward_pre_hook(enter))
        handles.append(child.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def labelled(events: Sequence[Event]) -> tuple[Event, ...]:
    """Events with their final categories, and operators as text.

    What the backward pass makes and the optimizer's step still finds is a gradient; what a forward pass makes and frees
    itself is a temporary; what an optimizer's step makes and leaves is its state.
    """
    freed: dict[int, Event] = {e.block: e for e in events if e.is_free}
    names: dict[Any, str] = {}
    result = []
    for e in events:
        category = e.category
        if not e.is_free and e.step:
            end = freed.get(e.block)
            same_phase = end is not None and (end.step, end.phase) == (e.step, e.phase)
            if category == "activations" and same_phase:
                category = "temporaries"
            elif e.phase == "backward" and category == "temporaries" and not same_phase:
                category = "gradients"
            elif e.phase == "optimizer" and category in ("optimizer", "temporaries"):
                category = "temporaries" if end is not None else "optimizer"
        op = names.get(e.op)
        if op is None:
            op = names[e.op] = "" if e.op is None else str(e.op)
        result.append(e._replace(category=category, op=op))
    return tuple(result)
