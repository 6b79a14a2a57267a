"""Writes ``docs/speed.md`` from the committed JSON of :mod:`speed`."""

from __future__ import annotations

import json
from typing import Any

from harness import RESULTS
from page import DOCS, table

AGREES = 0.999  # correlation of scores
OPEN = (
    "Which side differs is not known; its covariances have many eigenvalues of 0, on which kronfluence's decomposition"
    " does not converge on a CPU."
)
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
    agreements = {row["title"]: row["correlation_with_kronfluence"] for row in report["rows"] if "kronfluence" in row}
    differing = {title: value for title, value in agreements.items() if value < AGREES}
    agreement = min(value for value in agreements.values() if value >= AGREES)
    option = "" if kind == "cpu" else f" --device {kind}"
    return (
        f"""## {DEVICES[kind]}

{report["device"]}, torch {report["torch"]}, float32, medians of {report["repeats"]}, both sides in one process.
`python benchmarks/speed.py --peer kronfluence{option}`

{table(head, lines)}

Over the layers that both follow, with curvature from the data's own labels and the same damping, the scores of both
correlate by at least {agreement:.4f} on every row{", but for:" if differing else "."}
{"".join(f"{chr(10)}- {title}: {value:.2f}. {OPEN}" for title, value in differing.items())}
""".rstrip()
        + "\n"
    )


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
