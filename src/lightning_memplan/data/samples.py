"""Make batches of any size from the samples of any source, without starting a worker or advancing an iterator."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset

from lightning_memplan.data.batches import (
    TiledBatch,
    batch_size_of,
    hidden_tensors,
    kind,
    repeats,
    resized,
    tensors,
    tensors_of,
)
from lightning_memplan.data.loaders import borrowed, common_multiple, samples_of_loader, share_of
from lightning_memplan.lightning.compat import is_combined_loader, isolated_random_state
from lightning_memplan.lightning.data_source import combined_mode
from lightning_memplan.units import format_bytes

SIZES = (2, 3, 5)  #: batch sizes that are traced: two determine a line, three a parabola, and the last checks

Which = Literal["first", "largest"]

SAMPLE_SIZE = 64  #: default number of samples that ``"largest"`` looks at

_FIRST = max(SIZES)  #: number of samples that ``"first"`` looks at

_Make = Callable[[int], Any]  #: makes a batch of a number of samples


@dataclass(frozen=True, slots=True)
class Samples:
    """Make batches of any size.

    >>> samples = read_samples(torch.zeros(4, 3))
    >>> [size for size, _ in samples.batches()], samples.make(7).shape
    ([2, 3, 5], torch.Size([7, 3]))
    """

    make: _Make  #: makes a batch of a number of samples
    multiple: int = 1  #: sizes are multiples of it: 1 unless loaders of a collection differ (see ``common_multiple``)
    notes: tuple[str, ...] = ()  #: remarks that belong into a plan

    def batches(self, sizes: Sequence[int] = SIZES) -> list[tuple[int, Any]]:
        """Return ``(size, batch)`` for each of ``sizes``, times ``multiple``."""
        return [(size * self.multiple, self.make(size * self.multiple)) for size in sizes]

    def for_the_card(self, sizes: Sequence[int] = SIZES) -> list[tuple[int, Any]]:
        """Return ``batches`` for steps on the GPU, where large batches of plain tensors are ``TiledBatch``es."""
        return [(size * self.multiple, self.large(size * self.multiple)) for size in sizes]

    def large(self, size: int) -> Any:
        """Return a batch of ``size`` samples, as a ``TiledBatch`` if that is the same and saves time."""
        few = self.batches() if self.multiple == 1 and size > 2 * max(SIZES) else ()
        if not few or not repeats(few):
            return self.make(size)
        samples, batch = few[-1]
        return TiledBatch(batch, samples, size, partial(self.make, size))


def read_samples(source: Any, sample: Which = "first", sample_size: int = SAMPLE_SIZE) -> Samples:
    """Read a few samples of a DataLoader, a collection of DataLoaders, an iterable of batches, or a batch.

    From a DataLoader, read the first five samples of its dataset and pass them through its own ``collate_fn``. If they
    differ in size, as texts and graphs do, make batches of copies of the largest, so that all batches are alike.
    ``"largest"`` looks at ``sample_size`` samples instead, at equal distances over the dataset (the first ones of an
    ``IterableDataset``). A batch is cut or repeated along its first dimension. Random states stay as they were, and the
    dataset is read through a copy (see ``borrowed``).

    >>> loader = DataLoader([torch.zeros(3)] * 10, batch_size=4)
    >>> [(size, tuple(batch.shape)) for size, batch in read_samples(loader).batches()]
    [(2, (2, 3)), (3, (3, 3)), (5, (5, 3))]
    >>> [tuple(batch[0].shape) for _, batch in read_samples((torch.zeros(4, 8), torch.zeros(4))).batches()]
    [(2, 8), (3, 8), (5, 8)]

    Raises:
        ValueError: The dataset has length 0, no tensor's first dimension can be the batch, or the source is an
            iterator, which would lose the batch that is read.
    """
    notes: dict[str, None] = {}
    with isolated_random_state():
        make = _maker(source, _Look(sample, sample_size, notes))
    return Samples(make, common_multiple(source) if _is_collection(source) else 1, tuple(notes))


def check_sample(sample: object, sample_size: object) -> None:
    """Check the arguments of ``read_samples``.

    Raises:
        ValueError: ``sample`` is unknown, or ``sample_size`` is no positive int.
    """
    if sample not in get_args(Which):
        raise ValueError(f"sample is one of {', '.join(map(repr, get_args(Which)))}, not {sample!r}")
    if not isinstance(sample_size, int) or isinstance(sample_size, bool) or sample_size < 1:
        raise ValueError(f"sample_size is the number of samples to look at, an int of at least 1, not {sample_size!r}")


@dataclass(frozen=True, slots=True)
class _Look:
    """Which samples to look at."""

    sample: Which
    sample_size: int
    notes: dict[str, None]  #: remarks that were made while looking, in order

    @property
    def count(self) -> int:
        """Number of samples to look at."""
        return _FIRST if self.sample == "first" else self.sample_size

    @property
    def text(self) -> str:
        """The samples to look at, in words."""
        if self.sample == "first":
            return f"the first {_FIRST} (samples='largest' looks at more)"
        return f"the {self.sample_size} that were looked at"


def _maker(source: Any, look: _Look) -> _Make:
    if isinstance(source, DataLoader):
        return _from_loader(source, look)
    if _is_collection(source):
        return _from_collection(source, look)
    if not _is_batch(source) and hasattr(source, "__iter__"):
        if hasattr(source, "__next__"):
            raise ValueError(
                f"{kind(source)} can be read only once, and the batch that a plan reads would be lost: pass what can "
                "be begun anew, such as a DataLoader, or a batch"
            )
        source = next(iter(source), None)
        if source is None:
            raise ValueError("the loader yields no batch")
    return _from_batch(source)


def _from_batch(batch: Any) -> _Make:
    size = batch_size_of(batch)
    return lambda wanted: resized(batch, size, wanted)


def _is_batch(thing: object) -> bool:
    return any(leaf.dim() for leaf in (*tensors(thing), *hidden_tensors(thing)))


# ------------------------------------------------------------------------------------------------------------ a loader
_EMPTY = "the dataset has length 0: there is nothing to plan a batch size for"


def _from_loader(loader: DataLoader[Any], look: _Look) -> _Make:
    if loader.batch_sampler is None:  # the dataset makes the batches itself
        count = 1 if look.sample == "first" else look.count
        batches = [loader.collate_fn(item) for item in _items(loader, count, spread=True)]
        return _from_batch(max(batches, key=_bytes_of))
    items = _items(loader, look.count, spread=look.sample == "largest")

    def collated(samples: Sequence[Any]) -> Any:
        with isolated_random_state():  # a collate_fn with random sizes draws the same for every batch
            return loader.collate_fn([_own(sample) for sample in samples])

    if len({_outline(item) for item in items}) > 1:
        sizes = [_bytes_of(collated([item, item])) // 2 for item in items]
        if min(sizes) < max(sizes):
            items = [items[sizes.index(max(sizes))]]
            look.notes[
                f"samples differ in size ({format_bytes(min(sizes))} to {format_bytes(max(sizes))}): planned for "
                f"batches of the largest of {look.text}"
            ] = None
    return lambda size: collated(list(itertools.islice(itertools.cycle(items), size)))


def _items(loader: DataLoader[Any], count: int, *, spread: bool) -> list[Any]:
    """Return ``count`` items of the loader's dataset: the first ones, or at equal distances over all of it."""
    dataset = borrowed(loader.dataset)
    if isinstance(dataset, IterableDataset):
        items = list(itertools.islice(dataset, count))
    elif samples_of_loader(loader) == 0:
        items = []
    else:
        length = len(dataset) if hasattr(dataset, "__len__") else count
        step = max(1, length // count) if spread else 1
        try:
            items = [dataset[index] for index in range(0, min(length, count * step), step)]
        except (KeyError, TypeError, IndexError):  # its keys are no numbers: ask the sampler
            batches = loader.batch_sampler
            indices = borrowed(loader.sampler) if batches is None else itertools.chain.from_iterable(borrowed(batches))
            items = [dataset[index] for index in itertools.islice(indices, count)]
    if not items:
        raise ValueError(_EMPTY)
    return items


def _own(sample: Any) -> Any:
    """Return a copy of the sample for one use: a collate_fn may take entries out of it."""
    return copy.copy(sample) if isinstance(sample, (dict, list)) else sample


def _outline(thing: object) -> Hashable:
    """Return the shapes and lengths of a sample's parts, which decide its size."""
    if isinstance(thing, (str, bytes)):
        return len(thing)
    if isinstance(thing, Mapping):
        return tuple((key, _outline(value)) for key, value in thing.items())
    if isinstance(thing, (list, tuple)):
        return tuple(map(_outline, thing))
    shape = getattr(thing, "shape", getattr(thing, "size", None))  # tensors and arrays; images of PIL
    if isinstance(shape, (tuple, torch.Size)):
        return tuple(shape)
    return tuple(tuple(tensor.shape) for tensor in tensors_of(thing))


def _bytes_of(batch: object) -> int:
    return sum(t.numel() * t.element_size() for t in tensors_of(batch))


# ---------------------------------------------------------------------------------------------------- several loaders
def _is_collection(source: Any) -> bool:
    return any(isinstance(leaf, DataLoader) or is_combined_loader(leaf) for leaf in tree_leaves(source))


def _from_collection(source: Any, look: _Look) -> _Make:
    """Make a batch of each loader, in the shape of the collection; the largest one if loaders are read in sequence."""
    loaders = source.iterables if is_combined_loader(source) else source
    makers = [(_maker(loader, look), share_of(loader, source)) for loader in tree_leaves(loaders)]

    def make(size: int) -> Any:
        batches = iter([one(max(1, int(size * share))) for one, share in makers])
        return tree_map(lambda loader: next(batches), loaders)

    if combined_mode(source) == "sequential":
        largest, share = max(makers, key=lambda maker: _bytes_of(maker[0](1)) * maker[1])
        return lambda size: largest(max(1, int(size * share)))
    return make
