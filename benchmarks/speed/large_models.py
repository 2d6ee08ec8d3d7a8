"""Decoders of 7 and 70 billion parameters, planned for cards that share them: what planning takes of the host.

``python -m benchmarks.speed.large_models 7 70`` prints a JSON line for each: what was planned, the events of its trace,
and the bytes of the host's memory at their highest. No weight is ever made.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.strategies import FSDPStrategy
from torch import nn

import lightning_memplan as mp

#: billions of parameters -> width, width of the feed-forward part, heads, those of keys and values, layers, cards
SIZES = {7: (4096, 11008, 32, 32, 32, 8), 70: (8192, 28672, 64, 8, 80, 64)}
TOKENS, WORDS = 2048, 32000


class Block(nn.Module):
    """A layer of Llama's: attention and a gated feed-forward part, each after a norm."""

    def __init__(self, width: int, inner: int, heads: int, pairs: int) -> None:
        super().__init__()
        self.size = width // heads
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, pairs * self.size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norms[0](x)
        q, k, v = (part(y).unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(pl.LightningModule):
    def __init__(self, width: int, inner: int, heads: int, pairs: int, layers: int) -> None:
        super().__init__()
        self.shape = width, inner, heads, pairs
        self.layers = layers
        self.net: nn.Module | None = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        width = self.shape[0]
        with torch.device("meta"):  # FSDP makes each layer's weights when it shards it
            blocks = [Block(*self.shape) for _ in range(self.layers)]
            self.net = nn.Sequential(
                nn.Embedding(WORDS, width), *blocks, nn.RMSNorm(width), nn.Linear(width, WORDS, bias=False)
            )

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        assert self.net is not None
        logits = self.net(batch)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def planned(billions: int) -> dict[str, Any]:
    *shape, cards = SIZES[billions]
    begin = time.process_time()
    how: dict[str, Any] = {
        "precision": "bf16-mixed",
        "devices": cards,
        "strategy": FSDPStrategy(auto_wrap_policy={Block}, activation_checkpointing_policy={Block}),
    }
    plan = mp.plan(Decoder(*shape), torch.zeros(4, TOKENS, dtype=torch.int64), device="A100 80GB", **how)
    return {
        "parameters": parameters(*shape),
        "cards": cards,
        "batch_size": plan.batch_size,
        "reserved": plan.peak_reserved,
        "breakdown": dict(plan.breakdown),
        "nccl": plan.nccl,
        "method": plan.method,
        "processor_seconds": round(time.process_time() - begin, 1),
        "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10,
    }


def parameters(width: int, inner: int, heads: int, pairs: int, layers: int) -> int:
    block = 2 * width + 2 * width * width + 2 * width * pairs * (width // heads) + 3 * width * inner
    return 2 * WORDS * width + layers * block + width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("billions", type=int, nargs="+", choices=sorted(SIZES), help="parameters of a decoder")
    for billions in parser.parse_args().billions:
        print(json.dumps(planned(billions)), flush=True)


if __name__ == "__main__":
    main()
