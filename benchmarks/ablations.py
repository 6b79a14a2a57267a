"""Study 2: what SOURCE's settings are worth: segments, snapshots, curvature, Fisher, preconditioner and subset share.

    python benchmarks/ablations.py --task digits-20 --data DATA --cache CACHE
    python benchmarks/ablations.py --task digits-20 --share 0.3 --data DATA --cache CACHE
    python benchmarks/ablations.py --quick

The reference row is SOURCE as in the paper (``removal="few"``, and its hybrid for Adam), with one segment of six
averaged snapshots; every other row changes what its name says. With ``--share`` other than a half, a few rows are
compared on subsets of that share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from harness import Scores, Trial, by, parser, prepare
from lds_study import study
from tasks import TASKS, Trained
from torch import Tensor

from lightning_source import InfluenceScores
from lightning_source.curvature.unroll import SegmentCurvature
from lightning_source.runs.run import Run

REFERENCE = "source"
PAPER = {"removal": "few", "adaptive": "hybrid"}


def source(settings: dict[str, Any] | None = None, **options: Any) -> Scores:
    return by("source", settings, **PAPER, **options)


class Empirical(Trained):
    """Names the losses of the data's own labels, of which no other labels can be drawn: the empirical Fisher."""

    def attribution_losses(self, batch: list[Tensor]) -> Tensor:
        inputs, targets = batch
        if targets.is_floating_point():
            return F.mse_loss(self.net(inputs).squeeze(-1), targets, reduction="none")
        return F.cross_entropy(self.net(inputs), targets, reduction="none")


def altered(change: Callable[[Run], None]) -> Scores:
    """SOURCE's defaults on a run that ``change`` alters in memory; nothing else sees the alteration."""

    def scores(trial: Trial) -> InfluenceScores:
        kept, trial.opened = trial.opened, {}
        change(trial.scorer().run)
        found = trial.score("source", **PAPER)
        trial.opened = kept
        return found

    return scores


def as_sgd(run: Run) -> None:
    """The optimizer's preconditioner left out."""
    run.preconditioner = lambda snapshots: {}  # type: ignore[method-assign]


def scaled(factor: float) -> Callable[[Run], None]:
    """Every learning rate times a factor."""

    def change(run: Run) -> None:
        own = run.curvatures

        def curvatures(*positional: Any, **named: Any) -> dict[str, list[SegmentCurvature]]:
            return {
                block: [one._replace(rate=factor * one.rate) for one in chain]
                for block, chain in own(*positional, **named).items()
            }

        run.curvatures = curvatures  # type: ignore[method-assign]

    return change


def as_long(method: str) -> Scores:
    """A method on a run that ends after as many steps as the retrainings on subsets take."""

    def scores(trial: Trial) -> InfluenceScores:
        steps = trial.task.steps(round(trial.share * len(trial.data.train[0])))
        task = replace(trial.task, steps_at_most=steps)
        short = Trial(f"{trial.name}-{steps}", task, trial.data, trial.seed, trial.cache, trial.share)
        return short.score(method, **(PAPER if method == "source" else {}))

    return scores


SEGMENTS: dict[str, Scores] = {
    f"L={count}, {which}": source({"snapshots": which.removesuffix("s")}, segments=count)
    for which in ("means", "points")
    for count in (1, 2, 3, 6)
}
ROWS: dict[str, Scores] = {
    REFERENCE: source(),
    **{name: row for name, row in SEGMENTS.items() if name != "L=1, means"},
    **{f"{count} snapshots": source({"snapshots_per_segment": count}) for count in (1, 2, 3, 12)},
    **{f"fast-source, L={count}": by("fast-source", segments=count, **PAPER) for count in (1, 2, 3, 6)},
    "8 label draws": source({"label_samples": 8}),
    "K-FAC eigenvalues": source({"curvature": "kfac"}),
    "diagonal": source({"curvature": "diagonal"}),
    "empirical Fisher": source({"kind": Empirical}),
    **{f"Λ times {factor:g}": altered(scaled(factor)) for factor in (0.1, 0.3, 3, 10)},
    "run as long as a retraining": as_long("source"),
    "grad-cos, run as long": as_long("grad-cos"),
}
ADAM: dict[str, Scores] = {"preconditioner left out": altered(as_sgd)}
SHARES: dict[str, Scores] = {
    REFERENCE: source(),
    "L=3, means": SEGMENTS["L=3, means"],
    "fast-source": by("fast-source", **PAPER),
    "influence": by("influence"),
    "tracin": by("tracin"),
    "grad-dot": by("grad-dot"),
    "grad-cos": by("grad-cos"),
    "run as long as a retraining": as_long("source"),
    "grad-cos, run as long": as_long("grad-cos"),
}
QUICK_ROWS = (REFERENCE, "L=3, points", "1 snapshots", "empirical Fisher", "run as long as a retraining")


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parser(__doc__, trainings=3)
    options.add_argument("--rows", nargs="*", help="only these rows")
    arguments = options.parse_args(argv)
    prepare(arguments)
    reports = []
    for name in arguments.task:
        task, whole = TASKS[name], arguments.share == 0.5
        rows = ROWS if whole else SHARES
        if arguments.quick:
            rows = {row: ROWS[row] for row in QUICK_ROWS}
        if whole and task.adaptive:
            rows = rows | ADAM
        rows = {row: rows[row] for row in arguments.rows or rows}
        stem = "ablations" if whole else f"share_{arguments.share:g}"
        reports.append(study(name, task, arguments, rows, REFERENCE, stem))
    return reports


if __name__ == "__main__":
    main()
