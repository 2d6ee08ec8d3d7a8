"""Detection as its code bases write it: lists of targets, padded pictures with masks, matching on the host."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.clients.job import job
from benchmarks.clients.styles.common import trainer


class Shapes(Dataset[Any]):
    """Pictures of differing sizes with one to four boxes each."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(index)
        count, width = 1 + index % 4, 64 + 16 * (index % 3)
        corner = torch.rand(count, 2, generator=generator) / 2
        boxes = torch.cat((corner, corner + 0.2), 1)
        target = {"boxes": boxes, "labels": torch.ones(count, dtype=torch.int64), "image_id": torch.tensor([index])}
        return torch.rand(3, 64, width, generator=generator), target


# --------------------------------------------------------------------------- a set of boxes, matched on the host
class Nested(NamedTuple):
    """Pictures padded to the largest of their batch, and where they are padding."""

    tensors: torch.Tensor
    mask: torch.Tensor


def collate_nested(samples: list[Any]) -> tuple[Nested, list[dict[str, torch.Tensor]]]:
    images, targets = zip(*samples, strict=True)
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    padded, mask = torch.zeros(len(images), 3, height, width), torch.ones(len(images), height, width, dtype=torch.bool)
    for image, pad, where in zip(images, padded, mask, strict=True):
        pad[:, : image.shape[1], : image.shape[2]].copy_(image)
        where[: image.shape[1], : image.shape[2]] = False
    return Nested(padded, mask), list(targets)


class Matcher(nn.Module):
    """Assign each target a query, by SciPy on the host."""

    @torch.no_grad()
    def forward(self, outputs: dict[str, torch.Tensor], targets: list[dict[str, torch.Tensor]]) -> list[Any]:
        from scipy.optimize import linear_sum_assignment

        size, queries = outputs["pred_logits"].shape[:2]
        probabilities = outputs["pred_logits"].flatten(0, 1).softmax(-1)
        labels = torch.cat([target["labels"] for target in targets])
        boxes = torch.cat([target["boxes"] for target in targets])
        cost = 5 * torch.cdist(outputs["pred_boxes"].flatten(0, 1), boxes, p=1) - probabilities[:, labels]
        cost = cost.view(size, queries, -1).cpu()
        counts = [len(target["boxes"]) for target in targets]
        found = [linear_sum_assignment(each[i]) for i, each in enumerate(cost.split(counts, -1))]
        return [(torch.as_tensor(rows), torch.as_tensor(columns)) for rows, columns in found]


