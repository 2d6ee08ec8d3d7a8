"""Parts of a module that ``torch.compile`` compiles, in a trace: the graphs that inductor is given, with the tensors
that it saves for the backward pass, and what of their inside is in memory, by its two ends.

torch's own AOTAutograd and its partitioner make the graphs, with inductor's decompositions, so that what is saved is
what inductor saves. Inductor then fuses operators, and what a fused kernel passes on inside is in no block. Blocks in
any case are what the graphs return or save. The lower end has no others, since operators are put in another order, and
a result takes the place of an operand that it is the last to read. The upper end has one as well for what kernels of
libraries read and write, for every sum, and for every other result but one that a single elementwise operator or sum
reads: that is always a part of it. And a library's kernel copies its largest operand, whose layout inductor chooses
(channels last, rows filled up). In the first step kernels are tried out in several ways, and before each the card's L2
cache is filled by a block of its size.

CUDA graphs (``mode="reduce-overhead"``, ``"max-autotune"``) are warmed up, recorded and replayed in a pool of their
own, whose segments no one else is given: the upper end is the peaks of both. In their pool are copies of what comes
from outside, kept from then on: what is given to the forward pass beside weights, and the gradients that come to the
backward pass. cuBLAS's workspaces are let go of before a recording: the lower end has none of theirs. Kernels are
tried out in that pool as well, with a clone of what they write over, and the pool keeps what it has: the upper end has
the clones apart from the rest.

Source: torch/_functorch/partitioners.py and torch/_inductor (compile_fx.py, scheduler.py, runtime/benchmarking.py,
runtime/triton_heuristics.py: ``maybe_clone_args``, ``copy_args_to_cpu_if_needed``, cudagraph_trees.py:
``_allocate_and_copy_recording_inputs``, ``clear_cublas_manager``), 2.11 to 2.14.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import getitem
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_memplan.memory.events import Stream
from lightning_memplan.step.compiled_regions import Part, compiled_parts
from lightning_memplan.trace.known_values import fake_mode
from lightning_memplan.trace.recorder import Recorder

#: Kernels that inductor calls and does not make, beside its ``fallbacks``: their operands and results are blocks
_OF_LIBRARIES = frozenset(
    """mm addmm bmm baddbmm _scaled_mm convolution convolution_backward _cudnn_rnn _cudnn_rnn_backward
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_backward
    _scaled_dot_product_efficient_attention _scaled_dot_product_efficient_attention_backward sort topk""".split()
)


#: Compute capability -> bytes of the L2 cache, the largest of the cards that have it (NVIDIA's architecture papers)
_L2 = {(7, 0): 6, (7, 5): 6, (8, 0): 40, (8, 6): 6, (8, 9): 96, (9, 0): 60, (10, 0): 126, (12, 0): 128}


_PRODUCTS = frozenset("mm addmm bmm baddbmm".split())


class Graphs:
    """The graphs of what is compiled, each made once: for both ends, which are recorded one after the other."""

    def __init__(self) -> None:
        self.mode = fake_mode()
        self.least = False  #: which end is recorded
        self.recorder: Any = None
        self.made: dict[Any, tuple[Callable[..., Any] | None, str]] = {}  #: a call -> what runs it, what to say of it
        self.static: set[int] = set()  #: storages of parameters and buffers
        self.copied: Any = WeakKeyDictionary()  #: recorder -> inputs of CUDA graphs, which these have in their pool
        self.cache = 0  #: bytes of the card's L2 cache
        self.making = False  #: what is called then is in the graph that is being made

    def interpreted(self, pooled: bool, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """What runs a graph; ``pooled``, as a CUDA graph."""

        def run(args: list[Any]) -> Any:
            if self.least and not pooled:
                return _Interpreter(graph, self, pooled).boxed_run(args)
            with self.recorder.pool(Stream.GRAPHS if pooled else Stream.COMPILED, workspaces=not self.least):
                copied = self.copied.setdefault(self.recorder, {})
                if pooled and not self.least and not self.making and graph not in copied:
                    copied[graph] = [torch.empty_like(tensor) for tensor in self.inputs(graph, args)]
                return _Interpreter(graph, self, pooled).boxed_run(args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def inputs(self, graph: torch.fx.GraphModule, args: Sequence[Any]) -> list[torch.Tensor]:
        """Those that come from outside: of a forward pass all but weights, of a backward pass what autograd gives."""
        names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
        backward = _is_backward(graph.graph)
        given = zip(names, args, strict=True)
        tensors = [
            arg for name, arg in given if isinstance(arg, torch.Tensor) and name.startswith("tangents") >= backward
        ]
        return [tensor for tensor in tensors if tensor.untyped_storage()._cdata not in self.static]


class _Region(nn.Module):
    """A compiled callable: its graphs are made when it is first called, and anew for a call that is not alike."""

    def __init__(
        self, modules: list[nn.Module], function: Callable[..., Any], graphs: Graphs, place: int, pooled: bool
    ) -> None:
        super().__init__()
        self.of, self.function, self.graphs, self.place = nn.ModuleList(modules), function, graphs, place
        self.pooled = pooled
        self.notes: set[str] = set()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if self.graphs.making:
            return self.function(*args, **kwargs)
        weights = dict(self.named_parameters()), dict(self.named_buffers())
        leaves = tree_leaves((weights, args, kwargs))
        shapes = tuple((t.shape, t.dtype, t.requires_grad) if isinstance(t, torch.Tensor) else str(t) for t in leaves)
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), *(module.training for module in self.of)
        key = (self.place, modes, shapes)
        if key not in self.graphs.made:
            self.graphs.made[key] = self._made(weights, args, kwargs)
        made, note = self.graphs.made[key]
        self.notes.add(note)
        return self.function(*args, **kwargs) if made is None else made(*weights, args, kwargs)

    def _made(self, weights: tuple[Any, Any], args: Any, kwargs: Any) -> tuple[Callable[..., Any] | None, str]:
        from torch._functorch.aot_autograd import aot_function
        from torch._functorch.partitioners import min_cut_rematerialization_partition
        from torch._inductor.decomposition import select_decomp_table

        def call(parameters: Any, buffers: Any, args: Any, kwargs: Any) -> Any:
            return torch.func.functional_call(self, (parameters, buffers), args, kwargs)

        compiler: Any = partial(self.graphs.interpreted, self.pooled)
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
        except Exception as error:  # noqa: BLE001 - what torch.compile would leave to Python, it runs as it is written
            return None, f"{BROKEN} ({type(error).__name__})"
        finally:
            self.graphs.making = False
        return made, FUSED


def _example(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    with torch.no_grad():
        example = torch.empty_like(value)
    return example.requires_grad_(value.requires_grad)


class _Interpreter(torch.fx.Interpreter):
    """Runs a graph, whose operators have their results in memory where ``_kept`` says so."""

    def __init__(self, graph: torch.fx.GraphModule, graphs: Graphs, pooled: bool) -> None:
        super().__init__(graph)
        self.recorder, self.least, self.pooled = graphs.recorder, graphs.least, pooled
        self.cache = 0 if graphs.making else graphs.cache
        self.kept = _kept(graph, self.least)

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        if self.least:
            return self.least_of(n)
        if not _of_library(n) and n not in self.kept:
            with self.recorder.unseen():
                return super().run_node(n)
        copied = [torch.empty_like(self.env[operand]) for operand in _laid_out_anew(n)]
        out = super().run_node(n)
        del copied
        if self.cache and self.recorder.step == 1 and not _is_view(n):
            with self.recorder.pool(Stream.GRAPH_TRIALS, workspaces=True):  # as if it found no room in what is cached
                clones = [torch.empty_like(block) for block in self.written_over(n, out)]
                self.recorder.take_and_give_back(self.cache)
                del clones
        return out

    def written_over(self, n: torch.fx.Node, out: Any) -> list[torch.Tensor]:
        """What a kernel of a CUDA graph's forward pass writes its result over, and is cloned where it is tried out.

        To a convolution's result its bias is added; another kernel may write over the last block of as many bytes that
        it reads. In a backward pass no clone takes more than was allocated at most before.
        """
        if not self.pooled or _is_backward(n.graph):
            return []
        if _of_library(n):
            return [out] if n.target is torch.ops.aten.convolution.default and n.args[2] is not None else []
        fused, left, blocks = {n}, [n], []
        while left:
            for operand in left.pop().all_input_nodes:
                if operand.op != "call_function" or operand in fused:
                    continue
                if operand in self.kept or _of_library(operand):
                    blocks.append(operand)
                else:
                    fused.add(operand)
                    left.append(operand)
        size = _bytes_of(n)
        alike = [block for block in blocks if size == _bytes_of(block) and fused.issuperset(_readers(block))]
        return [self.env[block] for block in alike[:1] if block in self.env]

    def least_of(self, n: torch.fx.Node) -> Any:
        """The result, of which only what the graph gives is in memory, in the place of what is read for the last time.

        Inductor orders operators anew, so that nothing else is there in any case beside what was saved.
        """
        with self.recorder.unseen(workspaces=_of_library(n)):
            out = super().run_node(n)
        if n in self.kept:
            for last in self.user_to_last_uses.get(n, ()):
                self.env[last] = None
            given = [out[user.args[1]] for user in n.users if user in self.kept and user.target is getitem] or [out]
            for leaf in tree_leaves(given):
                if isinstance(leaf, torch.Tensor):
                    self.recorder.reveal(leaf)
        return out


def _laid_out_anew(n: torch.fx.Node) -> list[torch.fx.Node]:
    """The operand of a library's kernel that may be copied into another layout: the largest, where it is possible.

    Of a product it is one whose rows are filled up, to a multiple of 8 (fx_passes/pad_mm.py). Of a convolution it is
    one that comes from outside or from another kernel of a library: what inductor makes, it makes as all convolutions
    of a graph want it, and in the backward pass all is as in the forward pass (graph.py, ``decide_layout_opt``;
    lowering.py, ``constrain_to_fx_strides``).
    """
    if not _of_library(n) or n.target is torch.ops.aten.convolution_backward.default:
        return []
    operands = [m for m in n.all_input_nodes if isinstance(m.meta.get("val"), torch.Tensor)]
    if _is_backward(n.graph):
        operands = [m for m in operands if m.op != "placeholder"]
    if n.target is torch.ops.aten.convolution.default:
        operands = [m for m in operands if _is_given(m)]
    elif n.target.overloadpacket.__name__ in _PRODUCTS:  # type: ignore[union-attr]
        operands = [m for m in operands if any(size % 8 for size in m.meta["val"].shape)]
    return sorted(operands, key=lambda m: m.meta["val"].numel())[-1:]


def _is_backward(graph: torch.fx.Graph) -> bool:
    return any(node.op == "placeholder" and node.name.startswith("tangents") for node in graph.nodes)


def _is_given(n: torch.fx.Node) -> bool:
    """Whether a tensor comes from outside, or from a library but for convolutions, with the layout that it has."""
    while n.op == "call_function" and _is_view(n) and n.all_input_nodes:
        n = n.all_input_nodes[0]
    return n.op == "placeholder" or (_of_library(n) and n.target is not torch.ops.aten.convolution.default)


def _of_library(n: torch.fx.Node) -> bool:
    from torch._inductor.lowering import fallbacks

    if not isinstance(n.target, torch._ops.OpOverload):
        return False
    own = n.target.namespace not in ("aten", "prims") or n.target in fallbacks
    return own or n.target.overloadpacket.__name__ in _OF_LIBRARIES


def _kept(graph: torch.fx.GraphModule, least: bool) -> set[torch.fx.Node]:
    """Nodes whose results are blocks."""
    kept: set[torch.fx.Node] = set()
    for n in reversed(graph.graph.nodes):
        if n.op == "output" or (not least and _of_library(n)) or (n in kept and _is_view(n)):
            kept.update(n.all_input_nodes)
        elif not least and n.op == "call_function" and not _is_view(n):
            readers = _readers(n)
            if len(readers) > 1 or _REDUCTION in n.target.tags or not all(map(_is_fused, readers)):
                kept.add(n)
    return kept


def _bytes_of(n: torch.fx.Node) -> int:
    value = n.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else -1


def _readers(n: torch.fx.Node) -> list[torch.fx.Node]:
    return [reader for user in n.users for reader in (_readers(user) if _is_view(user) else [user])]


def _is_pointwise(n: torch.fx.Node) -> bool:
    if not isinstance(n.target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in n.target.tags or n.target is torch.ops.prims.convert_element_type.default


def _is_fused(n: torch.fx.Node) -> bool:
    return _is_pointwise(n) or (n.op == "call_function" and _REDUCTION in n.target.tags)  # type: ignore[union-attr]


_REDUCTION = getattr(torch.Tag, "reduction", None)  # torch 2.9 and later tell; before, no sum is taken as fused


def _is_view(n: torch.fx.Node) -> bool:
    return not isinstance(n.target, torch._ops.OpOverload) or n.target.is_view  # or one of several results


@contextmanager
def as_graphs(module: nn.Module, recorder: Recorder, graphs: Graphs, capability: tuple[int, int]) -> Iterator[set[str]]:
    """What is compiled runs as graphs that are recorded; gives what there is to say of it, when it has run."""
    graphs.recorder, graphs.cache = recorder, _L2.get(capability, max(_L2.values())) * 2**20
    graphs.static = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    notes: set[str] = set()
    for place, part in enumerate(compiled_parts(module)):
        config = getattr(part.compiled, "get_compiler_config", lambda: None)()
        function = part.function
        if config is None:
            notes.add(OTHER)
        else:
            pooled = bool(config.get("triton.cudagraphs"))
            region = _Region(part.modules, function, graphs, place, pooled)
            region.notes = notes
            function = region.run
            if pooled:
                notes.add(CUDA_GRAPHS)
        _put(part, function)
    with _calls_as_written(graphs, notes):
        yield notes


def _put(part: Part, function: Callable[..., Any]) -> None:
    """``function`` in the place of what is compiled, for this copy of a module alone."""
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
def _calls_as_written(graphs: Graphs, notes: set[str]) -> Iterator[None]:
    """Notes what is compiled and called all the same (a function of another module): it runs as it is written.

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
            notes.add(f"{WRITTEN}: {getattr(function, '__qualname__', function)}")
        return asked(callback)

    frames._callback_from_stance = asks  # type: ignore[attr-defined]
    try:
        yield
    finally:
        frames._callback_from_stance = asked  # type: ignore[attr-defined]


FUSED = "how much of its graphs torch.compile fuses is known by a range, and planned for by its upper end"


BROKEN = "what is compiled does not make one graph, and is planned as it is written"


WRITTEN = "what torch.compile compiles is planned as it is written where it is called by another function"


OTHER = "what another backend than inductor compiles is planned as it is written"


CUDA_GRAPHS = "CUDA graphs of torch.compile share no segment with the rest: planned for the peaks of both"
