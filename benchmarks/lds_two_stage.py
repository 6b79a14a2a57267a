"""LDS across two stages: what the first stage's examples did to the model that the second stage left behind.

    pip install ".[test]"
    python benchmarks/lds_two_stage.py --out benchmarks/results/lds_two_stage.json

Stage 1 trains the network of :mod:`lds_digits` on 640 of scikit-learn's digits, stage 2 goes on with 640 others,
rotated by 45 degrees. The final model's margins on 150 further digits, upright and rotated, are attributed to examples
of stage 1. Ground truth: margins after 40 retrainings of both stages on each of 100 half subsets of stage 1, the
second stage complete, all copies trained at once; how well one half of the retrainings predicts the other is the first
row. Influence and the gradient products know the final model and stage
1's objective; TracIn knows stage 1's snapshots; SOURCE carries the query back through stage 2.
"""

import argparse
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lds_digits import DigitClassifier, lds, report
from retraining import Parameters, half_subsets, initial, margins, train_stage
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_source import SourceCallback

FIRST, SECOND, QUERIES, ANGLE = 640, 640, 150, 45.0
EPOCHS, BATCH, SUBSETS, RETRAININGS = (20, 10), 32, 100, 40
ROWS: dict[str, dict[str, Any]] = {
    "source (defaults)": {},
    "source, L=3 a stage": {"segments": 3},
    "source, point snapshots": {"snapshots": "point"},
    "fast-source": {"method": "fast-source"},
    "influence at the final model": {"method": "influence"},
    "tracin": {"method": "tracin"},
    "gradient dot": {"method": "grad-dot"},
    "gradient cosine": {"method": "grad-cos"},
}


def rotated(images: Tensor, degrees: float) -> Tensor:
    """Digits ``[N, 64]`` turned about their centre, bilinear, zeros outside."""
    angle = torch.tensor(degrees).deg2rad()
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    matrix = torch.cat([turn, torch.zeros(2, 1)], 1).expand(len(images), 2, 3)
    grid = F.affine_grid(matrix, [len(images), 1, 8, 8], align_corners=False)
    return F.grid_sample(images.view(-1, 1, 8, 8), grid, align_corners=False).flatten(1)


def digits() -> dict[str, Tensor]:
    """Both stages' examples and both kinds of queries, none shared."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images, dtype=torch.float32) / 16, torch.as_tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    first, second, query = order[: FIRST + SECOND + QUERIES].split([FIRST, SECOND, QUERIES])
    return {
        "first_x": x[first],
        "first_y": y[first],
        "second_x": rotated(x[second], ANGLE),
        "second_y": y[second],
        "upright queries": x[query],
        "rotated queries": rotated(x[query], ANGLE),
        "query_y": y[query],
    }


TASKS = ("upright queries", "rotated queries")


def optimizer(parameters: Parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.03, momentum=0.9)


def ground_truth(data: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """By task, the subsets, the mean margins after retraining on them, and those of either half of the retrainings."""
    generator = torch.Generator().manual_seed(0)
    subsets = half_subsets(SUBSETS, FIRST, generator)
    kept = subsets.float().topk(FIRST // 2, 1).indices.repeat(RETRAININGS, 1)
    parameters = initial(len(kept), generator)
    train_stage(parameters, data["first_x"], data["first_y"], kept, optimizer, EPOCHS[0], BATCH, generator)
    everything = torch.arange(SECOND).expand(len(kept), -1)
    train_stage(parameters, data["second_x"], data["second_y"], everything, optimizer, EPOCHS[1], BATCH, generator)
    found = {}
    for task in TASKS:
        all_margins = margins(parameters, data[task], data["query_y"]).view(2, RETRAININGS // 2, SUBSETS, -1)
        halves = all_margins.mean(1)
        found[task] = {"subsets": subsets, "measurement": halves.mean(0), "halves": halves}
    return found


def reliability(halves: Tensor) -> float:
    """Mean over queries of the Spearman correlation between two halves ``[2, subsets, queries]``."""
    return sum(float(spearmanr(*halves[:, :, q]).statistic) for q in range(halves.shape[2])) / halves.shape[2]


def train(data: dict[str, Tensor], seed: int, directory: str) -> L.Trainer:
    """The recipe under the callback: two fits."""
    L.seed_everything(seed, verbose=False)
    model, source = DigitClassifier(), SourceCallback(directory)
    for stage, epochs in zip(("first", "second"), EPOCHS, strict=True):
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[source.stage(stage)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        examples = TensorDataset(data[f"{stage}_x"], data[f"{stage}_y"])
        trainer.fit(model, DataLoader(examples, BATCH, shuffle=True, drop_last=True))
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = digits()
    truth = ground_truth(data)
    results = {"retraining, one half for the other": {task: [reliability(truth[task]["halves"])] for task in TASKS}}
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as directory:
            trainer = train(data, seed, directory + "/run")
            for row, options in ROWS.items():
                for task in TASKS:
                    query = [data[task], data["query_y"]]
                    scores = trainer.attribute(query, stage="first", measurement="margin", **options)  # type: ignore[attr-defined]
                    results.setdefault(row, {}).setdefault(task, []).append(lds(truth[task], scores.values))
    report(results, arguments.seeds, arguments.out)


if __name__ == "__main__":
    main()
