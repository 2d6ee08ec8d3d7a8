"""Trainings on images: detection, segmentation, generation, contrast."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.robustness.job import ON_CPU, WIDTH, Bare, Training, job, loader
from benchmarks.robustness.jobs.language import Of

VISION = "vision, detection, generation"


@job(VISION)
def detection_lists() -> Any:
    class Detects(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.boxes = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            images, targets = batch
            losses = []
            for image, target in zip(images, targets, strict=True):
                predicted = self.boxes(self.stem(image[None]).mean((2, 3)))
                losses.append(F.smooth_l1_loss(predicted.expand_as(target["boxes"]), target["boxes"]))
            return torch.stack(losses).mean()

    def sample(n: int) -> Any:
        boxes = torch.ones(1 + n % 4, 4)
        return torch.ones(3, 16 + n, 20), {"boxes": boxes, "labels": torch.ones(len(boxes)).long(), "id": n}

    data = loader(Of(sample), collate_fn=lambda samples: tuple(zip(*samples, strict=True)))
    return Training(Detects(), data, count=lambda batch: len(batch[0]))


@job(VISION)
def torchvision_detector() -> Any:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    class Detects(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            images, targets = batch
            return sum(self.model(list(images), list(targets)).values())

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.log("images", float(len(batch[0])))

    def sample(n: int) -> Any:
        return torch.ones(3, 64, 64), {"boxes": torch.tensor([[1.0, 1.0, 9.0, 9.0]]), "labels": torch.ones(1).long()}

    data = loader(Of(sample, 8), 2, collate_fn=lambda samples: tuple(zip(*samples, strict=True)))
    return Training(Detects(), data, **ON_CPU, count=lambda batch: len(batch[0]))


@job(VISION)
def segmentation_with_deep_supervision() -> Any:
    class Segments(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(1, 4, 3, 2, 1), nn.ConvTranspose2d(4, 2, 2, 2)
            self.side = nn.Conv2d(4, 2, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            hidden = F.leaky_relu(self.down(batch["image"]))
            small = F.interpolate(batch["mask"][:, None].float(), scale_factor=0.5).long()[:, 0]
            pairs = [(self.up(hidden), batch["mask"]), (self.side(hidden), small)]
            dice = sum(1 - 2 * (p.softmax(1)[:, 1] * m).sum() / (p.numel() + 1) for p, m in pairs)
            return dice + sum(F.cross_entropy(p, m) for p, m in pairs)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.01, 0.99, nesterov=True)
            schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, self.trainer.max_epochs, 0.9)
            return [optimizer], [schedule]

    data = loader(
        Of(lambda n: {"image": torch.ones(1, 16, 16), "mask": torch.ones(16, 16).long(), "keys": f"case_{n}"})
    )
    return Training(Segments(), data, count=lambda batch: len(batch["image"]))


@job(VISION)
def variational_autoencoder() -> Any:
    class Variational(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(WIDTH, 8), nn.Linear(4, WIDTH)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            mean, log_var = self.encode(batch).chunk(2, 1)
            code = mean + torch.randn_like(mean) * (log_var / 2).exp()
            divergence = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(1).mean()
            weight = min(1.0, self.global_step / 10)
            return F.mse_loss(self.decode(code), batch) + weight * divergence

    return Training(Variational(), loader())


@job(VISION)
def diffusion_with_an_average() -> Any:
    class Diffusion(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.time, self.net = nn.Embedding(100, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.register_buffer("alphas", torch.linspace(0.99, 0.01, 100))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            t = torch.randint(0, 100, (len(batch),), device=self.device)
            noise, alpha = torch.randn_like(batch), self.alphas[t][:, None]
            return F.mse_loss(self.net(alpha.sqrt() * batch + (1 - alpha).sqrt() * noise + self.time(t)), noise)

        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step % 5 == 0:
                with torch.no_grad():
                    self.net(torch.randn(2, WIDTH, device=self.device))

    return Training(Diffusion(), loader())


@job(VISION)
def masked_autoencoder() -> Any:
    class Masks(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            patches = batch.view(len(batch), 4, 4)
            keep = torch.rand(len(batch), 4, device=batch.device).argsort(1)[:, :2]
            visible = patches.gather(1, keep[..., None].expand(-1, -1, 4))
            return self(torch.cat([visible, visible], 1).flatten(1)).mean()

    return Training(Masks(), loader())


@job(VISION)
def contrastive_views() -> Any:
    class Contrast(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            (a, b, *small), _, _ = batch
            z = F.normalize(torch.cat([self(a), self(b)]), dim=1)
            logits = (z @ z.T / 0.1).fill_diagonal_(-1e9)
            labels = torch.arange(len(z), device=z.device).roll(len(a))
            return F.cross_entropy(logits, labels) + sum(self(s).mean() for s in small)

    row = torch.ones(WIDTH)
    data = loader(Of(lambda n: ([row] * 4, n, f"{n}.png")), drop_last=True)
    return Training(Contrast(), data, count=lambda batch: len(batch[0][0]))


@job(VISION)
def mixup_with_numpy() -> Any:
    class Mixes(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            ratio = np.random.beta(1.0, 1.0)
            other = torch.from_numpy(np.random.permutation(len(x))).to(x.device)
            logits = self(ratio * x + (1 - ratio) * x[other])
            return ratio * F.cross_entropy(logits, y) + (1 - ratio) * F.cross_entropy(logits, y[other])

    return Training(Mixes(), loader(Of(lambda n: (torch.ones(WIDTH), n % 3))), count=lambda batch: len(batch[0]))


@job(VISION)
def images_of_several_sizes() -> Any:
    """Multi-scale training: the side changes every other step."""

    class Scales(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, WIDTH, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            side = (16, 24)[batch_idx // 2 % 2]
            return self(self.conv(F.interpolate(batch, size=(side, side))).mean((2, 3))).mean()

    return Training(Scales(), loader(Of(lambda n: torch.ones(3, 20, 20))))
