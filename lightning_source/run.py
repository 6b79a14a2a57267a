"""An opened run: its segments, snapshots and factors beside the model and the training data they belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_source.data import Examples
from lightning_source.engine import BlockFactors, Factors, State, Workspace, factor_ids, fit_factors
from lightning_source.factors import CovarianceSums
from lightning_source.layers import Block, clean_name
from lightning_source.objective import Objective, ObjectiveSpec
from lightning_source.recorder import (
    assemble,
    final_parameters,
    mean_parameters,
    mean_preconditioner,
    snapshot_parameters,
)
from lightning_source.segments import Stretch, cut, merge_all, normalized_weights
from lightning_source.store import RunStore
from lightning_source.tracking import Coverage
from lightning_source.unroll import SegmentCurvature


@dataclass(frozen=True)
class Segment:
    """A segment of training and the snapshots that gradients and curvature are averaged over in it."""

    stretch: Stretch
    snapshots: tuple[Stretch, ...]

    @property
    def weights(self) -> list[float]:
        """The snapshots' weights, which sum to 1."""
        return normalized_weights(self.snapshots)


class Run:
    """One run directory, opened with the model that it trained.

    Args:
        store: the directory; bins that a killed run left are assembled into snapshots at once.
        module: the LightningModule (its weights are not used, and come back unchanged from every pass).
        data: the training examples; ``None`` until something needs them.
        hooks: the LightningDataModule, if its batch-transfer hooks are part of the data.

    Raises:
        MisconfigurationException: nothing was recorded, or the model does not match.
    """

    def __init__(self, store: RunStore, module: Any, data: Examples | None = None, hooks: Any = None) -> None:
        self.store = store
        self.settings = store.manifest["settings"]
        if store.manifest.get("bins"):
            assemble(store, self.settings["segments"], self.settings["snapshots_per_segment"])
        if not store.manifest.get("segments"):
            raise MisconfigurationException(
                f"`{store.path}` holds no finished segment: no optimizer step was recorded. HINT: train for at least"
                " one step."
            )
        if "coverage" not in store.manifest:
            raise MisconfigurationException(
                f"`{store.path}` cannot be attributed: `training_step` gave no loss for any batch."
            )
        check_module(module, store.manifest["module"])
        self.stage = store.manifest["stages"][0]
        self.coverage = Coverage.from_json(store.manifest["coverage"])
        spec = self.stage.get("objective")
        self.workspace = Workspace(
            module,
            self.coverage.blocks,
            Objective(module),
            ObjectiveSpec.from_json(spec) if spec else None,
            self.settings["seed"],
            hooks,
        )
        self._data = data
        self.snapshots = [Stretch.from_json(s) for s in store.manifest["snapshots"]]

    # ---------------------------------------------------------------- data

    def use(self, data: Examples | None) -> None:
        """Take these as the training examples, if they can be the ones that the run was trained on."""
        if data is not None:
            self._data = data
        examples = self.stage["examples"]
        if self._data is None:
            return
        if examples is None:
            self.stage["examples"] = len(self._data)
        elif len(self._data) != examples:
            raise MisconfigurationException(
                f"the training set holds {len(self._data)} examples but the run was trained on {examples}: scores would"
                " name the wrong examples. HINT: pass the dataset of the run as `train=`; to score some of its"
                " examples, pass `train_ids=`."
            )

    @property
    def data(self) -> Examples:
        """The training examples."""
        if self._data is None:
            raise MisconfigurationException(
                "the training examples are needed and not at hand. HINT: pass `train=` the run's training dataset."
            )
        return self._data

    @property
    def examples(self) -> int:
        """``N``, the number of training examples."""
        return int(self.stage["examples"])

    # ---------------------------------------------------------------- segments

    def segments(self, count: int | Sequence[int] | None = None) -> list[Segment]:
        """The run's segments, or its snapshots cut into others.

        Args:
            count: number of segments, or steps at which inner segments begin; the run's own by default.
        """
        if count is None:
            groups = [segment["snapshots"] for segment in self.store.manifest["segments"]]
        else:
            if isinstance(count, int) and not 1 <= count <= len(self.snapshots):
                raise MisconfigurationException(
                    f"`segments={count}`: the run has {len(self.snapshots)} snapshots, so 1 to {len(self.snapshots)}"
                    " segments can be cut."
                )
            groups = cut(self.snapshots, count)
        members = [tuple(self.snapshots[i] for i in group) for group in groups]
        return [Segment(merge_all(m), m) for m in members]

    def curvatures(
        self,
        segments: Sequence[Segment],
        factors: Sequence[Factors],
        blocks: Sequence[Block],
        columns: Callable[[str, Tensor], Tensor] = lambda name, values: values,
    ) -> dict[str, list[SegmentCurvature]]:
        """What the walk needs to know of each block in each segment; ``columns`` takes what the walked vectors have."""
        found: dict[str, list[SegmentCurvature]] = {block.name: [] for block in blocks}
        for segment, one in zip(segments, factors, strict=True):
            scale = self.preconditioner(segment.snapshots)
            for block in blocks:
                found[block.name].append(
                    SegmentCurvature(
                        one[block.name].basis,
                        columns(block.name, one[block.name].eigenvalues),
                        segment.stretch.rates[block.group],
                        segment.stretch.weight_decay(block.group),
                        columns(block.name, scale[block.name]) if block.name in scale else None,
                        self.stage["optimizer"]["decoupled"][block.group],
                        float(one[block.name].eigenvalues.clamp_min(0).mean()) if block.name in scale else None,
                    )
                )
        return found

    def preconditioner(self, snapshots: Sequence[Stretch]) -> dict[str, Tensor]:
        """``P̄`` of each block averaged over snapshots, ``[P, O, I]``; empty where steps follow the plain gradient."""
        device = self.workspace.module.device
        scale = {name: value.to(device) for name, value in mean_preconditioner(self.store, snapshots).items()}
        return {b.name: b.matrix(scale) for b in self.coverage.blocks if all(n in scale for n in b.parameters)}

    # ---------------------------------------------------------------- parameters and factors

    def final(self) -> State:
        """The parameters that training ended with."""
        return final_parameters(self.store)

    def state(self, snapshot: Stretch, which: str) -> State:
        """A snapshot's parameters: ``"mean"`` over its steps, or at the ``"point"`` in its middle."""
        return snapshot_parameters(self.store, snapshot, which)

    def mean_state(self, segment: Segment) -> State:
        """The parameters averaged over a whole segment (Fast-SOURCE)."""
        return mean_parameters(self.store, segment.snapshots)

    def calibrate(self) -> ObjectiveSpec:
        """The objective's scale, learnt from the training examples where the run does not hold it yet."""
        if self.workspace.spec is None:
            per_batch = self.stage["examples_per_batch"] or self.data.batch_size
            with self.workspace.at(self.final()):
                spec = self.workspace.calibrate(self.data, per_batch)
            self.stage["objective"] = spec.to_json()
            self.store.commit()
        assert self.workspace.spec is not None
        return self.workspace.spec

    def snapshot_factors(self, segment: Segment, which: str = "mean") -> Factors:
        """A segment's factors, averaged over its snapshots; computed and kept on disk the first time."""
        if which not in ("mean", "point"):
            raise MisconfigurationException(f'`snapshots="{which}"` is not known. HINT: "mean" or "point".')
        names = "+".join(f"{s.last:06d}" for s in segment.snapshots)
        own = self.segments()
        default = which == self.settings["snapshots"] and segment in own
        name = f"segments/{own.index(segment)}.safetensors" if default else f"segments/{which}-{names}.safetensors"
        loads = [partial(self.state, s, which) for s in segment.snapshots]
        files = [s.file.replace(".safetensors", f"-{which}-covariances.safetensors") for s in segment.snapshots]
        return self._factors(name, loads, segment.weights, files)

    def mean_factors(self, segment: Segment) -> Factors:
        """A segment's factors at its averaged parameters (Fast-SOURCE)."""
        name = f"segments/fast-{segment.stretch.first:06d}-{segment.stretch.last:06d}.safetensors"
        return self._factors(name, [partial(self.mean_state, segment)], [1.0], [None])

    def final_factors(self) -> Factors:
        """Factors at the final parameters (influence functions)."""
        return self._factors("segments/final.safetensors", [self.final], [1.0], [None])

    def _factors(
        self, name: str, loads: Sequence[Callable[[], State]], weights: Sequence[float], files: Sequence[str | None]
    ) -> Factors:
        device = self.workspace.module.device
        if name in self.store.manifest["files"]:
            tensors = self.store.read(name, device)
            return {block.name: BlockFactors.from_tensors(block.name, tensors) for block in self.coverage.blocks}
        self.calibrate()
        known = [self._read_covariances(file) if file else None for file in files]
        factors, sums = fit_factors(
            self.workspace,
            self.data,
            self._factor_ids(),
            loads,
            weights,
            known,
            self.settings["curvature"],
            self.settings["label_samples"],
        )
        for file, before, after in zip(files, known, sums, strict=False):
            if file is not None and before is None:
                self.store.write(file, _covariance_tensors(after))
        merged: dict[str, Tensor] = {}
        for key, one in factors.items():
            merged |= one.to_tensors(key)
        self.store.write(name, merged)
        self.store.commit()
        return factors

    def _factor_ids(self) -> Tensor:
        return factor_ids(len(self.data), self.settings["factor_examples"], self.settings["seed"])

    def _read_covariances(self, file: str) -> dict[str, CovarianceSums] | None:
        if file not in self.store.manifest["files"]:
            return None
        tensors = self.store.read(file, self.workspace.module.device)
        return {
            block.name: CovarianceSums(
                tensors[f"activations/{block.name}"],
                tensors[f"gradients/{block.name}"],
                int(tensors[f"examples/{block.name}"]),
            )
            for block in self.coverage.blocks
        }


