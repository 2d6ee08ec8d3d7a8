"""Loaders, singly and in collections: how many samples their batches have, and copies of them with another batch size.

A loader of another batch size is a copy of the user's, with a copy of its batch sampler in which the size is set: the
dataset, sampler, collate_fn, generator, workers and whatever a subclass adds are the user's own objects, and the
user's loader stays as it is.

Source: torch/utils/data/dataloader.py and sampler.py, torch 2.13 to 2.15. A DataLoader takes the indices of a batch
from ``batch_sampler``, also for an ``IterableDataset``, and keeps workers that live on in ``_iterator``.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import lcm
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from lightning_memplan.errors import ApplyError
from lightning_memplan.lightning.compat import is_combined_loader, isolated_random_state
from lightning_memplan.lightning.data_source import remember_arguments


def map_loaders(change: Callable[[Any], Any], source: Any) -> Any:
    """The collection with each of its loaders changed: a loader, a dict, list or tuple, nested, or a CombinedLoader."""

    def one(loader: Any) -> Any:
        if not is_combined_loader(loader):
            return change(loader)
        own = copy.copy(loader)
        own._iterator = None
        own.flattened = [map_loaders(change, part) for part in loader.flattened]
        return own

    return tree_map(one, source)


def loaders_in(source: Any) -> list[Any]:
    """The loaders of a collection, in order; itself where it is one.

    >>> one, two = DataLoader([1, 2]), DataLoader([3])
    >>> loaders_in({"a": one, "b": [two]}) == [one, two]
    True
    """
    found: list[Any] = []
    map_loaders(found.append, source)
    return found


def batch_size_of_loader(loader: Any) -> int | None:
    """How many samples a batch of the loader's has; None where its dataset makes the batches, or it is no DataLoader.

    >>> batch_size_of_loader(DataLoader([1, 2, 3], batch_sampler=BatchSampler([0, 2], 2, drop_last=False)))
    2
    """
    if not isinstance(loader, DataLoader):
        return None
    size = loader.batch_size
    if size is None:
        size = getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) and size > 0 else None


def unit_of(source: Any) -> int | None:
    """The batch size of a collection: the smallest of its loaders'; None where it cannot be told."""
    return min(filter(None, map(batch_size_of_loader, loaders_in(source))), default=None)


def share_of(loader: Any, source: Any) -> Fraction:
    """How many samples a loader (or a collection in one) gives for each that the smallest of the collection gives.

    >>> labelled, unlabelled = DataLoader([1, 2], batch_size=8), DataLoader([3], batch_size=56)
    >>> share_of(unlabelled, {"labelled": labelled, "unlabelled": unlabelled})
    Fraction(7, 1)
    """
    size = unit_of(loader)
    return Fraction(size, unit_of(source) or size) if size else Fraction(1)


def common_multiple(source: Any) -> int:
    """The smallest batch size at which every loader of a collection gives whole samples.

    >>> common_multiple([DataLoader([1], batch_size=4), DataLoader([1], batch_size=6)])  # 2 and 3
    2
    """
    return lcm(*(share_of(loader, source).denominator for loader in loaders_in(source)))


def dataset_size(source: Any) -> int | None:
    """The largest batch size that the datasets have samples for, None where it cannot be told.

    >>> dataset_size(DataLoader([torch.zeros(3)] * 10, batch_size=4))
    10
    """
    counts = [(loader, samples_of_loader(loader)) for loader in loaders_in(source)]
    sizes = [int(count / share_of(loader, source)) for loader, count in counts if count is not None]
    one_by_one = getattr(source, "_mode", "") == "sequential"  # of a CombinedLoader
    return (max if one_by_one else min)(sizes, default=None)


def samples_of_loader(loader: Any) -> int | None:
    """How many samples an epoch of the loader's has, None where it cannot be told."""
    if not isinstance(loader, DataLoader):
        return None
    sampler = loader.sampler if loader.batch_size is not None else getattr(loader.batch_sampler, "sampler", None)
    if isinstance(loader.dataset, IterableDataset):
        sampler = None  # torch's own, without an end
    for sized in (sampler, loader.dataset):
        try:
            if sized is not None:
                return len(sized)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            continue
    return None


