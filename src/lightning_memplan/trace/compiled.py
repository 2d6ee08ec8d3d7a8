"""Trace the parts of a module that ``torch.compile`` compiles, by an upper and a lower bound.

torch's own AOTAutograd and its partitioner make the graphs, with inductor's decompositions, so that a graph saves for
the backward pass the tensors that inductor saves. :mod:`~lightning_memplan.trace.fusion` says which results of a graph
are blocks. By the upper bound a library's kernel copies its largest operand as well, whose layout inductor chooses
(channels last, rows filled up). In the first step kernels are tried out in several ways, and before each the GPU's L2
cache is filled by a block of its size.

CUDA graphs (``mode="reduce-overhead"``, ``"max-autotune"``) run in pools of their own, of which a trace knows nothing:
their graphs are traced as if they ran without, and a note says so.

Source: torch/_functorch/partitioners.py and torch/_inductor (compile_fx.py, runtime/benchmarking.py), 2.11 to 2.14.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import getitem
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_memplan.memory.events import Stream
from lightning_memplan.step.compiled_regions import Part, compiled_parts
from lightning_memplan.trace.fake_tensors import fake_mode
from lightning_memplan.trace.fusion import (
    is_of_library,
    is_view,
    kept_nodes,
    laid_out_anew,
)
from lightning_memplan.trace.recorder import Recorder

FUSED = "how much of its graphs torch.compile fuses is known by a range, and planned for by its upper end"
BROKEN = "what is compiled does not make one graph, and is planned as it is written"
WRITTEN = "what torch.compile compiles is planned as it is written where it is called by another function"
OTHER = "what another backend than inductor compiles is planned as it is written"
CUDA_GRAPHS = (
    "CUDA graphs of torch.compile keep memory in pools that a trace does not know: planned as compiled without them; "
    "a probe on the GPU (method='probe') measures them"
)

#: Compute capability -> MiB of the L2 cache, the largest of the GPUs that have it (NVIDIA's architecture papers)
_L2 = {(7, 0): 6, (7, 5): 6, (8, 0): 40, (8, 6): 6, (8, 9): 96, (9, 0): 60, (10, 0): 126, (12, 0): 128}


class _Made(NamedTuple):
    """The graphs of one call; none where torch.compile would leave a part of it to Python."""

    run: Callable[..., Any] | None
    note: str


@dataclass(slots=True, eq=False)
class Graphs:
    """The graphs of compiled parts, made once for both bounds, which are recorded one after the other."""

    lower_bound: bool = False  #: record the lower bound, not the upper one
    mode: FakeTensorMode = field(default_factory=fake_mode)
    made: dict[Any, _Made] = field(default_factory=dict)  #: by call: region, modes, shapes
    recorder: Recorder = field(init=False)
    making: bool = False  #: a graph is being made, and calls become part of it
    cache: int = 0  #: bytes of the GPU's L2 cache

    def interpreted(self, graph: fx.GraphModule, inputs: object) -> Callable[..., Any]:
        """Return a function that runs a graph."""

        def run(args: list[Any]) -> Any:
            if self.lower_bound:
                return _Interpreter(graph, self).boxed_run(args)
            with self.recorder.pool(Stream.COMPILED):
                return _Interpreter(graph, self).boxed_run(args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


@dataclass
class CompiledReport:
    """Report on the trace of a step's compiled parts."""

    fused: bool = False  #: one of them at least made graphs
    notes: set[str] = field(default_factory=set)

    def add(self, made: _Made) -> None:
        self.fused |= made.run is not None
        self.notes.add(made.note)


class _Region(nn.Module):
    """A compiled callable, whose graphs are made at its first call, and anew for a call of other shapes or modes."""

    def __init__(self, part: Part, place: int, graphs: Graphs, report: CompiledReport) -> None:
        super().__init__()
        self.inner, self.function = nn.ModuleList(part.modules), part.function
        self.place, self.graphs, self.report = place, graphs, report

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if self.graphs.making:
            return self.function(*args, **kwargs)
        weights = dict(self.named_parameters()), dict(self.named_buffers())
        leaves = tree_leaves((weights, args, kwargs))
        shapes = tuple((t.shape, t.dtype, t.requires_grad) if isinstance(t, torch.Tensor) else str(t) for t in leaves)
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), *(one.training for one in self.inner)
        key = (self.place, modes, shapes)
        if key not in self.graphs.made:
            self.graphs.made[key] = self._make(weights, args, kwargs)
        made = self.graphs.made[key]
        self.report.add(made)
        return self.function(*args, **kwargs) if made.run is None else made.run(*weights, args, kwargs)

    def _make(self, weights: tuple[Any, Any], args: Any, kwargs: Any) -> _Made:
        """Make the graphs as inductor gets them (private interfaces of torch 2.11 to 2.14)."""
        from torch._functorch.aot_autograd import aot_function
        from torch._functorch.partitioners import min_cut_rematerialization_partition
        from torch._inductor.decomposition import select_decomp_table

        def call(parameters: Any, buffers: Any, args: Any, kwargs: Any) -> Any:
            return torch.func.functional_call(self, (parameters, buffers), args, kwargs)

        compiler: Any = self.graphs.interpreted
        made = aot_function(
            call,
            fw_compiler=compiler,
            bw_compiler=compiler,
            partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
            decompositions=select_decomp_table(),
        )
        self.graphs.making = True
        try:
            with self.graphs.recorder.unseen():  # graphs keep the examples that they are made of
                made(*tree_map(_example, (*weights, args, kwargs)))
        except Exception as error:  # noqa: BLE001 - torch.compile would leave a part to Python: it runs as written
            return _Made(None, f"{BROKEN} ({type(error).__name__})")
        finally:
            self.graphs.making = False
        return _Made(made, FUSED)


