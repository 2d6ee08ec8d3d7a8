"""Read the batch sizes of loaders, singly and in collections, and copy loaders with another batch size.

To resize a loader, copy it and its batch sampler, and set the size in the copies. The copy shares the user's dataset,
sampler, collate_fn, generator and whatever a subclass adds. The user's loader stays as it is.

Source: torch/utils/data/dataloader.py and sampler.py, torch 2.13 to 2.15. A DataLoader takes the indices of a batch
from ``batch_sampler``, even for an ``IterableDataset``, and keeps persistent workers in ``_iterator``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import islice
from typing import Any

from torch.utils._pytree import tree_map
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from lightning_memplan.data.borrowed import borrowed
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


def batching_sampler(loader: DataLoader[Any]) -> Any:
    """Return the sampler that yields the indices of whole batches, None if there is none.

    It is the ``batch_sampler``, or with ``batch_size=None`` a ``sampler`` of lists, for a dataset that reads in bulk.

    >>> sampler = BatchSampler([0, 2], 2, drop_last=False)
    >>> batching_sampler(DataLoader([1, 2, 3], sampler=sampler, batch_size=None)) is sampler
    True
    """
    return loader.batch_sampler if loader.batch_sampler is not None else bulk_sampler(loader)


def bulk_sampler(loader: DataLoader[Any]) -> Any:
    """Return the ``sampler`` of a loader with ``batch_size=None`` if it yields lists of indices, else None."""
    if loader.batch_sampler is not None or isinstance(loader.dataset, IterableDataset):
        return None
    sampler = loader.sampler
    return sampler if isinstance(sampler, BatchSampler) or type(getattr(sampler, "batch_size", None)) is int else None


def batch_size_of_loader(loader: object) -> int | None:
    """Return a loader's batch size; None if it is no DataLoader, or if its dataset makes the batches.

    >>> batch_size_of_loader(DataLoader([1, 2, 3], batch_sampler=BatchSampler([0, 2], 2, drop_last=False)))
    2
    """
    if not isinstance(loader, DataLoader):
        return None
    size = loader.batch_size
    if size is None:
        size = getattr(batching_sampler(loader), "batch_size", None)
    return size if isinstance(size, int) and size > 0 else None


def yielded_size(loader: object) -> int | None:
    """Return the number of samples in the first batch of a loader, None if it is not known without reading one.

    >>> yielded_size(DataLoader([1, 2, 3], batch_sampler=[[0, 2], [1]]))
    2
    """
    if not isinstance(loader, DataLoader):
        return None
    batches: Any = batching_sampler(loader)
    size = batch_size_of_loader(loader)
    if batches is None or isinstance(loader.dataset, IterableDataset) or type(batches) is BatchSampler:
        return size
    try:
        return _first_batch(batches) or size
    except Exception:  # noqa: BLE001 - whatever a class of the user's raises
        return size


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


def dataset_size(source: Any, ranks: int = 1) -> int | None:
    """Return the largest batch size for which the datasets have enough samples for a rank, None if no length is known.

    >>> dataset_size(DataLoader(range(10), batch_size=4)), dataset_size(DataLoader(range(21)), ranks=2)
    (10, 11)
    """
    counts = [(loader, _most_of_a_batch(loader, ranks)) for loader in loaders_in(source)]
    sizes = [int(count / share_of(loader, source)) for loader, count in counts if count is not None]
    return (max if combined_mode(source) == "sequential" else min)(sizes, default=None)


def _most_of_a_batch(loader: Any, ranks: int) -> int | None:
    """Return how many samples a batch of the loader can have, None if that is not known.

    Each worker makes batches of its share of a stream. A batch sampler may have fewer samples of a kind.
    """
    count: int | None = samples_of_loader(loader, ranks)
    if not count:
        return count
    if batching_sampler(loader) is None:
        return None  # the dataset makes the batches: it counts those
    if isinstance(loader.dataset, IterableDataset):
        workers: int = loader.num_workers
        return max(1, count // max(1, workers))
    batches = batching_sampler(loader)
    if batches is None or type(batches) is BatchSampler or batch_size_of_loader(loader) is None:
        return count
    try:
        return min(count, _first_batch(batches, count) or count) if _follows(batches) else count
    except Exception:  # noqa: BLE001 - whatever a class of the user's raises
        return count


def _follows(batches: Any) -> bool:
    """Return True if a copy of the batch sampler, set to the smallest batch size, makes such a batch."""
    least = 2 if batches.batch_size == 1 else 1
    return _first_batch(batches, least) == least


def samples_of_loader(loader: object, ranks: int = 1) -> int | None:
    """Return the number of samples in an epoch of a loader on each rank, None if it is unknown.

    Lightning divides a dataset among the ranks, rounded up, unless its sampler does that already. A stream is every
    rank's own.

    Source: pytorch_lightning/trainer/connectors/data_connector.py (2.6.6), ``_requires_distributed_sampler``.
    """
    if not isinstance(loader, DataLoader):
        return None
    batches, stream = batching_sampler(loader), isinstance(loader.dataset, IterableDataset)
    sampler = loader.sampler if batches is None else getattr(batches, "sampler", None)
    count = _length_of(sampler) if sampler is not None and not stream else None  # the sampler of a stream is endless
    if count is None and sampler is None and not stream and (size := batch_size_of_loader(loader)):
        count = _length_of(batches)  # it may yield other keys than the dataset has samples, as of parts of large images
        count = None if count is None else count * size
    if count is None:
        count = _length_of(loader.dataset)
    whole = stream or any(isinstance(each, DistributedSampler) for each in (sampler, loader.sampler))
    return count if count is None or whole else -(-count // ranks)


def _length_of(sized: Any) -> int | None:
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None


def batches_of_epoch(source: Any, batch_size: int, ranks: int = 1) -> int | None:
    """Return the number of batches in an epoch of each rank, at a batch size; None if it is unknown.

    >>> batches_of_epoch(DataLoader(range(10)), 4), batches_of_epoch(DataLoader(range(10), drop_last=True), 4)
    (3, 2)
    """
    counts = batches_of_loaders(source, batch_size, ranks)
    if counts is None:
        return None
    # a collection cycles its shorter loaders, unless it is a CombinedLoader that stops with the shortest
    return min(counts) if combined_mode(source) == "min_size" else max(counts)


def batches_of_loaders(source: Any, batch_size: int, ranks: int = 1) -> list[int] | None:
    """Return the number of batches of each loader, at a batch size of all of them; None if one is unknown.

    >>> batches_of_loaders([DataLoader(range(10)), DataLoader(range(6))], 4)
    [3, 2]
    """
    counts = []
    for loader, size in zip(loaders_in(source), planned_sizes(source, batch_size), strict=True):
        samples, workers = samples_of_loader(loader, ranks), 1
        if samples is None or batching_sampler(loader) is None:
            return None
        if isinstance(loader.dataset, IterableDataset) and loader.num_workers:
            workers = loader.num_workers
        samples //= workers
        drops = getattr(batching_sampler(loader), "drop_last", False)
        counts.append(workers * (samples // size if drops else -(-samples // size)))
    return counts


def last_batch(source: Any, batch_size: int, ranks: int = 1) -> int | None:
    """Return the smallest last batch of an epoch, among the loaders that keep theirs; None if it is not known.

    >>> last_batch(DataLoader(range(9)), 4), last_batch(DataLoader(range(9), drop_last=True), 4)
    (1, None)
    """
    lasts = []
    for loader, size in zip(loaders_in(source), planned_sizes(source, batch_size), strict=True):
        samples = samples_of_loader(loader, ranks)
        if samples and not getattr(batching_sampler(loader), "drop_last", True):
            lasts.append(samples % size or size)
    return min(lasts, default=None)


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


def check_resizable(source: Any, batch_size: int | None = None) -> None:
    """Check that the batch size of each loader can be set, and that batches have it then.

    Without a ``batch_size`` to set, try the smallest.

    Raises:
        ApplyError: The batch size of a loader cannot be set; says what to change.
    """
    loaders = loaders_in(source)
    sizes = [None] * len(loaders) if batch_size is None else planned_sizes(source, batch_size)
    for loader, size in zip(loaders, sizes, strict=True):
        old = batch_size_of_loader(loader)
        if size is None or size != old:
            _resized(loader, size or (2 if old == 1 else 1), check=True)


def _resized(loader: Any, batch_size: int, *, check: bool = False) -> Any:
    """Return a copy of the loader with another batch size; ``check`` tries its batch sampler."""
    _check(loader)
    own = copy.copy(loader)
    batches = _resized_sampler(loader, batch_size, check=check)
    place = "sampler" if loader.batch_sampler is None else "batch_sampler"
    vars(own).update({place: batches, "_iterator": None})  # not setattr, which DataLoader forbids
    if loader.batch_size is not None:
        vars(own)["batch_size"] = batch_size
        remember_arguments(own, batch_size=batch_size)
    else:
        remember_arguments(own, **{place: batches})
    if callable(getattr(loader.dataset, "set_batch_size", None)):  # as litdata's, which shuffle by it
        vars(own)["dataset"] = copy.copy(loader.dataset)
        own.dataset.set_batch_size(batch_size)
    return own


def _check(loader: object) -> None:
    kind = type(loader).__name__
    if not isinstance(loader, DataLoader):
        raise ApplyError(
            f"the batch size of a {kind} cannot be set, since it is no torch.utils.data.DataLoader: make it in "
            "train_dataloader() of a module or datamodule that keeps the batch size as self.batch_size, or pass "
            "apply=False"
        )
    if batching_sampler(loader) is None:
        raise ApplyError(
            f"the batch size of a {kind} with batch_size=None cannot be set, since its dataset makes the batches "
            f"({type(loader.dataset).__name__}): make it in train_dataloader() of a module or datamodule that keeps "
            "the batch size as self.batch_size, or pass apply=False"
        )
    old = batch_size_of_loader(loader)
    for name, value in vars(loader).items():
        if name not in _DATALOADER and hasattr(value, "__next__") and value is not loader.dataset:
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


_LOOK = 16  #: batches of a sampler that are looked at, at most

_DATALOADER = frozenset(vars(DataLoader([None])))  # type: ignore[arg-type]  #: attributes of every DataLoader


def _resized_sampler(loader: DataLoader[Any], batch_size: int, *, check: bool) -> Any:
    """Return a copy of the loader's batch sampler that yields batches of another size; ``check`` looks at its first."""
    batches = batching_sampler(loader)
    made, trial = None, batches.batch_size if hasattr(batches, "batch_size") else None
    try:
        own = copy.copy(batches)
        own.batch_size = batch_size
        remember_arguments(own, batch_size=batch_size)
        if type(batches) is not BatchSampler or not hasattr(batches.sampler, "__len__"):
            # a sampler that groups similar samples may have too few of a kind for a large batch: batches of one first
            for size in dict.fromkeys((1 if trial != 1 else 2, *([batch_size] if check else ()))):
                if made is None and (count := _first_batch(batches, size)) != size:
                    made = f"set to {size}, it makes a batch of {count}" if count else f"set to {size}, it makes none"
    except Exception as error:  # noqa: BLE001 - whatever a class of the user's raises
        made = f"{type(error).__name__}: {error}"
    if made is not None:
        raise ApplyError(
            f"the batch size of a {type(loader).__name__} cannot be set, since its batch sampler "
            f"{type(batches).__name__} does not follow its attribute batch_size ({made}): read self.batch_size in its "
            "__iter__ and __len__, or pass apply=False"
        )
    return own


