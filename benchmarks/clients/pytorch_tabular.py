"""PyTorch Tabular: configurations for everything, its own loop of preparing and training."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.clients.job import job


def samples(batch: Any) -> int:
    return len(batch["target"])


@job(size=8, count=samples)
def tabular_category_embedding(callbacks: list[Any]) -> None:
    """Embeddings of categories and a feed-forward network."""
    import pandas as pd
    from pytorch_tabular import TabularModel
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
    from pytorch_tabular.models import CategoryEmbeddingModelConfig

    random = np.random.default_rng(0)
    table = pd.DataFrame(
        {"x": random.random(80), "kind": random.choice(list("abc"), 80), "y": random.choice([0, 1], 80)}
    )
    model = TabularModel(
        data_config=DataConfig(target=["y"], continuous_cols=["x"], categorical_cols=["kind"], num_workers=0),
        model_config=CategoryEmbeddingModelConfig(task="classification", layers="16-16"),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            batch_size=8, max_epochs=2, accelerator="gpu", devices=1, progress_bar="none", early_stopping=None,
            checkpoints=None, load_best=False,
        ),
        verbose=False,
    )  # fmt: skip
    model.fit(train=table, validation=table.iloc[:16], callbacks=callbacks)
