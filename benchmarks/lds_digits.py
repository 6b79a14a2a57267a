"""LDS on digits against retraining ground truth: how the defaults were chosen, and the rivals beside them.

    pip install ".[test]"
    python benchmarks/lds_digits.py --data ../shared/data/ground_truth --out benchmarks/results/lds_digits.json

The ground-truth files hold the data, 100 half subsets and the margins after 5 retrainings on each; their metadata
state the recipe, which is repeated here. The linear datamodeling score (method §7) is the mean over 200 queries of the
Spearman correlation between the margins on the subsets and the scores' predictions. Each row is the mean of three
trainings.
"""

import argparse
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_source import SourceCallback

# name -> (arguments of SourceCallback, arguments of attribute)
Row = tuple[dict[str, Any], dict[str, Any]]
SIX: dict[str, Any] = {"segments": 1, "snapshots_per_segment": 6}
ROWS: dict[str, Row] = {
    "source (defaults)": ({}, {}),
    "influence (EK-FAC, damping 0.1·mean)": ({}, {"method": "influence"}),
    "tracin, 6 averaged snapshots": ({}, {"method": "tracin"}),
    "gradient dot": ({}, {"method": "grad-dot"}),
    "gradient cosine": ({}, {"method": "grad-cos"}),
    "fast-source, L=1": ({}, {"method": "fast-source"}),
    "fast-source, L=3": ({}, {"method": "fast-source", "segments": 3}),
    "source, L=1, 6 averaged": (SIX, {"segments": 1}),
    "source, L=2, 6 averaged": (SIX, {"segments": 2}),
    "source, L=3, 6 averaged": (SIX, {"segments": 3}),
    "source, L=6, 6 averaged": (SIX, {"segments": 6}),
    "source, L=1, 6 points": (SIX, {"segments": 1, "snapshots": "point"}),
    "source, L=3, 6 points": (SIX, {"segments": 3, "snapshots": "point"}),
    "source, L=1, 1 averaged": ({"segments": 1, "snapshots_per_segment": 1}, {}),
    "source, L=1, 3 averaged": ({"segments": 1, "snapshots_per_segment": 3}, {}),
    "source, L=1, 12 averaged": ({"segments": 1, "snapshots_per_segment": 12}, {}),
    "source, L=1, 6 averaged, 8 label draws": (SIX | {"label_samples": 8}, {}),
    "source, L=3, 6 averaged, 8 label draws": (SIX | {"label_samples": 8}, {"segments": 3}),
    "source, L=1, 6 averaged, K-FAC eigenvalues": (SIX | {"curvature": "kfac"}, {}),
    "source, L=1, 6 averaged, diagonal": (SIX | {"curvature": "diagonal"}, {}),
}


class DigitClassifier(L.LightningModule):
    """The recipe of the ground truth."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9)


def lds(truth: dict[str, torch.Tensor], scores: torch.Tensor) -> float:
    """Mean over queries of the Spearman correlation; a subset keeps what it does not remove, hence the sign."""
    predicted = -(truth["subsets"].float() @ scores.T)
    queries = range(predicted.shape[1])
    return sum(float(spearmanr(predicted[:, q], truth["measurement"][:, q]).statistic) for q in queries) / len(queries)


def train(
    truth: dict[str, torch.Tensor], epochs: int, seed: int, directory: str, settings: dict[str, Any]
) -> L.Trainer:
    L.seed_everything(seed, verbose=False)
    model = DigitClassifier()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[SourceCallback(directory, overwrite=True, **settings)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    examples = TensorDataset(truth["train_x"], truth["train_y"])
    trainer.fit(model, DataLoader(examples, 32, shuffle=True, drop_last=True))
    return trainer


def report(results: dict[str, dict[str, list[float]]], seeds: int, out: Path | None) -> None:
    """Print the means by row and task, and write all figures to ``out``."""
    tasks = list(next(iter(results.values())))
    print("| | " + " | ".join(tasks) + " |\n|" + "---|" * (len(tasks) + 1))
    for row, found in results.items():
        print(f"| {row} | " + " | ".join(f"{sum(found[t]) / len(found[t]):.3f}" for t in tasks) + " |")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        rounded = {row: {t: [round(x, 4) for x in v] for t, v in found.items()} for row, found in results.items()}
        record = {"seeds": seeds, "torch": torch.__version__, "lightning": L.__version__, "lds": rounded}
        out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of digits_mlp_*_epochs.safetensors")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="only these rows")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for epochs in (20, 3):
            truth = load_file(arguments.data / f"digits_mlp_{epochs}_epochs.safetensors")
            for seed in range(arguments.seeds):
                trained: dict[str, L.Trainer] = {}
                for name in arguments.rows:
                    settings, options = ROWS[name]
                    key = json.dumps(settings, sort_keys=True)
                    if key not in trained:
                        where = f"{directory}/{epochs}-{seed}-{len(trained)}"
                        trained[key] = train(truth, epochs, seed, where, settings)
                    query = [truth["query_x"], truth["query_y"]]
                    scores = trained[key].attribute(query, measurement="margin", **options)  # type: ignore[attr-defined]
                    results.setdefault(name, {}).setdefault(f"{epochs} epochs", []).append(lds(truth, scores.values))
    report(results, arguments.seeds, arguments.out)


if __name__ == "__main__":
    main()
