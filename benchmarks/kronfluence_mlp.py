"""EK-FAC influence end to end against kronfluence 1.0.1 on one model, one data set, one precision, one process.

    pip install torch==2.13.0 accelerate einops pandas psutil safetensors
    pip install --no-deps kronfluence==1.0.1 einconv opt_einsum
    pip install . && python benchmarks/kronfluence_mlp.py

Model: MLP 784-512-256-128-10, 2,000 training examples and 100 queries of synthetic Gaussian classes, float32,
2 threads. Timed on both sides: factors at the final model and 100 x 2,000 scores; the median of the repeats. Prints one
JSON line.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from harness import quiet
from kronfluence_scores import Classification, ekfac_scores
from task_networks import mlp
from tasks import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_source import SourceCallback, SourceScorer

TRAIN, QUERIES, CLASSES, BATCH = 2000, 100, 10, 256
WIDTHS = (784, 512, 256, 128, CLASSES)


def data(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, 784, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return TensorDataset(0.3 * centres[labels] + torch.randn(count, 784, generator=generator), labels)


class Classifier(L.LightningModule):
    """A plain classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(*WIDTHS)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def ours(model: Classifier, run: str, train: TensorDataset, query: TensorDataset) -> tuple[float, Tensor]:
    """Seconds and scores; the factors are deleted first, so that every repeat fits them again."""
    scorer = SourceScorer.from_run(run, model)
    scorer.run.store.commit(remove=tuple(n for n in scorer.run.store.manifest.files if n.startswith("segments/")))
    start = time.perf_counter()
    scores = scorer.score(query, train, method="influence", batch_size=BATCH)
    return time.perf_counter() - start, scores.values


class Loss(Classification):
    """Measured by the loss."""

    def compute_measurement(self, batch, model):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    quiet(arguments.threads)
    L.seed_everything(0, verbose=False)
    train, query = data(TRAIN, 1), data(QUERIES, 2)
    with tempfile.TemporaryDirectory() as directory:
        model = Classifier()
        run = str(Path(directory) / "run")
        callback = SourceCallback(run, mode="deferred", factor_examples=None)
        quiet_trainer(3, callback).fit(model, DataLoader(train, 64, shuffle=True))
        mine, factors, totals = [], [], []
        for repeat in range(arguments.repeats):
            seconds, scores = ours(model, run, train, query)
            mine.append(seconds)
            network = mlp(*WIDTHS)
            network.load_state_dict(model.net.state_dict())
            reference, fitting, seconds = ekfac_scores(network, Loss(), train, query, f"repeat{repeat}", directory)
            factors.append(fitting)
            totals.append(seconds)
    correlation = torch.corrcoef(torch.stack([scores.flatten(), reference.flatten()]))[0, 1]
    print(
        json.dumps(
            {
                "lightning_source_seconds": round(statistics.median(mine), 3),
                "kronfluence_seconds": round(statistics.median(totals), 3),
                "kronfluence_factor_seconds": round(statistics.median(factors), 3),
                "ratio": round(statistics.median(totals) / statistics.median(mine), 2),
                "score_correlation": round(float(correlation), 4),
                "repeats": arguments.repeats,
                "threads": arguments.threads,
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
