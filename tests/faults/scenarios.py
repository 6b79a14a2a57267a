"""What is done under faults: fits, resumed fits, scoring, sweeps and further training; and what each must give.

A verdict is one of ``"equal"`` (the same numbers, bit for bit), ``"clear"`` (one error of the package's that says what
is wrong), and the bad ones: ``"raw"`` (another error), ``"silent"`` (other numbers, or a record that stopped without a
word), ``"lost"`` (what was computed is not to be had), ``"hang"`` and ``"disturbed"`` (training gave other weights).
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from faults.events import Faults
from faults.processes import Outcome, in_child
from helpers import QUERY, Classifier, classes, mlp, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_source import InfluenceScores, SourceCallback, SourceScorer
from lightning_source.evaluation import further_training, random_subsets, retrain
from lightning_source.recording.store import RunStore, holds_run

EPOCHS = 4
BAD = ("raw", "silent", "lost", "hang", "disturbed")


class StopAt(L.Callback):
    """Ends training by an exception after so many steps, as a user's Ctrl-C does."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:
            raise RuntimeError("stopped")


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def model(rule: Callable[[Any], torch.optim.Optimizer] = momentum) -> Classifier:
    torch.manual_seed(0)
    return Classifier(mlp(), optimizer=rule)


def fit(
    where: Path | None,
    *callbacks: L.Callback,
    checkpoint: Path | None = None,
    checkpoints: Path | None = None,
    rule: Callable[[Any], torch.optim.Optimizer] = momentum,
    **options: Any,
) -> tuple[L.Trainer, Tensor]:
    """Train, recorded in ``where``; the Trainer and the weights."""
    module = model(rule)
    settings = {"segments": 2, "snapshots_per_segment": 2, "mode": "fit"} | options
    source = [] if where is None else [SourceCallback(str(where), **settings)]
    keep = (
        [ModelCheckpoint(checkpoints, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)]
        if checkpoints
        else []
    )
    trainer = quiet_trainer(
        "/nonexistent", *source, *callbacks, *keep, max_epochs=EPOCHS, enable_checkpointing=bool(keep)
    )
    trainer.fit(module, DataLoader(classes(), 8), ckpt_path=checkpoint)
    return trainer, torch.cat([p.detach().flatten() for p in module.parameters()])


def score(where: Path) -> Tensor:
    return SourceScorer.from_run(str(where), model()).score(QUERY, classes()).values


@cache
def plain_weights() -> Tensor:
    return fit(None)[1]


@dataclass
class Stops:
    """Scores of runs that ended cleanly after so many steps, made when they are asked for."""

    folder: Path
    known: dict[int, Tensor] = field(default_factory=dict)

    def __getitem__(self, steps: int) -> Tensor:
        if steps not in self.known:
            where = self.folder / f"stop-{steps}"
            if steps == EPOCHS * 3:
                fit(where)
            else:
                with pytest.raises(RuntimeError, match="stopped"):
                    fit(where, StopAt(steps))
            self.known[steps] = score(where)
        return self.known[steps]


def verdict_of(outcome: Outcome, expected: Tensor) -> str:
    if outcome.how == "hang":
        return "hang"
    if outcome.how == "raised":
        return "clear" if "MisconfigurationException" in outcome.value[0] else "raw"
    if outcome.how == "killed":
        return "lost"
    return "equal" if torch.equal(outcome.value, expected) else "silent"


def record_verdict(where: Path, stops: Stops) -> str:
    """Whether a directory, whatever happened to it, is the run up to the step that it says."""
    outcome = in_child(lambda: (score(where), RunStore.open(where).manifest.steps))
    if outcome.how != "done":
        return verdict_of(outcome, torch.empty(0))
    values, steps = outcome.value
    return "equal" if torch.equal(values, stops[steps]) else "silent"


def under(faults: Faults, work: Callable[[], Any]) -> Outcome:
    """Run in a child whose disk has faults."""

    def watched() -> Any:
        patch = pytest.MonkeyPatch()
        faults.install(patch)
        return work(), faults.count

    outcome = in_child(watched)
    if outcome.how == "done":
        _counts.append(outcome.value[1])
    return outcome


_counts: list[int] = []  # of disk events, of the children that came through


# ---------------------------------------------------------------- a fit


