"""Trainings on graphs, points, tables, equations; reinforcement and other ways of learning."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.robustness.job import ON_CPU, WIDTH, Bare, Training, job, loader
from benchmarks.robustness.jobs.language import Of

GRAPHS = "graphs, points, tables, recommendations"
LEARNING = "reinforcement and other ways of learning"


class Graph(NamedTuple):
    nodes: Any
    edges: Any
    batch: Any
    count: int


@job(GRAPHS)
def graphs_in_one_batch() -> Any:
    class Passes(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            source, target = batch.edges
            hidden = self.body(batch.nodes)
            hidden = hidden.index_add(0, target, hidden[source])
            pooled = hidden.new_zeros(batch.count, WIDTH).index_add(0, batch.batch, hidden)
            return self.head(pooled).mean()

    def collate(samples: Any) -> Any:
        sizes = [len(s) for s in samples]
        starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        edges = torch.cat([torch.tensor([[0, 1], [1, 0]]) + start for start in starts], 1)
        return Graph(torch.cat(samples), edges, torch.repeat_interleave(torch.tensor(sizes)), len(sizes))

    data = loader(Of(lambda n: torch.ones(2 + n % 5, WIDTH)), collate_fn=collate)
    return Training(Passes(), data, count=lambda batch: batch.edges.shape[1] // 2)


@job(GRAPHS)
def one_graph_of_all_nodes() -> Any:
    class Whole(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, adjacency, mask = batch
            return self(adjacency @ self.body(x))[mask].sum() / len(x)

    whole = (torch.ones(10, WIDTH), torch.eye(10).to_sparse(), torch.ones(10, dtype=torch.bool))
    return Training(Whole(), DataLoader([whole], batch_size=None), **ON_CPU, count=lambda batch: 1)


@job(GRAPHS)
def point_clouds() -> Any:
    class Points(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.lift = nn.Conv1d(3, WIDTH, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            near = torch.cdist(batch, batch).topk(3, largest=False).indices
            grouped = batch[torch.arange(len(batch), device=batch.device)[:, None, None], near].mean(2)
            return self(self.lift(grouped.transpose(1, 2)).amax(2)).mean()

    return Training(Points(), loader(Of(lambda n: torch.ones(10, 3))))


@job(GRAPHS)
def tables_with_categories() -> Any:
    class Tables(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleDict({f"c{k}": nn.Embedding(5, 4) for k in range(3)})
            self.first = nn.Linear(4 + 12, WIDTH)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            parts = [self.tables[name](batch["categories"][name]) for name in self.tables]
            return self(self.first(torch.cat([batch["numbers"], *parts], 1))).mean()

    def sample(n: int) -> Any:
        return {"numbers": np.ones(4, np.float32), "categories": {f"c{k}": n % 5 for k in range(3)}}

    return Training(Tables(), loader(Of(sample)), count=lambda batch: len(batch["numbers"]))


@job(GRAPHS)
def recommends_with_sampled_negatives() -> Any:
    class Recommends(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.users, self.items = nn.Embedding(24, 8), nn.EmbeddingBag(50, 8, mode="sum")

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            users, items, offsets = batch
            negatives = torch.randint(0, 50, (len(users), 5), device=self.device)
            user = self.users(users)
            positive = (user * self.items(items, offsets)).sum(1)
            negative = torch.einsum("bd,bnd->bn", user, self.items.weight[negatives])
            return -F.logsigmoid(positive).mean() - F.logsigmoid(-negative).mean()

    def collate(samples: Any) -> Any:
        users, items = zip(*samples, strict=True)
        offsets = torch.tensor([0, *[len(i) for i in items[:-1]]]).cumsum(0)
        return torch.tensor(users), torch.cat(items), offsets

    data = loader(Of(lambda n: (n, torch.arange(1 + n % 4))), collate_fn=collate)
    return Training(Recommends(), data, count=lambda batch: len(batch[0]))


@job(GRAPHS)
def rays_of_one_scene() -> Any:
    """A field over coordinates: one long tensor that the dataset indexes, and a step that marches along rays."""

    class Field(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            origins, directions = batch[:, :3], batch[:, 3:6]
            depths = torch.linspace(0, 1, 8, device=self.device)
            points = origins[:, None] + depths[:, None] * directions[:, None]
            encoded = torch.cat([f(points * 2**k) for k in range(3) for f in (torch.sin, torch.cos)], -1)
            density = self(encoded[..., :WIDTH])[..., 0].relu()
            weights = density * torch.cumprod(1 - density.clamp(0, 0.9), 1)
            return weights.sum(1).mean()

    return Training(Field(), loader(Of(lambda n: torch.ones(6))))


@job(GRAPHS)
def solves_an_equation() -> Any:
    """Physics-informed: derivatives of the output with respect to the input enter the loss."""

    class Physics(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x = batch.requires_grad_()
            u = torch.tanh(self(x)).sum()
            (first,) = torch.autograd.grad(u, x, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
            return (second + first).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), max_iter=2, line_search_fn="strong_wolfe")

    return Training(Physics(), loader())


# ------------------------------------------------------------------------------------------------------ learning


@job(LEARNING, "any")
def reinforcement_with_a_replay_buffer() -> Any:
    """The loader reads from a buffer that the steps fill."""

    class Replay(IterableDataset):
        def __init__(self, buffer: Any) -> None:
            self.buffer = buffer

        def __iter__(self) -> Iterator[Any]:
            for k in np.random.choice(len(self.buffer), 8, replace=False):
                yield self.buffer[k]

    class Agent(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.batch_size = 4
            self.buffer: deque[Any] = deque([(torch.ones(WIDTH), 0, 1.0)] * 16, maxlen=100)
            self.target = nn.Linear(WIDTH, 3).requires_grad_(False)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            states, actions, rewards = batch
            with torch.no_grad():
                best = int(self(states[:1]).argmax())
            self.buffer.append((states[0].cpu(), best % 3, float(rewards[0])))
            values = self(states).gather(1, actions[:, None].clamp(0, 2))[:, 0]
            if self.global_step % 3 == 0:
                self.target.load_state_dict(self.head.state_dict())
            return F.mse_loss(values, rewards.float() + self.target(states).amax(1))

        def train_dataloader(self) -> Any:
            return DataLoader(Replay(self.buffer), batch_size=self.batch_size)

    return Training(Agent(), count=lambda batch: len(batch[0]))


@job(LEARNING, "any")
def reinforcement_by_policy_gradient() -> Any:
    """The data are episodes that the policy itself generates, by a generator of the module."""

    class Policy(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.batch_size, self.episodes = 4, 0

        def episode(self) -> Iterator[Any]:
            for _ in range(8):
                self.episodes += 1
                state = torch.ones(WIDTH)
                with torch.no_grad():
                    action = int(self(state[None].to(self.device)).argmax()) % 3
                yield state, action, 1.0

        def train_dataloader(self) -> Any:
            class Episodes(IterableDataset):
                __iter__ = lambda _: self.episode()  # noqa: E731

            return DataLoader(Episodes(), batch_size=self.batch_size)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            states, actions, returns = batch
            log_probabilities = self(states).log_softmax(1).gather(1, actions[:, None].clamp(0, 2))
            return -(log_probabilities[:, 0] * returns).mean()

    return Training(Policy(), count=lambda batch: len(batch[0]))


@job(LEARNING)
def active_learning_pool() -> Any:
    """The dataset grows between epochs by what the module chooses."""

    pool = [torch.ones(WIDTH)] * 12

    class Chooses(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch).mean()

        def on_train_epoch_end(self) -> None:
            pool.extend([torch.ones(WIDTH)] * 4)

        def train_dataloader(self) -> Any:
            return loader(list(pool))

    return Training(Chooses(), settings={"reload_dataloaders_every_n_epochs": 1})


@job(LEARNING)
def pseudo_labels_from_an_ensemble() -> Any:
    class Ensemble(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.members = nn.ModuleList(nn.Linear(WIDTH, 3) for _ in range(3))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            member = self.members[batch_idx % 3]
            with torch.no_grad():
                labels = torch.stack([m(batch) for m in self.members]).mean(0).argmax(1).clamp(0, 2)
            return F.cross_entropy(member(batch), labels)

    return Training(Ensemble(), loader())


@job(LEARNING)
def episodes_of_few_shots() -> Any:
    class Prototypes(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            support, query = batch[:, :4], batch[:, 4:]
            prototypes = self.body(support).mean(1, keepdim=True)
            return torch.cdist(self.body(query), prototypes).mean() + self(support).mean()

    return Training(Prototypes(), loader(Of(lambda n: torch.ones(6, WIDTH)), batch_size=2))


@job(LEARNING)
def differential_privacy_by_hooks() -> Any:
    class Private(Bare):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer = self.optimizers()
            total = [torch.zeros_like(p) for p in self.parameters()]
            for row in batch:
                gradients = torch.autograd.grad(self(row[None]).mean(), list(self.parameters()))
                norm = torch.stack([g.norm() for g in gradients]).norm()
                for kept, g in zip(total, gradients, strict=True):
                    kept.add_(g / norm.clamp(min=1.0))
            for p, g in zip(self.parameters(), total, strict=True):
                p.grad = (g + torch.randn_like(g)) / len(batch)
            optimizer.step()

    return Training(Private(), loader())
