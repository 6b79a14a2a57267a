"""Exact products of the Gauss-Newton matrix with vectors, over all attributed parameters jointly and without a matrix.

``H = (1/N) Σ_m Σ_{j∈m} J_jᵀ M_j J_j`` with ``J_j`` the Jacobian of what the network puts into the loss and ``M_j`` that
element's Fisher information there, at the scale of the loss as trained (method §4). For every loss that is read in
closed form this is the Gauss-Newton matrix itself: nothing is sampled, and blocks are not taken apart. Where the loss
is known by sampling, element by element or as a whole only, ``H`` is the mean outer product of the gradients that the
factors are made of, with fixed draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_source.capture.data import Examples, to_module
from lightning_source.capture.layer_gradients import GradientCapture
from lightning_source.capture.objective import Losses
from lightning_source.curvature.batched_autograd import batched_gradients
from lightning_source.curvature.block_gradients import BlockGradients, chunks, contract
from lightning_source.layers import Block
from lightning_source.names import named_parameters
from lightning_source.passes.finite import shorten
from lightning_source.passes.workspace import State, Workspace

# Vectors that run through a batch's graph at once: each holds what one backward holds.
VECTORS_AT_ONCE = 32


class Layout:
    """Vectors over all blocks: ``[Q, D]``, the blocks' ``[Q, P, O, I]`` flattened one after another.

    Args:
        blocks: the blocks, in this order.
        shapes: the shape of each of their parameters by clean name.
    """

    def __init__(self, blocks: Sequence[Block], shapes: Mapping[str, torch.Size]) -> None:
        self.blocks = list(blocks)
        self.parameters = [name for block in blocks for name in block.parameters]
        self.shapes = [shapes[name] for name in self.parameters]
        self.sizes = [shape.numel() for shape in self.shapes]
        # A block's layout is the same numbers in another order, so the order of numbered ones tells it.
        numbers = torch.arange(sum(self.sizes)).split(self.sizes)
        numbered = {
            name: values.view(shape) for name, values, shape in zip(self.parameters, numbers, self.shapes, strict=True)
        }
        pieces = [block.matrix(numbered).flatten() for block in blocks]
        self.widths = [len(piece) for piece in pieces]
        self._order = torch.cat(pieces)  # which parameter scalar is at each place
        self._place = self._order.argsort()

    @property
    def width(self) -> int:
        """``D``, the number of attributed scalars."""
        return len(self._order)

    def flat(self, matrices: Mapping[str, Tensor], tokens: Mapping[str, Tensor] | None = None) -> Tensor:
        """``[Q, P, O, I]`` by block as ``[Q, D]``; a block that is absent is 0.

        Args:
            matrices: the blocks' matrices.
            tokens: what the columns of an embedding's matrices stand for; the other columns are 0.
        """
        like = next(iter(matrices.values()))
        flat = like.new_zeros(len(like), self.width)
        for block, piece in zip(self.blocks, flat.split(self.widths, 1), strict=True):
            if block.name in matrices:
                whole = piece.view(-1, *block.shape)
                if tokens and block.name in tokens:
                    whole[..., tokens[block.name]] = matrices[block.name]
                else:
                    whole.copy_(matrices[block.name])
        return flat

    def by_block(self, flat: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`flat`; views."""
        pieces = flat.split(self.widths, 1)
        return {b.name: piece.view(-1, *b.shape) for b, piece in zip(self.blocks, pieces, strict=True)}

    def by_parameter(self, flat: Tensor) -> list[Tensor]:
        """``[Q, D]`` as the parameters' ``[Q, *shape]``."""
        pieces = flat[:, self._place.to(flat.device)].split(self.sizes, 1)
        return [piece.view(-1, *shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def of_parameters(self, values: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`by_parameter`."""
        return torch.cat([value.flatten(1) for value in values], 1)[:, self._order.to(values[0].device)]

    def each(self, values: Mapping[str, float], like: Tensor) -> Tensor:
        """One number for each block as ``[D]``."""
        return torch.cat(
            [like.new_full((width,), values[b.name]) for b, width in zip(self.blocks, self.widths, strict=True)]
        )


@dataclass
class GaussNewton:
    """``H`` of a model's training loss at one set of parameters.

    A product is a forward, two backwards that build graphs, and then for each vector about two backwards more; the
    graph of one batch is held, and for each of ``VECTORS_AT_ONCE`` vectors what one backward holds.

    Attributes:
        workspace: the model; its objective is calibrated.
        data: the training examples.
        state: loads the parameters.
        ids: the examples that ``H`` is averaged over; all by default.
        draws: label draws per example where ``H`` is known by sampling only.
    """

    workspace: Workspace
    data: Examples
    state: Callable[[], State]
    ids: Tensor | None = None
    draws: int = 1

    def __post_init__(self) -> None:
        self.layout = layout_of(self.workspace)
        # Which of the two ways is the loss's; known when a batch has been seen.
        self.kind: str | None = None

    def __len__(self) -> int:
        """The number of examples that it is averaged over."""
        return len(self.data) if self.ids is None else len(self.ids)

    def __call__(self, vectors: Tensor) -> Tensor:
        """``H`` times each of ``vectors [Q, D]``."""
        total = torch.zeros_like(vectors)
        with self.workspace.at(self.state()):
            for index, batch in self.data.batches(self.ids):
                total += len(index) / len(self) * self.on_batch(index, batch, vectors)
        return total

    @contextmanager
    def minibatches(self, size: int, count: int, seed: int) -> Iterator[Iterator[Callable[[Tensor], Tensor]]]:
        """``count`` products, each with the ``H`` of ``size`` distinct examples drawn anew.

        Batches that shared an epoch would lean on each other, and a series of their products on none of their means.
        """
        ids = torch.arange(len(self.data)) if self.ids is None else self.ids
        generator = torch.Generator().manual_seed(seed)
        size = min(size, len(ids))
        order = torch.stack([torch.randperm(len(ids), generator=generator)[:size] for _ in range(count)])
        batches = replace(self.data, batch_size=size)
        with self.workspace.at(self.state()):
            yield (
                lambda vectors, index=index, batch=batch: self.on_batch(index, batch, vectors)  # type: ignore[misc]
                for index, batch in batches.batches(ids[order.flatten()])
            )

    def on_batch(self, index: Tensor, batch: object, vectors: Tensor) -> Tensor:
        """The product with one batch's ``H``; call it where :meth:`Workspace.at` holds the parameters."""
        batch = to_module(batch, self.workspace.module, self.workspace.hooks)
        if self.kind is None:
            self.kind = self._kind_of(batch, len(index))
        product = self._by_outputs if self.kind == "gauss-newton" else self._by_gradients
        products = product(index, batch, vectors)
        if not torch.isfinite(products).all():
            raise FloatingPointError(f"non-finite Gauss-Newton product on examples {shorten(index)}")
        return products

    def _kind_of(self, batch: object, size: int) -> str:
        spec = self.workspace.spec
        assert spec is not None
        if spec.fisher == "empirical":
            return "empirical"
        calls = self.workspace.losses(batch, size).calls
        return "gauss-newton" if all(call.information is not None for call in calls) else "sampled"

    # ---------------------------------------------------------------- through the network's outputs

    def _by_outputs(self, index: Tensor, batch: object, vectors: Tensor) -> Tensor:
        # Attention's fused kernels have no derivative of their backward, nor have cuDNN's recurrent layers.
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            linear = _Linearized(self.workspace.losses(batch, len(index)), self._own(), self.workspace)
            products = [linear.product(piece, self.layout) for piece in vectors.split(VECTORS_AT_ONCE)]
        return torch.cat(products) / len(index)

    def _own(self) -> list[Tensor]:
        named = named_parameters(self.workspace.module)
        return [named[name] for name in self.layout.parameters]

    # ---------------------------------------------------------------- through gradients of single examples

    def _by_gradients(self, index: Tensor, batch: object, vectors: Tensor) -> Tensor:
        matrices = self.layout.by_block(vectors)
        draws = 1 if self.kind == "empirical" else self.draws
        total = torch.zeros_like(vectors)
        parts = self.layout.by_block(total)
        for draw in range(draws):
            # Draws belong to the batch, so that every product has the same matrix.
            target = self.workspace.sampled(draw)
            recording = GradientCapture(self.workspace.module, self.workspace.blocks)
            captured = recording.captured(target(batch, index, recording), len(index))
            products = sum(contract(gradients, matrices[name]) for name, gradients in captured.items())
            assert isinstance(products, Tensor)
            for name, gradients in captured.items():
                parts[name] += expand(gradients, products)
        return total / (len(index) * draws)


class _Linearized:
    """One batch's outputs around the present parameters: Jacobian products either way, for many vectors at once."""

    def __init__(self, losses: Losses, parameters: Sequence[Tensor], workspace: Workspace) -> None:
        assert workspace.spec is not None
        self.curvatures = losses.curvatures(workspace.spec)
        self.calls = losses.calls
        self.outputs = [o for call in self.calls for o in call.outputs if o.requires_grad]
        self.duals = [torch.zeros_like(o, requires_grad=True) for o in self.outputs]
        # Jᵀu is linear in u, so its derivative in the direction of v is J v.
        pulled = torch.autograd.grad(self.outputs, parameters, self.duals, create_graph=True, allow_unused=True)
        self.used = [i for i, g in enumerate(pulled) if g is not None and g.requires_grad]
        self.pulled = [g for g in pulled if g is not None and g.requires_grad]
        self.parameters = [parameters[i] for i in self.used]

    def product(self, vectors: Tensor, layout: Layout) -> Tensor:
        """``Σ_j J_jᵀ M_j J_j v``, ``[Q, D]``, summed over the batch."""
        values = layout.by_parameter(vectors)
        result = [torch.zeros_like(value) for value in values]
        directions = [values[i].to(g.dtype) for i, g in zip(self.used, self.pulled, strict=True)]
        tangents = iter(_batched_grad(self.pulled, self.duals, directions))
        cotangents = []
        for call, weights in zip(self.calls, self.curvatures, strict=True):
            assert call.information is not None
            moved = [next(tangents) if o.requires_grad else o.new_zeros(len(vectors), *o.shape) for o in call.outputs]
            curved = call.information(weights, moved)
            cotangents += [c.to(o.dtype) for c, o in zip(curved, call.outputs, strict=True) if o.requires_grad]
        for i, value in zip(self.used, _batched_grad(self.outputs, self.parameters, cotangents), strict=True):
            result[i] += value
        return layout.of_parameters(result)


def _batched_grad(outputs: Sequence[Tensor], inputs: Sequence[Tensor], directions: Sequence[Tensor]) -> list[Tensor]:
    """:func:`batched_gradients`, 0 where nothing depends on an input."""
    gradients = batched_gradients(outputs, inputs, directions)
    count = len(directions[0])
    return [x.new_zeros(count, *x.shape) if g is None else g for x, g in zip(inputs, gradients, strict=True)]


def expand(captured: BlockGradients, weights: Tensor) -> Tensor:
    """``Σ_b weights[q, b] · gradient_b``, ``[Q, P, O, I]``: the adjoint of :func:`contract`."""
    parts, _, positions, outputs, inputs = captured.shape
    queries = len(weights)
    if captured.vocabulary is not None:
        rows = captured.rows()
        total = rows.values.new_zeros(queries, 1, outputs, inputs)
        scaled = weights[:, rows.examples].unsqueeze(1) * rows.values.mT  # [Q, O, R]
        return total.index_add_(3, rows.tokens, scaled.unsqueeze(1))
    if positions == 1:
        a, g = (x.squeeze(2) for x in captured[:2])  # [P, B, I], [P, B, O]
        return (weights[:, None, None, :] * g.mT) @ a
    total, start = weights.new_zeros(queries, parts * outputs * inputs), 0
    for chunk in chunks(captured):
        stop = start + chunk.shape[1]
        total += weights[:, start:stop] @ chunk.per_example().transpose(0, 1).reshape(stop - start, -1)
        start = stop
    return total.view(queries, parts, outputs, inputs)


def layout_of(workspace: Workspace) -> Layout:
    """The layout of a workspace's blocks."""
    return Layout(workspace.blocks, {name: p.shape for name, p in named_parameters(workspace.module).items()})
