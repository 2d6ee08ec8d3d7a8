"""Backward passes as a trace needs them: what they run is seen, and their nodes are numbered as on a GPU.

torch leaves a function mode while that handles a function, and ``Tensor.backward`` is one: so the mode is entered again
for what a backward pass runs (hooks, a forward pass again). torch/autograd/__init__.py (2.4 to 2.14) calls the engine
by the name that is replaced here.

Of the nodes that are ready, autograd runs the one with the highest number first, and each thread counts from 0 on
(torch/csrc/autograd/engine.cpp, ``CompareNodeTaskTime``; ATen/SequenceNumber.h; 2.14). A GPU's backward passes run in a
thread of the engine's, so what ``torch.autograd.grad(..., create_graph=True)`` makes is counted there; a trace's run in
the thread that asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_NUMBERED = "memplan"  # in a node's metadata: it has its number


_LEAF = 2**62  # the nodes of leaves come first: their number is the highest there is


class EngineSequence:
    """While it is entered, backward passes run within ``mode``, and nodes that they make get the numbers of a GPU's."""

    def __init__(self, mode: TorchFunctionMode) -> None:
        self._mode = mode
        self._runs: list[tuple[int, int, int]] = []  # numbers from, up to, and how many the engine's thread had before
        self._begun = torch._C._autograd._get_sequence_nr()
        self._stay = False  # whether nodes have been made that stay

    def __enter__(self) -> None:
        before: Any = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
        self._before = before

        def run(outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            with self._mode:
                return self._run(before, outputs, *args, **kwargs)

        torch.autograd._engine_run_backward = run  # type: ignore[attr-defined, assignment]

    def __exit__(self) -> None:
        torch.autograd._engine_run_backward = self._before  # type: ignore[attr-defined]

    def _run(self, engine: Callable[..., Any], outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        if torch._C._current_graph_task_id() != -1:
            return engine(outputs, *args, **kwargs)  # within a backward pass all is in the engine's thread
        if self._stay:
            self._number(outputs)
        self._stay = self._stay or bool(args[2])  # create_graph
        before = torch._C._autograd._get_sequence_nr()
        found = engine(outputs, *args, **kwargs)
        after = torch._C._autograd._get_sequence_nr()
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
