"""DeepAR with a normal likelihood, as in pytorch-forecasting's tutorial on autoregressive modelling."""

from __future__ import annotations

import lightning.pytorch as L
from pytorch_forecasting import DeepAR
from series import forecasting_data
from setup import SetUp

NAME = "pytorch-forecasting: DeepAR"
REQUIREMENTS = ["pytorch-forecasting==1.8.0"]


def build(seed: int) -> SetUp:
    """The model, its windows of synthetic series, and how it is trained."""
    L.seed_everything(seed, verbose=False)
    data = forecasting_data(known=())
    module = DeepAR.from_dataset(data, learning_rate=0.01, hidden_size=8, rnn_layers=2, dropout=0.0, optimizer="adam")
    return SetUp(module, data.to_dataloader(train=True, batch_size=8, num_workers=0), {"gradient_clip_val": 0.1})
