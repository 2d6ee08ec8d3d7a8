"""Indexing, embeddings, ``nonzero``, ``unique``, NMS and CTC: sorted indices and other scratch memory.

Some results are as long as the values say. Their rules are upper bounds: the length that no values exceed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from lightning_memplan.cuda.layout import contiguous_copies, copy_of
from lightning_memplan.cuda.rule_set import (
    OUTPUTS,
    Allocation,
    Call,
    Decomposition,
    Gpu,
    Operator,
    Scope,
    Scratch,
    allocates,
    aten,
    decomposes,
    scratch,
    upper_bound,
)


@allocates(aten.embedding)
def embedding(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Indices are made one row, by a copy if their strides ask for one.

    Source: aten/src/ATen/native/Embedding.cpp (2.14).
    """
    indices = call.args[1]
    several = [(size, stride) for size, stride in zip(indices.shape, indices.stride(), strict=True) if size != 1]
    if not all(stride == size * step for (_, stride), (size, step) in pairwise(several)):
        yield copy_of(indices)
    yield OUTPUTS


@allocates(aten.embedding_dense_backward)
def embedding_backward(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Indices are sorted, unless there are few of them.

    Source: aten/src/ATen/native/cuda/Embedding.cu (2.14).
    """
    grad, indices, rows = call.args[:3]
    n = indices.numel()
    of_each, number = scratch("above", 3072, n, 8 * n), scratch("above", 3072, n, 8)
    yield from contiguous_copies(indices, grad)
    yield of_each
    yield of_each
    yield Scope([of_each, scratch("sort_pairs", 3072, n, rows)])
    yield OUTPUTS
    yield of_each
    yield number
    yield Scope([of_each, scratch("scan", 3072, n, 320)])
    segments, places, values, scanned = (
        scratch("embedding_segments", part, n, rows, 4 * call.out.size(1), gpu.multiprocessors) for part in range(4)
    )
    yield segments
    yield segments
    yield Scope([scanned])
    yield number
    yield places
    yield values


@allocates(aten.topk)
def topk(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """Source: aten/src/ATen/native/cuda/TensorTopK.cu, ``launch_gather_topk_kernel`` (2.14)."""
    yield OUTPUTS
    yield from contiguous_copies(call.input)


@allocates(aten.index.Tensor)
def index_tensor(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    yield from _index_copies(call)
    yield OUTPUTS


def _index_copies(call: Call) -> Iterator[Scratch]:
    """Yield a copy of each index on the host, else of those whose strides differ from each other's when expanded.

    Source: aten/src/ATen/native/TensorAdvancedIndexing.cpp, ``AdvancedIndex`` (2.14).
    """
    given = [index for index in call.args[1] if index is not None]
    moved = [index for index in given if index.device != call.input.device]
    if moved:
        yield from map(copy_of, moved)
    elif len(given) > 1 and all(index.dtype == torch.int64 for index in given):
        indices = torch.broadcast_tensors(*given)
        if len({index.stride() for index in indices}) > 1:
            yield from (copy_of(index) for index in indices if not index.is_contiguous())


@allocates(aten.index_put, aten.index_put_)
def index_put(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    """To add values up, indices are made one number each, and sorted; a mask becomes indices, at its largest.

    Source: aten/src/ATen/native/cuda/Indexing.cu, ``index_put_with_sort_kernel``, and Indexing.cpp,
    ``canDispatchToMaskedFill`` (2.14).
    """
    tensor, given, values = call.args[:3]
    filled = values.numel() == 1 and values.device != tensor.device
    masks = [] if filled else [index for index in given if index is not None and index.dtype == torch.bool]
    if not masks and not call.argument(3, "accumulate", False):
        yield from _index_copies(call)
        yield OUTPUTS
        return
    yield OUTPUTS
    if masks:
        yield from (Scratch(8 * mask.dim() * mask.numel()) for mask in masks)
        return
    indices = [index for index in given if index is not None and index.dtype == torch.int64]
    if not indices:
        return
    n = math.prod(torch.broadcast_shapes(*(index.shape for index in indices)))
    rows = math.prod(tensor.size(d) for d, index in enumerate(given) if index is not None)
    numbers = Scratch(8 * n)
    yield numbers
    yield Scope([numbers])
    for _ in indices[1:]:
        yield Scope([numbers, numbers])
    yield from contiguous_copies(values)
    yield numbers
    yield numbers
    yield numbers
    yield Scope([scratch("sort_pairs", 0, n, rows - 1)])


# --------------------------------------------------------------------------------------------------- bags of embeddings

_SUM, _MEAN, _MAX = range(3)  # aten/src/ATen/native/EmbeddingBag.h, EmbeddingBagMode


@decomposes(aten._embedding_bag)
def embedding_bag(
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[torch.Tensor, ...]:
    """Source: aten/src/ATen/native/cuda/EmbeddingBag.cu, ``_embedding_bag_cuda`` (2.14)."""
    bags = offsets.size(0) - include_last_offset
    sizes, places = indices.new_empty(offsets.shape), indices.new_empty(indices.shape)
    out = weight.new_empty((bags, weight.size(1)))
    return out, places, sizes, indices.new_empty((bags, weight.size(1)) if mode == _MAX else (0,))


@decomposes(aten._embedding_bag_backward)
def embedding_bag_backward(
    grad: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    offset2bag: torch.Tensor,
    bag_size: torch.Tensor,
    maximum_indices: torch.Tensor,
    num_weights: int,
    scale_grad_by_freq: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: torch.Tensor | None,
    padding_idx: int = -1,
) -> Any:
    """Source: aten/src/ATen/native/EmbeddingBag.cpp, ``_embedding_bag_sparse_backward`` (2.14)."""
    if not sparse:
        return NotImplemented
    values = aten.index_select.default(grad, 0, offset2bag)
    if mode == _MEAN:
        sizes = aten.reciprocal.default(bag_size.to(grad.dtype))
        aten.mul_.Tensor(values, aten.index_select.default(sizes.unsqueeze(1), 0, offset2bag))
    if per_sample_weights is not None:
        aten.mul_.Tensor(values, per_sample_weights.unsqueeze(1))
    return aten.embedding_sparse_backward.default(values, indices, num_weights, padding_idx, scale_grad_by_freq)


# ------------------------------------------------------------------------------------------------------------------ CTC


@upper_bound(aten._ctc_loss.default, aten._ctc_loss.Tensor)
def ctc_loss(log_probs: torch.Tensor, targets: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets in one row are taken to be of equal length.

    Source: aten/src/ATen/native/cuda/LossCTC.cu (2.14).
    """
    batch = log_probs.size(1)
    longest = targets.size(1) if targets.dim() == 2 else -(-targets.numel() // max(1, batch))
    held = _ctc_numbers(log_probs)
    alpha = log_probs.new_empty(batch, log_probs.size(0), 2 * longest + 1)
    losses = log_probs.new_empty(batch)
    del held
    return losses, alpha


@decomposes(aten._ctc_loss_backward.default, aten._ctc_loss_backward.Tensor)
def ctc_loss_backward(grad: torch.Tensor, log_probs: torch.Tensor, *others: Any) -> torch.Tensor:
    held, beta = _ctc_numbers(log_probs), torch.empty_like(others[4])
    made = torch.empty_like(log_probs, memory_format=torch.contiguous_format)
    del held, beta
    return made


def _ctc_numbers(log_probs: torch.Tensor) -> list[torch.Tensor]:
    """Make both lengths of each sample, and the start of its targets, which come from the host."""
    return [torch.empty(log_probs.size(1), dtype=torch.int64, device=log_probs.device) for _ in range(3)]


# ------------------------------------------------------------------------------------------- results of unknown length


@upper_bound(aten.nonzero)
def nonzero(mask: torch.Tensor) -> torch.Tensor:
    """The result has a row for each dimension, and is seen through its transpose.

    Source: aten/src/ATen/native/cuda/Nonzero.cu (2.14).
    """
    return torch.empty((mask.dim(), mask.numel()), dtype=torch.int64, device=mask.device).t()


@upper_bound(aten.index.Tensor)
def index_by_mask(tensor: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> Any:
    """A mask becomes the places where it is true.

    Source: aten/src/ATen/native/IndexingUtils.h, ``expandTensors`` (2.14).
    """
    masks = [index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices]
    if not any(masks):
        return NotImplemented
    found: list[torch.Tensor | None] = []
    for index, is_mask in zip(indices, masks, strict=True):
        found += nonzero(index).unbind(1) if is_mask and index is not None else [index]
    return aten.index.Tensor(tensor, found)


@upper_bound(aten.masked_select)
def masked_select(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    shape = torch.broadcast_shapes(tensor.shape, mask.shape)
    return torch.empty(math.prod(shape), dtype=tensor.dtype, device=tensor.device)


@upper_bound(aten._unique2)
def unique2(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flat = tensor.numel()
    counts = [torch.empty(flat, dtype=torch.int64, device=tensor.device) for _ in range(2)]
    return torch.empty(flat, dtype=tensor.dtype, device=tensor.device), counts[0].view(tensor.shape), counts[1]


@upper_bound(aten._unique)
def unique(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    values, places, _ = unique2(tensor)
    return values, places


def torchvision_upper_bounds() -> Mapping[Operator, Decomposition]:
    """Return the upper bounds of torchvision's operators, where it is loaded."""
    if "torchvision" not in sys.modules or not hasattr(torch.ops.torchvision, "nms"):
        return {}
    return {torch.ops.torchvision.nms.default: _nms}


def _nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Boxes are put in the order of their scores, with a bit for each pair.

    Source: torchvision/csrc/ops/cuda/nms_kernel.cu (0.29).
    """
    order = scores.sort(descending=True)[1]
    ordered = boxes.index_select(0, order).contiguous()
    pairs = torch.empty(len(boxes) * -(-len(boxes) // 64), dtype=torch.int64, device=boxes.device)
    kept = torch.empty(len(boxes), dtype=torch.bool, device=boxes.device)
    del ordered, pairs, kept
    return torch.empty_like(order)
