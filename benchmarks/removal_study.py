"""Study 4, SOURCE's subset removal: are queries misclassified once the examples that helped them most are gone?

    python benchmarks/removal_study.py --task fashion-small --data DATA --cache CACHE
    python benchmarks/removal_study.py --quick

For queries that the full model classifies correctly, the top ``k`` proponents of each are removed, for growing ``k``,
and the network is retrained three times on the rest; the figure is the share of trainings that then misclassify the
query. The baseline removes random examples of the query's own label.
"""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import Scores, Trial, by, command, parser, prepare, result_file, rounded, versions, write
from tasks import TASKS, Data, Task, retrain
from torch import Tensor

from lightning_source.evaluation import SubsetRemoval, own_query, without_proponents, without_random_same_label

RETRAININGS = 3
ROWS: dict[str, Scores] = {
    "source": by("source", removal="few"),
    "influence": by("influence"),
    "tracin": by("tracin"),
    "grad-dot": by("grad-dot"),
}


def correct(network: Callable[..., Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
    return (network(inputs).argmax(-1) == labels).float()


def outcomes(task: Task, data: Data, masks: Tensor) -> Tensor:
    """``[R, K, Q]``: whether each query was right after each removal of its own."""
    copies = masks.flatten(0, 1).repeat(RETRAININGS, 1)
    found = retrain(replace(task, measurement=correct), data, copies, range(5000, 5000 + len(copies)), progress=True)
    return own_query(found.view(RETRAININGS, -1, found.shape[1]), len(masks))


def always_right(task: Task, data: Data, queries: int) -> Data:
    """The first queries that ten trainings on all examples classify correctly every time."""
    whole = torch.ones(10, len(data.train[0]), dtype=torch.bool)
    right = retrain(replace(task, measurement=correct), data, whole, range(9000, 9010)).bool().all(0)
    return Data(data.train, [t[right][:queries] for t in data.query])


def study(name: str, task: Task, arguments: Namespace) -> dict[str, Any]:
    data = always_right(task, task.load(arguments.data), arguments.queries)
    examples = len(data.train[0])
    sizes = [round(share * examples) for share in arguments.removed]
    report: dict[str, Any] = {
        "task": name,
        "note": task.note,
        "command": command(name, arguments),
        "versions": versions(),
        "queries": len(data.query[0]),
        "examples": examples,
        "sizes": sizes,
        "retrainings": RETRAININGS,
        "flipped": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        trial = Trial(f"{name}-removal", task, data, 0, arguments.cache or Path(temporary))
        random = outcomes(task, data, without_random_same_label(data.train[1], data.query[1], sizes))
        for row, scores in ROWS.items():
            masks = without_proponents(scores(trial), sizes, lower_is_better=False)
            metric = SubsetRemoval(sizes)
            metric.update(outcomes(task, data, masks), random)
            result = metric.compute()
            report["flipped"][row] = {
                "share": rounded(result.flipped),
                "interval": [rounded(i) for i in result.interval],
                "gain": rounded(result.gain),
                "gain_interval": rounded(result.gain_interval),
            }
            report["flipped"]["random, same label"] = {
                "share": rounded(result.random),
                "interval": [rounded(i) for i in result.random_interval],
            }
            print(f"{name} {row:12s} {json.dumps(report['flipped'][row])}", flush=True)
            write(report, result_file(arguments, f"removal_{name}"))
    return report


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parser(__doc__)
    options.add_argument("--queries", type=int, default=15)
    options.add_argument("--removed", type=float, nargs="+", default=[0.02, 0.04, 0.08, 0.16], help="shares")
    arguments = options.parse_args(argv)
    prepare(arguments)
    if arguments.quick:
        arguments.queries = min(arguments.queries, 10)
    return [study(name, TASKS[name], arguments) for name in arguments.task]


if __name__ == "__main__":
    main()
