"""scvi-tools: a Trainer and a runner of its own; ``DataLoader(batch_size=None, sampler=BatchSampler(...))``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.clients.job import job


def _cells(cells: int = 96, genes: int = 40) -> Any:
    import anndata
    import scipy.sparse

    random = np.random.default_rng(0)
    data = anndata.AnnData(scipy.sparse.csr_matrix(random.poisson(1.0, (cells, genes)).astype(np.float32)))
    data.obs["batch"] = [f"batch {index % 2}" for index in range(cells)]
    data.obs["kind"] = [("T", "B", "unknown")[index % 3] for index in range(cells)]
    return data


def _settings(callbacks: list[Any]) -> dict[str, Any]:
    torch.distributions.Distribution.set_default_validate_args(False)  # which Pyro turns on when it is imported
    trainer = {"max_epochs": 2, "accelerator": "gpu", "devices": 1, "callbacks": callbacks}
    return {**trainer, "batch_size": 16, "train_size": 0.8}


@job(size=16)
def scvi_scvi(callbacks: list[Any]) -> None:
    """A variational autoencoder of counts."""
    import scvi

    data = _cells()
    scvi.model.SCVI.setup_anndata(data, batch_key="batch")
    scvi.model.SCVI(data, n_hidden=16, n_latent=4).train(**_settings(callbacks))


@job(size=16)
def scvi_early(callbacks: list[Any]) -> None:
    """The same with early stopping, and checks of the validation set."""
    import scvi

    data = _cells()
    scvi.model.SCVI.setup_anndata(data)
    model = scvi.model.SCVI(data, n_hidden=16, n_latent=4, gene_likelihood="nb")
    model.train(early_stopping=True, check_val_every_n_epoch=1, **_settings(callbacks))


@job(size=16)
def scvi_scanvi(callbacks: list[Any]) -> None:
    """Half-supervised: a loader of all cells and one of the labelled, concatenated."""
    import scvi

    data = _cells()
    scvi.model.SCANVI.setup_anndata(data, labels_key="kind", unlabeled_category="unknown")
    scvi.model.SCANVI(data, n_hidden=16, n_latent=4).train(**_settings(callbacks))


@job(size=16)
def scvi_peakvi(callbacks: list[Any]) -> None:
    """Open chromatin, as dense arrays."""
    import scvi

    data = _cells()
    data.X = (data.X.toarray() > 0).astype(np.float32)
    scvi.model.PEAKVI.setup_anndata(data)
    scvi.model.PEAKVI(data, n_hidden=16, n_latent=4).train(**_settings(callbacks))
