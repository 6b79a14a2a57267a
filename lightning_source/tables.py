"""Scores as rows: the table of the strongest examples, for pandas, Arrow and notebooks."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch.utils.data import DataLoader

from lightning_source._lightning import MisconfigurationException
from lightning_source.report import Scores

if TYPE_CHECKING:
    from pandas import DataFrame
    from pyarrow import Table

_SHOWN = 5  # queries, and examples on each side of them, in a notebook


class ScoreRow(NamedTuple):
    """One training example of one query."""

    query: int
    side: str  # "proponent" or "opponent"
    rank: int  # from 1, the strongest
    train: int
    score: float
    stderr: float | None


class RowScores(Scores, Protocol):
    """What tables take from scores; see ``InfluenceScores``."""

    def rows(self, k: int) -> Iterator[ScoreRow]: ...  # noqa: D102


def pandas_of(scores: RowScores, k: int | None, train: object, columns: Sequence[str] | None) -> DataFrame:
    """``InfluenceScores.to_pandas``; its arguments are described there."""
    pandas = _package("pandas", "to_pandas")
    if k is not None:
        return pandas.DataFrame(_columns(scores, k, train, columns))
    if train is not None or columns is not None:
        raise MisconfigurationException(
            "`to_pandas` joins columns of the training dataset to rows, and the whole matrix has none for examples."
            " HINT: `to_pandas(k)`, or `to_arrow(...)`, whose whole table has a row for each pair."
        )
    ids = {"query": scores.query_ids, "train": scores.train_ids}
    index, header = (pandas.Index(numbers.numpy(), name=name) for name, numbers in ids.items())
    return pandas.DataFrame(scores.values.numpy(), index, header)


def arrow_of(scores: RowScores, k: int | None, train: object, columns: Sequence[str] | None) -> Table:
    """``InfluenceScores.to_arrow``; its arguments are described there."""
    arrow = _package("pyarrow", "to_arrow")
    table = arrow.table(
        {
            # Without error bars the column is all null, and its type would not be known.
            name: arrow.array(values, arrow.float64()) if name == "stderr" else arrow.array(values)
            for name, values in _columns(scores, k, train, columns).items()
        }
    )
    return table.replace_schema_metadata({"influence_scores": json.dumps(scores.metadata)})


def html_of(scores: RowScores) -> str:
    """``InfluenceScores`` as notebooks show them: what they are, and the strongest examples of the first queries.

    Everything that is not written here is escaped.
    """
    count, examples = scores.values.shape
    facts: dict[str, object] = {"queries": count, "training examples": examples}
    facts |= {
        name: scores.metadata[name] for name in ("method", "measurement", "unit", "sign") if name in scores.metadata
    }
    head = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(fact))}</td></tr>" for name, fact in facts.items())
    body = []
    rows = islice(scores.rows(_SHOWN), _SHOWN * 2 * min(_SHOWN, examples))
    for query, group in groupby(rows, key=lambda row: row.query):
        cells = {"proponent": "", "opponent": ""}
        for row in group:
            cells[row.side] += f"#{row.train}&nbsp;({row.score:+.3g}) "
        body.append(f"<tr><th>{query}</th><td>{cells['proponent']}</td><td>{cells['opponent']}</td></tr>")
    more = f"<p>and {count - _SHOWN} more queries</p>" if count > _SHOWN else ""
    titles = "<tr><th>query</th><th>proponents: id (score)</th><th>opponents: id (score)</th></tr>"
    return f"<table>{head}</table><table>{titles}{''.join(body)}</table>{more}"


def _columns(scores: RowScores, k: int | None, train: object, names: Sequence[str] | None) -> dict[str, Any]:
    """A table by columns: of each query's strongest examples, or of all pairs."""
    if k is None:
        queries, examples = scores.values.shape
        table: dict[str, Any] = {
            "query": scores.query_ids.repeat_interleave(examples).numpy(),
            "train": scores.train_ids.repeat(queries).numpy(),
            "score": scores.values.flatten().numpy(),
        }
        if scores.stderr is not None:
            table["stderr"] = scores.stderr.flatten().numpy()
    else:
        rows = list(scores.rows(k))
        table = {name: [row[place] for row in rows] for place, name in enumerate(ScoreRow._fields)}
    if train is None:
        if names is not None:
            raise MisconfigurationException(
                "`columns` are those of the training dataset. HINT: pass it, too: `train=dataset`."
            )
        return table
    return table | _joined([int(n) for n in table["train"]], train, names)


def _joined(ids: Sequence[int], train: Any, names: Sequence[str] | None) -> dict[str, list[Any]]:
    """Columns of the training dataset by name, with ``train_`` in front, at these examples."""
    dataset: Any = train.dataset if isinstance(train, DataLoader) else train
    if ids and max(ids) >= len(dataset):
        raise MisconfigurationException(
            f"`train` has {len(dataset)} examples, and the scores are of one with the id {max(ids)}. HINT: pass the"
            " dataset that was scored."
        )
    if names is not None and hasattr(dataset, "select_columns") and set(names) <= set(dataset.column_names):
        dataset = dataset.select_columns(list(names))  # of Hugging Face: what is not asked for is not decoded
    at = getattr(dataset, "iloc", dataset)  # of pandas
    found = {n: at[n] for n in dict.fromkeys(ids)}
    table: dict[str, list[Any]] = {}
    for n, example in found.items():
        if not hasattr(example, "keys"):
            raise MisconfigurationException(
                f"the examples of `{type(dataset).__name__}` are of type `{type(example).__name__}`, whose parts"
                " have no names to join by. HINT: pass a dataset of mappings in the same order, or a DataFrame."
            )
        names = list(example.keys()) if names is None else names
        if missing := [name for name in names if name not in example.keys()]:  # noqa: SIM118 - a Series has values in
            raise MisconfigurationException(
                f"example {n} of `train` has no column `{missing[0]}`. HINT: it has"
                f" {', '.join(f'`{name}`' for name in example.keys())}."  # noqa: SIM118
            )
    for name in names or ():
        values = {n: _plain(example[name]) for n, example in found.items()}
        table[f"train_{name}"] = [values[n] for n in ids]
    return table


def _plain(value: Any) -> Any:
    """A tensor or array as numbers, which tables know."""
    return value.tolist() if hasattr(value, "tolist") else value


def _package(name: str, method: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise MisconfigurationException(
            f"`{method}` needs {name}, which is not installed. HINT: `pip install 'lightning_source[tables]'`."
        ) from None
