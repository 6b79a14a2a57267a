"""A run made from a trained model alone: the final-model-only view (Wei et al., arXiv 2412.03906; method §6).

Without a history of training there is one snapshot, the final model, and what is asked is the effect of an example on
*further* training from it. With ``Λ`` the sum of that training's effective learning rates, SOURCE's ``F_r`` is
``Λ · gradient dot product`` for ``Λ → 0`` and the influence function for ``Λ → ∞``.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lightning_source._lightning import LightningDataModule, LightningModule, MisconfigurationException, rank_zero_warn
from lightning_source._provenance import versions
from lightning_source.capture.coverage import Coverage, find_blocks
from lightning_source.capture.data import Examples, examples_of, to_module
from lightning_source.capture.isolation import parameters_kept, undisturbed
from lightning_source.capture.objective import Objective
from lightning_source.capture.probe import probe
from lightning_source.names import parameter_names
from lightning_source.optimizers import Rule, StepRule, has_own_step, known_class, preconditioners, rule_for
from lightning_source.recording.manifest import Flags, Settings, StageRecord
from lightning_source.recording.parameter_groups import Phase
from lightning_source.recording.recorder import Recorder
from lightning_source.recording.scoring_store import ScoringStore
from lightning_source.recording.snapshots import assemble
from lightning_source.runs.run import Run

STAGE = "further training"


@dataclass(frozen=True, kw_only=True)
class FurtherTraining:
    """The training that a final model is imagined to go on with; see :meth:`SourceScorer.from_model`.

    Attributes:
        settings: what the factors are made of.
        rate: ``Λ``, the sum of its effective learning rates, or one for each parameter group; ``None`` if left open.
        batch_size: of its batches; ``None`` for the loader's own.
        optimizer: over the model's parameters; ``None`` for SGD on all of them.
        include: glob patterns of module names to attribute; all by default.
        exclude: glob patterns of module names not to attribute.
        datamodule: if it transforms batches on their way to the device.
    """

    settings: Settings
    rate: float | Sequence[float] | None = None
    batch_size: int | None = None
    optimizer: Optimizer | None = None
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    datamodule: LightningDataModule | None = None


def open_final_model(
    model: LightningModule,
    train: Dataset[object] | DataLoader[object],
    further: FurtherTraining,
    dirpath: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Run:
    """A run of one segment whose only snapshot is the model as it is now.

    Args:
        model: the trained model.
        train: its training dataset, or a loader over it.
        further: the training that it is imagined to go on with.
        dirpath: where the run is kept; by default a directory that vanishes with the run.
        overwrite: replace the run that ``dirpath`` holds.
    """
    examples = examples_of(train, further.batch_size)
    per_batch = _examples_per_batch(train, examples, further.batch_size)
    optimizer = further.optimizer
    groups = [g["params"] for g in optimizer.param_groups] if optimizer else [list(model.parameters())]
    rule = rule_for(optimizer) if optimizer else None
    steps = [rule(group) for group in optimizer.param_groups] if optimizer and rule else [StepRule(1.0)]
    rates = _by_group(further.rate, len(groups))
    names = parameter_names(model)
    named = [[names[id(p)] for p in group if id(p) in names] for group in groups]
    kind, decoupled = type(optimizer).__name__ if optimizer else "SGD", [step.decoupled for step in steps]
    scales = _preconditioners(optimizer, rule, names) if optimizer and rule else {}
    if optimizer and has_own_step(optimizer):
        rank_zero_warn(
            f"`{kind}` has a `step` of its own and is taken for the `{known_class(optimizer).__name__}` that it derives"
            " from. HINT: say how it steps, by `lightning_source.optimizers.register_optimizer`."
        )
    coverage = _covered(model, examples, groups, further)

    temporary = None if dirpath is not None else tempfile.TemporaryDirectory(prefix="source-final-model-")
    store = ScoringStore.create(temporary.name if temporary else str(dirpath), overwrite)
    stage = StageRecord.begin(STAGE, model, examples, maximize=any(step.maximize for step in steps))
    stage.examples_per_batch, stage.coverage = per_batch, coverage
    stage.phases = (Phase.after(None, 0, kind, named, decoupled),)
    manifest = store.manifest
    manifest.versions, manifest.status, manifest.stages = versions(), "finished", [stage]
    manifest.settings = replace(further.settings, segments=1, snapshots_per_segment=1, snapshots="point")
    manifest.flags = Flags(history_incomplete=True, final_model_only=True, rate_unknown=further.rate is None)
    # One interval of training that stands at the final model throughout.
    recorder = Recorder(store, model, bins=2, points=True, preconditioners=lambda: scales)
    recorder.before_step()
    recorder.after_step(rates, [1.0] * len(rates), [step.weight_decay for step in steps], 1.0, None)
    recorder.finish()
    assemble(store, 1, 1)
    run = Run(store, [model], {0: examples}, further.datamodule)
    if temporary is not None:
        weakref.finalize(run, temporary.cleanup)
    return run


def set_rate(run: Run, rate: float | Sequence[float]) -> None:
    """Let a run of :func:`open_final_model` stand for another amount of further training; its factors stay.

    Raises:
        MisconfigurationException: the run has a history, whose rates are facts.
    """
    manifest = run.store.manifest
    if not manifest.flags.final_model_only:
        raise MisconfigurationException(
            f"`{run.store.path}` was recorded while training, which fixed its rates. HINT: `SourceScorer.from_model`"
            " looks at a final model under any amount of further training."
        )
    (snapshot,), (segment,) = manifest.snapshots, manifest.segments
    rates = tuple(_by_group(rate, len(snapshot.rates)))
    decays = tuple(r * snapshot.weight_decay(group) for group, r in enumerate(rates))
    manifest.snapshots = [replace(snapshot, rates=rates, decays=decays)]
    manifest.segments = [replace(segment, rates=rates, decays=decays)]
    manifest.flags.rate_unknown = False
    run.store.commit()


def _covered(
    model: LightningModule, examples: Examples, groups: Sequence[Sequence[nn.Parameter]], further: FurtherTraining
) -> Coverage:
    """What of a model can be attributed, checked on the first examples that give a finite loss.

    Raises:
        MisconfigurationException: no batch has a finite loss, or nothing can be attributed.
    """
    coverage = find_blocks(model, groups, further.include, further.exclude)
    objective = Objective(model)
    with undisturbed(model, further.settings.seed), parameters_kept(model):
        for index, batch in examples.batches(range(min(len(examples), 4 * examples.batch_size))):
            moved = to_module(batch, model, further.datamodule)
            try:
                losses = objective.evaluate(moved, len(index))
            except ValueError:
                continue  # no loss for this batch
            if torch.isfinite(losses.loss):
                return probe(model, objective, coverage, moved, len(index))
    raise MisconfigurationException(
        f"`{type(model).__name__}.training_step` gave no finite loss for the first training examples."
    )


def _examples_per_batch(
    train: Dataset[object] | DataLoader[object], examples: Examples, batch_size: int | None
) -> float:
    """Mean size of a training batch, which a loss that is a sum is scaled by (method §4)."""
    if batch_size is None and not isinstance(train, DataLoader):
        raise MisconfigurationException(
            "the batch size of the further training is not known. HINT: pass `batch_size=`, or a DataLoader as `train`."
        )
    if isinstance(train, DataLoader) and train.drop_last and batch_size is None:
        return float(examples.batch_size)
    batches = -(-len(examples) // examples.batch_size)
    return len(examples) / batches


def _by_group(rate: float | Sequence[float] | None, groups: int) -> list[float]:
    rates = [1.0 if rate is None else float(rate)] * groups if isinstance(rate, (int, float, type(None))) else [*rate]
    if len(rates) != groups or not all(0 < r < float("inf") for r in rates):
        raise MisconfigurationException(
            f"`rate={rate}` must be the sum of the further training's effective learning rates, above 0: one number,"
            f" or one for each of the {groups} parameter groups."
        )
    return [float(r) for r in rates]


def _preconditioners(optimizer: Optimizer, rule: Rule, names: Mapping[int, str]) -> dict[str, Tensor]:
    """The optimizer's diagonal preconditioner by parameter.

    Raises:
        MisconfigurationException: the optimizer has one but has made no step yet, so it is not known.
    """
    scales = preconditioners(optimizer, rule, names)
    wanted = [names[id(p)] for g in optimizer.param_groups for p in g["params"] if p.requires_grad and id(p) in names]
    adaptive = any(rule(group).preconditioner is not None for group in optimizer.param_groups)
    if adaptive and not scales and wanted:
        raise MisconfigurationException(
            f"`{type(optimizer).__name__}` scales gradients by moments that it does not hold yet. HINT: pass the"
            " optimizer as training left it, or after a few steps of the further training."
        )
    return scales
