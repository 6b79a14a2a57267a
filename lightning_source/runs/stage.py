"""One stage of an opened run, and its segments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_source.capture.coverage import Coverage
from lightning_source.capture.data import Examples
from lightning_source.capture.objective import Objective, ObjectiveSpec
from lightning_source.distributed import SINGLE_PROCESS, Ranks
from lightning_source.passes.workspace import Workspace
from lightning_source.recording.intervals import StepInterval, normalized_weights
from lightning_source.recording.parameter_groups import Phase, phase_at


@dataclass(frozen=True)
class Segment:
    """A segment of training and the snapshots that gradients and curvature are averaged over in it."""

    stretch: StepInterval
    snapshots: tuple[StepInterval, ...]

    @property
    def stage(self) -> int:
        """Index of the stage that it belongs to."""
        return self.stretch.stage

    @property
    def weights(self) -> list[float]:
        """The snapshots' weights, which sum to 1."""
        return normalized_weights(self.snapshots)


class Stage:
    """One ``fit``: its model, objective, blocks and examples.

    Args:
        index: its place in the run.
        record: its entry in the manifest.
        settings: the run's settings.
        module: the LightningModule, with this stage's parameters.
        data: its training examples; ``None`` until something needs them.
        hooks: the LightningDataModule, if its batch-transfer hooks are part of the data.
        ranks: the processes that work on it together.
    """

    def __init__(
        self,
        index: int,
        record: dict[str, Any],
        settings: Mapping[str, Any],
        module: Any,
        data: Examples | None = None,
        hooks: Any = None,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        self.index = index
        self.record = record
        self.name: str = record["name"]
        self.coverage = Coverage.from_json(record["coverage"])
        spec = ObjectiveSpec.from_json(record["objective"]) if record.get("objective") else None
        self.phases = [Phase.from_json(phase) for phase in record["phases"]]
        objective = Objective(module, **(record["manual"] or {}))
        self.workspace = Workspace(module, self.coverage.blocks, objective, spec, settings["seed"], hooks, ranks)
        self.examples: Examples | None = None
        self.use(data)

    def use(self, data: Examples | None) -> None:
        """Take these as the training examples, if they can be the ones that the stage was trained on."""
        if data is None:
            return
        count = self.record["examples"]
        if count is None:
            self.record["examples"] = len(data)
        elif len(data) != count:
            raise MisconfigurationException(
                f"the training set holds {len(data)} examples but the run was trained on {count}: scores would name the"
                " wrong examples. HINT: pass the dataset of the run as `train=`; to score some of its examples, pass"
                " `train_ids=`."
            )
        self.examples = data

    @property
    def data(self) -> Examples:
        """The training examples."""
        if self.examples is None:
            raise MisconfigurationException(
                f'the training examples of stage "{self.name}" are needed and not at hand. HINT: pass `train=` the'
                " run's training dataset."
            )
        return self.examples

    def decoupled(self, step: int, column: int) -> bool:
        """Whether a column's weight decay was not preconditioned at that step."""
        phase = phase_at(self.phases, step)
        parent = phase.parents(self.phases[-1].columns)[column]
        return parent is not None and phase.decoupled[parent]

    @property
    def count(self) -> int:
        """``N``, the number of training examples."""
        return int(self.record["examples"])
