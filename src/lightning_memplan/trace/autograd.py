"""Make backward passes in a trace as they are on a GPU: what they run, in which order, and which memory they reuse."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from lightning_memplan.trace.storages import key_of

_ENGINE = torch.autograd.graph._engine_run_backward.__code__
_LEAF = 2**62  # from here on are the numbers of nodes of leaves, which run first
_NUMBERED = "memplan"  # in the metadata of a node that has its number
_NEW_WHERE = "_memplan_where"  # an attribute of a fake tensor that is to be masked
_HALVING = frozenset({"MaximumBackward0", "MinimumBackward0", "FmaxBackward0", "FminBackward0"})
_NEW_ZEROS = "_memplan_zeros"  # an attribute of a fake tensor that was made of zeros

_ADD = torch.ops.aten.add.Tensor
_MASKED_FILL = torch.ops.aten.masked_fill.Scalar
_WHERE = torch.ops.aten.where.self
_INDEX_PUT = torch.ops.aten.index_put.default
_ZEROS = frozenset({torch.ops.aten.zeros.default, torch.ops.aten.new_zeros.default, torch.ops.aten.zeros_like.default})
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


def _node_name() -> str:
    node = torch._C._current_autograd_node()
    return "" if node is None else node.name()


def in_backward() -> bool:
    """Check that a backward pass runs, as ``torch.utils.module_tracker`` does (torch 2.13 and 2.14)."""
    return torch._C._current_graph_task_id() != -1


def is_engine(frame: FrameType) -> bool:
    """Check that a frame is of autograd's engine, which calls operators of C++ nodes (torch 2.13 and 2.14)."""
    return frame.f_code is _ENGINE


class GradientAccumulation:
    """Find where autograd writes into memory that it has: it does so on a GPU, but not for tensor subclasses.

    A fake tensor is such a subclass, so its gradients are added up out of place. ``in_place=False`` leaves it so, as
    torch 1.12 did on a GPU.
    """

    def __init__(self, in_place: bool = True) -> None:
        self._in_place = in_place
        self._written: list[weakref.ref[torch.Tensor]] = []  # views that were written to since the last operator

    def reuses_first(self, func: Any, args: Sequence[Any], by_engine: bool) -> bool:
        """Check that an operator of the backward pass writes its result into its first argument on a GPU."""
        if func is _ADD:
            return self._in_place and by_engine and _adds_in_place(args)
        if func is _MASKED_FILL:
            return _NEW_WHERE in args[0].__dict__ and by_engine and _has_sole_owner(args[0])
        return func in _INTO_ZEROS and _writes_into_zeros(func, args)

    def mark_zeros(self, func: Any, out: Any) -> None:
        """Remember a tensor of the backward pass that is made of zeros, for a gradient to be written into it.

        So is half a gradient where two values are equal, of which the formulas of ``maximum`` and ``minimum`` mask a
        part (tools/autograd/derivatives.yaml, 2.14).
        """
        if func in _ZEROS and isinstance(out, FakeTensor):
            out.__dict__[_NEW_ZEROS] = True
        if func is _WHERE and isinstance(out, FakeTensor) and _node_name() in _HALVING:
            out.__dict__[_NEW_WHERE] = True

    def mark_written(self, tensor: Any) -> None:
        """Remember a view that an operator of the forward pass writes to."""
        if isinstance(tensor, torch.Tensor) and tensor._is_view():
            self._written.append(weakref.ref(tensor))

    def regenerate(self) -> None:
        """Let the new gradient function of each view that was written to copy its gradient.

        torch/csrc/autograd/variable.cpp (2.15), ``VariableHooks::grad_fn``: ``AsStridedBackward``, which lays the
        gradient into zeros of the whole base; a tensor subclass repeats the operator that made the view.
        """
        if not self._written:
            return
        written, self._written = self._written, []
        for view in (reference() for reference in written):
            if view is not None and view.requires_grad and view.grad_fn is not None:
                view.grad_fn.register_hook(_into_zeros)


def _adds_in_place(args: Sequence[Any]) -> bool:
    """Check that the engine adds a gradient to one that nothing else holds, whose memory it reuses.

    Source: torch/csrc/autograd/input_buffer.cpp (``can_accumulate_inplace``).
    """
    if len(args) != 2 or not isinstance(args[1], torch.Tensor):
        return False
    first = args[0]
    return bool(first.is_contiguous() or _is_dense(first)) and _has_sole_owner(first)


