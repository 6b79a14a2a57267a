"""kronfluence 1.0.1 on a row of :mod:`speed`: EK-FAC influence from factors to scores."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from speed_networks import Row
from torch import Tensor, nn


class RowTask(Task):
    """A row's losses; queries are measured by their mean loss."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.row = row

    def compute_train_loss(self, batch, model, sample=False):
        return self.row.sampled_loss(model, *batch) if sample else self.row.each_loss(model, *batch).sum()

    def compute_measurement(self, batch, model):
        return self.row.each_loss(model, *batch).sum()


def kronfluence_scores(
    row: Row, network: nn.Module, folder: Path, name: str, device: str, empirical: bool = False
) -> Tensor:
    """Scores ``[Q, N]`` with its usual damping, 0.1 times a layer's mean eigenvalue.

    Args:
        row: data and losses.
        network: as training left it; it is copied.
        folder: for files.
        name: of the analysis; another one fits its factors anew.
        device: where it runs.
        empirical: take curvature from the data's own labels.
    """
    copy = row.network()
    copy.load_state_dict(network.state_dict())
    task = RowTask(row)
    analyzer = Analyzer(
        name,
        prepare_model(copy.to(device), task),
        task,
        cpu=device == "cpu",
        output_dir=str(folder),
        disable_tqdm=True,
        disable_model_save=True,
    )
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(num_workers=0))
    analyzer.fit_all_factors(
        "factors",
        row.train,
        per_device_batch_size=row.batch,
        factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=empirical),
    )
    analyzer.compute_pairwise_scores(
        "scores",
        "factors",
        row.query,
        row.train,
        per_device_query_batch_size=len(row.query),
        per_device_train_batch_size=row.batch,
        score_args=ScoreArguments(damping_factor=None),
    )
    return analyzer.load_pairwise_scores("scores")["all_modules"]


def kronfluence_seconds(row: Row, network: nn.Module, folder: Path, name: str, device: str) -> float:
    """Seconds of factors and scores."""
    start = time.perf_counter()
    kronfluence_scores(row, network, folder, name, device)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