def _example(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    with torch.no_grad():
        example = torch.empty_like(value)
    return example.requires_grad_(value.requires_grad)


class _Interpreter(fx.Interpreter):
    """Run a graph, and record the results that ``kept_nodes`` says are blocks."""

    def __init__(self, graph: fx.GraphModule, graphs: Graphs) -> None:
        super().__init__(graph)
        self._recorder, self._lower_bound = graphs.recorder, graphs.lower_bound
        self._cache = 0 if graphs.making else graphs.cache
        self._kept = kept_nodes(graph.graph, lower_bound=self._lower_bound)

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        if self._lower_bound:
            return self._run_lower_bound(n)
        if not is_of_library(n) and n not in self._kept:
            with self._recorder.unseen():
                return super().run_node(n)
        copied = [torch.empty_like(self.env[operand]) for operand in laid_out_anew(n)]
        out = super().run_node(n)
        del copied
        if self._cache and self._recorder.step == 1 and not is_view(n):
            with self._recorder.pool(Stream.TRIALS):  # as if it found no room in what is cached
                self._recorder.take_and_give_back(self._cache)
        return out

    def _run_lower_bound(self, n: fx.Node) -> Any:
        """Return a result that takes the place of tensors that are read for the last time, if the graph gives it.

        Inductor reorders operators, so that nothing else is in memory in any case beside the tensors that were saved.
        """
        with self._recorder.unseen(workspaces=is_of_library(n)):
            out = super().run_node(n)
        if n in self._kept:
            for last in self.user_to_last_uses.get(n, ()):
                self.env[last] = None
            given = [out[user.args[1]] for user in n.users if user in self._kept and user.target is getitem] or [out]
            for leaf in tree_leaves(given):
                if isinstance(leaf, torch.Tensor):
                    self._recorder.reveal(leaf)
        return out


@contextmanager
def as_graphs(
    module: nn.Module, recorder: Recorder, graphs: Graphs, capability: tuple[int, int]
) -> Iterator[CompiledReport]:
    """Record the compiled parts of ``module`` as graphs; the report is complete when the step has run."""
    graphs.recorder, graphs.cache = recorder, _L2.get(capability, max(_L2.values())) * 2**20
    report = CompiledReport()
    for place, part in enumerate(compiled_parts(module)):
        config = getattr(part.compiled, "get_compiler_config", lambda: None)()
        function = part.function
        if config is None:
            report.notes.add(OTHER)
        else:
            function = _Region(part, place, graphs, report).run
            if config.get("triton.cudagraphs"):
                report.notes.add(CUDA_GRAPHS)
        _put(part, function)
    with _noted_calls(graphs, report):
        yield report


def _put(part: Part, function: Callable[..., Any]) -> None:
    """Put ``function`` in the place of a compiled part, for this copy of a module alone."""
    own = part.owner.__dict__
    if not part.method:
        own[part.name] = function
        return
    method = getattr(part.owner, part.method).__func__
    names = {**method.__globals__, part.name: function}
    anew = FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)
    anew.__kwdefaults__ = method.__kwdefaults__
    own[part.method] = MethodType(anew, part.owner)


@contextmanager
def _noted_calls(graphs: Graphs, report: CompiledReport) -> Iterator[None]:
    """Note calls of compiled functions that are no part of the module (of another function): they run as written.

    Source: torch/_dynamo/eval_frame.py (``compile_wrapper``, ``_fn``: each call asks for the callback), 2.11 to 2.14.
    """
    frames = sys.modules.get("torch._dynamo.eval_frame")
    asked = getattr(frames, "_callback_from_stance", None)
    if frames is None or asked is None:
        yield
        return

    def asks(callback: Any) -> Any:
        caller = sys._getframe(1).f_locals
        function = caller.get("fn")
        if callback and function is not None and "args" in caller and not graphs.making:
            report.notes.add(f"{WRITTEN}: {getattr(function, '__qualname__', function)}")
        return asked(callback)

    frames._callback_from_stance = asks  # type: ignore[attr-defined]
    try:
        yield
    finally:
        frames._callback_from_stance = asked  # type: ignore[attr-defined]
