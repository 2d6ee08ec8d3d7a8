"""Optimizers, schedulers, manual optimization, overridden optimization hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.optim import lr_scheduler as lrs

from benchmarks.robustness.job import Net, Training, job

MANUAL = "manual optimization"
OPTIMIZERS = "optimizers"
SCHEDULERS = "schedulers"
HOOKS = "overridden hooks of optimization"


class Configured(Net):
    """A network with the optimizers given."""

    def __init__(self, configure: Callable[[Any], Any]) -> None:
        super().__init__()
        self.configure = configure

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.configure(self)


def configured(kind: str, name: str, configure: Callable[[Any], Any]) -> None:
    job(kind, name=name)(lambda: Configured(configure))


# ---------------------------------------------------------------------------------------------------- optimizers


class Lion(torch.optim.Optimizer):
    """An optimizer of one's own."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    p.add_(momentum.mul_(0.9).add_(p.grad, alpha=0.1).sign(), alpha=-group["lr"])
        return loss


class Lookahead(Lion):
    """Wraps another optimizer and shares its groups."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        super().__init__(base.param_groups)
        self.param_groups = base.param_groups
        self.slow = [[p.detach().clone() for p in group["params"]] for group in base.param_groups]

    def step(self, closure: Any = None) -> Any:
        loss = self.base.step(closure)
        for group, slow in zip(self.param_groups, self.slow, strict=True):
            for p, kept in zip(group["params"], slow, strict=True):
                kept.lerp_(p.detach(), 0.5)
        return loss


class Sharpness(Lion):
    """Two forward and backward passes a step, through the closure."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
        return super().step(closure)


OPTIMIZER_KINDS: dict[str, Callable[[Any], Any]] = {
    "lbfgs": lambda net: torch.optim.LBFGS(net.parameters(), max_iter=3),
    "adam_fused": lambda net: torch.optim.Adam(net.parameters(), fused=True),
    "adam_capturable": lambda net: torch.optim.Adam(net.parameters(), capturable=True),
    "adagrad_and_groups": lambda net: torch.optim.Adagrad(
        [{"params": net.body.parameters(), "lr": 0.1}, {"params": net.head.parameters()}]
    ),
    "adafactor": lambda net: torch.optim.Adafactor(net.parameters()),
    "no_optimizer": lambda net: None,
    "own_optimizer": lambda net: Lion(net.parameters()),
    "lookahead": lambda net: Lookahead(torch.optim.Adam(net.parameters())),
    "sharpness_aware_by_closure": lambda net: Sharpness(net.parameters()),
    "named_parameters": lambda net: torch.optim.AdamW(net.named_parameters()),
    "no_decay_for_biases": lambda net: torch.optim.AdamW(
        [
            {"params": [p for n, p in net.named_parameters() if "bias" in n], "weight_decay": 0.0},
            {"params": [p for n, p in net.named_parameters() if "bias" not in n]},
        ]
    ),
    "part_of_the_parameters": lambda net: torch.optim.SGD(net.head.parameters(), lr=0.1, momentum=0.9),
    "amsgrad_maximize_foreach": lambda net: torch.optim.Adam(net.parameters(), amsgrad=True, foreach=True),
    "sgd_nesterov": lambda net: torch.optim.SGD(net.parameters(), 0.1, 0.9, nesterov=True),
    "rprop_and_asgd": lambda net: torch.optim.Rprop(net.parameters()),
}
for _name, _configure in OPTIMIZER_KINDS.items():
    configured(OPTIMIZERS, _name, _configure)


# ---------------------------------------------------------------------------------------------------- schedulers


def scheduled(make: Callable[[Any, Any], Any], **config: Any) -> Callable[[Any], Any]:
    def configure(net: Any) -> Any:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer, net.trainer), **config}}

    return configure


class Warmup(lrs.LRScheduler):
    """A scheduler of one's own, that keeps functions."""

    def __init__(self, optimizer: Any, steps: int) -> None:
        self.factor = lambda step: min(1.0, (step + 1) / steps)
        super().__init__(optimizer)

    def get_lr(self) -> Any:
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]


