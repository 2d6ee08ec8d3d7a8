"""Modules and layers: lazy, tied, parametrized, compiled, frozen, averaged, with attributes of every kind."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm
from torch.optim.swa_utils import AveragedModel

from benchmarks.robustness.job import WIDTH, Bare, Net, Training, job, loader

LAYERS = "layers: lazy, tied, parametrized, normalized, recurrent"
COMPILED = "torch.compile"
TEACHERS = "averages, teachers, frozen parts"
ATTRIBUTES = "attributes of every kind"


class With(Net):
    """A network with a body of one's own."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body


class Reads(nn.Module):
    """Wraps a layer that wants other shapes, or returns more."""

    def __init__(self, layer: nn.Module, call: Any) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Any) -> Any:
        return self.call(self.layer, x)


class Symmetric(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.triu() + x.triu(1).transpose(-1, -2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.down.weight = self.up.weight

    def forward(self, x: Any) -> Any:
        return self.down(self.up(x).relu())


def symmetric() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 4, 4)), *layers, nn.Flatten())


def sequences(layer: nn.Module, call: Any) -> nn.Module:
    return Reads(layer, lambda own, x: call(own, x[:, None].expand(-1, 3, -1)))


def pruned() -> nn.Module:
    from torch.nn.utils import prune

    return prune.random_unstructured(nn.Linear(WIDTH, WIDTH), "weight", 0.5)


BODIES: dict[str, Any] = {
    "lazy_linear": lambda: nn.Sequential(nn.LazyLinear(WIDTH), nn.LazyBatchNorm1d()),
    "lazy_convolution": lambda: images(nn.LazyConv2d(1, 3, padding=1)),
    "weight_normed": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "spectral_normed": lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "spectral_normed_by_hooks": lambda: spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)),
    "symmetric_weight": symmetric,
    "pruned_weight": pruned,
    "tied_weights": Tied,
    "batch_norm": lambda: nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)),
    "batch_norm_of_images": lambda: images(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)),
    "instance_norm": lambda: images(nn.InstanceNorm2d(1, affine=True, track_running_stats=True)),
    "sync_batch_norm": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(WIDTH)),
    "lstm": lambda: sequences(nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, dropout=0.1), lambda own, x: own(x)[0][:, 0]),
    "bidirectional_gru": lambda: sequences(
        nn.GRU(WIDTH, 8, bidirectional=True, batch_first=True), lambda own, x: own(x)[0][:, 0]
    ),
    "attention": lambda: sequences(
        nn.MultiheadAttention(WIDTH, 2, batch_first=True), lambda own, x: own(x, x, x)[0][:, 0]
    ),
    "transformer": lambda: sequences(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True), 2),
        lambda own, x: own(x)[:, 0],
    ),
    "embedding_bag": lambda: Reads(nn.EmbeddingBag(9, WIDTH), lambda own, x: own((x > 0).long())),
    "parameter_collections": lambda: Reads(
        nn.ParameterDict({"a": nn.Parameter(torch.ones(WIDTH))}), lambda own, x: x * own["a"]
    ),
    "timm_network": lambda: timm_network(),
}


def timm_network() -> nn.Module:
    import timm

    network = timm.create_model("resnet10t", num_classes=WIDTH, in_chans=1)
    return nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Upsample(scale_factor=8), network)


for _name, _body in BODIES.items():
    job(LAYERS, name=_name)(lambda body=_body: With(body()))


@job(LAYERS)
def lazy_in_configure_model() -> Any:
    class Lazy(Net):
        def configure_model(self) -> None:
            self.lazy = nn.LazyLinear(WIDTH)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(self.lazy(batch), batch_idx)

    return Lazy()


@job(LAYERS)
def layers_made_in_setup_from_the_data() -> Any:
    class Makes(Bare):
        def setup(self, stage: str) -> None:
            width = self.trainer.datamodule.width
            self.stem = nn.Linear(width, WIDTH)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(self.stem(batch)).mean()

    class Data(pl.LightningDataModule):
        batch_size = 4

        def setup(self, stage: str) -> None:
            self.width = WIDTH

        def train_dataloader(self) -> Any:
            return loader(batch_size=self.batch_size)

    return Training(Makes(), Data())


