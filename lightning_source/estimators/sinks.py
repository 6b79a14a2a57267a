"""Where scores go as they are computed: blocks of queries by training examples, term by term."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lightning_source._lightning import MisconfigurationException


class ScoreSink(Protocol):
    """Takes the blocks of a score matrix: one for each term, block of queries and batch of examples."""

    def add(self, rows: slice, columns: slice, values: Tensor, segment: int | None) -> None:
        """Add a block to the scores.

        Args:
            rows: which of the queries.
            columns: which of the training examples that were asked for.
            values: ``[rows, columns]`` on the CPU; terms of a score come one after another and add up.
            segment: the segment of training whose share this is; ``None`` where it belongs to none.
        """


class MatrixSink:
    """The whole matrix in memory.

    Args:
        queries: ``Q``.
        examples: ``N``.
        segments: how many segments' shares to keep as well; none by default.

    Attributes:
        values: ``[Q, N]``, float32.
        by_segment: ``[S, Q, N]``, or ``None``.
    """

    def __init__(self, queries: int, examples: int, segments: int | None = None) -> None:
        self.values = torch.zeros(queries, examples)
        self.by_segment = None if segments is None else torch.zeros(segments, queries, examples)

    def add(self, rows: slice, columns: slice, values: Tensor, segment: int | None) -> None:
        """Add a block to the scores, and to its segment's share.

        Raises:
            MisconfigurationException: shares are kept and the block belongs to no segment.
        """
        self.values[rows, columns] += values
        if self.by_segment is None:
            return
        if segment is None:
            raise MisconfigurationException(
                "`per_segment=True`: a term of the score belongs to no segment, so the shares would not sum to it."
                " HINT: register the method without `segments=True`, or give each of its terms its `segment`."
            )
        self.by_segment[segment, rows, columns] += values


def require_finite_scores(values: Tensor, queries: Tensor, examples: Tensor) -> None:
    """Refuse scores of which some are NaN or infinite, by the ids of the first of them.

    Raises:
        FloatingPointError: some are.
    """
    if not values.isfinite().all():
        query, example = (~values.isfinite()).nonzero()[0].tolist()
        raise FloatingPointError(
            f"{int((~values.isfinite()).sum())} of {values.numel()} scores are not finite, the first one of query"
            f" {int(queries[query])} and example {int(examples[example])}. HINT: `scorer.diagnose()` says what is known"
            " of the run."
        )
