"""What the Trainer does with its loaders, as far as planning counts on it."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl

from lightning_memplan.lightning.trainer import divides_samples


@pytest.mark.parametrize("divides", [True, False])
def test_a_trainer_tells_whether_it_divides_the_samples_among_ranks(divides: bool) -> None:
    """Private: ``trainer._accelerator_connector.use_distributed_sampler`` of pytorch_lightning 2.6.6."""
    trainer = pl.Trainer(accelerator="cpu", logger=False, use_distributed_sampler=divides)
    assert divides_samples(trainer) is divides