class SetCriterion(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.matcher, self.classes = Matcher(), classes
        self.register_buffer("empty_weight", torch.ones(classes + 1))

    def forward(self, outputs: dict[str, Any], targets: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        losses = {}
        for suffix, layer in [("", outputs), *((f"_{i}", each) for i, each in enumerate(outputs["aux_outputs"]))]:
            indices = self.matcher(layer, targets)
            num_boxes = torch.as_tensor([sum(len(t["labels"]) for t in targets)], dtype=torch.float)
            num_boxes = torch.clamp(num_boxes.to(layer["pred_logits"].device), min=1).item()
            batch = torch.cat([torch.full_like(source, i) for i, (source, _) in enumerate(indices)])
            source = torch.cat([source for source, _ in indices])
            labels = torch.cat([t["labels"][j] for t, (_, j) in zip(targets, indices, strict=True)])
            logits = layer["pred_logits"]
            classes = torch.full(logits.shape[:2], self.classes, dtype=torch.int64, device=logits.device)
            classes[batch, source] = labels
            losses["loss_ce" + suffix] = F.cross_entropy(logits.transpose(1, 2), classes, self.empty_weight)
            wanted = torch.cat([t["boxes"][j] for t, (_, j) in zip(targets, indices, strict=True)])
            losses["loss_bbox" + suffix] = F.l1_loss(layer["pred_boxes"][batch, source], wanted).sum() / num_boxes
        return losses


class SetDetector(pl.LightningModule):
    """A transformer that gives a set of boxes, with losses by layer; two groups of rates; targets moved by hand."""

    def __init__(self, classes: int = 3, queries: int = 8, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 7, 8, 3), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1))
        layer = nn.TransformerDecoderLayer(width, 2, 64, batch_first=True)
        self.decoder = nn.ModuleList([layer, nn.TransformerDecoderLayer(width, 2, 64, batch_first=True)])
        self.query_embed = nn.Embedding(queries, width)
        self.class_embed, self.bbox_embed = nn.Linear(width, classes + 1), nn.Linear(width, 4)
        self.criterion = SetCriterion(classes)

    def forward(self, samples: Nested) -> dict[str, Any]:
        features = self.backbone(samples.tensors)
        mask = F.interpolate(samples.mask[None].float(), size=features.shape[-2:]).to(torch.bool)[0]
        memory = features.flatten(2).transpose(1, 2)
        h, outputs = self.query_embed.weight[None].expand(len(memory), -1, -1), []
        for layer in self.decoder:
            h = layer(h, memory, memory_key_padding_mask=mask.flatten(1))
            outputs.append({"pred_logits": self.class_embed(h), "pred_boxes": self.bbox_embed(h).sigmoid()})
        return {**outputs[-1], "aux_outputs": outputs[:-1]}

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        samples, targets = batch
        moved = [{k: v.to(device) for k, v in t.items()} for t in targets]
        return Nested(samples.tensors.to(device), samples.mask.to(device)), moved

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        samples, targets = batch
        losses = self.criterion(self(samples), targets)
        loss = sum(losses.values())
        self.log("training_loss", loss, batch_size=len(targets))
        for k, v in losses.items():
            self.log("train_" + k, v.item(), batch_size=len(targets))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        losses = self.criterion(self(batch[0]), batch[1])
        self.log("validation_loss", sum(losses.values()), batch_size=len(batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        backbone = {"params": [p for n, p in self.named_parameters() if "backbone" in n], "lr": 1e-5}
        other = {"params": [p for n, p in self.named_parameters() if "backbone" not in n and p.requires_grad]}
        return torch.optim.AdamW([other, backbone], lr=1e-4, weight_decay=1e-4)


@job(size=2, count=lambda batch: len(batch[1]))
def set_detector(callbacks: list[Any]) -> None:
    """Boxes that the host matches: the step needs values."""
    loader = DataLoader(Shapes(), 2, shuffle=True, collate_fn=collate_nested)
    trainer(callbacks, gradient_clip_val=0.1).fit(
        SetDetector(), loader, DataLoader(Shapes(), 2, collate_fn=collate_nested)
    )


# --------------------------------------------------------------- targets in one tensor, with the picture's index
def collate_flat(samples: list[Any]) -> dict[str, Any]:
    images = [F.interpolate(image[None], (64, 64))[0] for image, _ in samples]
    targets = {"batch_idx": [], "cls": [], "bboxes": []}
    for index, (_, target) in enumerate(samples):
        targets["batch_idx"].append(torch.full((len(target["boxes"]),), float(index)))
        targets["cls"].append(target["labels"].float())
        targets["bboxes"].append(target["boxes"])
    joined = {name: torch.cat(each) for name, each in targets.items()}
    return {"img": torch.stack(images), "im_file": [f"{target['image_id']}.png" for _, target in samples], **joined}


class GridDetector(pl.LightningModule):
    """Targets of all pictures in one tensor; the loss scatters them to the pictures in a loop."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.SiLU(), nn.Conv2d(16, 4 + classes, 3, 4, 1))
        self.running = {"box": 0.0, "cls": 0.0}

    def preprocess(self, batch: dict[str, Any], size: int) -> torch.Tensor:
        index = batch["batch_idx"]
        counts = index.unique(return_counts=True)[1].to(torch.int32)
        padded = torch.zeros(size, max(int(counts.max()) if len(counts) else 0, 1), 5, device=self.device)
        for picture in range(size):
            rows = index == picture
            if n := int(rows.sum()):
                padded[picture, :n] = torch.cat((batch["cls"][rows, None], batch["bboxes"][rows]), 1)
        return padded

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        output = self.net(batch["img"]).flatten(2)
        padded = self.preprocess(batch, len(output))
        distance = (output[:, None, :4] - padded[:, :, 1:, None]).abs().sum(2)
        box = distance.min(-1).values.mean()
        cls = F.binary_cross_entropy_with_logits(output[:, 4:], torch.zeros_like(output[:, 4:]), reduction="sum")
        self.running["box"] += float(box.detach())
        self.log_dict({"box": box, "cls": cls}, batch_size=len(output))
        return {"loss": box + cls / max(padded[..., 0].sum(), 1), "items": torch.stack((box, cls)).detach()}

    def configure_optimizers(self) -> Any:
        decay = [p for p in self.parameters() if p.dim() > 1]
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.dim() <= 1], 0.01, momentum=0.937, nesterov=True)
        optimizer.add_param_group({"params": decay, "weight_decay": 5e-4})
        return optimizer

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        warm = min(1.0, (self.trainer.global_step + 1) / max(10, self.trainer.num_training_batches))
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * warm
        optimizer.step(closure=optimizer_closure)


@job(size=4, count=lambda batch: len(batch["img"]))
def grid_detector(callbacks: list[Any]) -> None:
    """Targets in one tensor, whose length has nothing to do with the batch size."""
    loader = DataLoader(Shapes(), 4, shuffle=True, collate_fn=collate_flat)
    trainer(callbacks, precision="16-mixed").fit(GridDetector(), loader)
