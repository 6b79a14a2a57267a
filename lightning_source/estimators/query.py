"""What is asked of an estimator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_source.capture.data import Examples, GivenBatches
from lightning_source.capture.objective import Measurement
from lightning_source.curvature.ekfac import Basis
from lightning_source.passes.gauss_newton import Layout
from lightning_source.passes.query_gradients import QueryGradients
from lightning_source.passes.workspace import State
from lightning_source.runs.run import Run


@dataclass(frozen=True)
class Query:
    """Examples and a measurement of each, asked of a run.

    Attributes:
        run: the opened run, with the training examples that scores are for.
        examples: the queries.
        measurement: what a query is measured by.
    """

    run: Run
    examples: Examples | GivenBatches
    measurement: str | Measurement

    def gradients(self, state: State, bases: Mapping[str, Basis] | None = None) -> QueryGradients:
        """Gradients of the measurement at some parameters by block; in parameter space by default."""
        return self.run.query_workspace.query_gradients(state, self.examples, self.measurement, bases)

    def flat_gradients(self, state: State, layout: Layout) -> Tensor:
        """The same over all blocks at once, ``[Q, D]``: columns that the queries leave at 0 are there as well."""
        gradients = self.gradients(state)
        return layout.flat(gradients.values, gradients.columns)
