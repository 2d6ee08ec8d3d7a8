"""Memory formats: sizes in bytes, dense tensors, and copies in another layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

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


def elementwise_strides(sizes: Sequence[int], tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Return the strides of a new tensor of ``sizes`` that an elementwise kernel makes of ``tensors``.

    Dimensions are in the order of the first tensor's strides; where these do not tell, because it is broadcast or of
    fewer dimensions, in that of the next.

    Source: aten/src/ATen/TensorIterator.cpp, ``fast_set_up`` and ``reorder_dimensions`` (2.14).

    >>> rows, columns = torch.zeros(2, 3), torch.zeros(3, 2).t()
    >>> elementwise_strides((2, 3), [columns, rows]), elementwise_strides((2, 3), [torch.zeros(3), columns])
    ((1, 2), (1, 2))
    >>> elementwise_strides((2, 3), [torch.zeros(()).expand(2, 3), columns])
    (1, 2)
    """
    rank = len(sizes)
    if all(tuple(tensor.shape) == tuple(sizes) for tensor in tensors):
        if all(tensor.is_contiguous() for tensor in tensors):
            return _dense(sizes, range(rank - 1, -1, -1))
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(rank)
        if last is not None and all(tensor.is_contiguous(memory_format=last) for tensor in tensors):
            return _dense(sizes, [1, *range(rank - 1, 1, -1), 0])
    strides = [_broadcast_strides(tensor, sizes) for tensor in tensors]
    order = list(range(rank - 1, -1, -1))  # the fastest first
    for begin in range(1, rank):
        place = begin
        for before in range(begin - 1, -1, -1):
            swap = _compare(order[before], order[place], strides, sizes)
            if swap > 0:
                order[before], order[place] = order[place], order[before]
                place = before
            elif swap < 0:
                break
    return _dense(sizes, order)


def _compare(before: int, after: int, strides: Sequence[Sequence[int]], sizes: Sequence[int]) -> int:
    """Return 1 if two dimensions are to be swapped, -1 if they are in order, 0 if no tensor tells."""
    for stride in strides:
        if not stride[before] or not stride[after]:
            continue
        if stride[before] != stride[after]:
            return 1 if stride[before] > stride[after] else -1
        if sizes[before] > sizes[after]:
            return 1
    return 0


def _broadcast_strides(tensor: torch.Tensor, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a tensor broadcast to ``sizes``: 0 where it has one value."""
    missing = len(sizes) - tensor.dim()
    own = (
        0 if size == 1 and size != whole else stride
        for size, stride, whole in zip(tensor.shape, tensor.stride(), sizes[missing:], strict=True)
    )
    return (*(0 for _ in range(missing)), *own)


def _dense(sizes: Sequence[int], order: Iterable[int]) -> tuple[int, ...]:
    """Return the strides of a tensor without gaps, whose fastest dimension comes first in ``order``."""
    strides, step = [0] * len(sizes), 1
    for dim in order:
        strides[dim] = step
        step *= max(1, sizes[dim])
    return tuple(strides)
