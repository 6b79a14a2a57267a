"""Study 4: which training labels are wrong? Self-influence beside the loss and the gradient's norm.

    python benchmarks/mislabel_study.py --task digits-20 fashion-small --data DATA --cache CACHE
    python benchmarks/mislabel_study.py --quick

A share of the training labels is replaced by another class. Each example is suspected by its own score on its own loss,
and the figures are the AUC over examples and what inspection in that order finds (the cost curve).
"""

from __future__ import annotations

import json
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import Trial, command, parser, prepare, result_file, rounded, versions, write
from tasks import TASKS, Data, Task
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_source.evaluation import MislabelDetection

INSPECTED = (0.05, 0.1, 0.2, 0.3, 0.5)  # shares at which the cost curve is kept


def own(method: str, **options: Any) -> Callable[[Trial], Tensor]:
    """The diagonal of a method's scores with the training examples as queries, measured by their loss."""

    def suspicion(trial: Trial) -> Tensor:
        scorer = trial.scorer()
        scorer.measurement = "loss"
        train = TensorDataset(*trial.data.train)
        pieces = []
        for ids in torch.arange(len(train)).split(256):
            query = [t[ids] for t in trial.data.train]
            pieces.append(scorer.score(query, train, method=method, train_ids=ids, **options).values.diagonal())
        return torch.cat(pieces)

    return suspicion


def source(trial: Trial) -> Tensor:
    return trial.scorer().self_influence(TensorDataset(*trial.data.train))


def final_loss(trial: Trial) -> Tensor:
    network = trial.task.build()
    network.load_state_dict(trial.network())
    inputs, labels = trial.data.train
    with torch.no_grad():
        return F.cross_entropy(network.eval()(inputs), labels, reduction="none")


ROWS: dict[str, Callable[[Trial], Tensor]] = {
    "source": source,
    "fast-source": own("fast-source"),
    "influence": own("influence"),
    "tracin": own("tracin"),
    "gradient norm": own("grad-dot"),
    "loss": final_loss,
}


def with_errors(data: Data, share: float) -> tuple[Data, Tensor]:
    """The data with other labels for a share of the training examples, and which they are, ``[N]``."""
    inputs, labels = data.train
    classes = int(labels.max()) + 1
    generator = torch.Generator().manual_seed(2)
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    planted = torch.zeros(len(labels), dtype=torch.bool)
    planted[chosen] = True
    other = (labels + torch.randint(1, classes, labels.shape, generator=generator)) % classes
    return Data([inputs, torch.where(planted, other, labels)], data.query), planted


def study(name: str, task: Task, arguments: Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for share in (0.1, 0.3):
        data, planted = with_errors(task.load(arguments.data), share)
        rows: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as temporary:
            cache = arguments.cache or Path(temporary)
            trials = [Trial(f"{name}-{share}", task, data, s, cache) for s in range(arguments.seeds)]
            for row, suspicion in ROWS.items():
                results = []
                for trial in trials:
                    detection = MislabelDetection(resamples=200)
                    detection.update(suspicion(trial), planted)
                    results.append(detection.compute())
                places = [round(s * len(planted)) for s in INSPECTED]
                rows[row] = {
                    "auc": rounded([r.auc for r in results]),
                    "mean": round(statistics.mean(float(r.auc) for r in results), 4),
                    "interval": rounded(torch.stack([r.auc_interval for r in results]).mean(0)),
                    "area": rounded(torch.stack([r.area for r in results]).mean()),
                    "found": rounded(torch.stack([r.found[places] for r in results]).mean(0)),
                }
                print(f"{name} {share:.0%} {row:16s} {json.dumps(rows[row])}", flush=True)
        found[f"{share:g}"] = rows
    report = {
        "task": name,
        "note": task.note,
        "command": command(name, arguments),
        "versions": versions(),
        "training_seeds": list(range(arguments.seeds)),
        "inspected": INSPECTED,
        "noise": found,
    }
    write(report, result_file(arguments, f"mislabel_{name}"))
    return report


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = parser(__doc__, trainings=3).parse_args(argv)
    prepare(arguments)
    return [study(name, TASKS[name], arguments) for name in arguments.task]


if __name__ == "__main__":
    main()
