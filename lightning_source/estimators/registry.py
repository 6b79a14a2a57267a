"""What an estimator is: how a query becomes vectors to contract with the examples' gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_source.capture.data import Examples, GivenBatches
from lightning_source.capture.objective import Measurement
from lightning_source.curvature.ekfac import Basis
from lightning_source.passes.gauss_newton import Layout
from lightning_source.passes.workspace import State
from lightning_source.runs.run import Run


@dataclass(frozen=True)
class Query:
    """What is asked: examples and a measurement of each."""

    run: Run
    examples: Examples | GivenBatches
    measurement: str | Measurement
    # What the columns of an embedding's gradients stand for, by block: the tokens that the queries use.
    tokens: dict[str, Tensor] = field(default_factory=dict)
    # What the method has to say of these scores besides their values; goes into their metadata.
    extra_metadata: dict[str, Any] = field(default_factory=dict)

    def gradients(self, state: State, bases: Mapping[str, Basis] | None = None) -> dict[str, Tensor]:
        """Gradients of the measurement at some parameters, ``[Q, P, O, I]`` by block; in parameter space by default."""
        found, tokens = self.run.query_workspace.query_gradients(state, self.examples, self.measurement, bases)
        self.tokens.update(tokens)
        return found

    def flat_gradients(self, state: State, layout: Layout) -> Tensor:
        """The same over all blocks at once, ``[Q, D]``: columns that the queries leave at 0 are there as well."""
        found = self.gradients(state)
        flat = layout.flat(found, self.tokens)
        self.tokens.clear()
        return flat

    def columns(self, name: str, values: Tensor) -> Tensor:
        """A block's ``[P, O, I]`` (eigenvalues, a preconditioner) for the columns that its gradients have."""
        return values[..., self.tokens[name]] if name in self.tokens else values


@dataclass(frozen=True)
class Contraction:
    """One term of a score: ``weight · ⟨vectors[q], g(z_n)⟩`` with the examples' gradients at ``state``."""

    state: Callable[[], State]
    vectors: Mapping[str, Tensor]
    weight: float
    bases: Mapping[str, Basis] | None = None  # the eigenbases that vectors are written in
    segment: int = 0
    normalize: bool = False  # divide by the norm of the example's gradient


@dataclass(frozen=True)
class DirectScores:
    """One term of a score that is no contraction: a function of the examples and ids (``None``: all), ``[Q, N]``."""

    values: Callable[[Examples, Tensor | None], Tensor]
    segment: int = 0


Estimator = Callable[..., Iterator[Contraction | DirectScores]]
_ESTIMATORS: dict[str, Estimator] = {}
_FLOATS_PER_PARAMETER: dict[str, Callable[[Mapping[str, Any]], float]] = {}

CHANGE = "change of the measurement on removing the example"
# The unit of the methods whose scores are not changes of the measurement.
_UNITS: dict[str, str] = {}


def register_estimator(
    name: str, *, unit: str = CHANGE, floats_per_parameter: Callable[[Mapping[str, Any]], float] = lambda options: 3
) -> Callable[[Estimator], Estimator]:
    """Decorator: the function ``(query, **options)`` yields the terms of ``method=name``.

    Args:
        name: the method's name.
        unit: of its scores.
        floats_per_parameter: how many numbers it holds at once for each query and attributed parameter, given its
            options.
    """

    def enter(estimator: Estimator) -> Estimator:
        _ESTIMATORS[name] = estimator
        _UNITS[name] = unit
        _FLOATS_PER_PARAMETER[name] = floats_per_parameter
        return estimator

    return enter


def unit_of(method: str) -> str:
    """The unit of a method's scores."""
    return _UNITS[method]


def floats_per_parameter_of(method: str, options: Mapping[str, Any]) -> float:
    """How many numbers a method holds at once for each query and attributed parameter."""
    return _FLOATS_PER_PARAMETER[method](options)


def estimator_for(method: str, options: Mapping[str, Any]) -> Estimator:
    """The estimator of a method, its options checked.

    Raises:
        MisconfigurationException: no such method, or an option that it does not take.
    """
    if method not in _ESTIMATORS:
        known = ", ".join(f'"{name}"' for name in _ESTIMATORS)
        raise MisconfigurationException(f'`method="{method}"` is not known. HINT: one of {known}.')
    estimator = _ESTIMATORS[method]
    allowed = [p.name for p in inspect.signature(estimator).parameters.values() if p.kind is p.KEYWORD_ONLY]
    wrong = sorted(options.keys() - set(allowed))
    if wrong:
        raise MisconfigurationException(
            f'`method="{method}"` takes no option {", ".join(f"`{w}`" for w in wrong)}. HINT: its options are'
            f" {', '.join(f'`{a}`' for a in allowed) or 'none'}."
        )
    return estimator
