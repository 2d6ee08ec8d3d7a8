"""What is logged, written by real loggers and read back; TensorBoard and CSV are read in whole fits (test_callback)."""

from __future__ import annotations

import pytest

from lightning_memplan._report import plan_hparams, step_metrics
from lightning_memplan._types import Device, Measurement, Plan

GiB = 2**30
PLAN = Plan(8, Device("a card", 16 * GiB), 15 * GiB, 0.05, "memory", "trace", 14 * GiB, 13 * GiB, 12 * GiB)
PHASES = {"forward": 12 * GiB, "backward": 13 * GiB}
STEPS = [step_metrics(Measurement(k, 13 * GiB, 14 * GiB, (12 + k) * GiB, 14 * GiB, PHASES, PHASES), 1) for k in (0, 1)]


def test_mlflow(tmp_path, monkeypatch):
    """MLflow takes no name with other characters than its own: the slash is among them."""
    mlflow = pytest.importorskip("mlflow")
    from pytorch_lightning.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}")
    logger.log_hyperparams(plan_hparams(PLAN))
    for step, metrics in enumerate(STEPS):
        logger.log_metrics(metrics, step=step)
    client = mlflow.tracking.MlflowClient(f"file:{tmp_path}")
    assert client.get_run(logger.run_id).data.params["memplan/batch_size"] == "8"
    for name in STEPS[0]:
        read = [(metric.step, metric.value) for metric in client.get_metric_history(logger.run_id, name)]
        assert read == [(step, metrics[name]) for step, metrics in enumerate(STEPS)]
