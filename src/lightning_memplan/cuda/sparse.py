"""Sparse gradients, as of ``Embedding(sparse=True)``, and the operators of optimizers that take them.

A sparse tensor (COO) is two blocks, the places and the values, with an entry for every index of the batch. ``coalesce``
makes one entry for every row that is named. Values decide how many these are: the rules take the upper bound.

Source: aten/src/ATen/native/sparse (2.14), ``SparseTensor.cpp``, ``SparseTensorMath.cpp`` and those under ``cuda``.
"""

from __future__ import annotations

from typing import Any

import torch

from lightning_memplan.cuda.rule_set import Operator, aten, decomposes_sparse


def is_sparse(value: Any) -> bool:
    """Check for a sparse tensor (COO).

    >>> is_sparse(torch.zeros(2, 2).to_sparse()), is_sparse(torch.zeros(2, 2))
    (True, False)
    """
    return isinstance(value, torch.Tensor) and value.layout is torch.sparse_coo


def parts(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the places of a sparse tensor, a row for each sparse dimension, and its values."""
    return aten._indices.default(tensor), aten._values.default(tensor)


def _made(indices: torch.Tensor, values: torch.Tensor, like: torch.Tensor, coalesced: bool) -> torch.Tensor:
    """Make a sparse tensor of its two parts."""
    dims = like.sparse_dim(), values.dim() - 1
    return aten._sparse_coo_tensor_with_dims_and_tensors.default(  # type: ignore[no-any-return]
        *dims,
        like.shape,
        indices,
        values,
        is_coalesced=coalesced,
        dtype=values.dtype,
        layout=torch.sparse_coo,
        device=values.device,
    )


@decomposes_sparse(aten.clone)
def clone(tensor: torch.Tensor, **_: Any) -> torch.Tensor:
    indices, values = parts(tensor)
    return _made(aten.clone.default(indices), aten.clone.default(values), tensor, tensor.is_coalesced())


def _elementwise(operator: Operator) -> None:
    """Register an operator that changes the values of one sparse tensor alone."""

    @decomposes_sparse(operator)
    def kernel(tensor: torch.Tensor, *others: Any, **kwargs: Any) -> Any:
        if any(map(is_sparse, others)):
            return NotImplemented
        indices, values = parts(tensor)
        return _made(aten.clone.default(indices), operator(values, *others, **kwargs), tensor, tensor.is_coalesced())


_elementwise(aten.mul.Tensor)
_elementwise(aten.neg.default)


def _joined(one: torch.Tensor, other: torch.Tensor, alpha: float) -> torch.Tensor:
    """Put the entries of one after those of the other (``add_out_sparse_cuda``)."""
    (places, values), (more_places, more_values) = parts(one), parts(other)
    if alpha != 1:
        more_values = aten.mul.Tensor(more_values, alpha)
    return _made(aten.cat.default([places, more_places], 1), aten.cat.default([values, more_values]), one, False)


@decomposes_sparse(aten.add.Tensor)
def add(one: torch.Tensor, other: torch.Tensor, *, alpha: float = 1) -> Any:
    return _joined(one, other, alpha) if is_sparse(one) and is_sparse(other) else NotImplemented


@decomposes_sparse(aten.add_.Tensor)
def add_(one: torch.Tensor, other: torch.Tensor, *, alpha: float = 1) -> torch.Tensor:
    if is_sparse(one):
        one.data = _joined(one, other, alpha)
    return one  # add_out_dense_sparse_cuda: entries are added where they belong, as they are


@decomposes_sparse(aten._coalesce)
def coalesce(tensor: torch.Tensor) -> torch.Tensor:
    """Sort the places, of which equal ones become one (``_coalesce_sparse_cuda``)."""
    indices, values = parts(tensor)
    count = values.size(0)
    flat, order, offsets = (indices.new_empty(count) for _ in range(3))
    indices.new_empty(2 * 8 * count + 511, dtype=torch.uint8)  # to sort pairs of 8-byte numbers (thrust, measured)
    rows = values.new_empty(values.shape)
    places = flat.view(1, count) if tensor.sparse_dim() == 1 else indices.new_empty(indices.shape)
    del order, offsets
    return _made(places, rows, tensor, True)


@decomposes_sparse(aten.sparse_mask)
def mask(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Multiply a dense tensor with a sparse one of ones."""
    indices, values = parts(mask)
    one = values.new_ones(1)
    found = tensor.new_empty(values.shape)
    places = aten.clone.default(indices)
    product = aten.mul.Tensor(found, one.expand(values.shape[:1]).view(-1, *(1,) * (values.dim() - 1)))
    del found, one
    return _made(places, product, mask, mask.is_coalesced())
