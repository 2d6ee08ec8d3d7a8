"""Read samples as training gets them: in the sampler's order, in a worker, through the loader's own iterator.

Source: torch/utils/data/dataloader.py and _utils/fetch.py, torch 2.4 to 2.15. A DataLoader passes the indices that its
``batch_sampler`` yields (or its ``sampler``, where ``batch_sampler`` is None) to the dataset, one by one or to
``__getitems__``, and what comes back to ``collate_fn``.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_memplan.data.batches import batch_size_of, hidden_tensors, tensor_bytes
from lightning_memplan.data.borrowed import borrowed
from lightning_memplan.data.loaders import bulk_sampler
from lightning_memplan.lightning.compat import isolated_random_state, move_to_device

_COVERING = (SequentialSampler, RandomSampler, DistributedSampler)  #: samplers that leave out no sample

_LOOK = 10_000  #: indices that are asked of a sampler, at most, to spread samples over them

_PATIENCE = 120  #: seconds to wait for a worker, where the loader has no timeout of its own

_SHORTLY = 5  #: seconds to wait for an iterator whose ``collate_fn`` fails


@dataclass(frozen=True)
class KeptSamples:
    """A few samples of a loader, read once, of which its batches are made.

    ``items`` are the samples; None if the dataset reads several at once, and no list comes back. ``indices`` are theirs
    (of a stream: their number in it). ``ended`` is True if the loader has no more. ``in_worker`` makes the batches in a
    worker process.

    >>> kept = keep_samples(DataLoader([torch.zeros(3)] * 10), 5)
    >>> len(kept.items), kept.batch(7).shape
    (5, torch.Size([7, 3]))
    """

    loader: DataLoader[Any]
    dataset: Any
    indices: list[Any]
    items: list[Any] | None
    ended: bool = False
    in_worker: bool = False
    seed: int | None = None  #: of the random numbers that a batch is made with; None: those that come next

    def batch(self, size: int) -> Any:
        """Return a batch of ``size`` samples as the loader would yield it; random numbers are drawn as for any other.

        Samples are repeated where there are fewer.
        """
        if not self.in_worker and iterates_itself(self.loader):
            try:
                with isolated_random_state(self.seed):
                    return _on_host(self._iterated(size))
            except Exception:  # noqa: BLE001 - whatever a class of the user's raises, on a copy of the loader
                pass
        return self._collated(size)

    def _collated(self, size: int) -> Any:
        with isolated_random_state(self.seed):
            if self.in_worker:
                return _taken(self._serving(size, workers=1), 1)[0]
            return self.loader.collate_fn(self._fetched(size))

    def _iterated(self, size: int) -> Any:
        """Return a batch of the loader's own iterator.

        It may wait for a thread of its own, which an error of ``collate_fn`` has ended: where there is such an error,
        wait for the iterator a few seconds.
        """
        loader = self._serving(size)
        try:
            self._collated(size)
        except Exception:  # noqa: BLE001 - whatever a collate_fn of the user's raises
            return _within(_SHORTLY, lambda: _next_of(loader))
        return _next_of(loader)

    def where_it_works(self, own: int) -> KeptSamples:
        """Return these samples, made into batches by a worker if the loader has workers and only they can."""
        elsewhere = replace(self, in_worker=True)
        if not self.loader.num_workers or self._makes(2) or self._makes(own) or not elsewhere._makes(own):
            return self
        return elsewhere

    def _makes(self, size: int) -> bool:
        try:
            self.batch(size)
        except Exception:  # noqa: BLE001 - whatever a collate_fn of the user's raises
            return False
        return True

    def of_one(self, place: int) -> KeptSamples:
        """Return the samples that repeat one of these."""
        return self._of([place])

    def _of(self, places: list[int]) -> KeptSamples:
        assert self.items is not None
        return replace(self, indices=[self.indices[p] for p in places], items=[self.items[p] for p in places])

    def in_batches(self) -> KeptSamples:
        """Return those of the samples that come into a batch, if ``collate_fn`` leaves others out, as bad ones.

        A batch of training may have no bad ones.
        """
        if self.items is None or len(self.items) < 2 or self.loader.batch_sampler is None:
            return self
        count = len(self.items)
        try:
            if tensor_bytes(self._collated(count)) == tensor_bytes(self.of_one(0)._collated(count)) > 0:
                return self  # all are like the first
        except Exception:  # noqa: BLE001 - whatever a collate_fn of the user's raises
            pass
        places = [place for place in range(len(self.items)) if self.of_one(place)._fills(2)]
        return self._of(places) if places else self

    def _fills(self, size: int) -> bool:
        """Return True if a batch of these samples has any."""
        try:
            batch = self._collated(size)
        except Exception:  # noqa: BLE001 - whatever a collate_fn of the user's raises
            return False
        try:
            return batch_size_of(batch) > 0
        except ValueError:  # its tensors are hidden
            return tensor_bytes(batch) > 0

    def _fetched(self, size: int) -> Any:
        """Return what the loader passes to its ``collate_fn``: one item, where the dataset makes the batches."""
        if self.items is not None:
            if self.loader.batch_sampler is None:
                return own_copy(self.items[0])
            return [own_copy(item) for item in itertools.islice(itertools.cycle(self.items), size)]
        indices = list(itertools.islice(itertools.cycle(self.indices), size))
        return self.dataset[indices] if self.loader.batch_sampler is None else self.dataset.__getitems__(indices)

    def _serving(self, size: int, workers: int = 0) -> DataLoader[Any]:
        """Return a copy of the loader that yields a batch of ``size`` of the samples, a few times over."""
        indices = list(itertools.islice(itertools.cycle(self.indices), size))
        single = self.loader.batch_sampler is None and self.items is not None
        lists: Any = self.indices[:1] * 3 if single else _Lists([indices] * 3)
        stream = isinstance(self.loader.dataset, IterableDataset)
        dataset = self.dataset if self.items is None else _Serves(self.dataset, self.indices, self.items, stream)
        return copy_to_read(self.loader, dataset, lists, workers)


def keep_samples(loader: DataLoader[Any], count: int, *, spread: bool = False) -> KeptSamples:
    """Read ``count`` samples of a loader: the first ones, or at equal distances over all of them.

    Read those that the sampler would ask for, from a copy of the dataset. Where this process cannot read them, read
    them in a worker, if the loader has workers.

    Raises:
        Exception: whatever the dataset raises.
    """
    try:
        return _read_here(loader, count, spread)
    except Exception as error:
        if not loader.num_workers:
            raise
        try:
            return _read_in_worker(loader, count, spread)
        except Exception:  # noqa: BLE001 - the first error is the user's own, without the words of a worker
            raise error from None


def _read_here(loader: DataLoader[Any], count: int, spread: bool) -> KeptSamples:
    dataset = borrowed(loader.dataset)
    if isinstance(dataset, IterableDataset):
        items = list(itertools.islice(dataset, count))
        return KeptSamples(loader, dataset, list(range(len(items))), items, ended=len(items) < count)
    orders = list(_orders(loader, count, spread))
    for place, indices in enumerate(orders):
        try:
            return KeptSamples(loader, dataset, indices, _items(loader, dataset, indices))
        except Exception:
            if place == len(orders) - 1:
                raise
    return KeptSamples(loader, dataset, [], [])


def _items(loader: DataLoader[Any], dataset: Any, indices: list[Any]) -> list[Any] | None:
    """Return the samples of these indices; None if the dataset reads them at once, and gives no list of samples."""
    if not indices:
        return []
    if bulk_sampler(loader) is not None:
        dataset[indices]  # or the error that a worker may not meet
        return None
    if loader.batch_sampler is not None and getattr(dataset, "__getitems__", None):
        found = dataset.__getitems__(indices)
        return list(found) if isinstance(found, (list, tuple)) and len(found) == len(indices) else None
    return [dataset[index] for index in indices]


# -------------------------------------------------------------------------------------------------------- which samples
def _orders(loader: DataLoader[Any], count: int, spread: bool) -> Iterator[list[Any]]:
    """Yield the indices to read; then others, if these cannot be read."""
    length = _length(loader.dataset)
    if covers(loader) and length is not None:
        yield _some(range(length), count, spread)
        if not length:
            return
    asked = _asked(loader, _LOOK if spread else count)
    if asked is not None:
        yield _some(asked, count, spread)
    elif not covers(loader) or length is None:
        yield _some(range(count if length is None else length), count, spread)


def covers(loader: DataLoader[Any]) -> bool:
    """Return True if the loader's sampler is one of torch's that leave no sample of the dataset out."""
    batches = loader.batch_sampler
    if batches is None:
        return type(loader.sampler) in _COVERING
    return type(batches) is BatchSampler and type(batches.sampler) in _COVERING


def _some(indices: Sequence[Any], count: int, spread: bool) -> list[Any]:
    """Return ``count`` indices: the first ones, or at equal distances, from the first to the last.

    >>> _some(range(127), 4, True), _some(range(127), 4, False), _some(range(2), 4, True)
    ([0, 42, 84, 126], [0, 1, 2, 3], [0, 1])
    """
    if not spread or len(indices) <= count or count == 1:
        return list(indices[:count])
    return [indices[place * (len(indices) - 1) // (count - 1)] for place in range(count)]


def _asked(loader: DataLoader[Any], count: int) -> list[Any] | None:
    """Return the first indices of a copy of the sampler; None if it cannot be asked without advancing the user's."""
    lists: Any = loader.batch_sampler if loader.batch_sampler is not None else bulk_sampler(loader)
    sampler = loader.sampler if lists is None else lists
    own = borrowed(sampler)
    if any(hasattr(each, "__next__") for each in (own, getattr(own, "sampler", None))):
        return None
    if own is sampler and not isinstance(sampler, (tuple, range)):
        return None
    with isolated_random_state(seed=0):  # the same samples in every run
        return list(itertools.islice(own if lists is None else itertools.chain.from_iterable(own), count))


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def own_copy(sample: Any) -> Any:
    """Return a copy of the sample for one use: a collate_fn may take entries out of it."""
    return sample.copy() if type(sample) in (dict, list) else sample