def _first_batch(batches: Any, batch_size: int | None = None) -> int:
    """Return the number of samples in a batch sampler's first batch, 0 without one, at another batch size if given.

    A batch that is not full may come first where whole batches are shuffled: the size that is set is looked for in the
    next ones. Ask a copy, in the same random order each time. A sampler that is an iterator is advanced by asking: it
    is an error.
    """
    trial = borrowed(batches)
    if batch_size is not None:
        if not hasattr(batches, "batch_size"):
            raise AttributeError(f"{type(batches).__name__} has no attribute batch_size")
        trial.batch_size = batch_size
    if any(hasattr(each, "__next__") for each in (trial, getattr(trial, "sampler", None))):
        raise TypeError("it is an iterator")
    size = getattr(trial, "batch_size", None)
    with isolated_random_state(seed=0):
        counts = [len(indices) for indices in _until(lambda indices: len(indices) == size, islice(trial, _LOOK))]
    return counts[-1] if counts and counts[-1] == size == max(counts) else next(iter(counts), 0)


def _until(found: Callable[[Any], bool], things: Iterable[Any]) -> Iterator[Any]:
    """Yield things up to the first that is found.

    >>> list(_until(lambda n: n == 2, [1, 2, 3]))
    [1, 2]
    """
    for thing in things:
        yield thing
        if found(thing):
            return
