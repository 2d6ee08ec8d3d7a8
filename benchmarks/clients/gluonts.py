"""gluonts: estimators with ``trainer_kwargs``, whose loaders are endless iterables of batches and no DataLoaders."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.clients.job import job


def _data() -> Any:
    from gluonts.dataset.common import ListDataset

    return ListDataset([{"start": "2020-01-01", "target": np.random.rand(100)} for _ in range(6)], freq="D")


def _settings(callbacks: list[Any]) -> dict[str, Any]:
    trainer = {"accelerator": "gpu", "devices": 1, "max_epochs": 2, "enable_progress_bar": False, "logger": False}
    return {"num_batches_per_epoch": 4, "batch_size": 8, "trainer_kwargs": {**trainer, "callbacks": callbacks}}


@job(size=8, keeps="is no torch.utils.data.DataLoader")
def gluonts_deepar(callbacks: list[Any]) -> None:
    """DeepAR, with features of time."""
    from gluonts.torch import DeepAREstimator

    DeepAREstimator(freq="D", prediction_length=7, hidden_size=16, num_layers=1, **_settings(callbacks)).train(_data())


@job(size=8, keeps="is no torch.utils.data.DataLoader")
def gluonts_feedforward(callbacks: list[Any]) -> None:
    """A feed-forward network, with validation data."""
    from gluonts.torch import SimpleFeedForwardEstimator

    data = _data()
    SimpleFeedForwardEstimator(prediction_length=7, **_settings(callbacks)).train(data, data)


@job(size=8, keeps="is no torch.utils.data.DataLoader")
def gluonts_patchtst(callbacks: list[Any]) -> None:
    """A transformer on patches."""
    from gluonts.torch import PatchTSTEstimator

    options = {"patch_len": 8, "d_model": 16, "nhead": 2, "dim_feedforward": 32, "context_length": 32}
    PatchTSTEstimator(prediction_length=7, **options, **_settings(callbacks)).train(_data())
