"""How a model is recognised as the one that a run was recorded of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_source.names import named_parameters


def fingerprint(module: Any) -> dict[str, list[int]]:
    """Names and shapes of a module's parameters."""
    return {name: list(p.shape) for name, p in named_parameters(module).items()}


def check_module(module: Any, recorded: Mapping[str, Any]) -> None:
    """Refuse a model whose parameters are not those of the run.

    Raises:
        MisconfigurationException: names what is missing, added or of another shape.
    """
    own, run = fingerprint(module), recorded["parameters"]
    missing = sorted(run.keys() - own.keys())
    added = sorted(own.keys() - run.keys())
    shapes = [f"{n} {own[n]} for {run[n]}" for n in sorted(run.keys() & own.keys()) if own[n] != run[n]]
    problems = [
        f"{what} {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
        for what, names in (("missing", missing), ("not in the run:", added), ("of another shape:", shapes))
        if names
    ]
    if problems:
        raise MisconfigurationException(
            f"`{type(module).__name__}` does not match the run of `{recorded['class']}`: {'; '.join(problems)}."
        )
