"""darts: forecasting models that make their Trainer and loaders themselves; callbacks by ``pl_trainer_kwargs``."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.clients.job import job


def _train(name: str, callbacks: list[Any], **options: Any) -> None:
    import darts.models
    from darts import TimeSeries

    settings = {"accelerator": "gpu", "devices": 1, "enable_progress_bar": False, "callbacks": callbacks}
    series = [TimeSeries.from_values(np.random.rand(60).astype(np.float32)) for _ in range(4)]
    model = getattr(darts.models, name)(
        input_chunk_length=24, output_chunk_length=6, n_epochs=2, batch_size=4, pl_trainer_kwargs=settings, **options
    )
    model.fit(series, val_series=series)


@job(size=4)
def darts_nbeats(callbacks: list[Any]) -> None:
    """N-BEATS on four series."""
    _train("NBEATSModel", callbacks, num_stacks=2, num_blocks=1, layer_widths=32)


@job(size=4)
def darts_tcn(callbacks: list[Any]) -> None:
    """A convolutional network with weight norm and dropout."""
    _train("TCNModel", callbacks, num_filters=4, weight_norm=True, dropout=0.1)


@job(size=4)
def darts_transformer(callbacks: list[Any]) -> None:
    """A transformer, with a likelihood and a scheduler."""
    import torch
    from darts.utils.likelihood_models.torch import QuantileRegression

    options = {"d_model": 16, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 32}
    scheduler = {"lr_scheduler_cls": torch.optim.lr_scheduler.ExponentialLR, "lr_scheduler_kwargs": {"gamma": 0.9}}
    _train("TransformerModel", callbacks, likelihood=QuantileRegression(), **options, **scheduler)


@job(size=4)
def darts_rnn(callbacks: list[Any]) -> None:
    """An LSTM trained with teacher forcing."""
    _train("RNNModel", callbacks, model="LSTM", hidden_dim=16, training_length=30)
