"""Segmentation, generation and contrastive learning, as their code bases write them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.clients.job import job
from benchmarks.clients.styles.common import trainer


class Pictures(Dataset[Any]):
    """Random pictures, each with what a task wants of it."""

    def __init__(self, length: int, channels: int = 3, side: int = 32, dims: int = 2) -> None:
        self.length, self.shape = length, (channels, *(side,) * dims)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(self.shape, generator=torch.Generator().manual_seed(index))


# ---------------------------------------------------------------------------- segmentation with deep supervision
class PolynomialLR(torch.optim.lr_scheduler.LRScheduler):
    """Set the rate of an epoch that the training loop names."""

    def __init__(self, optimizer: Any, initial: float, epochs: int) -> None:
        self.initial, self.epochs, self.ctr = initial, epochs, 0
        super().__init__(optimizer, -1)

    def step(self, epoch: int | None = None) -> None:
        epoch = self.ctr if epoch is None or epoch == -1 else epoch
        self.ctr += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.initial * (1 - epoch / self.epochs) ** 0.9


class DeepSupervision(nn.Module):
    def __init__(self, loss: nn.Module, weights: list[float]) -> None:
        super().__init__()
        self.loss, self.weights = loss, weights

    def forward(self, outputs: list[torch.Tensor], targets: list[torch.Tensor]) -> torch.Tensor:
        assert len(outputs) == len(targets)
        return sum(w * self.loss(o, t) for w, o, t in zip(self.weights, outputs, targets, strict=True) if w != 0)


class DiceAndCrossEntropy(nn.Module):
    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        probabilities = torch.softmax(logits, 1)
        with torch.no_grad():
            onehot = torch.zeros(logits.shape, device=logits.device, dtype=torch.bool).scatter_(1, target.long(), 1)
        axes = list(range(2, logits.dim()))
        intersect = (probabilities * onehot).sum(axes)
        dice = (2 * intersect + 1e-5) / torch.clip(onehot.sum(axes) + probabilities.sum(axes) + 1e-5, 1e-8)
        return F.cross_entropy(logits, target[:, 0].long()) - dice[:, 1:].mean()


class PlainUNet(nn.Module):
    def __init__(self, channels: int, classes: int, features: tuple[int, ...] = (8, 16, 32)) -> None:
        super().__init__()
        self.down, self.up, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.deep_supervision = True
        for index, width in enumerate(features):
            stride = 1 if index == 0 else 2
            self.down.append(self.block(channels, width, stride))
            channels = width
        for width in features[-2::-1]:
            self.up.append(nn.ModuleList([nn.ConvTranspose3d(channels, width, 2, 2), self.block(2 * width, width, 1)]))
            self.heads.append(nn.Conv3d(width, classes, 1))
            channels = width

    @staticmethod
    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv3d(inputs, outputs, 3, stride, 1), nn.InstanceNorm3d(outputs, affine=True), nn.LeakyReLU(0.01, True)
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        skips, outputs = [], []
        for stage in self.down:
            x = stage(x)
            skips.append(x)
        for (up, block), head, skip in zip(self.up, self.heads, skips[-2::-1], strict=True):
            x = block(torch.cat((up(x), skip), 1))
            outputs.append(head(x))
        return outputs[::-1] if self.deep_supervision else outputs[-1:]


class Segmenter(pl.LightningModule):
    """The network is made of its plans in ``configure_model``; logs its rate by the optimizer; validates by Dice."""

    def __init__(self, plans: dict[str, Any], epochs: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.plans, self.batch_size, self.initial_lr = plans, plans["batch_size"], 1e-2
        self.loss = DeepSupervision(DiceAndCrossEntropy(), [2 / 3, 1 / 3])
        self.network: nn.Module | None = None
        self.outputs: list[dict[str, torch.Tensor]] = []

    def configure_model(self) -> None:
        if self.network is None:
            self.network = PlainUNet(self.plans["channels"], self.plans["classes"])

    def on_train_epoch_start(self) -> None:
        self.lr_schedulers().step(self.current_epoch)
        self.log("lr", self.optimizers().param_groups[0]["lr"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        data, target = batch["data"], batch["target"]
        output = self.network(data)
        loss = self.loss(output, target)
        self.log("train_loss", loss, on_epoch=True, batch_size=self.batch_size)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        output = self.network(batch["data"])[0].argmax(1, keepdim=True)
        hits = ((output == batch["target"][0]) & (output > 0)).sum()
        self.outputs.append({"tp": hits.detach().cpu()})

    def on_validation_epoch_end(self) -> None:
        self.log("dice", torch.stack([each["tp"] for each in self.outputs]).float().sum())
        self.outputs.clear()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            self.network.parameters(), self.initial_lr, weight_decay=3e-5, momentum=0.99, nesterov=True
        )
        return [optimizer], [{"scheduler": PolynomialLR(optimizer, self.initial_lr, self.hparams.epochs)}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """The epoch's start steps."""


