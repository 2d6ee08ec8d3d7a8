"""How long a plan takes, beside Lightning's BatchSizeFinder (binsearch) in the same run.

    tests/nullgpu/nullgpu python -m benchmarks.speed.planning_time [--only PATTERN] [--no-finder]
    python -m benchmarks.speed.planning_time --host-memory [--only PATTERN]   # what a trace takes beside the weights

On the null GPU a training step computes nothing, so the finder's steps cost it next to nothing: on a real card it
takes longer. Seconds depend on the machine; the ratio is what counts. Needs torchvision; monai and transformers for
some rows.
"""

from __future__ import annotations

import argparse
import logging
import re
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BatchSizeFinder
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightning_memplan as mp


class Samples(Dataset[tuple[torch.Tensor, int]]):
    """The same sample, 20,000 times: reading data should not be what is timed."""

    def __init__(self, sample: torch.Tensor) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return 20_000

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.sample, 0


class Data(pl.LightningDataModule):
    def __init__(self, sample: torch.Tensor) -> None:
        super().__init__()
        self.sample, self.batch_size = sample, 2

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, int]]:
        return DataLoader(Samples(self.sample), batch_size=self.batch_size)


class Task(pl.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        out = self.network(batch[0])
        out = getattr(out, "logits", out)
        return out.float().square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def image(size: int = 224) -> torch.Tensor:
    return torch.zeros(3, size, size)


def torchvision_model(name: str) -> Callable[[], tuple[nn.Module, torch.Tensor]]:
    def make() -> tuple[nn.Module, torch.Tensor]:
        from torchvision.models import get_model

        return get_model(name), image()

    return make


def unet() -> tuple[nn.Module, torch.Tensor]:
    from monai.networks.nets import UNet

    network = UNet(3, 1, 3, channels=(32, 64, 128, 256, 320), strides=(2, 2, 2, 2), num_res_units=2)
    return network, torch.zeros(1, 96, 96, 96)


def language_model() -> tuple[nn.Module, torch.Tensor]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=1600, n_layer=32, n_head=25, n_positions=512)  # 1.06 billion parameters
    return GPT2LMHeadModel(config), torch.zeros(512, dtype=torch.long)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "ResNet-50": torchvision_model("resnet50"),
    "ViT-L/16": torchvision_model("vit_l_16"),
    "Swin-S": torchvision_model("swin_s"),
    "3D U-Net": unet,
    "GPT-2, 1 billion": language_model,
}


def finder(network: nn.Module, sample: torch.Tensor) -> tuple[float, int]:
    """Seconds that BatchSizeFinder takes, and what it finds."""
    data = Data(sample)
    found: list[float] = []

    class Timed(BatchSizeFinder):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            began = time.perf_counter()
            super().on_fit_start(trainer, pl_module)
            found.append(time.perf_counter() - began)

    trainer(Timed(mode="binsearch", max_trials=40)).fit(Task(network), datamodule=data)
    return found[0], data.batch_size


def planner(network: nn.Module, sample: torch.Tensor, method: Any) -> tuple[float, int]:
    """Seconds that MemoryPlanner's setup takes, and what it plans."""
    data = Data(sample)
    found: list[float] = []

    class Timed(mp.MemoryPlanner):
        def setup(self, *args: Any, **kwargs: Any) -> None:
            began = time.perf_counter()
            super().setup(*args, **kwargs)
            found.append(time.perf_counter() - began)

    trainer(Timed(method=method, history=False)).fit(Task(network), datamodule=data)
    return found[0], data.batch_size


def traced_bytes(network: nn.Module, sample: torch.Tensor) -> int:
    """Bytes by which the process is larger for a trace, at most."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    batch = (sample.expand(2, *sample.shape).clone(), torch.zeros(2))
    mp.estimate(Task(network), batch, method="trace", precision="16-mixed", device="RTX 3090")
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def trainer(callback: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        accelerator="gpu",
        devices=1,
        precision="16-mixed",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        default_root_dir=tempfile.mkdtemp(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose name matches this")
    parser.add_argument("--host-memory", action="store_true", help="no times, but what a trace takes of the host")
    parser.add_argument("--no-finder", action="store_true", help="leave BatchSizeFinder out")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if args.host_memory:
        mp.estimate(nn.Linear(8, 8), torch.zeros(2, 8), method="trace")  # imports are there before
    else:
        print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}: seconds (batch size)")
        print(
            f"{'network':<18}{'parameters':>12}{'trace':>16}{'probe':>16}{'finder':>16}{'trace/finder':>14}{'probe/finder':>14}"
        )
        planner(nn.Linear(8, 8), torch.zeros(8), "probe")  # CUDA and imports are there before anything is timed
        planner(nn.Linear(8, 8), torch.zeros(8), "trace")
    for name, make in NETWORKS.items():
        if not re.search(args.only, name):
            continue
        try:
            network, sample = make()
        except ImportError as error:
            print(f"{name:<18}needs {error.name}")
            continue
        if args.host_memory:
            print(
                f"{name:<18}host memory beyond the weights {traced_bytes(network, sample) / 2**30:.2f} GiB", flush=True
            )
            continue
        trace = planner(network, sample, "trace")
        probe = planner(network, sample, "probe")
        search = None if args.no_finder else finder(network, sample)
        count = sum(p.numel() for p in network.parameters())
        row = f"{name:<18}{count / 1e6:>10.1f} M"
        for timed in (trace, probe, search):
            row += f"{'-':>16}" if timed is None else f"{timed[0]:>9.2f} ({timed[1]:>4})"
        if search is not None:
            row += f"{trace[0] / search[0]:>14.3f}{probe[0] / search[0]:>14.3f}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
