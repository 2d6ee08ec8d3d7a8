"""Bound the batch size of streams whose length nobody knows."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from lightning_memplan.data.batches import tensor_bytes
from lightning_memplan.data.loaders import batching_sampler, dataset_size, loaders_in
from lightning_memplan.data.samples import MOST, Samples
from lightning_memplan.devices.detect import cpu_device

_OBJECT = 1024  #: bytes of a sample on the host, beside those of its tensors

_HOST = 4  #: the part of the host's memory that batches may take: a quarter


def unsized_loaders(source: Any, samples: Samples) -> list[Any]:
    """Return the loaders and other iterables of a collection, if no number of samples is known of any of them.

    >>> import torch
    >>> from lightning_memplan.data.samples import read_samples
    >>> loader = DataLoader([torch.ones(2)])
    >>> unsized_loaders(loader, read_samples(loader))
    []
    """
    loaders = loaders_in(source)
    if samples.own is None or samples.count is not None or dataset_size(source) is not None:
        return []
    return loaders


def most_of_a_stream(source: Any, samples: Samples, max_batch_size: int | None) -> int | None:
    """Return the largest batch size of streams without a length; None if there is another loader among them.

    The host has to hold the batches that are made ahead in a quarter of its memory. Unless ``max_batch_size`` allows
    more, a batch has at most 65,536 samples; where a last batch that is not full may be dropped, and nothing trained
    if that is the first one, it has as many as now.
    """
    loaders = unsized_loaders(source, samples)
    if not loaders:
        return None
    ahead = sum(1 + loader.num_workers * (loader.prefetch_factor or 0) for loader in _with_workers(loaders))
    ahead += sum(not isinstance(loader, DataLoader) for loader in loaders)
    each = tensor_bytes(samples.batch(samples.multiple)) // samples.multiple + _OBJECT
    most = max(1, cpu_device().total // _HOST // ahead // each)
    if max_batch_size is not None:
        return most
    return min(most, samples.own) if _may_drop_last(loaders) and samples.own is not None else min(most, MOST)


def note_on_stream(source: Any, most: int) -> str:
    """Explain the bound of a stream without a length.

    >>> note_on_stream(DataLoader([]), 65536)
    'the length of the data is not known: at most 65536 samples are planned for; max_batch_size allows more'
    """
    why = ", and a last batch that is not full may be dropped" if _may_drop_last(loaders_in(source)) else ""
    return (
        f"the length of the data is not known{why}: at most {most} samples are planned for; max_batch_size allows more"
    )


def _with_workers(loaders: list[Any]) -> list[DataLoader[Any]]:
    return [loader for loader in loaders if isinstance(loader, DataLoader)]


def _may_drop_last(loaders: list[Any]) -> bool:
    """Return True if a loader drops its last batch, or does not tell, since it or its dataset makes the batches."""
    return any(
        not isinstance(loader, DataLoader) or getattr(batching_sampler(loader), "drop_last", True) for loader in loaders
    )
