"""Research code: gradients of gradients, inner loops, teachers out of sight, batches changed on the way to the step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

from benchmarks.clients.job import job
from benchmarks.clients.styles.common import trainer


# --------------------------------------------------------------------------------- equations: second derivatives
class Physics(pl.LightningModule):
    """The loss is the residual of an equation, by derivatives of the network; polished by LBFGS."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
        self.nu = nn.Parameter(torch.tensor(0.01))

    def residual(self, points: torch.Tensor) -> torch.Tensor:
        x, t = (points[:, i : i + 1].clone().requires_grad_() for i in range(2))
        u = self.net(torch.cat((x, t), 1))
        ones = torch.ones_like(u)
        u_x, u_t = torch.autograd.grad(u, (x, t), ones, create_graph=True)
        u_xx = torch.autograd.grad(u_x, x, ones, create_graph=True)[0]
        return u_t + u * u_x - self.nu * u_xx

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        (points,) = batch
        return self.residual(points).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with torch.enable_grad():
            self.log("residual", self.residual(batch[0]).abs().mean().detach())

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), max_iter=3)


@job(size=8)
def physics(callbacks: list[Any]) -> None:
    """Second derivatives in the loss, also in validation, and a closure that runs several times a step."""
    data = TensorDataset(torch.rand(64, 2))
    runs = trainer(callbacks, inference_mode=False)
    runs.fit(Physics(), DataLoader(data, 8, shuffle=True), DataLoader(data, 8))


# ------------------------------------------------------------------------------------------ inner loops of tasks
class Episodes(Dataset[Any]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        labels = torch.arange(5).repeat_interleave(2)
        return {"train": (torch.rand(10, 16), labels), "test": (torch.rand(10, 16), labels)}


class MetaLearner(pl.LightningModule):
    """An inner loop of gradient steps for each task, whose graph the outer loss goes back through."""

    def __init__(self, ways: int = 5, inner_lr: float = 0.1, steps: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, ways))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        outer = torch.zeros((), device=self.device)
        for x, y, query, answer in zip(*batch["train"], *batch["test"], strict=True):
            weights = dict(self.model.named_parameters())
            for _ in range(self.hparams.steps):
                inner = F.cross_entropy(torch.func.functional_call(self.model, weights, (x,)), y)
                gradients = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
                updated = zip(weights.items(), gradients, strict=True)
                weights = {name: weight - self.hparams.inner_lr * g for (name, weight), g in updated}
            outer = outer + F.cross_entropy(torch.func.functional_call(self.model, weights, (query,)), answer)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(outer / len(batch["train"][0]))
        optimizer.step()
        self.log("outer", outer.detach())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.model.parameters())


@job(size=2)
def meta_learning(callbacks: list[Any]) -> None:
    """MAML by ``torch.func``: a step that loops over its samples."""
    trainer(callbacks).fit(MetaLearner(), DataLoader(Episodes(), 2))


# -------------------------------------------------------------------------------- a teacher that is no submodule
class Distillation(pl.LightningModule):
    """The teacher hides in a list; batches are mixed on the GPU; the rate warms up by the Trainer's own counts."""

    def __init__(self, teacher: nn.Module, alpha: float = 0.4) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["teacher"])
        self.teacher = [teacher.eval().requires_grad_(False)]
        self.student = nn.Sequential(nn.Flatten(), nn.Linear(768, 32), nn.ReLU(), nn.Linear(32, 10))

    def on_fit_start(self) -> None:
        self.teacher[0].to(self.device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        if self.trainer.training:
            weight = torch.distributions.Beta(self.hparams.alpha, self.hparams.alpha).sample()
            order = torch.randperm(len(x), device=x.device)
            x = weight * x + (1 - weight) * x[order]
        return x, F.one_hot(y, 10).float()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        with torch.no_grad():
            wanted = self.teacher[0](x)
        logits = self.student(x)
        soft = F.kl_div(
            F.log_softmax(logits / 4, 1), F.log_softmax(wanted / 4, 1), log_target=True, reduction="batchmean"
        )
        share = self.trainer.current_epoch / max(1, self.trainer.max_epochs)
        self.log("soft", soft, on_epoch=True, prog_bar=True)
        return (1 - share) * soft + F.cross_entropy(logits, y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.student.parameters(), 0.1, momentum=0.9)
        total = self.trainer.estimated_stepping_batches
        cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / total)))
        return [optimizer], [{"scheduler": cosine, "interval": "step"}]


@job(size=4)
def distillation(callbacks: list[Any]) -> None:
    """A teacher out of sight, and labels that ``on_after_batch_transfer`` makes."""
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    data = TensorDataset(torch.rand(48, 3, 16, 16), torch.zeros(48, dtype=torch.long))
    sampler = WeightedRandomSampler(torch.ones(48), 48)
    trainer(callbacks, precision="16-mixed").fit(Distillation(teacher), DataLoader(data, 4, sampler=sampler))