def last_checkpoint(folder: Path) -> Path | None:
    return max(folder.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]), default=None)


def fit_and_ask(run: Path, checkpoints: Path, checkpoint: Path | None = None) -> tuple[Tensor, Tensor | str]:
    """Weights and scores, or the message of the package's that there are none."""
    trainer, weights = fit(run, checkpoint=checkpoint, checkpoints=checkpoints)
    try:
        return weights, trainer.attribute(QUERY).values  # type: ignore[attr-defined]
    except MisconfigurationException as error:
        return weights, str(error)


def fresh_fit(folder: Path, kind: str, at: int | None, stops: Stops) -> list[str]:
    """A fit with checkpoints; where it is killed, the record so far, and the fit that goes on from the last one."""
    run, checkpoints = folder / "run", folder / "checkpoints"
    outcome = under(Faults(run, kind, at), lambda: fit_and_ask(run, checkpoints))
    if outcome.how == "killed":
        verdicts = [record_verdict(run, stops)] if holds_run(run) else []
        return [*verdicts, resumed_verdict(run, checkpoints, stops)]
    if outcome.how != "done":
        return [verdict_of(outcome, torch.empty(0))]
    (weights, scores), _ = outcome.value
    if not torch.equal(weights, plain_weights()):
        return ["disturbed"]
    said = [text for text in outcome.warnings if str(run) in text]
    if isinstance(scores, str):
        return ["clear" if said or str(run) in scores else "silent"]
    whole = torch.equal(scores, stops[EPOCHS * 3])
    if not whole and not said:
        return ["silent"]
    if whole:
        return ["equal"]
    return [record_verdict(run, stops)]


def resumed_verdict(run: Path, checkpoints: Path, stops: Stops) -> str:
    """Whether a killed fit that goes on gives the record of one that was never killed."""
    last = last_checkpoint(checkpoints)

    def work() -> Any:
        trainer, weights = fit(run, checkpoint=last, checkpoints=checkpoints, overwrite=last is None)
        return weights, trainer.attribute(QUERY).values  # type: ignore[attr-defined]

    outcome = in_child(work)
    if outcome.how != "done":
        return verdict_of(outcome, torch.empty(0))
    weights, scores = outcome.value
    if not torch.equal(weights, plain_weights()):
        return "disturbed"
    return "equal" if torch.equal(scores, stops[EPOCHS * 3]) else "silent"


def resumed_fit(folder: Path, kind: str, at: int | None, stops: Stops) -> list[str]:
    """A fit that was stopped and goes on from a checkpoint, on a disk with faults."""
    run, checkpoints = folder / "run", folder / "checkpoints"
    with pytest.raises(RuntimeError, match="stopped"):
        fit(run, StopAt(8), checkpoints=checkpoints)
    last = last_checkpoint(checkpoints)
    outcome = under(Faults(run, kind, at), lambda: fit_and_ask(run, checkpoints, last))
    if outcome.how == "killed":
        return [record_verdict(run, stops), resumed_verdict(run, checkpoints, stops)]
    if outcome.how != "done":
        return [verdict_of(outcome, torch.empty(0))]
    (weights, scores), _ = outcome.value
    if not torch.equal(weights, plain_weights()):
        return ["disturbed"]
    said = any(str(run) in text for text in outcome.warnings)
    if isinstance(scores, str):
        return ["clear" if said or str(run) in scores else "silent"]
    return ["equal" if torch.equal(scores, stops[EPOCHS * 3]) else "clear" if said else "silent"]


# ---------------------------------------------------------------- questions


def scoring(state: str) -> Callable[[Path, str, int | None, Stops], list[str]]:
    """Questions to a run that has ended without factors, or was stopped."""

    def run_it(folder: Path, kind: str, at: int | None, stops: Stops) -> list[str]:
        source = stops.folder / state
        if not source.exists():
            if state == "deferred":
                fit(source, mode="deferred")
            else:
                with pytest.raises(RuntimeError, match="stopped"):
                    fit(source, StopAt(8))
        run = folder / "run"
        shutil.copytree(source, run)
        expected = stops[EPOCHS * 3 if state == "deferred" else 8]
        outcome = under(Faults(run, kind, at), lambda: score(run))
        if outcome.how == "killed":
            return [verdict_of(in_child(lambda: score(run)), expected)]
        if outcome.how == "done":
            outcome = outcome._replace(value=outcome.value[0])
        verdict = verdict_of(outcome, expected)
        lasting = kind in ("full", "read-only")
        return ["lost" if verdict == "clear" and lasting else verdict]

    return run_it