@job(LAYERS)
def layers_made_in_the_first_step() -> Any:
    class Makes(Net):
        def __init__(self) -> None:
            super().__init__()
            self.stem: Any = None

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.stem is None:
                self.stem = nn.Linear(batch.shape[1], WIDTH).to(batch.device)
            return self(self.stem(batch)).mean()

    return Makes()


@job(LAYERS)
def parameters_left_without_gradient() -> Any:
    class Unused(Net):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(()))

    return Unused()


@job(LAYERS)
def mixture_of_experts() -> Any:
    class Experts(Net):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.router = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)), nn.Linear(WIDTH, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            weight, chosen = self.router(batch).softmax(1).max(1)
            out = torch.zeros_like(batch)
            for k, expert in enumerate(self.experts):
                out = out + expert(batch) * (weight * (chosen == k))[:, None]
            return self(out).mean()

    return Experts()


# ------------------------------------------------------------------------------------------------------ compiled


@job(COMPILED)
def compiled_part() -> Any:
    net = Net()
    net.body = torch.compile(net.body, backend="eager")
    return net


@job(COMPILED)
def compiled_in_configure_model() -> Any:
    class Compiles(Net):
        def configure_model(self) -> None:
            self.body.compile(backend="eager")

    return Compiles()


@job(COMPILED)
def compiled_module() -> Any:
    return torch.compile(Net(), backend="eager")


@job(COMPILED)
def compiled_function_of_the_module() -> Any:
    class Compiles(Net):
        def __init__(self) -> None:
            super().__init__()
            self.loss = torch.compile(self.plain_loss, backend="eager", dynamic=False)

        def plain_loss(self, x: Any) -> Any:
            return self.head(x).square().mean()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(self.body(batch))

    return Compiles()


@job(COMPILED)
def compiled_in_the_first_step() -> Any:
    class Compiles(Net):
        compiled: Any = None

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.compiled = self.compiled or torch.compile(self.forward, backend="aot_eager")
            return self.compiled(batch).mean()

    return Compiles()


# ------------------------------------------------------------------------------------------------------ teachers


class Student(Net):
    """Learns from a teacher that ``make`` derives from its body."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.teacher = make(self.body)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            target = self.teacher(batch)
        return F.mse_loss(self.body(batch), target) + super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        if isinstance(self.teacher, AveragedModel):
            self.teacher.update_parameters(self.body)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([*self.body.parameters(), *self.head.parameters()])


class Outside:
    """Holds a module out of the sight of its owner's parameters."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, x: Any) -> Any:
        return self.module.to(x.device)(x)


job(TEACHERS, name="average_of_weights")(lambda: Student(AveragedModel))
job(TEACHERS, name="frozen_copy")(lambda: Student(lambda body: copy.deepcopy(body).requires_grad_(False).eval()))
job(TEACHERS, name="teacher_in_a_list")(lambda: Student(lambda body: Outside([copy.deepcopy(body)][0])))
job(TEACHERS, name="teacher_in_a_closure")(lambda: Student(lambda body: closed_over(copy.deepcopy(body))))
job(TEACHERS, name="teacher_is_the_student")(lambda: Student(lambda body: functools.partial(nn.Linear.forward, body)))


def closed_over(teacher: Any) -> Any:
    return lambda x: teacher.to(x.device)(x)


@job(TEACHERS)
def average_by_hand_with_state() -> Any:
    class Momentum(Net):
        def __init__(self) -> None:
            super().__init__()
            self.shadow = {name: p.detach().clone() for name, p in self.named_parameters()}
            self.decay = 0.9

        def on_fit_start(self) -> None:
            self.shadow = {name: value.to(self.device) for name, value in self.shadow.items()}

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            for name, p in self.named_parameters():
                self.shadow[name].mul_(self.decay).add_(p.detach(), alpha=1 - self.decay)

        def on_save_checkpoint(self, checkpoint: Any) -> None:
            checkpoint["shadow"] = self.shadow

        def on_load_checkpoint(self, checkpoint: Any) -> None:
            self.shadow = checkpoint["shadow"]

    return Training(Momentum(), settings={"enable_checkpointing": True})


@job(TEACHERS)
def queue_of_keys() -> Any:
    """Momentum contrast: a queue in a buffer, whose length the batch size divides."""

    class Contrast(Student):
        def __init__(self) -> None:
            super().__init__(lambda body: copy.deepcopy(body).requires_grad_(False))
            self.register_buffer("queue", torch.ones(48, WIDTH))
            self.position = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with torch.no_grad():
                keys = self.teacher(batch)
            loss = F.cross_entropy(
                self.body(batch) @ self.queue.clone().T, torch.zeros(len(batch), device=batch.device).long()
            )
            rows = torch.arange(self.position, self.position + len(batch), device=batch.device) % 48
            self.queue[rows] = keys
            self.position = (self.position + len(batch)) % 48
            return loss + self.head(keys).mean()

    return Contrast()


# ---------------------------------------------------------------------------------------------------- attributes


class Owns(Net):
    """Has an attribute, made by ``make`` from the module."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.own = make(self)


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    width: int = WIDTH
    weight: Any = None


class OwnGetattr(Net):
    def __getattr__(self, name: str) -> Any:
        if name == "alias":
            return self.body
        return super().__getattr__(name)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.head(self.alias(batch)).mean()


class CachedProperty(Net):
    @functools.cached_property
    def scale(self) -> Any:
        return torch.ones((), device=self.device)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * self.scale


class ReadOnlyBatchSize(Bare):
    def __init__(self) -> None:
        super().__init__()
        self.data = {"size": 4}

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        return self.data["size"]

    def train_dataloader(self) -> Any:
        return loader(batch_size=self.batch_size)


class RefusesNewAttributes(Net):
    ready = False

    def __init__(self) -> None:
        super().__init__()
        self.ready = True

    def __setattr__(self, name: str, value: Any) -> None:
        declared = name in self.__dict__ or name == "trainer" or name.startswith("_")
        if self.ready and not declared and not isinstance(value, nn.Module):
            raise AttributeError(f"{name} is not declared")
        super().__setattr__(name, value)


class ChecksBatchSize(Net):
    """Takes the batch sizes that it knows alone."""

    size = 4

    @property
    def batch_size(self) -> int:
        return self.size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        if value > 8:
            raise ValueError(f"batch_size is at most 8, not {value}")
        self.size = value


class CallCounting(Net):
    def forward(self, x: Any) -> Any:
        self.forwards = getattr(self, "forwards", 0) + 1
        return super().forward(x)


job(ATTRIBUTES, name="frozen_config_with_a_weight")(lambda: Owns(lambda net: Config(weight=net.body.weight)))
job(ATTRIBUTES, name="own_getattr")(OwnGetattr)
job(ATTRIBUTES, name="cached_property")(CachedProperty)
job(ATTRIBUTES, name="read_only_batch_size")(ReadOnlyBatchSize)
job(ATTRIBUTES, name="refuses_new_attributes")(RefusesNewAttributes)
job(ATTRIBUTES, name="batch_size_is_checked")(ChecksBatchSize)
job(ATTRIBUTES, name="counts_forwards")(CallCounting)
job(ATTRIBUTES, name="cached_function_of_the_module")(lambda: Owns(lambda net: functools.lru_cache(net.forward)))
job(ATTRIBUTES, name="partial_of_the_module")(lambda: Owns(lambda net: functools.partial(net.forward)))
job(ATTRIBUTES, name="whole_trainer_elsewhere")(lambda: Owns(lambda net: pl.Trainer(logger=False, accelerator="cpu")))
job(ATTRIBUTES, name="classes_and_exceptions")(
    lambda: Owns(lambda net: (type(net), ValueError("a"), Ellipsis, slice(3)))
)
job(ATTRIBUTES, name="numpy_and_masked_arrays")(lambda: Owns(lambda net: numpy_things()))
job(ATTRIBUTES, name="batch_size_none")(lambda: sized(None))
job(ATTRIBUTES, name="batch_size_is_a_tensor")(lambda: sized(torch.tensor(4)))
job(ATTRIBUTES, name="batch_size_is_text")(lambda: sized("4"))
job(ATTRIBUTES, name="batch_size_by_stage")(lambda: sized({"train": 4}))


def numpy_things() -> Any:
    import numpy as np

    return (
        np.ma.masked_array([1, 2], [0, 1]),
        np.memmap("m.bin", np.float32, "w+", shape=(4,)),
        np.random.RandomState(1),
    )


def sized(size: Any) -> Any:
    class Sized(Net):
        def __init__(self) -> None:
            super().__init__()
            self.batch_size = size

        def train_dataloader(self) -> Any:
            size = self.batch_size["train"] if isinstance(self.batch_size, dict) else self.batch_size
            return loader(batch_size=int(size or 4))

    return Sized()
