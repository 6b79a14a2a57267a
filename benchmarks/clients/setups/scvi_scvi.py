"""scvi-tools' variational autoencoder, as in its introductory tutorial; callbacks are an argument of ``train``."""

from __future__ import annotations

from typing import Any

import anndata
import lightning.pytorch as L
import numpy as np
import scvi
import torch
from setup import Callbacks, SetUp

NAME = "scvi-tools: SCVI"
REQUIREMENTS = ["scvi-tools==1.4.2"]


def cells() -> anndata.AnnData:
    """Counts of genes in cells of two kinds."""
    generator = np.random.default_rng(0)
    kind = generator.integers(0, 2, 64)
    rates = generator.gamma(2.0, 1.0, (2, 20))[kind]
    data = anndata.AnnData(generator.poisson(rates).astype(np.float32))
    data.obs["kind"] = [["one", "two", "unknown"][k if i % 4 else 2] for i, k in enumerate(kind)]
    return data


def tensors(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The library's data set gives whole batches, of arrays."""
    return {name: torch.as_tensor(value) for name, value in batch.items()}


def build(seed: int) -> SetUp:
    """The model's training."""

    def fit(callbacks: Callbacks) -> L.Trainer:
        scvi.settings.seed = seed
        data = cells()
        scvi.model.SCVI.setup_anndata(data)
        model = scvi.model.SCVI(data, n_hidden=8, n_latent=3, dropout_rate=0.0)
        model.train(
            max_epochs=2,
            accelerator="cpu",
            batch_size=16,
            train_size=1.0,
            enable_progress_bar=False,
            logger=False,
            callbacks=callbacks,
        )
        return model.trainer

    return SetUp(fit=fit, batch=lambda loader, ids: tensors(loader.dataset[ids]), noisy=True)
