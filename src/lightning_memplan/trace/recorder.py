"""Turn tensors' storages into events, by a dispatch mode."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_memplan.cuda.rule_set import Decomposition, Rules
from lightning_memplan.cuda.sparse import is_sparse, parts
from lightning_memplan.memory.events import EMPTY, FREE, Category, Event, Phase
from lightning_memplan.step.fake_cuda import DEVICE
from lightning_memplan.trace.autograd import EngineSequence
from lightning_memplan.trace.constructors import Constructors
from lightning_memplan.trace.kernel_events import KernelEvents
from lightning_memplan.trace.known_values import NUMBERS, ORIGIN, TRUE, has_numbers

_FAKE = torch._C._TorchDispatchModeKey.FAKE


_HOST = torch.device("cpu")


_RAND = torch.ops.aten.rand.default


_DEVICE_OF = torch.ops.prim.device.default


_ADD = torch.ops.aten.add.Tensor


_TO_COPY = torch.ops.aten._to_copy.default


_EQUAL = torch.ops.aten.equal.default


_CLONE = torch.ops.aten.clone.default


_COALESCE = torch.ops.aten._coalesce.default


#: What is asked of the kernel for tensors without data itself, as views are: torch's fake mode does the same in the
#: end, and takes several times as long
_DIRECT = frozenset(
    {
        torch.ops.aten._unsafe_view.default,
        torch.ops.aten.add.Tensor,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.gelu.default,
        torch.ops.aten.gelu_backward.default,
        torch.ops.aten.mm.default,
        torch.ops.aten.mul.Tensor,
        torch.ops.aten.select_backward.default,
        torch.ops.aten.slice_backward.default,
        torch.ops.aten.sum.dim_IntList,
    }
)


_COUNTS = frozenset({torch.ops.aten.sum.default, torch.ops.aten.sum.dim_IntList, torch.ops.aten.count_nonzero.default})


_READ_VALUE = torch.ops.aten._local_scalar_dense.default


_ALL_TRUE = torch.ops.aten._is_all_true.default


_SAME = torch.ops.aten.eq.Tensor


_NOT = torch.ops.aten.ne.Scalar


_BOTH = frozenset(
    {
        torch.ops.aten.all.default,
        torch.ops.aten.all.dim,
        torch.ops.aten.bitwise_and.Tensor,
        torch.ops.aten.logical_and.default,
        torch.ops.aten.mul.Tensor,
    }
)


_CHECKS = _BOTH | {_ALL_TRUE, _SAME, _NOT}


class Recorder(TorchDispatchMode):
    """Records every block that operators allocate and free on ``DEVICE``, while it is entered.

    ``phase``, ``step``, ``path``, ``category`` and ``stream`` are set by who runs the step, and stamped on each event.
    """

    def __init__(self, mode: FakeTensorMode, rules: Rules) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode
        unsafe = mode._allow_unsafe_data_ptr_access
        self._guard: Callable[[torch.Tensor], None] = (
            torch._C._set_warn_deprecated_on_mutable_data_ptr if unsafe else torch._C._set_throw_on_mutable_data_ptr
        )
        self._attributes = dict(FakeTensor(mode, torch.empty(0, device="meta"), DEVICE).__dict__)
        self._device_name = next(name for name, value in self._attributes.items() if value == DEVICE)
        self.events: list[Event] = []
        self.phase: Phase = "setup"
        self.category: Category = "other"
        self.step = 0
        self.path = ""
        self.stream = 0
        self.values_read = 0  #: how often the step read a value of a tensor, and was given 0
        self.lengths_taken = 0  #: how often a result is as long as values say, and was taken at its longest
        self.numbers: Mapping[int, torch.Tensor] = {}  #: id of a batch's tensor -> the values that stand for its own
        self.numbers_taken = 0  #: how often the step read whole numbers of the batch
        self.knows_buffers = False  #: whether there are buffers whose values are told (see ``tell``)
        self._rules = rules
        self._kernels = KernelEvents(rules, self._see, self._allocate, self._free)
        self._has_sparse = False
        self._counts = False  # whether it was counted how many are true of a mask
        self._unseen = False
        self._stays = True  # whether workspaces that stay are written down
        self._running: set[Any] = set()  # operators whose decomposition runs
        self._constructors = Constructors(self)
        self._storages = _Storages(self)
        self._sequence = EngineSequence(self._constructors)
        self._blocks: dict[int, int | None] = {}  # a live storage's address -> its block, None while it has no bytes
        self._owners: dict[int, int] = {}  # a block -> the number of storages that stand for it
        self._deaths: dict[int, weakref.ref[Any]] = {}
        self._changed: list[weakref.ref[torch.Tensor]] = []  # views that were written to since the last operator
        self._next = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch wraps every dispatch in two Python frames

    # -- what it sees

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE_OF:
            return args[0].device
        kwargs = kwargs or {}
        if torch._C._get_dispatch_mode(_FAKE) is not None:
            return func(*args, **kwargs)  # only shapes are asked for, by a fake mode of someone else's
        if any(map(_is_wrapper, types)):
            return NotImplemented  # a distributed tensor says by itself what is done on this rank
        if func in _COUNTS and args[0].dtype is torch.bool and isinstance(args[0], FakeTensor):
            return self._counted(self._run(func, types, args, kwargs), args[0])
        if not self.numbers and not self._counts and not self.knows_buffers:
            return self._run(func, types, args, kwargs)
        values = self._known(func, args, kwargs)
        origin = None if values is None else self._origin(args, kwargs)
        if values is not None and (func is _READ_VALUE or (func is _TO_COPY and kwargs.get("device") == _HOST)):
            self.numbers_taken += origin == "batch"
            self.lengths_taken += origin == "mask"
            return values
        out = self._run(func, types, args, kwargs)
        if values is not None:
            for made, value in zip(tree_leaves(out), tree_leaves(values), strict=True):
                if isinstance(made, FakeTensor) and not made.is_floating_point():
                    made.__dict__[NUMBERS], made.__dict__[ORIGIN] = value, origin
        return out

    def _run(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        out: Any
        if FakeTensor not in types and kwargs.get("device") != DEVICE:
            if func is _RAND and not args[0]:
                return torch.tensor(1 - 2**-24)  # one number, to leave out a layer by chance: every layer runs
            return func(*args, **kwargs)  # on the host: real tensors, real values
        if func is _READ_VALUE and (args[0].is_floating_point() or args[0].dtype is torch.bool):
            self.values_read += 1
            return TRUE in args[0].__dict__ if args[0].dtype is torch.bool else 0.0
        if func is _EQUAL:
            same = args[0].untyped_storage()._cdata == args[1].untyped_storage()._cdata
            self.values_read += not same and args[0].shape == args[1].shape
            return same
        rules = self._rules
        if func in rules.decompositions and func not in self._running:
            out = self._decompose(rules.decompositions[func], func, args, kwargs)
            if out is not NotImplemented:
                self._record(func, args, kwargs, out)
                return out
        if func in rules.upper_bounds and func not in self._running:
            longest = self._decompose(rules.upper_bounds[func], func, args, kwargs)
            if longest is not NotImplemented:
                self.lengths_taken += 1
                return longest
        sparse = rules.sparse_decompositions.get(func) if self._has_sparse and func not in self._running else None
        if sparse is not None and any(map(is_sparse, args)):
            if func is _CLONE and self.phase == "backward" and sys._getframe(2).f_code is _ENGINE:
                return args[0]  # a parameter's gradient: taken as it is (accumulate_grad.h), a subclass's is copied
            out = self._decompose(sparse, func, args, kwargs)
            if out is not NotImplemented:
                self.lengths_taken += func is _COALESCE
                return out
        in_place = _IN_PLACE.get(func)
        if in_place is None:
            in_place = _IN_PLACE[func] = _is_in_place(func)
        if self._changed and not func.is_view:
            self._regenerate()
        if in_place:  # nothing is made, and there are no values to change
            out = args[0] if func._schema.returns else None
            if self.phase == "forward" and isinstance(args[0], torch.Tensor) and args[0]._is_view():
                self._changed.append(weakref.ref(args[0]))
        elif (made := self._output_metas(func, args, kwargs)) is not None:
            out = made
        elif (func.is_view or func in _DIRECT) and _are_plain(args):
            with in_kernel_invocation_manager(self._mode):
                out = func(*args, **kwargs)
            wrap = partial(self._wrapped, device=args[0].fake_device)
            out = wrap(out) if isinstance(out, torch.Tensor) else type(out)(map(wrap, out))
        else:
            out = self._mode.__torch_dispatch__(func, types, args, kwargs)
            if func is _TO_COPY and kwargs.get("device") == DEVICE and out.device != DEVICE:
                out = self._moved(out)  # of a constant, whose value the fake tensor would keep, on the host
        if (func is _ADD and self._adds_in_place(args)) or (func in _INTO_ZEROS and self._writes_into(func, args)):
            self._take_over(out, args[0])
        elif func in _CHECKS:
            self._check(out, func, args)
        elif func in _ZEROS and self.phase == "backward" and isinstance(out, FakeTensor):
            out.__dict__[_NEW_ZEROS] = True
        self._record(func, args, kwargs, out)
        return out

    def __enter__(self) -> Recorder:
        if not self._running:
            self._constructors.__enter__()  # type: ignore[no-untyped-call]
            self._storages.__enter__()
            self._sequence.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if not self._running:
            self._sequence.__exit__()
            self._storages.__exit__()
            self._constructors.__exit__(*error)  # type: ignore[no-untyped-call]

    def adopt(self, tensor: torch.Tensor) -> None:
        """Record a tensor that was made outside: a parameter, a buffer, a batch."""
        self._see(tensor, None)

    def resize(self, storage: torch.UntypedStorage, size: int) -> None:
        """Record that a storage is given other bytes, or none: so wrappers hold parameters while they are needed."""
        key = storage._cdata
        if key not in self._blocks:
            return
        before, block = self._blocks[key], None
        if size:
            block = self._next
            self._next += 1
            self._write(block, size, "communication", None)
            self._owners[block] = 1
        self._blocks[key] = block
        self._release(before)

    def empty_cache(self) -> None:
        """Record that all that is cached goes back to the card."""
        self.events.append(Event(-1, EMPTY, self.phase, self.step))

    @contextmanager
    def unseen(self, *, workspaces: bool = False) -> Iterator[None]:
        """What is made in the meantime is in no block (inside a fused kernel), unless it is revealed."""
        before = self._unseen, self._stays
        self._unseen, self._stays = True, workspaces
        try:
            yield
        finally:
            self._unseen, self._stays = before

    @contextmanager
    def pool(self, stream: int, *, workspaces: bool) -> Iterator[None]:
        """What is made in the meantime is in a pool of its own, as if of another stream."""
        before, kept = self.stream, self._kernels.workspaces
        self.stream, self._kernels.workspaces = stream, kept if workspaces else {}
        try:
            yield
        finally:
            self.stream, self._kernels.workspaces = before, kept

    def reveal(self, tensor: torch.Tensor) -> None:
        """Record a tensor that was made unseen."""
        key = tensor.untyped_storage()._cdata
        if key in self._blocks and self._blocks[key] is None and tensor.untyped_storage().nbytes():
            self._blocks[key] = block = self._next
            self._next += 1
            self._write(block, tensor.untyped_storage().nbytes(), self.category, None)
            self._owners[block] = 1

    def take_and_give_back(self, size: int) -> None:
        """Record a block that is freed before anything else happens."""
        self._write(self._next, size, "workspaces", None)
        self._write(self._next, -1, "other", None)
        self._next += 1

    def label(self, tensor: Any, category: Category) -> None:
        """Say afterwards which kind of memory a tensor has; nothing, if it has none on ``DEVICE``."""
        storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
        block = None if storage is None else self._blocks.get(storage._cdata)
        for place in range(len(self.events) - 1, -1, -1) if block is not None else ():
            if self.events[place].block == block:
                self.events[place] = self.events[place]._replace(category=category)
                return

    def stop(self) -> None:
        """Write nothing more: what is freed from here on is the end of the recording."""
        self._deaths.clear()
        self._blocks.clear()

    # -- how it writes it down

    def _known(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What an operator gives for whole numbers of the batch, on the host; None where it is not known."""
        if func is _TO_COPY and id(args[0]) in self.numbers:
            return self.numbers[id(args[0])].clone()
        if not any(map(has_numbers, args)):
            return None
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = all(has_numbers(leaf) or not isinstance(leaf, FakeTensor) for leaf in leaves)
        if not known or torch.Tag.nondeterministic_seeded in func.tags:
            for leaf in filter(has_numbers, leaves if func._schema.is_mutable else ()):
                del leaf.__dict__[NUMBERS]
            return None

        def on_host(value: Any) -> Any:
            if isinstance(value, FakeTensor):
                return value.__dict__[NUMBERS]
            return _HOST if isinstance(value, torch.device) else value

        return func(*tree_map(on_host, args), **tree_map(on_host, dict(kwargs)))

    def _origin(self, args: Any, kwargs: Any) -> str:
        """Where the values are from that an operator is given: the batch, a count of a mask, or what is known for sure
        (a buffer)."""
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        found = {"batch" if id(leaf) in self.numbers else leaf.__dict__.get(ORIGIN, "") for leaf in leaves}
        return next((origin for origin in ("batch", "mask") if origin in found), "")

    def _counted(self, out: Any, mask: torch.Tensor) -> Any:
        """How many are true: all of them, where it is asked for."""
        self._counts = True
        out.__dict__[NUMBERS] = torch.full(out.shape, mask.numel() // max(1, out.numel()))
        out.__dict__[ORIGIN] = "mask"
        return out

    def _check(self, out: Any, func: Any, args: Sequence[Any]) -> None:
        """Note what is true of all numbers: that they are finite, and what is checked to go on.

        Source: aten/src/ATen/native/TensorCompare.cpp, ``isfinite``; torch/distributions/distribution.py (2.14).
        """
        if isinstance(out, FakeTensor) and out.dtype is torch.bool:
            both = func in _BOTH and all(TRUE in a.__dict__ for a in args if isinstance(a, torch.Tensor))
            same = func is _SAME and args[0] is args[1]
            if both or same or func is _ALL_TRUE or (func is _NOT and args[1] == math.inf):
                out.__dict__[TRUE] = True

    def _write(self, block: int, size: int, category: Category, func: Any) -> None:
        self.events.append(Event(block, size, self.phase, self.step, category, self.path, func, self.stream))

    def _see(self, tensor: torch.Tensor, func: Any, width: int | None = None) -> None:
        if tensor.device != DEVICE:
            return
        if is_sparse(tensor):
            self._has_sparse = True
            for part in parts(tensor):
                self._see(part, func)
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self._blocks:
            return
        size = storage.nbytes() if width is None else tensor.numel() * width
        if not size:
            return
        if self._unseen:
            self._own(storage, None)
            return
        block = self._next
        self._next += 1
        self._write(block, size, self.category, func)
        self._own(storage, block)

    def _allocate(self, size: int, category: Category, func: Any, rule: tuple[str | int, ...] = ()) -> int:
        block = self._next
        self._next += 1
        self.events.append(Event(block, size, self.phase, self.step, category, self.path, func, self.stream, rule))
        return block

    def _free(self, block: int, func: Any) -> None:
        self._write(block, FREE, "other", func)

    def _record(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Record what an operator allocates."""
        if self._unseen:
            self._kernels.see_outputs(func, out)
        else:
            self._kernels.record(func, args, kwargs, out)
        if self._stays:
            self._kernels.keep_workspace(func, torch._C._current_graph_task_id() != -1)

    def _moved(self, constant: torch.Tensor) -> FakeTensor:
        return self._like(constant, constant.dtype)

    def _like(self, like: torch.Tensor | torch.Size, dtype: torch.dtype) -> FakeTensor:
        if isinstance(like, torch.Size):
            return self._wrapped(torch.empty(like, dtype=dtype, device="meta"))
        if like.is_meta:
            return self._wrapped(like)
        return self._wrapped(torch.empty_strided(like.size(), like.stride(), dtype=dtype, device="meta"))

    def _wrapped(self, meta: torch.Tensor, device: torch.device = DEVICE) -> FakeTensor:
        """``FakeTensor(mode, meta, device)``, without the time that its constructor takes (torch 2.11 to 2.14)."""
        made: Any = torch.Tensor._make_subclass(
            FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=device
        )
        self._guard(made)
        made.__dict__.update(self._attributes)
        made.__dict__[self._device_name] = device
        return made  # type: ignore[no-any-return]

    def _output_metas(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what an operator gives by the rule of its outputs; None where the fake kernel must say."""
        rule = self._rules.output_metas.get(func)
        if rule is None:
            return None
        first = args[0][0] if isinstance(args[0], list) else args[0]
        if getattr(first, "device", None) != DEVICE:
            return None
        metas = rule(*args, **kwargs)
        if metas is None:
            return None
        made = [None if meta is None else self._like(meta.like, meta.dtype) for meta in metas]
        several = len(func._schema.returns) > 1 or str(func._schema.returns[0].type) == "List[Tensor]"
        return made if several else made[0]

    def _decompose(self, rule: Decomposition, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what an operator gives by other operators, which are recorded in its place."""
        self._running.add(func)
        try:
            with self:
                return rule(*args, **kwargs)
        finally:
            self._running.discard(func)

    def _own(self, storage: torch.UntypedStorage, block: int | None) -> None:
        key = storage._cdata
        self._blocks[key] = block
        if block is not None:
            self._owners[block] = self._owners.get(block, 0) + 1

        def died(_: object, key: int = key) -> None:
            del self._deaths[key]
            self._release(self._blocks.pop(key))

        self._deaths[key] = weakref.ref(storage, died)

    def _release(self, block: int | None) -> None:
        if block is None:
            return
        self._owners[block] -= 1
        if not self._owners[block]:
            del self._owners[block]
            self._write(block, -1, "other", None)

    # -- autograd's own allocations

    def _regenerate(self) -> None:
        """A view that was written to gets a gradient function anew, which copies the gradient.

        torch/csrc/autograd/variable.cpp (2.15), ``VariableHooks::grad_fn``: ``AsStridedBackward``, which lays the
        gradient into zeros of the whole base; a tensor subclass repeats the operator that made the view.
        """
        changed, self._changed = self._changed, []
        for view in (reference() for reference in changed):
            if view is not None and view.requires_grad and view.grad_fn is not None:
                view.grad_fn.register_hook(_into_zeros)

    def _adds_in_place(self, args: Sequence[Any]) -> bool:
        """Whether autograd is adding up gradients, which it does in place where it may.

        torch/csrc/autograd/input_buffer.cpp (``can_accumulate_inplace``) leaves tensor subclasses out, and a fake
        tensor is one; on a GPU the first gradient's memory is reused, if nothing else holds it.
        """
        if self.phase != "backward" or len(args) != 2 or not isinstance(args[1], torch.Tensor):
            return False
        if sys._getframe(3).f_code is not _ENGINE:
            return False
        first = args[0]
        return bool(first.is_contiguous() or _dense(first)) and _sole_owner(first)

    def _writes_into(self, func: Any, args: Sequence[Any]) -> bool:
        """Whether a gradient is written into new zeros: in place on a GPU, out of place for tensor subclasses.

        torch/csrc/autograd/FunctionsManual.cpp (2.15), ``areAnyTensorSubclassLike``: the backward formulas of indexing,
        gather, max, sort and topk. What index_put has overwritten becomes zero in a copy, on a GPU as well.
        """
        overwrites = func is _INDEX_PUT and not (len(args) > 3 and args[3])
        made = _NEW_ZEROS in args[0].__dict__ and not overwrites
        return self.phase == "backward" and made and _sole_owner(args[0])

    def _take_over(self, out: torch.Tensor, first: torch.Tensor) -> None:
        block = self._blocks.get(first.untyped_storage()._cdata)
        if block is not None:
            self._own(out.untyped_storage(), block)


_NEW_ZEROS = "_memplan_zeros"  # a fake tensor's attribute: it was made of zeros


def _are_plain(args: Sequence[Any]) -> bool:
    """Whether all tensors among an operator's arguments, the first of which is one, are fake, and on one device."""
    device = getattr(args[0], "fake_device", None)
    return device is not None and all(
        not isinstance(arg, torch.Tensor)
        or (isinstance(arg, FakeTensor) and arg.constant is None and arg.fake_device == device)
        for arg in args
    )


def _into_zeros(grads: Sequence[torch.Tensor | None], given: Sequence[torch.Tensor | None]) -> Any:
    kept = {t.untyped_storage()._cdata for t in given if t is not None}
    return tuple(
        torch.zeros_like(grad) if grad is not None and grad.untyped_storage()._cdata in kept else grad for grad in grads
    )


@cache
def _is_wrapper(kind: type) -> bool:
    """Whether tensors of this kind hold others, on which their operators work (DTensor)."""
    return hasattr(kind, "__tensor_flatten__")


_IN_PLACE: dict[Any, bool] = {}


def _is_in_place(func: Any) -> bool:
    """Whether an operator only changes the values of its first argument: neither its shape, nor its memory."""
    schema = func._schema
    name = schema.name.removeprefix("aten::")
    if not name.endswith("_") or not schema.arguments or torch.Tag.inplace_view in func.tags:
        return False
    written = schema.arguments[0].alias_info
    return (
        name not in ("resize_", "resize_as_", "resize_as_sparse_", "set_", "rename_", "_coalesced_")
        and written is not None
        and written.is_write
        and len(schema.returns) <= 1
    )


def _dense(tensor: torch.Tensor) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense.default(tensor))


def _sole_owner(tensor: torch.Tensor) -> bool:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)) <= 2


