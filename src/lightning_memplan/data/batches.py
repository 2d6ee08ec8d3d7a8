"""Walk, measure, cut and tile batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from lightning_memplan.checks import check_batch_size
from lightning_memplan.lightning.compat import apply_to_collection


# ------------------------------------------------------------------------------------------------------------- tensors
def tensors_of(value: object) -> Iterator[Tensor]:
    """Yield every tensor in nested tuples, lists, mappings, dataclasses and objects with a ``to()`` (graphs), in order.

    >>> [tuple(t.shape) for t in tensors_of((torch.ones(2), {"state": [torch.ones(3), None, "text"]}))]
    [(2,), (3,)]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from tensors_of(getattr(value, entry.name, None))
    elif callable(getattr(value, "to", None)) and not isinstance(value, nn.Module):  # Lightning would move it
        for item in getattr(value, "__dict__", {}).values():
            yield from tensors_of(item)


def sample_bytes(batch: object, batch_size: int) -> int:
    """Return the bytes of one sample: those of all tensors in the batch, divided by the batch size.

    >>> sample_bytes({"image": torch.empty(4, 3, 8, 8), "label": torch.empty(4, dtype=torch.int64)}, 4)
    776

    Raises:
        ValueError: ``batch_size`` is less than 1.
    """
    check_batch_size(batch_size)
    return bytes_of(tensors_of(batch), seen=set()) // batch_size


def bytes_of(tensors: Iterator[Tensor], seen: set[int]) -> int:
    """Return the bytes of the tensors whose storage is not in ``seen``, and add their storages to it."""
    total = 0
    for tensor in tensors:
        key = storage_key(tensor)
        if key not in seen:
            seen.add(key)
            total += tensor.numel() * tensor.element_size()
    return total


def storage_key(tensor: Tensor) -> int:
    """Return a key that identifies a storage while it lives (a data pointer is 0 for all fake and meta tensors)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # sparse tensors have no storage of their own
        return id(tensor)


@dataclass(frozen=True, slots=True)
class TiledBatch:
    """A batch of ``size`` samples that repeats the ``samples`` of the batch ``few``; ``whole`` makes it on the host.

    >>> batch = TiledBatch(torch.tensor([1, 2, 3]), 3, 7, lambda: torch.tensor([1, 2, 3, 1, 2, 3, 1]))
    >>> batch.on(torch.device("cpu"), batch.few)
    tensor([1, 2, 3, 1, 2, 3, 1])
    """

    few: Any
    samples: int
    size: int
    whole: Callable[[], Any]

    def on(self, device: torch.device, few: Any) -> Any:
        """Return the batch on ``device``, each tensor in a block of its own.

        ``few`` is the batch of that name, possibly converted to another precision.
        """

        def one(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.dim() or tensor.size(0) != self.samples:
                return tensor.to(device)
            made = torch.empty((self.size, *tensor.shape[1:]), dtype=tensor.dtype, device=device)
            made[: self.samples].copy_(tensor)
            filled = self.samples
            while filled < self.size:
                more = min(filled, self.size - filled)
                made[filled : filled + more].copy_(made[:more])
                filled += more
            return made

        return apply_to_collection(few, torch.Tensor, one)


def repeats(batches: Sequence[tuple[int, Any]]) -> bool:
    """Return True if batches of any size can be tiled from these, given as ``(size, batch)``.

    They can if they differ only in plain tensors whose first dimension is the batch.

    >>> repeats([(n, {"image": torch.zeros(n, 3), "scale": torch.ones(1)}) for n in (2, 3, 5)])
    True
    >>> repeats([(n, (torch.zeros(n, 3), ["a name"] * n)) for n in (2, 3, 5)])  # a list of names cannot be tiled
    False
    """
    (_, (first, shape)), *others = ((size, tree_flatten(batch)) for size, batch in batches)
    for leaves in zip(first, *(leaves for _, (leaves, _) in others), strict=False):
        if not all(isinstance(leaf, torch.Tensor) and type(leaf) is torch.Tensor for leaf in leaves):
            tensors = any(isinstance(leaf, torch.Tensor) for leaf in leaves)
            if tensors or not all(_are_equal(leaf, leaves[0]) for leaf in leaves[1:]):
                return False
            continue
        fixed = len({tuple(leaf.shape) for leaf in leaves}) == 1
        rest = len({tuple(leaf.shape[1:]) for leaf in leaves}) == 1
        sizes = [(leaf.dim() and leaf.size(0)) == size for (size, _), leaf in zip(batches, leaves, strict=True)]
        plain = all(leaf.device.type == "cpu" and leaf.is_contiguous() and not leaf.is_pinned() for leaf in leaves)
        if not plain or not ((fixed and not any(sizes)) or (rest and all(sizes))):
            return False
    return all(one == shape for _, (_, one) in others)


def _are_equal(one: object, other: object) -> bool:
    """Compare two leaves of any kind; leaves that cannot be compared are different.

    >>> import numpy as np
    >>> _are_equal(np.array([1, 2]), np.array([1, 2])), _are_equal(np.zeros(2), np.zeros(3)), _are_equal("a", None)
    (True, False, False)
    """
    if one is other:
        return True
    if getattr(one, "shape", None) != getattr(other, "shape", None):
        return False
    try:
        same: Any = one == other
        return bool(same.all() if hasattr(same, "all") else same)
    except Exception:  # noqa: BLE001 - a comparison of the user's own
        return False


# ------------------------------------------------------------------------------------------------------------- a batch
def batch_size_of(batch: object) -> int:
    """Return the first dimension of the first tensor that has one.

    Raises:
        ValueError: No tensor has a dimension.
    """
    for leaf in tensors(batch):
        if leaf.dim():
            return leaf.size(0)
    if any(leaf.dim() for leaf in hidden_tensors(batch)):
        raise ValueError(
            f"{kind(batch)} cannot be cut into batches of other sizes: pass the DataLoader that makes it, whose "
            "dataset and collate_fn do"
        )
    raise ValueError(f"a batch is made of tensors whose first dimension is the batch; there is none in {kind(batch)}")


def resized(batch: Any, size: int, wanted: int) -> Any:
    """Return the batch with ``wanted`` samples instead of ``size``: cut, or repeated from its start."""

    def one(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim() or tensor.size(0) != size:
            return tensor
        if wanted <= size:
            return tensor[:wanted].clone()
        return torch.cat([tensor] * -(-wanted // size))[:wanted].clone()

    return apply_to_collection(batch, torch.Tensor, one)


def tensors(batch: object) -> list[torch.Tensor]:
    """Return the tensors that ``resized`` can cut."""
    found: list[torch.Tensor] = []
    apply_to_collection(batch, torch.Tensor, lambda t: found.append(t))
    return found


def hidden_tensors(batch: object) -> list[torch.Tensor]:
    """Return all tensors of a batch, also those inside objects of other classes, such as a batch of graphs."""
    return [*tensors_of(batch), *(leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor))]


def kind(batch: object) -> str:
    """Name the type of a batch, for an error."""
    return f"a {type(batch).__name__}"
