"""What queries ask about, as vectors over the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class QueryGradients:
    """Gradients of a measurement, one for each query, or the vectors that an estimator made of them.

    Attributes:
        values: ``[Q, P, O, I]`` by block.
        columns: for an embedding's block the tokens that its ``I`` columns stand for, in ascending order: those that
            the queries use, the gradient being 0 at all others. A block that is not named has all its columns.
    """

    values: Mapping[str, Tensor]
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def restrict(self, name: str, values: Tensor) -> Tensor:
        """A block's ``[P, O, I]`` (eigenvalues, a preconditioner) for the columns that its gradients have."""
        return values[..., self.columns[name]] if name in self.columns else values
