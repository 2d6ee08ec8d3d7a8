"""Turn operators into events: a dispatch mode that records which blocks they allocate and free."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_memplan.cuda.rule_set import Decomposition, Rules
from lightning_memplan.cuda.shapes import is_elementwise, relaid
from lightning_memplan.cuda.sparse import is_sparse, parts
from lightning_memplan.memory.events import EMPTY, FREE, Category, Event
from lightning_memplan.step.context import EventContext
from lightning_memplan.step.fake_cuda import DEVICE
from lightning_memplan.trace.autograd import EngineSequence, GradientAccumulation, in_backward, is_engine
from lightning_memplan.trace.constructors import Constructors
from lightning_memplan.trace.fake_tensors import FakeFactory, are_plain, is_fake_mode_active
from lightning_memplan.trace.kernel_events import KernelEvents
from lightning_memplan.trace.known_values import CHECKS, COUNTS, READS, KnownValues, attach, mark_true, run_on_host
from lightning_memplan.trace.storages import ResizedStorages, key_of

_DEVICE_OF = torch.ops.prim.device.default
_TO_COPY = torch.ops.aten._to_copy.default
_CLONE = torch.ops.aten.clone.default
_COALESCE = torch.ops.aten._coalesce.default

#: Operators whose result is asked of the meta kernel itself, as views are: torch's fake mode gives the same, and takes
#: several times as long
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


class Recorder(EventContext, TorchDispatchMode):
    """Record every block that operators allocate and free on ``DEVICE``, while it is entered.

    Each event is stamped with where the step is. A block is there as long as a storage that stands for it.
    """

    def __init__(self, mode: FakeTensorMode, rules: Rules, gradients: GradientAccumulation | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.values = KnownValues()
        self._mode = mode
        self._fakes = FakeFactory(mode)
        self._gradients = gradients or GradientAccumulation()
        self._constructors = Constructors(self.values)
        self._storages = ResizedStorages(self.resize)
        self._sequence = EngineSequence(self._constructors)
        self._rules = rules
        self._kernels = KernelEvents(rules, self._see, self._allocate, self._free)
        self._has_sparse = False  # tensors on ``DEVICE``
        self._unseen = False  # tensors that are made are in no block
        self._stays = True  # workspaces that stay are recorded
        self._running: set[Any] = set()  # operators whose decomposition runs
        self._blocks: dict[int, int | None] = {}  # a live storage's key -> its block, None while it has no bytes
        self._owners: dict[int, int] = {}  # a block -> the number of storages that stand for it
        self._deaths: dict[int, weakref.ref[Any]] = {}
        self._next = 0

    @property
    def lengths_taken(self) -> int:
        """Number of results whose length depends on values, made at their greatest length."""
        return self.values.lengths_taken

    @lengths_taken.setter
    def lengths_taken(self, count: int) -> None:
        self.values.lengths_taken = count

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch wraps every dispatch in two Python frames

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

    # -- dispatch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE_OF:
            return args[0].device
        kwargs = kwargs or {}
        if is_fake_mode_active():
            return func(*args, **kwargs)
        if any(map(_is_wrapper, types)):
            return NotImplemented  # a distributed tensor says by itself which operators run on this rank
        by_engine = self.phase == "backward" and is_engine(sys._getframe(1))
        if func in COUNTS and args[0].dtype is torch.bool and isinstance(args[0], FakeTensor):
            return self.values.count(self._run(func, types, args, kwargs, by_engine), args[0])
        known = self.values.follow(func, args, kwargs)
        if known is not None and self.values.take(func, kwargs, known):
            return known.result
        out = self._run(func, types, args, kwargs, by_engine)
        if known is not None:
            attach(out, known)
        return out

    def _run(self, func: Any, types: Any, args: Any, kwargs: Any, by_engine: bool) -> Any:
        if FakeTensor not in types and kwargs.get("device") != DEVICE:
            return run_on_host(func, args, kwargs)
        if func in READS:
            out = self.values.read(func, args)
            if out is not NotImplemented:
                return out
        rules = self._rules
        if func in rules.decompositions and func not in self._running:
            out = self._decompose(rules.decompositions[func], func, args, kwargs)
            if out is not NotImplemented:
                self._record(func, args, kwargs, out)
                return out
        if func in rules.upper_bounds and func not in self._running:
            longest = self._decompose(rules.upper_bounds[func], func, args, kwargs)
            if longest is not NotImplemented:
                self.values.lengths_taken += 1
                return longest
        sparse = rules.sparse_decompositions.get(func) if self._has_sparse and func not in self._running else None
        if sparse is not None and any(map(is_sparse, args)):
            if func is _CLONE and by_engine:
                return args[0]  # a parameter's gradient: taken as it is (accumulate_grad.h), a subclass's is copied
            out = self._decompose(sparse, func, args, kwargs)
            if out is not NotImplemented:
                self.values.lengths_taken += func is _COALESCE
                return out
        if not func.is_view:
            self._gradients.regenerate()
        out = self._compute(func, types, args, kwargs)
        if self.phase == "backward" and self._gradients.reuses_first(func, args, by_engine):
            if out.shape == args[0].shape and out.stride() != args[0].stride():
                out = self._fakes.like(args[0], out.dtype)
            self._take_over(out, args[0])
        elif func in CHECKS:
            mark_true(out, func, args)
        elif self.phase == "backward":
            self._gradients.mark_zeros(func, out)
        self._record(func, args, kwargs, out)
        return out

    def _compute(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Return an operator's result, by the cheapest way that gives its shapes."""
        in_place = _IN_PLACE.get(func)
        if in_place is None:
            in_place = _IN_PLACE[func] = _is_in_place(func)
        if in_place:  # nothing is made, and there are no values to change
            if self.phase == "forward":
                self._gradients.mark_written(args[0])
            return args[0] if func._schema.returns else None
        if (made := self._output_metas(func, args, kwargs)) is not None:
            return made
        if (func.is_view or func in _DIRECT) and are_plain(args):
            with in_kernel_invocation_manager(self._mode):
                meta = func(*args, **kwargs)
            wrap = partial(self._fakes.wrap, device=args[0].fake_device)
            out: Any = wrap(meta) if isinstance(meta, torch.Tensor) else type(meta)(map(wrap, meta))
        else:
            out = self._mode.__torch_dispatch__(func, types, args, kwargs)
        if is_elementwise(func) and out.device == DEVICE and (meta := relaid(func, args, kwargs, out)) is not None:
            return self._fakes.like(meta.like, meta.dtype)
        if func is _TO_COPY and kwargs.get("device") == DEVICE and out.device != DEVICE:
            return self._fakes.like(out, out.dtype)  # of a constant, whose value the fake tensor would keep on the host
        return out

    # -- what others tell it

    def adopt(self, tensor: torch.Tensor) -> None:
        """Record a tensor that was made outside: a parameter, a buffer, a batch."""
        self._see(tensor, None)

    def resume(self, other: Recorder, storages: Mapping[int, torch.UntypedStorage]) -> None:
        """Go on where another recorder is: with its events, and with copies of its ``storages``, by their keys."""
        self.events, self._next, self._has_sparse = list(other.events), other._next, other._has_sparse
        self._kernels.kept |= other._kernels.kept
        for key, block in other._blocks.items():
            if key in storages:
                self._own(storages[key], block)
            elif block is not None:  # nothing of a copy refers to it: it stays
                self._owners[block] = self._owners.get(block, 0) + 1

    def resize(self, storage: torch.UntypedStorage, size: int) -> None:
        """Record that a storage gets other bytes, or none: so wrappers hold parameters while they are needed."""
        key = key_of(storage)
        if key not in self._blocks:
            return
        before, block = self._blocks[key], None
        if size:
            block = self._allocate(size, "communication", None)
            self._owners[block] = 1
        self._blocks[key] = block
        self._release(before)

    def empty_cache(self) -> None:
        """Record that the allocator returns its cache to the GPU."""
        self.events.append(Event(-1, EMPTY, self.phase, self.step))

    @contextmanager
    def unseen(self, *, workspaces: bool = False) -> Iterator[None]:
        """Put tensors that are made meanwhile in no block (inside a fused kernel), until they are revealed."""
        before = self._unseen, self._stays
        self._unseen, self._stays = True, workspaces
        try:
            yield
        finally:
            self._unseen, self._stays = before

    @contextmanager
    def pool(self, stream: int) -> Iterator[None]:
        """Put blocks that are made meanwhile in a pool of their own, as if on another stream."""
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def reveal(self, tensor: torch.Tensor) -> None:
        """Record a tensor that was made unseen."""
        key = key_of(tensor.untyped_storage())
        if key in self._blocks and self._blocks[key] is None and tensor.untyped_storage().nbytes():
            self._blocks[key] = block = self._allocate(tensor.untyped_storage().nbytes(), self.category, None)
            self._owners[block] = 1

    def take_and_give_back(self, size: int) -> None:
        """Record a block that is freed before anything else happens."""
        self._free(self._allocate(size, "workspaces", None), None)

    def label(self, tensor: Any, category: Category) -> None:
        """Say afterwards which kind of memory a tensor has; nothing, if it has none on ``DEVICE``."""
        storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
        block = None if storage is None else self._blocks.get(key_of(storage))
        for place in range(len(self.events) - 1, -1, -1) if block is not None else ():
            if self.events[place].block == block:
                self.events[place] = self.events[place]._replace(category=category)
                return

    def stop(self) -> None:
        """Record nothing more: frees from here on are the end of the recording."""
        self._deaths.clear()
        self._blocks.clear()

    # -- ownership

    def _allocate(self, size: int, category: Category, func: Any, rule: tuple[str | int, ...] = ()) -> int:
        block = self._next
        self._next += 1
        self.events.append(Event(block, size, self.phase, self.step, category, self.path, func, self.stream, rule))
        return block

    def _free(self, block: int, func: Any) -> None:
        self.events.append(Event(block, FREE, self.phase, self.step, "other", self.path, func, self.stream))

    def _see(self, tensor: torch.Tensor, func: Any, width: int | None = None) -> None:
        """Record the block of a tensor on ``DEVICE`` that has none yet; ``width`` replaces its elements' bytes."""
        if tensor.device != DEVICE:
            return
        if is_sparse(tensor):
            self._has_sparse = True
            for part in parts(tensor):
                self._see(part, func)
            return
        storage = tensor.untyped_storage()
        if key_of(storage) in self._blocks:
            return
        size = storage.nbytes() if width is None else tensor.numel() * width
        if size:
            self._own(storage, None if self._unseen else self._allocate(size, self.category, func))

    def _own(self, storage: torch.UntypedStorage, block: int | None) -> None:
        key = key_of(storage)
        self._blocks[key] = block
        if block is not None:
            self._owners[block] = self._owners.get(block, 0) + 1

        def died(_: object, key: int = key) -> None:
            del self._deaths[key]
            self._release(self._blocks.pop(key))

        self._deaths[key] = weakref.ref(storage, died)

    def _take_over(self, out: torch.Tensor, first: torch.Tensor) -> None:
        """Let a result stand for the block of an operator's first argument."""
        block = self._blocks.get(key_of(first.untyped_storage()))
        if block is not None:
            self._own(out.untyped_storage(), block)

    def _release(self, block: int | None) -> None:
        if block is None:
            return
        self._owners[block] -= 1
        if not self._owners[block]:
            del self._owners[block]
            self._free(block, None)

    # -- CUDA's rules

    def _record(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Record what an operator allocates."""
        if self._unseen:
            self._kernels.see_outputs(func, out)
        else:
            self._kernels.record(func, args, kwargs, out)
        if self._stays:
            self._kernels.keep_workspace(func, in_backward())

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
        made = [None if meta is None else self._fakes.like(meta.like, meta.dtype) for meta in metas]
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


_IN_PLACE: dict[Any, bool] = {}


@cache
def _is_wrapper(kind: type) -> bool:
    """Check for a tensor class that holds other tensors, on which its operators work (DTensor)."""
    return hasattr(kind, "__tensor_flatten__")


def _is_in_place(func: Any) -> bool:
    """Check that an operator only changes the values of its first argument: neither its shape, nor its memory."""
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
