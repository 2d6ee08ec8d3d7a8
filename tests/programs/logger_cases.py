"""A fit on a GPU with every logger that is installed, all at once: ``python logger_cases.py FOLDER``.

Run by ``test_loggers.py`` on the null GPU, which reads back what each has written; it runs on a real one as well. It
prints the names of the loggers and the measurements as JSON.
"""

from __future__ import annotations

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

import lightning_memplan as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.models import Classifier, Data, mlp

STEPS = 5


class Strict(Logger):
    """As loggers of web services are: a prefix, no files, and nothing is taken but flat, short and finite values.

    Comet's has a prefix and sends what it is given; Neptune's takes a name either for a value or for what is below it,
    and no None; MLflow's takes few characters in names, and values of limited length.
    """

    name, version = "strict", 0

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.hparams: dict[str, Any] = {}
        self.metrics: list[tuple[int, dict[str, float]]] = []

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._check(params, (int, float, str))
        self.hparams.update(params)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        assert type(step) is int, step
        self._check(metrics, (int, float))
        self.metrics.append((step, {f"strict-{name}": metrics.pop(name) for name in list(metrics)}))

    def finalize(self, status: str) -> None:
        self.folder.mkdir()
        text = json.dumps({"status": status, "hparams": self.hparams, "metrics": self.metrics}, allow_nan=False)
        (self.folder / "strict.json").write_text(text)

    @staticmethod
    def _check(values: Any, kinds: tuple[type, ...]) -> None:
        for name, value in values.items():
            assert type(name) is str, name
            assert len(name) <= 100, name
            assert all(c.isalnum() or c in "_/.-: " for c in name), name
            assert type(value) in kinds, (name, value)
            assert not isinstance(value, str) or 0 < len(value) <= 250, (name, value)
            assert isinstance(value, str) or math.isfinite(value), (name, value)
            assert not any(other.startswith(f"{name}/") for other in values), name


def loggers(folder: Path) -> dict[str, Logger]:
    found: dict[str, Logger] = {
        "strict": Strict(folder / "strict"),  # before the others: it empties what it is given
        "csv": CSVLogger(folder, name="csv", version=""),
        "tensorboard": TensorBoardLogger(folder, name="tensorboard", version=""),
        "prefixed": TensorBoardLogger(folder, name="prefixed", version="", prefix="mine"),
    }
    if find_spec("wandb"):
        import wandb

        quiet = wandb.Settings(silent=True, x_disable_stats=True)
        found["wandb"] = WandbLogger(save_dir=folder, project="memplan", offline=True, settings=quiet)
    if find_spec("mlflow"):
        found["mlflow"] = MLFlowLogger(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    return found


def main(folder: Path) -> None:
    found = loggers(folder)
    planner = mp.MemoryPlanner(max_batch_size=64, method="trace")
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        max_steps=STEPS,
        logger=list(found.values()),
        callbacks=[planner],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(mlp()), datamodule=Data(torch.zeros(2048), 64 * STEPS))
    if "wandb" in found:
        found["wandb"].experiment.finish()
    print(json.dumps({"loggers": list(found), "steps": [m._asdict() for m in planner.measurements]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
