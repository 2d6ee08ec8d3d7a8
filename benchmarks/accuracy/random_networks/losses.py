"""Every loss of torch.nn.functional, with its options, of an output of any shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Options = dict[str, Any]
Loss = Callable[[torch.Tensor, Options], torch.Tensor]

#: Losses that compare with a tensor of the output's shape
_VALUES: dict[str, Any] = {
    name: getattr(F, name)
    for name in """mse_loss l1_loss smooth_l1_loss huber_loss soft_margin_loss poisson_nll_loss kl_div
    hinge_embedding_loss""".split()
}
_ROWS = ("multilabel_margin_loss", "multilabel_soft_margin_loss", "multi_margin_loss")
LOSSES = (
    *_VALUES,
    *_ROWS,
    *("cross_entropy", "nll_loss", "probabilities", "logits", "logits", "probability"),
    *("margin_ranking_loss", "triplet_margin_loss", "cosine_embedding_loss", "cosine_similarity"),
)


def loss(z: torch.Tensor, options: Options) -> torch.Tensor:
    """The loss of an output: one number, or the mean of several."""
    value = _loss(z, options, options["reduction"])
    return value.mean() if value.dim() else value


def _loss(z: torch.Tensor, options: Options, reduction: str) -> torch.Tensor:
    kind, weighted = options["kind"], options["weight"]
    same = options["same_type"] or kind == "huber_loss"  # whose backward pass takes one type
    dtype = z.dtype if same else torch.float32
    like = torch.zeros(z.shape, device=z.device, dtype=dtype)
    if kind in _VALUES:
        return _VALUES[kind](z, like, reduction=reduction)
    if kind == "cosine_similarity":
        return F.cosine_similarity(z, like, dim=-1)
    if kind == "logits":
        weight = torch.zeros(z.size(-1), device=z.device) if weighted else None
        positive = torch.zeros(z.size(-1), device=z.device) if options["positive"] else None
        return F.binary_cross_entropy_with_logits(z, like, weight, reduction=reduction, pos_weight=positive)
    if kind == "probability":
        with torch.autocast(z.device.type, enabled=False), torch.autocast("cuda", enabled=False):
            return F.binary_cross_entropy(z.float().sigmoid(), like.float(), reduction=reduction)
    if kind == "margin_ranking_loss":
        return F.margin_ranking_loss(z, z * 2, like, reduction=reduction)
    if kind == "triplet_margin_loss":
        return F.triplet_margin_loss(z, z * 2, like, swap=weighted, reduction=reduction)
    if kind == "cosine_embedding_loss":
        flat = z.flatten(1)
        return F.cosine_embedding_loss(flat, flat * 2, torch.zeros(len(flat), device=z.device), reduction=reduction)
    return _of_classes(z, options, reduction)


def _of_classes(z: torch.Tensor, options: Options, reduction: str) -> torch.Tensor:
    kind = options["kind"]
    if kind in _ROWS:
        z = z.flatten(1).float() if kind != "multilabel_soft_margin_loss" else z.flatten(1)
    weight = torch.zeros(z.size(1), device=z.device, dtype=z.dtype) if options["weight"] else None
    places = torch.zeros(z.size(0), *z.shape[2:], dtype=torch.long, device=z.device)
    smooth = 0.1 if options["smooth"] and weight is None else 0.0  # with weights its memory depends on the labels
    if kind == "multilabel_margin_loss":
        return F.multilabel_margin_loss(z, torch.zeros(z.shape, dtype=torch.long, device=z.device), reduction=reduction)
    if kind == "multilabel_soft_margin_loss":
        return F.multilabel_soft_margin_loss(z, torch.zeros(z.shape, device=z.device), reduction=reduction)
    if kind == "multi_margin_loss":
        return F.multi_margin_loss(z, places, weight=weight, reduction=reduction)
    if kind == "probabilities":
        target = torch.zeros(z.shape, device=z.device, dtype=z.dtype)
        return F.cross_entropy(z, target, weight, label_smoothing=smooth, reduction=reduction)
    if kind == "nll_loss":
        return F.nll_loss(F.log_softmax(z, 1), places, reduction=reduction)
    ignored = 0 if options["ignore"] else -100
    if weight is not None:
        weight = weight.float() if z.dtype == torch.float32 else weight
    return F.cross_entropy(z, places, weight, ignore_index=ignored, label_smoothing=smooth, reduction=reduction)