SCHEDULER_KINDS: dict[str, Callable[[Any], Any]] = {
    "one_cycle": scheduled(lambda o, t: lrs.OneCycleLR(o, 0.1, t.estimated_stepping_batches), interval="step"),
    "one_cycle_by_hand": scheduled(
        lambda o, t: lrs.OneCycleLR(o, 0.1, epochs=t.max_epochs, steps_per_epoch=100),
        interval="epoch",
    ),
    "cosine_of_max_epochs": scheduled(lambda o, t: lrs.CosineAnnealingLR(o, t.max_epochs)),
    "reduce_on_plateau": scheduled(lambda o, t: lrs.ReduceLROnPlateau(o), monitor="loss"),
    "cyclic": scheduled(lambda o, t: lrs.CyclicLR(o, 0.01, 0.1), interval="step"),
    "lambda_over_steps": scheduled(lambda o, t: lrs.LambdaLR(o, lambda n: 0.95**n), interval="step", frequency=2),
    "sequential_warmup": scheduled(
        lambda o, t: lrs.SequentialLR(o, [lrs.LinearLR(o), lrs.CosineAnnealingLR(o, 10)], milestones=[3]),
        interval="step",
    ),
    "chained": scheduled(lambda o, t: lrs.ChainedScheduler([lrs.ConstantLR(o), lrs.ExponentialLR(o, 0.9)])),
    "own_scheduler": scheduled(lambda o, t: Warmup(o, 5), interval="step"),
    "linear_by_half_of_training": scheduled(
        lambda o, t: lrs.LinearLR(o, 0.1, total_iters=int(t.estimated_stepping_batches * 0.5)), interval="step"
    ),
}
for _name, _configure in SCHEDULER_KINDS.items():
    configured(SCHEDULERS, _name, _configure)


@job(SCHEDULERS)
def scheduler_with_a_name_and_monitor() -> Any:
    configure = scheduled(lambda o, t: lrs.StepLR(o, 1), name="my_lr")
    return Training(Configured(configure), callbacks=[LearningRateMonitor()], settings={"logger": CSVLogger("logs")})


@job(SCHEDULERS)
def own_lr_scheduler_step() -> Any:
    class Own(Configured):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step(self.current_epoch + 1)

    return Own(scheduled(lambda o, t: lrs.CosineAnnealingWarmRestarts(o, 2)))


