"""Walk, measure, cut and tile batches."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

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

    def note(tensor: torch.Tensor) -> torch.Tensor:  # it stays: a dataclass may check what it is made of
        found.append(tensor)
        return tensor

    apply_to_collection(batch, torch.Tensor, note, allow_frozen=True)
    return found


def hidden_tensors(batch: object) -> list[torch.Tensor]:
    """Return all tensors of a batch, also those inside objects of other classes, such as a batch of graphs."""
    return [*tensors_of(batch), *(leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor))]


def kind(batch: object) -> str:
    """Name the type of a batch, for an error."""
    return f"a {type(batch).__name__}"


def outline(thing: object) -> Hashable:
    """Return the shapes and lengths of the parts of a sample or batch, which decide its size.

    >>> outline({"image": torch.ones(3, 8), "name": "one"})
    (('image', (3, 8)), ('name', 3))
    """
    if isinstance(thing, (str, bytes)):
        return len(thing)
    if isinstance(thing, Mapping):
        return tuple((key, outline(value)) for key, value in thing.items())
    if isinstance(thing, (list, tuple)):
        return tuple(map(outline, thing))
    shape = getattr(thing, "shape", getattr(thing, "size", None))  # tensors and arrays; images of PIL
    if isinstance(shape, (tuple, torch.Size)):
        return tuple(shape)
    return tuple(tuple(tensor.shape) for tensor in tensors_of(thing))


def tensor_bytes(batch: object) -> int:
    """Return the bytes of all tensors of a sample or batch.

    >>> tensor_bytes([torch.ones(3), "text"])
    12
    """
    return sum(t.numel() * t.element_size() for t in tensors_of(batch))


def part_count(thing: object) -> int:
    """Return the number of parts of a sample or batch: its tensors, arrays, texts and the like.

    >>> part_count((torch.ones(3), ["one", "two"]))
    3
    """
    if isinstance(thing, Mapping):
        return sum(map(part_count, thing.values()))
    if isinstance(thing, (list, tuple)):
        return sum(map(part_count, thing))
    if is_dataclass(thing) and not isinstance(thing, type):
        return sum(part_count(getattr(thing, entry.name, None)) for entry in fields(thing))
    return 1
