"""A quiet Trainer on the GPU for all styles."""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl


def trainer(callbacks: list[Any], **settings: Any) -> pl.Trainer:
    """Return a Trainer of two epochs that writes nothing."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults = {"accelerator": "gpu", "devices": 1, "max_epochs": 2, "enable_model_summary": False, **quiet}
    return pl.Trainer(**{**defaults, "callbacks": callbacks, **settings})
