"""The rules by which a trace on the CPU becomes a trace on CUDA, and the operators that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

aten = torch.ops.aten


def operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def exists(name: str) -> bool:
    packet, _, overload = name.partition(".")
    return hasattr(aten, packet) and hasattr(getattr(aten, packet), overload or "default")


aten = torch.ops.aten


VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


class Rules(NamedTuple):
    """What the GPU's kernels allocate that a fake tensor's do not show. Each is keyed by the operator."""

    #: bytes that the kernel allocates beside its outputs, and frees when it returns: after them, or where a slice
    #: stands for some of them; a list is a scope of its own
    temporaries: Mapping[Any, Callable[[Sequence[Any], Mapping[str, Any], Any], Sequence[Any]]] = {}
    #: name and bytes of a workspace that the first call in a thread allocates, and that stays
    workspaces: Mapping[Any, tuple[str, int]] = {}
    #: output -> bytes of one of its elements, where that differs from the fake tensor's
    widths: Mapping[Any, Mapping[int, int]] = {}
    #: the order in which the outputs are allocated, where it is not theirs
    order: Mapping[Any, Sequence[int]] = {}
    #: what a kernel does, told by other operators: what these allocate is what it allocates; NotImplemented where the
    #: fake kernel tells
    kernels: Mapping[Any, Callable[..., Any]] = {}
    #: the same where an argument is a sparse tensor
    sparse: Mapping[Any, Callable[..., Any]] = {}
    #: the same, for operators whose result is as long as values say: at its longest, or NotImplemented where it is not
    longest: Mapping[Any, Callable[..., Any]] = {}
    #: outputs as ``(like, dtype)``: of a tensor's shape and strides, or of a size; None for an output that is not
    #: asked for, and for all where the fake kernel must say. A fake kernel may be many operators, and is asked anew for
    #: every shape
    shapes: Mapping[Any, Callable[..., Sequence[tuple[torch.Tensor | torch.Size, torch.dtype] | None] | None]] = {}
