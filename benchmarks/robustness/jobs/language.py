"""Trainings on text, speech and series, in small."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset

from benchmarks.robustness.job import WIDTH, Bare, Training, job, loader

LANGUAGE = "language, speech, sequences"


class Of(Dataset):
    def __init__(self, sample: Any, count: int = 24) -> None:
        self.sample, self.count = sample, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.sample(index)


@job(LANGUAGE)
def text_with_padding() -> Any:
    class Language(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.rnn, self.out = nn.Embedding(50, WIDTH, 0), nn.GRU(WIDTH, WIDTH), nn.Linear(WIDTH, 50)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            tokens, lengths = batch
            packed = pack_padded_sequence(self.table(tokens.T), lengths)
            states, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0])
            return F.cross_entropy(self.out(states).flatten(0, 1), tokens.T.flatten(), ignore_index=0)

    def pad(samples: Any) -> Any:
        longest_first = sorted(samples, key=len, reverse=True)
        return pad_sequence(longest_first, batch_first=True), [len(s) for s in longest_first]

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
            self.features = nn.Conv1d(64, WIDTH, 3, padding=1)
            self.out = nn.Linear(WIDTH, 5)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            waves, lengths, targets, target_lengths = batch
            spectrum = waves.unfold(1, 64, 16).transpose(1, 2).abs()
            logits = self.out(self.features(spectrum).transpose(1, 2)).log_softmax(2).transpose(0, 1)
            frames = [logits[: n // 16 + 1, k].mean(0) for k, n in enumerate(lengths)]
            return F.nll_loss(torch.stack(frames), targets[:, 0].clamp(0, 4)) + sum(target_lengths)

    def collate(samples: Any) -> Any:
        waves, targets = zip(*samples, strict=True)
        lengths = [tuple(len(s) for s in each) for each in (waves, targets)]
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
            distribution = torch.distributions.Laplace(mean, F.softplus(spread) + 1e-3, validate_args=False)
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
