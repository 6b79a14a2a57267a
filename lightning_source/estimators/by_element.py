"""One pair's score by the elements of both losses: which token of an example made which token of a query likely."""

from __future__ import annotations

from torch import Tensor

from lightning_source._lightning import MisconfigurationException
from lightning_source.capture.data import Examples, GivenBatches, to_module
from lightning_source.capture.objective import Measurement
from lightning_source.estimators.query import Query
from lightning_source.estimators.registry import Estimator, Options
from lightning_source.estimators.sinks import MatrixSink
from lightning_source.estimators.terms import Contraction, Metadata
from lightning_source.passes.elements import Elements, require_elements, single
from lightning_source.passes.workspace import State, Workspace
from lightning_source.runs.run import Run


def element_scores(
    run: Run,
    estimator: Estimator,
    options: Options,
    measurement: str | Measurement,
    query: tuple[Examples | GivenBatches, int],
    example: int,
    at_once: int,
) -> Tensor:
    """The parts of one score, which are that of each element of the query and each of the example, ``[Eq, En]``.

    Args:
        run: a calibrated run.
        estimator: a method whose scores are inner products with the example's gradient.
        options: its own.
        measurement: of the query.
        query: the queries and the row of the one that is asked.
        example: the training example, as passes number them.
        at_once: elements of the query whose vectors may be held at once.

    Raises:
        MisconfigurationException: the measurement or a loss is not made of elements, or the scores of no products.
    """
    if callable(measurement):
        raise MisconfigurationException('a callable measurement has no elements. HINT: `measurement="loss"`.')
    asked = _elements_of(run.query_workspace, run.final(), single(*query), measurement)
    trained = _elements_of(run.workspace, run.final_of_stage(), single(run.data, example), "loss")
    sink = MatrixSink(asked.count, trained.count)
    for first in range(0, asked.count, at_once):
        part = asked.part(first, at_once)
        for term in estimator(Query(run, part, measurement), **options):
            if isinstance(term, Metadata):
                continue
            if not isinstance(term, Contraction) or term.normalize:
                raise MisconfigurationException(
                    f'the scores of `method="{estimator.name}"` are not sums over the elements of a loss. HINT:'
                    ' `method="source"`, `"influence"`, `"tracin"` or `"grad-dot"`.'
                )
            term.compute(run.workspace, trained, None, sink, slice(first, first + len(part)))
    return sink.values


def _elements_of(workspace: Workspace, state: State, example: GivenBatches, measurement: str) -> Elements:
    """The example's elements, counted by a call of the step."""
    spec = workspace.spec
    assert spec is not None
    with workspace.at(state):
        losses = workspace.losses(to_module(example.given[0], workspace.module, workspace.hooks), 1)
        require_elements(spec, losses)
        return Elements(example.given, count=losses.measured_elements(spec, measurement).shape[1])
