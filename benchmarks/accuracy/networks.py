"""Networks by name, each with a batch and a training step, for comparing predictions with what training takes.

``torchvision.NAME``, ``timm.NAME``, ``monai.NAME``, ``hf.NAME``, ``own.NAME`` (the small ones below) and
``regime.NAME`` (ways of training, ``regimes.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

Sample = Any


class Training(pl.LightningModule):
    """A network with a loss and an optimizer."""

    def __init__(self, net: nn.Module, optimizer: str, loss: Callable[[Any, Any], torch.Tensor] | None) -> None:
        super().__init__()
        self.net, self.optimizer, self.loss = net, optimizer, loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if isinstance(batch, dict):
            return self.net(**batch).loss
        x, y = batch
        out = self.net(x)
        return self.loss(out, y) if self.loss is not None else F.cross_entropy(_logits(out), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.optimizer, self.parameters())


def _logits(out: Any) -> torch.Tensor:
    if isinstance(out, torch.Tensor):
        return out
    return out.logits if hasattr(out, "logits") else out[0]


def make_optimizer(name: str, parameters: Any) -> torch.optim.Optimizer:
    """``AdamW``, ``SGD+momentum``, ``Adam+fused``, ``RMSprop+loop``, ...: of torch.optim, with options after a plus.

    ``AdamW+8bit`` is of bitsandbytes; ``Muon``, which is for matrices, gets only these.
    """
    name, *options = name.split("+")
    if name == "Muon":
        parameters = [parameter for parameter in parameters if parameter.dim() == 2]
    if "8bit" in options:
        from bitsandbytes import optim

        options.remove("8bit")
        return getattr(optim, f"{name}8bit")(parameters, lr=1e-3, **({"momentum": 0.9} if options else {}))
    arguments: dict[str, Any] = {"lr": 1e-3}
    for option in options:
        if option == "loop":
            arguments["foreach"] = False
        elif option == "momentum":
            arguments["momentum"] = 0.9
        else:
            arguments[option] = True
    return getattr(torch.optim, name)(parameters, **arguments)


# ------------------------------------------------------------------------------------------------------- own networks


class Conv3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = [1, 30, 30, 60, 60, 120]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Conv3d(a, b, 3), nn.ReLU(), *([nn.MaxPool3d(2)] if a != b else [])]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(120, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3, 4)))


class Encoder(nn.Module):
    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 256)
        layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, norm_first=norm_first)
        self.blocks = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(256, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embed(x))).mean(1)


class MaskedDecoder(nn.Module):
    """Attention with a float mask and with a padding mask, queries and keys of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(500, 192)
        layer = nn.TransformerDecoderLayer(192, 6, 768, batch_first=True)
        self.blocks = nn.TransformerDecoder(layer, 2)
        self.head = nn.Linear(192, 500)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(x.size(1), device=x.device)
        memory = self.embed(x[:, : x.size(1) // 2])
        return self.head(self.blocks(self.embed(x), memory, tgt_mask=causal)).mean(1)


class Recurrent(nn.Module):
    def __init__(self, kind: str, bidirectional: bool = False, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(5000, 128)
        self.rnn = getattr(nn, kind)(128, 256, layers, batch_first=True, bidirectional=bidirectional, dropout=dropout)
        self.head = nn.Linear(256 * (1 + bidirectional), 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.embed(x))[0][:, -1])


class Recommender(nn.Module):
    """Tables of embeddings, summed, and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(50000, 64, mode="sum")
        self.tables = nn.ModuleList(nn.Embedding(20000, 32) for _ in range(8))
        self.mlp = nn.Sequential(nn.Linear(64 + 8 * 32, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU())
        self.head = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [self.bag(x), *(table(x[:, k]) for k, table in enumerate(self.tables))]
        return self.head(self.mlp(torch.cat(parts, 1)))


class _Residual(nn.Module):
    def __init__(self, a: int, b: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, a), nn.Conv2d(a, b, 3, padding=1)
        self.time, self.norm2 = nn.Linear(time, b), nn.GroupNorm(8, b)
        self.conv2, self.skip = nn.Conv2d(b, b, 3, padding=1), nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(t))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class _SelfAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.GroupNorm(8, width),
            nn.Conv2d(width, 3 * width, 1),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, 4, c // 4, h * w).transpose(-1, -2).unbind(1)
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(out.transpose(-1, -2).reshape(b, c, h, w))


class Diffusion(nn.Module):
    """A small denoising U-Net: noise is added and predicted."""

    def __init__(self) -> None:
        super().__init__()
        w = 64
        self.time = nn.Sequential(nn.Linear(w, 4 * w), nn.SiLU(), nn.Linear(4 * w, 4 * w))
        self.first, self.last = nn.Conv2d(3, w, 3, padding=1), nn.Conv2d(w, 3, 3, padding=1)
        self.down1, self.down2 = _Residual(w, w, 4 * w), _Residual(w, 2 * w, 4 * w)
        self.middle, self.attend = _Residual(2 * w, 2 * w, 4 * w), _SelfAttention(2 * w)
        self.up2, self.up1 = _Residual(4 * w, w, 4 * w), _Residual(2 * w, w, 4 * w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = torch.rand(x.size(0), device=x.device)
        steps = torch.exp(torch.linspace(0, -9, 32, device=x.device))
        angle = t[:, None] * steps[None]
        t = self.time(torch.cat([angle.sin(), angle.cos()], 1))
        noise = torch.randn_like(x)
        a = self.down1(self.first(x + noise), t)
        b = self.down2(F.avg_pool2d(a, 2), t)
        c = self.attend(self.middle(F.avg_pool2d(b, 2), t))
        up = self.up2(torch.cat([F.interpolate(c, scale_factor=2, mode="nearest"), b], 1), t)
        up = self.up1(torch.cat([F.interpolate(up, scale_factor=2, mode="nearest"), a], 1), t)
        return F.mse_loss(self.last(up), noise)


class UNet(nn.Module):
    """Transposed convolutions, bilinear upsampling, crops."""

    def __init__(self) -> None:
        super().__init__()

        def block(a: int, b: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1, bias=False),
                nn.BatchNorm2d(b),
                nn.LeakyReLU(0.1, inplace=True),
                nn.Conv2d(b, b, 3, padding=1, bias=False),
                nn.InstanceNorm2d(b, affine=True),
                nn.ReLU(inplace=True),
            )

        self.a, self.b, self.c = block(3, 32), block(32, 64), block(64, 128)
        self.up = nn.ConvTranspose2d(128, 64, 2, 2)
        self.d, self.e, self.head = block(128, 64), block(96, 32), nn.Conv2d(32, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        c = self.c(F.max_pool2d(b, 2))
        d = self.d(torch.cat([self.up(c), b], 1))
        d = F.interpolate(d, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(self.e(torch.cat([d, a], 1)))


class PointNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.local = nn.Sequential(
            nn.Conv1d(3, 64, 1), nn.BatchNorm1d(64), nn.ReLU(), nn.Conv1d(64, 512, 1), nn.BatchNorm1d(512), nn.ReLU()
        )
        self.head = nn.Sequential(
            nn.Linear(512, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.3), nn.Linear(256, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.local(x).max(-1).values)


class Graph(nn.Module):
    """Sums over neighbours, and the largest of their values, by scattering."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(32, 64), nn.Linear(64, 10)
        self.messages = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.register_buffer("edges", torch.randint(0, 50, (2, 300)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        to = self.edges[1, None, :, None].expand(len(h), -1, 64)
        for message in self.messages:
            sent = message(F.relu(h))[:, self.edges[0]]
            total = torch.zeros_like(h, dtype=sent.dtype).scatter_add_(1, to, sent)
            h = h + total.scatter_reduce(1, to, sent, "amax", include_self=False)
        return self.head(h).amax(1)


class Decay(nn.Module):
    """Attention without queries, whose weights decay with the distance."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value, self.gate = (nn.Linear(64, 64, bias=False) for _ in range(3))
        self.decay, self.head = nn.Parameter(torch.zeros(64)), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shifted = F.pad(x, (0, 0, 1, -1))
        place = torch.arange(x.size(1), device=x.device)
        apart = place[:, None] - place[None]
        weights = torch.exp(-apart.clamp(min=0)[..., None] * self.decay.float().exp()) * (apart >= 0)[..., None]
        keys = self.key(x).float().exp()
        total = torch.einsum("tsc,bsc->btc", weights, keys * self.value(shifted))
        mean = total / torch.einsum("tsc,bsc->btc", weights, keys)
        return self.head((self.gate(x).sigmoid() * mean).to(x.dtype)).mean(1)


class Points(nn.Module):
    """Attention among the nearest points."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.near, self.score = nn.Linear(3, 64), nn.Linear(3, 64), nn.Linear(64, 64)
        self.query, self.key, self.value, self.head = (nn.Linear(64, width) for width in (64, 64, 64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = torch.cdist(x.float(), x.float()).topk(8, largest=False).indices
        one = torch.arange(len(x), device=x.device)[:, None, None]
        near = self.near(x[:, :, None] - x[one, index])
        h = self.embed(x)
        score = self.score(self.query(h)[:, :, None] - self.key(h)[one, index] + near).softmax(2)
        return self.head((score * (self.value(h)[one, index] + near)).sum(2).amax(1))


class Energy(nn.Module):
    """What an image is made likelier by, step by step, and how steep that is."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.ELU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ELU(), nn.Flatten(), nn.Linear(4096, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sample = torch.rand_like(x).requires_grad_()
        for _ in range(3):
            (slope,) = torch.autograd.grad(self.net(sample).sum(), sample)
            sample = (sample - 0.1 * slope).detach().requires_grad_()
        energy, made = self.net(x), self.net(sample)
        (slope,) = torch.autograd.grad(made.sum(), sample, create_graph=True)
        return (energy - made).mean() + slope.square().mean()


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(1000, 2000),
        nn.Dropout(0.1),
        nn.ReLU(),
        nn.Linear(2000, 2000),
        nn.LayerNorm(2000),
        nn.GELU(),
        nn.Linear(2000, 10),
    )


def _tokens(length: int, vocabulary: int) -> Sample:
    return torch.randint(0, vocabulary, (length,)), 0


def _image(*shape: int) -> Sample:
    return torch.zeros(shape), 0


def _maps(*shape: int) -> Sample:
    return torch.zeros(shape), torch.zeros(shape[1:], dtype=torch.long)


_OWN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Sample]]] = {
    "mlp": (_mlp, lambda: _image(1000)),
    "conv3d": (Conv3d, lambda: _image(1, 64, 64, 64)),
    "encoder": (Encoder, lambda: _tokens(128, 1000)),
    "encoder_prenorm": (lambda: Encoder(norm_first=True), lambda: _tokens(100, 1000)),
    "decoder": (MaskedDecoder, lambda: _tokens(90, 500)),
    "lstm": (lambda: Recurrent("LSTM", dropout=0.1), lambda: _tokens(100, 5000)),
    "bilstm": (lambda: Recurrent("LSTM", bidirectional=True), lambda: _tokens(64, 5000)),
    "gru": (lambda: Recurrent("GRU"), lambda: _tokens(100, 5000)),
    "rnn": (lambda: Recurrent("RNN", layers=1), lambda: _tokens(100, 5000)),
    "recommender": (Recommender, lambda: _tokens(20, 20000)),
    "diffusion": (Diffusion, lambda: _image(3, 64, 64)),
    "unet": (UNet, lambda: _maps(3, 128, 128)),
    "graph": (Graph, lambda: (torch.zeros(50, 32), 0)),
    "decay": (Decay, lambda: (torch.zeros(96, 64), 0)),
    "points": (Points, lambda: (torch.zeros(256, 3), 0)),
    "energy": (Energy, lambda: _image(3, 32, 32)),
    "pointnet": (PointNet, lambda: _image(3, 1024)),
}


# ------------------------------------------------------------------------------------------------------------ sources


def _own(name: str) -> tuple[nn.Module, Sample, Any]:
    make, sample = _OWN[name]
    return make(), sample(), (lambda out, y: out) if name in ("diffusion", "energy") else None


def _torchvision(name: str) -> tuple[nn.Module, Sample, Any]:
    import torchvision

    if name in torchvision.models.list_models(torchvision.models.segmentation):
        net = torchvision.models.get_model(name, weights=None, weights_backbone=None)
        return net, _maps(3, 128, 128), lambda out, y: F.cross_entropy(out["out"], y)
    if name in torchvision.models.list_models(torchvision.models.video):
        shape = (3, 16, 224, 224) if name.startswith("mvit") else (3, 8, 112, 112)
        return torchvision.models.get_model(name, weights=None), _image(*shape), None
    size = 299 if name == "inception_v3" else 224
    arguments = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    return torchvision.models.get_model(name, weights=None, **arguments), _image(3, size, size), None


def _timm(name: str) -> tuple[nn.Module, Sample, Any]:
    import timm

    net = timm.create_model(name, pretrained=False)
    return net, _image(*net.default_cfg["input_size"]), None


def _monai(name: str) -> tuple[nn.Module, Sample, Any]:
    from monai.losses import DiceCELoss
    from monai.networks import nets

    size = 32
    if name == "UNet":
        net = nets.UNet(3, 1, 2, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2)
    elif name == "BasicUNet":
        net = nets.BasicUNet(3, 1, 2)
    elif name == "SegResNet":
        net = nets.SegResNet(3, init_filters=16, in_channels=1, out_channels=2)
    elif name == "DynUNet":
        net = nets.DynUNet(3, 1, 2, [3, 3, 3, 3], [1, 2, 2, 2], [2, 2, 2])
    elif name == "VNet":
        net = nets.VNet(3, 1, 2)
    elif name == "AttentionUnet":
        net = nets.AttentionUnet(3, 1, 2, (16, 32, 64), (2, 2))
    elif name == "UNETR":
        net = nets.UNETR(1, 2, (32, 32, 32), feature_size=16, hidden_size=192, mlp_dim=768, num_heads=6)
    elif name == "SwinUNETR":
        size, net = 64, nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12)
    elif name == "SwinUNETR_v2":
        size, net = 64, nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12, use_v2=True)
    elif name == "HighResNet":
        net = nets.HighResNet(3, 1, 2)
    elif name == "DenseNet121":
        return nets.DenseNet121(3, 1, 2), (torch.zeros(1, size, size, size), 0), None
    else:
        raise ValueError(f"no network {name!r} here")
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    return net, (torch.zeros(1, size, size, size), torch.zeros(1, size, size, size)), loss


def _hf(name: str) -> tuple[nn.Module, Sample, Any]:
    import transformers as t

    length, vocabulary = 128, 5000
    kind, _, variant = name.partition("_")
    implementation = {"eager": "eager"}.get(variant, "sdpa")
    common: dict[str, Any] = {"vocab_size": vocabulary, "attn_implementation": implementation}
    tokens = torch.zeros(length, dtype=torch.long)
    sample = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    small = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    if kind == "gpt2":
        net = t.GPT2LMHeadModel(t.GPT2Config(n_embd=256, n_layer=4, n_head=4, **common))
    elif kind == "bert":
        net = t.BertForMaskedLM(t.BertConfig(**small, **common))
    elif kind == "distilbert":
        net = t.DistilBertForMaskedLM(t.DistilBertConfig(dim=256, n_layers=4, n_heads=4, hidden_dim=1024, **common))
    elif kind == "roberta":
        net = t.RobertaForSequenceClassification(t.RobertaConfig(**small, num_labels=3, **common))
        sample = {**sample, "labels": torch.tensor(0)}
    elif kind == "opt":
        net = t.OPTForCausalLM(
            t.OPTConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, ffn_dim=1024, **common)
        )
    elif kind == "t5":
        del common["attn_implementation"]
        net = t.T5ForConditionalGeneration(
            t.T5Config(d_model=256, d_kv=64, d_ff=1024, num_layers=3, num_heads=4, decoder_start_token_id=0, **common)
        )
    elif kind == "llama":
        net = t.LlamaForCausalLM(t.LlamaConfig(**small, num_key_value_heads=2, **common))
    elif kind == "vit":
        config = t.ViTConfig(**small, image_size=112, patch_size=8, num_labels=10)
        net = t.ViTForImageClassification(config)
        sample = {"pixel_values": torch.zeros(3, 112, 112), "labels": torch.tensor(0)}
    elif kind == "wav2vec2":
        config = t.Wav2Vec2Config(**small, num_labels=4, apply_spec_augment=False)
        net = t.Wav2Vec2ForSequenceClassification(config)
        sample = {"input_values": torch.zeros(8000), "labels": torch.tensor(0)}
    elif kind == "mamba":
        net = t.MambaForCausalLM(t.MambaConfig(vocab_size=vocabulary, hidden_size=256, num_hidden_layers=2))
        sample = {"input_ids": tokens[:64], "labels": tokens[:64]}
    elif kind == "mixtral":
        net = t.MixtralForCausalLM(t.MixtralConfig(**small, num_key_value_heads=2, num_local_experts=4, **common))
    elif kind == "deberta":
        net = t.DebertaV2ForMaskedLM(t.DebertaV2Config(**small, vocab_size=vocabulary))
    elif kind == "bart":
        layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in _BART.items()}
        net = t.BartForConditionalGeneration(t.BartConfig(d_model=256, **layers, **common))
    elif kind == "whisper":
        layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in _BART.items()}
        net = t.WhisperForConditionalGeneration(
            t.WhisperConfig(d_model=256, max_source_positions=150, pad_token_id=0, **layers, **common)
        )
        sample = {"input_features": torch.zeros(80, 300), "labels": tokens[:32]}
    elif kind == "conformer":
        config = t.Wav2Vec2ConformerConfig(**small, num_labels=4, apply_spec_augment=False)
        net = t.Wav2Vec2ConformerForSequenceClassification(config)
        sample = {"input_values": torch.zeros(8000), "labels": torch.tensor(0)}
    elif kind == "patchtst":
        config = t.PatchTSTConfig(
            num_input_channels=5, context_length=128, prediction_length=24, patch_length=16, patch_stride=8
        )
        net = t.PatchTSTForPrediction(config)
        sample = {"past_values": torch.zeros(128, 5), "future_values": torch.zeros(24, 5)}
    elif kind == "segformer":
        net = t.SegformerForSemanticSegmentation(t.SegformerConfig(num_labels=10))
        sample = {"pixel_values": torch.zeros(3, 128, 128), "labels": torch.zeros(128, 128, dtype=torch.long)}
    elif kind == "swin2sr":
        config = t.Swin2SRConfig(image_size=32, embed_dim=60, depths=[2, 2], num_heads=[6, 6])
        net = t.Swin2SRForImageSuperResolution(config)
        maps = torch.zeros(3, 32, 32), torch.zeros(3, 64, 64)
        return net, maps, lambda out, y: F.l1_loss(out.reconstruction, y)
    else:
        raise ValueError(f"no network {name!r} here")
    return net, sample, None


_BART = {"layers": 2, "attention_heads": 4, "ffn_dim": 1024}
_SOURCES = {"own": _own, "torchvision": _torchvision, "timm": _timm, "monai": _monai, "hf": _hf}


def build(name: str, optimizer: str) -> tuple[pl.LightningModule, Sample]:
    """The module, on the CPU, and one sample. ``name`` may end in ``@channels_last``.

    Raises:
        ModuleNotFoundError: the package that the network comes from is not installed.
    """
    name, _, layout = name.partition("@")
    source, _, rest = name.partition(".")
    if source == "regime":
        from . import regimes

        return regimes.build(rest, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net, sample, loss = _SOURCES[source](rest)
    if layout == "channels_last":
        net = net.to(memory_format=torch.channels_last)
    return Training(net.train(), optimizer, loss), sample


class _Repeated(torch.utils.data.Dataset):
    def __init__(self, sample: Sample, length: int) -> None:
        self.sample, self.length = sample, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        return self.sample


def loader(sample: Sample, batch_size: int, batches: int) -> DataLoader:
    """A loader whose every sample is this one."""
    return DataLoader(_Repeated(sample, batch_size * batches), batch_size=batch_size)
