"""A fit on two GPUs: ``python ranks.py FOLDER ddp '{"precision": ...}' '{"gradient_as_bucket_view": true}'``.

Each rank writes what was planned and measured to ``FOLDER/RANK.json``. Run by ``test_ddp.py`` on the null GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import MixedPrecision, fully_shard
from torch.distributed.fsdp.wrap import wrap

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import lightning_memplan as mp
from tests.models import Classifier, Data, mlp, transformer


class Writes(pl.Callback):
    def __init__(self, folder: str, planner: mp.MemoryPlanner) -> None:
        self.folder, self.planner = folder, planner

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        plan = self.planner.plan
        assert plan is not None
        result = {
            "batch_size": plan.batch_size,
            "set": trainer.datamodule.batch_size,  # type: ignore[attr-defined]
            "notes": plan.notes,
            "total": plan.device.total,
            "method": plan.method,
            "measured": [
                [m.predicted_allocated, m.allocated, m.predicted_reserved, m.reserved]
                for m in self.planner.measurements
            ],
        }
        Path(self.folder, f"{trainer.global_rank}.json").write_text(json.dumps(result))


def main(folder: str, name: str, settings: str, arguments: str) -> None:
    # DeepSpeed decides by values, and prints tensors: on a null GPU, by what real steps have left in memory
    engine = name == "deepspeed"
    planner = mp.MemoryPlanner(confirm=False if engine else None, max_batch_size=8 if engine else None)
    module, sample, strategy = STRATEGIES[name](json.loads(arguments))
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=2,
        strategy=strategy,
        max_steps=4,
        logger=TensorBoardLogger(folder, name="", version="logs"),
        callbacks=[planner, Writes(folder, planner)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **json.loads(settings),
    )
    trainer.fit(module, Data(sample, 1000000))


Job = tuple[pl.LightningModule, torch.Tensor, Strategy]


def ddp(arguments: dict[str, Any]) -> Job:
    return Classifier(mlp()), torch.zeros(2048), DDPStrategy(process_group_backend="gloo", **arguments)


def normed(arguments: dict[str, Any]) -> Job:
    """Channels come last, so batch norm passes its sums from block to block."""
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, stride=2)]
    net = nn.Sequential(*layers, nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2))
    net.to(memory_format=torch.channels_last)
    return Classifier(net), torch.zeros(3, 64, 64), DDPStrategy(process_group_backend="gloo", **arguments)


def fsdp(arguments: dict[str, Any]) -> Job:
    blocks = {nn.TransformerEncoderLayer}
    if arguments.pop("checkpointed", False):
        arguments["activation_checkpointing_policy"] = blocks
    if "device_mesh" in arguments:
        arguments["device_mesh"] = tuple(arguments["device_mesh"])
    if "reduced" in arguments:
        half = getattr(torch, arguments.pop("reduced"))
        arguments["mixed_precision"] = MixedPrecision(param_dtype=torch.float32, reduce_dtype=half)
    module: pl.LightningModule = Classifier(transformer())
    if arguments.pop("wraps", False):
        module = Wraps()
    elif arguments.pop("ignores", False):
        module = Ignores()
        arguments["ignored_modules"] = [module.frozen]
    if not isinstance(module, Wraps):
        arguments["auto_wrap_policy"] = blocks
    return module, torch.zeros(128, 32), FSDPStrategy(process_group_backend="gloo", **arguments)


class Wraps(Classifier):
    """Says by itself which layers are units."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def configure_model(self) -> None:
        if not isinstance(self.net, nn.Identity):
            return
        net = transformer()
        for place, layer in enumerate(net):
            if isinstance(layer, nn.TransformerEncoderLayer):
                net[place] = wrap(layer)
        self.net = wrap(net)


class Ignores(Classifier):
    """A frozen layer in front, which each rank has whole."""

    def __init__(self) -> None:
        super().__init__(transformer())
        self.frozen = nn.Linear(32, 32).requires_grad_(False)

    def on_fit_start(self) -> None:
        self.frozen.to(self.trainer.strategy.root_device)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step((self.frozen(batch[0]), batch[1]), batch_idx)


class Meshed(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def configure_model(self) -> None:
        if not isinstance(self.net, nn.Identity):
            return
        with torch.device("meta"):
            self.net = transformer()
        for layer in self.net:
            if isinstance(layer, nn.TransformerEncoderLayer):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def mesh(arguments: dict[str, Any]) -> Job:
    return Meshed(), torch.zeros(128, 32), ModelParallelStrategy(process_group_backend="gloo", **arguments)


def deepspeed(arguments: dict[str, Any]) -> Job:
    net, sample = NETS[arguments.pop("net")]
    return Classifier(net()), torch.zeros(sample), DeepSpeedStrategy(process_group_backend="gloo", **arguments)


NETS = {"mlp": (mlp, (2048,)), "transformer": (transformer, (128, 32))}
STRATEGIES = {"ddp": ddp, "normed": normed, "fsdp": fsdp, "mesh": mesh, "deepspeed": deepspeed}


if __name__ == "__main__":
    main(*sys.argv[1:])
