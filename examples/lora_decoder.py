"""A Hugging Face decoder with LoRA: the base is frozen, and peft's low-rank parts are trained.

    python examples/lora_decoder.py --gpu "RTX 3090"     # plans, trains nothing
    python examples/lora_decoder.py                      # on a machine with CUDA: plans, trains, compares

The decoder is made from its configuration, with random weights (nothing to download).

Needs: pip install "lightning-memplan[examples]" transformers peft
"""

from __future__ import annotations

import argparse

import pytorch_lightning as pl
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_memplan as mp

GiB = 2**30
WORDS = 32000


class Texts(Dataset[dict[str, Tensor]]):
    """Random tokens, ``tokens`` a text."""

    def __init__(self, length: int, tokens: int) -> None:
        self.length, self.tokens = length, tokens

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        text = torch.randint(WORDS, (self.tokens,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": text, "attention_mask": torch.ones_like(text), "labels": text}


class Decoder(pl.LightningModule):
    def __init__(self, width: int, layers: int, tokens: int, texts: int) -> None:
        super().__init__()
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=WORDS,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=width // 64,
                max_position_embeddings=tokens,
                use_cache=False,
            )
        )
        self.network = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        self.texts = Texts(texts, tokens)
        self.batch_size = 2  # the planner writes the largest that fits here

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.network(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-4)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self.texts, batch_size=self.batch_size, shuffle=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", metavar="NAME", help="plan for this card, such as 'RTX 3090', and train nothing")
    parser.add_argument("--width", type=int, default=1024, help="of the decoder, in 64ths a head (default: 1024)")
    parser.add_argument("--layers", type=int, default=12, help="of the decoder (default: 12)")
    parser.add_argument("--tokens", type=int, default=512, help="in a text (default: 512)")
    parser.add_argument("--texts", type=int, default=10_000, help="to train on (default: 10000)")
    args = parser.parse_args()
    pl.seed_everything(0)
    model = Decoder(args.width, args.layers, args.tokens, args.texts)
    model.network.print_trainable_parameters()
    if args.gpu:
        print(mp.plan_table(mp.plan(model, model.train_dataloader(), device=args.gpu, precision="bf16-true")))
        return
    if not torch.cuda.is_available():
        print("There is no CUDA device here. Name a card with --gpu to plan for it, such as --gpu 'RTX 3090'.")
        return
    planner = mp.MemoryPlanner()
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        precision="bf16-true",
        max_steps=4,
        callbacks=[planner],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(model)
    for step in planner.measurements:
        print(
            f"step {step.step}: predicted {step.predicted_allocated / GiB:.3f} GiB allocated, "
            f"measured {step.allocated / GiB:.3f} GiB ({step.error_percent:+.1f} %)"
        )


if __name__ == "__main__":
    main()
