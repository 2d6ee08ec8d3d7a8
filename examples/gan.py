"""A GAN with manual optimization: two networks and two optimizers in turn, in one training step.

    python examples/gan.py --gpu "RTX 3090"     # plans, trains nothing
    python examples/gan.py                      # on a machine with CUDA: plans, trains, compares

The step is traced as it is written, so the plan has the largest of its parts. The images are noise (nothing to
download).

Needs: pip install lightning-memplan
"""

from __future__ import annotations

import argparse

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, Dataset

import lightning_memplan as mp

GiB = 2**30
NOISE = 128


class Images(Dataset[Tensor]):
    def __init__(self, length: int, size: int) -> None:
        self.length, self.size = length, size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(3, self.size, self.size, generator=torch.Generator().manual_seed(index))


def generator(size: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(NOISE, 16 * 4 * width), nn.Unflatten(1, (4 * width, 4, 4))]
    while size > 8:
        layers += [
            nn.Upsample(scale_factor=2),
            nn.Conv2d(4 * width, 4 * width, 3, padding=1),
            nn.BatchNorm2d(4 * width),
        ]
        layers += [nn.ReLU(inplace=True)]
        size //= 2
    return nn.Sequential(*layers, nn.ConvTranspose2d(4 * width, 3, 4, 2, 1), nn.Tanh())


def discriminator(width: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(2 * width, 4 * width, 4, 2, 1), nn.LeakyReLU(0.2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 1)),
    )


class Gan(pl.LightningModule):
    def __init__(self, size: int, width: int, images: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = generator(size, width), discriminator(width)
        self.images = Images(images, size)
        self.batch_size = 2  # the planner writes the largest that fits here

    def training_step(self, images: Tensor, batch_idx: int) -> None:
        of_generator, of_discriminator = self.optimizers()
        noise = torch.randn(len(images), NOISE, device=self.device)

        self.toggle_optimizer(of_generator)
        fooled = softplus(-self.discriminator(self.generator(noise))).mean()
        of_generator.zero_grad()
        self.manual_backward(fooled)
        of_generator.step()
        self.untoggle_optimizer(of_generator)

        self.toggle_optimizer(of_discriminator)
        fake = self.generator(noise).detach()
        told = softplus(-self.discriminator(images)).mean() + softplus(self.discriminator(fake)).mean()
        of_discriminator.zero_grad()
        self.manual_backward(told)
        of_discriminator.step()
        self.untoggle_optimizer(of_discriminator)
        self.log_dict({"generator": fooled, "discriminator": told}, prog_bar=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        parts = (self.generator, self.discriminator)
        return [torch.optim.Adam(part.parameters(), lr=2e-4, betas=(0.5, 0.999)) for part in parts]

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.images, batch_size=self.batch_size, shuffle=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", metavar="NAME", help="plan for this card, such as 'RTX 3090', and train nothing")
    parser.add_argument("--size", type=int, default=64, help="of the images, a power of two (default: 64)")
    parser.add_argument("--width", type=int, default=64, help="channels of the first layer (default: 64)")
    parser.add_argument("--images", type=int, default=50_000, help="to train on (default: 50000)")
    args = parser.parse_args()
    pl.seed_everything(0)
    model = Gan(args.size, args.width, args.images)
    if args.gpu:
        print(mp.plan_table(mp.plan(model, model.train_dataloader(), device=args.gpu, precision="32-true")))
        return
    if not torch.cuda.is_available():
        print("There is no CUDA device here. Name a card with --gpu to plan for it, such as --gpu 'RTX 3090'.")
        return
    planner = mp.MemoryPlanner()
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        max_epochs=1,
        limit_train_batches=4,
        callbacks=[planner],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(model)
    for step in planner.measurements:
        print(
            f"step {step.step}: predicted {step.predicted_allocated / GiB:.3f} GiB allocated, "
            f"measured {step.allocated / GiB:.3f} GiB ({step.error_percent:+.1f} %)"
        )


if __name__ == "__main__":
    main()