PLANS = {"batch_size": 2, "channels": 1, "classes": 3, "patch_size": (16, 16, 16)}


class Cases(Dataset[Any]):
    """Volumes, of which each sample is a random patch with its downsampled labels."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        volume = torch.rand(1, 24, 24, 24)
        z, y, x = (int(torch.randint(0, 8, ())) for _ in range(3))
        data = volume[:, z : z + 16, y : y + 16, x : x + 16]
        target = (data > 0.5).to(torch.int16)
        return {"data": data, "target": [target, target[:, ::2, ::2, ::2]], "keys": f"case_{index:03d}"}


@job(size=2)
def patches(callbacks: list[Any]) -> None:
    """Patches of volumes, drawn with replacement."""
    cases = Cases(8)
    loader = DataLoader(cases, 2, sampler=RandomSampler(cases, replacement=True, num_samples=40), drop_last=True)
    trainer(callbacks, gradient_clip_val=12).fit(Segmenter(PLANS), loader, DataLoader(cases, 2))


class Augmenter:
    """An endless iterator of batches, which is no DataLoader and finishes its batches in threads of its own."""

    def __init__(self, cases: Cases, batch_size: int) -> None:
        self.cases, self.batch_size = cases, batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            samples = [self.cases[int(torch.randint(0, len(self.cases), ()))] for _ in range(self.batch_size)]
            targets = zip(*(sample["target"] for sample in samples), strict=True)
            yield {
                "data": torch.stack([sample["data"] for sample in samples]),
                "target": [torch.stack(each) for each in targets],
                "keys": [sample["keys"] for sample in samples],
            }


@job(size=2, keeps="Augmenter")
def augmenter(callbacks: list[Any]) -> None:
    """An iterable of finished batches with a batch size of its own."""
    settings = {"limit_train_batches": 3, "limit_val_batches": 1}
    loaders = Augmenter(Cases(8), 2), Augmenter(Cases(8), 2)
    trainer(callbacks, **settings).fit(Segmenter(PLANS), *loaders)


# ------------------------------------------------------------------------------------------ adversarial, by hand
class Adversaries(pl.LightningModule):
    """Two optimizers by hand, a fixed noise as example, toggled, with a moving average of the generator."""

    def __init__(self, latent_dim: int = 32, betas: tuple[float, float] = (0.5, 0.999)) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(latent_dim, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 3072))
        self.discriminator = nn.Sequential(nn.Flatten(), nn.Linear(3072, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        self.validation_z = torch.randn(8, latent_dim)
        self.example_input_array = torch.zeros(2, latent_dim)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.generator(z).view(-1, 3, 32, 32)

    def training_step(self, batch: torch.Tensor) -> None:
        optimizer_g, optimizer_d = self.optimizers()
        z = torch.randn(batch.shape[0], self.hparams.latent_dim).type_as(batch)
        valid = torch.ones(batch.size(0), 1).type_as(batch)

        self.toggle_optimizer(optimizer_g)
        self.generated = self(z)
        g_loss = F.binary_cross_entropy_with_logits(self.discriminator(self.generated), valid)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        optimizer_g.step()
        optimizer_g.zero_grad()
        self.untoggle_optimizer(optimizer_g)

        self.toggle_optimizer(optimizer_d)
        real = F.binary_cross_entropy_with_logits(self.discriminator(batch), valid)
        fake = F.binary_cross_entropy_with_logits(self.discriminator(self(z).detach()), torch.zeros_like(valid))
        d_loss = (real + fake) / 2
        self.log("d_loss", d_loss, prog_bar=True)
        self.manual_backward(d_loss)
        self.clip_gradients(optimizer_d, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        optimizer_d.step()
        optimizer_d.zero_grad()
        self.untoggle_optimizer(optimizer_d)
        with torch.no_grad():
            for slow, fast in zip(self.average.parameters(), self.generator.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
        if self.trainer.is_last_batch and (self.trainer.current_epoch + 1) % 1 == 0:
            for scheduler in self.lr_schedulers():
                scheduler.step()

    def on_train_epoch_end(self) -> None:
        self(self.validation_z.type_as(self.generator[0].weight))

    def configure_optimizers(self) -> Any:
        g = torch.optim.Adam(self.generator.parameters(), lr=2e-4, betas=self.hparams.betas)
        d = torch.optim.Adam(self.discriminator.parameters(), lr=2e-4, betas=self.hparams.betas)
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.99) for each in (g, d)]
        return [g, d], schedulers


@job(size=4)
def adversaries(callbacks: list[Any]) -> None:
    """A GAN by manual optimization."""
    trainer(callbacks).fit(Adversaries(), DataLoader(Pictures(48), 4, shuffle=True))


# ------------------------------------------------------------------------------------- contrastive, with a queue
class MomentumContrast(pl.LightningModule):
    """A queue of keys, which must be a multiple of the batch size, and a momentum encoder."""

    def __init__(self, dim: int = 16, num_negatives: int = 96, m: float = 0.999, temperature: float = 0.07) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder_q, self.encoder_k = self.encoder(dim), self.encoder(dim)
        for q, k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
            k.data.copy_(q.data)
            k.requires_grad = False
        self.register_buffer("queue", F.normalize(torch.randn(dim, num_negatives), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @staticmethod
    def encoder(dim: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 15 * 15, dim)
        )

    @torch.no_grad()
    def dequeue_and_enqueue(self, keys: torch.Tensor) -> None:
        pointer = int(self.queue_ptr)
        assert self.hparams.num_negatives % keys.shape[0] == 0, "the queue is a multiple of the batch size"
        self.queue[:, pointer : pointer + keys.shape[0]] = keys.T
        self.queue_ptr[0] = (pointer + keys.shape[0]) % self.hparams.num_negatives

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        query, key = batch
        q = F.normalize(self.encoder_q(query), dim=1)
        with torch.no_grad():
            for param_q, param_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
                param_k.data = param_k.data * self.hparams.m + param_q.data * (1.0 - self.hparams.m)
            order = torch.randperm(len(key), device=key.device)
            k = F.normalize(self.encoder_k(key[order]), dim=1)[torch.argsort(order)]
        positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
        negative = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
        logits = torch.cat((positive, negative), 1) / self.hparams.temperature
        loss = F.cross_entropy(logits, torch.zeros(logits.shape[0], dtype=torch.long, device=self.device))
        self.dequeue_and_enqueue(k)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.encoder_q.parameters(), lr=0.03, momentum=0.9)


class Views(Pictures):
    def __getitem__(self, index: int) -> Any:
        picture = super().__getitem__(index)
        return picture, picture.flip(-1)


@job(size=4)
def contrast(callbacks: list[Any]) -> None:
    """MoCo: the step refuses a batch size that does not divide its queue."""
    trainer(callbacks).fit(MomentumContrast(), DataLoader(Views(96), 4, shuffle=True, drop_last=True))


# ------------------------------------------------------------------------------ diffusion, with a moving average
class MovingAverage(nn.Module):
    """A moving average of a model, kept as buffers whose names have no dots."""

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        super().__init__()
        self.names = {}
        self.register_buffer("decay", torch.tensor(decay))
        self.register_buffer("num_updates", torch.tensor(0, dtype=torch.int))
        for name, parameter in model.named_parameters():
            self.names[name] = name.replace(".", "")
            self.register_buffer(self.names[name], parameter.clone().detach().data)

    def forward(self, model: nn.Module) -> None:
        self.num_updates += 1
        decay = torch.minimum(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        with torch.no_grad():
            shadow = dict(self.named_buffers())
            for name, parameter in model.named_parameters():
                kept = shadow[self.names[name]]
                kept.sub_((1.0 - decay) * (kept - parameter))


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 16))
        self.first, self.last = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 3, 3, 1, 1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        angles = t[:, None].float() * torch.exp(-torch.arange(16, device=t.device) / 4)[None]
        h = F.silu(self.first(x) + self.time(torch.cat((angles.sin(), angles.cos()), 1))[:, :, None, None])
        tokens = F.avg_pool2d(h, 4).flatten(2).transpose(1, 2)
        tokens = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        grid = tokens.transpose(1, 2).reshape(len(x), 16, x.shape[2] // 4, x.shape[3] // 4)
        return self.last(h + F.interpolate(grid, scale_factor=4))


class Diffusion(pl.LightningModule):
    """Latents by a frozen encoder, a schedule in buffers, weights averaged after each step and swapped to validate."""

    def __init__(self, timesteps: int = 100) -> None:
        super().__init__()
        self.model, self.num_timesteps = Denoiser(), timesteps
        self.model_ema = MovingAverage(self.model)
        self.first_stage_model = nn.Conv2d(3, 3, 1).eval().requires_grad_(False)
        betas = torch.linspace(1e-4, 2e-2, timesteps)
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - betas, 0))
        self.learning_rate, self.use_ema, self.stored = 1e-4, True, []

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.first_stage_model.eval()
        return self

    def shared_step(self, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with torch.no_grad():
            x = self.first_stage_model(batch)
        t = torch.randint(0, self.num_timesteps, (x.shape[0],), device=self.device).long()
        noise = torch.randn_like(x)
        a = self.alphas_cumprod.gather(0, t).reshape(-1, 1, 1, 1)
        loss = F.mse_loss(self.model(a.sqrt() * x + (1 - a).sqrt() * noise, t), noise, reduction="none").mean((1, 2, 3))
        prefix = "train" if self.training else "val"
        return loss.mean(), {f"{prefix}/loss_simple": loss.mean(), f"{prefix}/vlb": (a.flatten() * loss).mean()}

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss, values = self.shared_step(batch)
        self.log_dict(values, prog_bar=True, logger=True, on_step=True, on_epoch=True)
        self.log("global_step", float(self.global_step), prog_bar=True, on_step=True)
        self.log("lr_abs", self.optimizers().param_groups[0]["lr"], on_step=True)
        return loss

    @torch.no_grad()
    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.stored = [parameter.clone() for parameter in self.model.parameters()]
        shadow = dict(self.model_ema.named_buffers())
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(shadow[self.model_ema.names[name]].data)
        self.log_dict(self.shared_step(batch)[1])
        for kept, parameter in zip(self.stored, self.model.parameters(), strict=True):
            parameter.data.copy_(kept.data)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self.use_ema:
            self.model_ema(self.model)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(list(self.model.parameters()), lr=self.learning_rate)
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=lambda step: min(1.0, (step + 1) / 10))
        return [optimizer], [{"scheduler": warmup, "interval": "step", "frequency": 1}]


@job(size=4)
def diffusion(callbacks: list[Any]) -> None:
    """Denoising with averaged weights."""
    data = Pictures(48)
    trainer(callbacks, accumulate_grad_batches=2).fit(
        Diffusion(), DataLoader(data, 4, shuffle=True), DataLoader(data, 4)
    )
