"""The largest batch of images for ResNet-50: planned for a card that is not here, or trained on the one that is.

    python examples/image_classifier.py --gpu "A100 40GB"            # plans, trains nothing
    python examples/image_classifier.py --gpu "RTX 3090" --crop 160 --precision bf16-mixed
    python examples/image_classifier.py --max-steps 20               # on a machine with CUDA: plans, trains, compares

The images are scikit-learn's 1,797 handwritten digits (nothing to download), scaled up to what ResNet-50 takes.

Needs: pip install "lightning-memplan[examples]"
"""

from __future__ import annotations

import argparse

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet50

import lightning_memplan as mp

GiB = 2**30


class DigitImages(Dataset[tuple[Tensor, Tensor]]):
    """Digits as RGB images of ``size`` x ``size`` pixels."""

    def __init__(self, size: int) -> None:
        digits = load_digits()
        self.images = torch.from_numpy(digits.images).float().div(16)
        self.labels = torch.from_numpy(digits.target)
        self.size = size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = interpolate(self.images[index][None, None], size=self.size, mode="bilinear")
        return image[0].repeat(3, 1, 1), self.labels[index]


class Digits(pl.LightningDataModule):
    def __init__(self, size: int = 224, batch_size: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size  # the planner writes the largest that fits here

    def setup(self, stage: str) -> None:
        self.images = DigitImages(self.hparams["size"])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self.images, batch_size=self.batch_size, shuffle=True)


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = resnet50(num_classes=10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def show(plan: mp.Plan, model: Classifier, data: Digits, precision: str) -> None:
    """The plan, and what the formula says of each layer."""
    estimate = mp.estimate(model, data, precision=precision, method="formula")
    print(mp.plan_table(plan))
    print()
    formula = estimate.formula
    print(mp.layers_table(formula.layers, input_bytes=formula.input_bytes, batch_size=plan.batch_size, top=10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", metavar="NAME", help="plan for this card, such as 'RTX 3090', and train nothing")
    parser.add_argument("--crop", type=int, metavar="N", help="images of N x N pixels (default: 224)")
    parser.add_argument("--precision", default="16-mixed", help="as Lightning's Trainer takes it (default: 16-mixed)")
    parser.add_argument("--max-steps", type=int, default=5, help="training steps (default: 5)")
    args = parser.parse_args()
    pl.seed_everything(0)
    model = Classifier()

    if args.gpu:
        data = Digits(args.crop or 224)
        plan = mp.plan(model, data, device=mp.gpu(args.gpu), precision=args.precision)
        show(plan, model, data, args.precision)
    elif torch.cuda.is_available():
        data, planner = Digits(args.crop or 224), mp.MemoryPlanner()
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
        print("Until then: how many small images would fit into 4 GiB of this machine's own memory?")
        data = Digits(args.crop or 64)
        plan = mp.plan(model, data, device=mp.Device("this machine", total=4 * GiB, kind="cpu"), precision="32-true")
        show(plan, model, data, "32-true")


if __name__ == "__main__":
    main()
