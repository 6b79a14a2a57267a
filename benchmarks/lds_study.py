"""Study 1: the linear datamodeling score of every estimator on a task, single models and ensembles.

    pip install ".[test]"
    python benchmarks/lds_study.py --task concrete --data DATA --cache CACHE
    python benchmarks/lds_study.py --quick

``DATA`` holds the files that ``docs/results.md`` names; what needs hours to compute is kept in ``CACHE`` and taken from
there in the next call. Each row is computed for several trainings of the full model; the ensemble averages their
scores. The figures go to ``benchmarks/results/lds_TASK.json``, from which :mod:`make_results` makes the tables.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import Scores, Trial, by, command, parser, prepare, result_file, rounded, versions, write
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from task_networks import sequence_loss
from tasks import TASKS, Task, ground_truth
from torch import Tensor
from torch.func import grad, vmap

from lightning_source import InfluenceScores
from lightning_source.ensembling import ensemble
from lightning_source.evaluation import RemovalCorrelation, linear_datamodeling_score
from lightning_source.evaluation.exact import flat_network
from lightning_source.evaluation.lds import DatamodelingResult
from lightning_source.evaluation.statistics import mean_interval
from lightning_source.evaluation.unrolled import adam, batches, sgd, unrolled_scores


def exact_unrolling(trial: Trial) -> Tensor:
    """The exact derivative of one run of the recipe with respect to the examples' weights."""
    task, train = trial.task, trial.data.train
    torch.manual_seed(trial.seed)
    module = task.build()
    vector, network = flat_network(module)
    settings = task.optimizer(module.parameters()).defaults

    def called(parameters: Tensor, *inputs: Tensor, **named: Tensor) -> Any:
        return network(parameters, *inputs, *named.values())

    def losses(parameters: Tensor, ids: Tensor) -> Tensor:
        if "lm" in task.tags:
            return sequence_loss(partial(called, parameters), train[0][ids])
        outputs, targets = network(parameters, train[0][ids]), train[1][ids]
        if targets.is_floating_point():
            return F.mse_loss(outputs.squeeze(-1), targets, reduction="none")
        return F.cross_entropy(outputs, targets, reduction="none")

    def measured(parameters: Tensor, *query: Tensor) -> Tensor:
        return task.measurement(partial(called, parameters), *(t.unsqueeze(0) for t in query))[0]

    if "betas" in settings:
        decoupled = bool(settings["decoupled_weight_decay"])
        start, step = adam(losses, settings["betas"], settings["eps"], settings["weight_decay"], decoupled)
    else:
        start, step = sgd(losses, settings["momentum"], weight_decay=settings["weight_decay"])
    order = [torch.randperm(len(train[0])).split(task.batch_size) for _ in range(task.epochs)]
    steps = batches([ids for epoch in order for ids in epoch if len(ids) == task.batch_size], settings["lr"])
    queries = trial.data.query
    return unrolled_scores(
        step,
        start(vector),
        steps,
        lambda parameters: vmap(grad(measured), in_dims=(None, *(0 for _ in queries)))(parameters, *queries),
        len(train[0]),
        queries_at_once=25,
    )


def bergson(python: str, method: str, reduction: str = "mean", segments: int = 0) -> Scores:
    def scores(trial: Trial) -> Tensor:
        config = trial.task.build().config.to_json_string()
        further = trial.checkpoints(segments) if segments else None
        return trial.peer("bergson_scores.py", python, method, reduction, config, further=further)

    return scores


def random(trial: Trial) -> Tensor:
    generator = torch.Generator().manual_seed(trial.seed)
    return torch.randn(len(trial.data.query[0]), len(trial.data.train[0]), generator=generator)


