"""scvi-tools' semi-supervised SCANVI, as in its tutorial on label transfer; callbacks are an argument of ``train``."""

from __future__ import annotations

import anndata
import lightning.pytorch as L
import numpy as np
import scvi
from setup import Callbacks, SetUp

NAME = "scvi-tools: SCANVI"
REQUIREMENTS = ["scvi-tools==1.4.2"]


def cells() -> anndata.AnnData:
    """Counts of genes in cells of two kinds."""
    generator = np.random.default_rng(0)
    kind = generator.integers(0, 2, 64)
    rates = generator.gamma(2.0, 1.0, (2, 20))[kind]
    data = anndata.AnnData(generator.poisson(rates).astype(np.float32))
    data.obs["kind"] = [["one", "two", "unknown"][k if i % 4 else 2] for i, k in enumerate(kind)]
    return data


def build(seed: int) -> SetUp:
    """The model's training."""

    def fit(callbacks: Callbacks) -> L.Trainer:
        scvi.settings.seed = seed
        data = cells()
        scvi.model.SCANVI.setup_anndata(data, labels_key="kind", unlabeled_category="unknown")
        model = scvi.model.SCANVI(data, n_hidden=8, n_latent=3, dropout_rate=0.0)
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

    return SetUp(fit=fit, noisy=True)