_ENGINE = torch.autograd.graph._engine_run_backward.__code__


_ZEROS = frozenset({torch.ops.aten.zeros.default, torch.ops.aten.new_zeros.default, torch.ops.aten.zeros_like.default})


_INDEX_PUT = torch.ops.aten.index_put.default


_INTO_ZEROS = frozenset(
    {
        _INDEX_PUT,
        torch.ops.aten.index_add.default,
        torch.ops.aten.scatter.src,
        torch.ops.aten.scatter.value,
        torch.ops.aten.scatter_add.default,
        torch.ops.aten.masked_scatter.default,
    }
)


class _Storages:
    """While it is entered, a storage that is resized says so, and is told apart from others by its address.

    Source: torch/distributed/fsdp/_flat_param.py and torch/distributed/utils.py (``_alloc_storage``, ``_free_storage``;
    2.14), which gather parameters into a storage that has bytes only while they are needed.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __enter__(self) -> None:
        recorder, kind = self._recorder, torch.UntypedStorage
        resize, address = self._before = kind.resize_, kind.data_ptr

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            resized = resize(storage, size)
            recorder.resize(storage, size)
            return resized

        def data_ptr(storage: torch.UntypedStorage) -> int:
            if storage.device.type != "meta":
                return address(storage)
            return storage._cdata if storage.nbytes() else 0

        kind.resize_, kind.data_ptr = resize_, data_ptr  # type: ignore[method-assign, assignment]

    def __exit__(self) -> None:
        torch.UntypedStorage.resize_, torch.UntypedStorage.data_ptr = self._before  # type: ignore[method-assign]
