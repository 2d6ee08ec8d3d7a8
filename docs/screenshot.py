"""The screenshot in docs/images: what a run looks like in TensorBoard, as Chromium shows it.

    tests/nullgpu/nullgpu python docs/screenshot.py [FILE.png]  # or python alone, where there is a GPU

Needs: pip install tensorboard matplotlib, and Chromium (apt install chromium).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader

import lightning_memplan as mp

HERE = Path(__file__).parent
WIDTH, HEIGHT = 1040, 700
STEPS = 60
QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


class Texts(pl.LightningDataModule):
    """Many short texts and few long ones, of 16 to 256 tokens, padded to the longest of their batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 8
        drawn = torch.rand(STEPS * 32, generator=torch.Generator().manual_seed(1))
        lengths = 8 * (2 / drawn.sqrt()).clamp(max=32).long()
        self.texts = [torch.zeros(int(n), dtype=torch.long) for n in lengths]

    def train_dataloader(self) -> DataLoader[Any]:
        pad = nn.utils.rnn.pad_sequence
        return DataLoader(self.texts, self.batch_size, collate_fn=lambda texts: pad(texts, batch_first=True))


class Encoder(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
        self.words, self.layers = nn.Embedding(8000, 512), nn.TransformerEncoder(layer, 6)
        self.out = nn.Linear(512, 2)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.out(self.layers(self.words(batch)).mean(1)).logsumexp(1).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def fit(folder: Path) -> None:
    planner = mp.MemoryPlanner("trace", samples="largest", max_batch_size=32)
    trainer = pl.Trainer(
        accelerator="gpu", devices=1, precision="16-mixed", max_steps=STEPS, callbacks=[planner],
        logger=TensorBoardLogger(folder, name="", version="encoder"), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Encoder(), datamodule=Texts())


def screenshot(folder: Path, file: Path) -> None:
    """TensorBoard's page of custom scalars over the logs in ``folder``, by a Chromium that asks nothing else."""
    env = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "LD_LIBRARY_PATH")}
    serve = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1", "--port", "0"]
    with (
        tempfile.TemporaryDirectory() as profile,
        subprocess.Popen(serve, stderr=subprocess.PIPE, text=True, env=env) as server,
    ):
        try:
            assert server.stderr is not None
            found = (re.search(r"http://127\.0\.0\.1:\d+/", line) for line in server.stderr)
            address = next(match[0] for match in found if match)
            page = f"{address}?darkMode=false#custom_scalars&_smoothingWeight=0"
            shown = [f"--window-size={WIDTH},{HEIGHT}", "--hide-scrollbars", "--virtual-time-budget=20000"]
            command = [chromium() or "chromium", *QUIET, f"--user-data-dir={profile}", *shown]
            subprocess.run(
                [*command, f"--screenshot={file}", page], check=True, capture_output=True, timeout=120, env=env
            )
        finally:
            server.terminate()


def chromium() -> str | None:
    """Where Chromium is, None where it is not installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def main(file: Path) -> None:
    if chromium() is None:
        sys.exit("Chromium is not here: apt install chromium")
    with tempfile.TemporaryDirectory() as folder:
        fit(Path(folder))
        screenshot(Path(folder), file)


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # batches vary in size
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "images" / "tensorboard.png")
