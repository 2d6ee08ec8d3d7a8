"""Follow the few values of fake tensors that are known, so that a step can read them.

Known are whole numbers of the batch (lengths), numbers in buffers, and how many elements of a mask are true, since a
step that selects by a mask is planned as if all were. Results of operators on known values are known as well. Of all
other tensors a number reads as 0, and a condition as false unless it is a check that all numbers pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_memplan.data.batches import tensors_of
from lightning_memplan.trace.storages import key_of

#: Where known values come from; those of a buffer are certain
Origin = Literal["batch", "mask", "buffer"]

# attributes of a fake tensor
_TRUE = "_memplan_true"  # everything in it is true
_NUMBERS = "_memplan_numbers"  # its values, on the host
_ORIGIN = "_memplan_origin"  # where its values come from

_HOST = torch.device("cpu")
_MAX_NUMBERS = 16  #: of a buffer, whose values are remembered

_READ_VALUE = torch.ops.aten._local_scalar_dense.default
_EQUAL = torch.ops.aten.equal.default
_TO_COPY = torch.ops.aten._to_copy.default
_RAND = torch.ops.aten.rand.default
_ALL_TRUE = torch.ops.aten._is_all_true.default
_SAME = torch.ops.aten.eq.Tensor
_NOT = torch.ops.aten.ne.Scalar
_BOTH = frozenset(
    {
        torch.ops.aten.all.default,
        torch.ops.aten.all.dim,
        torch.ops.aten.bitwise_and.Tensor,
        torch.ops.aten.logical_and.default,
        torch.ops.aten.mul.Tensor,
    }
)

#: Operators that give a value to Python
READS = frozenset({_READ_VALUE, _EQUAL})

#: Operators that count how many elements of a mask are true
COUNTS = frozenset({torch.ops.aten.sum.default, torch.ops.aten.sum.dim_IntList, torch.ops.aten.count_nonzero.default})

#: Operators whose result may be true of all numbers
CHECKS = _BOTH | {_ALL_TRUE, _SAME, _NOT}


class Known(NamedTuple):
    """The result of an operator on known values, and where these come from."""

    result: Any
    origin: Origin


class KnownValues:
    """Values of fake tensors that are known, with a count of the reads that a plan rests on.

    >>> values = KnownValues()
    >>> values.read(torch.ops.aten._local_scalar_dense.default, (torch.zeros(1),)), values.values_read
    (0.0, 1)
    """

    def __init__(self) -> None:
        self.numbers: Mapping[int, torch.Tensor] = {}  #: id of a batch's tensor -> the values that stand for its own
        self.knows_buffers = False  #: there are buffers whose values are remembered (see :func:`remember`)
        self.values_read = 0  #: how often the step read an unknown value, and was given 0
        self.numbers_taken = 0  #: how often the step read whole numbers of the batch
        self.lengths_taken = 0  #: how often values decide how long a result is, which was made at its longest
        self._has_counted = False  # some mask's elements

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Known | None:
        """Run an operator on known values, on the host; return None where its result is not known."""
        if not self.numbers and not self._has_counted and not self.knows_buffers:
            return None
        result = self._result(func, args, kwargs)
        return None if result is None else Known(result, self._origin(args, kwargs))

    def take(self, func: Any, kwargs: Mapping[str, Any], known: Known) -> bool:
        """Count a known result that leaves the GPU; return False for one that stays there."""
        if func is not _READ_VALUE and not (func is _TO_COPY and kwargs.get("device") == _HOST):
            return False
        self.numbers_taken += known.origin == "batch"
        self.lengths_taken += known.origin == "mask"
        return True

    def count(self, out: Any, mask: torch.Tensor) -> Any:
        """Remember that all elements of ``mask`` are true, for its count ``out``."""
        self._has_counted = True
        out.__dict__[_NUMBERS] = torch.full(out.shape, mask.numel() // max(1, out.numel()))
        out.__dict__[_ORIGIN] = "mask"
        return out

    def read(self, func: Any, args: Sequence[Any]) -> Any:
        """Return what one of ``READS`` gives; NotImplemented for an unknown whole number, which nothing stands for."""
        first = args[0]
        if func is _EQUAL:
            same = key_of(first.untyped_storage()) == key_of(args[1].untyped_storage())
            self.values_read += not same and first.shape == args[1].shape
            return same
        if first.dtype is torch.bool:
            self.values_read += 1
            return _TRUE in first.__dict__
        if first.is_floating_point():
            self.values_read += 1
            return 0.0
        return NotImplemented

    def all_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return all values of a fake tensor, for NumPy or a list: those that are known, else zeros."""
        known: torch.Tensor | None = tensor.__dict__.get(_NUMBERS)
        self.values_read += known is None
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if known is None else known

    def _result(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if func is _TO_COPY and id(args[0]) in self.numbers:
            return self.numbers[id(args[0])].clone()
        if not any(map(_has_numbers, args)):
            return None
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = all(_has_numbers(leaf) or not isinstance(leaf, FakeTensor) for leaf in leaves)
        if not known or torch.Tag.nondeterministic_seeded in func.tags:
            for leaf in filter(_has_numbers, leaves if func._schema.is_mutable else ()):
                del leaf.__dict__[_NUMBERS]
            return None
        return func(*tree_map(_on_host, args), **tree_map(_on_host, dict(kwargs)))

    def _origin(self, args: Any, kwargs: Any) -> Origin:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        found = {"batch" if id(leaf) in self.numbers else leaf.__dict__.get(_ORIGIN, "buffer") for leaf in leaves}
        origins: tuple[Origin, ...] = ("batch", "mask")
        return next((origin for origin in origins if origin in found), "buffer")


def attach(out: Any, known: Known) -> None:
    """Give the known result of an operator to the fake tensors that it made."""
    for made, value in zip(tree_leaves(out), tree_leaves(known.result), strict=True):
        if isinstance(made, FakeTensor) and not made.is_floating_point():
            made.__dict__[_NUMBERS], made.__dict__[_ORIGIN] = value, known.origin


def remember(fake: torch.Tensor, like: torch.Tensor) -> bool:
    """Give a fake tensor the values of ``like``, where these are a few whole numbers; return True if it has them.

    So a step may read at which place of a buffer its queue begins, or a flag that it has begun.
    """
    values = like.__dict__.get(_NUMBERS) if isinstance(like, FakeTensor) else None if like.is_meta else like
    if values is None or values.numel() > (1 if values.is_floating_point() else _MAX_NUMBERS):
        return False
    fake.__dict__[_NUMBERS] = values.detach().to("cpu", copy=True)
    return True


def has_values(tensor: torch.Tensor) -> bool:
    """Check that the values of a fake tensor are known."""
    return _NUMBERS in tensor.__dict__


def largest_numbers(batch: Any, largest: Any) -> dict[int, torch.Tensor]:
    """Return values that stand for the whole numbers of ``batch``, by the id of the tensor that has one a sample.

    All are the largest number (of lengths, say) in ``largest``, the batch of the most samples: so batches of every size
    are alike, and none is too small.

    >>> lengths = torch.tensor([3, 7, 5])
    >>> [numbers.tolist() for numbers in largest_numbers(lengths[:2], lengths).values()]
    [[7, 7]]
    """
    # a list of samples is longer in ``largest``
    pairs = list(zip(tensors_of(batch), tensors_of(largest), strict=False))
    return {
        id(own): torch.full_like(own, int(whole.max()))
        for own, whole in pairs
        if own.dim() == whole.dim() == 1
        and min(own.numel(), whole.numel())
        and len({own.dtype, whole.dtype}) == 1
        and not own.is_floating_point()
        and own.dtype is not torch.bool
    }


def run_on_host(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operator on real tensors of the host.

    A single random number decides whether a layer is left out (``layerdrop``); it is the largest, so that every layer
    runs.
    """
    if func is _RAND and not args[0]:
        return torch.tensor(1 - 2**-24)
    return func(*args, **kwargs)


def mark_true(out: Any, func: Any, args: Sequence[Any]) -> None:
    """Mark a condition that holds for all numbers: that they are finite, and checks without which a step stops.

    Source: aten/src/ATen/native/TensorCompare.cpp, ``isfinite``; torch/distributions/distribution.py (2.14).
    """
    if isinstance(out, FakeTensor) and out.dtype is torch.bool:
        both = func in _BOTH and all(_TRUE in a.__dict__ for a in args if isinstance(a, torch.Tensor))
        same = func is _SAME and args[0] is args[1]
        if both or same or func is _ALL_TRUE or (func is _NOT and args[1] == math.inf):
            out.__dict__[_TRUE] = True


def _has_numbers(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_numbers, value))
    return isinstance(value, FakeTensor) and _NUMBERS in value.__dict__


def _on_host(value: Any) -> Any:
    if isinstance(value, FakeTensor):
        return value.__dict__[_NUMBERS]
    return _HOST if isinstance(value, torch.device) else value
