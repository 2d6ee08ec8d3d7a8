"""Remember the values of a few numbers in fake tensors, so that a step can read them."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

TRUE = "_memplan_true"  # a fake tensor's attribute: all that is in it is true


NUMBERS = "_memplan_numbers"  # a fake tensor's attribute: its values, where they are known


ORIGIN = "_memplan_origin"  # another: where these are from


def fake_mode() -> FakeTensorMode:
    """A mode that a step's own copies of its tensors share: copying one copies its attributes, its mode among them."""
    mode: Any = FakeTensorMode(allow_non_fake_inputs=True)
    mode.__deepcopy__ = lambda memo: mode
    return mode  # type: ignore[no-any-return]


def tell(fake: torch.Tensor, like: torch.Tensor) -> bool:
    """Give a fake tensor the values of the few numbers that it stands for, if they have any: whether it has them now.

    So a step may read where a queue begins, or whether it has begun. Its operators and views have values too.
    """
    values = like.__dict__.get(NUMBERS) if isinstance(like, FakeTensor) else None if like.is_meta else like
    if values is None or values.numel() > (1 if values.is_floating_point() else 16):
        return False
    fake.__dict__[NUMBERS] = values.detach().to("cpu", copy=True)
    return True


def has_values(tensor: torch.Tensor) -> bool:
    """Whether those of a fake tensor are known."""
    return NUMBERS in tensor.__dict__


def has_numbers(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(has_numbers, value))
    return isinstance(value, FakeTensor) and NUMBERS in value.__dict__
