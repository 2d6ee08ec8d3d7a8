"""NeuralForecast: a model is a LightningModule that makes its Trainer; windows are cut within the step."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.clients.job import job


def samples(batch: Any) -> int:
    return len(batch["temporal"])


def _fit(name: str, callbacks: list[Any], **options: Any) -> None:
    import neuralforecast.models
    import pandas as pd
    from neuralforecast import NeuralForecast

    days = pd.date_range("2020-01-01", periods=60)
    series = [pd.DataFrame({"unique_id": f"s{s}", "ds": days, "y": np.random.rand(60)}) for s in range(16)]
    model = getattr(neuralforecast.models, name)(
        h=6, input_size=12, max_steps=6, batch_size=4, windows_batch_size=32, callbacks=callbacks, accelerator="gpu",
        devices=1, enable_progress_bar=False, logger=False, **options,
    )  # fmt: skip
    NeuralForecast([model], freq="D").fit(pd.concat(series))


@job(size=4, count=samples)
def neuralforecast_nhits(callbacks: list[Any]) -> None:
    """NHITS."""
    _fit("NHITS", callbacks, mlp_units=[[16, 16]] * 3)


@job(size=4, count=samples)
def neuralforecast_lstm(callbacks: list[Any]) -> None:
    """A recurrent network."""
    _fit("LSTM", callbacks, encoder_hidden_size=16, decoder_hidden_size=16)


@job(size=4, count=samples)
def neuralforecast_patchtst(callbacks: list[Any]) -> None:
    """A transformer on patches."""
    _fit(
        "PatchTST", callbacks, hidden_size=16, n_heads=2, encoder_layers=1, patch_len=4, stride=2, linear_hidden_size=16
    )
