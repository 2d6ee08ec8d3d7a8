"""The figures in docs/images: a ResNet-50 planned for an RTX 3090, without one.

    tests/nullgpu/nullgpu python docs/figures.py  # or python alone, where there is a GPU

Needs: pip install "lightning-memplan[examples]"
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytorch_lightning as pl

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

from image_classifier import Classifier, Digits  # noqa: E402

import lightning_memplan as mp  # noqa: E402


def main() -> None:
    planner = mp.MemoryPlanner()
    steps = {"max_steps": 9, "limit_train_batches": 3}  # an epoch's last batch would be smaller
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="gpu", devices=1, precision="16-mixed", callbacks=[planner], **steps, **off)
    trainer.fit(Classifier(), datamodule=Digits(224))
    plan, estimate = planner.plan, planner.estimate
    assert plan is not None
    assert estimate is not None
    figures = {
        "batch_size": mp.plot_batch_sizes(estimate, plan),
        "timeline": mp.plot_timeline(estimate, plan.batch_size, device=plan.device, budget=plan.budget),
        "layers": mp.plot_layers(estimate, plan.batch_size),
        "measurements": mp.plot_measurements(planner.measurements),
    }
    for name, figure in figures.items():
        figure.savefig(HERE / "images" / f"{name}.png")


if __name__ == "__main__":
    main()
