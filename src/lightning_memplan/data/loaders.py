"""Read the batch sizes of loaders, singly and in collections, and copy loaders with another batch size.

To resize a loader, copy it and its batch sampler, and set the size in the copies. The copy shares the user's dataset,
sampler, collate_fn, generator and whatever a subclass adds. The user's loader stays as it is.

Source: torch/utils/data/dataloader.py and sampler.py, torch 2.13 to 2.15. A DataLoader takes the indices of a batch
from ``batch_sampler``, even for an ``IterableDataset``, and keeps persistent workers in ``_iterator``.
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
from lightning_memplan.lightning.data_source import combined_mode, copy_combined, remember_arguments


def map_loaders(change: Callable[[Any], Any], source: Any) -> Any:
    """Return a collection with each of its loaders changed.

    A collection is a loader, a dict, list or tuple of collections, or a CombinedLoader.
    """

    def one(loader: Any) -> Any:
        if is_combined_loader(loader):
            return copy_combined(loader, lambda part: map_loaders(change, part))
        return change(loader)

    return tree_map(one, source)


def loaders_in(source: Any) -> list[Any]:
    """Return the loaders of a collection, in order.

    >>> one, two = DataLoader([1, 2]), DataLoader([3])
    >>> loaders_in({"a": one, "b": [two]}) == [one, two]
    True
    """
    found: list[Any] = []
    map_loaders(found.append, source)
    return found


def batch_size_of_loader(loader: object) -> int | None:
    """Return a loader's batch size; None if it is no DataLoader, or if its dataset makes the batches.

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
    """Return the batch size of a collection, which is the smallest of its loaders'; None if no loader has one."""
    return min(filter(None, map(batch_size_of_loader, loaders_in(source))), default=None)


def share_of(loader: Any, source: Any) -> Fraction:
    """Return how many samples a loader yields for each sample of the loader with the smallest batch size.

    >>> labelled, unlabelled = DataLoader([1, 2], batch_size=8), DataLoader([3], batch_size=56)
    >>> share_of(unlabelled, {"labelled": labelled, "unlabelled": unlabelled})
    Fraction(7, 1)
    """
    size = unit_of(loader)
    return Fraction(size, unit_of(source) or size) if size else Fraction(1)


def common_multiple(source: Any) -> int:
    """Return the smallest batch size at which every loader of a collection yields whole samples.

    >>> common_multiple([DataLoader([1], batch_size=4), DataLoader([1], batch_size=6)])  # 3 of the second for 2
    2
    """
    return lcm(*(share_of(loader, source).denominator for loader in loaders_in(source)))


def dataset_size(source: Any) -> int | None:
    """Return the largest batch size for which the datasets have enough samples, None if no length is known.

    >>> dataset_size(DataLoader([torch.zeros(3)] * 10, batch_size=4))
    10
    """
    counts = [(loader, samples_of_loader(loader)) for loader in loaders_in(source)]
    sizes = [int(count / share_of(loader, source)) for loader, count in counts if count is not None]
    return (max if combined_mode(source) == "sequential" else min)(sizes, default=None)


def samples_of_loader(loader: object) -> int | None:
    """Return the number of samples in an epoch of a loader, None if it is unknown."""
    if not isinstance(loader, DataLoader):
        return None
    sampler = loader.sampler if loader.batch_size is not None else getattr(loader.batch_sampler, "sampler", None)
    if isinstance(loader.dataset, IterableDataset):
        sampler = None  # its sampler is endless
    for sized in (sampler, loader.dataset):
        try:
            if sized is not None:
                return len(sized)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            continue
    return None


def batches_of_epoch(source: Any, batch_size: int, ranks: int = 1) -> int | None:
    """Return the number of batches in an epoch of each rank, at a batch size; None if it is unknown.

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
    # a collection cycles its shorter loaders, unless it is a CombinedLoader that stops with the shortest
    return min(counts) if combined_mode(source) == "min_size" else max(counts)


# ------------------------------------------------------------------------------------------------ another batch size
def resized_loaders(source: Any, sizes: Sequence[int]) -> Any:
    """Return the collection with copies of its loaders at other batch sizes, one for each of ``loaders_in``.

    A loader that already has its size is kept, and so is one whose size is unknown (see ``check_resizable``).

    >>> loader = DataLoader(range(6), batch_size=2)
    >>> [batch.tolist() for batch in resized_loaders(loader, [4])], loader.batch_size
    ([[0, 1, 2, 3], [4, 5]], 2)

    Raises:
        ApplyError: The batch size of a loader cannot be set; says what to change.
    """
    wanted = iter(sizes)

    def one(loader: Any) -> Any:
        old, new = batch_size_of_loader(loader), next(wanted, None)
        return loader if new is None or old in (None, new) else _resized(loader, new)

    return map_loaders(one, source)


def planned_sizes(source: Any, batch_size: int) -> list[int]:
    """Return the batch size of each loader when the collection has the given one.

    >>> planned_sizes([DataLoader([1], batch_size=8), DataLoader([1], batch_size=56)], 10)
    [10, 70]
    """
    return [max(1, int(batch_size * share_of(loader, source))) for loader in loaders_in(source)]


def check_resizable(source: Any) -> None:
    """Check that the batch size of each loader can be set.

    Raises:
        ApplyError: The batch size of a loader cannot be set; says what to change.
    """
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


def _check(loader: object) -> None:
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


_DATALOADER = frozenset(vars(DataLoader([None])))  # type: ignore[arg-type]  #: attributes of every DataLoader


def _resized_sampler(loader: DataLoader[Any], batch_size: int) -> Any:
    """Return a copy of the loader's batch sampler that yields batches of another size."""
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
    """Set a copy of a batch sampler to another size; return what is wrong with its first batch, None if nothing is.

    Try batches of one sample: a sampler that groups similar samples may have too few of a kind for any larger batch.
    """
    trial = borrowed(batches)
    old = batches.batch_size
    trial.batch_size = wanted = 1 if old != 1 else 2
    with isolated_random_state():
        count = len(next(iter(trial)))
    return None if count == wanted else f"set to {wanted}, it makes a batch of {count}"


# ------------------------------------------------------------------------------------------------ read without effect
def borrowed(thing: Any) -> Any:
    """Return a copy of a dataset or sampler to read from, so that reading changes nothing in the user's own.

    The copy is shallow. Datasets and samplers inside it (``Subset``, ``ConcatDataset``) and random generators are
    copied too, lists and dictionaries at their outermost level; samples are shared. An object that cannot be copied is
    returned itself.

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
