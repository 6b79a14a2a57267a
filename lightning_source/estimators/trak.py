"""TRAK: a generalised linear model in randomly projected gradients (Park et al., ICML 2023, Section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_source._lightning import MisconfigurationException
from lightning_source.capture.data import Examples, GivenBatches
from lightning_source.capture.objective import Losses, ObjectiveSpec
from lightning_source.curvature.block_gradients import BlockGradients
from lightning_source.estimators.query import Query
from lightning_source.estimators.registry import register_estimator
from lightning_source.estimators.terms import DirectScores, Metadata
from lightning_source.layers import Block
from lightning_source.passes.finite import require_finite_gradients
from lightning_source.passes.workspace import State, Target, Workspace

# The projection is drawn anew for this many examples, in pieces of about this many parameters.
_EXAMPLES, _PARAMETERS = 512, 1 << 14
# Weights are kept away from 0, so that an ensemble can have the kernel back from the scores.
_SMALLEST = 1e-12


@register_estimator(
    "trak",
    unit="change of the measurement on removing the example, but for the curvature of the loss in the output",
    floats_per_parameter=0.01,
    layers=False,
)
def trak(
    query: Query,
    *,
    dimension: int | None = None,
    projection: Literal["rademacher", "gaussian"] = "rademacher",
    seed: int = 0,
) -> Iterator[DirectScores | Metadata]:
    """``φ(q)ᵀ (ΦᵀΦ)⁻¹ φ(z_n) ∂L/∂f(z_n)``, ``φ = Πᵀ∇f / √k`` at the final model with a random ``Π`` of ``k`` columns.

    ``f`` of a training example is its margin ``log(p / (1 - p))``, so that ``∂L/∂f = -(1 - p)``, or the output of a
    loss of one number for each example (a regression), with its own ``∂L/∂f``. The paper asks about margins: pass
    ``measurement="margin"`` for its scores, which here have the other sign (positive = removing raises the margin). Any
    other measurement's gradient is projected in its place. For an average over runs as in the paper, give their scores
    to :func:`~lightning_source.ensembling.ensemble`.

    Costs one pass over the training examples and one over the queries, each with ``k`` products for every parameter,
    and holds ``k`` numbers for each of them, not more: the projection is drawn block by block.

    Args:
        query: what is asked.
        dimension: ``k``; by default 1024, but at most half the training examples and the number of parameters.
        projection: entries of ``Π``, ``±1`` or Normal.
        seed: of ``Π``.

    Raises:
        MisconfigurationException: the loss has no margin and not one output for each example, or ``k`` is too large.
    """
    run = query.run
    data, blocks = run.data, run.coverage.blocks
    width = sum(block.numel for block in blocks)
    k = min(1024, max(1, len(data) // 2), width) if dimension is None else dimension
    if not 1 <= k <= len(data):
        raise MisconfigurationException(
            f"`dimension={k}`: {len(data)} training examples tell at most as many directions apart. HINT: fewer."
        )
    if projection not in ("rademacher", "gaussian"):
        raise MisconfigurationException(f'`projection="{projection}"` is not known. HINT: "rademacher" or "gaussian".')
    projector = _Projector(blocks, k, projection, seed)
    state = run.final()
    weights: list[Tensor] = []

    def output(losses: Losses, spec: ObjectiveSpec, ids: Tensor) -> Tensor:
        values, slopes = output_of(losses, spec)
        weights.append(slopes.cpu())
        return values

    features = projector.features(run.workspace, run.final_of_stage(), data, run.workspace.target(output))
    workspace = run.query_workspace
    asked = projector.features(workspace, state, query.examples, workspace.measured(query.measurement))
    kernel = asked @ torch.linalg.pinv(features.T @ features, rtol=1e-6, hermitian=True) @ features.T
    slopes = torch.cat(weights)
    slopes = torch.where(slopes.abs() < _SMALLEST, _SMALLEST * torch.where(slopes < 0, -1.0, 1.0), slopes)

    def scores(data: Examples, ids: Tensor | None) -> Tensor:
        columns = torch.arange(len(slopes)) if ids is None else ids
        scaled: Tensor = kernel[:, columns] * slopes[columns]
        return scaled.float()

    yield Metadata({"dimension": k}, kernel_weights=slopes)
    yield DirectScores(scores)


def output_of(losses: Losses, spec: ObjectiveSpec) -> tuple[Tensor, Tensor]:
    """The model output ``f`` of each example and ``∂L/∂f`` there, both ``[B]``.

    Raises:
        MisconfigurationException: there is no such output.
    """
    calls = losses.calls
    if len(calls) == 1 and calls[0].margin is not None:
        margin = losses.measurement(spec, "margin")
        return margin, -torch.sigmoid(-margin.detach())
    if len(calls) == 1 and len(calls[0].outputs) == 1 and calls[0].outputs[0].numel() == losses.size:
        (output,), loss = calls[0].outputs, losses.measurement(spec, "loss").sum()
        (slopes,) = torch.autograd.grad(loss, output, retain_graph=True, allow_unused=True)
        if slopes is not None:
            return output.reshape(losses.size), slopes.reshape(losses.size)
    recognised = ", ".join(f"`{call.name}`" for call in calls) or "none"
    raise MisconfigurationException(
        'method="trak" needs one loss with a class as target, or with one output for each example, in `training_step`'
        f" (recognised: {recognised})."
    )


class _Projector:
    """``Πᵀ∇ / √k`` of each example; ``Π`` exists in pieces only, the same whenever it is drawn."""

    def __init__(self, blocks: Sequence[Block], dimension: int, kind: str, seed: int) -> None:
        self.blocks = blocks
        self.dimension = dimension
        self.kind = kind
        self.seed = seed

    def features(self, workspace: Workspace, state: State, data: Examples | GivenBatches, target: Target) -> Tensor:
        """``[examples, k]``, float64 on the CPU."""
        rows, waiting, sizes = [], [], []
        with workspace.at(state):
            for index, captured in workspace.captures(data, target):
                for name, gradients in captured.items():
                    require_finite_gradients(gradients, name, data.named(index))
                waiting.append(captured)
                sizes.append(len(index))
                if sum(sizes) >= _EXAMPLES:
                    rows.append(self._projected(waiting, sizes))
                    waiting, sizes = [], []
            if waiting:
                rows.append(self._projected(waiting, sizes))
        return torch.cat(rows)

    def _projected(self, batches: Sequence[Mapping[str, BlockGradients]], sizes: Sequence[int]) -> Tensor:
        total = torch.zeros(sum(sizes), self.dimension, dtype=torch.float64)
        generator = torch.Generator().manual_seed(self.seed)
        for block in self.blocks:
            parts, outputs, inputs = block.shape
            step = max(1, _PARAMETERS // (parts * inputs))
            for start in range(0, outputs, step):
                count = min(step, outputs - start)
                piece = self._draw(parts * count * inputs, generator)
                stop = 0
                for size, captured in zip(sizes, batches, strict=True):
                    rows, stop = slice(stop, stop + size), stop + size
                    if block.name in captured:
                        whole = captured[block.name]
                        some = whole._replace(gradients=whole.gradients[..., start : start + count])
                        matrices = some.per_example().transpose(0, 1).reshape(size, -1)
                        total[rows] += (matrices @ piece.to(matrices)).cpu()
        scale: float = self.dimension**0.5
        return total / scale

    def _draw(self, rows: int, generator: torch.Generator) -> Tensor:
        if self.kind == "gaussian":
            return torch.randn(rows, self.dimension, generator=generator)
        return torch.randint(2, (rows, self.dimension), generator=generator, dtype=torch.int8).float() * 2 - 1