def saving(folder: Path, kind: str, at: int | None, stops: Stops) -> list[str]:
    """New scores written over earlier ones: one of the two is there afterwards, whole."""
    path = folder / "scores" / "scores.safetensors"
    path.parent.mkdir()
    old, new = (InfluenceScores(torch.full((2, 3), v), torch.arange(3), torch.arange(2)) for v in (1.0, 2.0))
    old.save(path)

    def work() -> Tensor:
        new.save(path)
        return new.values

    outcome = under(Faults(path.parent, kind, at), work)
    if kind == "gone":
        return ["clear" if outcome.how == "raised" and str(path) in outcome.value[1] else "equal"]
    found = in_child(lambda: InfluenceScores.load(path).values)
    if found.how != "done":
        told = found.how == "raised" and str(path) in found.value[1]
        return ["clear" if kind in ("lose", "damage") and told else "lost"]
    if outcome.how == "done":
        return [verdict_of(found, new.values)]
    if outcome.how == "raised" and str(path) not in outcome.value[1]:
        return ["raw"]
    return ["equal" if any(torch.equal(found.value, one.values) for one in (old, new)) else "silent"]


# ---------------------------------------------------------------- sweeps


def _build(kept: list[int], seed: int) -> tuple[L.LightningModule, Any, L.Trainer]:
    data = torch.utils.data.Subset(classes(), kept)
    return Classifier(mlp()), DataLoader(data, 8), quiet_trainer("/nonexistent", max_epochs=1)


def _measure(module: Any) -> Tensor:
    inputs, targets = QUERY
    return torch.nn.functional.cross_entropy(module.net(inputs), targets, reduction="none")


def retraining(folder: Path, kind: str, at: int | None, stops: Stops) -> list[str]:
    """A sweep of retrainings."""

    def sweep() -> Tensor:
        subsets = random_subsets(3, 24, seed=0)
        return retrain(_build, subsets, [0], _measure, folder / "sweep", n_jobs=1, progress=False)

    return _swept(folder, kind, at, stops, sweep, "retraining")


def further(folder: Path, kind: str, at: int | None, stops: Stops) -> list[str]:
    """A sweep of further training."""

    def sweep() -> Tensor:
        torch.manual_seed(0)
        result = further_training(
            Classifier(mlp()),
            classes(),
            QUERY,
            leave_out=[0, 3],
            epochs=1,
            seeds=1,
            batch_size=8,
            dirpath=folder / "sweep",
            copies=1,
        )
        return result.left_out

    return _swept(folder, kind, at, stops, sweep, "further")


def _swept(folder: Path, kind: str, at: int | None, stops: Stops, sweep: Callable[[], Tensor], name: str) -> list[str]:
    expected = stops.folder / f"{name}.pt"
    if not expected.exists():
        outcome = in_child(sweep)
        assert outcome.how == "done", outcome
        torch.save(outcome.value, expected)
        shutil.rmtree(folder / "sweep")
    reference = torch.load(expected)
    outcome = under(Faults(folder / "sweep", kind, at), sweep)
    if outcome.how == "done":
        outcome = outcome._replace(value=outcome.value[0])
    first = [] if outcome.how == "killed" else [verdict_of(outcome, reference)]
    if kind in ("full", "read-only", "gone"):
        return first
    return [*first, verdict_of(in_child(sweep), reference)]  # once more, on a disk that works


Scenario = Callable[[Path, str, int | None, Stops], list[str]]
SCENARIOS: dict[str, Scenario] = {
    "fit": fresh_fit,
    "resumed fit": resumed_fit,
    "scoring of a finished run": scoring("deferred"),
    "scoring of a stopped run": scoring("stopped"),
    "saving scores": saving,
    "retraining": retraining,
    "further training": further,
}


def events_in(name: str, folder: Path, stops: Stops) -> int:
    """How many disk events a scenario has; it must be right where nothing goes wrong."""
    _counts.clear()
    verdicts = SCENARIOS[name](folder, "fail", None, stops)
    assert set(verdicts) == {"equal"}, verdicts
    return _counts[0]
