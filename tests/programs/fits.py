"""Whole fits on a GPU, one after another in one process: ``python fits.py FOLDER NAME...`` prints a JSON line for each.

Run by ``test_callback.py`` on the null GPU; it runs on a real one as well.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn

import lightning_memplan as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.models import Classifier, Data, mlp


def cnn3d() -> nn.Module:
    """A 3D CNN on 64³ crops; its first layer makes 30 feature maps of 62³ out of one."""
    layers: list[nn.Module] = []
    for before, after in ((1, 30), (30, 60), (60, 120)):
        layers += [nn.Conv3d(before, after, 3), nn.BatchNorm3d(after), nn.ReLU(), nn.MaxPool3d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(120, 2))


def resnet50() -> nn.Module:
    import torchvision

    return torchvision.models.resnet50()


Result = dict[str, Any]


def fit(
    folder: Path,
    module: pl.LightningModule,
    data: Any,
    planner: mp.MemoryPlanner | None = None,
    *,
    logger: bool = True,
    steps: int = 6,
    **trainer: Any,
) -> Result:
    planner = planner or mp.MemoryPlanner()
    loggers = [CSVLogger(folder, name="csv", version=""), TensorBoardLogger(folder, name="tensorboard", version="")]
    whole = pl.Trainer(
        **{
            "accelerator": "gpu",
            "devices": 1,
            "max_steps": steps,
            "logger": loggers if logger else False,
            "callbacks": [planner],
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            **trainer,
        }
    )
    whole.fit(module, datamodule=data) if isinstance(data, pl.LightningDataModule) else whole.fit(module, data)
    plan = planner.plan
    assert plan is not None
    return {
        "batch_size": plan.batch_size,
        "method": plan.method,
        "limited_by": plan.limited_by,
        "total": plan.device.total,
        "steps": whole.global_step,
        "measured": [
            [m.predicted_allocated, m.allocated, m.predicted_reserved, m.reserved] for m in planner.measurements
        ],
        "phases": [[m.predicted_phases, m.phases] for m in planner.measurements],
        "data_batch_size": getattr(data, "batch_size", None),
    }


# ---------------------------------------------------------------------------------------------------- what is asked for


def resnet50_16_mixed(folder: Path) -> Result:
    return fit(folder, Classifier(resnet50()), Data(torch.zeros(3, 224, 224), 20000), precision="16-mixed")


def resnet50_32_true(folder: Path) -> Result:
    return fit(folder, Classifier(resnet50()), Data(torch.zeros(3, 224, 224), 20000), precision="32-true")


def cnn3d_32_true(folder: Path) -> Result:
    return fit(folder, Classifier(cnn3d()), Data(torch.zeros(1, 64, 64, 64), 20000), precision="32-true")


def cnn3d_16_mixed(folder: Path) -> Result:
    return fit(folder, Classifier(cnn3d()), Data(torch.zeros(1, 64, 64, 64), 20000), precision="16-mixed")


# ------------------------------------------------------------------------------------------------------- kinds of steps


def without_a_logger(folder: Path) -> Result:
    return fit(folder, Classifier(mlp()), Data(torch.zeros(2048), 4000), mp.MemoryPlanner(method="trace"), logger=False)


def accumulated_and_clipped(folder: Path) -> Result:
    return fit(
        folder,
        Classifier(mlp()),
        Data(torch.zeros(2048), 40000),
        mp.MemoryPlanner(method="trace", max_batch_size=1024),
        steps=4,
        accumulate_grad_batches=3,
        gradient_clip_val=0.5,
    )


def effective_batch_size(folder: Path) -> Result:
    planner = mp.MemoryPlanner(method="trace", max_batch_size=1000, effective_batch_size=2000)
    return fit(folder, Classifier(mlp()), Data(torch.zeros(2048), 40000), planner, steps=4)


def averaged_weights(folder: Path) -> Result:
    average, planner = pl.callbacks.EMAWeightAveraging(), mp.MemoryPlanner(method="trace", max_batch_size=1024)
    return fit(folder, Classifier(mlp()), Data(torch.zeros(2048), 40000), planner, callbacks=[planner, average])


def clipped_in_16_mixed(folder: Path) -> Result:
    planner = mp.MemoryPlanner(method="trace", max_batch_size=1024)
    return fit(
        folder, Classifier(mlp()), Data(torch.zeros(2048), 40000), planner, precision="16-mixed", gradient_clip_val=0.5
    )


def bf16_true(folder: Path) -> Result:
    planner = mp.MemoryPlanner(method="trace", max_batch_size=1024)
    return fit(folder, Classifier(mlp()), Data(torch.zeros(2048), 40000), planner, precision="bf16-true")


def channels_last(folder: Path) -> Result:
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    module = Classifier(net.to(memory_format=torch.channels_last))
    return fit(
        folder,
        module,
        Data(torch.zeros(3, 96, 96), 20000),
        mp.MemoryPlanner(method="trace", max_batch_size=512),
        precision="16-mixed",
    )


def frozen_backbone(folder: Path) -> Result:
    net = nn.Sequential(mlp(), nn.ReLU(), nn.Linear(10, 10))
    net[0].requires_grad_(False)
    return fit(
        folder, Classifier(net), Data(torch.zeros(2048), 40000), mp.MemoryPlanner(method="trace", max_batch_size=1024)
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5000, 256)
        self.head = nn.Linear(256, 5000, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(x).relu()).mean(1)


def tied_weights(folder: Path) -> Result:
    return fit(
        folder,
        Classifier(Tied()),
        Data(torch.zeros(64, dtype=torch.long), 40000),
        mp.MemoryPlanner(method="trace", max_batch_size=64),
    )


class Gan(pl.LightningModule):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.maker = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 2048))
        self.judge = nn.Sequential(nn.Linear(2048, 1024), nn.ReLU(), nn.Linear(1024, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, _ = batch
        first, second = self.optimizers()
        noise = torch.randn(len(real), 64, device=self.device)
        self.toggle_optimizer(first)
        judged = self.judge(self.maker(noise))
        loss = F.binary_cross_entropy_with_logits(judged, torch.ones_like(judged))
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        judged = self.judge(torch.cat([real, self.maker(noise).detach()]))
        loss = F.binary_cross_entropy_with_logits(judged, torch.zeros_like(judged))
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        self.untoggle_optimizer(second)
        self.log_dict({"loss": loss}, prog_bar=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.maker.parameters()), torch.optim.Adam(self.judge.parameters())


def manual_optimization(folder: Path) -> Result:
    return fit(
        folder, Gan(), Data(torch.zeros(2048), 40000), mp.MemoryPlanner(method="trace", max_batch_size=1024), steps=12
    )


def twice_with_one_callback(folder: Path) -> Result:
    planner = mp.MemoryPlanner(method="trace", max_batch_size=1024)
    first = fit(folder / "1", Classifier(mlp()), Data(torch.zeros(2048), 40000), planner, logger=False)
    second = fit(folder / "2", Classifier(mlp()), Data(torch.zeros(2048), 40000), planner, logger=False)
    return {**second, "first": first}


def does_not_fit(folder: Path) -> Result:
    planner = mp.MemoryPlanner(on_error="raise")
    held = torch.empty(20 * 2**30, dtype=torch.uint8, device="cuda")  # noqa: F841 - someone else's, in this process
    big = nn.Sequential(nn.Linear(1, 64 * 2**20), nn.Linear(64 * 2**20, 4))
    try:
        fit(folder, Classifier(big), Data(torch.zeros(1), 1000), planner, logger=False)
    except mp.DoesNotFitError as error:
        return {"text": str(error), "needed": error.needed, "available": error.available}
    return {"text": "it fitted"}


SCENARIOS: dict[str, Callable[[Path], Result]] = {
    name: thing
    for name, thing in list(globals().items())
    if callable(thing) and getattr(thing, "__annotations__", {}) == {"folder": "Path", "return": "Result"}
}


def main(folder: Path, names: list[str]) -> None:
    for name in names or list(SCENARIOS):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = SCENARIOS[name](folder / name)
            except Exception:  # noqa: BLE001 - one scenario's failure is its own
                result = {"failed": traceback.format_exc()}
        ours = [
            str(w.message) for w in caught if "lightning_memplan" in w.filename or "MemoryPlanner" in str(w.message)
        ]
        print("RESULT", json.dumps({"name": name, "warnings": ours, **result}), flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