# Products of the Gauss-Newton matrix with every query are what these cost; few examples and steps bound them.
ITERATIVE: dict[str, dict[str, Any]] = {
    "influence-cg": {"iterations": 10, "factor_examples": 512, "preconditioner": "ekfac"},
    "influence-lissa": {"depth": 100},
    "astra": {"iterations": 40},
    "astra-source": {"iterations": 10, "factor_examples": 128},
}
FEW = 3  # trainings of the full model for rows in SLOW
SLOW = {*ITERATIVE, "datainf", "exact unrolling", "kronfluence EK-FAC"}
# The modules that bergson follows, for a comparison on equal terms.
BODY = ["*.attn.*", "*.mlp.*"]
IN_BODY: dict[str, tuple[str, dict[str, Any]]] = {
    "source, linear layers of the body": ("source", {"removal": "few", "adaptive": "hybrid"}),
    "influence, linear layers of the body": ("influence", {}),
}
ROWS: dict[str, Scores] = {
    "source": by("source"),
    "source, few": by("source", removal="few"),
    "source, few, cross-layer": by("source", removal="few", cross_layer=True),
    "source, trajectory alone": by("source", cross_layer=False),
    "source, hybrid": by("source", adaptive="hybrid"),
    "source, few, hybrid": by("source", removal="few", adaptive="hybrid"),
    "source, few, L=3, points": by("source", {"snapshots": "point"}, removal="few", segments=3),
    "fast-source": by("fast-source"),
    "fast-source, few": by("fast-source", removal="few"),
    "influence": by("influence"),
    "influence, damping 1/Λ": lambda trial: trial.score("influence", damping=1 / trial.learning()),
    **{method: by(method, **options) for method, options in ITERATIVE.items()},
    "datainf": by("datainf"),
    "tracin": by("tracin"),
    "grad-dot": by("grad-dot"),
    "grad-cos": by("grad-cos"),
    "trak": by("trak"),
    "repsim": by("repsim"),
    "random": random,
}
# Rows whose scores have the size of the change that they predict.
SIZED = {*(row for row in ROWS if row.startswith(("source", "fast-source", "influence", "astra"))), "exact unrolling"}


def scores_of(trial: Trial, row: str, rows: dict[str, Scores]) -> InfluenceScores:
    """A row's scores and, in the metadata, the ``seconds`` that they took; from the cache if it has them."""
    slug = re.sub(r"[^a-z0-9.=]+", "-", row.lower().replace("λ", "rate")).strip("-")
    file = trial.cache / "scores" / f"{trial.name}-{trial.share:g}" / f"{slug}-{trial.seed}.safetensors"
    if file.exists():
        return InfluenceScores.load(file)
    trial.scorer()  # training is no part of the time
    trial.peer_seconds = None
    start = time.perf_counter()
    found = rows[row](trial)
    seconds = trial.peer_seconds or time.perf_counter() - start
    if isinstance(found, Tensor):
        found = InfluenceScores(found.float(), torch.arange(found.shape[1]), torch.arange(len(found)))
    found.metadata["seconds"] = seconds
    file.parent.mkdir(parents=True, exist_ok=True)
    found.save(file)
    return found


def figures(
    scores: Sequence[InfluenceScores], kept: Tensor, measured: Tensor, reference: Tensor | None, sized: bool
) -> tuple[dict[str, Any], DatamodelingResult, Tensor]:
    """LDS of single models and of their ensemble, with 95 % intervals over queries.

    Args:
        scores: of each model.
        kept: ``[S, N]``.
        measured: ``[R, S, Q]``.
        reference: SOURCE's LDS by query, ``[Q]``, that this row's is compared with query by query.
        sized: whether to give the slope of actual on predicted change as well, 1 where scores have the right size.

    Returns:
        The figures, the first model's own result, and the LDS by query averaged over models, ``[Q]``.
    """
    results = [linear_datamodeling_score(s, kept, measured, resamples=50) for s in scores]
    queries = torch.stack([r.per_query for r in results]).mean(0)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {
        "single": rounded([r.lds for r in results]),
        "mean": rounded(queries.mean()),
        "interval": rounded(mean_interval(queries, generator)),
        "subset_interval": rounded(torch.stack([r.subset_interval for r in results]).mean(0)),
    }
    if sized:
        sizes = [size_of(one, kept, measured) for one in scores]
        found["slope"] = rounded(torch.stack([slope for slope, _ in sizes]).mean())
        found["slope_interval"] = rounded(torch.stack([interval for _, interval in sizes]).mean(0))
    if len(scores) > 1:
        together = linear_datamodeling_score(ensemble(scores), kept, measured, resamples=200)
        found["ensemble"] = rounded(together.lds)
        found["ensemble_interval"] = rounded(together.interval)
    if reference is not None:
        ahead = reference - queries
        found["source_ahead"] = rounded(ahead.mean())
        found["source_ahead_interval"] = rounded(mean_interval(ahead, generator))
    return found, results[0], queries


def size_of(scores: InfluenceScores, kept: Tensor, measured: Tensor) -> tuple[Tensor, Tensor]:
    """Slope of actual on predicted change over subsets, queries pooled about their means, and its 95 % interval."""
    metric = RemovalCorrelation(kept, resamples=100, controls=1)
    metric.update(scores, measured)
    result = metric.compute()
    return result.slope, result.slope_interval


