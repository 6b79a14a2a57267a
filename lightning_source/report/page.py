"""The page: what it shows, as numbers and texts, and the file that it becomes."""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Protocol

import torch
from torch import Tensor

from lightning_source._files import write_text
from lightning_source._lightning import MisconfigurationException
from lightning_source.report.examples import Render, labels_of, query_example, shown, training_example

_MOST_CLASSES, _MOST_LAYERS, _BINS, _MOST_IMAGE_BYTES = 20, 12, 41, 7_000_000
_PIXELS = (96, 64, 40, 24, 16)


class Scores(Protocol):
    """What the page takes from scores; see ``InfluenceScores`` for the shapes."""

    @property
    def values(self) -> Tensor: ...  # noqa: D102
    @property
    def train_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def query_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def by_segment(self) -> Tensor | None: ...  # noqa: D102
    @property
    def by_layer(self) -> Tensor | None: ...  # noqa: D102
    @property
    def stderr(self) -> Tensor | None: ...  # noqa: D102
    @property
    def metadata(self) -> Mapping[str, object]: ...  # noqa: D102
    @property
    def _lower_is_better(self) -> bool: ...


class LdsResult(Protocol):
    """What pictures take from a result of ``linear_datamodeling_score``."""

    @property
    def lds(self) -> Tensor: ...  # noqa: D102
    @property
    def interval(self) -> Tensor: ...  # noqa: D102
    @property
    def control_interval(self) -> Tensor: ...  # noqa: D102
    @property
    def reliability(self) -> Tensor | None: ...  # noqa: D102


def write_report(
    scores: Scores,
    path: str | os.PathLike[str],
    train: object,
    query: object,
    *,
    render: Render | None = None,
    k: int = 10,
    self_influence: Tensor | None = None,
    predictions: Sequence[object] | None = None,
    losses: Sequence[float] | Tensor | None = None,
    validation: LdsResult | None = None,
    title: str = "Which training examples did this?",
) -> None:
    """Write ``InfluenceScores.report``'s file; its arguments are described there.

    Raises:
        MisconfigurationException: Jinja2 or Pillow is missing, or an argument's length is not that of the scores.
    """
    require_report_packages()
    count = len(scores.values)
    for name, given in (("predictions", predictions), ("losses", losses)):
        if given is not None and len(given) != count:
            raise MisconfigurationException(f"`{name}` has {len(given)} entries for {count} queries.")
    if self_influence is not None and self_influence.shape != scores.train_ids.shape:
        raise MisconfigurationException(
            f"`self_influence` has the shape {list(self_influence.shape)}, not that of the training examples,"
            f" {list(scores.train_ids.shape)}."
        )
    if k < 1:
        raise MisconfigurationException(f"`k={k}` must be at least 1.")
    content = _numbers(scores, min(k, scores.values.shape[1]), self_influence, labels_of(train))
    for pixels in _PIXELS:
        examples = {str(n): shown(training_example(train, n), render, pixels) for n in sorted(content.ids)}
        queries = [shown(query_example(query, scores.query_ids, q), render, pixels) for q in range(count)]
        if sum(len(e.get("image", "")) for e in (*examples.values(), *queries)) <= _MOST_IMAGE_BYTES:
            break
    for q, entry in enumerate(queries):
        entry["id"] = str(int(scores.query_ids[q]))
        if predictions is not None:
            entry["prediction"] = str(predictions[q])
        if losses is not None:
            entry["loss"] = f"{float(losses[q]):.4g}"
    data = content.data | {"examples": examples, "queries": queries, "header": _header(scores)}
    if validation is not None:
        data["validation"] = _validation(validation)
    write_text(path, _page(data, title))


def require_report_packages() -> None:
    """Refuse to make a page without what it is made with.

    Raises:
        MisconfigurationException: Jinja2 or Pillow is missing.
    """
    missing = [name for name, module in (("Jinja2", "jinja2"), ("Pillow", "PIL")) if not _installed(module)]
    if missing:
        raise MisconfigurationException(
            f"a report needs {' and '.join(missing)}. HINT: pip install 'lightning_source[report]'"
        )


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


class _Content:
    """The page's numbers, and the training examples that it shows."""

    def __init__(self) -> None:
        self.data: dict[str, object] = {}
        self.ids: set[int] = set()

    def ranked(
        self, values: Tensor, ids: Tensor, k: int, largest: bool, errors: Tensor | None = None
    ) -> list[list[float]]:
        """``[[id, value, column]]``, most extreme first, with a fourth number where values have errors."""
        top, columns = values.topk(k, largest=largest)
        rows = [[int(ids[c]), float(v), int(c)] for v, c in zip(top, columns.tolist(), strict=True)]
        if errors is not None:
            rows = [[*row, float(errors[int(row[2])])] for row in rows]
        self.ids |= {int(row[0]) for row in rows}
        return rows


