"""EK-FAC influence end to end against kronfluence 1.0.1 on one model, one data set, one precision, one process.

    pip install torch==2.13.0 accelerate einops pandas psutil safetensors
    pip install --no-deps kronfluence==1.0.1 einconv opt_einsum
    pip install . && python benchmarks/kronfluence_mlp.py

Model: MLP 784-512-256-128-10, 2,000 training examples and 100 queries of synthetic Gaussian classes, float32,
2 threads. Timed on both sides: factors at the final model and 100 x 2,000 scores; the median of the repeats. Prints one
JSON line.
"""

import argparse
import itertools
import json
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_source import SourceCallback, SourceScorer

TRAIN, QUERIES, CLASSES, BATCH = 2000, 100, 10, 256


def build() -> nn.Sequential:
    widths = [784, 512, 256, 128, CLASSES]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def data(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, 784, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return TensorDataset(0.3 * centres[labels] + torch.randn(count, 784, generator=generator), labels)


class Classifier(L.LightningModule):
    """A plain classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def ours(model: Classifier, run: str, train: TensorDataset, query: TensorDataset) -> tuple[float, torch.Tensor]:
    """Seconds and scores; the factors are deleted first, so that every repeat fits them again."""
    scorer = SourceScorer.from_run(run, model)
    scorer.run.store.commit(remove=tuple(n for n in scorer.run.store.manifest.files if n.startswith("segments/")))
    start = time.perf_counter()
    scores = scorer.score(query, train, method="influence", batch_size=BATCH)
    return time.perf_counter() - start, scores.values


def theirs(
    model: nn.Sequential, train: TensorDataset, query: TensorDataset, name: str, directory: str
) -> tuple[dict[str, float], torch.Tensor]:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits = model(batch[0])
            labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten() if sample else batch[1]
            return F.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch, model):
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    task = Classification()
    prepared = prepare_model(model, task)
    analyzer = Analyzer(
        name, prepared, task, cpu=True, output_dir=directory, disable_tqdm=True, disable_model_save=True
    )
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(num_workers=0))
    seconds, start = {}, time.perf_counter()
    analyzer.fit_all_factors(
        "factors", train, per_device_batch_size=BATCH, factor_args=FactorArguments(strategy="ekfac")
    )
    seconds["factors"] = time.perf_counter() - start
    analyzer.compute_pairwise_scores(
        "scores",
        "factors",
        query,
        train,
        per_device_query_batch_size=QUERIES,
        per_device_train_batch_size=BATCH,
        score_args=ScoreArguments(damping_factor=None),
    )
    seconds["total"] = time.perf_counter() - start
    return seconds, analyzer.load_pairwise_scores("scores")["all_modules"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(0, verbose=False)
    train, query = data(TRAIN, 1), data(QUERIES, 2)
    with tempfile.TemporaryDirectory() as directory:
        model = Classifier()
        run = str(Path(directory) / "run")
        trainer = L.Trainer(
            max_epochs=3,
            accelerator="cpu",
            callbacks=[SourceCallback(run, mode="deferred", factor_examples=None)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, DataLoader(train, 64, shuffle=True))
        mine, kron = [], []
        for repeat in range(arguments.repeats):
            seconds, scores = ours(model, run, train, query)
            mine.append(seconds)
            net = build()
            net.load_state_dict(model.net.state_dict())
            split, reference = theirs(net, train, query, f"repeat{repeat}", directory)
            kron.append(split)
    correlation = torch.corrcoef(torch.stack([scores.flatten(), reference.flatten()]))[0, 1]
    totals = [k["total"] for k in kron]
    print(
        json.dumps(
            {
                "lightning_source_seconds": round(statistics.median(mine), 3),
                "kronfluence_seconds": round(statistics.median(totals), 3),
                "kronfluence_factor_seconds": round(statistics.median(k["factors"] for k in kron), 3),
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
