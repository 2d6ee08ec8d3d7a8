"""3D segmentation: MONAI's U-Net, trained on crops and validated on whole volumes by a sliding window.

    python examples/segmentation_3d.py --gpu "RTX 3090"     # plans training, trains nothing
    python examples/segmentation_3d.py                      # on a machine with CUDA: plans, trains, validates, compares

Training's batch size and validation's are two: what one leaves in the allocator's cache, the other must find room
beside. The volumes are bright balls in noise (nothing to download).

Needs: pip install "lightning-memplan[examples]" monai
"""

from __future__ import annotations

import argparse

import pytorch_lightning as pl
import torch
from monai.inferers.utils import sliding_window_inference
from monai.losses.dice import DiceCELoss
from monai.networks.nets.unet import UNet
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import lightning_memplan as mp

GiB = 2**30


class Balls(Dataset[tuple[Tensor, Tensor]]):
    """Cubes of ``side`` voxels a side, with a ball in each, and where it is."""

    def __init__(self, length: int, side: int) -> None:
        self.length, self.side = length, side

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(index)
        center, axis = torch.rand(3, generator=random) * self.side, torch.arange(self.side)
        z, y, x = (axis - c for c in center)
        ball = (z[:, None, None] ** 2 + y[:, None] ** 2 + x**2).sqrt() < self.side / 5
        noise = torch.randn(1, self.side, self.side, self.side, generator=random)
        return noise + ball, ball.long().unsqueeze(0)


class Volumes(pl.LightningDataModule):
    def __init__(self, crop: int, volume: int, crops: int) -> None:
        super().__init__()
        self.batch_size, self.val_batch_size = 2, 1  # the planner writes the largest that fit here
        self.train, self.val = Balls(crops, crop), Balls(4, volume)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self.val, batch_size=self.val_batch_size)


class Segmenter(pl.LightningModule):
    def __init__(self, crop: int, channels: tuple[int, ...] = (32, 64, 128, 256)) -> None:
        super().__init__()
        self.network = UNet(3, 1, 2, channels, strides=(2,) * (len(channels) - 1), num_res_units=2)
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True)
        self.crop = (crop,) * 3

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        scans, labels = batch
        loss: Tensor = self.loss(self.network(scans), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        scans, labels = batch
        logits = sliding_window_inference(scans, self.crop, 4, self.network, overlap=0.25, mode="gaussian")
        self.log("val_loss", self.loss(logits, labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", metavar="NAME", help="plan for this card, such as 'RTX 3090', and train nothing")
    parser.add_argument("--crop", type=int, default=96, metavar="N", help="crops of N voxels a side (default: 96)")
    parser.add_argument("--volume", type=int, default=256, metavar="N", help="whole volumes likewise (default: 256)")
    parser.add_argument("--crops", type=int, default=256, help="crops to train on (default: 256)")
    args = parser.parse_args()
    pl.seed_everything(0)
    model, data = Segmenter(args.crop), Volumes(args.crop, args.volume, args.crops)
    if args.gpu:
        print(mp.plan_table(mp.plan(model, data, device=args.gpu, precision="16-mixed")))
        return
    if not torch.cuda.is_available():
        print("There is no CUDA device here. Name a card with --gpu to plan for it, such as --gpu 'RTX 3090'.")
        return
    planner = mp.MemoryPlanner(
        batch_arg_name={"val": "val_batch_size"}, max_batch_size=args.crops // 4
    )  # 4 steps an epoch
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        precision="16-mixed",
        max_steps=4,
        callbacks=[planner],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, datamodule=data)
    training, both = planner.plan, planner.val_plan
    assert training is not None
    assert both is not None
    steps = max(step.allocated for step in planner.measurements)
    whole = max(steps, *(peaks.allocated for peaks in planner.validations))
    larger = "validation" if both.peak_allocated > training.peak_allocated else "training"
    print(f"batches of {training.batch_size} crops, and of {both.batch_size} whole volumes in validation")
    print(f"training: predicted {training.peak_allocated / GiB:.3f} GiB allocated, measured {steps / GiB:.3f} GiB")
    print(f"both: predicted {both.peak_allocated / GiB:.3f} GiB, measured {whole / GiB:.3f} GiB, in {larger}")


if __name__ == "__main__":
    main()
