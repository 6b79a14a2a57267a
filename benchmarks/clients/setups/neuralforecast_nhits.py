"""NHITS of NeuralForecast, which makes its Trainer itself and drops it; callbacks are among the model's arguments."""

from __future__ import annotations

import pandas as pd
import pytorch_lightning as L
from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS
from series import table
from setup import Callbacks, SetUp

NAME = "neuralforecast: NHITS"
REQUIREMENTS = ["neuralforecast==3.3.0"]


def build(seed: int) -> SetUp:
    """The model's training."""

    def fit(callbacks: Callbacks) -> L.Trainer:
        L.seed_everything(seed, verbose=False)
        frame = table(series=16).rename(columns={"group": "unique_id", "value": "y"})
        frame["ds"] = pd.Timestamp("2020-01-01") + pd.to_timedelta(frame.pop("time"), unit="D")
        model = NHITS(
            h=4,
            input_size=12,
            max_steps=8,
            batch_size=4,
            windows_batch_size=None,
            mlp_units=3 * [[16, 16]],
            random_seed=seed,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            callbacks=callbacks,
        )
        forecast = NeuralForecast([model], freq="D")
        forecast.fit(frame)
        # The library copies its models and their callbacks, and keeps no Trainer: the copy of ours has it.
        return next(c.trainer for c in forecast.models[0].trainer_kwargs["callbacks"] if hasattr(c, "trainer"))

    return SetUp(fit=fit)
