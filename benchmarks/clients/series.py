"""Small synthetic series for the libraries that forecast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader


def table(series: int = 4, length: int = 40) -> pd.DataFrame:
    """Noisy seasonal series, one row for each point of time of each."""
    generator = np.random.default_rng(0)
    time = np.tile(np.arange(length), series)
    group = np.repeat(np.arange(series), length)
    value = np.sin(2 * np.pi * (time / 8 + group / series)) + 3 + 0.2 * generator.standard_normal(len(time))
    return pd.DataFrame({"time": time, "group": group.astype(str), "value": value.astype(np.float32)})


def one_epoch(trainer: Any) -> DataLoader:
    """The windows of one epoch of a stream of batches, as examples."""
    rows = []
    for batch in trainer.train_dataloader:
        tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        rows += [{name: value[i] for name, value in tensors.items()} for i in range(len(next(iter(tensors.values()))))]
    return DataLoader(rows, batch_size=8)


def forecasting_data(known: Sequence[str] = ("time",)) -> object:
    """Windows of the series as pytorch-forecasting's data set."""
    from pytorch_forecasting import TimeSeriesDataSet
    from pytorch_forecasting.data import GroupNormalizer

    return TimeSeriesDataSet(
        table(),
        time_idx="time",
        target="value",
        group_ids=["group"],
        min_encoder_length=12,
        max_encoder_length=12,
        min_prediction_length=4,
        max_prediction_length=4,
        static_categoricals=["group"] if known else [],
        time_varying_known_reals=list(known),
        time_varying_unknown_reals=["value"],
        target_normalizer=GroupNormalizer(groups=["group"]),
    )
