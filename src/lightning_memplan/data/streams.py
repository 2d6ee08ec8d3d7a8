"""Bound the batch size of streams whose length nobody knows."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from lightning_memplan.data.batches import tensor_bytes
from lightning_memplan.data.loaders import batching_sampler, loaders_in, samples_of_loader
from lightning_memplan.data.samples import MOST, Samples
from lightning_memplan.devices.detect import cpu_device

_OBJECT = 1024  #: bytes of a sample on the host, beside those of its tensors

_HOST = 4  #: the part of the host's memory that batches may take: a quarter


def unsized_loaders(source: Any) -> list[DataLoader[Any]]:
    """Return the loaders of a collection, if none of them has a length.

    >>> unsized_loaders(DataLoader([1, 2, 3]))
    []
    """
    loaders = loaders_in(source)
    known = any(not isinstance(loader, DataLoader) or samples_of_loader(loader) is not None for loader in loaders)
    return [] if known else loaders


def most_of_a_stream(source: Any, samples: Samples, max_batch_size: int | None) -> int | None:
    """Return the largest batch size of streams without a length; None if there is another loader among them.

    The host has to hold the batches that are made ahead in a quarter of its memory. Unless ``max_batch_size`` allows
    more, a batch has at most 65,536 samples; where a last batch that is not full would be dropped, and nothing trained
    if that is the first one, it has as many as now.
    """
    loaders = unsized_loaders(source)
    if not loaders:
        return None
    ahead = sum(1 + loader.num_workers * (loader.prefetch_factor or 0) for loader in loaders)
    each = tensor_bytes(samples.batch(samples.multiple)) // samples.multiple + _OBJECT
    most = max(1, cpu_device().total // _HOST // ahead // each)
    if max_batch_size is not None:
        return most
    return min(most, samples.own) if _drops_last(loaders) and samples.own is not None else min(most, MOST)


def note_on_stream(source: Any, most: int) -> str:
    """Explain the bound of a stream without a length.

    >>> note_on_stream([], 65536)
    'the length of the data is not known: at most 65536 samples are planned for; max_batch_size allows more'
    """
    why = ", and a last batch that is not full is dropped" if _drops_last(unsized_loaders(source)) else ""
    return (
        f"the length of the data is not known{why}: at most {most} samples are planned for; max_batch_size allows more"
    )


def _drops_last(loaders: list[DataLoader[Any]]) -> bool:
    return any(getattr(batching_sampler(loader), "drop_last", False) for loader in loaders)
