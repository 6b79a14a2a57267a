"""A temporal convolutional network of Darts, whose Trainer is its own; callbacks go in by ``pl_trainer_kwargs``."""

from __future__ import annotations

import pytorch_lightning as L
from darts import TimeSeries
from darts.models import TCNModel
from series import table
from setup import Callbacks, SetUp

NAME = "darts: TCN"
REQUIREMENTS = ["darts==0.48.1"]


def build(seed: int) -> SetUp:
    """The model's training."""

    def fit(callbacks: Callbacks) -> L.Trainer:
        L.seed_everything(seed, verbose=False)
        options = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "callbacks": callbacks}
        model = TCNModel(
            input_chunk_length=12,
            output_chunk_length=4,
            num_filters=4,
            dropout=0.0,
            batch_size=8,
            n_epochs=2,
            random_state=seed,
            pl_trainer_kwargs=options,
        )
        model.fit([TimeSeries.from_values(own["value"].to_numpy()) for _, own in table().groupby("group")])
        return model.trainer

    return SetUp(fit=fit)
