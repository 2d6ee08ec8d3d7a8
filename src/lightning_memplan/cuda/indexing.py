"""Indexing, embeddings, ``nonzero``, ``unique``, NMS and CTC: sorted indices and other scratch memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from lightning_memplan.cuda.layout import nbytes
from lightning_memplan.cuda.rule_set import aten


def embedding(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/Embedding.cpp: indices are made a row, by a copy where they are none."""
    indices = args[1]
    several = [(size, stride) for size, stride in zip(indices.shape, indices.stride(), strict=True) if size != 1]
    if all(stride == size * step for (_, stride), (size, step) in pairwise(several)):
        return ()
    return (nbytes(indices), slice(None))


def embedding_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/cuda/Embedding.cu: indices are sorted, unless there are few of them."""
    grad, indices, rows = args[:3]
    n = indices.numel()
    each, number = ("above", 3072, n, 8 * n), ("above", 3072, n, 8)
    dense = tuple(nbytes(tensor) for tensor in (indices, grad) if not tensor.is_contiguous())
    sorting = [each, ("sort_pairs", 3072, n, rows)]
    segments, places, values, scanned = (("embedding_segments", k, n, rows, 4 * out.size(1)) for k in (0, 1, 2, 3))
    unique = [each, ("scan", 3072, n, 320)]
    return (
        *dense,
        each,
        each,
        sorting,
        slice(None),
        each,
        number,
        unique,
        segments,
        segments,
        [scanned],
        number,
        places,
        values,
    )


def index_copies(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/TensorAdvancedIndexing.cpp, ``AdvancedIndex``: indices that lie otherwise than one another
    when they have been expanded are copied."""
    given = [index for index in args[1] if index is not None]
    moved = tuple(nbytes(index) for index in given if index.device != args[0].device)  # from the host
    if moved:
        return (*moved, slice(None))
    if len(given) < 2 or any(index.dtype != torch.int64 for index in given):
        return ()
    indices = torch.broadcast_tensors(*given)
    if len({index.stride() for index in indices}) < 2:
        return ()
    return (*(nbytes(index) for index in indices if not index.is_contiguous()), slice(None))


