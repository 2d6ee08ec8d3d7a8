"""lightly: its transforms make lists of views, of which its collation makes batches; its losses may keep a memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.clients.job import job
from benchmarks.clients.styles.common import trainer


class Views(Dataset[Any]):
    """Random pictures through a transform, with a label and a file's name."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        picture = Image.fromarray(np.random.default_rng(index).integers(0, 255, (48, 48, 3), np.uint8))
        return self.transform(picture), index % 10, f"{index}.png"


def backbone() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def samples(batch: Any) -> int:
    return len(batch[1])


class SimCLR(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        self.backbone, self.projection_head = backbone(), SimCLRProjectionHead(16, 32, 16)
        self.criterion = NTXentLoss()

    def training_step(self, batch: Any, batch_index: int) -> torch.Tensor:
        view0, view1 = batch[0]
        z0, z1 = (self.projection_head(self.backbone(view).flatten(start_dim=1)) for view in (view0, view1))
        loss = self.criterion(z0, z1)
        self.log("train_loss", loss, batch_size=len(z0))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.06)


@job(size=4, count=samples)
def lightly_simclr(callbacks: list[Any]) -> None:
    """The module of its tutorial."""
    from lightly.transforms import SimCLRTransform

    loader = DataLoader(Views(SimCLRTransform(input_size=32)), batch_size=4, shuffle=True, drop_last=True)
    trainer(callbacks).fit(SimCLR(), loader)


class MoCo(SimCLR):
    """A momentum encoder, and a memory bank that grows with its first batch."""

    def __init__(self) -> None:
        import copy

        from lightly.loss import NTXentLoss
        from lightly.models.utils import deactivate_requires_grad

        super().__init__()
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NTXentLoss(memory_bank_size=(64, 16))

    def training_step(self, batch: Any, batch_index: int) -> torch.Tensor:
        from lightly.models.utils import update_momentum
        from lightly.utils.scheduler import cosine_schedule

        momentum = cosine_schedule(self.current_epoch, 10, 0.996, 1)
        update_momentum(self.backbone, self.backbone_momentum, m=momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, m=momentum)
        query, key = batch[0]
        q = self.projection_head(self.backbone(query))
        k = self.projection_head_momentum(self.backbone_momentum(key)).detach()
        return self.criterion(q, k)


@job(size=4, count=samples)
def lightly_moco(callbacks: list[Any]) -> None:
    """The memory bank of its loss."""
    from lightly.transforms import MoCoV2Transform

    loader = DataLoader(Views(MoCoV2Transform(input_size=32)), batch_size=4, shuffle=True, drop_last=True)
    trainer(callbacks).fit(MoCo(), loader)


class DINO(pl.LightningModule):
    """A list of crops of two sizes, a teacher, and a step of its own before the optimizer's."""

    def __init__(self) -> None:
        super().__init__()
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        self.student_backbone, self.teacher_backbone = backbone(), backbone()
        self.student_head = DINOProjectionHead(16, 32, 16, 32, freeze_last_layer=1)
        self.teacher_head = DINOProjectionHead(16, 32, 16, 32)
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_head)
        self.criterion = DINOLoss(output_dim=32, warmup_teacher_temp_epochs=5)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        from lightly.models.utils import update_momentum

        update_momentum(self.student_backbone, self.teacher_backbone, m=0.99)
        views = [view.to(self.device) for view in batch[0]]
        teacher = [self.teacher_head(self.teacher_backbone(view)) for view in views[:2]]
        student = [self.student_head(self.student_backbone(view)) for view in views]
        return self.criterion(teacher, student, epoch=self.current_epoch)

    def on_after_backward(self) -> None:
        self.student_head.cancel_last_layer_gradients(current_epoch=self.current_epoch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.001)


@job(size=4, count=samples)
def lightly_dino(callbacks: list[Any]) -> None:
    """Views of two sizes in one list."""
    from lightly.transforms import DINOTransform

    views = Views(DINOTransform(global_crop_size=32, local_crop_size=16, n_local_views=2))
    trainer(callbacks).fit(DINO(), DataLoader(views, batch_size=4, shuffle=True, drop_last=True))
