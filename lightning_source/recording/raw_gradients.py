"""Gradients of parameters that carry hooks of the user's, as autograd computes them before those hooks change them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class RawGradients:
    """Adds up what backward computes for parameters with hooks (``Tensor.register_hook``, post-accumulation hooks).

    ``.grad`` of such a parameter holds what its hooks made of the gradient, so the factor between the two cannot be
    read off ``.grad`` alone. Costs one more tensor for each parameter with hooks, and nothing for the others.

    Args:
        parameters: by name; ``None`` for one that is not trained at present.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter | None]) -> None:
        self._sums: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        for name, parameter in parameters.items():
            if parameter is not None and parameter.requires_grad and _has_hooks(parameter):
                self._handles.append(_first_hook(parameter, partial(self._on_gradient, name, parameter)))

    @property
    def any(self) -> bool:
        """Whether some parameter has hooks."""
        return bool(self._handles)

    def detach(self) -> None:
        """Leave the parameters as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._sums = [], {}

    @torch.no_grad()
    def _on_gradient(self, name: str, parameter: nn.Parameter, gradient: Tensor) -> None:
        earlier = self._sums.get(name)
        zeroed = parameter.grad is None or not parameter.grad.any()  # since the last step
        self._sums[name] = gradient.clone() if earlier is None or zeroed else earlier + gradient

    def in_place_of(self, names: Sequence[str], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients, those of parameters with hooks as they were before their hooks.

        Args:
            names: of the parameters.
            gradients: their ``.grad``.
        """
        if not self._sums:
            return list(gradients)
        return [
            self._sums.get(name, gradient) if gradient is not None else None
            for name, gradient in zip(names, gradients, strict=True)
        ]


def _has_hooks(parameter: nn.Parameter) -> bool:
    # Torch types neither; a parameter that never had a hook has no such attribute or `None`.
    return any(getattr(parameter, name, None) for name in ("_backward_hooks", "_post_accumulate_grad_hooks"))


def _first_hook(parameter: nn.Parameter, hook: partial[None]) -> RemovableHandle:
    """Registers a hook that is called before all that are there."""
    handle = parameter.register_hook(hook)
    hooks = parameter._backward_hooks  # called in the order of insertion, whatever `move_to_end` says
    assert hooks is not None
    others = [(key, value) for key, value in hooks.items() if key != handle.id]
    for key, _ in others:
        del hooks[key]
    hooks.update(others)
    return handle
