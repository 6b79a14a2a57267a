"""What an estimator yields: the terms that a score is the sum of, and what is to be known of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_source._lightning import MisconfigurationException
from lightning_source.capture.data import Examples
from lightning_source.curvature.ekfac import Basis
from lightning_source.estimators.sinks import LayerSink, ScoreSink
from lightning_source.passes.elements import Elements
from lightning_source.passes.query_gradients import QueryGradients
from lightning_source.passes.workspace import State, Workspace

JsonValue = str | float | None | Mapping[str, str | int]


@dataclass(frozen=True)
class Contraction:
    """One term of a score: ``weight · ⟨vectors[q], g(z_n)⟩`` with the examples' gradients at ``state``.

    Attributes:
        state: loads the parameters.
        vectors: the queries' vectors by block.
        weight: of this term.
        bases: the eigenbases that ``vectors`` are written in; parameter space by default.
        segment: the segment of training whose share of the score this is; ``None`` where it belongs to none.
        normalize: divide by the norm of the example's gradient.
    """

    state: Callable[[], State]
    vectors: QueryGradients
    weight: float
    bases: Mapping[str, Basis] | None = None
    segment: int | None = None
    normalize: bool = False

    def compute(
        self, workspace: Workspace, data: Examples | Elements, ids: Tensor | None, sink: ScoreSink, rows: slice
    ) -> None:
        """Add the term for the examples ``ids`` (``None``: all) to the queries ``rows``, batch by batch."""
        layers = _layers_of(sink)

        def add(columns: slice, products: Tensor, parts: Tensor | None) -> None:
            sink.add(rows, columns, self.weight * products, self.segment)
            if layers is not None and parts is not None:
                layers.add_layers(rows, columns, self.weight * parts)

        workspace.inner_products(
            self.state(), data, ids, self.vectors, add, self.bases, self.normalize, by_layer=layers is not None
        )


@dataclass(frozen=True)
class DirectScores:
    """One term of a score that is no contraction.

    Attributes:
        values: of the examples and ids (``None``: all), ``[Q, N]``.
        segment: the segment of training whose share of the score this is; ``None`` where it belongs to none.
    """

    values: Callable[[Examples, Tensor | None], Tensor]
    segment: int | None = None

    def compute(self, workspace: Workspace, data: Examples, ids: Tensor | None, sink: ScoreSink, rows: slice) -> None:
        """Add the term for the examples ``ids`` (``None``: all) to the queries ``rows``, as one block.

        Raises:
            MisconfigurationException: the sink keeps the layers' parts, and this term has none.
        """
        if _layers_of(sink) is not None:
            raise MisconfigurationException(
                "`per_layer=True`: a term of the score is no sum over layers, so the shares would not sum to it. HINT:"
                " register the method with `layers=False`, which refuses this before anything is computed."
            )
        values = self.values(data, ids)
        sink.add(rows, slice(0, values.shape[1]), values, self.segment)


@dataclass(frozen=True)
class Metadata:
    """What a method has to say of its scores besides their values.

    Attributes:
        values: by key, for the scores' own metadata; what JSON can hold.
        residual: how far a solver stopped from its solution; over several blocks of queries the largest is kept.
        kernel_weights: ``[N]`` over all training examples, where scores are a kernel times a weight of each example.
    """

    values: Mapping[str, JsonValue] = field(default_factory=dict)
    residual: float | None = None
    kernel_weights: Tensor | None = None

    def merged(self, later: Metadata) -> Metadata:
        """Together with what was said after it, which replaces what it repeats."""
        residuals = [said.residual for said in (later, self) if said.residual is not None]
        return Metadata(
            {**self.values, **later.values},
            max(residuals, default=None),
            self.kernel_weights if later.kernel_weights is None else later.kernel_weights,
        )

    def to_json(self) -> dict[str, JsonValue]:
        """What goes into the scores' metadata; the weights are a tensor of their own."""
        return {**self.values} if self.residual is None else {**self.values, "residual": self.residual}


def _layers_of(sink: ScoreSink) -> LayerSink | None:
    """The sink as one that keeps the layers' parts; ``None`` if it does not."""
    return sink if isinstance(sink, LayerSink) and sink.layers is not None else None


Term = Contraction | DirectScores
