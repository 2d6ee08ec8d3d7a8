"""A quiet Trainer on the GPU for all styles."""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl


def trainer(callbacks: list[Any], module: Any = pl, **settings: Any) -> Any:
    """Return a Trainer of two epochs that writes nothing; of ``lightning.pytorch`` if that is the module."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults = {"accelerator": "gpu", "devices": 1, "max_epochs": 2, "enable_model_summary": False, **quiet}
    return module.Trainer(**{**defaults, "callbacks": callbacks, **settings})
