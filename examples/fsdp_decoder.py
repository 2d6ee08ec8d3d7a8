"""A decoder whose parameters, gradients and optimizer state are sharded over several GPUs by FSDP.

    python examples/fsdp_decoder.py --gpu "RTX 3090" --devices 8 --width 4096 --layers 32    # plans, trains nothing
    python examples/fsdp_decoder.py                        # on a machine with two GPUs: plans, trains, compares

Each rank plans for its own card; the smallest batch size is all ranks'. To plan, no weight is made: the 6.7 billion
parameters of the first line take no memory.

Needs: pip install lightning-memplan
"""

from __future__ import annotations

import argparse

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightning_memplan as mp

GiB = 2**30
WORDS = 32000


class Texts(Dataset[Tensor]):
    """Random tokens, ``tokens`` a text and one more, which is the last to be guessed."""

    def __init__(self, length: int, tokens: int) -> None:
        self.length, self.tokens = length, tokens

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return torch.randint(WORDS, (self.tokens + 1,), generator=torch.Generator().manual_seed(index))


class Block(nn.Module):
    """Attention to what came before, and a network of two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, 64)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, 2))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class Decoder(pl.LightningModule):
    def __init__(self, width: int, layers: int, tokens: int, texts: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(WORDS, width), nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.head = nn.Linear(width, WORDS, bias=False)
        self.texts = Texts(texts, tokens)
        self.batch_size = 1  # of each GPU; the planner writes the largest that fits here

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        tokens, following = batch[:, :-1], batch[:, 1:]
        x = self.embed(tokens) + self.place(torch.arange(tokens.size(1), device=tokens.device))
        loss = nn.functional.cross_entropy(self.head(self.blocks(x)).flatten(0, 1), following.flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.texts, batch_size=self.batch_size, shuffle=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", metavar="NAME", help="plan for cards such as 'RTX 3090', and train nothing")
    parser.add_argument("--devices", type=int, default=2, help="GPUs (default: 2)")
    parser.add_argument("--width", type=int, default=1024, help="of the decoder, in 64ths a head (default: 1024)")
    parser.add_argument("--layers", type=int, default=12, help="of the decoder (default: 12)")
    parser.add_argument("--tokens", type=int, default=512, help="in a text (default: 512)")
    parser.add_argument("--texts", type=int, default=10_000, help="to train on (default: 10000)")
    parser.add_argument("--backend", default="nccl", help="by which the ranks talk (default: nccl)")
    args = parser.parse_args()
    pl.seed_everything(0)
    strategy = FSDPStrategy(auto_wrap_policy={Block}, process_group_backend=args.backend)
    if args.gpu:
        with torch.device("meta"):
            model = Decoder(args.width, args.layers, args.tokens, args.texts)
        print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters over {args.devices} cards")
        how = {"device": args.gpu, "devices": args.devices, "strategy": strategy, "precision": "bf16-mixed"}
        print(mp.plan_table(mp.plan(model, model.train_dataloader(), **how)))
        return
    if torch.cuda.device_count() < args.devices:
        print(f"There are fewer than {args.devices} CUDA devices here. Name cards with --gpu to plan for them.")
        return
    planner = mp.MemoryPlanner()
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=args.devices,
        strategy=strategy,
        precision="bf16-mixed",
        max_steps=4,
        callbacks=[planner],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Decoder(args.width, args.layers, args.tokens, args.texts))
    for step in planner.measurements if trainer.is_global_zero else ():
        print(
            f"step {step.step}: predicted {step.predicted_allocated / GiB:.3f} GiB allocated, "
            f"measured {step.allocated / GiB:.3f} GiB ({step.error_percent:+.1f} %)"
        )


if __name__ == "__main__":
    main()
