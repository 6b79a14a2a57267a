"""Study 6: how often do the error bars of scores hold, at a level of 90 %?

    python benchmarks/error_bars.py --task digits-3 --cache CACHE
    python benchmarks/error_bars.py --quick

Three questions of each task, over all pairs of a query and a training example:

- *ensemble*: does the interval of an ensemble of some runs hold the mean score over the other runs?
- *snapshots*: does the interval of one run (``stderr=True``) hold it?
- *retraining*: does the interval of an ensemble, the noise of the retrainings added, hold the actual change of the
  measurement when an example is left out? Asked of the examples with the largest scores, where an effect can be seen.
"""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import Trial, command, parser, prepare, result_file, rounded, versions, write
from tasks import TASKS, Data, Task, retrain
from torch import Tensor

from lightning_source import InfluenceScores
from lightning_source._student import student_quantile
from lightning_source.ensembling import ensemble
from lightning_source.evaluation import leave_one_out_subsets

LEVEL = 0.9
MEMBERS = (2, 3, 5)
EXAMPLES, RETRAININGS = 16, 100


def covered(scores: InfluenceScores, truth: Tensor, noise: Tensor | float = 0.0, others: int | None = None) -> Tensor:
    """The share of intervals that hold the truth.

    Args:
        scores: with an error bar.
        truth: ``[Q, N]``.
        noise: standard error of the truth itself, known well.
        others: of how many further runs like those of an ensemble the truth is the mean; its own error then widens the
            interval as it does in a comparison of two means, exactly so for normal scores.
    """
    assert scores.stderr is not None
    quantile = student_quantile(LEVEL, scores.metadata["error_bar"]["degrees"])
    wider = 1.0 if others is None else 1 + (scores.metadata["error_bar"]["degrees"] + 1) / others
    squares = quantile**2 * wider * scores.stderr.square() + student_quantile(LEVEL, 1000) ** 2 * noise**2
    width = squares.sqrt()
    return ((scores.values - truth).abs() <= width).float().mean()


def against_other_runs(runs: Sequence[InfluenceScores]) -> dict[str, Any]:
    """Coverage of the mean score over the runs that an interval was not made from."""
    found: dict[str, Any] = {}
    values = torch.stack([run.values for run in runs])
    for count in (count for count in MEMBERS if 2 * count <= len(runs)):
        shares, significant = [], []
        for start in range(0, len(runs) - count + 1, count):
            scores = ensemble(runs[start : start + count])
            others = torch.cat([values[:start], values[start + count :]])
            shares.append(covered(scores, others.mean(0), others=len(others)))
            significant.append(scores.significant(LEVEL).float().mean())
        found[f"ensemble of {count}"] = {
            "covered": rounded(torch.stack(shares).mean()),
            "significant": rounded(torch.stack(significant).mean()),
        }
    shares = []
    for index, run in enumerate(runs):
        others = torch.cat([values[:index], values[index + 1 :]])
        noise = others.std(0) / len(others) ** 0.5 if len(others) > 1 else 0.0
        shares.append(covered(run, others.mean(0), noise))
    found["snapshots of one run"] = {
        "covered": rounded(torch.stack(shares).mean()),
        "significant": rounded(torch.stack([run.significant(LEVEL).float().mean() for run in runs]).mean()),
        "stderr over spread of runs": rounded(
            torch.stack([(run.stderr / values.std(0)).nanmedian() for run in runs if run.stderr is not None]).mean()
        ),
    }
    return found


def against_retraining(
    runs: Sequence[InfluenceScores], task: Task, data: Data, examples: int, retrainings: int
) -> dict[str, Any]:
    """Coverage of the actual change, leaving out the examples with the largest mean absolute scores."""
    chosen = ensemble(runs).values.abs().mean(0).topk(examples).indices
    count = len(data.train[0])
    kept = torch.cat([torch.ones(1, count), leave_one_out_subsets(chosen, count).float()]).repeat(retrainings, 1)
    measured = retrain(task, data, kept, range(5000, 5000 + len(kept))).double()
    measured = measured.view(retrainings, examples + 1, -1)
    change = (measured[:, 1:] - measured[:, :1]).mean(0).T  # [Q, examples]
    noise = (measured.var(0)[1:] + measured.var(0)[:1]).div(retrainings).sqrt().T
    found: dict[str, Any] = {"examples": examples, "retrainings of each": retrainings}
    for members in (count for count in (*MEMBERS, len(runs)) if count <= len(runs)):
        scores = _only(ensemble(runs[:members]), chosen)
        predicted = scores.values.double()
        weights = noise**-2
        found[f"ensemble of {members}"] = {
            "covered": rounded(covered(scores, change, noise)),
            "slope": rounded((weights * predicted * change).sum() / (weights * predicted.square()).sum()),
        }
    found["signal"] = rounded(1 - noise.square().mean() / change.square().mean())
    return found


def _only(scores: InfluenceScores, ids: Tensor) -> InfluenceScores:
    assert scores.stderr is not None
    return InfluenceScores(
        scores.values[:, ids], ids, scores.query_ids, metadata=scores.metadata, stderr=scores.stderr[:, ids]
    )


def study(name: str, arguments: Namespace) -> dict[str, Any]:
    task = TASKS[name]
    data = task.load(arguments.data)
    report: dict[str, Any] = {"task": name, "note": task.note, "command": _command(name, arguments), "level": LEVEL}
    with tempfile.TemporaryDirectory() as folder:
        cache = arguments.cache or Path(folder)
        for removal in ("few", "many"):
            runs = [
                Trial(name, task, data, seed, cache).score("source", removal=removal, stderr=True)
                for seed in range(arguments.seeds)
            ]
            report[removal] = against_other_runs(runs)
            if removal == "few" and arguments.examples:
                report["retraining"] = against_retraining(runs, task, data, arguments.examples, arguments.retrainings)
            print(name, removal, report[removal], report.get("retraining"), flush=True)
    return report | {"runs": arguments.seeds, "versions": versions()}


def _command(name: str, arguments: Namespace) -> str:
    words = [command(name, arguments)]
    words += [f"--examples {arguments.examples}"] if arguments.examples != EXAMPLES else []
    words += [f"--retrainings {arguments.retrainings}"] if arguments.retrainings != RETRAININGS else []
    return " ".join(words)


def options() -> ArgumentParser:
    known = parser(__doc__, trainings=15)
    known.add_argument("--examples", type=int, default=EXAMPLES, help="how many are left out one by one")
    known.add_argument("--retrainings", type=int, default=RETRAININGS, help="without each of them")
    return known


def main() -> None:
    arguments = options().parse_args()
    prepare(arguments)
    for name in arguments.task:
        write(study(name, arguments), result_file(arguments, f"error_bars_{name}"))


if __name__ == "__main__":
    main()