@job(SCHEDULERS)
def two_optimizers_with_schedulers_by_hand() -> Any:
    class Two(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self(batch).mean()
            self.manual_backward(loss)
            for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()

        def configure_optimizers(self) -> Any:
            both = [torch.optim.Adam(self.body.parameters()), torch.optim.SGD(self.head.parameters(), lr=0.1)]
            return both, [lrs.StepLR(both[0], 1), lrs.ExponentialLR(both[1], 0.9)]

    return Two()


# -------------------------------------------------------------------------------------------------------- manual


class Adversarial(Net):
    """A generator and a discriminator, optimized in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(16, 16), nn.Linear(16, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        generates, discriminates = self.optimizers()
        fake = self.generator(torch.randn_like(batch))
        self.toggle_optimizer(generates)
        loss = F.softplus(-self.discriminator(fake)).mean()
        generates.zero_grad()
        self.manual_backward(loss)
        generates.step()
        self.untoggle_optimizer(generates)
        self.toggle_optimizer(discriminates)
        loss = F.softplus(self.discriminator(fake.detach())).mean() + F.softplus(-self.discriminator(batch)).mean()
        discriminates.zero_grad()
        self.manual_backward(loss)
        discriminates.step()
        self.untoggle_optimizer(discriminates)
        self.log_dict({"loss": loss}, prog_bar=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.generator.parameters()), torch.optim.Adam(self.discriminator.parameters())


@job(MANUAL)
def adversarial() -> Any:
    return Adversarial()


@job(MANUAL)
def adversarial_in_mixed_precision() -> Any:
    return Training(Adversarial(), settings={"precision": "16-mixed"})


@job(MANUAL)
def critic_every_fifth_step() -> Any:
    class Critic(Adversarial):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            generates, discriminates = self.optimizers()
            optimizer = generates if batch_idx % 5 == 4 else discriminates
            with optimizer.toggle_model():
                loss = self.discriminator(self.generator(batch)).mean()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    return Critic()


@job(MANUAL)
def accumulates_by_hand() -> Any:
    class By(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer = self.optimizers()
            self.manual_backward(self(batch).mean() / 2)
            if (batch_idx + 1) % 2 == 0:
                self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad()

    return By()


@job(MANUAL)
def manual_with_closures() -> Any:
    class Closures(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer = self.optimizers()

            def closure() -> Any:
                optimizer.zero_grad()
                loss = self(batch).mean()
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), max_iter=2)

    return Closures()


@job(MANUAL)
def microbatches_by_hand() -> Any:
    class Micro(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            for part in batch.split(2):
                self.manual_backward(self(part).mean())
            optimizer.step()

    return Micro()


@job(MANUAL)
def meta_learning_inner_steps() -> Any:
    class Meta(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            outer, weight = self.optimizers(), self.head.weight
            for _ in range(2):
                inner = F.linear(self.body(batch), weight).mean()
                (gradient,) = torch.autograd.grad(inner, weight, create_graph=True)
                weight = weight - 0.1 * gradient
            outer.zero_grad()
            self.manual_backward(F.linear(self.body(batch), weight).mean())
            outer.step()

    return Meta()


@job(MANUAL)
def skips_the_optimizer_at_times() -> Any:
    class Skips(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self(batch).mean()
            if not torch.isfinite(loss):
                return None
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return {"loss": loss.detach()}

    return Skips()


@job(MANUAL)
def optimizer_without_lightnings_wrapper() -> Any:
    class Raw(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self(batch).mean().backward()
            optimizer.step()

    return Raw()


# --------------------------------------------------------------------------------------------------------- hooks


@job(HOOKS)
def own_optimizer_step_with_warmup() -> Any:
    class Warm(Net):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            for group in optimizer.param_groups:
                group["lr"] = min(1.0, (self.trainer.global_step + 1) / 500) * 1e-3
            optimizer.step(closure=optimizer_closure)

    return Warm()


@job(HOOKS)
def optimizer_step_that_skips() -> Any:
    class Skips(Net):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if batch_idx % 2 == 0:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    return Skips()


@job(HOOKS)
def own_zero_grad() -> Any:
    class Own(Net):
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            optimizer.zero_grad(set_to_none=False)

    return Own()


@job(HOOKS)
def own_clipping() -> Any:
    class Own(Net):
        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
        ) -> None:
            assert gradient_clip_val == 0.5
            self.clip_gradients(optimizer, gradient_clip_val, "norm")

    return Training(Own(), settings={"gradient_clip_val": 0.5})


@job(HOOKS)
def clipping_by_value() -> Any:
    return Training(Net(), settings={"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"})


@job(HOOKS)
def own_backward() -> Any:
    class Own(Net):
        def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
            loss.backward(*args, **kwargs, retain_graph=True)

    return Own()


@job(HOOKS)
def looks_at_gradients() -> Any:
    class Looks(Net):
        def on_after_backward(self) -> None:
            assert all(p.grad is not None for p in self.parameters())

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            norm = torch.stack([p.grad.norm() for p in self.parameters()]).norm()
            self.log("norm", norm)

        def on_before_zero_grad(self, optimizer: Any) -> None:
            self.last = [None if p.grad is None else p.grad.detach().clone() for p in self.parameters()]

    return Looks()


@job(HOOKS)
def drops_bad_gradients() -> Any:
    class Drops(Net):
        def on_after_backward(self) -> None:
            for p in self.parameters():
                if p.grad is not None and not torch.isfinite(p.grad).all():
                    p.grad = None

    return Drops()
