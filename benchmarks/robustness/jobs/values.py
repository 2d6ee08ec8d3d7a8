"""Steps that read values, and steps that draw random numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.robustness.job import ON_CPU, WIDTH
from benchmarks.robustness.jobs.tensors import step

VALUES = "steps that read values"
RANDOM = "steps that draw random numbers"


@step(VALUES)
def item_in_the_step(net: Any, batch: Any) -> Any:
    loss = net(batch).mean()
    net.history = [*getattr(net, "history", []), loss.item()]
    return loss


@step(VALUES, **ON_CPU)
def boolean_mask(net: Any, batch: Any) -> Any:
    out = net(batch)
    return out[out > out.detach().mean()].sum() + out.sum()


@step(VALUES)
def asserts_on_values(net: Any, batch: Any) -> Any:
    assert not torch.isinf(batch).any(), "broken data"
    assert not torch.isnan(net.head.weight).any()
    return net(batch).mean()


@step(VALUES)
def branches_on_values(net: Any, batch: Any) -> Any:
    out = net(batch)
    return out.mean() if out.sum() > 0 else -out.mean()


@step(VALUES, **ON_CPU)
def nonzero_and_index(net: Any, batch: Any) -> Any:
    out = net(batch)
    rows = (out.sum(1) > -1e9).nonzero().flatten()
    return out[rows].sum() / max(1, len(rows))


@step(VALUES, **ON_CPU)
def unique_labels(net: Any, batch: Any) -> Any:
    labels = batch.sum(1).long()
    loss = net(batch).mean()
    for label in torch.unique(labels).tolist():
        loss = loss + net(batch[labels == label]).sum()
    return loss


@step(VALUES)
def loops_over_samples(net: Any, batch: Any) -> Any:
    return torch.stack([net(row[None]).mean() for row in batch]).mean()


@step(VALUES)
def loops_until_converged(net: Any, batch: Any) -> Any:
    x, rounds = net.body(batch), 0
    while float(x.norm()) > 1.0 and rounds < 5:
        x, rounds = x / 2, rounds + 1
    return net.head(x).mean()


@step(VALUES)
def matches_on_the_host(net: Any, batch: Any) -> Any:
    from scipy.optimize import linear_sum_assignment

    out = net(batch)
    rows, columns = linear_sum_assignment(out.detach().cpu().numpy())
    return out[torch.as_tensor(rows), torch.as_tensor(columns)].mean()


@step(VALUES)
def pads_to_the_longest(net: Any, batch: Any) -> Any:
    lengths = [1 + int(n) % 5 for n in batch.sum(1).tolist()]
    rows = nn.utils.rnn.pad_sequence([batch[k].expand(n, WIDTH) for k, n in enumerate(lengths)], batch_first=True)
    return net(rows).mean()


# -------------------------------------------------------------------------------------------------------- random


@step(RANDOM)
def permutes_the_batch(net: Any, batch: Any) -> Any:
    mixed = float(np.random.beta(0.5, 0.5)) * batch + batch[torch.randperm(len(batch), device=batch.device)]
    return net(mixed).mean()


@step(RANDOM)
def drops_layers_at_random(net: Any, batch: Any) -> Any:
    hidden = net.body(batch) if random.random() < 0.5 else batch
    return net.head(F.dropout(hidden, 0.3)).mean()


@step(RANDOM)
def draws_the_size(net: Any, batch: Any) -> Any:
    length = int(torch.randint(1, 5, ()))
    return net(batch[:, None].expand(-1, length, -1)).mean()


@step(RANDOM)
def samples_from_distributions(net: Any, batch: Any) -> Any:
    normal = torch.distributions.Normal(net.body(batch), 1.0, validate_args=False)
    return net.head(normal.rsample()).mean() + torch.bernoulli(torch.full_like(batch, 0.5)).mean()


@step(RANDOM)
def multinomial_choice(net: Any, batch: Any) -> Any:
    picks = torch.multinomial(torch.ones(len(batch), 3, device=batch.device), 1)
    return net(batch).gather(1, picks).mean()
