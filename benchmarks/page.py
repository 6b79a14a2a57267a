"""What the sections of the page of results share: reports, tables, numbers and figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from harness import RESULTS

DOCS = Path(__file__).parent.parent / "docs"
FIGURES = DOCS / "figures"
ORDER = (
    "digits-3",
    "digits-20",
    "digits-adam",
    "digits-adamw",
    "two-stage-upright",
    "two-stage-rotated",
    "concrete",
    "parkinsons",
    "fashion-noisy",
    "fashion",
    "fashion-small",
    "sst2",
    "wikitext",
    "cifar",
)
Report = dict[str, Any]


def reports(kind: str) -> dict[str, Report]:
    """A study's reports by task, in the order of the tables."""
    found = {
        file.stem.removeprefix(f"{kind}_"): json.loads(file.read_text()) for file in RESULTS.glob(f"{kind}_*.json")
    }
    return {name: found[name] for name in ORDER if name in found}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * lines[0].count(" | ") + "---|", *lines[1:]])


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}".replace("0.", ".", 1)


def with_interval(value: float, interval: list[float]) -> str:
    return f"{number(value)} ({number(interval[0])}–{number(interval[1])})"


def by_task(found: dict[str, Report], cell: Callable[[Report], str], rows: Iterable[str]) -> list[list[str]]:
    return [[row, *(cell(r["lds"][row]) if row in r["lds"] else "" for r in found.values())] for row in rows]


def rows_of(found: dict[str, Report], first: Iterable[str] = ()) -> list[str]:
    known = dict.fromkeys(row for report in found.values() for row in report["lds"])
    return [row for row in dict.fromkeys([*first, *known]) if row in known]


def save(figure: Any, name: str) -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(FIGURES / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)
