"""Batches of a few samples, from whatever the user passed. No worker is started, no iterator of theirs is advanced."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_memplan._lightning import apply_to_collection, isolated_random_state

SIZES = (2, 3, 5)  #: batch sizes that are traced: two determine a line, three a parabola, and the last checks


def sample_batches(source: Any, sizes: Sequence[int] = SIZES) -> list[tuple[int, Any]]:
    """``(size, batch)`` for each size, from a DataLoader, a collection of them, an iterable of batches, or a batch.

    A DataLoader's samples come from its own dataset through its own ``collate_fn``; a dataset of fewer samples repeats
    them. A batch is cut or repeated along its first dimension. Random states are left as they were, and the dataset is
    read through a copy (see ``borrowed``).

    >>> loader = DataLoader([torch.zeros(3)] * 10, batch_size=4)
    >>> [(size, tuple(batch.shape)) for size, batch in sample_batches(loader)]
    [(2, (2, 3)), (3, (3, 3)), (5, (5, 3))]
    >>> [tuple(batch[0].shape) for _, batch in sample_batches((torch.zeros(4, 8), torch.zeros(4)))]
    [(2, 8), (3, 8), (5, 8)]

    Raises:
        ValueError: the dataset has length 0, no tensor's first dimension can be the batch, or the source is an
            iterator, which would lose the batch that is read.
    """
    with isolated_random_state():
        return _sample_batches(source, sizes)


def _sample_batches(source: Any, sizes: Sequence[int]) -> list[tuple[int, Any]]:
    if isinstance(source, DataLoader):
        return _from_loader(source, sizes)
    loaders = _loaders(source)
    if loaders is not None:
        return _from_collection(*loaders, sizes)
    if not _is_batch(source) and hasattr(source, "__iter__"):
        if hasattr(source, "__next__"):
            raise ValueError(
                f"{_kind(source)} can be read only once, and the batch that a plan reads would be lost: pass what can "
                "be begun anew, such as a DataLoader, or a batch"
            )
        source = _first(iter(source), "the loader yields no batch")
    size = batch_size_of(source)
    return [(k, resized(source, size, k)) for k in sizes]


def dataset_size(source: Any) -> int | None:
    """Samples that the smallest of the datasets holds, None where it cannot be told.

    >>> dataset_size(DataLoader([torch.zeros(3)] * 10, batch_size=4))
    10
    """
    if isinstance(source, DataLoader):
        sampler = source.sampler if source.batch_size is not None else None
        for sized in (sampler, source.dataset):
            try:
                if sized is not None and not isinstance(source.dataset, IterableDataset):
                    return len(sized)  # type: ignore[arg-type]
            except (TypeError, NotImplementedError):
                continue
        return None
    loaders = _loaders(source)
    if loaders is None:
        return None
    sizes = [size for size in map(dataset_size, loaders[0].values()) if size is not None]
    return min(sizes, default=None)


def batch_size_of(batch: Any) -> int:
    """The first dimension of the first tensor that has one.

    Raises:
        ValueError: there is none.
    """
    for leaf in _tensors(batch):
        if leaf.dim():
            return leaf.size(0)
    raise ValueError(f"a batch is made of tensors whose first dimension is the batch; there is none in {_kind(batch)}")


def resized(batch: Any, size: int, wanted: int) -> Any:
    """The batch with ``wanted`` samples in the place of ``size``: cut, or repeated from its start."""

    def one(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim() or tensor.size(0) != size:
            return tensor
        if wanted <= size:
            return tensor[:wanted].clone()
        return tensor.repeat(-(-wanted // size), *([1] * (tensor.dim() - 1)))[:wanted].clone()

    return apply_to_collection(batch, torch.Tensor, one)


def borrowed(dataset: Any) -> Any:
    """A shallow copy of a dataset, to be read in its place: what reading it sets, opens or draws stays the copy's own.

    Datasets in it (``Subset``, ``ConcatDataset``) and random generators are copied too, lists and dictionaries by their
    outermost level; samples are shared. What cannot be copied is read itself.

    >>> class Counts(Dataset):
    ...     read = 0
    ...     def __getitem__(self, index):
    ...         self.read += 1
    >>> counts = Counts()
    >>> copied = borrowed(counts)
    >>> copied[0]
    >>> copied.read, counts.read
    (1, 0)
    """
    return _borrowed(dataset, {})


def _borrowed(thing: Any, memo: dict[int, Any]) -> Any:
    if id(thing) in memo:
        return memo[id(thing)]
    try:
        own = memo[id(thing)] = copy.copy(thing)
    except Exception:  # noqa: BLE001 - whatever a class of the user's raises
        return thing
    for name, value in list(getattr(own, "__dict__", {}).items()):
        own.__dict__[name] = _part(value, memo)
    return own


def _part(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, Dataset):
        return _borrowed(value, memo)
    if isinstance(value, (random.Random, torch.Generator)) or type(value).__module__.startswith("numpy.random"):
        return memo.setdefault(id(value), copy.deepcopy(value))
    if type(value) in (list, tuple):
        return type(value)(_borrowed(v, memo) if isinstance(v, Dataset) else v for v in value)
    if type(value) is dict:
        return {k: _borrowed(v, memo) if isinstance(v, Dataset) else v for k, v in value.items()}
    return copy.copy(value) if type(value) is set else value


def _from_loader(loader: DataLoader[Any], sizes: Sequence[int]) -> list[tuple[int, Any]]:
    dataset = borrowed(loader.dataset)
    if loader.batch_size is None and loader.batch_sampler is None:  # the dataset makes the batches itself
        batch = _first(
            iter(dataset) if isinstance(dataset, IterableDataset) else (dataset[i] for i in range(1)), _EMPTY
        )
        batch = loader.collate_fn(batch)
        size = batch_size_of(batch)
        return [(k, resized(batch, size, k)) for k in sizes]
    most = max(sizes)
    if isinstance(dataset, IterableDataset):
        samples = list(itertools.islice(dataset, most))
    else:
        length = dataset_size(loader)
        if length == 0:
            raise ValueError(_EMPTY)
        count = min(most, len(dataset)) if hasattr(dataset, "__len__") else most
        samples = [dataset[i] for i in range(count)]
    if not samples:
        raise ValueError(_EMPTY)
    samples = list(itertools.islice(itertools.cycle(samples), most))
    return [(k, loader.collate_fn(samples[:k])) for k in sizes]


_EMPTY = "the dataset has length 0: there is nothing to plan a batch size for"


def _loaders(source: Any) -> tuple[Mapping[Any, Any], Any] | None:
    """The loaders of a collection by name, and what puts their batches in its shape; None if it is no such thing."""
    iterables = getattr(source, "iterables", None)  # Lightning's CombinedLoader
    collection = source if iterables is None else iterables
    shape: Callable[[Mapping[Any, Any]], Any]
    if isinstance(collection, Mapping):
        named, shape = dict(collection), dict
    elif isinstance(collection, (list, tuple)):
        named, shape = dict(enumerate(collection)), _as_list
    else:
        return None
    if not named or not all(isinstance(v, DataLoader) or _loaders(v) is not None for v in named.values()):
        return None
    if getattr(source, "_mode", None) == "sequential":  # one loader's batch at a time
        return named, _the_first
    return named, shape


def _as_list(batches: Mapping[Any, Any]) -> list[Any]:
    return list(batches.values())


def _the_first(batches: Mapping[Any, Any]) -> Any:
    return next(iter(batches.values()))


def _from_collection(named: Mapping[Any, Any], shape: Any, sizes: Sequence[int]) -> list[tuple[int, Any]]:
    sampled = {name: _sample_batches(loader, sizes) for name, loader in named.items()}
    return [(k, shape({name: batches[i][1] for name, batches in sampled.items()})) for i, k in enumerate(sizes)]


def _is_batch(thing: Any) -> bool:
    return any(leaf.dim() for leaf in _tensors(thing))


def _tensors(batch: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    apply_to_collection(batch, torch.Tensor, lambda t: found.append(t))
    return found or [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]


def _first(iterator: Any, message: str) -> Any:
    for item in iterator:
        return item
    raise ValueError(message)


def _kind(batch: Any) -> str:
    return f"a {type(batch).__name__}"
