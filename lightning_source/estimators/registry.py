"""The methods by name: the one way for an estimator to enter, and what it declares of itself there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from lightning_source._lightning import MisconfigurationException
from lightning_source.estimators.query import Query
from lightning_source.estimators.terms import Metadata, Term

Options = Mapping[str, Any]  # of a method, by name
EstimatorFunction = Callable[..., Iterator[Term | Metadata]]  # (query, **options)

CHANGE = "change of the measurement on removing the example"


@dataclass(frozen=True)
class Estimator:
    """A method and what it declares.

    Attributes:
        name: what ``method=`` takes.
        function: yields the terms of the scores of a query, and metadata where there is any, given its options.
        unit: of its scores.
        floats_per_parameter: how many numbers it holds at once for each query and attributed parameter, given its
            options.
        segments: whether each of its terms belongs to a segment of training.
        layers: whether each of its terms is a sum over layers.
    """

    name: str
    function: EstimatorFunction
    unit: str
    floats_per_parameter: Callable[[Options], float]
    segments: bool
    layers: bool

    def __call__(self, query: Query, **options: object) -> Iterator[Term | Metadata]:
        """What the method yields for a query."""
        return self.function(query, **options)

    @property
    def options(self) -> list[str]:
        """The names of the options that it takes."""
        parameters = inspect.signature(self.function).parameters.values()
        return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]

    def check_options(self, options: Options) -> None:
        """Refuse options that the method does not take.

        Raises:
            MisconfigurationException: there are some.
        """
        allowed = self.options
        if wrong := sorted(options.keys() - set(allowed)):
            raise MisconfigurationException(
                f'`method="{self.name}"` takes no option {", ".join(f"`{name}`" for name in wrong)}. HINT: its options'
                f" are {', '.join(f'`{name}`' for name in allowed) or 'none'}."
            )

    def require_segments(self) -> None:
        """Refuse to tell segments' shares where the method's terms belong to none.

        Raises:
            MisconfigurationException: they do.
        """
        if not self.segments:
            others = [estimator.name for estimator in _ESTIMATORS.values() if estimator.segments]
            raise self._without_shares("per_segment", "segments of training", others)

    def require_layers(self) -> None:
        """Refuse to tell layers' shares where the method's scores are no sums over layers.

        Raises:
            MisconfigurationException: they are not.
        """
        if not self.layers:
            others = [estimator.name for estimator in _ESTIMATORS.values() if estimator.layers]
            raise self._without_shares("per_layer", "layers", others)

    def _without_shares(self, argument: str, parts: str, others: Sequence[str]) -> MisconfigurationException:
        listed = ", ".join(f'"{name}"' for name in others)
        return MisconfigurationException(
            f'`{argument}=True`: the scores of `method="{self.name}"` are not made of shares of the {parts}.'
            f" HINT: leave `{argument}` out, or ask one of {listed}."
        )


_ESTIMATORS: dict[str, Estimator] = {}


def register_estimator(
    name: str,
    *,
    unit: str = CHANGE,
    floats_per_parameter: float | Callable[[Options], float] = 3,
    segments: bool = False,
    layers: bool = True,
) -> Callable[[EstimatorFunction], EstimatorFunction]:
    """Decorator: the function ``(query, **options)`` yields the terms of ``method=name``.

    Args:
        name: the method's name.
        unit: of its scores.
        floats_per_parameter: how many numbers it holds at once for each query and attributed parameter, or a function
            of its options that says so; the default is for gradients, responses and one temporary.
        segments: whether each of its terms belongs to a segment of training, which ``per_segment=True`` asks for.
        layers: whether each of its terms is a sum over layers, which ``per_layer=True`` asks for: so is every
            :class:`~lightning_source.estimators.Contraction`, and no
            :class:`~lightning_source.estimators.DirectScores`.
    """

    def enter(function: EstimatorFunction) -> EstimatorFunction:
        floats = floats_per_parameter if callable(floats_per_parameter) else lambda options: floats_per_parameter
        _ESTIMATORS[name] = Estimator(name, function, unit, floats, segments, layers)
        return function

    return enter


def estimator_for(method: str, options: Options) -> Estimator:
    """The estimator of a method, its options checked.

    Raises:
        MisconfigurationException: no such method, or an option that it does not take.
    """
    if method not in _ESTIMATORS:
        known = ", ".join(f'"{name}"' for name in _ESTIMATORS)
        raise MisconfigurationException(f'`method="{method}"` is not known. HINT: one of {known}.')
    estimator = _ESTIMATORS[method]
    estimator.check_options(options)
    return estimator


def methods() -> tuple[str, ...]:
    """What ``method=`` takes by now."""
    return tuple(_ESTIMATORS)


def option_types() -> dict[str, Any]:
    """The options of all methods by name, each with its type; of several methods' types, their union."""
    types: dict[str, Any] = {}
    for estimator in _ESTIMATORS.values():
        hints = get_type_hints(estimator.function)
        for name in estimator.options:
            types[name] = types[name] | hints[name] if name in types else hints[name]
    return types


def unit_of(method: str) -> str:
    """The unit of a method's scores."""
    return estimator_for(method, {}).unit


def floats_per_parameter_of(method: str, options: Options) -> float:
    """How many numbers a method holds at once for each query and attributed parameter."""
    return estimator_for(method, options).floats_per_parameter(options)
