"""Projects from templates, and modules of many tasks: classifiers, series, graphs, several loaders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset, random_split
from torchmetrics import MaxMetric, MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from benchmarks.clients.job import job
from benchmarks.clients.styles.common import trainer


# ------------------------------------------------------------ the template: everything made outside, by partials
class SimpleDenseNet(nn.Module):
    def __init__(self, input_size: int = 784, width: int = 64, output_size: int = 10) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(input_size, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, output_size)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch_size, _, _, _ = x.size()
        return self.model(x.view(batch_size, -1))


class TemplateModule(pl.LightningModule):
    """Keeps its partials in ``hparams``, takes the Trainer's model, and resets its metrics when training starts."""

    def __init__(self, net: nn.Module, optimizer: Callable[..., Any], scheduler: Any, compile: bool) -> None:  # noqa: A002
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["net"])
        self.net, self.criterion = net, nn.CrossEntropyLoss()
        self.train_acc, self.val_acc = MulticlassAccuracy(10), MulticlassAccuracy(10)
        self.train_loss, self.val_loss, self.val_acc_best = MeanMetric(), MeanMetric(), MaxMetric()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def on_train_start(self) -> None:
        self.val_loss.reset()
        self.val_acc.reset()
        self.val_acc_best.reset()

    def model_step(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, y = batch
        logits = self.forward(x)
        return self.criterion(logits, y), torch.argmax(logits, dim=1), y

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss, preds, targets = self.model_step(batch)
        self.train_loss(loss)
        self.train_acc(preds, targets)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, preds, targets = self.model_step(batch)
        self.val_loss(loss)
        self.val_acc(preds, targets)
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("val/acc", self.val_acc, on_step=False, on_epoch=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        self.val_acc_best(self.val_acc.compute())
        self.log("val/acc_best", self.val_acc_best.compute(), sync_dist=True, prog_bar=True)

    def setup(self, stage: str) -> None:
        if self.hparams.compile and stage == "fit":
            self.net = torch.compile(self.net)

    def configure_optimizers(self) -> Any:
        optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
        if self.hparams.scheduler is None:
            return {"optimizer": optimizer}
        scheduler = {"scheduler": self.hparams.scheduler(optimizer=optimizer), "monitor": "val/loss"}
        return {"optimizer": optimizer, "lr_scheduler": {**scheduler, "interval": "epoch", "frequency": 1}}


class TemplateData(pl.LightningDataModule):
    """Divides its batch size among the ranks in ``setup``, once."""

    def __init__(self, batch_size: int = 4, num_workers: int = 0, pin_memory: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.data_train, self.data_val = None, None
        self.batch_size_per_device = batch_size

    @property
    def num_classes(self) -> int:
        return 10

    def setup(self, stage: str | None = None) -> None:
        if self.trainer is not None:
            if self.hparams.batch_size % self.trainer.world_size != 0:
                raise RuntimeError("the batch size is not divisible by the number of devices")
            self.batch_size_per_device = self.hparams.batch_size // self.trainer.world_size
        if not self.data_train and not self.data_val:
            halves = [TensorDataset(torch.rand(30, 1, 28, 28), torch.zeros(30, dtype=torch.long)) for _ in range(2)]
            generator = torch.Generator().manual_seed(42)
            self.data_train, self.data_val = random_split(ConcatDataset(halves), (48, 12), generator=generator)

    def train_dataloader(self) -> Any:
        return DataLoader(self.data_train, batch_size=self.batch_size_per_device, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.data_val, batch_size=self.batch_size_per_device)


def template(compiled: bool) -> TemplateModule:
    scheduler = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode="min", factor=0.1, patience=10)
    return TemplateModule(SimpleDenseNet(), partial(torch.optim.Adam, lr=1e-3), scheduler, compiled)


@job(size=4)
def hydra_template(callbacks: list[Any]) -> None:
    """The most copied template."""
    trainer(callbacks).fit(template(False), datamodule=TemplateData())


@job(size=4)
def hydra_template_compiled(callbacks: list[Any]) -> None:
    """The same, compiled in ``setup``."""
    trainer(callbacks).fit(template(True), datamodule=TemplateData())


# ------------------------------------------------------------------------------ several tasks, a loader for each
class ManyTasks(pl.LightningModule):
    """A trunk with a head a task; losses weighted by learned uncertainty; metrics by task."""

    def __init__(self, tasks: dict[str, int]) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.trunk = nn.Sequential(nn.Linear(16, 64), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(64, classes) for name, classes in tasks.items()})
        self.log_vars = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in tasks})
        metrics = {n: MetricCollection([MulticlassAccuracy(c), MulticlassAUROC(c)]) for n, c in tasks.items()}
        self.metrics = nn.ModuleDict(metrics)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        total = torch.zeros((), device=self.device)
        for name, part in batch.items():
            logits = self.heads[name](self.trunk(part["x"]))
            loss = F.cross_entropy(logits, part["y"])
            self.metrics[name].update(logits.softmax(-1), part["y"])
            self.log(f"{name}/loss", loss, batch_size=len(part["y"]))
            total = total + torch.exp(-self.log_vars[name]) * loss + self.log_vars[name]
        return total

    def on_train_epoch_end(self) -> None:
        for name, metric in self.metrics.items():
            self.log_dict({f"{name}/{key}": value for key, value in metric.compute().items()})
            metric.reset()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


