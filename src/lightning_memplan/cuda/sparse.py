"""What CUDA's kernels of sparse gradients allocate: those of ``Embedding(sparse=True)``, and the optimizers that take
them.

A sparse tensor (COO) is two blocks, the places and the values, with an entry for every index of the batch; ``coalesce``
makes them one for every row that is named. How many rows these are is a matter of values: all that the batch can name.

Source: aten/src/ATen/native/sparse (2.14), ``SparseTensor.cpp``, ``SparseTensorMath.cpp`` and those under ``cuda``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

aten = torch.ops.aten


def is_sparse(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.sparse_coo


def parts(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The places (a row a sparse dimension) and the values of a sparse tensor."""
    return aten._indices.default(tensor), aten._values.default(tensor)


def made(indices: torch.Tensor, values: torch.Tensor, like: torch.Tensor, coalesced: bool) -> torch.Tensor:
    """A sparse tensor of these two parts."""
    dims = like.sparse_dim(), values.dim() - 1
    how: dict[str, Any] = {"dtype": values.dtype, "layout": torch.sparse_coo, "device": values.device}
    return aten._sparse_coo_tensor_with_dims_and_tensors.default(  # type: ignore[no-any-return]
        *dims, like.shape, indices, values, is_coalesced=coalesced, **how
    )


def _clone(tensor: torch.Tensor, **_: Any) -> torch.Tensor:
    indices, values = parts(tensor)
    return made(aten.clone.default(indices), aten.clone.default(values), tensor, tensor.is_coalesced())


def _elementwise(operator: Any) -> Callable[..., Any]:
    """An operator that changes the values of one sparse tensor alone: it is asked of the values."""

    def kernel(tensor: torch.Tensor, *others: Any, **kwargs: Any) -> Any:
        if any(map(is_sparse, others)):
            return NotImplemented
        indices, values = parts(tensor)
        return made(aten.clone.default(indices), operator(values, *others, **kwargs), tensor, tensor.is_coalesced())

    return kernel


def _joined(one: torch.Tensor, other: torch.Tensor, alpha: float) -> torch.Tensor:
    """``add_out_sparse_cuda``: the entries of both, one after the other."""
    (places, values), (more_places, more_values) = parts(one), parts(other)
    if alpha != 1:
        more_values = aten.mul.Tensor(more_values, alpha)
    return made(aten.cat.default([places, more_places], 1), aten.cat.default([values, more_values]), one, False)


def _add(one: torch.Tensor, other: torch.Tensor, *, alpha: float = 1) -> Any:
    return _joined(one, other, alpha) if is_sparse(one) and is_sparse(other) else NotImplemented


def _add_(one: torch.Tensor, other: torch.Tensor, *, alpha: float = 1) -> torch.Tensor:
    if is_sparse(one):
        one.data = _joined(one, other, alpha)
    return one  # add_out_dense_sparse_cuda: entries are added where they belong, as they are


def _coalesce(tensor: torch.Tensor) -> torch.Tensor:
    """``_coalesce_sparse_cuda``: places are sorted, and those that are alike become one."""
    indices, values = parts(tensor)
    count = values.size(0)
    flat, order, offsets = (indices.new_empty(count) for _ in range(3))
    indices.new_empty(2 * 8 * count + 511, dtype=torch.uint8)  # to sort pairs of 8-byte numbers (thrust, measured)
    rows = values.new_empty(values.shape)
    places = flat.view(1, count) if tensor.sparse_dim() == 1 else indices.new_empty(indices.shape)
    del order, offsets
    return made(places, rows, tensor, True)


def _mask(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``sparse_mask`` of a dense tensor: it is multiplied with a sparse one of ones."""
    indices, values = parts(mask)
    one = values.new_ones(1)
    found = tensor.new_empty(values.shape)
    places = aten.clone.default(indices)
    product = aten.mul.Tensor(found, one.expand(values.shape[:1]).view(-1, *(1,) * (values.dim() - 1)))
    del found, one
    return made(places, product, mask, mask.is_coalesced())


#: Kernels of sparse tensors, told by other operators: what these allocate and free is what they do
SPARSE: Mapping[Any, Callable[..., Any]] = {
    aten._coalesce.default: _coalesce,
    aten.add.Tensor: _add,
    aten.add_.Tensor: _add_,
    aten.clone.default: _clone,
    aten.mul.Tensor: _elementwise(aten.mul.Tensor),
    aten.neg.default: _elementwise(aten.neg.default),
    aten.sparse_mask.default: _mask,
}
