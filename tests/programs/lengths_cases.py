"""A curve over lengths, trained on the (null) GPU in one process: prints a JSON object (see test_api.py)."""

from __future__ import annotations

import gc
import json
import os
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_memplan as mp

LENGTHS = (256, 512, 1024)


class Attention(pl.LightningModule):
    """Attention that keeps its scores: length times length of them for each sample."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(1000, width), nn.Linear(width, 3 * width), nn.Linear(width, 10)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        q, k, v = self.qkv(self.embed(batch)).chunk(3, -1)
        return self.head((q @ k.transpose(1, 2)).softmax(-1) @ v).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def tokens(length: int, batch_size: int = 2) -> torch.Tensor:
    return torch.zeros(batch_size, length, dtype=torch.long)


def trained(batches: list[torch.Tensor]) -> int | None:
    """Peak bytes reserved in steps of these batches, None where memory runs out."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = pl.Trainer(accelerator="gpu", devices=1, max_epochs=1, enable_checkpointing=False, **quiet)
    try:
        trainer.fit(Attention(), DataLoader(batches, batch_size=None))
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_reserved()


def size_of(found: mp.Lengths, length: int) -> int:
    return next(row.batch_size for row in found.rows if row.length == length)


def main() -> None:
    warnings.simplefilter("ignore")
    card = mp.detect_devices()[0]
    whole = mp.plan_lengths(Attention(), tokens, LENGTHS, device=card, margin=0)
    curve = [
        {
            "predicted": row.peak,
            "reserved": trained([tokens(row.length, row.batch_size)] * 3),
            "with 5 % more": trained([tokens(row.length, -(-105 * row.batch_size // 100))] * 3),
        }
        for row in (whole.rows[0], whole.rows[-1])
    ]
    order = (256, 1024, 512, 1024, 256, 512)
    found = mp.plan_lengths(Attention(), tokens, LENGTHS, device=card)
    by_budget = trained([tokens(length, found.token_budget // length) for length in order])
    own = trained([tokens(length, size_of(found, length)) for length in order])
    gc.collect()
    torch.cuda.empty_cache()
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    found = mp.plan_lengths(Attention(), tokens, LENGTHS, device=card)
    growing = trained([tokens(length, size_of(found, length)) for length in order])
    shown = {"curve": curve, "by the budget": by_budget, "own sizes": own, "own sizes, growing segments": growing}
    print("SHOWN", json.dumps({**shown, "capacity": card.capacity}))


if __name__ == "__main__":
    main()
