"""Ways of training, each as a LightningModule and a sample: what a step does beside forward, backward and optimizer.

``regime.NAME`` in ``nullgpu.txt``. Every one is small, since it is the way that counts and not the network.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from .networks import make_optimizer

IMAGE = (torch.zeros(3, 64, 64), torch.tensor(0))
TOKENS = (torch.zeros(128, dtype=torch.long), torch.tensor(0))
VOLUME = (torch.zeros(1, 32, 32, 32), torch.zeros(1, 32, 32, 32, dtype=torch.long))
TEXT = (torch.zeros(128, dtype=torch.long), torch.tensor(128), torch.tensor(0))  # tokens, their number, a label
BOXES = (torch.zeros(3, 128, 128), torch.zeros(12, 4), torch.zeros(12, dtype=torch.long))
WIDTH = 256


def cnn(width: int = 32, classes: int = 10) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, 2 * width, 3, padding=1, stride=2), nn.BatchNorm2d(2 * width), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * width, classes)),
    )


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Blocks, run through ``run``: plainly, or checkpointed in one of torch's ways."""

    def __init__(self, run: Callable[[nn.ModuleList, torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.head = nn.Linear(WIDTH, 10)
        self.run = run or _plainly

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.run(self.blocks, self.embed(x)).mean(1))


def _plainly(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = block(x)
    return x


def _checkpointed(reentrant: bool) -> Callable[[nn.ModuleList, torch.Tensor], torch.Tensor]:
    def run(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return x

    return run


def _in_segments(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    return checkpoint_sequential(nn.Sequential(*blocks), 2, x, use_reentrant=False)


def _selectively(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saved = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
    return x


class Task(pl.LightningModule):
    """A network, cross-entropy, one optimizer; what differs is in subclasses."""

    def __init__(self, net: nn.Module, optimizer: str) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.optimizer, self.trained())

    def trained(self) -> Any:
        return self.parameters()


class Gan(Task):
    """Manual optimization, two optimizers in turn, toggled."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(cnn(classes=1), optimizer)
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            *(nn.Linear(64, 64 * 8 * 8), nn.Unflatten(1, (64, 8, 8)), nn.ConvTranspose2d(64, 32, 4, 4), nn.ReLU()),
            *(nn.ConvTranspose2d(32, 3, 2, 2), nn.Tanh()),
        )

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images, _ = batch
        of_generator, of_discriminator = self.optimizers()
        noise = torch.randn(images.size(0), 64, device=self.device)
        self.toggle_optimizer(of_generator)
        loss = F.softplus(-self.net(self.generator(noise))).mean()
        of_generator.zero_grad()
        self.manual_backward(loss)
        of_generator.step()
        self.untoggle_optimizer(of_generator)
        self.toggle_optimizer(of_discriminator)
        loss = F.softplus(-self.net(images)).mean() + F.softplus(self.net(self.generator(noise).detach())).mean()
        of_discriminator.zero_grad()
        self.manual_backward(loss)
        of_discriminator.step()
        self.untoggle_optimizer(of_discriminator)
        self.log_dict({"loss": loss}, prog_bar=True)

    def configure_optimizers(self) -> Any:
        return [make_optimizer(self.optimizer, part.parameters()) for part in (self.generator, self.net)]


class Alternating(Task):
    """Manual optimization in which the second optimizer steps every other batch."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(cnn(), optimizer)
        self.automatic_optimization = False
        self.other = cnn(64)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        for optimizer, net in ((first, self.net), (second, self.other)) if batch_idx % 2 else ((first, self.net),):
            loss = F.cross_entropy(net(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [make_optimizer(self.optimizer, part.parameters()) for part in (self.net, self.other)]


class Turns(Task):
    """What differs from batch to batch, in an epoch of twenty."""

    batches = 20

    def fit_with(self) -> dict[str, Any]:
        return {"max_steps": -1, "max_epochs": 1}


class InTurn(Turns):
    """Manual optimization, of one network in even batches and of the other in odd ones."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(cnn(), optimizer)
        self.automatic_optimization = False
        self.other = cnn(64)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        odd = batch_idx % 2
        optimizer, net = self.optimizers()[odd], (self.net, self.other)[odd]
        loss = F.cross_entropy(net(batch[0]), batch[1])
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return [make_optimizer(self.optimizer, part.parameters()) for part in (self.net, self.other)]


class Critic(Turns):
    """A GAN whose generator trains in every fifth batch: the first of them, or the last, or by the global step."""

    def __init__(self, optimizer: str, trains: Callable[[Critic, int], bool]) -> None:
        super().__init__(cnn(classes=1), optimizer)
        self.automatic_optimization = False
        self.generator, self.trains = Gan(optimizer).generator, trains

    def training_step(self, batch: Any, batch_idx: int) -> None:
        of_generator, of_critic = self.optimizers()
        noise = torch.randn(batch[0].size(0), 64, device=self.device)
        loss = self.net(self.generator(noise).detach()).mean() - self.net(batch[0]).mean()
        of_critic.zero_grad()
        self.manual_backward(loss)
        of_critic.step()
        if self.trains(self, batch_idx):
            self.toggle_optimizer(of_generator)
            loss = -self.net(self.generator(noise)).mean()
            of_generator.zero_grad()
            self.manual_backward(loss)
            of_generator.step()
            self.untoggle_optimizer(of_generator)

    def configure_optimizers(self) -> Any:
        return [make_optimizer(self.optimizer, part.parameters()) for part in (self.generator, self.net)]


class ByHand(Turns):
    """Gradients that are added up over four batches, by hand."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(cnn(), optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]) / 4)
        if (batch_idx + 1) % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()


class Skips(Turns):
    """An ``optimizer_step`` of its own, which steps in every third batch."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        if (batch_idx + 1) % 3 == 0:
            optimizer.step(closure=closure)
        else:
            closure()


class Lbfgs(Task):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), max_iter=3, history_size=4)


class LineSearch(Task):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), max_iter=2, line_search_fn="strong_wolfe")


class Frozen(Task):
    """A frozen backbone in eval mode, a head that is trained."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(cnn(64), optimizer)
        for parameter in self.net[:-1].parameters():
            parameter.requires_grad = False

    def trained(self) -> Iterator[nn.Parameter]:
        return self.net[-1].parameters()


class Groups(Task):
    """Parameter groups with rates of their own."""

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": part.parameters(), "lr": rate} for part, rate in ((self.net[:3], 1e-4), (self.net[3:], 1e-3))
        ]
        optimizer = torch.optim.AdamW(groups)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class Dtypes(Task):
    """A body in half precision and a head in full, in a group each."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(cnn(classes=64).bfloat16(), optimizer)
        self.head = nn.Linear(64, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.head(self.net(batch[0].bfloat16()).float()), batch[1])

    def trained(self) -> Any:
        return [{"params": self.net.parameters(), "lr": 1e-4}, {"params": self.head.parameters()}]


class LoRA(nn.Module):
    """A linear layer that stays, and a low-rank part that is trained (arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x)) * 2


def lora() -> nn.Module:
    net = Transformer().requires_grad_(False)
    for block in net.blocks:
        block.mlp[0], block.mlp[2] = LoRA(block.mlp[0]), LoRA(block.mlp[2])
    return net


class Dequantised(torch.autograd.Function):
    """A linear layer's product, for which the weight is dequantised on the way there and again on the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight.to(x.dtype) * scale.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,), (weight, scale) = gradients, ctx.saved_tensors
        return gradient @ (weight.to(gradient.dtype) * scale.to(gradient.dtype)), None, None


class Quantised(nn.Module):
    """A linear layer that stays, in 8 bits with a scale for each output, as bitsandbytes keeps them (arXiv 2208.07339).

    ``again``: dequantised again in the backward pass; else autograd keeps what was dequantised.
    """

    def __init__(self, base: nn.Linear, again: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.again = base.in_features, base.out_features, again
        scale = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((base.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.again:
            return Dequantised.apply(x, self.weight, self.scale)
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


def quantised() -> nn.Module:
    net = lora()
    for block in net.blocks:
        block.mlp[0].base = Quantised(block.mlp[0].base, again=True)
        block.mlp[2].base = Quantised(block.mlp[2].base, again=False)
    return net


class Contrastive(Task):
    """A loss over all pairs: quadratic in the batch size."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(cnn(classes=64), optimizer)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        a = F.normalize(self.net(batch[0]), dim=1)
        b = F.normalize(self.net(batch[0].flip(3)), dim=1)
        logits = a @ b.T / 0.1
        target = torch.arange(len(a), device=self.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class MemoryBank(Task):
    """Metric learning against a bank of features, a buffer that each step writes to."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(cnn(classes=64), optimizer)
        self.register_buffer("bank", torch.randn(4096, 64))
        self.place = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        features = F.normalize(self.net(batch[0]), dim=1)
        loss = F.cross_entropy(features @ self.bank.T.clone(), batch[1])
        with torch.no_grad():
            self.bank[: len(features)] = features.to(self.bank.dtype)
        return loss


class Teacher(Task):
    """A student and the moving average of its weights, updated after each batch."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(cnn(), optimizer)
        self.teacher = cnn().requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            target = self.teacher(batch[0]).softmax(1)
        return F.cross_entropy(self.net(batch[0]), target)

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, 0.01)

    def trained(self) -> Iterator[nn.Parameter]:
        return self.net.parameters()


class Square(torch.autograd.Function):
    """A function of the user's own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class Custom(Task):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = Square.apply(self.net[:3](batch[0]))
        x = x.view(len(x), -1).view_as(x).mul_(0.5)
        return F.cross_entropy(self.net[3:](x), batch[1])


class Penalty(Task):
    """A gradient penalty: backward through backward."""

    def __init__(self, optimizer: str) -> None:
        net = nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.Softplus(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10)
        )
        super().__init__(net, optimizer)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images = batch[0].clone().requires_grad_()
        logits = self.net(images)
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        return F.cross_entropy(logits, batch[1]) + gradient.square().sum((1, 2, 3)).mean()


class LazyPenalty(Penalty, Turns):
    """The same in every fourth batch (StyleGAN's lazy regularization)."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return Task.training_step(self, batch, batch_idx) if batch_idx % 4 else super().training_step(batch, batch_idx)


class Says(Task):
    """Logs, prints, metrics and calls of CUDA in the user's step."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(cnn(), optimizer)
        from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

        self.accuracy, self.confusion = MulticlassAccuracy(10), MulticlassConfusionMatrix(10)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.accuracy(logits, batch[1])
        self.confusion.update(logits, batch[1])
        self.log("loss", loss)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        return {"loss": loss, "logits": logits.detach()}


class UsersCuda(Task):
    """Code that names the device itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        weights = torch.ones(10).cuda()
        noise = torch.randn(batch[0].shape, device="cuda")
        with torch.autocast("cuda", dtype=torch.float16):
            logits = self.net(batch[0] + noise.to("cuda"))
        torch.cuda.synchronize()
        if torch.cuda.is_available():
            logits = logits.to(torch.device("cuda", 0))
        return F.cross_entropy(logits.float(), batch[1].cuda(), weights)


class Reads(Task):
    """Reads values that no plan can know: a mask, an item, an index."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits, batch[1], reduction="none")
        self.last = loss.mean().item()
        kept = loss[batch[1] >= 0]
        return kept.mean() if kept.numel() else loss.mean()


class Compiled(Task):
    def __init__(self, optimizer: str) -> None:
        super().__init__(torch.compile(cnn()), optimizer)


class CompiledStep(Task):
    """The step itself, a method that is decorated."""

    @torch.compile
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])


@torch.compile
def focal(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, weighted down where a sample is told well (arXiv 1708.02002)."""
    loss = F.cross_entropy(logits, labels, reduction="none")
    return ((1 - torch.exp(-loss)) ** 2 * loss).mean()


class CompiledLoss(Task):
    """A loss over every place of an image, a function that is decorated."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 10, 1)), optimizer)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        return focal(logits, batch[1][:, None, None].expand(-1, *logits.shape[2:]))


class Graph(Task):
    """Message passing over edges with index_add and scatter."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)), optimizer)
        self.embed, self.head = nn.Embedding(1000, WIDTH), nn.Linear(WIDTH, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        nodes = batch[0].flatten()
        x = self.embed(nodes)
        source, target = (
            torch.arange(len(nodes), device=self.device),
            torch.arange(len(nodes), device=self.device).flip(0),
        )
        for layer in self.net:
            messages = F.relu(layer(x[source])).to(x.dtype)
            x = x + torch.zeros_like(x).index_add(0, target, messages)
            x = x + torch.zeros_like(x).scatter_add(0, target[:, None].expand_as(messages), messages)
        return F.cross_entropy(self.head(x.view(len(batch[0]), -1, WIDTH).mean(1)), batch[1])


class Averaged(Task):
    """A callback that keeps an average of the weights."""

    def __init__(self, optimizer: str, kind: str) -> None:
        super().__init__(Transformer(), optimizer)
        self.kind = kind

    def fit_with(self) -> dict[str, Any]:
        from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging

        if self.kind == "stochastic":  # from its start on: the second of two epochs
            average = StochasticWeightAveraging(1e-3, swa_epoch_start=1)
            return {"callbacks": [average], "max_steps": -1, "max_epochs": 3, "limit_train_batches": 2}
        return {"callbacks": [EMAWeightAveraging(decay=0.99) if self.kind == "ema" else WeightAveraging()]}


class ClippedByValue(Task):
    def fit_with(self) -> dict[str, Any]:
        return {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2}


class Unfrozen(Task):
    """A backbone that is frozen for an epoch, and trained from then on."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(Transformer(), optimizer)
        self.backbone = self.net.blocks

    def trained(self) -> Iterator[nn.Parameter]:
        return (p for p in self.parameters() if p.requires_grad)

    def fit_with(self) -> dict[str, Any]:
        from pytorch_lightning.callbacks import BackboneFinetuning

        unfreeze = BackboneFinetuning(unfreeze_backbone_at_epoch=1, initial_denom_lr=10)
        return {"callbacks": [unfreeze], "max_steps": -1, "max_epochs": 3, "limit_train_batches": 2}


class Packed(Task):
    """A recurrent network over packed sequences, whose lengths must be on the host."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(nn.LSTM(64, 128, 2, batch_first=True), optimizer)
        self.embed, self.head = nn.Embedding(1000, 64), nn.Linear(128, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        from torch.nn.utils.rnn import pack_padded_sequence

        tokens, lengths, labels = batch
        packed = pack_padded_sequence(self.embed(tokens), lengths.cpu(), batch_first=True, enforce_sorted=False)
        return F.cross_entropy(self.head(self.net(packed)[1][0][-1]), labels)


class Longest(Task):
    """Cuts its batch at the longest of the samples, whose lengths it reads."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        tokens, lengths, labels = batch
        return F.cross_entropy(self.net(tokens[:, : lengths.cpu().max().item()]), labels)


class Pyramid(nn.Module):
    """Features at three scales, added from the coarsest to the finest, and a head that they share."""

    def __init__(self, width: int = 32, outputs: int = 24) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width)
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(widths)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(w, width, 1) for w in widths[1:])
        self.head = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = []
        for down in self.down:
            x = down(x)
            features.append(x)
        above, outputs = None, []
        for lateral, feature in zip(reversed(self.lateral), reversed(features), strict=True):
            here = lateral(feature)
            above = here if above is None else here + F.interpolate(above, size=here.shape[-2:], mode="nearest")
            outputs.append(self.head(above))
        return outputs


class Detects(Task):
    """Boxes and classes at each place of a pyramid, matched with each image's own targets by their overlap."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(Pyramid(), optimizer)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, boxes, labels = batch
        outputs = torch.cat([output.flatten(2).transpose(1, 2) for output in self.net(images)], 1)
        places, scores = outputs[..., :4].sigmoid(), outputs[..., 4:]
        low = torch.maximum(places[:, :, None, :2], boxes[:, None, :, :2])
        high = torch.minimum(places[:, :, None, 2:], boxes[:, None, :, 2:])
        across, down = (high - low).clamp(min=0).unbind(3)
        best, index = (across * down).max(2)
        matched = boxes.gather(1, index[..., None].expand(-1, -1, 4))
        loss = F.cross_entropy(scores.transpose(1, 2), labels.gather(1, index))
        return loss + ((places - matched).abs().sum(2) * best.detach()).mean()


class DetectsInTurn(Task):
    """The same image by image: each is made ready by itself, and has its own anchors, matches and losses."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(Pyramid(), optimizer)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images = [F.interpolate((image - 0.5)[None] / 0.25, scale_factor=1.25)[0] for image in batch[0]]
        outputs = [output.flatten(2).transpose(1, 2) for output in self.net(torch.stack(images))]
        losses = []
        for one, boxes, labels in zip(torch.cat(outputs, 1), batch[1], batch[2], strict=True):
            places, scores = one[:, :4].sigmoid(), one[:, 4:]
            distance = (places[:, None] - boxes).abs().sum(2)
            best, index = distance.min(1)
            losses.append(F.cross_entropy(scores, labels[index]) + best.mean())
        return torch.stack(losses).mean()


class DeeplySupervised(Task):
    """A loss at each scale."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(Pyramid(outputs=4), optimizer)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images = batch[0]
        target = torch.zeros(len(images), *images.shape[-2:], dtype=torch.long, device=self.device)
        return sum(
            F.cross_entropy(F.interpolate(o, size=images.shape[-2:], mode="bilinear"), target) / 2**k
            for k, o in enumerate(reversed(self.net(images)))
        )


class Denoises(Task):
    """Diffusion: noise of a strength that is drawn for each sample, and the network's guess of it."""

    def __init__(self, optimizer: str) -> None:
        from .networks import Diffusion

        super().__init__(Diffusion(), optimizer)
        self.register_buffer("kept", torch.linspace(1, 0, 1000).cumprod(0))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images = batch[0]
        noise = torch.randn_like(images)
        kept = self.kept[torch.randint(1000, (len(images),), device=self.device)][:, None, None, None]
        return F.mse_loss(self.net(kept.sqrt() * images + (1 - kept).sqrt() * noise), noise)


class Validates(Task):
    """Validation between steps of training, with a batch size of its own: small, so that training has the peak."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader([IMAGE] * 16, batch_size=8)


class Triplets(Task):
    """Metric learning: for each sample the hardest of the others in its batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        features = F.normalize(self.net(batch[0]), dim=1)
        distance = torch.cdist(features, features)
        same = batch[1][:, None] == batch[1]
        far = (distance * same).amax(1)
        near = distance.masked_fill(same, float("inf")).amin(1)
        return F.relu(far - near.clamp(max=2) + 0.2).mean()


class Sparse(Task):
    """Tables whose gradients are sparse: rows that a batch names, as often as it names them."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)), optimizer)
        self.embed = nn.Embedding(20000, WIDTH, sparse=True)
        self.bag = nn.EmbeddingBag(10000, WIDTH, sparse=True)

    def loss(self, batch: Any) -> torch.Tensor:
        tokens, labels = batch
        return F.cross_entropy(self.net(torch.cat([self.embed(tokens).mean(1), self.bag(tokens)], 1)), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def on_after_backward(self) -> None:
        if self.optimizer != "SGD":  # as if every row were named once: the null GPU counts, and finds none
            for table in (self.embed, self.bag):
                table.weight.grad._coalesced_(True)


class SparseAdam(Sparse):
    """The same with Adam's moments, of which a step changes only the rows that the batch names."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.on_after_backward()
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        tables = torch.optim.SparseAdam([self.embed.weight, self.bag.weight])
        return [tables, make_optimizer(self.optimizer, self.net.parameters())]


class Volume(Task):
    """MONAI's Dice with cross-entropy over a U-Net of residual units, a crop a sample."""

    def __init__(self, optimizer: str) -> None:
        from monai.losses.dice import DiceCELoss
        from monai.networks.nets.unet import UNet

        super().__init__(UNet(3, 1, 2, (16, 32, 64), (2, 2), num_res_units=2), optimizer)
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(self.net(batch[0]), batch[1])


class Codebook(Task):
    """A VQ-VAE: the nearest of 512 codes for every place (arXiv 1711.00937)."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(nn.Conv2d(3, 64, 4, 4), optimizer)
        self.codes, self.decoder = nn.Embedding(512, 64), nn.ConvTranspose2d(64, 3, 4, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        z = self.net(batch[0]).permute(0, 2, 3, 1)
        nearest = torch.cdist(z.reshape(-1, 64), self.codes.weight).argmin(1)
        codes = self.codes(nearest).view_as(z)
        loss = F.mse_loss(codes.detach(), z) + F.mse_loss(codes, z.detach())
        through = z + (codes - z).detach()
        return loss + F.mse_loss(self.decoder(through.permute(0, 3, 1, 2)), batch[0])


class Cells(Task):
    """An LSTM and a GRU written out, cell by cell."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(nn.Linear(WIDTH, 10), optimizer)
        self.embed, self.lstm, self.gru = nn.Embedding(1000, WIDTH), nn.LSTMCell(WIDTH, WIDTH), nn.GRUCell(WIDTH, WIDTH)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = self.embed(batch[0])
        hidden = other = state = x.new_zeros(len(x), WIDTH)
        for step in range(16):
            hidden, state = self.lstm(x[:, step], (hidden, state))
            other = self.gru(hidden, other)
        return F.cross_entropy(self.net(other), batch[1])


class Dice(Task):
    """A soft Dice loss by hand, of labels that are made one-hot."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, padding=1), optimizer)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        scores = self.net(batch[0]).softmax(1)
        truth = F.one_hot((batch[0][:, 0] > 0).long(), 8).permute(0, 3, 1, 2).float()
        both, each = (scores * truth).sum((2, 3)), (scores + truth).sum((2, 3))
        return 1 - ((2 * both + 1) / (each + 1)).mean()


class Speech(Task):
    """CTC over the rows of an image, as a line of text is read."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(nn.LSTM(3 * 64, WIDTH, batch_first=True), optimizer)
        self.letters = nn.Linear(WIDTH, 30)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        rows = batch[0].transpose(1, 2).flatten(2)
        scores = self.letters(self.net(rows)[0]).log_softmax(-1).transpose(0, 1)
        text = torch.ones(len(rows), 10, dtype=torch.long, device=self.device)
        lengths = [torch.full((len(rows),), length, dtype=torch.long) for length in (len(scores), 10)]
        return F.ctc_loss(scores, text, *lengths)


class Logs(Task):
    """What is logged of a step, by way of NumPy, and of its gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        best = logits.argmax(1).cpu().numpy()
        self.log("accuracy", float((best == batch[1].cpu().numpy()).mean()))
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits.detach()}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        from pytorch_lightning.utilities import grad_norm

        self.log_dict(grad_norm(self.net, norm_type=2))


class Chunks(Task):
    """A batch in four parts, whose losses are added up; and four of its images once more."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        parts = zip(batch[0].chunk(4), batch[1].chunk(4), strict=True)
        again = torch.cat([self.net(image[None]) for image in batch[0][:4]])
        return sum(F.cross_entropy(self.net(x), y) for x, y in parts) + again.mean()


class Draws(Task):
    """Does by chance what takes more or less memory, as augmentations do."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0]
        if random.random() < 0.5:
            x = x.flip(-1)
        if np.random.rand() < 0.5:
            x = x + 0.1 * torch.randn_like(x)
        share = float(np.random.beta(0.4, 0.4))
        x = share * x + (1 - share) * x[torch.randperm(len(x), device=x.device)]
        return F.cross_entropy(self.net(x), batch[1])


class Queue(Task):
    """Contrast with a queue of earlier keys, whose place is a buffer (MoCo, arXiv 1911.05722)."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(cnn(classes=64), optimizer)
        self.register_buffer("queue", torch.zeros(64, 4096))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def on_fit_start(self) -> None:
        self.keys = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            keys = F.normalize(self.keys(batch[0].flip(-1)), dim=1)
        queries = F.normalize(self.net(batch[0]), dim=1)
        logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ self.queue.clone()], 1) / 0.07
        place, count = int(self.place), len(keys)
        assert self.queue.size(1) % count == 0
        self.queue[:, place : place + count] = keys.T
        self.place[0] = (place + count) % self.queue.size(1)
        return F.cross_entropy(logits, torch.zeros(count, dtype=torch.long, device=self.device))

    def on_train_batch_end(self, *_: Any) -> None:
        for key, query in zip(self.keys.parameters(), self.net.parameters(), strict=True):
            key.data.mul_(0.999).add_(query.data, alpha=0.001)


class Experts(Task):
    """A mixture of experts, whose queries share keys: transformers' Mixtral."""

    def __init__(self, optimizer: str) -> None:
        from transformers import MixtralConfig, MixtralForCausalLM

        shape = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_local_experts": 4}
        config = MixtralConfig(**shape, num_attention_heads=8, num_key_value_heads=2, vocab_size=1000)
        super().__init__(MixtralForCausalLM(config), optimizer)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0], labels=batch[0]).loss


REGIMES: dict[str, Callable[[str], tuple[pl.LightningModule, Any]]] = {
    "plain": lambda o: (Task(cnn(), o), IMAGE),
    "gan": lambda o: (Gan(o), IMAGE),
    "alternating": lambda o: (Alternating(o), IMAGE),
    "in_turn": lambda o: (InTurn(o), IMAGE),
    "critic": lambda o: (Critic(o, lambda _, batch: batch % 5 == 0), IMAGE),
    "critic_last": lambda o: (Critic(o, lambda _, batch: batch % 5 == 4), IMAGE),
    "critic_global": lambda o: (Critic(o, lambda module, _: module.global_step % 5 == 0), IMAGE),
    "by_hand": lambda o: (ByHand(o), IMAGE),
    "lazy_penalty": lambda o: (LazyPenalty(o), IMAGE),
    "skips": lambda o: (Skips(cnn(), o), IMAGE),
    "lbfgs": lambda o: (Lbfgs(cnn(), o), IMAGE),
    "line_search": lambda o: (LineSearch(cnn(), o), IMAGE),
    "frozen": lambda o: (Frozen(o), IMAGE),
    "groups": lambda o: (Groups(cnn(), o), IMAGE),
    "dtypes": lambda o: (Dtypes(o), IMAGE),
    "lora": lambda o: (Task(lora(), o), TOKENS),
    "quantised": lambda o: (Task(quantised(), o), TOKENS),
    "checkpoint": lambda o: (Task(Transformer(_checkpointed(False)), o), TOKENS),
    "checkpoint_reentrant": lambda o: (Task(Transformer(_checkpointed(True)), o), TOKENS),
    "checkpoint_sequential": lambda o: (Task(Transformer(_in_segments), o), TOKENS),
    "checkpoint_selective": lambda o: (Task(Transformer(_selectively), o), TOKENS),
    "contrastive": lambda o: (Contrastive(o), IMAGE),
    "memory_bank": lambda o: (MemoryBank(o), IMAGE),
    "teacher": lambda o: (Teacher(o), IMAGE),
    "custom": lambda o: (Custom(cnn(), o), IMAGE),
    "penalty": lambda o: (Penalty(o), IMAGE),
    "says": lambda o: (Says(o), IMAGE),
    "users_cuda": lambda o: (UsersCuda(cnn(), o), IMAGE),
    "reads": lambda o: (Reads(cnn(), o), IMAGE),
    "compiled": lambda o: (Compiled(o), IMAGE),
    "compiled_graphs": lambda o: (Task(torch.compile(cnn(), mode="reduce-overhead"), o), IMAGE),
    "compiled_step": lambda o: (CompiledStep(cnn(), o), IMAGE),
    "compiled_loss": lambda o: (CompiledLoss(o), IMAGE),
    "compiled_transformer": lambda o: (Task(torch.compile(Transformer()), o), TOKENS),
    "graph": lambda o: (Graph(o), TOKENS),
    "volume": lambda o: (Volume(o), VOLUME),
    "sparse": lambda o: (Sparse(o), TOKENS),
    "sparse_adam": lambda o: (SparseAdam(o), TOKENS),
    "average": lambda o: (Averaged(o, "all"), TOKENS),
    "average_ema": lambda o: (Averaged(o, "ema"), TOKENS),
    "average_stochastic": lambda o: (Averaged(o, "stochastic"), TOKENS),
    "clip_value": lambda o: (ClippedByValue(cnn(), o), IMAGE),
    "unfrozen": lambda o: (Unfrozen(o), TOKENS),
    "packed": lambda o: (Packed(o), TEXT),
    "longest": lambda o: (Longest(Transformer(), o), TEXT),
    "detection": lambda o: (Detects(o), BOXES),
    "detection_in_turn": lambda o: (DetectsInTurn(o), BOXES),
    "deep_supervision": lambda o: (DeeplySupervised(o), IMAGE),
    "diffusion": lambda o: (Denoises(o), IMAGE),
    "validation": lambda o: (Validates(cnn(), o), IMAGE),
    "codebook": lambda o: (Codebook(o), IMAGE),
    "cells": lambda o: (Cells(o), TOKENS),
    "dice": lambda o: (Dice(o), IMAGE),
    "speech": lambda o: (Speech(o), IMAGE),
    "logs": lambda o: (Logs(cnn(), o), IMAGE),
    "chunks": lambda o: (Chunks(cnn(), o), IMAGE),
    "draws": lambda o: (Draws(cnn(), o), IMAGE),
    "queue": lambda o: (Queue(o), IMAGE),
    "experts": lambda o: (Experts(o), TOKENS),
    "triplets": lambda o: (Triplets(cnn(classes=64), o), IMAGE),
}


def build(name: str, optimizer: str) -> tuple[pl.LightningModule, Any]:
    return REGIMES[name](optimizer)
