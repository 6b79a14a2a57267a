"""``lightning-source export SCORES``: the strongest examples of each query as a table."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import TextIO

from lightning_source.scores import InfluenceScores

COLUMNS = ("query", "side", "rank", "train", "score", "stderr")
Row = tuple[int, str, int, int, float, float | None]


def rows_of(scores: InfluenceScores, k: int) -> Iterator[Row]:
    """For each query its ``k`` proponents and its ``k`` opponents, the strongest first."""
    k = min(k, scores.values.shape[1])
    columns = {int(train): column for column, train in enumerate(scores.train_ids)}
    for side, ids in (("proponent", scores.proponents(k)[1]), ("opponent", scores.opponents(k)[1])):
        for row, query in enumerate(scores.query_ids.tolist()):
            for rank, train in enumerate(ids[row].tolist(), 1):
                column = columns[train]
                error = None if scores.stderr is None else float(scores.stderr[row, column])
                yield query, side, rank, train, float(scores.values[row, column]), error


def write_csv(scores: InfluenceScores, k: int, out: TextIO) -> None:
    """The rows with a header."""
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    writer.writerows(["" if value is None else value for value in row] for row in rows_of(scores, k))
