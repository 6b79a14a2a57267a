"""Where scores go as they are computed: blocks of queries by training examples, term by term."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

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


@runtime_checkable
class LayerSink(ScoreSink, Protocol):
    """A sink that may keep each layer's part of the scores as well.

    Attributes:
        layers: how many layers' parts it keeps, ``L``; ``None`` for none, and then no term computes them.
    """

    layers: int | None

    def add_layers(self, rows: slice, columns: slice, parts: Tensor) -> None:
        """Add the layers' parts of a block that :meth:`add` was given.

        Args:
            rows: which of the queries.
            columns: which of the training examples that were asked for.
            parts: ``[L, rows, columns]`` on the CPU, which sum to the block's values.
        """


class MatrixSink:
    """The whole matrix in memory.

    Args:
        queries: ``Q``.
        examples: ``N``.
        segments: how many segments' shares to keep as well; none by default.
        layers: how many layers' shares to keep as well; none by default.

    Attributes:
        values: ``[Q, N]``, float32.
        by_segment: ``[S, Q, N]``, or ``None``.
        by_layer: ``[L, Q, N]``, or ``None``.
    """

    def __init__(self, queries: int, examples: int, segments: int | None = None, layers: int | None = None) -> None:
        self.layers = layers
        self.values = torch.zeros(queries, examples)
        self.by_segment = None if segments is None else torch.zeros(segments, queries, examples)
        self.by_layer = None if layers is None else torch.zeros(layers, queries, examples)

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

    def add_layers(self, rows: slice, columns: slice, parts: Tensor) -> None:
        """Add the layers' parts of a block, where these are kept."""
        if self.by_layer is not None:
            self.by_layer[:, rows, columns] += parts


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