def batches_of_epoch(source: Any, batch_size: int, ranks: int = 1) -> int | None:
    """How many batches of a size each rank has in an epoch, None where it cannot be told.

    >>> batches_of_epoch(DataLoader(range(10)), 4), batches_of_epoch(DataLoader(range(10), drop_last=True), 4)
    (3, 2)
    """
    counts = []
    for loader, size in zip(loaders_in(source), planned_sizes(source, batch_size), strict=True):
        samples = samples_of_loader(loader)
        if samples is None:
            return None
        samples = -(-samples // ranks)
        counts.append(samples // size if getattr(loader.batch_sampler, "drop_last", False) else -(-samples // size))
    fewest = getattr(source, "_mode", "") == "min_size"  # of a CombinedLoader; other collections cycle the shorter ones
    return min(counts) if fewest else max(counts)


# ------------------------------------------------------------------------------------------------ another batch size
def resized_loaders(source: Any, sizes: Sequence[int]) -> Any:
    """The collection with copies of its loaders whose batches have other sizes, one for each of ``loaders_in``.

    A loader that has its size stays, and so does one whose size cannot be told (see ``check_resizable``).

    >>> loader = DataLoader(range(6), batch_size=2)
    >>> [batch.tolist() for batch in resized_loaders(loader, [4])], loader.batch_size
    ([[0, 1, 2, 3], [4, 5]], 2)

    Raises:
        ApplyError: a loader's batch size cannot be set; says what to change.
    """
    wanted = iter(sizes)

    def one(loader: Any) -> Any:
        old, new = batch_size_of_loader(loader), next(wanted, None)
        return loader if new is None or old in (None, new) else _resized(loader, new)

    return map_loaders(one, source)


def planned_sizes(source: Any, batch_size: int) -> list[int]:
    """How many samples the batches of each loader have at a batch size.

    >>> planned_sizes([DataLoader([1], batch_size=8), DataLoader([1], batch_size=56)], 10)
    [10, 70]
    """
    return [max(1, int(batch_size * share_of(loader, source))) for loader in loaders_in(source)]


def check_resizable(source: Any) -> None:
    """Raise ApplyError unless the batch size of each loader can be set; says what to change."""
    for loader in loaders_in(source):
        _resized(loader, 2 if batch_size_of_loader(loader) == 1 else 1)


def _resized(loader: Any, batch_size: int) -> Any:
    _check(loader)
    own = copy.copy(loader)
    batches = _resized_sampler(loader, batch_size)
    vars(own).update(batch_sampler=batches, _iterator=None)  # not setattr, which DataLoader forbids
    if loader.batch_size is not None:
        vars(own)["batch_size"] = batch_size
        remember_arguments(own, batch_size=batch_size)
    else:
        remember_arguments(own, batch_sampler=batches)
    return own


def _check(loader: Any) -> None:
    kind = type(loader).__name__
    if not isinstance(loader, DataLoader):
        raise ApplyError(
            f"the batch size of a {kind} cannot be set, since it is no torch.utils.data.DataLoader: make it in "
            "train_dataloader() of a module or datamodule that keeps the batch size as self.batch_size, or pass "
            "apply=False"
        )
    if loader.batch_sampler is None:
        raise ApplyError(
            f"the batch size of a {kind} with batch_size=None cannot be set, since its dataset makes the batches "
            f"({type(loader.dataset).__name__}): make it in train_dataloader() of a module or datamodule that keeps "
            "the batch size as self.batch_size, or pass apply=False"
        )
    old = batch_size_of_loader(loader)
    for name, value in vars(loader).items():
        if name not in _DATALOADER and hasattr(value, "__next__"):
            raise ApplyError(
                f"the batch size of a {kind} cannot be set, since it keeps an iterator over batches that are made "
                f"already (self.{name}): begin it in __iter__, or pass apply=False"
            )
        if name not in _DATALOADER and type(value) is int and value == old and _iterates_itself(loader):
            raise ApplyError(
                f"the batch size of a {kind} cannot be set, since it has an __iter__ or __len__ of its own and keeps "
                f"{value} as self.{name} beside batch_size: use self.batch_size there, or pass apply=False"
            )


def _iterates_itself(loader: DataLoader[Any]) -> bool:
    return any(getattr(type(loader), n) is not getattr(DataLoader, n) for n in ("__iter__", "__len__", "_get_iterator"))


_DATALOADER = frozenset(vars(DataLoader([None])))  # type: ignore[arg-type]  #: what every DataLoader keeps


def _resized_sampler(loader: DataLoader[Any], batch_size: int) -> Any:
    """A copy of the loader's batch sampler that makes batches of another size."""
    batches: Any = loader.batch_sampler
    try:
        own = copy.copy(batches)
        own.batch_size = batch_size
        remember_arguments(own, batch_size=batch_size)
        made = None if type(batches) is BatchSampler else _first_batch_of_another_size(batches)
    except Exception as error:  # noqa: BLE001 - whatever a class of the user's raises
        made = f"{type(error).__name__}: {error}"
    if made is not None:
        raise ApplyError(
            f"the batch size of a {type(loader).__name__} cannot be set, since its batch sampler "
            f"{type(batches).__name__} does not follow its attribute batch_size ({made}): read self.batch_size in its "
            "__iter__ and __len__, or pass apply=False"
        )
    return own


def _first_batch_of_another_size(batches: Any) -> str | None:
    """What is wrong with the first batch where a batch sampler is set to another size, None if nothing is.

    Single indices, since a sampler that makes batches of like samples may have fewer of them than any other size.
    """
    trial = borrowed(batches)
    old = batches.batch_size
    trial.batch_size = wanted = 1 if old != 1 else 2
    with isolated_random_state():
        count = len(next(iter(trial)))
    return None if count == wanted else f"set to {wanted}, it makes a batch of {count}"


# ----------------------------------------------------------------------------------------------------- read, not used
def borrowed(thing: Any) -> Any:
    """A shallow copy of a dataset or sampler, to be read in its place: what reading sets, opens or draws stays its own.

    Datasets and samplers in it (``Subset``, ``ConcatDataset``) and random generators are copied too, lists and
    dictionaries by their outermost level; samples are shared. What cannot be copied is read itself.

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
    return _borrowed(thing, {})


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
    if isinstance(value, _READ):
        return _borrowed(value, memo)
    if isinstance(value, (random.Random, torch.Generator)) or type(value).__module__.startswith("numpy.random"):
        return memo.setdefault(id(value), copy.deepcopy(value))
    if type(value) in (list, tuple):
        return type(value)(_borrowed(v, memo) if isinstance(v, _READ) else v for v in value)
    if type(value) is dict:
        return {k: _borrowed(v, memo) if isinstance(v, _READ) else v for k, v in value.items()}
    return copy.copy(value) if type(value) is set else value


_READ = (Dataset, torch.utils.data.Sampler)
