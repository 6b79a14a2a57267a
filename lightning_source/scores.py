"""The result object: scores with their ids, sign, unit and origin, to and from one safetensors file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_source import plots
from lightning_source._files import DirectoryError
from lightning_source._lightning import MisconfigurationException
from lightning_source._sealed import read_sealed, write_sealed
from lightning_source._student import student_quantile
from lightning_source.report import LdsResult, write_report
from lightning_source.tables import ScoreRow, arrow_of, html_of, pandas_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame
    from pyarrow import Table

SIGN = "Positive: removing the training example raises the measurement. For a loss, a positive score is a proponent."
HIGHER_IS_BETTER = ("margin", "log-prob")

_METADATA = "influence_scores"  # the file's metadata entry, which marks it as scores
# The file's tensors and their shapes: S segments, L layers, Q queries, N examples.
_SHAPES = {
    "values": "QN",
    "train_ids": "N",
    "query_ids": "Q",
    "by_segment": "SQN",
    "kernel_weights": "N",
    "stderr": "QN",
    "by_layer": "LQN",
}
_REQUIRED = {"values", "train_ids", "query_ids"}
_PLOTS: dict[str, Callable[..., Axes]] = {
    "examples": plots.plot_examples,
    "segments": plots.plot_segment_shares,
    "layers": plots.plot_layer_shares,
    "histogram": plots.plot_histogram,
    "concentration": plots.plot_concentration,
}


@dataclass(frozen=True)
class InfluenceScores:
    """Attribution scores of queries by training example.

    ``values[q, n]`` is the predicted change of query ``q``'s measurement if training example ``n`` were removed, in the
    measurement's unit (where the method has another, ``metadata["unit"]`` says so). **Positive = removing the example
    raises the measurement**, so for the loss a positive score marks an example that helped. Scores add up: the sum over
    a set predicts its removal.

    Attributes:
        values: ``[Q, N]``, float32.
        train_ids: ``[N]``, int64, positions in the training dataset.
        query_ids: ``[Q]``, int64, positions in the query batch or dataset.
        by_segment: ``[S, Q, N]``, the segments' shares, which sum to ``values``; or ``None``.
        metadata: method, measurement, sign, unit, segments with their ``Λ``, ``N``, coverage, run id, versions.
        kernel_weights: ``[N]``, what ``values`` are a kernel times of (``"trak"``: ``∂L/∂f`` of each example); or
            ``None``.
        stderr: ``[Q, N]``, the standard errors of ``values`` (:meth:`significant`); or ``None``. What they are taken
            over, ``"snapshots"`` of one run or ``"runs"``, and their degrees of freedom are ``metadata["error_bar"]``.
        by_layer: ``[L, Q, N]``, the shares of the modules named in ``metadata["layers"]``, in the model's order, which
            sum to ``values``; or ``None``. All parameters that a module holds itself are one layer, and one that
            modules share counts for the first of them.
    """

    values: Tensor
    train_ids: Tensor
    query_ids: Tensor
    by_segment: Tensor | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    kernel_weights: Tensor | None = None
    stderr: Tensor | None = None
    by_layer: Tensor | None = None

    def topk(self, k: int, largest: bool = True) -> tuple[Tensor, Tensor]:
        """The ``k`` highest (or lowest) scores of each query, best first.

        Args:
            k: how many; at most ``N``.
            largest: ``False`` for the lowest.

        Returns:
            ``(values [Q, k], train ids [Q, k])``.

        Example:
            >>> scores = InfluenceScores(torch.tensor([[0.5, -2.0, 1.0]]), torch.tensor([7, 8, 9]), torch.tensor([0]))
            >>> scores.topk(2)
            (tensor([[1.0000, 0.5000]]), tensor([[9, 7]]))
        """
        values, columns = self.values.topk(min(k, self.values.shape[1]), dim=1, largest=largest)
        return values, self.train_ids[columns]

    def proponents(self, k: int, sure: float | None = None) -> tuple[Tensor, Tensor]:
        """The ``k`` examples that helped each query most, best first: ``(values [Q, k], train ids [Q, k])``.

        For a loss (and a callable, which is taken for one) these have the most positive scores; for a margin or
        log-probability, which the example's removal would lower, the most negative.

        Args:
            k: how many; at most ``N``.
            sure: a level in (0, 1): rank by the end of each score's interval of that level at which the example helps
                least, and give back those ends; an example that may not have helped at all has one of the other sign.

        Raises:
            MisconfigurationException: ``sure`` is given and the scores have no error bar.

        Example:
            >>> values, ids = torch.tensor([[0.5, -2.0, 1.0]]), torch.arange(3)
            >>> InfluenceScores(values, ids, torch.tensor([0]), metadata={"measurement": "loss"}).proponents(2)
            (tensor([[1.0000, 0.5000]]), tensor([[2, 0]]))
            >>> InfluenceScores(values, ids, torch.tensor([0]), metadata={"measurement": "margin"}).proponents(1)
            (tensor([[-2.]]), tensor([[1]]))
        """
        return self._extremes(k, self._lower_is_better, sure)

    def opponents(self, k: int, sure: float | None = None) -> tuple[Tensor, Tensor]:
        """The ``k`` examples that harmed each query most, worst first: the other end of :meth:`proponents`."""
        return self._extremes(k, not self._lower_is_better, sure)

    def significant(self, level: float = 0.9) -> Tensor:
        """Which scores' intervals of that level leave out 0, ``[Q, N]`` bool.

        The interval is ``values ± t · stderr`` with Student's ``t``. Of an ensemble's scores it covers what other
        training seeds would change; of one run's, only how much its snapshots disagree (method §7.6). In neither is the
        error that the method makes for every run alike. With many examples some are above by chance: one in ten of
        those without any effect, at a level of 0.9.

        Args:
            level: in (0, 1).

        Raises:
            MisconfigurationException: the scores have no error bar, or no such level.

        Example:
            >>> ids, values = torch.arange(2), torch.tensor([[1.0, 4.0]])
            >>> bar = {"over": "runs", "degrees": 4}
            >>> scores = InfluenceScores(values, ids, ids[:1], metadata={"error_bar": bar}, stderr=torch.ones(1, 2))
            >>> scores.significant(0.9)
            tensor([[False,  True]])
        """
        return self.values.abs() > self._half_width(level)

    def _half_width(self, level: float) -> Tensor:
        if not 0 < level < 1:
            raise MisconfigurationException(f"a level of {level} is no probability between 0 and 1.")
        if self.stderr is None:
            raise MisconfigurationException(
                "these scores have no error bar. HINT: score with `stderr=True`, or `ensemble` those of several runs."
            )
        return student_quantile(level, int(self.metadata["error_bar"]["degrees"])) * self.stderr

    def _extremes(self, k: int, largest: bool, sure: float | None) -> tuple[Tensor, Tensor]:
        if sure is None:
            return self.topk(k, largest)
        width = self._half_width(sure)
        return replace(self, values=self.values - width if largest else self.values + width).topk(k, largest)

    @property
    def _lower_is_better(self) -> bool:
        return self.metadata.get("measurement") not in HIGHER_IS_BETTER

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, metadata and a digest of all of it included.

        Raises:
            OSError: it cannot be written; an earlier file of that name is there still.
        """
        tensors = {name: getattr(self, name) for name in _SHAPES if getattr(self, name) is not None}
        write_sealed(path, tensors, _METADATA, self.metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InfluenceScores:
        """The inverse of :meth:`save`.

        Raises:
            FileNotFoundError: there is no such file.
            MisconfigurationException: the file is damaged or holds something else; the message says what is wrong.
        """
        try:
            tensors, metadata = read_sealed(path, _METADATA)
            if isinstance(metadata, dict) and metadata.get("method") == "trak" and "weights" in metadata:
                # Where earlier versions kept them.
                tensors["kernel_weights"] = torch.tensor(metadata.pop("weights"), dtype=torch.float64)
        except DirectoryError as error:
            raise _refused(path, str(error)) from error
        except (TypeError, ValueError) as error:
            raise _refused(path, f"it is damaged ({error})") from error
        if not isinstance(metadata, dict):
            raise _refused(path, f"its `{_METADATA}` is no object")
        complaint = _complaint(tensors)
        if complaint is None and "stderr" in tensors and not _is_error_bar(metadata.get("error_bar")):
            complaint = "its metadata does not say what `stderr` is taken over"
        if complaint is None and "by_layer" in tensors and not _are_names(metadata.get("layers"), tensors["by_layer"]):
            complaint = "its metadata does not name the layers"
        if complaint:
            raise _refused(path, complaint)
        return cls(**tensors, metadata=metadata)

    def rows(self, k: int) -> Iterator[ScoreRow]:
        """For each query its ``k`` proponents, then its ``k`` opponents, the strongest first.

        Args:
            k: how many on each side; at most all.

        Example:
            >>> scores = InfluenceScores(torch.tensor([[1.0, -2.0]]), torch.arange(2), torch.arange(1))
            >>> [(row.side, row.train, row.score) for row in scores.rows(1)]
            [('proponent', 0, 1.0), ('opponent', 1, -2.0)]
        """
        k = min(k, self.values.shape[1])
        columns = {int(train): column for column, train in enumerate(self.train_ids)}
        sides = (("proponent", self.proponents(k)[1].tolist()), ("opponent", self.opponents(k)[1].tolist()))
        for row, query in enumerate(self.query_ids.tolist()):
            for side, ids in sides:
                for rank, train in enumerate(ids[row], 1):
                    column = columns[train]
                    error = None if self.stderr is None else float(self.stderr[row, column])
                    yield ScoreRow(query, side, rank, train, float(self.values[row, column]), error)

    def to_pandas(
        self, k: int | None = None, *, train: object = None, columns: Sequence[str] | None = None
    ) -> DataFrame:
        """As a table of pandas, which must be installed (extra ``tables``).

        Args:
            k: :meth:`rows` of so many examples on each side; by default the whole matrix, with queries as the index and
                training examples as the columns.
            train: the training dataset that was scored, or its loader, whose columns are joined to the rows: one of
                Hugging Face, a DataFrame, or any whose examples are mappings.
            columns: which of them; by default all. They have ``train_`` before their names.

        Raises:
            MisconfigurationException: pandas is missing, examples have no such columns, or there is no ``k``.

        Example::

            table = scores.to_pandas(5, train=dataset, columns=["text", "label"])  # ... train_text, train_label
        """
        return pandas_of(self, k, train, columns)

    def to_arrow(self, k: int | None = None, *, train: object = None, columns: Sequence[str] | None = None) -> Table:
        """As a table of Arrow, for Parquet, Polars, DuckDB or ``datasets``; needs pyarrow (extra ``tables``).

        Args:
            k: :meth:`rows` of so many examples on each side; by default all pairs, one row each, with ``query``,
                ``train``, ``score``, and ``stderr`` where there are error bars.
            train: see :meth:`to_pandas`.
            columns: see :meth:`to_pandas`.

        Returns:
            The table; its schema's metadata hold the scores' own under ``influence_scores``, as JSON.

        Raises:
            MisconfigurationException: pyarrow is missing, or examples have no such columns.
        """
        return arrow_of(self, k, train, columns)

    def segment_shares(self) -> Tensor:
        """Each segment's share of the absolute score, ``[S, Q]``; shares of a query sum to 1.

        Raises:
            MisconfigurationException: the scores were computed without ``per_segment=True``.

        Example:
            >>> by_segment = torch.tensor([[[0.5, -0.5]], [[3.0, 0.0]]])  # 2 segments, 1 query, 2 training examples
            >>> InfluenceScores(by_segment.sum(0), torch.arange(2), torch.arange(1), by_segment).segment_shares()
            tensor([[0.2500],
                    [0.7500]])
        """
        if self.by_segment is None:
            raise MisconfigurationException("scores by segment were not kept. HINT: score with `per_segment=True`.")
        return _shares(self.by_segment)

    def layer_shares(self) -> Tensor:
        """Each layer's share of the absolute score, ``[L, Q]``; shares of a query sum to 1.

        Where layers pull a score in opposite directions, their shares are those of the sizes of their parts.

        Raises:
            MisconfigurationException: the scores were computed without ``per_layer=True``.
        """
        if self.by_layer is None:
            raise MisconfigurationException("scores by layer were not kept. HINT: score with `per_layer=True`.")
        return _shares(self.by_layer)

    def plot(
        self,
        kind: str | None = None,
        *,
        train: object = None,
        query: object = None,
        ax: Axes | None = None,
        **options: Any,
    ) -> Axes:
        """Draw the scores with matplotlib, which is the extra ``plots``; :mod:`lightning_source.plots` has more.

        Args:
            kind: the picture. By default ``"examples"`` where ``train`` and ``query`` are given, else ``"segments"`` or
                ``"layers"`` where the scores have any, else ``"histogram"``.

                - ``"examples"``: each query beside the examples that helped and harmed it most
                  (:func:`~lightning_source.plots.plot_examples`, which has further options: ``k``, ``rows``,
                  ``render``).
                - ``"segments"``: when in training each query's scores arose.
                - ``"layers"``: where in the model they arose.
                - ``"histogram"``: how many scores have which size.
                - ``"concentration"``: how few training examples hold most of the absolute score.
            train: the training dataset that was scored, for ``"examples"``.
            query: the queries, for ``"examples"``: the batch, dataset or loader that was scored.
            ax: matplotlib axes to draw on; those of a new figure by default.
            options: the picture's own.

        Returns:
            The axes.

        Raises:
            MisconfigurationException: matplotlib is missing, there is no such kind, only one of ``train`` and ``query``
                is given, they are missing or not wanted, or the scores lack what the picture shows.

        Example::

            scores.plot(train=dataset, query=query_batch, k=3).figure.savefig("examples.png")
        """
        given = {name: data for name, data in (("train", train), ("query", query)) if data is not None}
        if kind is None:
            shares = {"segments": self.by_segment, "layers": self.by_layer}
            kept = (name for name, parts in shares.items() if parts is not None)
            kind = "examples" if given else next(kept, "histogram")
        if kind not in _PLOTS:
            raise MisconfigurationException(f"there is no plot {kind!r}. HINT: {', '.join(map(repr, _PLOTS))}.")
        if len(given) != (2 if kind == "examples" else 0):
            raise MisconfigurationException(
                f"the plot {kind!r} was given {' and '.join(given) or 'no examples'}. HINT: `train=` and `query=` are"
                ' for "examples", which needs both.'
            )
        return _PLOTS[kind](self, ax=ax, **given, **options)

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        train: object,
        query: object,
        render: Callable[[object], object] | None = None,
        k: int = 10,
        self_influence: Tensor | None = None,
        predictions: Sequence[object] | None = None,
        losses: Sequence[float] | Tensor | None = None,
        validation: LdsResult | None = None,
        title: str = "Which training examples did this?",
    ) -> None:
        """Write one HTML file that shows the scores beside the examples; it needs no network to be read.

        For each query: the examples that helped and harmed most, with score, standard error and share of the query's
        absolute score, the shares of segments, layers and training labels where these are known. Over all queries: the
        same for the mean score, scores by query and training label, a histogram, and how concentrated the scores are.

        Args:
            path: the file, which is replaced.
            train: the training dataset that was scored, read at the ids shown.
            query: the queries: the batch, dataset or loader that was scored.
            render: takes what the dataset gives at an index and gives back a text or a picture (a tensor ``[H, W]`` or
                ``[C, H, W]``); markup in a text is shown, never run. ``None`` guesses: pictures, texts, rows of tables
                (mappings), waveforms, numbers.
            k: examples listed on each side.
            self_influence: ``[N]``, as ``SourceScorer.self_influence`` gives it; lists the labels to look at first.
            predictions: what the model said to each query.
            losses: of each query.
            validation: what :func:`~lightning_source.evaluation.linear_datamodeling_score` found for these scores.
            title: of the page.

        Raises:
            MisconfigurationException: the extra ``report`` (Jinja2, Pillow) is missing, or an argument's length is not
                that of the scores.
        """
        write_report(
            self,
            path,
            train,
            query,
            render=render,
            k=k,
            self_influence=self_influence,
            predictions=predictions,
            losses=losses,
            validation=validation,
            title=title,
        )

    def _repr_html_(self) -> str:
        """What notebooks show."""
        return html_of(self)

    def __repr__(self) -> str:
        q, n = self.values.shape
        return f"InfluenceScores({q} queries x {n} training examples, method={self.metadata.get('method')!r}. {SIGN})"


