"""What queries ask about, as vectors over the blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
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

    @classmethod
    def mean(cls, several: Iterable[QueryGradients], weights: Sequence[float]) -> QueryGradients:
        """Their weighted mean; a block that some of them do not have counts as 0 there.

        Args:
            several: of the same queries, at least one. They are taken one by one, so that two are held at once.
            weights: of each; only their ratios count.
        """
        whole = sum(weights)
        totals: dict[str, Tensor] = {}
        columns: dict[str, Tensor] = {}
        for one, weight in zip(several, weights, strict=True):
            for name, given in one.values.items():
                values = given * (weight / whole)
                if name in totals and name in one.columns:
                    tokens = torch.cat([columns[name], one.columns[name]]).unique()
                    earlier = _at_columns(totals[name], columns[name], tokens)
                    totals[name] = earlier + _at_columns(values, one.columns[name], tokens)
                    columns[name] = tokens
                elif name in totals:
                    totals[name] += values
                else:
                    totals[name] = values
                    columns |= {name: one.columns[name]} if name in one.columns else {}
            del one  # before the next one is made
        return cls(totals, columns)

    def restrict(self, name: str, values: Tensor) -> Tensor:
        """A block's ``[P, O, I]`` (eigenvalues, a preconditioner) for the columns that its gradients have."""
        return values[..., self.columns[name]] if name in self.columns else values


def _at_columns(values: Tensor, tokens: Tensor, wanted: Tensor) -> Tensor:
    """Columns that stand for some tokens among those that stand for more of them; both in ascending order."""
    if len(tokens) == len(wanted):
        return values
    result = values.new_zeros(*values.shape[:-1], len(wanted))
    result[..., torch.searchsorted(wanted, tokens)] = values
    return result
