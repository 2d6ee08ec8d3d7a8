"""Copy datasets, samplers and loaders to read from, so that reading changes nothing in the user's own."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


def borrowed(thing: Any) -> Any:
    """Return a copy of a dataset, sampler or loader to read from, so that reading changes nothing in the user's own.

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
        own.__dict__[name] = _borrowed(value, memo) if name in _SAMPLERS else _part(value, memo)
    if isinstance(own, DataLoader):
        own.__dict__["_iterator"] = None  # its persistent workers
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
    if hasattr(type(value), "__next__") and not hasattr(type(value), "fileno"):
        return memo.setdefault(id(value), _copied_iterator(value))
    return copy.copy(value) if type(value) is set else value


def _copied_iterator(iterator: Any) -> Any:
    """Return an iterator at the same place, or one that cannot be read, where no copy can be made."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # itertools are copied up to Python 3.13
            return copy.deepcopy(iterator)
    except Exception:  # noqa: BLE001 - whatever a class of the user's raises
        return Unread(type(iterator).__name__)


class Unread:
    """Stand in a borrowed dataset for an iterator that planning would advance for training.

    >>> next(Unread("generator"))
    Traceback (most recent call last):
    ...
    ValueError: the dataset reads a generator, and what planning reads of it would be lost to training: begin it in \
__iter__(), or keep the rows in a list
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __iter__(self) -> Unread:
        return self

    def __next__(self) -> Any:
        raise ValueError(
            f"the dataset reads a {self._kind}, and what planning reads of it would be lost to training: begin it in "
            "__iter__(), or keep the rows in a list"
        )


_READ = (Dataset, Sampler, DataLoader)

_SAMPLERS = ("sampler", "batch_sampler")  # also where they are of no class of torch's
