"""The gold standard of final-model-only attribution: train further with and without an example, and look.

From the final parameters ``θ_f`` training goes on over the data ``D`` and over ``D`` minus ``i``, with the same
randomness ``ξ``, and ``a_i = E_ξ[f(θ_f + Δ(D₋ᵢ, ξ)) - f(θ_f + Δ(D, ξ))]`` (Wei et al., arXiv 2412.03906; method §6). It
needs no history: any model or checkpoint will do.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_source._files import DirectoryError
from lightning_source._lightning import LightningDataModule, LightningModule, MisconfigurationException, rank_zero_info
from lightning_source._provenance import name_of, versions
from lightning_source._sealed import read_sealed, write_sealed
from lightning_source.capture.data import Examples, examples_of, query_of
from lightning_source.capture.isolation import isolated_rng
from lightning_source.capture.objective import Measurement
from lightning_source.evaluation._inputs import Scores
from lightning_source.evaluation.cosine import cosine_by_query, mean_and_error, select
from lightning_source.evaluation.curves import CosineCurve
from lightning_source.evaluation.further_runs.directory import FinishedRun, FurtherTrainingDirectory
from lightning_source.evaluation.further_runs.elements import NotStackable
from lightning_source.evaluation.further_runs.plain import PlainRuns
from lightning_source.evaluation.further_runs.recipe import ExampleLoss, Mode, Pair, Recipe, Removal, Trace
from lightning_source.evaluation.further_runs.stacked import StackedRuns
from lightning_source.optimizers import rule_for
from lightning_source.scorer import MEASUREMENTS

REMOVALS = get_args(Removal)
MODES = get_args(Mode)
SIGN = "Positive: training further without the example raises the measurement. For a loss, a proponent."


@dataclass(frozen=True)
class FurtherTraining:
    """What further training did to every query, with and without every left-out example.

    Attributes:
        left_out: ``[E, Q, M, S]``, the measurement after each epoch without each example, by seed.
        full: ``[E, Q, S]``, with all examples.
        start: ``[Q]``, at the final parameters.
        distances: ``[E, M, S]``, distance of the trained parameters from the final ones, without each example.
        full_distances: ``[E, S]``, with all examples.
        leave_out: the ``M`` left-out examples, positions in the training dataset.
        seeds: the ``S`` seeds.
        metadata: removal, mode, optimizer, ``Λ`` an epoch by parameter group, batch size, ``N``, versions, sign.
    """

    left_out: Tensor
    full: Tensor
    start: Tensor
    distances: Tensor
    full_distances: Tensor
    leave_out: list[int]
    seeds: list[int]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def epochs(self) -> list[int]:
        """Epochs of further training after which was measured, from 1."""
        return list(range(1, len(self.full) + 1))

    @property
    def rates(self) -> Tensor:
        """``Λ`` after each epoch, ``[E, groups]``: the sum of effective learning rates, what SOURCE and damping need.

        Raises:
            MisconfigurationException: the optimizer's effective learning rate is not known.
        """
        per_epoch = self.metadata["rates_per_epoch"]
        if per_epoch is None:
            raise MisconfigurationException(
                f"the effective learning rate of `{self.metadata['optimizer']['class']}` is not known."
            )
        return torch.tensor(self.epochs, dtype=torch.float64)[:, None] * torch.tensor(per_epoch, dtype=torch.float64)

    def gold(self, adjustment: Literal[13, 17] = 17, seeds: int | None = None) -> Tensor:
        """The gold standard ``a``, averaged over seeds, ``[E, Q, M]`` in float64.

        Args:
            adjustment: 17 subtracts the run on all data (Wei et al., Eq. 17); 13 subtracts the mean over the left-out
                set instead (their Eq. 13), so that what leaving out any example does is taken away.
            seeds: average only the first so many seeds.

        Raises:
            ValueError: another adjustment.
        """
        if adjustment not in (13, 17):
            raise ValueError(f"`adjustment={adjustment}` must be 13 or 17, the equation's number")
        left_out = self.left_out[..., :seeds].double()
        if adjustment == 13:
            return (left_out - left_out.mean(2, keepdim=True)).mean(-1)
        return (left_out - self.full[:, :, None, :seeds].double()).mean(-1)

    def cosine(
        self,
        scores: Scores,
        adjustment: Literal[13, 17] = 17,
        seeds: int | None = None,
        epochs: Sequence[int] | None = None,
    ) -> CosineCurve:
        """Cosine of scores to the gold standard over the left-out examples, mean and error over queries.

        Args:
            scores: :class:`~lightning_source.InfluenceScores`; an array ``[Q, M]``; or one for each epoch,
                ``[E, Q, M]`` (an estimator that knows how long training goes on).
            adjustment: see :meth:`gold`.
            seeds: see :meth:`gold`.
            epochs: the ``E`` epochs that are asked about; all by default.
        """
        chosen = self.epochs if epochs is None else list(epochs)
        gold = self.gold(adjustment, seeds)[[epoch - 1 for epoch in chosen]]
        mean, error = mean_and_error(cosine_by_query(gold, select(scores, self.leave_out).expand(gold.shape)))
        return CosineCurve(chosen, mean, error)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, metadata and a digest of all of it included.

        Raises:
            OSError: it cannot be written; an earlier file of that name is there still.
        """
        tensors = {name: getattr(self, name) for name in _TENSORS}
        record = {"leave_out": self.leave_out, "seeds": self.seeds, "metadata": self.metadata}
        write_sealed(path, tensors, _RECORD, record)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FurtherTraining:
        """The inverse of :meth:`save`.

        Raises:
            FileNotFoundError: there is no such file.
            MisconfigurationException: the file is damaged or holds something else; the message says what is wrong.
        """
        try:
            tensors, record = read_sealed(path, _RECORD)
            _require_result(tensors, record)
        except DirectoryError as error:
            raise MisconfigurationException(
                f"`{path}` holds no further training: {error}. HINT: `FurtherTraining.save` writes it."
            ) from error
        fields: dict[str, Any] = {**tensors, **record}
        return cls(**fields)


