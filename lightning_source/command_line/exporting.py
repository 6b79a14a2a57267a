"""``lightning-source export SCORES``: the strongest examples of each query as a table."""

from __future__ import annotations

import csv
from typing import TextIO

from lightning_source.scores import InfluenceScores
from lightning_source.tables import ScoreRow


def write_csv(scores: InfluenceScores, k: int, out: TextIO) -> None:
    """The rows with a header."""
    writer = csv.writer(out)
    writer.writerow(ScoreRow._fields)
    writer.writerows(["" if value is None else value for value in row] for row in scores.rows(k))