# ---------------------------------------------------------------------------------------------- a copy of the loader
class _Lists(BatchSampler):
    """A batch sampler that yields these lists of indices."""

    def __init__(self, lists: list[list[Any]]) -> None:
        super().__init__(range(len(lists[0])), max(1, len(lists[0])), drop_last=False)
        self.lists = lists

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.lists)

    def __len__(self) -> int:
        return len(self.lists)


class _Serves(Dataset[Any]):
    """Serve kept samples in place of a dataset, and anything else from the dataset itself."""

    def __init__(self, dataset: Any, indices: list[Any], items: list[Any], stream: bool) -> None:
        self.dataset, self.indices, self.items, self.stream = dataset, indices, items, stream

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        return map(own_copy, itertools.cycle(self.items) if self.stream else self.items)

    def __getitem__(self, index: Any) -> Any:
        for own, item in zip(self.indices, self.items, strict=True):
            if index is own or (type(index) is int and index == own):
                return own_copy(item)
        return self.dataset[index]

    def __getitems__(self, indices: list[Any]) -> list[Any]:
        return [self[index] for index in indices]


def copy_to_read(
    loader: DataLoader[Any], dataset: Any, lists: Any, workers: int = 0, **changes: Any
) -> DataLoader[Any]:
    """Return a copy of the loader that reads ``lists`` of indices from another dataset."""
    own: DataLoader[Any] = borrowed(loader)
    place = "sampler" if loader.batch_sampler is None else "batch_sampler"
    vars(own).update(  # not setattr, which DataLoader forbids
        dataset=dataset,
        num_workers=workers,
        timeout=(loader.timeout or _PATIENCE) if workers else 0,
        prefetch_factor=2 if workers else None,
        persistent_workers=False,
        pin_memory=False,
        **{place: lists, **changes},
    )
    if not workers:
        vars(own)["_DataLoader__multiprocessing_context"] = None
    return own


