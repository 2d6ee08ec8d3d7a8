"""A large batch of a few samples, over and over: made on the card, where the host would take longer than the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from lightning_memplan._lightning import apply_to_collection


@dataclass(frozen=True, slots=True)
class Repeated:
    """A batch of ``size`` samples: the ``samples`` of the batch ``few`` in turn. ``whole`` makes it on the host.

    >>> batch = Repeated(torch.tensor([1, 2, 3]), 3, 7, lambda: torch.tensor([1, 2, 3, 1, 2, 3, 1]))
    >>> batch.on(torch.device("cpu"), batch.few)
    tensor([1, 2, 3, 1, 2, 3, 1])
    """

    few: Any
    samples: int
    size: int
    whole: Callable[[], Any]

    def on(self, device: torch.device, few: Any) -> Any:
        """The batch on ``device``, of ``few`` samples that are converted or not: each tensor in a block of its own."""

        def one(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.dim() or tensor.size(0) != self.samples:
                return tensor.to(device)
            made = torch.empty((self.size, *tensor.shape[1:]), dtype=tensor.dtype, device=device)
            made[: self.samples].copy_(tensor)
            there = self.samples
            while there < self.size:
                more = min(there, self.size - there)
                made[there : there + more].copy_(made[:more])
                there += more
            return made

        return apply_to_collection(few, torch.Tensor, one)


def repeats(batches: Sequence[tuple[int, Any]]) -> bool:
    """Whether batches of these sizes are alike: of tensors whose first dimension is the batch, and of nothing else that
    differs.

    >>> repeats([(n, {"image": torch.zeros(n, 3), "scale": torch.ones(1)}) for n in (2, 3, 5)])
    True
    >>> repeats([(n, (torch.zeros(n, 3), ["a name"] * n)) for n in (2, 3, 5)])  # whoever makes these knows how
    False
    """
    (_, (first, shape)), *others = ((size, tree_flatten(batch)) for size, batch in batches)
    for leaves in zip(first, *(leaves for _, (leaves, _) in others), strict=False):
        if not all(isinstance(leaf, torch.Tensor) and type(leaf) is torch.Tensor for leaf in leaves):
            if any(isinstance(leaf, torch.Tensor) for leaf in leaves) or any(leaf != leaves[0] for leaf in leaves[1:]):
                return False
            continue
        fixed = len({tuple(leaf.shape) for leaf in leaves}) == 1
        rest = len({tuple(leaf.shape[1:]) for leaf in leaves}) == 1
        sizes = [(leaf.dim() and leaf.size(0)) == size for (size, _), leaf in zip(batches, leaves, strict=True)]
        plain = all(leaf.device.type == "cpu" and leaf.is_contiguous() and not leaf.is_pinned() for leaf in leaves)
        if not plain or not ((fixed and not any(sizes)) or (rest and all(sizes))):
            return False
    return all(one == shape for _, (_, one) in others)