def _numbers(scores: Scores, k: int, self_influence: Tensor | None, labels: Tensor | None) -> _Content:
    content, values = _Content(), scores.values.double()
    helps_high = scores._lower_is_better
    sides = {"helpful": helps_high, "harmful": not helps_high}
    sizes = values.abs().sum(1)
    content.data["helps_high"] = helps_high
    content.data["tops"] = [
        {
            side: content.ranked(row, scores.train_ids, k, high, None if scores.stderr is None else scores.stderr[q])
            for side, high in sides.items()
        }
        for q, row in enumerate(values)
    ]
    content.data["sizes"] = sizes.tolist()
    mean = values.mean(0)
    content.data["overall"] = {side: content.ranked(mean, scores.train_ids, k, high) for side, high in sides.items()}
    content.data["overall_size"] = float(mean.abs().sum())
    if scores.by_segment is not None:
        content.data["segments"] = _segment_names(scores, len(scores.by_segment))
        content.data["shares"] = _shares(scores.by_segment).tolist()
    if scores.by_layer is not None:
        names = _layer_names(scores, len(scores.by_layer))
        content.data["layers"] = [_largest(names, shares) for shares in _shares(scores.by_layer)]
    if self_influence is not None:
        content.data["suspects"] = content.ranked(
            self_influence.double(), scores.train_ids, min(5 * k, len(self_influence)), True
        )
    # Of all scores, the part that the largest hold: one number at each of 21 fractions of the training examples.
    order = values.abs().sort(1, descending=True).values.cumsum(1)
    fractions = torch.linspace(0, 1, 21)
    at = (fractions * (values.shape[1] - 1)).round().long()
    content.data["concentration"] = (order[:, at] / sizes[:, None].clamp_min(1e-300)).mean(0).tolist()
    largest_score = float(values.abs().max())
    counts = torch.histc(values.float(), _BINS, -largest_score or -1.0, largest_score or 1.0)
    content.data["histogram"] = {"counts": counts.tolist(), "limit": largest_score}
    content.data["N"] = values.shape[1]
    content.data["classes"] = _by_label(values, scores.train_ids, labels)
    return content


def _by_label(values: Tensor, train_ids: Tensor, labels: Tensor | None) -> dict[str, object] | None:
    """Sums of mean scores by the training examples' label; ``None`` without labels, or with too many."""
    if labels is None or int(train_ids.max()) >= len(labels):
        return None
    kinds, index = labels[train_ids].cpu().unique(return_inverse=True)
    if len(kinds) > _MOST_CLASSES:
        return None
    sums = values.new_zeros(len(values), len(kinds)).index_add_(1, index, values)
    return {"labels": kinds.tolist(), "sums": sums.tolist()}


def _shares(parts: Tensor) -> Tensor:
    """Shares ``[Q, S]`` of each query's absolute score by parts ``[S, Q, N]``."""
    sizes = parts.double().abs().sum(2)
    return (sizes / sizes.sum(0).clamp_min(1e-300)).T


def _layer_names(scores: Scores, count: int) -> list[str]:
    known = scores.metadata.get("layers")
    return [_short(name) for name in (known if isinstance(known, list) and len(known) == count else range(count))]


def _largest(names: Sequence[str], shares: Tensor) -> list[tuple[str, float]]:
    """The largest shares by name, in the order of the model, and the sum of the rest."""
    shown = sorted(shares.topk(min(_MOST_LAYERS, len(names))).indices.tolist())
    rows = [(names[index], float(shares[index])) for index in shown]
    if (rest := len(names) - len(shown)) > 0:
        others = float(shares.sum()) - sum(share for _, share in rows)
        rows.append((f"{rest} other layer{'s' if rest > 1 else ''}", max(0.0, others)))
    return rows


def _segment_names(scores: Scores, count: int) -> list[str]:
    """What each segment is called: its steps, where they are known."""
    known = scores.metadata.get("segments")
    records = known if isinstance(known, list) and len(known) == count else [None] * count
    return [
        f"steps {_short(record.get('first'))} to {_short(record.get('last'))}"
        if isinstance(record, Mapping)
        else f"segment {number}"
        for number, record in enumerate(records)
    ]


def _validation(result: LdsResult) -> dict[str, object]:
    reliability = result.reliability
    return {
        "lds": float(result.lds),
        "interval": [float(end) for end in result.interval],
        "control": [float(end) for end in result.control_interval],
        "ceiling": None if reliability is None or not reliability > 0 else float(reliability) ** 0.5,
    }


def _header(scores: Scores) -> list[tuple[str, str]]:
    metadata, rows = scores.metadata, []
    for name in ("method", "measurement", "stage", "step", "run_id", "unit", "sign"):
        if metadata.get(name) is not None:
            rows.append((name.replace("_", " "), str(metadata[name])))
    rows.append(("training examples scored", str(scores.values.shape[1])))
    segments = metadata.get("segments")
    for number, segment in enumerate(segments if isinstance(segments, list) else []):
        if isinstance(segment, Mapping):
            rates = segment.get("rates")
            listed = ", ".join(map(_short, rates)) if isinstance(rates, list) else _short(rates)
            steps = f"steps {_short(segment.get('first'))} to {_short(segment.get('last'))}"
            rows.append((f"segment {number}", f"{steps}; sum of learning rates Λ = {listed}"))
    if isinstance(share := metadata.get("coverage"), float | int):
        rows.append(("parameters attributed", f"{share:.1%}" if share < 1 else "all"))
    left_out = metadata.get("left_out")
    for entry in left_out if isinstance(left_out, list) else []:
        if isinstance(entry, list | tuple) and len(entry) == 3:
            rows.append(
                (f"not attributed: {_short(entry[0])}", f"{entry[1]:.1%} of the parameters, {_short(entry[2])}")
            )
    if isinstance(bar := metadata.get("error_bar"), Mapping):
        rows.append(("± at a score", f"its standard error over {_short(bar.get('over'))}"))
    return rows


def _short(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 400 else text[:400] + " …"


def _page(data: Mapping[str, object], title: str) -> str:
    folder = files("lightning_source.report")
    style, script = ((folder / name).read_text("utf-8") for name in ("report.css", "report.js"))
    jinja2 = importlib.import_module("jinja2")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    text: str = environment.from_string((folder / "report.html").read_text("utf-8")).render(
        title=title,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=_json_in_html(data),
    )
    return text


def _json_in_html(data: object) -> str:
    """JSON that cannot end the element it stands in: no ``<``, ``>`` or ``&``, which JSON may write as escapes."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
