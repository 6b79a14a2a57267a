"""Tables of what the tests check, subject by check, written from a run: ``python -m pytest --checks=docs/checks.md``.

A test says what it checks by a mark, and what it measured by a call:

    @pytest.mark.check("layer", "Conv2d, {case}", "gradients")
    def test_conv2d(case):
        ...
        measured(error)

``{case}`` stands for the parametrised argument of that name; classes and functions are written by their names. Tests
with the same table, row and column share a cell, which shows the worst of them: whether all passed, and the largest
figure measured. A test may carry several marks. Where processes share the tests (``-n 2``), what they declare and
measure comes back to the one that started them, which writes the page.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import lightning
import pytest
import torch

TITLES = {
    "layer": "Layers",
    "architecture": "Architectures",
    "loss": "Losses",
    "data": "Data",
    "optimizer": "Optimizers",
    "engine": "Precision and engines",
    "stage": "Stages and resume",
}
NOTES = {
    "layer": "Figures are relative errors of per-example gradients against autograd on one example at a time; the"
    " bound is 1e-4, or 2e-2 under autocast, whose arithmetic has 8 bits.",
    "architecture": "Networks of a few thousand parameters on real text and digits. Gradients as above, of every block;"
    " the covered share of parameters is asserted to be 99 % or more.",
    "loss": "The Fisher of sampled labels is estimated from 20,000 draws: figures are its largest error over its"
    " largest entry, 5 standard errors are allowed.",
}
Key = tuple[str, str, str]  # table, row, column

HEAD = """\
# What the tests check

Written by `python -m pytest --checks=docs/checks.md` from the run's own outcomes; a test fails when a row here and the
tests no longer agree. A figure beside ✓ is the largest that was measured, of the kind that its column names; figures
differ in their last digits from machine to machine. An empty cell is not tested, or has no meaning.
"""


@dataclass
class Cell:
    """The tests of one subject and check."""

    outcomes: list[str] = field(default_factory=list)
    figures: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.outcomes:
            return "not run"
        if "failed" in self.outcomes:
            return "**failed**"
        if "passed" not in self.outcomes:
            return "skipped"
        return "✓" + (f" {_rounded(max(self.figures))}" if self.figures else "")


def _rounded(figure: float) -> str:
    return f"{figure:.1e}" if 0 < figure < 1e-2 else f"{figure:.3g}"


def measured(figure: float) -> None:
    """Enter a figure that the running test measured into the cells of its marks."""
    _measured.append(float(figure))


_measured: list[float] = []


def declared(item: pytest.Item) -> Iterator[Key]:
    """The cells that a test fills."""
    given: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    arguments = {name: _written(value) for name, value in given.items()}
    for mark in reversed(list(item.iter_markers("check"))):
        try:
            table, row, column = (text.format(**arguments) for text in mark.args)
            if table not in TITLES or "|" in row + column:
                raise ValueError(f"tables are {', '.join(TITLES)}, and names hold no |")
        except (KeyError, ValueError) as error:
            raise pytest.UsageError(f"{item.nodeid}: `check{mark.args}` names no cell: {error!r}") from error
        yield table, row, column


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_written(one)}" for key, one in value.items()) or "plain"
    if isinstance(value, FunctionType):
        return value.__name__.replace("_", " ")
    return str(getattr(value, "__name__", value))


class Checks:
    """The plugin: what was collected declares the cells, what ran fills them."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.cells: dict[Key, Cell] = {}
        self.files: set[Path] = set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Before `-k` and `-m` take tests away."""
        self.files = {item.path for item in items}
        for item in items:
            for key in declared(item):
                self.cells.setdefault(key, Cell())

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Figures belong to the test that runs."""
        _measured.clear()
        yield

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        """A report carries what its test declared and measured, also from one process to another."""
        (yield).get_result().user_properties.append(("checks", (list(declared(item)), list(_measured))))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The outcome of a test's body, or of a set-up that kept it from running."""
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            keys, figures = dict(report.user_properties)["checks"]
            for key in map(tuple, keys):
                cell = self.cells.setdefault(key, Cell())
                cell.outcomes.append(report.outcome)
                cell.figures += figures

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A process that ran a share of the tests collected all of them, in the order of the page."""
        if cells := getattr(node, "workeroutput", {}).get("cells"):
            self.cells = {key: self.cells.get(key, Cell()) for key in map(tuple, cells)}

    def pytest_sessionfinish(self) -> None:
        """Write the page if it was asked for."""
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["cells"] = list(self.cells)
        elif path := self.config.getoption("checks"):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(page(self.cells), encoding="utf-8")

    def complete(self) -> bool:
        """Whether every test was collected, so that the declared cells are all there are."""
        return self.files >= set(Path(__file__).parent.rglob("test_*.py")) and not any(
            "::" in str(argument) for argument in self.config.args
        )


def page(cells: dict[Key, Cell]) -> str:
    """The tables as Markdown."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}"
    pieces = [HEAD, f"Last run: {versions}.\n"]
    for table, title in TITLES.items():
        own = {(row, column): cell for (kind, row, column), cell in cells.items() if kind == table}
        if not own:
            continue
        # What most subjects are checked for comes first, and subjects come with the first check that they have.
        counts = Counter(column for _, column in own)
        columns = [column for column, _ in counts.most_common()]
        rows = list(dict.fromkeys(row for column in columns for row, other in own if other == column))
        subjects = [row.split(",")[0] for row in rows]  # what a row begins with stands together
        rows.sort(key=lambda row: subjects.index(row.split(",")[0]))
        lines = [
            f"## {title}\n",
            *([NOTES[table] + "\n"] if table in NOTES else []),
            "| | " + " | ".join(columns) + " |",
            "|" + "---|" * (len(columns) + 1),
        ]
        for row in rows:
            texts = [str(own[row, column]) if (row, column) in own else "" for column in columns]
            lines.append(f"| {row} | " + " | ".join(texts) + " |")
        pieces.append("\n".join(lines) + "\n")
    return "\n".join(pieces)


def read(text: str) -> set[Key]:
    """The cells that a page shows."""
    found: set[Key] = set()
    kinds = {title: kind for kind, title in TITLES.items()}
    kind, columns = "", []
    for line in text.splitlines():
        if line.startswith("## "):
            kind, columns = kinds[line[3:]], []
        elif kind and line.startswith("|") and not line.startswith("|---"):
            row, *texts = (part.strip() for part in line.split("|")[1:-1])
            if not columns:
                columns = texts
                continue
            found |= {(kind, row, column) for column, shown in zip(columns, texts, strict=True) if shown}
    return found
