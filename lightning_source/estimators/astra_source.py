"""SOURCE with the exact Gauss-Newton matrix, preconditioned by EK-FAC (after ASTRA, Wang et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_source._lightning import MisconfigurationException
from lightning_source.curvature.ekfac import IDENTITY, Basis
from lightning_source.curvature.krylov import Responses, spectral_responses
from lightning_source.curvature.unroll import diagonal_of
from lightning_source.estimators.query import Query
from lightning_source.estimators.registry import register_estimator
from lightning_source.estimators.source import Snapshots
from lightning_source.estimators.terms import Contraction, Metadata
from lightning_source.passes.factors import factor_ids
from lightning_source.passes.gauss_newton import GaussNewton
from lightning_source.passes.query_gradients import QueryGradients
from lightning_source.passes.workspace import State
from lightning_source.runs.run import Run
from lightning_source.runs.stage import Segment


@register_estimator(
    "astra-source", floats_per_parameter=lambda options: 2 * options.get("iterations", 20) + 10, segments=True
)
def astra_source(
    query: Query,
    *,
    segments: int | Sequence[int] | None = None,
    snapshots: Snapshots | None = None,
    iterations: int = 20,
    tolerance: float = 0.1,
    factor_examples: int | None = None,
) -> Iterator[Contraction | Metadata]:
    """The scores of ``"source"`` with ``F_r(H)`` and ``exp(-Λ H)`` of the exact Gauss-Newton matrix, over all blocks.

    The iteration is :func:`~lightning_source.curvature.krylov.spectral_responses`, preconditioned by EK-FAC's
    ``1/(σ + 1/Λ)``.
    With preconditioned steps (Adam) ``S = P^½ exp(-Λ M) P^-½`` and ``r = P^½ F_r(M) P^½ g`` with ``M = P^½ H P^½`` (Bae
    et al., Eq. 39 and 43) are taken as they stand, not by the hybrid of ``"source"``; EK-FAC's diagonal preconditions.

    Costs one train pass a snapshot, and each iteration a Gauss-Newton product of every snapshot with every query (see
    ``"influence-cg"``); two factor passes a snapshot the first time. Holds ``2 · iterations + 10`` copies of the
    attributed parameters for each query.

    Args:
        query: what is asked.
        segments: cut the run's snapshots into other segments than those of the run.
        snapshots: ``"mean"`` or ``"point"`` parameters of the snapshots; the run's own setting by default.
        iterations: Gauss-Newton products at most for each segment; the largest residual is in the scores' metadata.
        tolerance: a segment is done where every query's residual is below this; the error is about a tenth of it.
        factor_examples: training examples that ``H`` is averaged over, drawn once; all by default.

    Raises:
        MisconfigurationException: a later stage attributes other parameters than the asked one.
    """
    run = query.run
    which = snapshots or run.settings.snapshots
    parts = run.segments(segments)
    chain = [*parts, *run.later_segments()]
    _require_same_blocks(run)
    vectors: Tensor | None = None
    for index in range(len(chain) - 1, -1, -1):
        flow = _Flow(run, chain[index], which, factor_examples)
        if vectors is None:
            vectors = query.flat_gradients(run.final(), flow.layout)
        walked = flow.walk(vectors, iterations, tolerance)
        yield Metadata({"curvature": flow.kind}, residual=float(walked.residuals.max()))
        vectors = walked.decay
        if index < len(parts):
            response = QueryGradients(flow.layout.by_block(walked.response))
            for snapshot, weight in zip(parts[index].snapshots, parts[index].weights, strict=True):
                load = partial(run.state, snapshot, which)
                yield Contraction(load, response, weight / run.examples, segment=index)


def _require_same_blocks(run: Run) -> None:
    own = [(block.name, block.shape) for block in run.coverage.blocks]
    surviving_blocks = [(block.name, block.shape) for block in run.surviving_blocks()]
    for stage in run.stages[run.stage.index + 1 :]:
        if [(block.name, block.shape) for block in stage.coverage.blocks] != own or surviving_blocks != own:
            raise MisconfigurationException(
                f'`method="astra-source"` takes all blocks jointly, and stage "{stage.name}" attributes other'
                f' parameters than stage "{run.stage.name}" or started some anew. HINT: `method="source"` walks through'
                " such stages."
            )


class _Flow:
    """One segment's gradient flow ``θ' = -R (H + W) θ`` over a unit of time; ``R`` and ``W`` are diagonal."""

    def __init__(self, run: Run, segment: Segment, which: str, examples: int | None) -> None:
        stage = run.stages[segment.stage]
        ids = factor_ids(len(stage.data), examples, run.settings.seed)
        self.matrices = [
            GaussNewton(
                stage.workspace,
                stage.data,
                partial(_given, run.state(snapshot, which)),
                ids,
                run.settings.label_samples,
            )
            for snapshot in segment.snapshots
        ]
        self.weights = segment.weights
        self.layout = self.matrices[0].layout
        scale = run.preconditioner(segment.snapshots)
        factors = run.snapshot_factors(segment, which)
        self.bases: dict[str, Basis] = {}
        self.spectra: dict[str, Tensor] = {}  # of the preconditioner's R^½ (H + W) R^½, in these bases
        rates, shifts = {}, {}  # R, and what weight decay adds to R^½ H R^½
        for block in stage.coverage.blocks:
            basis, rate = factors[block.name].basis, segment.stretch.rates[block.group]
            decay = segment.stretch.weight_decay(block.group)
            eigenvalues = factors[block.name].eigenvalues.clamp_min(0)
            rates[block.name] = torch.full_like(eigenvalues, rate) * scale.get(block.name, 1.0)
            decoupled = stage.decoupled(segment.stretch.first, block.group)
            shifts[block.name] = decay * (torch.full_like(eigenvalues, rate) if decoupled else rates[block.name])
            if block.name in scale:
                self.bases[block.name], curvature = IDENTITY, diagonal_of(basis, eigenvalues)
            else:
                self.bases[block.name], curvature = basis, eigenvalues
            self.spectra[block.name] = rates[block.name] * curvature + shifts[block.name]
        self.rates, self.shifts = (
            self.layout.flat({name: value.unsqueeze(0) for name, value in values.items()})[0]
            for values in (rates, shifts)
        )

    @property
    def kind(self) -> str | None:
        """What stands for the curvature."""
        return self.matrices[0].kind

    def walk(self, vectors: Tensor, iterations: int, tolerance: float) -> Responses:
        """``R^½ F_r(M) R^½ v`` and ``R^-½ exp(-M) R^½ v``, the transpose of what the flow does to parameters."""
        root = self.rates.sqrt()
        responses = spectral_responses(
            self._symmetric,
            root * vectors,
            precondition=self._inverse,
            iterations=iterations,
            tolerance=tolerance,
        )
        # What did not move was not changed either.
        decay = torch.where(root > 0, responses.decay / torch.where(root > 0, root, 1.0), vectors)
        return responses._replace(response=root * responses.response, decay=decay)

    def _symmetric(self, vectors: Tensor) -> Tensor:
        """``R^½ H R^½ v``, and the weight decay's share."""
        root = self.rates.sqrt()
        moved = root * vectors
        total = self.shifts * vectors
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            total += weight * root * matrix(moved)
        return total

    def _inverse(self, vectors: Tensor) -> Tensor:
        result = torch.empty_like(vectors)
        result_blocks = self.layout.by_block(result)
        for name, matrices in self.layout.by_block(vectors).items():
            rotated = self.bases[name].rotate_from(IDENTITY, matrices) / (1 + self.spectra[name])
            result_blocks[name].copy_(IDENTITY.rotate_from(self.bases[name], rotated))
        return result


def _given(state: State) -> State:
    return state