def iterates_itself(loader: DataLoader[Any]) -> bool:
    """Return True if the loader has an iterator of its own that can be begun anew, on a copy of the loader."""
    if any(hasattr(value, "__next__") and value is not loader.dataset for value in vars(loader).values()):
        return False
    return any(getattr(type(loader), name) is not getattr(DataLoader, name) for name in ("__iter__", "_get_iterator"))


def _next_of(loader: DataLoader[Any]) -> Any:
    """Return the first batch of a copy of a loader."""
    iterator = iter(loader)
    try:
        return next(iterator)
    finally:
        close: Callable[[], None] | None = getattr(iterator, "close", None)
        if close is not None:
            close()


def _within(seconds: float, make: Callable[[], Any]) -> Any:
    """Return what a function makes, which a thread of its own calls.

    >>> _within(60, lambda: 3)
    3

    Raises:
        TimeoutError: it takes longer.
        Exception: whatever the function raises.
    """
    done: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

    def run() -> None:
        try:
            done.put((make(), None))
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        made, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"there is no batch within {seconds} seconds") from None
    if error is not None:
        raise error
    return made


def _on_host(batch: Any) -> Any:
    """Return the batch on the host: an iterator may have moved it to the GPU already."""
    moved = any(tensor.device.type not in ("cpu", "meta") for tensor in hidden_tensors(batch))
    return move_to_device(batch, torch.device("cpu")) if moved else batch


# ------------------------------------------------------------------------------------------------------------ a worker
def _as_it_is(samples: Any) -> Any:
    return samples


def _read_in_worker(loader: DataLoader[Any], count: int, spread: bool) -> KeptSamples:
    """Read the samples in a worker process of the loader's kind, which its ``worker_init_fn`` prepares."""
    stream = isinstance(loader.dataset, IterableDataset)
    orders = [list(range(count))] if stream else list(_orders(loader, count, spread))
    for place, indices in enumerate(orders):
        whole = loader.batch_sampler is not None or bulk_sampler(loader) is not None
        lists: Any = _Lists([indices]) if whole and indices else indices
        own = copy_to_read(loader, loader.dataset, lists, workers=1, collate_fn=_as_it_is)
        try:
            found = _taken(own, 1 if whole else len(indices))
        except Exception:
            if place == len(orders) - 1:
                raise
            continue
        items = found[0] if whole and found else found
        listed = isinstance(items, (list, tuple)) and (stream or len(items) == len(indices))
        if not listed or bulk_sampler(loader) is not None:
            return KeptSamples(loader, loader.dataset, indices, None, in_worker=True)
        return KeptSamples(loader, loader.dataset, indices[: len(items)], list(items), ended=len(items) < len(indices))
    return KeptSamples(loader, loader.dataset, [], [])


def _taken(loader: DataLoader[Any], count: int) -> list[Any]:
    """Return the first batches of a copy of a loader that has workers, and end them."""
    iterator = DataLoader._get_iterator(loader)
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator._shutdown_workers()  # type: ignore[attr-defined]
