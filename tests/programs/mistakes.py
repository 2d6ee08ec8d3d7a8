"""Mistakes of a user's, which training raises: with the planner and without it.

``python mistakes.py '{"accelerator": "gpu", "devices": 1}'`` prints a JSON object for each mistake. Run by
``test_users_errors.py`` on the null GPU; the test runs them on the CPU itself.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import lightning_memplan as mp

CARD = mp.Device("a card", total=2**33)


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.ones(8) * index, "y": torch.tensor(index % 3)}


class Right(pl.LightningModule):
    """Makes no mistake."""

    batch_size = 4

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.first(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch["x"]), batch["y"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(Rows(), batch_size=self.batch_size)


class StepRaises(Right):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise ValueError("the step is not written yet")


class StepRaisesLater(Right):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            raise ValueError("the second batch is wrong")
        return super().training_step(batch, batch_idx)


class ShapesDiffer(Right):
    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.first(x[:, :5]))


class ViewsWrongly(Right):
    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.first(x.view(5, -1)))


class AddsWrongly(Right):
    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.first(x) + x)


class CatsWrongly(Right):
    def forward(self, x: torch.Tensor) -> Any:
        return self.second(torch.cat([self.first(x), x[:2, :6]], dim=1))


class TypesDiffer(Right):
    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.first(x.double()))


class TargetsWrong(Right):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch["x"]), batch["y"].float()[:, None, None])


class IndexesByFloats(Right):
    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.first(x)[x[:, 0]])


class NoKey(Right):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch["image"]), batch["y"])


class NoAttribute(Right):
    def forward(self, x: torch.Tensor) -> Any:
        return self.third(self.second(self.first(x)))


class NoName(Right):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return criterion(self(batch["x"]), batch["y"])  # type: ignore[name-defined] # noqa: F821


class NotTensors(Right):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch), batch["y"])


class NoGradients(Right):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx).detach()


class NotScalar(Right):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch["x"])


class Text(Right):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return "loss"


class NoLoss(Right):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"cross_entropy": super().training_step(batch, batch_idx)}


class Asserts(Right):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert batch["x"].shape == (4, 9), f"wrong shape: {batch['x'].shape}"
        return super().training_step(batch, batch_idx)


class ShowsTensors(Right):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise ValueError(f"cannot handle {batch['x'][0, :2]}")


class InPlace(Right):
    def forward(self, x: torch.Tensor) -> Any:
        hidden = torch.sigmoid(self.first(x))
        out = self.second(hidden)
        hidden.mul_(2)
        return out


class TwiceBackward(Right):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        self.manual_backward(loss)


class OptimizersRaise(Right):
    def configure_optimizers(self) -> Any:
        raise KeyError("lr")


class OptimizersEmpty(Right):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([], lr=0.1)


class OptimizersWrong(Right):
    def configure_optimizers(self) -> Any:
        return "adam"


class SchedulerWrong(Right):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"interval": "step"}}


class SetupRaises(Right):
    def setup(self, stage: str) -> None:
        raise FileNotFoundError("vocabulary.txt")


class ConfigureModelRaises(Right):
    def configure_model(self) -> None:
        raise ImportError("no module named timm")


class LoaderRaises(Right):
    def train_dataloader(self) -> Any:
        raise FileNotFoundError("/data/train")


class LoaderWrong(Right):
    def train_dataloader(self) -> Any:
        return 5


class Missing(Rows):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 1:
            raise OSError("image_1.png is truncated")
        return super().__getitem__(index)


class SampleMissing(Right):
    def train_dataloader(self) -> Any:
        return DataLoader(Missing(), batch_size=self.batch_size)


class Ragged(Rows):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.ones(8 + index), "y": torch.tensor(0)}


class CannotBeStacked(Right):
    def train_dataloader(self) -> Any:
        return DataLoader(Ragged(), batch_size=self.batch_size)


def wrong_collate(samples: list[Any]) -> Any:
    return torch.stack([sample["image"] for sample in samples])


class CollateRaises(Right):
    def train_dataloader(self) -> Any:
        return DataLoader(Rows(), batch_size=self.batch_size, collate_fn=wrong_collate)


class LogsWrongly(Right):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("hidden", self.first(batch["x"])[:2])
        return super().training_step(batch, batch_idx)


class HookRaises(Right):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        raise RuntimeError("no batch is wanted")


class TransferRaises(Right):
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.to(device)


class StepRaisesInOptimizer(Right):
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("the learning rate's schedule")


class OnOtherDevice(Right):
    """A mistake on a GPU alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + (batch["x"] * torch.ones(8)).mean()


class NotRegistered(Right):
    """A layer in a list stays on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(8, 8)]

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(self.layers[0](x))


class ToNumpy(Right):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        weight = self(batch["x"]).numpy().mean()
        return super().training_step(batch, batch_idx) * weight


MISTAKES: list[type[Right]] = Right.__subclasses__()
ON_GPU = [OnOtherDevice, NotRegistered]


def raised(kind: type[Right], settings: dict[str, Any], planner: mp.MemoryPlanner | None) -> dict[str, Any]:
    """What training raises: its type, its text, and the last line of this file that it passed."""
    torch.manual_seed(1)
    found: dict[str, Any] = {"type": "", "text": "", "line": 0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = pl.Trainer(
            max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[] if planner is None else [planner], **settings,
        )  # fmt: skip
        try:
            trainer.fit(kind())
        except BaseException as error:  # noqa: BLE001 - whatever was raised
            lines = [each.lineno for each in traceback.extract_tb(error.__traceback__) if each.filename == __file__]
            found = {"type": type(error).__name__, "text": str(error), "line": lines[-1]}
    said = [str(each.message) for each in caught if str(each.message).startswith("MemoryPlanner")]
    return {**found, "said": [text for text in said if "measures nothing" not in text]}


def compared(kind: type[Right], settings: dict[str, Any]) -> dict[str, Any]:
    """A mistake without the planner, with one for information, and with one that sets the batch size."""
    on_cpu = settings["accelerator"] == "cpu"
    planners = {
        "without": None,
        "default": mp.MemoryPlanner(),
        "applied": mp.MemoryPlanner(apply=True, max_batch_size=4, **({"device": CARD} if on_cpu else {})),
    }
    return {"kind": kind.__name__, **{name: raised(kind, settings, planner) for name, planner in planners.items()}}


def main(settings: str, *names: str) -> None:
    for kind in MISTAKES:
        if not names or kind.__name__ in names:
            print("SHOWN", json.dumps(compared(kind, json.loads(settings))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