def _writes_into_zeros(func: Any, args: Sequence[Any]) -> bool:
    """Check that a gradient is written into new zeros: in place on a GPU, out of place for tensor subclasses.

    torch/csrc/autograd/FunctionsManual.cpp (2.15), ``areAnyTensorSubclassLike``: the backward formulas of indexing,
    gather, max, sort and topk. What index_put has overwritten becomes zero in a copy, on a GPU as well.
    """
    overwrites = func is _INDEX_PUT and not (len(args) > 3 and args[3])
    return _NEW_ZEROS in args[0].__dict__ and not overwrites and _has_sole_owner(args[0])


def _is_dense(tensor: torch.Tensor) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense.default(tensor))


def _has_sole_owner(tensor: torch.Tensor) -> bool:
    """Check that a storage has no owner beside this tensor and the object that asks (torch 2.13 and 2.14)."""
    return int(torch._C._storage_Use_Count(key_of(tensor.untyped_storage()))) <= 2


def _into_zeros(grads: Sequence[torch.Tensor | None], given: Sequence[torch.Tensor | None]) -> Any:
    kept = {key_of(t.untyped_storage()) for t in given if t is not None}
    return tuple(
        torch.zeros_like(grad) if grad is not None and key_of(grad.untyped_storage()) in kept else grad
        for grad in grads
    )


class EngineSequence:
    """While entered, run backward passes within ``mode``, and give the nodes that they make the numbers of a GPU's.

    torch leaves a function mode while that handles a function, and ``Tensor.backward`` is one: so the mode is entered
    again for hooks of a backward pass, and for a forward pass that it repeats. torch/autograd/__init__.py (2.4 to 2.14)
    calls the engine by the name that is replaced here.

    Of the nodes that are ready, autograd runs the one with the highest number first, and each thread counts from 0 on
    (torch/csrc/autograd/engine.cpp, ``CompareNodeTaskTime``; ATen/SequenceNumber.h; 2.14). A GPU's backward passes run
    in a thread of the engine's, so nodes of ``torch.autograd.grad(..., create_graph=True)`` are counted there. A
    trace's backward passes run in the thread that asks for them.
    """

    def __init__(self, mode: TorchFunctionMode) -> None:
        self._mode = mode
        self._runs: list[tuple[int, int, int]] = []  # numbers from, up to, and how many the engine's thread had before
        self._begun = _next_number()
        self._has_kept = False  # some nodes, for a graph of the gradients

    def __enter__(self) -> None:
        before: Any = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
        self._before = before

        def run(outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            with self._mode:
                return self._run(before, outputs, *args, **kwargs)

        torch.autograd._engine_run_backward = run  # type: ignore[attr-defined, assignment]

    def __exit__(self, *error: object) -> None:
        torch.autograd._engine_run_backward = self._before  # type: ignore[attr-defined]

    def _run(self, engine: Callable[..., Any], outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        if in_backward():
            return engine(outputs, *args, **kwargs)  # all is in the engine's thread already
        if self._has_kept:
            self._number(outputs)
        self._has_kept = self._has_kept or bool(args[2])  # create_graph
        before = _next_number()
        found = engine(outputs, *args, **kwargs)
        after = _next_number()
        if after > before:
            self._runs.append((before, after, sum(end - begin for begin, end, _ in self._runs)))
        return found

    def _number(self, outputs: Sequence[Any]) -> None:
        nodes = [output.node if hasattr(output, "node") else output.grad_fn for output in outputs]
        while nodes:
            node = nodes.pop()
            if node is None or _NUMBERED in node.metadata:
                continue
            node.metadata[_NUMBERED] = True
            number = node._sequence_nr()
            if self._begun <= number < _LEAF:
                node._set_sequence_nr(self._on_gpu(number))
            nodes += [following for following, _ in node.next_functions]

    def _on_gpu(self, number: int) -> int:
        made = 0
        for begin, end, counted in self._runs:
            if begin <= number < end:
                return counted + number - begin
            made += end - begin if end <= number else 0
        return number - self._begun - made


def _next_number() -> int:
    """Return the number of the next node that this thread makes (torch 2.13 and 2.14)."""
    return torch._C._autograd._get_sequence_nr()
