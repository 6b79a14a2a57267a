"""What must be known before a stage's first pass: its blocks, the scale of its losses, and whose row a row is.

All of it is learnt from training examples after training has ended, in batches as training saw them if a batch's rows
turn out to be its examples, else from the same examples one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_source._lightning import MisconfigurationException, rank_zero_warn
from lightning_source.capture.coverage import Coverage, listed
from lightning_source.capture.data import Examples
from lightning_source.capture.objective import NoLoss, ObjectiveSpec
from lightning_source.capture.probe import probe
from lightning_source.passes.alone import calibrate_alone
from lightning_source.passes.calibration import calibrate, first_with_loss
from lightning_source.passes.notices import warn_of_batch_idx, warn_of_carried_tensors, warn_of_partners
from lightning_source.passes.rows import compared_ids, rows_differ
from lightning_source.passes.singles import PROBED, batch_of, examples_with_loss
from lightning_source.passes.unrecognised import counted_in_batches, unknown_of, whole_where_reached_otherwise
from lightning_source.passes.workspace import Workspace

# Examples of the batch that blocks are probed on, which is run and differentiated several times.
PROBED_AT_ONCE = 16


@dataclass(frozen=True)
class Preparation:
    """What is known of a stage.

    Attributes:
        coverage: its blocks, each checked against autograd.
        spec: the scale of its losses, and why its examples are run one at a time, if they are.
    """

    coverage: Coverage
    spec: ObjectiveSpec


def prepare(
    workspace: Workspace, coverage: Coverage, data: Examples, examples_per_batch: float, maximize: bool = False
) -> Preparation:
    """Probe the blocks and calibrate the objective; call it inside :meth:`Workspace.at`.

    Args:
        workspace: the model, with the blocks of ``coverage``; its blocks and spec are replaced by what is found.
        coverage: the blocks by the kinds of their layers.
        data: the training examples.
        examples_per_batch: mean number of examples in a micro-batch of training.
        maximize: training went up the loss.

    Raises:
        MisconfigurationException: no block is left, or an example's loss depends on the others of its batch.
        FloatingPointError: the loss is not finite.
    """
    ids = compared_ids(data, workspace.seed)
    warn_of_carried_tensors(workspace, data, ids.tolist())
    reason: str | None
    by_batches: Preparation | None = None  # right as far as it goes
    try:
        spec = calibrate(workspace, data, examples_per_batch, maximize)
        probed, _ = first_with_loss(workspace, data, min(len(data), data.batch_size, PROBED_AT_ONCE))
        checked = _probe(workspace, coverage, data, probed)
        workspace.blocks = checked.blocks
        reason = rows_differ(workspace, data, ids)
        unknown = unknown_of(workspace, data, probed)
        if reason is None and unknown:
            counted = counted_in_batches(workspace, checked, data, spec, examples_per_batch, maximize)
            if counted is None:
                by_batches = Preparation(checked, spec)
                reason = f"{unknown:.1%} of its gradient at the layers comes from losses that are none of torch's"
            else:
                workspace.spec = spec = counted
        if reason is None and checked.left_out != coverage.left_out:
            reason = _gained_alone(workspace, coverage, checked, data)
    except FloatingPointError:
        raise
    except Exception as error:  # of a layout that is not by example; the user's own errors come again below
        reason = str(error)
    if reason is None:
        warn_of_batch_idx(workspace, data, ids.tolist())
        warn_of_partners(workspace, data, ids.tolist())
        return Preparation(checked, spec)
    workspace.blocks = coverage.blocks
    try:
        spec = replace(calibrate_alone(workspace, data, examples_per_batch, maximize), one_at_a_time=reason)
    except MisconfigurationException as error:
        if by_batches is None:
            raise
        rank_zero_warn(
            f"Part of the loss in `{type(workspace.module).__name__}.training_step` was not recognised ({reason}), and"
            f" no score counts it, since {error} HINT: use torch's losses, or define `attribution_losses(batch)` on the"
            " module."
        )
        workspace.blocks, workspace.spec = by_batches.coverage.blocks, by_batches.spec
        return by_batches
    except NoLoss as error:
        raise MisconfigurationException(f"there is no loss to attribute: {error}.") from None
    checked = _probed_alone(workspace, coverage, data)
    if spec.rest is not None:
        checked = whole_where_reached_otherwise(workspace, checked, data)
    workspace.blocks, workspace.spec = checked.blocks, spec
    return Preparation(checked, spec)


def _probed_alone(workspace: Workspace, coverage: Coverage, data: Examples) -> Coverage:
    """The coverage that is left when a few examples are run alone."""
    for example in examples_with_loss(workspace, data)[0][:PROBED]:
        coverage = _probe(workspace, coverage, data.one_at_a_time(), [example])
    return coverage


def _gained_alone(workspace: Workspace, coverage: Coverage, checked: Coverage, data: Examples) -> str | None:
    """Why examples are better run alone: parameters that only their single gradients reach, in words; ``None`` if none.

    Rows of an inner layer may belong to nodes, instances or segments although the batch's losses are by example.
    """
    workspace.blocks = coverage.blocks
    try:
        alone = {name for name, _, _ in _probed_alone(workspace, coverage, data).left_out}
    except FloatingPointError:
        raise
    except Exception:  # a step that needs a batch of several: what batches reach stands
        return None
    finally:
        workspace.blocks = checked.blocks
    gained = [name for name, _, _ in checked.left_out if name not in alone]
    return f"{listed(gained)} can be followed by single examples only" if gained else None


def _probe(workspace: Workspace, coverage: Coverage, data: Examples, ids: Sequence[int]) -> Coverage:
    return probe(workspace.module, workspace.objective, coverage, batch_of(workspace, data, ids), len(ids))
