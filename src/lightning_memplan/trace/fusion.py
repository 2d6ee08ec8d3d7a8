"""Find which results of a graph inductor keeps in memory: it fuses operators, and passes results on inside a kernel.

How far it fuses is not known, so there are two bounds. Results that the graph returns or saves are in memory in any
case; the lower bound has no others, since inductor reorders operators and lets a result take the place of an operand
that nothing else reads. The upper bound has as well the operands and results of kernels of libraries, every sum, and
every other result but one that a single elementwise operator or sum reads, which is always a part of that operator.

Source: torch/_inductor/scheduler.py, lowering.py and graph.py, 2.11 to 2.14.
"""

from __future__ import annotations

import torch
from torch import fx

#: Kernels that inductor calls and does not make, beside its ``fallbacks``
_OF_LIBRARIES = frozenset(
    """mm addmm bmm baddbmm _scaled_mm convolution convolution_backward _cudnn_rnn _cudnn_rnn_backward
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_backward
    _scaled_dot_product_efficient_attention _scaled_dot_product_efficient_attention_backward sort topk""".split()
)
_PRODUCTS = frozenset("mm addmm bmm baddbmm".split())
_REDUCTION = getattr(torch.Tag, "reduction", None)  # torch 2.9 and later; before, no sum is taken as fused


def kept_nodes(graph: fx.Graph, *, lower_bound: bool) -> set[fx.Node]:
    """Return nodes whose results are blocks; by the upper bound, so are all results of libraries' kernels."""
    kept: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or (not lower_bound and is_of_library(node)) or (node in kept and is_view(node)):
            kept.update(node.all_input_nodes)
        elif not lower_bound and node.op == "call_function" and not is_view(node):
            readers = readers_of(node)
            if len(readers) > 1 or _REDUCTION in node.target.tags or not all(map(_is_fused, readers)):
                kept.add(node)
    return kept


def laid_out_anew(node: fx.Node) -> list[fx.Node]:
    """Return the operand of a library's kernel that may be copied into another layout: the largest, if there is one.

    Of a product it is one whose rows are filled up, to a multiple of 8 (fx_passes/pad_mm.py). Of a convolution it is
    one that comes from outside or from another kernel of a library: inductor makes all others as the convolutions of
    the graph want them, and in the backward pass all are as in the forward pass (graph.py, ``decide_layout_opt``;
    lowering.py, ``constrain_to_fx_strides``).
    """
    if not is_of_library(node) or node.target is torch.ops.aten.convolution_backward.default:
        return []
    operands = [operand for operand in node.all_input_nodes if isinstance(operand.meta.get("val"), torch.Tensor)]
    if is_backward(node.graph):
        operands = [operand for operand in operands if operand.op != "placeholder"]
    if is_convolution(node):
        operands = [operand for operand in operands if _is_given(operand)]
    elif node.target.overloadpacket.__name__ in _PRODUCTS:  # type: ignore[union-attr]
        operands = [operand for operand in operands if any(size % 8 for size in operand.meta["val"].shape)]
    return sorted(operands, key=lambda operand: operand.meta["val"].numel())[-1:]


def is_backward(graph: fx.Graph) -> bool:
    """Check that a graph is of a backward pass: gradients are among its inputs."""
    return any(node.op == "placeholder" and node.name.startswith("tangents") for node in graph.nodes)


def is_of_library(node: fx.Node) -> bool:
    """Check that a library's kernel runs, which inductor calls and does not make."""
    from torch._inductor.lowering import fallbacks

    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    foreign = node.target.namespace not in ("aten", "prims") or node.target in fallbacks
    return foreign or node.target.overloadpacket.__name__ in _OF_LIBRARIES


def is_view(node: fx.Node) -> bool:
    """Check that a result has no block of its own: a view, or one of several results."""
    return not isinstance(node.target, torch._ops.OpOverload) or node.target.is_view


def is_convolution(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.convolution.default


def readers_of(node: fx.Node) -> list[fx.Node]:
    """Return the operators that read a result, also through views."""
    return [reader for user in node.users for reader in (readers_of(user) if is_view(user) else [user])]


def _is_given(node: fx.Node) -> bool:
    """Check that a tensor's layout is given: it comes from outside, or from a library's kernel but a convolution."""
    while node.op == "call_function" and is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.op == "placeholder" or (is_of_library(node) and not is_convolution(node))


def _is_fused(node: fx.Node) -> bool:
    return _is_pointwise(node) or (node.op == "call_function" and _REDUCTION in node.target.tags)  # type: ignore[union-attr]


def _is_pointwise(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or node.target is torch.ops.prims.convert_element_type.default