class Rows(Dataset[Any]):
    def __init__(self, length: int, classes: int) -> None:
        self.length, self.classes = length, classes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.rand(16), "y": index % self.classes, "name": f"row {index}"}


@job(size=4)
def many_tasks(callbacks: list[Any]) -> None:
    """A dictionary of loaders."""
    tasks = {"colour": 3, "shape": 5}
    loaders = {name: DataLoader(Rows(40, classes), 4, shuffle=True) for name, classes in tasks.items()}
    trainer(callbacks).fit(ManyTasks(tasks), loaders)


class TasksInTurn(pl.LightningDataModule):
    """A combined loader with sizes of its own for each task."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        from pytorch_lightning.utilities import CombinedLoader

        loaders = {
            "colour": DataLoader(Rows(40, 3), self.batch_size),
            "shape": DataLoader(Rows(20, 5), self.batch_size),
        }
        return CombinedLoader(loaders, "max_size_cycle")


@job(size=4)
def many_tasks_cycled(callbacks: list[Any]) -> None:
    """A CombinedLoader of a datamodule, the shorter one cycled."""
    trainer(callbacks).fit(ManyTasks({"colour": 3, "shape": 5}), datamodule=TasksInTurn())


# -------------------------------------------------------------------------------------------------------- graphs
class Graph:
    """A graph, or several as one: nodes, edges and the graph of each node; moved by ``to``, as a batch of graphs is."""

    def __init__(self, x: torch.Tensor, edge_index: torch.Tensor, y: torch.Tensor, batch: torch.Tensor) -> None:
        self.x, self.edge_index, self.y, self.batch = x, edge_index, y, batch

    @property
    def num_graphs(self) -> int:
        return len(self.y)

    @classmethod
    def from_list(cls, graphs: list[Graph]) -> Graph:
        starts = torch.tensor([0, *(len(graph.x) for graph in graphs[:-1])]).cumsum(0)
        edges = [graph.edge_index + start for graph, start in zip(graphs, starts, strict=True)]
        index = [torch.full((len(graph.x),), i) for i, graph in enumerate(graphs)]
        joined = torch.cat([g.x for g in graphs]), torch.cat(edges, 1), torch.cat([g.y for g in graphs])
        return cls(*joined, torch.cat(index))

    def to(self, device: Any, *args: Any, **kwargs: Any) -> Graph:
        moved = (tensor.to(device, *args, **kwargs) for tensor in (self.x, self.edge_index, self.y, self.batch))
        return Graph(*moved)


class Molecules(Dataset[Graph]):
    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> Graph:
        nodes, edges = 5 + index % 6, 12 + 2 * (index % 5)
        edge_index = torch.randint(0, nodes, (2, edges))
        return Graph(torch.rand(nodes, 8), edge_index, torch.rand(1), torch.zeros(nodes, dtype=torch.long))


class GraphLoader(DataLoader[Graph]):
    """A DataLoader that brings its own collation, and refuses the user's."""

    def __init__(self, dataset: Any, batch_size: int = 1, shuffle: bool = False, **kwargs: Any) -> None:
        kwargs.pop("collate_fn", None)
        super().__init__(dataset, batch_size, shuffle, collate_fn=Graph.from_list, **kwargs)


