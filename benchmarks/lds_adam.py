"""LDS on an Adam run of the digits recipe, against retraining done here: SOURCE's App. D hybrid beside its rivals.

    pip install ".[test]"
    python benchmarks/lds_adam.py --data ../shared/data/ground_truth/digits_mlp_20_epochs.safetensors \
        --out benchmarks/results/lds_adam.json

The data and the network are those of :mod:`lds_digits`; training is Adam at 1e-3, or AdamW at 3e-3 with decay 1e-2, for
20 epochs. Ground truth: margins after 5 retrainings on each of 100 half subsets, all copies trained at once.
"""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lds_digits import DigitClassifier, lds, report
from retraining import half_subsets, initial, margins, train_stage
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from lightning_source import SourceCallback

EPOCHS, BATCH, SUBSETS, RETRAININGS = 20, 32, 100, 5
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2),
}
ROWS: dict[str, dict[str, Any]] = {
    "source (defaults)": {},
    "source, L=3": {"segments": 3},
    "influence": {"method": "influence"},
    "tracin": {"method": "tracin"},
    "gradient dot": {"method": "grad-dot"},
    "gradient cosine": {"method": "grad-cos"},
}


def ground_truth(data: dict[str, torch.Tensor], optimizer: Callable[[Any], torch.optim.Optimizer]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    count = len(data["train_x"])
    subsets = half_subsets(SUBSETS, count, generator)
    kept = subsets.float().topk(count // 2, 1).indices.repeat(RETRAININGS, 1)
    parameters = initial(len(kept), generator)
    train_stage(parameters, data["train_x"], data["train_y"], kept, optimizer, EPOCHS, BATCH, generator)
    found = margins(parameters, data["query_x"], data["query_y"]).view(RETRAININGS, SUBSETS, -1).mean(0)
    return data | {"subsets": subsets, "measurement": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = load_file(arguments.data)
    results: dict[str, dict[str, list[float]]] = {}
    for name, optimizer in OPTIMIZERS.items():
        truth = ground_truth(data, optimizer)
        for seed in range(arguments.seeds):
            L.seed_everything(seed, verbose=False)
            model = DigitClassifier()
            model.configure_optimizers = lambda: optimizer(model.parameters())  # type: ignore[method-assign]  # noqa: B023
            with tempfile.TemporaryDirectory() as directory:
                trainer = L.Trainer(
                    max_epochs=EPOCHS,
                    accelerator="cpu",
                    callbacks=[SourceCallback(directory + "/run")],
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                )
                loader = DataLoader(
                    TensorDataset(data["train_x"], data["train_y"]), BATCH, shuffle=True, drop_last=True
                )
                trainer.fit(model, loader)
                for row, options in ROWS.items():
                    query = [data["query_x"], data["query_y"]]
                    scores = trainer.attribute(query, measurement="margin", **options)  # type: ignore[attr-defined]
                    results.setdefault(row, {}).setdefault(name, []).append(lds(truth, scores.values))
    report(results, arguments.seeds, arguments.out)


if __name__ == "__main__":
    main()
