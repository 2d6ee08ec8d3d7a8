"""Parts of a module that ``torch.compile`` compiles, in a trace: the graphs that inductor is given, with the tensors
that it saves for the backward pass, and what of their inside is in memory, by its two ends.

torch's own AOTAutograd and its partitioner make the graphs, with inductor's decompositions, so that what is saved is
what inductor saves. Inductor then fuses operators, and what a fused kernel passes on inside is in no block. Blocks in
any case are what the graphs return or save, and what kernels of libraries read and write. The lower end has no others,
and a result takes the place of an operand that it is the last to read. The upper end has one as well for every sum,
and for every other result but one that a single elementwise operator or sum reads: that is always a part of it. And a
library's kernel copies its largest operand, whose layout inductor chooses (channels last, rows filled up).

Source: torch/_functorch/partitioners.py and torch/_inductor (compile_fx.py, scheduler.py), 2.11 to 2.14.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_memplan._record import Recorder

_STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")

#: Kernels that inductor calls and does not make, beside its ``fallbacks``: their operands and results are blocks
_OF_LIBRARIES = frozenset(
    """mm addmm bmm baddbmm _scaled_mm convolution convolution_backward _cudnn_rnn _cudnn_rnn_backward
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_backward
    _scaled_dot_product_efficient_attention _scaled_dot_product_efficient_attention_backward sort topk""".split()
)


#: Batch sizes of traces: what is saved depends on sizes, and of a few samples it would be other tensors than of many
COMPILED_SIZES = (16, 24, 40)


class Graphs:
    """The graphs of what is compiled, each made once: for both ends, which are recorded one after the other."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.least = False  #: which end is recorded
        self.recorder: Any = None
        self.made: dict[Any, tuple[Callable[..., Any] | None, str]] = {}  #: a call -> what runs it, what to say of it

    def interpreted(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        def run(args: list[Any]) -> Any:
            return _Interpreter(graph, self.recorder, self.least).boxed_run(args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


class _Region(nn.Module):
    """A compiled callable: its graphs are made when it is first called, and anew for a call that is not alike."""

    def __init__(self, root: nn.Module, function: Callable[..., Any], graphs: Graphs, place: int) -> None:
        super().__init__()
        self.root, self.function, self.graphs, self.place = root, function, graphs, place
        self.notes: set[str] = set()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        weights = dict(self.named_parameters()), dict(self.named_buffers())
        leaves = tree_leaves((weights, args, kwargs))
        shapes = tuple((t.shape, t.dtype, t.requires_grad) if isinstance(t, torch.Tensor) else t for t in leaves)
        key = (self.place, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), self.root.training, shapes)
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

        compiler: Any = self.graphs.interpreted
        made = aot_function(
            call,
            fw_compiler=compiler,
            bw_compiler=compiler,
            partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
            decompositions=select_decomp_table(),
        )
        try:
            with self.graphs.recorder.unseen():  # graphs keep the examples that they are made of
                made(*tree_map(_example, (*weights, args, kwargs)))
        except Exception as error:  # noqa: BLE001 - what torch.compile would leave to Python, it runs as it is written
            return None, f"{BROKEN} ({type(error).__name__})"
        return made, FUSED


def _example(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    with torch.no_grad():
        example = torch.empty_like(value)
    return example.requires_grad_(value.requires_grad)


class _Interpreter(torch.fx.Interpreter):
    """Runs a graph, whose operators have their results in memory where ``_kept`` says so."""

    def __init__(self, graph: torch.fx.GraphModule, recorder: Recorder, least: bool) -> None:
        super().__init__(graph)
        self.recorder, self.least, self.kept = recorder, least, _kept(graph, least)

    def run_node(self, n: torch.fx.Node) -> Any:
        if _of_library(n) and not self.least:
            operands = [self.env[m] for m in n.all_input_nodes if isinstance(self.env[m], torch.Tensor)]
            largest = max(operands, key=torch.Tensor.numel, default=None)
            copied = None if largest is None else torch.empty_like(largest)
            out = super().run_node(n)
            del copied
            return out
        if n.op != "call_function" or _of_library(n) or (n in self.kept and not self.least):
            return super().run_node(n)
        with self.recorder.unseen():
            out = super().run_node(n)
        if n in self.kept:
            for last in self.user_to_last_uses.get(n, ()):
                self.env[last] = None
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self.recorder.reveal(leaf)
        return out


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
        if n.op == "output" or _of_library(n) or (n in kept and _is_view(n)):
            kept.update(n.all_input_nodes)
        elif not least and n.op == "call_function" and not _is_view(n):
            readers = _readers(n)
            if len(readers) > 1 or _REDUCTION in n.target.tags or not all(map(_is_fused, readers)):
                kept.add(n)
    return kept


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


def compiled_parts(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules of which something is compiled, and the names of what is."""
    if "torch._dynamo" not in sys.modules:
        return []
    found = []
    for child in module.modules():
        own = child.__dict__
        names = [name for name in _STEPS if hasattr(own.get(name), "_torchdynamo_orig_callable")]
        if own.get("_compiled_call_impl") is not None:
            names.append("_compiled_call_impl")
        found += [(child, name) for name in names]
    return found


@contextmanager
def as_graphs(module: nn.Module, recorder: Recorder, graphs: Graphs) -> Iterator[set[str]]:
    """What is compiled runs as graphs that are recorded; gives what there is to say of it, when it has run."""
    graphs.recorder = recorder
    notes: set[str] = set()
    for place, (child, name) in enumerate(compiled_parts(module)):
        compiled = child.__dict__[name]
        config = getattr(compiled, "get_compiler_config", lambda: None)()
        function = compiled._torchdynamo_orig_callable
        if config is None:
            child.__dict__[name] = function
            notes.add(OTHER)
            continue
        region = _Region(child, function, graphs, place)
        region.notes = notes
        child.__dict__[name] = region.run
        if config.get("triton.cudagraphs"):
            notes.add(CUDA_GRAPHS)
    yield notes


FUSED = "how much of its graphs torch.compile fuses is known by a range, and planned for by its upper end"
BROKEN = "what is compiled does not make one graph, and is planned as it is written"
OTHER = "what another backend than inductor compiles is planned as it is written"
CUDA_GRAPHS = "CUDA graphs of torch.compile keep memory in pools of their own, which are not planned: leave a margin"


@contextmanager
def as_written() -> Iterator[None]:
    """Nothing is compiled: a compiled function runs as it is written."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
