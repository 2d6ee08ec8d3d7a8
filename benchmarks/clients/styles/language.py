"""Language and speech as their code bases write them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from benchmarks.clients.job import job
from benchmarks.clients.styles.common import trainer


# -------------------------------------------------------------------------- speech, with a configuration for all
class AttrDict(dict[str, Any]):
    """A configuration whose keys are attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            value = self[name]
        except KeyError as error:
            raise AttributeError(name) from error
        return AttrDict(value) if isinstance(value, dict) else value


class Utterances(Dataset[Any]):
    """Signals of differing lengths with their texts, as ``(signal, length, tokens, length)``."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        seconds, words = 800 + 80 * (index % 7), 3 + index % 5
        tokens = torch.randint(0, 28, (words,), generator=torch.Generator().manual_seed(index))
        return torch.randn(seconds), torch.tensor(seconds), tokens, torch.tensor(words)

    def collate_fn(self, batch: list[Any]) -> tuple[torch.Tensor, ...]:
        signals, lengths, tokens, token_lengths = zip(*batch, strict=True)
        longest, most = max(lengths).item(), max(token_lengths).item()
        signals = [F.pad(signal, (0, longest - len(signal))) for signal in signals]
        tokens = [F.pad(each, (0, most - len(each)), value=28) for each in tokens]
        return torch.stack(signals), torch.stack(lengths), torch.stack(tokens), torch.stack(token_lengths)


class SpeechRecognizer(pl.LightningModule):
    """Sets up its own data from its configuration; logs the rate of ``self._optimizer`` and the Trainer's step."""

    def __init__(self, cfg: AttrDict, trainer: pl.Trainer | None = None) -> None:
        super().__init__()
        self.save_hyperparameters("cfg")
        self.cfg, self._train_dl, self._optimizer, self._scheduler = cfg, None, None, None
        self.world_size = 1 if trainer is None else trainer.num_nodes * trainer.num_devices
        self.preprocessor = nn.Conv1d(1, 24, 32, 8)
        self.encoder = nn.LSTM(24, 32, 2, batch_first=True, bidirectional=True)
        self.decoder, self.loss = nn.Linear(64, 29), nn.CTCLoss(blank=28, zero_infinity=True, reduction="mean")
        self.setup_training_data(self.cfg.train_ds)

    def setup_training_data(self, config: AttrDict) -> None:
        data = Utterances(config.samples)
        self._train_dl = DataLoader(data, config.batch_size, shuffle=config.shuffle, collate_fn=data.collate_fn)

    def train_dataloader(self) -> Any:
        return self._train_dl

    def forward(self, signal: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.preprocessor(signal[:, None]).transpose(1, 2)
        encoded_len = (length - 32) // 8 + 1
        keep = torch.arange(features.shape[1], device=self.device)[None] < encoded_len[:, None]
        encoded, _ = self.encoder(features * keep[..., None])
        return self.decoder(encoded).log_softmax(-1), encoded_len

    def training_step(self, batch: Any, batch_nb: int) -> dict[str, Any]:
        signal, signal_len, transcript, transcript_len = batch
        log_probs, encoded_len = self.forward(signal, signal_len)
        loss_value = self.loss(log_probs.transpose(0, 1), transcript, encoded_len, transcript_len)
        tensorboard_logs = {
            "learning_rate": self._optimizer.param_groups[0]["lr"],
            "global_step": torch.tensor(self.trainer.global_step, dtype=torch.float32),
        }
        log_every_n_steps = self._trainer.log_every_n_steps if getattr(self, "_trainer", None) is not None else 1
        if (batch_nb + 1) % log_every_n_steps == 0:
            tensorboard_logs["training_batch_wer"] = (log_probs.argmax(-1) == 0).float().mean()
        self.log_dict(tensorboard_logs)
        return {"loss": loss_value}

    def setup_optimization(self) -> tuple[Any, Any]:
        if self._trainer.max_steps < 0:
            batches = -(-len(self._train_dl.dataset) // self.cfg.train_ds.batch_size)
            max_steps = batches * self._trainer.max_epochs
        else:
            max_steps = self._trainer.max_steps
        self._optimizer = torch.optim.AdamW(self.parameters(), lr=self.cfg.optim.lr, betas=(0.9, 0.98))
        self._scheduler = torch.optim.lr_scheduler.OneCycleLR(self._optimizer, 1e-3, total_steps=max_steps + 1)
        return self._optimizer, {"scheduler": self._scheduler, "interval": "step", "frequency": 1}

    def configure_optimizers(self) -> Any:
        self.setup_optimization()
        return [self._optimizer], [{"scheduler": self._scheduler, "interval": "step", "frequency": 1}]


CONFIG = {"train_ds": {"batch_size": 4, "shuffle": True, "samples": 48}, "optim": {"lr": 1e-3}}


@job(size=4)
def speech(callbacks: list[Any]) -> None:
    """CTC on signals of differing lengths; the loader stands ready since ``__init__``."""
    runs = trainer(callbacks)
    runs.fit(SpeechRecognizer(AttrDict(CONFIG), trainer=runs))


# ------------------------------------------------------------------ batches by tokens, from a sampler of batches
class BucketSampler(Sampler[list[int]]):
    """Batches of similar lengths, at most so many tokens each: their sizes differ."""

    def __init__(self, lengths: list[int], max_tokens: int, seed: int = 0) -> None:
        self.lengths, self.max_tokens, self.seed, self.epoch = lengths, max_tokens, seed, 0
        self.batches = self.make()

    def make(self) -> list[list[int]]:
        batches: list[list[int]] = [[]]
        for index in sorted(range(len(self.lengths)), key=self.lengths.__getitem__):
            if (len(batches[-1]) + 1) * self.lengths[index] > self.max_tokens:
                batches.append([])
            batches[-1].append(index)
        random.Random(self.seed + self.epoch).shuffle(batches)
        return batches

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.batches = epoch, self.make()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Sentences(Dataset[Any]):
    def __init__(self, length: int, tokenizer: Any = None) -> None:
        self.lengths = [8 + index % 25 for index in range(length)]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.randint(5, 100, (self.lengths[index],))}


class MaskingCollator:
    """Pad, and mask a part of the tokens."""

    def __init__(self, share: float = 0.15) -> None:
        self.share = share

    def __call__(self, samples: list[Any]) -> dict[str, torch.Tensor]:
        ids = nn.utils.rnn.pad_sequence([s["input_ids"] for s in samples], batch_first=True)
        labels, chosen = ids.clone(), torch.rand(ids.shape) < self.share
        labels[~chosen] = -100
        return {"input_ids": ids.masked_fill(chosen, 4), "labels": labels, "attention_mask": (ids != 0).long()}


class MaskedLanguageModel(pl.LightningModule):
    """A model of transformers made in ``configure_model``; a warm-up over the Trainer's own estimate of its steps."""

    def __init__(self, warmup_ratio: float = 0.1, weight_decay: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model: nn.Module | None = None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        from transformers import BertConfig, BertForMaskedLM

        config = BertConfig(
            vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=64,
        )  # fmt: skip
        self.model = BertForMaskedLM(config)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        output = self.model(**batch)
        self.log("train_loss", output.loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        self.log("perplexity", torch.exp(output.loss.detach()), batch_size=len(batch["input_ids"]))
        return output.loss

    def configure_optimizers(self) -> Any:
        from transformers import get_linear_schedule_with_warmup

        no_decay = ["bias", "LayerNorm.weight"]
        named = list(self.model.named_parameters())
        groups = [
            {"params": [p for n, p in named if not any(each in n for each in no_decay)], "weight_decay": 0.01},
            {"params": [p for n, p in named if any(each in n for each in no_decay)], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=5e-5)
        steps = self.trainer.estimated_stepping_batches
        scheduler = get_linear_schedule_with_warmup(optimizer, int(self.hparams.warmup_ratio * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class TextData(pl.LightningDataModule):
    """Tokenized in ``setup``; the loader's batch size is an attribute."""

    def __init__(self, batch_size: int = 4, workers: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size, self.datasets = batch_size, None

    def prepare_data(self) -> None:
        Sentences(1)

    def setup(self, stage: str | None = None) -> None:
        assert self.datasets is None, "tokenized twice"
        self.datasets = {"train": Sentences(48), "validation": Sentences(12)}

    def train_dataloader(self) -> Any:
        return DataLoader(self.datasets["train"], self.batch_size, shuffle=True, collate_fn=MaskingCollator())

    def val_dataloader(self) -> Any:
        return DataLoader(self.datasets["validation"], self.batch_size, collate_fn=MaskingCollator())


@job(size=4)
def masked_language(callbacks: list[Any]) -> None:
    """BERT from a configuration, with a datamodule."""
    trainer(callbacks, precision="bf16-mixed").fit(MaskedLanguageModel(), datamodule=TextData())


@job(size=8, keeps="BucketSampler")
def buckets(callbacks: list[Any]) -> None:
    """Batches of so many tokens: there is no batch size to set."""
    data = Sentences(48)
    sampler = BucketSampler(data.lengths, 128)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=MaskingCollator())
    trainer(callbacks).fit(MaskedLanguageModel(), loader)


# ---------------------------------------------------------------------------- fine-tuning with low-rank adapters
class FineTuning(pl.LightningModule):
    """A causal model with low-rank adapters, whose checkpoint leaves the frozen weights out."""

    def __init__(self, batch_size: int = 2, lr: float = 2e-4, checkpointing: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, use_cache=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        adapters = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        self.model = get_peft_model(model, adapters)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        outputs = self.model(**batch)
        self.log("train/loss", outputs.loss, prog_bar=True)
        self.log("train/tokens", batch["attention_mask"].sum().float(), reduce_fx="sum")
        return outputs.loss

    def train_dataloader(self) -> Any:
        return DataLoader(Conversations(), self.hparams.batch_size, shuffle=True, collate_fn=conversation_batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = {n: v for n, v in checkpoint["state_dict"].items() if "lora_" in n}
        checkpoint["state_dict"] = kept

    def configure_optimizers(self) -> Any:
        trainable = filter(lambda p: p.requires_grad, self.trainer.model.parameters())
        optimizer = torch.optim.AdamW(trainable, lr=self.hparams.lr)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


class Conversations(Dataset[Any]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = [1 + (index * k) % 120 for k in range(10 + index % 9)]
        return {"input_ids": ids, "prompt": 4}


def conversation_batch(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad to a multiple of 8; the prompt has no loss."""
    longest = -(-max(len(s["input_ids"]) for s in samples) // 8) * 8
    ids = torch.tensor([s["input_ids"] + [0] * (longest - len(s["input_ids"])) for s in samples])
    labels = ids.masked_fill(ids == 0, -100)
    for row, sample in zip(labels, samples, strict=True):
        row[: sample["prompt"]] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long()}


@job(size=2)
def adapters(callbacks: list[Any]) -> None:
    """Low-rank adapters with checkpointed activations and accumulation."""
    trainer(callbacks, accumulate_grad_batches=4, gradient_clip_val=1.0).fit(FineTuning())
