"""Make a large batch by repeating a small one, instead of collating its samples one by one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_memplan.data.batches import hidden_tensors, outline
from lightning_memplan.lightning.compat import move_to_device


class Goal(NamedTuple):
    """Ask for a batch of ``size`` samples on ``device``, made by repeating a small one.

    >>> Goal(7, torch.device("cpu")).size
    7
    """

    size: int
    device: torch.device


Tile = Callable[[Any, Goal], Any]  #: repeats a part of a small batch


@dataclass(frozen=True, slots=True)
class TiledBatch:
    """A batch of ``size`` samples that repeats the ``samples`` of the batch ``few``; ``whole`` makes it on the host.

    >>> tile = tiling([(n, torch.arange(n)) for n in (1, 2, 3)])
    >>> TiledBatch(torch.tensor([1, 2, 3]), 3, 7, tile).whole()
    tensor([1, 2, 3, 1, 2, 3, 1])
    """

    few: Any
    samples: int
    size: int
    tile: Tile

    def on(self, device: torch.device, few: Any) -> Any:
        """Return the batch on ``device``, each tensor in a block of its own.

        ``few`` is the batch of that name, possibly converted to another precision.
        """
        return self.tile(few, Goal(self.size, device))

    def whole(self) -> Any:
        """Return the batch on the host."""
        return self.on(torch.device("cpu"), self.few)


def tiling(batches: Sequence[tuple[int, Any]]) -> Tile | None:
    """Return how batches of any size repeat the last of these, given as ``(size, batch)``; None if they do not.

    Parts that are alike at each size are kept. Tensors and arrays whose first dimension is the batch are repeated, and
    so are lists with an entry for each sample.

    >>> tile = tiling([(n, (torch.zeros(n, 3), ["a name"] * n, "train")) for n in (2, 3, 5)])
    >>> image, names, split = tile((torch.zeros(5, 3), ["a name"] * 5, "train"), Goal(8, torch.device("cpu")))
    >>> image.shape, len(names), split
    (torch.Size([8, 3]), 8, 'train')
    >>> tiling([(n, torch.zeros(2 * n)) for n in (2, 3, 5)]) is None  # two rows a sample
    True
    """
    return _tile_of([batch for _, batch in batches], [size for size, _ in batches])


def _tile_of(parts: Sequence[Any], sizes: Sequence[int]) -> Tile | None:
    first = parts[0]
    if any(isinstance(part, Tensor) for part in parts):
        return _tile_of_tensors(parts, sizes)
    if any(type(part) is not type(first) for part in parts):
        return None
    if isinstance(first, Mapping):
        return _tile_of_mappings(parts, sizes)
    if isinstance(first, (list, tuple)):
        return _tile_of_lists(parts, sizes)
    if is_dataclass(first) and not isinstance(first, type):
        return _tile_of_records(parts, sizes)
    if all(_are_equal(part, first) for part in parts[1:]):
        return _keep
    if type(first) is int and list(parts) == list(sizes):  # the number of samples
        return lambda part, goal: goal.size
    if _is_array(first) and _grow([part.shape for part in parts], sizes):
        return _repeat_rows_of_an_array
    return None


def _keep(part: Any, goal: Goal) -> Any:
    return part


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


def _grow(shapes: Sequence[Sequence[int]], sizes: Sequence[int]) -> bool:
    """Return True if the first dimension is the batch, and the others are alike."""
    firsts = [shape[0] if len(shape) else None for shape in shapes]
    return firsts == list(sizes) and len({tuple(shape[1:]) for shape in shapes}) == 1


# ----------------------------------------------------------------------------------------------- tensors and arrays
def _tile_of_tensors(parts: Sequence[Any], sizes: Sequence[int]) -> Tile | None:
    if not all(type(part) is Tensor for part in parts):
        return None
    if not all(part.device.type == "cpu" and part.is_contiguous() and not part.is_pinned() for part in parts):
        return None
    shapes = [tuple(part.shape) for part in parts]
    if _grow(shapes, sizes):
        return _repeat_rows
    return _move if len(set(shapes)) == 1 else None


def _move(part: Tensor, goal: Goal) -> Tensor:
    return part.to(goal.device)


def _repeat_rows(part: Tensor, goal: Goal) -> Tensor:
    made = torch.empty((goal.size, *part.shape[1:]), dtype=part.dtype, device=goal.device)
    filled = min(part.size(0), goal.size)
    made[:filled].copy_(part[:filled])
    while filled < goal.size:
        more = min(filled, goal.size - filled)
        made[filled : filled + more].copy_(made[:more])
        filled += more
    return made


def _is_array(part: Any) -> bool:
    return type(part).__module__ == "numpy" and hasattr(part, "take") and bool(getattr(part, "shape", ()))


def _repeat_rows_of_an_array(part: Any, goal: Goal) -> Any:
    return part.take([index % len(part) for index in range(goal.size)], axis=0)


# -------------------------------------------------------------------------------------------------------- collections
def _tile_of_mappings(parts: Sequence[Mapping[Any, Any]], sizes: Sequence[int]) -> Tile | None:
    if any(list(part) != list(parts[0]) for part in parts):
        return None
    each = {key: _tile_of([part[key] for part in parts], sizes) for key in parts[0]}
    tiles = {key: tile for key, tile in each.items() if tile is not None}
    if len(tiles) < len(each) or not (tiles == {} or hasattr(parts[0], "__setitem__")):
        return None

    def tile_of_mapping(part: Any, goal: Goal) -> Any:
        made = copy.copy(part)  # of the same class: a UserDict's, for one
        for key, tile in tiles.items():
            made[key] = tile(part[key], goal)
        return made

    return tile_of_mapping


def _tile_of_records(parts: Sequence[Any], sizes: Sequence[int]) -> Tile | None:
    names = [field.name for field in fields(parts[0]) if all(hasattr(part, field.name) for part in parts)]
    each = {name: _tile_of([getattr(part, name) for part in parts], sizes) for name in names}
    tiles = {name: tile for name, tile in each.items() if tile is not None}
    if len(tiles) < len(each):
        return None

    def tile_of_record(part: Any, goal: Goal) -> Any:
        made = copy.copy(part)
        for name, tile in tiles.items():
            object.__setattr__(made, name, tile(getattr(part, name), goal))  # also where it is frozen
        return made

    return tile_of_record


def _tile_of_lists(parts: Sequence[Any], sizes: Sequence[int]) -> Tile | None:
    lengths = [len(part) for part in parts]
    if len(set(lengths)) == 1:
        each = [_tile_of(entries, sizes) for entries in zip(*parts, strict=True)]
        tiles = [tile for tile in each if tile is not None]
        return partial(_tile_each, tiles) if len(tiles) == len(each) else None
    if lengths != list(sizes) or type(parts[0]) not in (list, tuple):
        return None
    most = parts[lengths.index(max(lengths))]
    if any(outline(entry) != outline(one) for part in parts for entry, one in zip(part, most, strict=False)):
        return None
    return _repeat_entries


def _tile_each(tiles: Sequence[Tile], part: Any, goal: Goal) -> Any:
    made = [tile(entry, goal) for tile, entry in zip(tiles, part, strict=True)]
    kind = type(part)
    return kind(*made) if hasattr(kind, "_fields") else made if kind is list else kind(made)


def _repeat_entries(part: Any, goal: Goal) -> Any:
    """Repeat the entries, one for each sample; those with tensors are copied to the device one by one."""
    entries = itertools.islice(itertools.cycle(part), goal.size)
    if goal.device.type == "cpu" or not any(hidden_tensors(entry) for entry in part):
        return type(part)(entries)
    return type(part)(move_to_device(entry, goal.device) for entry in entries)
