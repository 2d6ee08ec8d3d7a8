"""Memory formats: sizes in bytes, dense tensors, and copies in another layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._prims_common import suggest_memory_format

Rule = Callable[[Sequence[Any], Mapping[str, Any], Any], Sequence[Any]]


Made = tuple[torch.Tensor | torch.Size, torch.dtype]


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def is_dense(tensor: torch.Tensor) -> bool:
    formats = [torch.contiguous_format]
    formats += [torch.channels_last] if tensor.dim() == 4 else [torch.channels_last_3d] if tensor.dim() == 5 else []
    return any(tensor.is_contiguous(memory_format=layout) for layout in formats)


def relaid(tensor: torch.Tensor, layout: torch.memory_format) -> tuple[int, ...]:
    """The copy that is made of a tensor which is not laid out so."""
    return () if tensor.is_contiguous(memory_format=layout) else (nbytes(tensor),)


def copied(*places: int) -> Rule:
    """A kernel that reads these arguments only if they are contiguous, and copies them if not."""

    def rule(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
        return tuple(nbytes(args[place]) for place in places if not is_dense(args[place]))

    return rule


def suggested(tensor: torch.Tensor) -> torch.memory_format:
    plain = tensor.is_contiguous() and tensor.stride(1) != 1  # else it may be laid out either way
    return torch.contiguous_format if plain else suggest_memory_format(tensor)


def laid_out_as(sizes: Sequence[int], layout: torch.memory_format, dtype: torch.dtype) -> Made:
    if layout is torch.contiguous_format:
        return torch.Size(sizes), dtype
    if len(sizes) == 3:  # a convolution's, of a weight whose channels come last
        image = torch.empty((sizes[0], sizes[1], 1, sizes[2]), dtype=dtype, device="meta", memory_format=layout)
        return image.squeeze(2), dtype
    return torch.empty(sizes, dtype=dtype, device="meta", memory_format=layout), dtype
