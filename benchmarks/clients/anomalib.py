"""anomalib: an Engine that makes the Trainer; batches are a class of its own that holds ``tv_tensors``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.clients.job import job


def _pictures(folder: Path, count: int) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    for index in range(count):
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (64, 64, 3), np.uint8)).save(
            folder / f"{index}.png"
        )


def _train(make: Callable[[], Any], callbacks: list[Any], **settings: Any) -> None:
    from anomalib.data import Folder
    from anomalib.engine import Engine

    with tempfile.TemporaryDirectory() as root:
        _pictures(Path(root) / "good", 32)
        _pictures(Path(root) / "broken", 6)
        data = Folder(
            name="parts", root=root, normal_dir="good", abnormal_dir="broken", train_batch_size=4, eval_batch_size=4,
            num_workers=0,
        )  # fmt: skip
        engine = Engine(
            callbacks=callbacks, default_root_dir=root, accelerator="gpu", devices=1, enable_progress_bar=False,
            **settings,
        )  # fmt: skip
        engine.fit(make(), datamodule=data)


def samples(batch: Any) -> int:
    return len(batch.image)


@job(size=4, count=samples)
def anomalib_padim(callbacks: list[Any]) -> None:
    """Nothing is optimized: one epoch of features, then a fit."""
    from anomalib.models import Padim

    _train(
        lambda: Padim(backbone="resnet18", layers=["layer1"], pre_trained=False, n_features=8, evaluator=False),
        callbacks,
    )


@job(size=4, count=samples)
def anomalib_fastflow(callbacks: list[Any]) -> None:
    """A normalizing flow on features."""
    from anomalib.models import Fastflow

    _train(
        lambda: Fastflow(backbone="resnet18", pre_trained=False, flow_steps=2, evaluator=False), callbacks, max_epochs=2
    )


@job(size=4, count=samples)
def anomalib_stfpm(callbacks: list[Any]) -> None:
    """A student of a teacher, whose weights are left as they come."""
    from anomalib.models import Stfpm
    from anomalib.models.image.stfpm import torch_model

    extractor = torch_model.TimmFeatureExtractor

    def untrained(**options: Any) -> Any:
        return extractor(**{**options, "pre_trained": False})

    with mock.patch.object(torch_model, "TimmFeatureExtractor", untrained):
        model = Stfpm(evaluator=False)
    _train(lambda: model, callbacks, max_epochs=2)


@job(size=4, count=samples)
def anomalib_ganomaly(callbacks: list[Any]) -> None:
    """An adversarial autoencoder by manual optimization."""
    from anomalib.models import Ganomaly

    _train(lambda: Ganomaly(batch_size=4, n_features=8, latent_vec_size=8, evaluator=False), callbacks, max_epochs=2)