def _covariance_tensors(sums: dict[str, CovarianceSums]) -> dict[str, Tensor]:
    tensors = {}
    for name, one in sums.items():
        tensors[f"activations/{name}"] = one.activations
        tensors[f"gradients/{name}"] = one.gradients
        tensors[f"examples/{name}"] = torch.tensor(one.examples)
    return tensors


def fingerprint(module: Any) -> dict[str, list[int]]:
    """Names and shapes of a module's parameters."""
    return {clean_name(name): list(p.shape) for name, p in module.named_parameters()}


def check_module(module: Any, recorded: dict[str, Any]) -> None:
    """Refuse a model whose parameters are not those of the run.

    Raises:
        MisconfigurationException: names what is missing, added or of another shape.
    """
    own, run = fingerprint(module), recorded["parameters"]
    missing = sorted(run.keys() - own.keys())
    added = sorted(own.keys() - run.keys())
    shapes = [f"{n} {own[n]} for {run[n]}" for n in sorted(run.keys() & own.keys()) if own[n] != run[n]]
    problems = [
        f"{what} {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
        for what, names in (("missing", missing), ("not in the run:", added), ("of another shape:", shapes))
        if names
    ]
    if problems:
        raise MisconfigurationException(
            f"`{type(module).__name__}` does not match the run of `{recorded['class']}`: {'; '.join(problems)}."
        )
