"""A fit on two GPUs: ``python ranks.py FOLDER '{"precision": ...}' '{"gradient_as_bucket_view": true}'``.

Each rank writes what was planned and measured to ``FOLDER/RANK.json``. Run by ``test_strategy.py`` on the null GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy

sys.path.insert(0, str(Path(__file__).parent))
from fits import Classifier, Data, mlp

import lightning_memplan as mp


class Writes(pl.Callback):
    def __init__(self, folder: str, planner: mp.MemoryPlanner) -> None:
        self.folder, self.planner = folder, planner

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        plan = self.planner.plan
        assert plan is not None
        result = {
            "batch_size": plan.batch_size,
            "set": trainer.datamodule.batch_size,  # type: ignore[attr-defined]
            "notes": plan.notes,
            "total": plan.device.total,
            "method": plan.method,
            "measured": [
                [m.predicted_allocated, m.allocated, m.predicted_reserved, m.reserved]
                for m in self.planner.measurements
            ],
        }
        Path(self.folder, f"{trainer.global_rank}.json").write_text(json.dumps(result))


def main(folder: str, settings: str, arguments: str) -> None:
    planner = mp.MemoryPlanner()
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", **json.loads(arguments)),
        max_steps=4,
        logger=TensorBoardLogger(folder, name="", version="logs"),
        callbacks=[planner, Writes(folder, planner)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **json.loads(settings),
    )
    trainer.fit(Classifier(mlp()), Data(torch.zeros(2048), 1000000))


if __name__ == "__main__":
    main(*sys.argv[1:])
