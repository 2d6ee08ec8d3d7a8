"""segmentation-models-pytorch: the module of its example, which checks its shapes and gathers its outputs."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.clients.job import job
from benchmarks.clients.styles.common import trainer


class Pets(Dataset[Any]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": torch.rand(3, 32, 32), "mask": torch.randint(0, 2, (1, 32, 32)).float()}


class PetModel(pl.LightningModule):
    def __init__(self, arch: str, encoder_name: str, in_channels: int, out_classes: int) -> None:
        super().__init__()
        import segmentation_models_pytorch as smp

        self.model = smp.create_model(arch, encoder_name, None, in_channels=in_channels, classes=out_classes)
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        self.loss_fn = smp.losses.DiceLoss(smp.losses.BINARY_MODE, from_logits=True)
        self.training_step_outputs: list[Any] = []

    def shared_step(self, batch: dict[str, torch.Tensor], stage: str) -> dict[str, torch.Tensor]:
        import segmentation_models_pytorch as smp

        image, mask = batch["image"], batch["mask"]
        assert image.ndim == 4
        height, width = image.shape[2:]
        assert height % 32 == 0
        assert width % 32 == 0
        logits = self.model(image - self.mean)
        loss = self.loss_fn(logits, mask)
        stats = smp.metrics.get_stats((logits.sigmoid() > 0.5).long(), mask.long(), mode="binary")
        return {"loss": loss, **dict(zip(("tp", "fp", "fn", "tn"), stats, strict=True))}

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> dict[str, torch.Tensor]:
        out = self.shared_step(batch, "train")
        self.training_step_outputs.append(out)
        return out

    def on_train_epoch_end(self) -> None:
        import segmentation_models_pytorch as smp

        joined = [torch.cat([x[name] for x in self.training_step_outputs]) for name in ("tp", "fp", "fn", "tn")]
        self.log("train_iou", smp.metrics.iou_score(*joined, reduction="micro"))
        self.training_step_outputs.clear()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-4)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=1e-5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step", "frequency": 1}}


@job(size=4, count=lambda batch: len(batch["image"]))
def smp_unet(callbacks: list[Any]) -> None:
    """Its U-Net, whose step keeps all outputs until the epoch's end."""
    trainer(callbacks).fit(PetModel("unet", "resnet18", 3, 1), DataLoader(Pets(), batch_size=4, shuffle=True))
