"""A Temporal Fusion Transformer with quantile loss, as in pytorch-forecasting's tutorial on demand forecasting."""

from __future__ import annotations

import lightning.pytorch as L
from pytorch_forecasting import TemporalFusionTransformer
from pytorch_forecasting.metrics import QuantileLoss
from series import forecasting_data
from setup import SetUp

NAME = "pytorch-forecasting: TFT"
REQUIREMENTS = ["pytorch-forecasting==1.8.0"]


def build(seed: int) -> SetUp:
    """The model, its windows of synthetic series, and how it is trained."""
    L.seed_everything(seed, verbose=False)
    data = forecasting_data()
    module = TemporalFusionTransformer.from_dataset(
        data,
        learning_rate=0.01,
        hidden_size=8,
        attention_head_size=2,
        dropout=0.0,
        hidden_continuous_size=4,
        loss=QuantileLoss(),
        optimizer="adam",
    )
    return SetUp(module, data.to_dataloader(train=True, batch_size=8, num_workers=0), {"gradient_clip_val": 0.1})
