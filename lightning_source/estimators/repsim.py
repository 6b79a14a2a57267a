"""Representation similarity: the cosine of what a layer gets to see (Hanawa et al. 2021; Yeh et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_source._lightning import MisconfigurationException
from lightning_source.capture.data import Examples, GivenBatches, to_module
from lightning_source.estimators.query import Query
from lightning_source.estimators.registry import register_estimator
from lightning_source.estimators.terms import DirectScores, Metadata
from lightning_source.names import named_modules
from lightning_source.passes.finite import shorten
from lightning_source.passes.workspace import State, Workspace
from lightning_source.scores import HIGHER_IS_BETTER


@register_estimator("repsim", unit="cosine of representations", layers=False)
def repsim(query: Query, *, module: str | None = None) -> Iterator[DirectScores | Metadata]:
    """Cosine of the query's and the example's input of one module at the final model, in [-1, 1].

    No change of the measurement: labels and losses play no part. Like examples are taken to help, so the cosine is
    positive for a loss and negative for a margin or log-probability. Costs a forward over queries and examples; holds
    only the representations. Positions of an example (tokens, pixels) are averaged.

    Args:
        query: what is asked.
        module: name of the module whose input is the representation; by default the last attributed linear layer.

    Raises:
        MisconfigurationException: no such module, or it was not called with one row for each example.
    """
    run = query.run
    layer = _last_linear(run.workspace) if module is None else module
    sign = -1.0 if query.measurement in HIGHER_IS_BETTER else 1.0
    state = run.final_of_stage()
    asked = _representations(run.query_workspace, run.final(), query.examples, None, layer)
    yield Metadata({"module": layer})
    yield DirectScores(lambda data, ids: sign * asked @ _representations(run.workspace, state, data, ids, layer).T)


def _last_linear(workspace: Workspace) -> str:
    linear = [block.module for block in workspace.blocks if block.layer_form.representation]
    if not linear:
        raise MisconfigurationException(
            'no linear layer is attributed whose input `method="repsim"` could compare. HINT: pass `module=` the'
            " name of a module."
        )
    return linear[-1]


def _representations(
    workspace: Workspace, state: State, data: Examples | GivenBatches, ids: Tensor | None, name: str
) -> Tensor:
    """Unit vectors ``[examples, features]`` on the CPU."""
    modules = named_modules(workspace.module)
    if name not in modules:
        raise MisconfigurationException(f"`module={name!r}` is no module of `{type(workspace.module).__name__}`.")
    first = {block.module: block.layout for block in workspace.blocks}.get(name, 0)
    inputs: list[Tensor | None] = []  # of each call of the module

    def keep(layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        inputs.append(next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None))

    rows = []
    with workspace.at(state):
        handle = modules[name].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            for index, batch in data.batches(ids):
                inputs.clear()
                workspace.losses(to_module(batch, workspace.module, workspace.hooks), len(index))
                features = inputs[-1] if inputs else None  # of a module that is called several times, the last
                if features is None or features.dim() <= first or features.shape[first] != len(index):
                    raise MisconfigurationException(
                        f"`{name}` was not called with a tensor of one row for each example. HINT: pass `module=` the"
                        " name of a module that is."
                    )
                features = features.detach().float().movedim(first, 0)
                features = features.flatten(1, -2).mean(1) if features.dim() > 2 else features.flatten(1)
                if not (finite := features.isfinite().all(1).cpu()).all():
                    raise FloatingPointError(
                        f"non-finite input of `{name}` on examples {shorten(data.named(index)[~finite])}"
                    )
                rows.append(F.normalize(features, dim=1).cpu())
        finally:
            handle.remove()
    return torch.cat(rows)
