"""Make batches of any size from the samples of any source, without advancing an iterator of the user's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import lcm
from typing import Any, Literal, get_args

from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset, default_collate, default_convert

from lightning_memplan.data.batches import (
    batch_size_of,
    hidden_tensors,
    kind,
    outline,
    part_count,
    resized,
    tensor_bytes,
    tensors,
)
from lightning_memplan.data.loaders import (
    batching_sampler,
    loaders_in,
    samples_of_loader,
    share_of,
    unit_of,
    yielded_size,
)
from lightning_memplan.data.reading import KeptSamples, keep_samples
from lightning_memplan.data.tiling import Tile, TiledBatch, tiling
from lightning_memplan.errors import TraceError
from lightning_memplan.lightning.compat import is_combined_loader, isolated_random_state
from lightning_memplan.lightning.data_source import combined_mode
from lightning_memplan.units import format_bytes

SIZES = (2, 3, 5)  #: batch sizes that are traced: two determine a line, three a parabola, and the last checks

Which = Literal["auto", "first", "largest"]

SAMPLE_SIZE = 64  #: default number of samples that ``"largest"`` looks at

_FIRST = max(SIZES)  #: number of samples that ``"first"`` looks at

MOST = 2**16  #: samples from which a batch is made one by one, at most, where a small batch cannot be repeated

_Make = Callable[[int], Any]  #: makes a batch of a number of samples


@dataclass(frozen=True, slots=True)
class Samples:
    """Make batches of any size.

    >>> import torch
    >>> samples = read_samples(torch.zeros(4, 3))
    >>> [size for size, _ in samples.batches()], samples.make(7).shape
    ([2, 3, 5], torch.Size([7, 3]))
    """

    make: _Make  #: makes a batch of a number of samples
    multiple: int = 1  #: sizes are multiples of it: 1 unless loaders of a collection differ, as 4 and 6
    notes: tuple[str, ...] = ()  #: remarks that belong into a plan
    accepts: int = 1  #: ``collate_fn`` makes batches of multiples of it alone
    fixed: int | None = None  #: the only batch size, where no other can be had
    own: int | None = None  #: batch size that the source has now, None if it is not known
    count: int | None = None  #: samples of a pass (of each worker), where all of them were read

    @property
    def rows_are_samples(self) -> bool:
        """True if the first dimension of a batch's first tensor is the number of its samples."""
        size, batch = self.batches((2,))[0]
        try:
            return batch_size_of(batch) == size
        except ValueError:
            return False

    def batches(self, sizes: Sequence[int] = SIZES) -> list[tuple[int, Any]]:
        """Return ``(size, batch)`` for each of ``sizes``, times ``multiple``; of the only size, where there is one."""
        return [(size, self.batch(size)) for size in self._sizes(sizes)]

    def for_the_card(self, sizes: Sequence[int] = SIZES) -> list[tuple[int, Any]]:
        """Return ``batches`` for steps on the GPU, where large batches are ``TiledBatch``es, if that is the same.

        Sizes above those that are traced are rounded down to a multiple, not multiplied.
        """
        step = self.multiple
        few = [size if size <= max(SIZES) else max(1, size // step) for size in sizes]
        return [(size, self.large(size)) for size in self._sizes(few)]

    def batch(self, size: int) -> Any:
        """Return a batch of ``size`` samples on the host.

        Raises:
            TraceError: it would have to be made from too many samples, one by one.
        """
        made = self.large(size)
        if not isinstance(made, TiledBatch):
            return made
        if size > MOST and part_count(made.few) > part_count(self.make(self.multiple)):  # a part for each sample
            raise _too_large(size)
        return made.whole()

    def large(self, size: int) -> Any:
        """Return a batch of ``size`` samples, as a ``TiledBatch`` if that is the same and saves time.

        Raises:
            TraceError: it would have to be made from too many samples, one by one.
        """
        if self.fixed is not None or size <= 2 * max(SIZES) * self.multiple:
            return self.make(size)
        few = [(each * self.multiple, self.make(each * self.multiple)) for each in SIZES]
        tile: Tile | None = tiling(few)
        if tile is not None:
            return TiledBatch(few[-1][1], few[-1][0], size, tile)
        if size > MOST:
            raise _too_large(size)
        return self.make(size)

    def _sizes(self, sizes: Sequence[int]) -> list[int]:
        return [size * self.multiple for size in sizes] if self.fixed is None else [self.fixed]


def _too_large(size: int) -> TraceError:
    return TraceError(f"a batch of {size} samples takes too long to make on the host", reason="too_large")


def read_samples(source: Any, sample: Which = "first", sample_size: int = SAMPLE_SIZE) -> Samples:
    """Read a few samples of a DataLoader, a collection of DataLoaders, an iterable of batches, or a batch.

    From a DataLoader, read five samples, those that its sampler would ask for first, and pass them through its own
    ``collate_fn``, or its own iterator where it has one. If they differ in size, as texts and graphs do, make batches
    of copies of the largest, so that all batches are alike. ``"largest"`` looks at ``sample_size`` samples instead, at
    equal distances over the dataset (the first ones of an ``IterableDataset``). A batch is cut or repeated along its
    first dimension. Random states stay as they were, and the dataset is read through a copy (see ``borrowed``).

    >>> import torch
    >>> loader = DataLoader([torch.zeros(3)] * 10, batch_size=4)
    >>> [(size, tuple(batch.shape)) for size, batch in read_samples(loader).batches()]
    [(2, (2, 3)), (3, (3, 3)), (5, (5, 3))]
    >>> [tuple(batch[0].shape) for _, batch in read_samples((torch.zeros(4, 8), torch.zeros(4))).batches()]
    [(2, 8), (3, 8), (5, 8)]

    Raises:
        ValueError: The dataset has length 0, no tensor's first dimension can be the batch, or the source is an
            iterator, which would lose the batch that is read.
    """
    look = _Look(sample, sample_size, {}, {})
    with isolated_random_state():
        make = _maker(source, look)
        found = Samples(make, lcm(*look.multiples))
        found = replace(found, own=_own_size(source, look), count=min(look.counts.values(), default=None))
        if found.own is not None and found.count is None:
            found = replace(found, count=_samples_of_all(source, found.own))
        if _is_collection(source):
            found = _with_sizes_that_can_be_had(found, source)
    return replace(found, notes=(*look.notes, *found.notes))


def _own_size(source: Any, look: _Look) -> int | None:
    """Return the batch size that the source has now."""
    if not _is_collection(source):
        return look.rows.get("batch")
    smallest = unit_of(source)
    if smallest is None:
        sizes = [yielded_size(loader) for loader in loaders_in(source)]
        return min(filter(None, sizes), default=look.rows.get("batch"))
    return smallest


def _samples_of_all(batches: Any, each: int) -> int | None:
    """Return how many samples batches have that are no DataLoader's, by their number; None if it is not known.

    Where a last batch that is not full is dropped, there are no fewer. Otherwise they all come in one batch of as many.
    """
    workers = 1
    if isinstance(batches, DataLoader):
        if batching_sampler(batches) is not None:
            return None
        if isinstance(batches.dataset, IterableDataset):
            workers = max(1, batches.num_workers)  # each makes batches of its share
        batches = batches.dataset
    elif _is_collection(batches):
        return None
    try:
        return max(1, len(batches) // workers) * each
    except (TypeError, NotImplementedError):
        return None


def _with_sizes_that_can_be_had(samples: Samples, source: Any) -> Samples:
    """Return the samples with the sizes that ``collate_fn`` accepts, or the only one that can be had.

    Raises:
        Exception: whatever ``collate_fn`` raises for all sizes.
    """
    try:
        few = [samples.make(size * samples.multiple) for size in SIZES]
    except Exception:
        accepts = next((each for each in _divisors(samples.own or 1) if _makes(samples, each)), None)
        if accepts is not None:
            note = f"the loader makes batches of multiples of {accepts} samples alone"
            return replace(samples, multiple=lcm(samples.multiple, accepts), accepts=accepts, notes=(note,))
        if samples.own is None or not _makes(samples, samples.own, (1,)):
            raise
        return replace(samples, fixed=samples.own, notes=(f"the loader makes batches of {samples.own} samples alone",))
    shapes = {(outline(batch), tensor_bytes(batch)) for batch in few}
    if len(shapes) == 1 and tensor_bytes(few[0]) and samples.own is not None:
        note = (
            "a batch is of the same size, whatever number of samples its loader puts into it: there is no batch size "
            "to set"
        )
        return replace(samples, fixed=samples.own, notes=(note,))
    return samples


def _makes(samples: Samples, multiple: int, sizes: Sequence[int] = SIZES) -> bool:
    try:
        for size in sizes:
            samples.make(size * multiple)
    except Exception:  # noqa: BLE001 - whatever a collate_fn of the user's raises
        return False
    return True


def _divisors(number: int) -> list[int]:
    """Return the divisors above 1, in order.

    >>> _divisors(12)
    [2, 3, 4, 6, 12]
    """
    return [each for each in range(2, number + 1) if number % each == 0]


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
    """Choose the samples to look at."""

    sample: Which
    sample_size: int
    notes: dict[str, None]  #: remarks that were made while looking, in order
    counts: dict[int, int]  #: samples of a pass, where all of them were read
    rows: dict[str, int] = field(default_factory=dict)  #: number of rows of a batch that was read
    multiples: list[int] = field(default_factory=list)  #: batch sizes at which a loader yields whole samples

    @property
    def count(self) -> int:
        """Number of samples to look at."""
        return self.sample_size if self.sample == "largest" else _FIRST

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
        look.rows["batch"] = batch_size_of(source)
    return _from_batch(source)


def _from_batch(batch: Any) -> _Make:
    size = batch_size_of(batch)
    return lambda wanted: resized(batch, size, wanted)


def _is_batch(thing: object) -> bool:
    return any(leaf.dim() for leaf in (*tensors(thing), *hidden_tensors(thing)))


# ------------------------------------------------------------------------------------------------------------ a loader
_SECONDS = 2.0  #: in which to look at samples beyond the first, about; where these differ, five times as long

_DRAWS = 16  #: times that a batch of the same samples is made, to see what a collate_fn draws

_ALIKE = 0.05  #: part by which samples may differ in size without a word

_EMPTY = "the dataset has length 0: there is nothing to plan a batch size for"


def _from_loader(loader: DataLoader[Any], look: _Look) -> _Make:
    if batching_sampler(loader) is None:  # the dataset makes the batches itself
        kept = _kept(loader, look.count if look.sample == "largest" else 1, look, spread=True)
        batch = max((kept.of_one(place).batch(1) for place in range(len(kept.indices))), key=tensor_bytes)
        look.rows["batch"] = batch_size_of(batch)
        return _from_batch(batch)
    began = time.perf_counter()
    kept = _kept(loader, look.count, look, spread=look.sample == "largest")
    seconds = time.perf_counter() - began
    sizes, text = _sizes_of(kept), look.text
    if look.sample == "auto" and (count := _more(kept, seconds, look, min(sizes) < max(sizes))):
        with suppress(Exception):  # a sample of the user's that cannot be read, and may never be asked for
            more = _kept(loader, count, look, spread=True)
            found, text = _sizes_of(more), f"the {len(more.indices)} that were looked at"
            if min(found) < max(found) and max(found) >= max(sizes):
                kept, sizes = more, found
    if min(sizes) < max(sizes):
        kept = kept.of_one(sizes.index(max(sizes)))
    if max(sizes) > (1 + _ALIKE) * min(sizes):
        differ = f"samples differ in size ({format_bytes(min(sizes))} to {format_bytes(max(sizes))})"
        look.notes[f"{differ}: planned for batches of the largest of {text}"] = None
    return _of_the_largest_draw(kept, look).batch


def _of_the_largest_draw(kept: KeptSamples, look: _Look) -> KeptSamples:
    """Return the samples with the seed of the largest batch, where a ``collate_fn`` draws how large its batches are."""
    if look.sample == "first" or kept.in_worker or kept.items is None:  # or each draw would read the samples again
        return kept
    if kept.loader.collate_fn in (default_collate, default_convert):
        return kept
    began, sizes = time.perf_counter(), dict[int, int]()
    for seed in range(_DRAWS):
        with suppress(Exception):  # of the user's, which other sizes or numbers may not meet
            sizes[seed] = tensor_bytes(replace(kept, seed=seed).batch(2))
        if time.perf_counter() - began > _SECONDS:
            break
    least, most = min(sizes.values(), default=0), max(sizes.values(), default=0)
    if most <= (1 + _ALIKE) * least:
        return kept
    differ = f"batches of the same samples differ in size ({format_bytes(least)} to {format_bytes(most)})"
    look.notes[f"{differ}, as the loader draws it: planned for the largest of {len(sizes)}"] = None
    return replace(kept, seed=max(sizes, key=sizes.__getitem__))


def _more(kept: KeptSamples, seconds: float, look: _Look, differ: bool) -> int:
    """Return how many samples to look at beside the first, which took ``seconds`` to read; 0 for no more.

    A stream has no last samples: more of it are read where the first ones ``differ``.
    """
    if kept.ended or (isinstance(kept.loader.dataset, IterableDataset) and not differ):
        return 0
    if (samples_of_loader(kept.loader) or _FIRST + 1) <= _FIRST:
        return 0  # these are all
    a_second = len(kept.indices) / max(seconds, 1e-6)
    if differ:
        return min(look.sample_size, max(2 * _FIRST, int(5 * _SECONDS * a_second)))
    count = min(look.sample_size, int(_SECONDS * a_second))
    return count if count > len(kept.indices) else 0


def _sizes_of(kept: KeptSamples) -> list[int]:
    """Return the bytes of each sample in a batch; the same for all where they have the same shapes."""
    if kept.items is None or len({outline(item) for item in kept.items}) == 1:
        return [0]
    return [tensor_bytes(kept.of_one(place).batch(2)) // 2 for place in range(len(kept.items))]


def _kept(loader: DataLoader[Any], count: int, look: _Look, *, spread: bool) -> KeptSamples:
    kept = keep_samples(loader, count, spread=spread)
    if not kept.indices:
        raise ValueError(_EMPTY)
    if kept.ended:
        look.counts[id(loader)] = max(1, len(kept.indices) // max(1, loader.num_workers))
    return kept.where_it_works(yielded_size(loader) or 1).in_batches()


# ---------------------------------------------------------------------------------------------------- several loaders
def _is_collection(source: Any) -> bool:
    return any(isinstance(leaf, DataLoader) or is_combined_loader(leaf) for leaf in tree_leaves(source))


def _from_collection(source: Any, look: _Look) -> _Make:
    """Make a batch of each loader, in the shape of the collection; the largest one if loaders are read in sequence."""
    loaders = source.iterables if is_combined_loader(source) else source
    makers = [(_maker(loader, look), _share_of(loader, source, look)) for loader in tree_leaves(loaders)]
    look.multiples.extend(share.denominator for _, share in makers)

    def make(size: int) -> Any:
        batches = iter([one(max(1, int(size * share))) for one, share in makers])
        return tree_map(lambda loader: next(batches), loaders)

    if combined_mode(source) == "sequential":
        largest, share = max(makers, key=lambda maker: tensor_bytes(maker[0](1)) * maker[1])
        return lambda size: largest(max(1, int(size * share)))
    return make


def _share_of(loader: Any, source: Any, look: _Look) -> Fraction:
    """Return ``share_of``; by the rows that were read of a loader that tells no batch size, beside one that does."""
    unit = unit_of(source)
    if unit is None or unit_of(loader) is not None:
        return share_of(loader, source)
    told = isinstance(loader, DataLoader) and batching_sampler(loader) is not None
    rows = yielded_size(loader) if told else look.rows.get("batch")
    return Fraction(rows or unit, unit)
