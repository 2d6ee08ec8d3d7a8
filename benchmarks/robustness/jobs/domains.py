"""Trainings of many fields, in small: language, speech, vision, detection, graphs, reinforcement learning, and more."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset

from benchmarks.robustness.job import WIDTH, Bare, Training, job, loader

LANGUAGE = "language, speech, sequences"
VISION = "vision, detection, generation"
GRAPHS = "graphs, points, tables, recommendations"
LEARNING = "reinforcement and other ways of learning"


class Of(Dataset):
    def __init__(self, sample: Any, count: int = 24) -> None:
        self.sample, self.count = sample, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.sample(index)


# ------------------------------------------------------------------------------------------------------ language


@job(LANGUAGE)
def text_with_padding() -> Any:
    class Language(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.rnn, self.out = nn.Embedding(50, WIDTH, 0), nn.GRU(WIDTH, WIDTH), nn.Linear(WIDTH, 50)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            tokens, lengths = batch
            packed = pack_padded_sequence(self.table(tokens.T), lengths.cpu(), enforce_sorted=False)
            states, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0])
            return F.cross_entropy(self.out(states).flatten(0, 1), tokens.T.flatten(), ignore_index=0)

    def pad(samples: Any) -> Any:
        return pad_sequence(samples, batch_first=True), torch.tensor([len(s) for s in samples])

    data = loader(Of(lambda n: torch.arange(1, 4 + n % 9)), collate_fn=pad)
    return Training(Language(), data, count=lambda batch: len(batch[0]))


@job(LANGUAGE)
def causal_language_model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    class Causal(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(**batch, labels=batch["input_ids"]).loss

    def encoded(n: int) -> Any:
        return {"input_ids": torch.arange(8), "attention_mask": torch.ones(8, dtype=torch.long)}

    return Training(Causal(), loader(Of(encoded)), count=lambda batch: len(batch["input_ids"]))


@job(LANGUAGE)
def masked_language_model_with_a_collator() -> Any:
    from transformers import BatchEncoding, BertConfig, BertForMaskedLM

    class Masked(Bare):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
            self.model = BertForMaskedLM(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.model(**batch).loss
            self.log("perplexity", math.exp(min(10.0, loss.item())))
            return loss

    def collate(samples: Any) -> Any:
        ids = pad_sequence(samples, batch_first=True)
        labels = ids.masked_fill(torch.rand(ids.shape) < 0.5, -100)
        return BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels})

    data = loader(Of(lambda n: torch.arange(1, 5 + n % 9)), collate_fn=collate)
    return Training(Masked(), data, count=lambda batch: len(batch["input_ids"]))


@job(LANGUAGE)
def tokens_per_batch() -> Any:
    """A batch sampler with a budget of tokens."""

    class Tokens:
        def __init__(self) -> None:
            self.batches: list[list[int]] = [[]]
            for n in range(24):
                if sum(3 + k for k in self.batches[-1]) + 3 + n > 60:
                    self.batches.append([])
                self.batches[-1].append(n)

        def __len__(self) -> int:
            return len(self.batches)

        def __iter__(self) -> Iterator[list[int]]:
            return iter(self.batches)

    class Mean(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch.mean(1)).mean()

    pad = lambda samples: pad_sequence(samples, batch_first=True)  # noqa: E731
    return Training(Mean(), DataLoader(Of(lambda n: torch.ones(3 + n, WIDTH)), batch_sampler=Tokens(), collate_fn=pad))


@job(LANGUAGE)
def audio_of_varied_lengths() -> Any:
    class Speech(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Conv1d(33, WIDTH, 3, padding=1)
            self.out = nn.Linear(WIDTH, 5)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            waves, lengths, targets, target_lengths = batch
            spectrum = torch.stft(
                waves, 64, window=torch.hann_window(64, device=waves.device), return_complex=True
            ).abs()
            logits = self.out(self.features(spectrum).transpose(1, 2)).log_softmax(2).transpose(0, 1)
            frames = (lengths // 16 + 1).clamp(max=len(logits))
            return F.ctc_loss(logits, targets, frames, target_lengths, zero_infinity=True)

    def collate(samples: Any) -> Any:
        waves, targets = zip(*samples, strict=True)
        lengths = [torch.tensor([len(s) for s in each]) for each in (waves, targets)]
        return pad_sequence(waves, True), lengths[0], pad_sequence(targets, True), lengths[1]

    data = loader(Of(lambda n: (torch.ones(400 + 20 * n), torch.ones(2 + n % 3).long())), collate_fn=collate)
    return Training(Speech(), data, count=lambda batch: len(batch[0]))


@job(LANGUAGE)
def forecasting_with_windows() -> Any:
    class Forecast(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(1, WIDTH, batch_first=True), nn.Linear(WIDTH, 2)
            self.state: Any = None

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            past, future = batch["past"], batch["future"]
            scale = past.abs().mean(1, keepdim=True).clamp(min=1e-3)
            states, self.state = self.rnn(past[..., None] / scale[..., None])
            mean, spread = self.out(states[:, -1:]).chunk(2, -1)
            distribution = torch.distributions.StudentT(3.0, mean, F.softplus(spread) + 1e-3, validate_args=False)
            return -distribution.log_prob(future[..., None] / scale[..., None]).mean()

    series = torch.arange(64.0)
    data = loader(Of(lambda n: {"past": series[n : n + 12], "future": series[n + 12 : n + 16], "item": f"s{n}"}))
    return Training(Forecast(), data, count=lambda batch: len(batch["past"]))


@job(LANGUAGE)
def beam_search_in_validation() -> Any:
    class Decodes(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch).mean()

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            tokens = []
            while len(tokens) < 5:
                tokens.append(int(self(batch[:1]).argmax()))
            self.log("length", float(len(tokens)))

    return Training(Decodes(), loader(), loader())


# -------------------------------------------------------------------------------------------------------- vision


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
    return Training(Detects(), data, settings={"max_epochs": 1}, count=lambda batch: len(batch[0]))


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
            (a, b, *small), _, names = batch
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


# -------------------------------------------------------------------------------------------------------- graphs


class Graph(NamedTuple):
    nodes: Any
    edges: Any
    batch: Any


@job(GRAPHS)
def graphs_in_one_batch() -> Any:
    class Passes(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            source, target = batch.edges
            hidden = self.body(batch.nodes)
            hidden = hidden.index_add(0, target, hidden[source])
            count = int(batch.batch.max()) + 1
            pooled = hidden.new_zeros(max(count, 1), WIDTH).index_add(0, batch.batch.clamp(max=count - 1), hidden)
            return self.head(pooled).mean()

    def collate(samples: Any) -> Any:
        sizes = [len(s) for s in samples]
        starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        edges = torch.cat([torch.tensor([[0, 1], [1, 0]]) + start for start in starts], 1)
        return Graph(torch.cat(samples), edges, torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)))

    data = loader(Of(lambda n: torch.ones(2 + n % 5, WIDTH)), collate_fn=collate)
    return Training(Passes(), data, count=lambda batch: batch.edges.shape[1] // 2)


@job(GRAPHS)
def one_graph_of_all_nodes() -> Any:
    class Whole(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, adjacency, mask = batch
            return self(adjacency @ self.body(x))[mask].sum() / len(x)

    whole = (torch.ones(10, WIDTH), torch.eye(10).to_sparse(), torch.ones(10, dtype=torch.bool))
    return Training(Whole(), DataLoader([whole], batch_size=None), count=lambda batch: 1)


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
