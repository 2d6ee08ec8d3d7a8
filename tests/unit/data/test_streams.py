"""Streams without a length: what bounds them, and what is said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_memplan.data import streams
from lightning_memplan.data.samples import read_samples
from lightning_memplan.data.streams import most_of_a_stream, note_on_stream
from lightning_memplan.types import Device

MiB = 2**20


class Endless(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            yield torch.zeros(1023 * 256)  # with its object a MiB, less 1,024 bytes


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host of 4,096 MiB, of which batches may take 1,024."""
    monkeypatch.setattr(streams, "cpu_device", lambda: Device("host", total=4096 * MiB, kind="cpu"))


@pytest.mark.parametrize(
    ("loader", "most"),
    [
        ({}, 1024),
        ({"num_workers": 2, "prefetch_factor": 3}, 1024 // 7),  # one batch, and three of each worker
    ],
    ids=str,
)
def test_the_host_holds_the_batches_that_are_made_ahead(host: None, loader: dict[str, Any], most: int) -> None:
    source = DataLoader(Endless(), batch_size=4, **loader)
    samples = read_samples(DataLoader(Endless(), batch_size=4))
    assert most_of_a_stream(source, samples, 10**9) == most
    assert most_of_a_stream(source, samples, None) == most


def test_a_last_batch_that_may_be_dropped_is_said() -> None:
    text = "the length of the data is not known, and a last batch that is not full may be dropped: at most 9 samples"
    assert note_on_stream(DataLoader(Endless(), drop_last=True), 9).startswith(text)
    assert "dropped" not in note_on_stream(DataLoader(Endless()), 9)