def index_put(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    """aten/src/ATen/native/cuda/Indexing.cu, index_put_with_sort_kernel: to add values up, indices are made one, and
    sorted."""
    values = args[2]
    filled = values.numel() == 1 and values.device != args[0].device  # Indexing.cpp, canDispatchToMaskedFill
    masks = [] if filled else [index for index in args[1] if index is not None and index.dtype == torch.bool]
    if masks:  # at their longest, as in LONGEST
        return [8 * mask.dim() * mask.numel() for mask in masks]
    if not (args[3] if len(args) > 3 else kwargs.get("accumulate", False)):
        return index_copies(args, kwargs, out)
    indices = [index for index in args[1] if index is not None and index.dtype == torch.int64]
    if not indices:
        return ()
    n = math.prod(torch.broadcast_shapes(*(index.shape for index in indices)))
    rows = math.prod(args[0].size(d) for d, index in enumerate(args[1]) if index is not None)
    values = () if args[2].is_contiguous() else (args[2].numel() * args[2].element_size(),)
    others = ([8 * n, 8 * n] for _ in indices[1:])
    return (8 * n, [8 * n], *others, *values, 8 * n, 8 * n, 8 * n, [("sort_pairs", 0, n, rows)])


def _ctc_loss(log_probs: torch.Tensor, targets: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    # aten/src/ATen/native/cuda/LossCTC.cu; targets in one row are taken to be of equal length
    batch = log_probs.size(1)
    longest = targets.size(1) if targets.dim() == 2 else -(-targets.numel() // max(1, batch))
    held = _ctc_numbers(log_probs)
    alpha = log_probs.new_empty(batch, log_probs.size(0), 2 * longest + 1)
    losses = log_probs.new_empty(batch)
    del held
    return losses, alpha


def _ctc_numbers(log_probs: torch.Tensor) -> list[torch.Tensor]:
    """Both lengths of each sample, and where its targets begin, which come from the host."""
    return [torch.empty(log_probs.size(1), dtype=torch.int64, device=log_probs.device) for _ in range(3)]


def ctc_loss_backward(grad: torch.Tensor, log_probs: torch.Tensor, *others: Any) -> torch.Tensor:
    held, beta = _ctc_numbers(log_probs), torch.empty_like(others[4])
    made = torch.empty_like(log_probs, memory_format=torch.contiguous_format)
    del held, beta
    return made


_SUM, _MEAN, _MAX = range(3)  # aten/src/ATen/native/EmbeddingBag.h, EmbeddingBagMode


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
    """aten/src/ATen/native/cuda/EmbeddingBag.cu, ``_embedding_bag_cuda``."""
    bags = offsets.size(0) - include_last_offset
    sizes, places = indices.new_empty(offsets.shape), indices.new_empty(indices.shape)
    out = weight.new_empty((bags, weight.size(1)))
    return out, places, sizes, indices.new_empty((bags, weight.size(1)) if mode == _MAX else (0,))


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
    """aten/src/ATen/native/EmbeddingBag.cpp, ``_embedding_bag_sparse_backward``."""
    if not sparse:
        return NotImplemented
    values = aten.index_select.default(grad, 0, offset2bag)
    if mode == _MEAN:
        sizes = aten.reciprocal.default(bag_size.to(grad.dtype))
        aten.mul_.Tensor(values, aten.index_select.default(sizes.unsqueeze(1), 0, offset2bag))
    if per_sample_weights is not None:
        aten.mul_.Tensor(values, per_sample_weights.unsqueeze(1))
    return aten.embedding_sparse_backward.default(values, indices, num_weights, padding_idx, scale_grad_by_freq)


#: Kernels that are told by other operators: what these allocate and free is what CUDA's kernel does
# ----------------------------------------------------------------------------------------- results of unknown length
def _nonzero(mask: torch.Tensor) -> torch.Tensor:
    # aten/src/ATen/native/cuda/Nonzero.cu: a result of one row a dimension, seen through its transpose
    return torch.empty((mask.dim(), mask.numel()), dtype=torch.int64, device=mask.device).t()


def _index_by_mask(tensor: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> Any:
    # aten/src/ATen/native/IndexingUtils.h, expandTensors: a mask becomes the places where it is true
    masks = [index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices]
    if not any(masks):
        return NotImplemented
    found: list[torch.Tensor | None] = []
    for index, is_mask in zip(indices, masks, strict=True):
        found += _nonzero(index).unbind(1) if is_mask and index is not None else [index]
    return aten.index.Tensor(tensor, found)


def _masked_select(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    shape = torch.broadcast_shapes(tensor.shape, mask.shape)
    return torch.empty(math.prod(shape), dtype=tensor.dtype, device=tensor.device)


def _unique(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flat = tensor.numel()
    counts = [torch.empty(flat, dtype=torch.int64, device=tensor.device) for _ in range(2)]
    return torch.empty(flat, dtype=tensor.dtype, device=tensor.device), counts[0].view(tensor.shape), counts[1]


#: operators whose result is as long as the values say: at its longest
LONGEST: Mapping[Any, Callable[..., Any]] = {
    aten.nonzero.default: _nonzero,
    aten.index.Tensor: _index_by_mask,
    aten.masked_select.default: _masked_select,
    aten._ctc_loss.default: _ctc_loss,
    aten._ctc_loss.Tensor: _ctc_loss,
    aten._unique2.default: _unique,
    aten._unique.default: lambda *args, **kwargs: _unique(*args)[:2],
}


def longest() -> Mapping[Any, Callable[..., Any]]:
    """``LONGEST``, and torchvision's operators where it is loaded."""
    if "torchvision" not in sys.modules or not hasattr(torch.ops.torchvision, "nms"):
        return LONGEST
    return {**LONGEST, torch.ops.torchvision.nms.default: _nms}


def _nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    # torchvision/csrc/ops/cuda/nms_kernel.cu, 0.29: boxes in the order of their scores, and a bit for each pair
    order = scores.sort(descending=True)[1]
    ordered = boxes.index_select(0, order).contiguous()
    pairs = torch.empty(len(boxes) * -(-len(boxes) // 64), dtype=torch.int64, device=boxes.device)
    kept = torch.empty(len(boxes), dtype=torch.bool, device=boxes.device)
    del ordered, pairs, kept
    return torch.empty_like(order)
