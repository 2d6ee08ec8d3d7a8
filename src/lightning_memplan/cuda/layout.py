"""Memory formats: sizes in bytes, dense tensors, and copies in another layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch._prims_common import suggest_memory_format

from lightning_memplan.cuda.rule_set import OutputMeta, Scratch

CONTIGUOUS = torch.contiguous_format


def nbytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements.

    >>> nbytes(torch.zeros(2, 3))
    24
    """
    return tensor.numel() * tensor.element_size()


def is_dense(tensor: torch.Tensor) -> bool:
    """Check that a tensor is contiguous, with its channels first or last.

    >>> is_dense(torch.zeros(2, 3, 4, 5).permute(0, 3, 1, 2)), is_dense(torch.zeros(2, 3).t())
    (True, False)
    """
    formats = [CONTIGUOUS]
    formats += [torch.channels_last] if tensor.dim() == 4 else [torch.channels_last_3d] if tensor.dim() == 5 else []
    return any(tensor.is_contiguous(memory_format=layout) for layout in formats)


def copy_of(tensor: torch.Tensor) -> Scratch:
    """Return the scratch memory of a copy.

    >>> copy_of(torch.zeros(2, 3))
    Scratch(size=24)
    """
    return Scratch(nbytes(tensor))


def copies_in(layout: torch.memory_format, *tensors: torch.Tensor) -> Iterator[Scratch]:
    """Yield a copy of each tensor that is not in ``layout``.

    >>> list(copies_in(torch.contiguous_format, torch.zeros(2, 3), torch.zeros(2, 3).t()))
    [Scratch(size=24)]
    """
    for tensor in tensors:
        if not tensor.is_contiguous(memory_format=layout):
            yield copy_of(tensor)


def contiguous_copies(*tensors: torch.Tensor) -> Iterator[Scratch]:
    """Yield a copy of each tensor that is not contiguous."""
    return copies_in(CONTIGUOUS, *tensors)


def suggested(tensor: torch.Tensor) -> torch.memory_format:
    """Return the memory format that torch suggests for an operator on images."""
    plain = tensor.is_contiguous() and tensor.stride(1) != 1  # with a stride of 1 both formats describe the tensor
    return CONTIGUOUS if plain else suggest_memory_format(tensor)


def laid_out_as(sizes: Sequence[int], layout: torch.memory_format, dtype: torch.dtype) -> OutputMeta:
    """Return the meta of an output in ``layout``.

    >>> laid_out_as((2, 3, 4, 5), torch.channels_last, torch.float32).like.stride()
    (60, 1, 15, 3)
    """
    if layout is CONTIGUOUS:
        return OutputMeta(torch.Size(sizes), dtype)
    if len(sizes) == 3:  # of a 1D convolution whose weight has its channels last
        image = torch.empty((sizes[0], sizes[1], 1, sizes[2]), dtype=dtype, device="meta", memory_format=layout)
        return OutputMeta(image.squeeze(2), dtype)
    return OutputMeta(torch.empty(sizes, dtype=dtype, device="meta", memory_format=layout), dtype)