def study(
    name: str, task: Task, arguments: argparse.Namespace, rows: dict[str, Scores], reference: str, stem: str
) -> dict[str, Any]:
    """Every row on one task, written to the results after each."""
    data = task.load(arguments.data)
    file = result_file(arguments, f"{stem}_{name}")
    with tempfile.TemporaryDirectory() as temporary:
        cache = arguments.cache or Path(temporary)
        start = time.perf_counter()
        kept, measured = ground_truth(name, task, data, arguments.share, cache)
        report: dict[str, Any] = {
            "task": name,
            "note": task.note,
            "command": command(name, arguments, rows),
            "versions": versions(),
            "examples": len(data.train[0]),
            "queries": len(data.query[0]),
            "subsets": len(kept),
            "share": arguments.share,
            "retrainings": len(measured),
            "training_seeds": list(range(arguments.seeds)),
            "retraining_seconds": round(time.perf_counter() - start, 1),
            "reliability": None,
            "control": None,
            "lds": {},
            "refused": {},  # rows that an estimator does not do on this task, and why
        }
        trials = [Trial(name, task, data, seed, cache, arguments.share) for seed in range(arguments.seeds)]
        anchor = None
        for row in rows:
            try:
                scores = [scores_of(trial, row, rows) for trial in (trials[:FEW] if row in SLOW else trials)]
            except MisconfigurationException as refusal:
                report["refused"][row] = str(refusal)
                continue
            entry, first, queries = figures(scores, kept, measured, anchor, row in SIZED)
            entry["seconds"] = round(statistics.median(s.metadata["seconds"] for s in scores), 2)
            report["lds"][row] = entry
            if row == reference:
                anchor = queries
                report["control"] = {"lds": rounded(first.control), "interval": rounded(first.control_interval)}
                report["reliability"] = None if first.reliability is None else rounded(first.reliability)
            print(f"{name:14s} {row:32s} {json.dumps(entry, ensure_ascii=False)}", flush=True)
            write(with_earlier_rows(report, file, arguments, reference), file)
    return report


def with_earlier_rows(
    report: dict[str, Any], file: Path | None, arguments: argparse.Namespace, reference: str
) -> dict[str, Any]:
    """The report with the rows that an earlier call found on the same ground truth.

    Where this call has found the reference anew, an earlier row's distance from it is the difference of the two means;
    its interval over queries is not known any more.
    """
    if file is None or not file.exists():
        return report
    earlier = json.loads(file.read_text())
    same = ("note", "examples", "queries", "subsets", "share", "retrainings")
    if any(earlier[key] != report[key] for key in same):
        return report
    rows = {row: dict(entry) for row, entry in earlier["lds"].items() if row not in report["lds"]}
    before, now = (of["lds"].get(reference, {}).get("mean") for of in (earlier, report))
    if now is not None and now != before:
        for entry in rows.values():
            if "source_ahead" in entry:
                entry["source_ahead"] = round(now - entry["mean"], 4)
                entry.pop("source_ahead_interval", None)
    rows |= report["lds"]
    of_reference = {key: report[key] or earlier[key] for key in ("reliability", "control")}
    refused = {row: why for row, why in (earlier["refused"] | report["refused"]).items() if row not in rows}
    line = command(report["task"], arguments, rows)
    return report | of_reference | {"command": line, "lds": rows, "refused": refused}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parser(__doc__)
    options.add_argument("--rows", nargs="*", help="only these rows")
    options.add_argument("--kronfluence", metavar="PYTHON", help="interpreter of an environment with kronfluence")
    options.add_argument("--bergson", metavar="PYTHON", help="interpreter of an environment with bergson")
    arguments = options.parse_args(argv)
    prepare(arguments)
    reports = []
    for name in arguments.task:
        task = TASKS[name]
        rows = {row: scores for row, scores in ROWS.items() if task.adaptive or "hybrid" not in row}
        if task.tags & {"mlp", "lm"}:
            rows["exact unrolling"] = exact_unrolling
        if arguments.kronfluence and "mlp" in task.tags:
            rows["kronfluence EK-FAC"] = lambda trial: trial.peer("kronfluence_scores.py", arguments.kronfluence)
        if arguments.bergson and "lm" in task.tags:
            rows |= {row: by(method, {"include": BODY}, **options) for row, (method, options) in IN_BODY.items()}
            rows["bergson EK-FAC"] = bergson(arguments.bergson, "ekfac")
            rows["bergson SOURCE"] = bergson(arguments.bergson, "source", segments=1)
            rows["bergson SOURCE, L=3"] = bergson(arguments.bergson, "source", segments=3)
            rows["bergson SOURCE, summed tokens"] = bergson(arguments.bergson, "source", "sum", segments=1)
        rows = {row: rows[row] for row in arguments.rows or rows}
        reports.append(study(name, task, arguments, rows, "source", "lds"))
    return reports


if __name__ == "__main__":
    main()
