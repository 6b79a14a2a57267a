"""PyTorch Tabular's category embedding model, as in its first tutorial; callbacks are an argument of ``fit``."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytorch_lightning as L
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig
from setup import Callbacks, SetUp

NAME = "pytorch_tabular: category embedding"
REQUIREMENTS = ["pytorch_tabular==1.2.0", "requests"]


def build(seed: int) -> SetUp:
    """The model's training."""

    def fit(callbacks: Callbacks) -> L.Trainer:
        generator = np.random.default_rng(0)
        frame = pd.DataFrame(generator.standard_normal((64, 3)), columns=list("abc"))
        frame["kind"] = generator.integers(0, 4, 64).astype(str)
        frame["label"] = (frame["a"] + 0.5 * generator.standard_normal(64) > 0).astype(int)
        model = TabularModel(
            data_config=DataConfig(target=["label"], continuous_cols=list("abc"), categorical_cols=["kind"]),
            model_config=CategoryEmbeddingModelConfig(task="classification", layers="16-8", dropout=0.0, seed=seed),
            optimizer_config=OptimizerConfig(),
            trainer_config=TrainerConfig(
                batch_size=8,
                max_epochs=2,
                accelerator="cpu",
                early_stopping=None,
                checkpoints=None,
                load_best=False,
                progress_bar="none",
                seed=seed,
            ),
            verbose=False,
        )
        model.fit(train=frame, validation=frame[:8], callbacks=callbacks)
        return model.trainer

    return SetUp(fit=fit)