def _complaint(tensors: Mapping[str, Tensor]) -> str | None:
    """What makes tensors no scores."""
    if not _REQUIRED <= tensors.keys() <= _SHAPES.keys():
        return f"its tensors are {', '.join(f'`{name}`' for name in sorted(tensors)) or 'none'}"
    sizes: dict[str, int] = {}
    for name, letters in _SHAPES.items():
        if name not in tensors:
            continue
        shape, dtype = tensors[name].shape, tensors[name].dtype
        expected = [sizes.setdefault(letter, size) for letter, size in zip(letters, shape, strict=False)]
        if len(shape) != len(letters) or expected != list(shape):
            return f"`{name}` has the shape {list(shape)}, which is not [{', '.join(letters)}] of the others"
        if not (dtype == torch.int64 if name.endswith("_ids") else dtype.is_floating_point):
            return f"`{name}` is of {dtype}"
        if not tensors[name].isfinite().all():
            return f"`{name}` is not finite"
    return None


def _shares(parts: Tensor) -> Tensor:
    """Shares ``[S, Q]`` of the absolute score by parts ``[S, Q, N]``."""
    sizes = parts.abs().sum(2)
    return sizes / sizes.sum(0, keepdim=True).clamp_min(torch.finfo(sizes.dtype).tiny)


def _are_names(said: object, parts: Tensor) -> bool:
    return isinstance(said, list) and len(said) == len(parts) and all(isinstance(name, str) for name in said)


def _is_error_bar(said: object) -> bool:
    if not isinstance(said, dict):
        return False
    degrees = said.get("degrees")
    return isinstance(degrees, int) and not isinstance(degrees, bool) and degrees >= 1


def _refused(path: str | os.PathLike[str], complaint: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"`{path}` holds no influence scores: {complaint}. HINT: `InfluenceScores.save` writes them."
    )
