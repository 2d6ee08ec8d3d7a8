"""How many brain scans fit on a GPU at once? Plan it for a card that is not here, or train on the one that is.

    python examples/brain_mri.py --gpu "RTX 3090"                    # plans, trains nothing
    python examples/brain_mri.py --gpu "RTX 3090" --precision bf16-mixed --crop 128
    python examples/brain_mri.py --max-steps 10                      # on a machine with CUDA: plans, trains, compares

The network is of the kind in the lecture note "Parameters and Memory Consumptions of CNNs": its first layer turns one
channel into 30 with a kernel of 3 x 3 x 3, and its output of 191 x 227 x 191 alone takes 994 MB a scan. The scan is the
one that comes with nibabel, resampled to 193 x 229 x 193 voxels. Training tells along which axis it was mirrored.

Needs: pip install "lightning-memplan[examples]"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nibabel
import numpy as np
import pytorch_lightning as pl
import torch
from nibabel.nifti1 import Nifti1Image
from scipy.ndimage import zoom
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import lightning_memplan as mp

SCAN = Path(nibabel.__file__).parent / "tests/data/anatomical.nii"  # comes with nibabel
SIZE = (193, 229, 193)
GiB = 2**30


class MirroredScans(Dataset[tuple[Tensor, Tensor]]):
    """One scan, mirrored along no axis (0) or one of three (1, 2, 3), and cut out at random where ``crop`` is given."""

    def __init__(self, crop: int | None, length: int = 1024) -> None:
        scan = Nifti1Image.from_filename(SCAN).get_fdata(dtype=np.float32)
        resampled = zoom(scan, [new / old for new, old in zip(SIZE, scan.shape, strict=True)], order=1)
        self.scan = torch.from_numpy((resampled - resampled.mean()) / resampled.std())
        self.size = [min(crop, n) if crop else n for n in SIZE]
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(index)
        scan = self.scan
        for axis, (whole, part) in enumerate(zip(SIZE, self.size, strict=True)):
            start = int(torch.randint(whole - part + 1, (), generator=random))
            scan = scan.narrow(axis, start, part)
        label = torch.randint(4, (), generator=random)
        return (scan.flip(int(label) - 1) if label else scan.clone()).unsqueeze(0), label


class Scans(pl.LightningDataModule):
    def __init__(self, crop: int | None = None, batch_size: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size  # the planner writes the largest that fits here

    def setup(self, stage: str) -> None:
        self.scans = MirroredScans(self.hparams["crop"])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self.scans, batch_size=self.batch_size, shuffle=True)


class BrainNet(pl.LightningModule):
    """Five 3 x 3 x 3 convolutions of 30 to 350 channels: 3.3 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv3d(1, 30, 3), nn.ReLU(inplace=True), nn.MaxPool3d(2)),
            *(nn.Conv3d(30, 60, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool3d(2)),
            *(nn.Conv3d(60, 120, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool3d(2)),
            *(nn.Conv3d(120, 240, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool3d(2)),
            *(nn.Conv3d(240, 350, 3, padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool3d(1)),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(350, 4))

    def forward(self, scans: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(scans))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        scans, labels = batch
        loss = cross_entropy(self(scans), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def show(plan: mp.Plan, model: BrainNet, data: Scans, precision: str) -> None:
    """The plan, and what the formula says of each layer."""
    estimate = mp.estimate(model, data, precision=precision, method="formula")
    print(mp.plan_table(plan))
    print()
    formula = estimate.formula
    print(mp.layers_table(formula.layers, input_bytes=formula.input_bytes, batch_size=plan.batch_size, top=10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", metavar="NAME", help="plan for this card, such as 'RTX 3090', and train nothing")
    parser.add_argument("--crop", type=int, metavar="N", help="cubes of N voxels a side instead of the whole scan")
    parser.add_argument("--precision", default="16-mixed", help="as Lightning's Trainer takes it (default: 16-mixed)")
    parser.add_argument("--max-steps", type=int, default=5, help="training steps (default: 5)")
    args = parser.parse_args()
    pl.seed_everything(0)
    model = BrainNet()

    if args.gpu:
        data = Scans(args.crop)
        plan = mp.plan(model, data, device=mp.gpu(args.gpu), precision=args.precision)
        show(plan, model, data, args.precision)
    elif torch.cuda.is_available():
        data, planner = Scans(args.crop), mp.MemoryPlanner()
        trainer = pl.Trainer(
            accelerator="gpu",
            devices=1,
            precision=args.precision,
            max_steps=args.max_steps,
            callbacks=[planner],
            logger=False,
            enable_checkpointing=False,
        )
        trainer.fit(model, datamodule=data)
        for step in planner.measurements:
            print(
                f"step {step.step}: predicted {step.predicted_allocated / GiB:.3f} GiB allocated, "
                f"measured {step.allocated / GiB:.3f} GiB ({step.error_percent:+.1f} %)"
            )
    else:
        print("There is no CUDA device here. Name a card with --gpu to plan for it, such as --gpu 'RTX 3090'.")
        print("Until then: how many small cubes would fit into 4 GiB of this machine's own memory?")
        data = Scans(args.crop or 48)
        plan = mp.plan(model, data, device=mp.Device("this machine", total=4 * GiB, kind="cpu"), precision="32-true")
        show(plan, model, data, "32-true")


if __name__ == "__main__":
    main()
