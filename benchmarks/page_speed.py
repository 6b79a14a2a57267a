"""Writes ``docs/speed.md`` from the committed JSON of :mod:`speed`."""

from __future__ import annotations

import json
from typing import Any

from harness import RESULTS
from page import DOCS, table

AGREES = 0.999  # correlation of scores
DEVICES = {"cpu": "On a CPU", "cuda": "On a GPU"}


def seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def ratio(row: dict[str, Any], method: str) -> str:
    return f"{row[f'kronfluence_over_{method}']:.1f}" if f"kronfluence_over_{method}" in row else "–"


def section(kind: str, report: dict[str, Any]) -> str:
    lines = [
        [
            row["title"],
            *(
                seconds(row[key])
                for key in ("training", "recording", "checks", "factors", "scoring", "source", "influence")
            ),
            seconds(row["kronfluence"]) if "kronfluence" in row else "–",
            ratio(row, "influence"),
            ratio(row, "source"),
        ]
        for row in report["rows"]
    ]
    head = ["", "training", "recording", "checks", "factors", "scoring", "**SOURCE**", "**influence**"]
    head += ["kronfluence, influence", "over our influence", "over our SOURCE"]
    option = "" if kind == "cpu" else f" --device {kind}"
    return f"""## {DEVICES[kind]}

{report["device"]}, torch {report["torch"]}, float32, medians of {report["repeats"]}, both sides in one process.
`python benchmarks/speed.py --peer kronfluence{option}`

{table(head, lines)}

{agreement(report)}
"""


def agreement(report: dict[str, Any]) -> str:
    """How far scores are kronfluence's, and on which rows they are not."""
    found = {row["title"]: row["correlation_with_kronfluence"] for row in report["rows"] if "kronfluence" in row}
    least = min(value for value in found.values() if value >= AGREES)
    text = (
        "Over the layers that both follow, with curvature from the data's own labels and the same damping, the scores"
        f" of both\ncorrelate by at least {least:.4f}"
    )
    differing = [f"{value:.2f} on {title}" for title, value in found.items() if value < AGREES]
    if not differing:
        return f"{text} on every row."
    return f"""{text}, but by {"; ".join(differing)}. Which side differs there is not known: its covariances
have many eigenvalues of 0, and on a CPU kronfluence's decomposition of them does not converge
(`python benchmarks/speed.py resnet --peer kronfluence`)."""


def speed_page() -> None:
    """Write the page."""
    found = {k: json.loads(p.read_text()) for k in DEVICES if (p := RESULTS / f"speed_{k}.json").exists()}
    DOCS.joinpath("speed.md").write_text(
        """# What it costs

Seconds beside those of training itself and of kronfluence 1.0.1. "Influence" is EK-FAC influence end to end: factors at
the final model, and every pair of training example and query. "SOURCE" is everything that SOURCE with three snapshots
costs beyond training without the callback: recording, factors and scores. "Checks" are what finds out how the training
step treats its examples and whether every layer's gradients are autograd's; they are paid once a run, whatever its
size, and are part of "factors" and of "influence". A title ends with the numbers of training examples and queries. The
data are noise around centres or random tokens, on which nothing here depends.

"""
        + "\n".join(section(kind, report) for kind, report in found.items())
    )


if __name__ == "__main__":
    speed_page()
