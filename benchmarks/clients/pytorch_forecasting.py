"""pytorch-forecasting: ``TimeSeriesDataSet.to_dataloader``, whose collation is a method, and metrics as losses.

Networks that take the longest of a batch's lengths on the GPU do not train on the null GPU, where it is 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from benchmarks.clients.job import job
from benchmarks.clients.styles.common import trainer


def samples(batch: Any) -> int:
    return len(batch[0]["encoder_cont"])


def _fit(name: str, callbacks: list[Any], **options: Any) -> None:
    import lightning.pytorch
    import pandas as pd
    import pytorch_forecasting as pf

    rows = [{"series": f"s{s}", "time": t, "value": np.sin(t / 5) + s} for s in range(3) for t in range(40)]
    lengths = {"max_encoder_length": 16, "min_encoder_length": 16, "max_prediction_length": 4}
    data = pf.TimeSeriesDataSet(
        pd.DataFrame(rows), "time", "value", ["series"], time_varying_unknown_reals=["value"], **lengths
    )
    metrics = {"loss": pf.metrics.SMAPE(), "logging_metrics": nn.ModuleList([pf.metrics.MAE()])}
    model = getattr(pf, name).from_dataset(data, learning_rate=0.01, **metrics, **options)
    runs = trainer(callbacks, module=lightning.pytorch, gradient_clip_val=0.1)
    runs.fit(model, data.to_dataloader(train=True, batch_size=8), data.to_dataloader(train=False, batch_size=8))


@job(size=8, count=samples)
def forecasting_nbeats(callbacks: list[Any]) -> None:
    """N-BEATS, whose data set has no variables but its target."""
    _fit("NBeats", callbacks, widths=[16, 16], backcast_loss_ratio=0.1)


@job(size=8, count=samples)
def forecasting_nhits(callbacks: list[Any]) -> None:
    """N-HiTS."""
    _fit("NHiTS", callbacks, hidden_size=16)
