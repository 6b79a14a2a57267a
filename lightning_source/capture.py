"""One forward of the user's code and one backward to the layers' outputs: what each block saw, per example.

A forward hook keeps a layer's input and the graph edge of its output. ``torch.autograd.grad`` to those edges computes
no weight gradient, touches no ``.grad`` and no ``requires_grad``, and survives in-place activations behind the layer,
because the edge names the output before them. A layer called several times in one forward (a shared module) adds
positions: the example's gradient is the sum over its calls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_source.factors import Captured
from lightning_source.layers import Block, clean_name


class Recording:
    """The layer calls of one forward; :meth:`captured` runs the backward."""

    def __init__(self, module: nn.Module, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        # A wrapper and what it wraps share a clean name; the inner one comes later in named_modules() and is kept.
        by_name = {clean_name(name): child for name, child in module.named_modules()}
        self._modules = {block.module: by_name[block.module] for block in blocks}
        self._calls: dict[str, list[tuple[Tensor, GradientEdge]]] = defaultdict(list)
        self.without_gradient: set[str] = set()  # layers that ran with gradients off, at least once
        self.half: set[str] = set()  # layers whose outputs are in half precision

    @contextmanager
    def listening(self) -> Iterator[Recording]:
        """Record every call of a tracked layer inside the ``with``; the hooks are gone afterwards."""
        self._calls.clear()
        handles = [
            layer.register_forward_hook(self._hook(name), with_kwargs=True) for name, layer in self._modules.items()
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def remember(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            if output.dtype in (torch.float16, torch.bfloat16):
                self.half.add(name)
            if not output.requires_grad:
                self.without_gradient.add(name)
            else:
                inputs = args[0] if args else kwargs["input"]
                self._calls[name].append((inputs.detach(), get_gradient_edge(output)))

        return remember

    def captured(self, target: Tensor, examples: int, retain_graph: bool = False) -> dict[str, Captured]:
        """Backward from a scalar to the layers' outputs.

        Args:
            target: a scalar that is a sum over examples.
            examples: number of examples in the batch.
            retain_graph: keep the graph for another call.

        Returns:
            Blocks by name; a block whose layer did not run, or does not reach ``target``, is absent.

        Raises:
            ValueError: a layer's input is not laid out by example; the message begins with the layer's name.
        """
        edges = [edge for calls in self._calls.values() for _, edge in calls]
        if not edges or not target.requires_grad:
            return {}
        gradients = iter(torch.autograd.grad(target, edges, retain_graph=retain_graph, allow_unused=True))
        used = {
            name: [(inputs, g) for (inputs, _), g in zip(calls, gradients, strict=False) if g is not None]
            for name, calls in self._calls.items()
        }
        result = {}
        for block in self.blocks:
            calls = used.get(block.module)
            if calls:
                layer = self._modules[block.module]
                try:
                    pieces = [block.capture(layer, inputs, g, examples) for inputs, g in calls]
                except ValueError as error:
                    raise ValueError(f"`{block.module}`: {error}") from None
                result[block.name] = (
                    pieces[0]
                    if len(pieces) == 1
                    else Captured(*(torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True)))
                )
        return result
