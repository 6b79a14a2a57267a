"""GluonTS's feed-forward estimator, which makes its Trainer itself; callbacks go in by ``trainer_kwargs``."""

from __future__ import annotations

import lightning.pytorch as L
import pandas as pd
from gluonts.dataset.common import ListDataset
from gluonts.torch import SimpleFeedForwardEstimator
from series import one_epoch, table
from setup import Callbacks, SetUp

NAME = "gluonts: feed-forward"
REQUIREMENTS = ["gluonts[torch]==0.17.0"]


def data() -> ListDataset:
    """The series in GluonTS's form."""
    groups = table().groupby("group")
    entries = [{"start": pd.Period("2020-01-01", "D"), "target": own["value"].to_numpy()} for _, own in groups]
    return ListDataset(entries, freq="D")


def build(seed: int) -> SetUp:
    """The estimator's training, and its module."""

    def fit(callbacks: Callbacks) -> L.Trainer:
        L.seed_everything(seed, verbose=False)
        estimator = SimpleFeedForwardEstimator(
            prediction_length=4,
            context_length=12,
            hidden_dimensions=[16, 16],
            batch_size=8,
            num_batches_per_epoch=4,
            trainer_kwargs={"max_epochs": 2, "logger": False, "enable_progress_bar": False, "callbacks": callbacks},
        )
        return estimator.train_model(data()).trainer

    return SetUp(fit=fit, examples=one_epoch)