_RECORD = "further_training"
_TENSORS = ("left_out", "full", "start", "distances", "full_distances")


def _require_result(tensors: Mapping[str, Tensor], record: object) -> None:
    """Tensors and record must be those of :meth:`FurtherTraining.save`, with one length for each axis."""
    if not isinstance(record, dict) or record.keys() != {"leave_out", "seeds", "metadata"}:
        raise DirectoryError(f"its `{_RECORD}` is not what it should be")
    if tensors.keys() != set(_TENSORS):
        raise DirectoryError(f"its tensors are {', '.join(f'`{name}`' for name in sorted(tensors)) or 'none'}")
    epochs, queries, points, seeds = [*tensors["left_out"].shape, -1, -1, -1, -1][:4]
    expected = {
        "left_out": [epochs, queries, len(record["leave_out"]), len(record["seeds"])],
        "full": [epochs, queries, seeds],
        "start": [queries],
        "distances": [epochs, points, seeds],
        "full_distances": [epochs, seeds],
    }
    for name, shape in expected.items():
        if list(tensors[name].shape) != shape or not tensors[name].is_floating_point():
            raise DirectoryError(f"`{name}` is {tensors[name].dtype} {list(tensors[name].shape)}, not {shape}")


def further_training(
    module: LightningModule,
    train: object,
    query: object,
    *,
    leave_out: Sequence[int] | Tensor,
    epochs: int,
    seeds: int | Sequence[int] = 10,
    batch_size: int | None = None,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    removal: Removal = "downweight",
    mode: Mode = "eval",
    measurement: str | Measurement = "loss",
    loss: ExampleLoss | None = None,
    dirpath: str | os.PathLike[str] | None = None,
    copies: int | None = None,
    vectorize: bool | None = None,
    datamodule: LightningDataModule | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FurtherTraining:
    """Train a model further with and without each of some examples; the model itself comes back unchanged.

    How an example ``i`` is left out (``removal``), with the same order of examples drawn by the seed:

    - ``"downweight"``: ``L_i / N`` is subtracted from every step's loss, at the scale of the training batches (method
      §4). Smooth, exact at every step, and what influence functions differentiate.
    - ``"mask"``: its part of its own batch's loss is left out; the rest stays divided by the full batch.
    - ``"shift"``: it is deleted from the order, so later batches of the epoch begin one example later; as by the
      paper's tabular code. The noisiest.

    That is ``(M + 1) S`` trainings. Small models train as stacked copies, which needs eval mode, an optimizer that
    works element by element, a loss that is a mean over examples, and examples that are the same each time; it is
    checked against the plain loop on every batch, and where it does not hold the plain loop runs.

    Args:
        module: the LightningModule, at the final parameters. For a checkpoint: ``MyModule.load_from_checkpoint(path)``.
        train: its training dataset, or a loader over it (its sampler is not used).
        query: one batch, a ``Dataset`` or a ``DataLoader``, measured in eval mode after every epoch.
        leave_out: positions in the training dataset of the ``M`` examples to leave out, one at a time.
        epochs: of further training.
        seeds: how many seeds (0, 1, …), or which; each draws the orders of all epochs.
        batch_size: of the further training; a DataLoader's own by default. The last, short batch of an epoch is kept.
        optimizer: makes the further training's optimizer from the parameters that require gradients; by default the
            one that ``configure_optimizers`` returns. It starts without state, at a constant learning rate.
        removal: how an example is left out; recorded in the result.
        mode: ``"eval"`` trains without dropout and with BatchNorm's running statistics, as the estimators see the
            model; ``"train"`` as ``fit`` would, the same draws with and without an example.
        measurement: ``"loss"``, ``"margin"``, ``"log-prob"`` or a callable ``(module, batch) -> Tensor[B]``.
        loss: ``(module, batch) -> Tensor[B]``, per-example losses of which a step takes the mean, in place of the
            module's ``training_step``; then also the default measurement.
        dirpath: where finished runs are kept as they come; a killed sweep resumes there, also with more seeds.
        copies: runs made at once, and written at once: by default 16 on a CPU, whose caches more would not fit, and 128
            elsewhere.
        vectorize: ``True`` insists on stacked copies, ``False`` on the plain loop.
        datamodule: the LightningDataModule, if it transforms batches.
        progress: called with the number of runs done and of all.

    Returns:
        Measurements after every epoch, and distances of the parameters from where they started.

    Raises:
        MisconfigurationException: wrong set-up; the message says what and the way out.
        FloatingPointError: further training diverged; the message names the run.
    """
    data = _training_data(train, batch_size)
    recipe = Recipe(
        module=module,
        data=data,
        queries=query_of(query, data),
        optimizer=_optimizer(module, optimizer),
        epochs=epochs,
        removal=removal,
        mode=mode,
        measurement=measurement,
        loss=loss,
        hooks=datamodule,
    )
    _check(recipe)
    points = _points(leave_out, len(recipe.data))
    chosen = list(range(seeds)) if isinstance(seeds, int) else [int(s) for s in seeds]
    at_once = copies if copies is not None else 16 if recipe.module.device.type == "cpu" else 128
    if not chosen or len(set(chosen)) != len(chosen) or at_once < 1:
        raise MisconfigurationException(
            f"`seeds={seeds}` must name at least one seed, none twice, and `copies={copies}` be at least 1."
        )
    plain = PlainRuns(recipe)
    runs: PlainRuns | StackedRuns = plain
    if vectorize is not False:
        try:
            runs = StackedRuns(recipe, plain)
        except NotStackable as error:
            if vectorize:
                raise MisconfigurationException(
                    f"the runs cannot be stacked: {error}. HINT: `vectorize=False` runs them one after the other."
                ) from None
            rank_zero_info(f"further_training makes its runs one after the other: {error}.")
    described = _describe(recipe, points)
    pairs: list[Pair] = [(point, seed) for seed in chosen for point in (None, *points)]
    size = 1 if runs is plain else at_once
    with FurtherTrainingDirectory(dirpath, described) as directory:
        todo = [pair for pair in pairs if pair not in directory.runs]
        for first in range(0, len(todo), size):
            block = todo[first : first + size]
            trace = runs.run(block)
            _require_finite(trace, block)
            directory.add(block, trace)
            if progress is not None:
                progress(len(pairs) - len(todo) + first + len(block), len(pairs))
    return _result(directory.runs, points, chosen, plain.start, described)


def _result(
    runs: Mapping[Pair, FinishedRun], points: list[int], seeds: list[int], start: Tensor, described: dict[str, object]
) -> FurtherTraining:
    """Everything by left-out example and seed."""
    left_out = [[runs[point, seed] for point in points] for seed in seeds]
    full = [runs[None, seed] for seed in seeds]
    return FurtherTraining(
        left_out=torch.stack([torch.stack([run.measurements for run in row], -1) for row in left_out], -1),
        full=torch.stack([run.measurements for run in full], -1),
        start=start,
        distances=torch.stack([torch.stack([run.distances for run in row], -1) for row in left_out], -1),
        full_distances=torch.stack([run.distances for run in full], -1),
        leave_out=points,
        seeds=seeds,
        metadata=described | {"sign": SIGN, "versions": versions()},
    )


def _check(recipe: Recipe) -> None:
    for name, value, choices in (("removal", recipe.removal, REMOVALS), ("mode", recipe.mode, MODES)):
        if value not in choices:
            raise MisconfigurationException(f'`{name}="{value}"` is not known. HINT: one of {", ".join(choices)}.')
    measurement, known = recipe.measurement, ["loss"] if recipe.loss is not None else list(MEASUREMENTS)
    if not callable(measurement) and measurement not in known:
        raise MisconfigurationException(
            f"`measurement={measurement!r}` is not known{' beside `loss=`' if recipe.loss is not None else ''}. HINT:"
            f" one of {', '.join(known)}, or a callable."
        )
    if recipe.epochs < 1:
        raise MisconfigurationException(f"`epochs={recipe.epochs}` must be at least 1.")
    if recipe.mode == "train" and recipe.removal == "downweight":
        norms = [n for n, m in recipe.module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if norms:
            raise MisconfigurationException(
                f"in train mode `{norms[0]}` normalises by the batch, and the left-out example's own loss has no batch."
                ' HINT: `mode="eval"`, or `removal="mask"`.'
            )


def _training_data(train: object, batch_size: int | None) -> Examples:
    if batch_size is None and not isinstance(train, torch.utils.data.DataLoader):
        raise MisconfigurationException(
            "the batch size of the further training is not known. HINT: pass `batch_size=`, or a DataLoader as `train`."
        )
    return examples_of(train, batch_size)


def _optimizer(module: LightningModule, make: Callable[[list[nn.Parameter]], Optimizer] | None) -> Optimizer:
    made = module.configure_optimizers() if make is None else make([p for p in module.parameters() if p.requires_grad])
    if not isinstance(made, Optimizer):
        raise MisconfigurationException(
            f"the further training takes one optimizer at a constant learning rate, and got a {type(made).__name__}."
            " HINT: pass `optimizer=lambda parameters: torch.optim.SGD(parameters, lr=…)`."
        )
    return made


def _points(leave_out: Sequence[int] | Tensor, total: int) -> list[int]:
    points = [int(i) for i in leave_out]
    if not points or min(points) < 0 or max(points) >= total or len(set(points)) != len(points):
        raise MisconfigurationException(
            f"`leave_out` must name some of the {total} training examples, 0 to {total - 1}, none twice."
        )
    return points


def _require_finite(trace: Trace, block: Sequence[Pair]) -> None:
    finite = torch.isfinite(trace.measurements).all(1).all(0) & torch.isfinite(trace.distances).all(0)
    if not finite.all():
        point, seed = block[int((~finite).nonzero()[0])]
        what = "all examples" if point is None else f"all but example {point}"
        raise FloatingPointError(
            f"further training on {what} with seed {seed} diverged. HINT: lower the learning rate."
        )


def _describe(recipe: Recipe, points: Sequence[int]) -> dict[str, object]:
    """What makes two sweeps the same, seeds aside. JSON primitives only."""
    optimizer = recipe.optimizer
    groups = [{k: repr(v) for k, v in sorted(g.items()) if k != "params"} for g in optimizer.param_groups]
    measurement = recipe.measurement
    return {
        "removal": recipe.removal,
        "mode": recipe.mode,
        "epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "examples": len(recipe.data),
        "leave_out": list(points),
        "measurement": measurement if isinstance(measurement, str) else name_of(measurement),
        "loss": None if recipe.loss is None else name_of(recipe.loss),
        "optimizer": {"class": type(optimizer).__name__, "groups": groups},
        "rates_per_epoch": _rates_per_epoch(recipe),
        "parameters": _digest(list(recipe.module.state_dict().values())),
        "training_examples": _digest_examples(recipe, points),
        "queries": _digest([batch for _, batch in recipe.query_batches()]),
    }


def _rates_per_epoch(recipe: Recipe) -> list[float] | None:
    """``Λ`` of an epoch by parameter group; ``None`` where the optimizer is not understood."""
    try:
        rule, steps = rule_for(recipe.optimizer), recipe.steps_per_epoch
        return [float(g["lr"]) * rule(g).rate_multiplier * steps for g in recipe.optimizer.param_groups]
    except MisconfigurationException:
        return None


def _digest(values: object) -> str:
    digest = hashlib.sha256()

    def add(tensor: Tensor) -> Tensor:
        # As raw bytes: numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return tensor

    apply_to_collection(values, Tensor, add)
    return digest.hexdigest()


def _digest_examples(recipe: Recipe, points: Sequence[int]) -> str:
    """Of the left-out examples and of up to 1,024 others, evenly spread."""
    total = len(recipe.data)
    spread = torch.linspace(0, total - 1, min(total, 1024), dtype=torch.float64).round().long()
    ids = torch.cat([torch.tensor(points), spread]).unique()
    with isolated_rng(0):  # examples that are drawn anew each time
        return _digest([recipe.fetch(part) for part in ids.split(recipe.batch_size)])