class GraphNetwork(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 32), nn.Linear(32, 32)])
        self.norm, self.head = nn.BatchNorm1d(32), nn.Linear(32, 1)

    def forward(self, graph: Graph) -> torch.Tensor:
        source, target = graph.edge_index
        x = graph.x
        for layer in self.layers:
            h = layer(x)
            x = F.relu(torch.zeros_like(h).index_add_(0, target, h[source]) + h)
        x = self.norm(x)
        pooled = torch.zeros(graph.num_graphs, x.shape[1], device=x.device)
        return self.head(pooled.scatter_add_(0, graph.batch[:, None].expand_as(x), x))

    def training_step(self, batch: Graph, batch_idx: int) -> torch.Tensor:
        loss = F.l1_loss(self(batch)[:, 0], batch.y)
        self.log("train_mae", loss, batch_size=batch.num_graphs)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), amsgrad=True)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": plateau, "monitor": "train_mae"}


@job(size=4, count=lambda batch: batch.num_graphs)
def graphs(callbacks: list[Any]) -> None:
    """Batches of graphs as one graph, in a class of their own."""
    trainer(callbacks).fit(GraphNetwork(), GraphLoader(Molecules(), 4, shuffle=True))


# -------------------------------------------------------------------------------------------------------- series
class Windows(Dataset[Any]):
    """Windows of a long series, kept as a dictionary and a pair of target and weight."""

    def __init__(self, encoder: int = 24, decoder: int = 6) -> None:
        self.series, self.encoder, self.decoder = torch.randn(96), encoder, decoder

    def __len__(self) -> int:
        return len(self.series) - self.encoder - self.decoder

    def __getitem__(self, index: int) -> Any:
        middle = index + self.encoder
        x = {"encoder_cont": self.series[index:middle, None], "encoder_lengths": self.encoder, "groups": index % 3}
        return x, (self.series[middle : middle + self.decoder], None)

    def to_dataloader(self, train: bool = True, batch_size: int = 4, **kwargs: Any) -> DataLoader[Any]:
        drop_last = train and len(self) > batch_size
        return DataLoader(self, batch_size, train, collate_fn=collate, drop_last=drop_last, **kwargs)


def collate(samples: list[Any]) -> Any:
    x = {
        "encoder_cont": torch.stack([each[0]["encoder_cont"] for each in samples]),
        "encoder_lengths": torch.tensor([each[0]["encoder_lengths"] for each in samples]),
        "groups": torch.tensor([[each[0]["groups"]] for each in samples]),
    }
    return x, (torch.stack([each[1][0] for each in samples]), None)


class Forecaster(pl.LightningModule):
    """Steps and logs by one function; keeps outputs for the epoch's end; its loss is a metric."""

    def __init__(self, output_size: int = 6, hidden: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding, self.rnn = nn.Embedding(3, hidden), nn.GRU(1 + hidden, hidden, 2, dropout=0.1, batch_first=True)
        self.head, self.training_step_outputs = nn.Linear(hidden, output_size * 3), []
        self.quantiles = [0.1, 0.5, 0.9]

    @property
    def current_stage(self) -> str:
        return {"train": "train", "validate": "val", "sanity_check": "val"}[self.trainer.state.stage]

    def step(self, x: dict[str, torch.Tensor], y: Any, batch_idx: int) -> dict[str, torch.Tensor]:
        groups = self.embedding(x["groups"]).expand(-1, x["encoder_cont"].shape[1], -1)
        packed = nn.utils.rnn.pack_padded_sequence(
            torch.cat((x["encoder_cont"], groups), -1), x["encoder_lengths"].cpu().clamp(min=1), batch_first=True,
            enforce_sorted=False,
        )  # fmt: skip
        _, state = self.rnn(packed)
        errors = y[0][..., None] - self.head(state[-1]).unflatten(-1, (-1, 3))
        losses = [torch.max((q - 1) * errors[..., i], q * errors[..., i]) for i, q in enumerate(self.quantiles)]
        loss = torch.stack(losses).mean()
        self.log(f"{self.current_stage}_loss", loss, on_step=self.training, on_epoch=True, batch_size=len(y[0]))
        return {"loss": loss, "n_samples": torch.tensor(len(y[0]))}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, torch.Tensor]:
        out = self.step(*batch, batch_idx)
        self.training_step_outputs.append({k: v.detach() for k, v in out.items()})
        return out

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(*batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        torch.stack([each["loss"] for each in self.training_step_outputs]).mean()
        self.training_step_outputs.clear()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


@job(size=4)
def forecaster(callbacks: list[Any]) -> None:
    """Packed sequences, weights of None, and a stage that the Trainer names."""
    windows = Windows()
    trainer(callbacks).fit(Forecaster(), windows.to_dataloader(), windows.to_dataloader(train=False, batch_size=8))
