"""pytorch-forecasting: ``TimeSeriesDataSet.to_dataloader``, whose collation is a method, and metrics as losses."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.clients.job import job
from benchmarks.clients.styles.common import trainer


def samples(batch: Any) -> int:
    return len(batch[0]["encoder_cont"])


KNOWN = {"static_categoricals": ["series"], "time_varying_known_reals": ["time"], "add_relative_time_idx": True}


def _fit(name: str, callbacks: list[Any], known: bool, **options: Any) -> None:
    import lightning.pytorch
    import pandas as pd
    import pytorch_forecasting as pf

    rows = [{"series": f"s{s}", "time": t, "value": np.sin(t / 5) + s} for s in range(3) for t in range(40)]
    data = pf.TimeSeriesDataSet(
        pd.DataFrame(rows), "time", "value", ["series"], max_encoder_length=16, max_prediction_length=4,
        time_varying_unknown_reals=["value"],
        **(KNOWN if known else {}),
    )  # fmt: skip
    model = getattr(pf, name).from_dataset(data, learning_rate=0.01, **options)
    runs = trainer(callbacks, module=lightning.pytorch, gradient_clip_val=0.1)
    runs.fit(model, data.to_dataloader(train=True, batch_size=8), data.to_dataloader(train=False, batch_size=8))


@job(size=8, count=samples)
def forecasting_tft(callbacks: list[Any]) -> None:
    """The temporal fusion transformer."""
    _fit("TemporalFusionTransformer", callbacks, True, hidden_size=8, attention_head_size=1, hidden_continuous_size=4)


@job(size=8, count=samples)
def forecasting_nbeats(callbacks: list[Any]) -> None:
    """N-BEATS."""
    _fit("NBeats", callbacks, False, widths=[16, 16], backcast_loss_ratio=0.1)