# ------------------------------------------------------------------------------- a data set that grows by epochs
class Curriculum(pl.LightningDataModule):
    """Each epoch has more of the data than the one before: loaders are made anew."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        length = 24 * (1 + self.trainer.current_epoch)
        return DataLoader(TensorDataset(torch.rand(length, 16), torch.rand(length, 1)), self.batch_size, shuffle=True)


class Regressor(pl.LightningModule):
    """Keeps a table of its errors in a file, a line a step; steps of planning write lines too."""

    def __init__(self, table: Path) -> None:
        super().__init__()
        self.net, self.table, self.beta = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2)), table, 0.0

    def on_train_epoch_start(self) -> None:
        self.beta = min(1.0, self.current_epoch / max(1, self.trainer.max_epochs - 1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        mean, log_var = self.net(x).chunk(2, 1)
        loss = (0.5 * (y - mean).square() * torch.exp(-log_var) + self.beta * 0.5 * log_var).mean()
        with self.table.open("a") as file:
            file.write(f"{self.trainer.global_step},{batch_idx},{loss.item()}\n")
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.RAdam(self.parameters())


@job(size=4)
def curriculum(callbacks: list[Any]) -> None:
    """Loaders made anew each epoch, and a step that writes."""
    trainer(callbacks, reload_dataloaders_every_n_epochs=1).fit(Regressor(Path("errors.csv")), datamodule=Curriculum())


# ----------------------------------------------------------------------------------------------- recommendations
class Recommender(pl.LightningModule):
    """Sparse embeddings with an optimizer of their own, and negatives that the step draws."""

    def __init__(self, users: int = 200, articles: int = 300, dim: int = 16, negatives: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.users, self.items = (
            nn.Embedding(users, dim, sparse=True),
            nn.EmbeddingBag(articles, dim, sparse=True, mode="sum"),
        )
        self.tower = nn.Linear(dim, dim)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        user, item = batch
        drawn = torch.randint(0, self.hparams.articles, (len(user), self.hparams.negatives), device=self.device)
        vectors = self.items(torch.cat((item[:, None], drawn), 1).flatten()[:, None]).unflatten(0, (len(user), -1))
        scores = (self.tower(self.users(user))[:, None] * vectors).sum(-1)
        loss = F.cross_entropy(scores, torch.zeros(len(user), dtype=torch.long, device=self.device))
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        sparse = torch.optim.SparseAdam([self.users.weight, self.items.weight])
        return sparse, torch.optim.Adam(self.tower.parameters())


@job(size=8)
def recommender(callbacks: list[Any]) -> None:
    """Sparse gradients under two optimizers."""
    data = TensorDataset(torch.randint(0, 200, (96,)), torch.randint(0, 300, (96,)))
    trainer(callbacks).fit(Recommender(), DataLoader(data, 8, shuffle=True))


# ----------------------------------------------------------------------------------------------- radiance fields
class Rays(Dataset[Any]):
    """Rays of all pictures, shuffled anew each epoch; a sample is one ray."""

    def __init__(self) -> None:
        self.rays, self.colours = torch.rand(512, 6), torch.rand(512, 3)

    def __len__(self) -> int:
        return len(self.rays)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"rays": self.rays[index], "rgbs": self.colours[index]}


class RadianceField(pl.LightningModule):
    """Two networks of which the second samples where the first found density; rendered in chunks."""

    def __init__(self, coarse: int = 8, fine: int = 16, chunk: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.models = {"coarse": self.make(), "fine": self.make()}
        for name, model in self.models.items():
            setattr(self, name, model)

    @staticmethod
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(9, 32), nn.ReLU(), nn.Linear(32, 4))

    def render(self, rays: torch.Tensor) -> dict[str, torch.Tensor]:
        z = torch.linspace(0, 1, self.hparams.coarse, device=rays.device).expand(len(rays), -1)
        found = {}
        for name, model in self.models.items():
            points = rays[:, None, :3] + rays[:, None, 3:] * z[..., None]
            raw = model(torch.cat((points, rays[:, None].expand(-1, z.shape[1], -1)), -1))
            alpha = 1 - torch.exp(-F.relu(raw[..., 3]))
            weights = alpha * torch.cumprod(torch.cat((torch.ones_like(alpha[:, :1]), 1 - alpha[:, :-1]), 1), 1)
            found[name] = (weights[..., None] * raw[..., :3].sigmoid()).sum(1)
            cdf = torch.cumsum(weights.detach() + 1e-5, 1)
            u = torch.rand(len(rays), self.hparams.fine, device=rays.device)
            index = torch.searchsorted((cdf / cdf[:, -1:]).contiguous(), u).clamp(max=z.shape[1] - 1)
            z = torch.sort(torch.cat((z, torch.gather(z, 1, index)), 1), 1)[0]
        return found

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        rays, wanted = batch["rays"], batch["rgbs"]
        parts: dict[str, list[torch.Tensor]] = {"coarse": [], "fine": []}
        for start in range(0, len(rays), self.hparams.chunk):
            for name, colours in self.render(rays[start : start + self.hparams.chunk]).items():
                parts[name].append(colours)
        losses = {name: F.mse_loss(torch.cat(each), wanted) for name, each in parts.items()}
        self.log("train/psnr", -10 * torch.log10(losses["fine"].detach()))
        return losses["coarse"] + losses["fine"]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam([p for model in self.models.values() for p in model.parameters()], 5e-4)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], 0.1)]


@job(size=32)
def radiance_field(callbacks: list[Any]) -> None:
    """NeRF: samples are rays, the step loops over chunks of 64, its networks stand in a dictionary too."""
    trainer(callbacks).fit(RadianceField(), DataLoader(Rays(), 32, shuffle=True))
