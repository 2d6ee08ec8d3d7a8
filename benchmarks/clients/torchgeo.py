"""torchgeo: tasks on samples that are dictionaries, with datamodules that augment on the GPU after the transfer.

Tasks whose augmentations check values on the GPU (SimCLR, BYOL) do not train on the null GPU.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import Dataset

from benchmarks.clients.job import job


class Scenes(Dataset[Any]):
    """Random scenes of four channels, with masks and labels."""

    def __init__(self, length: int = 24, **_: Any) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        mask = torch.randint(0, 3, (32, 32))
        return {"image": torch.rand(4, 32, 32), "mask": mask, "label": torch.tensor(index % 3)}


def _data(**_: Any) -> Any:
    from torchgeo.datamodules import NonGeoDataModule

    class SceneData(NonGeoDataModule):
        mean, std = torch.tensor(0.5), torch.tensor(0.25)

        def setup(self, stage: str) -> None:
            self.train_dataset = self.dataset_class(24)
            self.val_dataset = self.dataset_class(8)

    return SceneData(Scenes, batch_size=4, num_workers=0)


def _trainer(callbacks: list[Any]) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "log_every_n_steps": 1, "logger": False}
    return pl.Trainer(accelerator="gpu", devices=1, max_epochs=2, callbacks=callbacks, **quiet)


def samples(batch: Any) -> int:
    return len(batch["image"])


@job(size=4, count=samples)
def torchgeo_segmentation(callbacks: list[Any]) -> None:
    """A U-Net on masks."""
    from torchgeo.trainers import SemanticSegmentationTask

    task = SemanticSegmentationTask("unet", "resnet18", weights=None, in_channels=4, num_classes=3)
    _trainer(callbacks).fit(task, datamodule=_data())


@job(size=4, count=samples)
def torchgeo_classification(callbacks: list[Any]) -> None:
    """A network of timm."""
    from torchgeo.trainers import ClassificationTask

    task = ClassificationTask("resnet18", weights=None, in_channels=4, num_classes=3)
    _trainer(callbacks).fit(task, datamodule=_data())
