"""The loss that further training goes down: that of the module's own ``training_step``, or one that the user gives."""

from __future__ import annotations

from torch import Tensor

from lightning_source._lightning import MisconfigurationException
from lightning_source.capture.batch_copies import copied
from lightning_source.capture.coverage import find_blocks
from lightning_source.capture.objective import Objective
from lightning_source.evaluation.further_runs.recipe import Recipe
from lightning_source.passes.calibration import calibrate, evaluate
from lightning_source.passes.singles import examples_with_loss
from lightning_source.passes.unrecognised import unknown_of, with_rest
from lightning_source.passes.workspace import Workspace


class StepLoss:
    """The loss of the module's own ``training_step``."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.objective = Objective(recipe.module)
        groups = [group["params"] for group in recipe.optimizer.param_groups]
        # Blocks only serve to tell a mean from a sum where the loss is not one of torch's.
        blocks = find_blocks(recipe.module, groups).blocks
        workspace = Workspace(recipe.module, blocks, self.objective, hooks=recipe.hooks)
        with workspace.at({}):
            size = len(recipe.data) / recipe.steps_per_epoch
            self.spec = calibrate(workspace, recipe.data, size)
            ids, alone = examples_with_loss(workspace, recipe.data)
            if unknown_of(workspace, recipe.data, ids):
                self.spec = with_rest(workspace, self.spec, evaluate(workspace, recipe.data, ids), alone, size)

    @property
    def in_part_unknown(self) -> bool:
        """Whether some of the loss, or all of it, is made of no call that is recognised."""
        return self.spec.origin == "whole" or self.spec.rest is not None

    def batch(self, batch: object, size: int, dropped: int | None) -> Tensor:
        """A step's loss on a batch of ``size`` examples, without the part of the one at position ``dropped``."""
        losses = self.objective.evaluate(batch, size, hooked=False)
        if dropped is None:
            return losses.loss
        by_example = losses.each()
        if by_example.shape != (size,) or self.in_part_unknown:
            raise MisconfigurationException(
                f'`removal="mask"` needs the losses of single examples, which `{type(self.recipe.module).__name__}`\'s'
                ' `training_step` does not show. HINT: use torch\'s losses, pass `loss=`, or take `removal="shift"`.'
            )
        return losses.loss - by_example[dropped]

    def single(self, batch: object) -> Tensor:
        """An example's share of the risk, at the scale of the training batches (method §4)."""
        return self.objective.evaluate(batch, 1).data_target(self.spec).sum()

    def measure(self, batch: object, size: int) -> Tensor:
        """The measurement of each query of a batch, ``[B]``."""
        if callable(self.recipe.measurement):
            return self.recipe.measurement(self.recipe.module, copied(batch))
        return self.objective.evaluate(batch, size).measurement(self.spec, self.recipe.measurement)


class GivenLoss:
    """The mean of per-example losses that the user gives."""

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.loss is not None
        self.recipe, self.by_example = recipe, recipe.loss

    def batch(self, batch: object, size: int, dropped: int | None) -> Tensor:
        """As :meth:`StepLoss.batch`."""
        losses = self.by_example(self.recipe.module, batch)
        if losses.shape != (size,):
            raise MisconfigurationException(
                f"`loss` must return one value per example, a tensor [{size}]; it returned {list(losses.shape)}."
            )
        return (losses.sum() - (0.0 if dropped is None else losses[dropped])) / size

    def single(self, batch: object) -> Tensor:
        """An example's own loss."""
        return self.by_example(self.recipe.module, batch).sum()

    def measure(self, batch: object, size: int) -> Tensor:
        """The measurement of each query of a batch, ``[B]``."""
        if callable(self.recipe.measurement):
            return self.recipe.measurement(self.recipe.module, copied(batch))
        return self.by_example(self.recipe.module, copied(batch))
