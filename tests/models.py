"""Networks, and data for them, that several tests share."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Same(Dataset[tuple[torch.Tensor, int]]):
    """One sample, as often as is asked for."""

    def __init__(self, sample: torch.Tensor, length: int) -> None:
        self.sample, self.length = sample, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.sample, 0


class Data(pl.LightningDataModule):
    def __init__(self, sample: torch.Tensor, length: int, batch_size: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters("batch_size")
        self.batch_size = batch_size
        self.dataset = Same(sample, length)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=self.batch_size, shuffle=True, drop_last=True)


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(2048, 4096), nn.ReLU(), nn.Dropout(0.1), nn.Linear(4096, 4096), nn.Linear(4096, 10))


class Pooled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


def transformer() -> nn.Module:
    """Six blocks of 3,152,384 parameters each, for sequences of 128 with 32 features."""
    blocks = [nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True) for _ in range(6)]
    return nn.Sequential(nn.Linear(32, 512), *blocks, Pooled(), nn.Linear(512, 10))
