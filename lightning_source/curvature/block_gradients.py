"""EK-FAC statistics of one block as sums that add up, and the eigenbases made of them. Pure tensors.

The one internal format: activations ``[P, B, T, I]`` and output gradients ``[P, B, T, O]``, where ``P`` counts equally
shaped independent parts (a grouped convolution's groups; 1 elsewhere), ``B`` examples, ``T`` positions (tokens,
pixels; 1 for a plain layer), ``I`` inputs (with a column of ones where the bias belongs to the block) and ``O``
outputs. An example's gradient is ``Σ_t g_t a_tᵀ``, ``[P, O, I]``.

An embedding's activations are one-hot rows, kept as the indices of their ones; its examples' gradients are then rows at
the tokens that they use (:class:`Rows`), and no tensor of examples by vocabulary exists.

Source: George et al. 2018 (EK-FAC); Bae et al. 2024, App. D; method §4 for the scale, which the caller puts into the
output gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# One chunk of per-example matrices (positions > 1) may hold this many floats: 64 MiB in float32.
CHUNK_FLOATS = 1 << 24


class BlockGradients(NamedTuple):
    """What one pass saw at one block."""

    activations: Tensor  # [P, B, T, I]; one-hot rows over a vocabulary: the ones' indices, int64 [1, B, T]
    gradients: Tensor  # [P, B, T, O]
    vocabulary: int | None = None  # I, where activations are indices
    own: int | None = None  # covariances are those of the first ``own`` positions; all by default

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """``(P, B, T, O, I)``."""
        parts, examples, positions = self.activations.shape[:3]
        return parts, examples, positions, self.gradients.shape[-1], self.vocabulary or self.activations.shape[-1]

    def select(self, examples: slice) -> BlockGradients:
        """The same capture for some of the examples."""
        return self._replace(activations=self.activations[:, examples], gradients=self.gradients[:, examples])

    def per_example(self) -> Tensor:
        """Per-example gradients ``[P, B, O, I]``; materialised, so call it on chunks.

        Example:
            >>> activations = torch.tensor([[[[1.0, 2.0]]]])  # 1 part, 1 example, 1 position, 2 inputs
            >>> gradients = torch.tensor([[[[3.0]]]])  # and 1 output
            >>> BlockGradients(activations, gradients).per_example().squeeze()  # g aᵀ
            tensor([3., 6.])
        """
        if self.vocabulary is not None:
            _, examples, _, outputs, _ = self.shape
            rows = self.rows()
            dense = self.gradients.new_zeros(1, examples, outputs, self.vocabulary)
            dense[0, rows.examples, :, rows.tokens] = rows.values
            return dense
        return self.gradients.mT @ self.activations

    def rows(self) -> Rows:
        """The gradients of an indexed capture; an example's positions with one token are summed."""
        _, examples, _, outputs, vocabulary = self.shape
        offsets = vocabulary * torch.arange(examples, device=self.activations.device)
        keys, where = torch.unique(self.activations[0] + offsets[:, None], return_inverse=True)
        values = self.gradients.new_zeros(len(keys), outputs)
        values.index_add_(0, where.flatten(), self.gradients.reshape(-1, outputs))
        return Rows(keys // vocabulary, keys % vocabulary, values)

    def squares(self) -> Tensor:
        """``Σ_t |g_t|² |a_t|²`` of each example, ``[B]``: 0 only where its gradient is 0 position by position."""
        g = self.gradients.square().sum(-1)
        return (g if self.vocabulary is not None else g * self.activations.square().sum(-1)).sum((0, 2))


class Rows(NamedTuple):
    """An embedding's per-example gradients: one row for each example and token that it uses, in ascending order."""

    examples: Tensor  # [R]
    tokens: Tensor  # [R]
    values: Tensor  # [R, O]

    def at(self, columns: Tensor) -> tuple[Rows, Tensor]:
        """The rows whose token is in ``columns`` (ascending), and where it is there."""
        if not len(columns):
            return Rows(*(x[:0] for x in self)), self.tokens[:0]
        where = torch.searchsorted(columns, self.tokens).clamp_max(len(columns) - 1)
        kept = columns[where] == self.tokens
        return Rows(*(x[kept] for x in self)), where[kept]

    def products(self, other: Rows, examples: int) -> Tensor:
        """Inner products of each example's gradient with that of the same example in ``other``, ``[B]``."""
        size = 1 + max(int(x.tokens.max()) for x in (self, other))
        own, others = (x.examples * size + x.tokens for x in (self, other))
        where = torch.searchsorted(others, own).clamp_max(len(others) - 1)
        values = (self.values * other.values[where]).sum(1) * (others[where] == own)
        return values.new_zeros(examples).index_add_(0, self.examples, values)


def in_full_precision(captured: BlockGradients) -> BlockGradients:
    """In one dtype of at least float32: sides may differ under autocast, and half precision is not enough to go on."""
    if captured.vocabulary is not None:
        return captured._replace(gradients=captured.gradients.to(accumulator_dtype(captured.gradients)))
    dtype = torch.promote_types(accumulator_dtype(captured.activations), accumulator_dtype(captured.gradients))
    return captured._replace(activations=captured.activations.to(dtype), gradients=captured.gradients.to(dtype))


def join(pieces: Sequence[BlockGradients], dim: int) -> BlockGradients:
    """Captures of one block along examples (``dim`` 1) or positions (2)."""
    if len(pieces) == 1:
        return pieces[0]
    return pieces[0]._replace(
        activations=torch.cat([piece.activations for piece in pieces], dim),
        gradients=torch.cat([piece.gradients for piece in pieces], dim),
    )


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """float64 stays; everything else accumulates in float32, since sums in half precision stall."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def chunks(captured: BlockGradients) -> list[BlockGradients]:
    """The capture split along its examples so that the per-example matrices of one chunk fit ``CHUNK_FLOATS``."""
    parts, examples, _, outputs, inputs = captured.shape
    step = max(1, CHUNK_FLOATS // (parts * outputs * inputs))
    return [captured.select(slice(start, start + step)) for start in range(0, examples, step)]


def squared_norms(captured: BlockGradients) -> Tensor:
    """Squared norm of each example's gradient, ``[B]``, without its matrix where there is one position."""
    if captured.vocabulary is not None:
        rows = captured.rows()
        return rows.values.new_zeros(captured.shape[1]).index_add_(0, rows.examples, rows.values.square().sum(1))
    if captured.shape[2] == 1:
        a, g = (x.squeeze(2).square().sum(-1) for x in captured[:2])
        return (a * g).sum(0)
    return torch.cat([chunk.per_example().square().sum((0, 2, 3)) for chunk in chunks(captured)])


def gram(captured: BlockGradients) -> Tensor:
    """Inner products of all examples' gradients with each other, ``[B, B]``."""
    if captured.vocabulary is not None:
        rows = captured.rows()
        tokens, where = torch.unique(rows.tokens, return_inverse=True)
        dense = rows.values.new_zeros(captured.shape[1], len(tokens), rows.values.shape[1])
        dense[rows.examples, where] = rows.values
        flat = dense.flatten(1)
        return flat @ flat.T
    if captured.shape[2] == 1:
        a, g = (x.squeeze(2) for x in captured[:2])
        return ((a @ a.mT) * (g @ g.mT)).sum(0)
    return torch.cat([contract(captured, chunk.per_example().transpose(0, 1)) for chunk in chunks(captured)])


def contract(captured: BlockGradients, vectors: Tensor, columns: Tensor | None = None) -> Tensor:
    """Inner products ``[Q, B]`` of ``vectors [Q, P, O, I]`` with the examples' gradients in the same basis.

    With one position the smaller side is contracted first, so no per-example matrix exists; otherwise the matrices
    are formed in chunks and meet all queries in one product.

    Args:
        captured: the examples.
        vectors: the queries' matrices.
        columns: for an indexed capture, the tokens that the columns of ``vectors`` stand for, in ascending order (the
            vectors are 0 elsewhere); by default the whole vocabulary.
    """
    parts, _, positions, outputs, inputs = captured.shape
    queries = vectors.shape[0]
    if captured.vocabulary is not None:
        return _contract_rows(captured, vectors[:, 0], columns)
    if positions > 1:
        flat = vectors.reshape(queries, -1)
        return torch.cat(
            [flat @ chunk.per_example().transpose(0, 1).reshape(-1, flat.shape[1]).T for chunk in chunks(captured)], 1
        )
    a, g = (x.squeeze(2) for x in captured[:2])  # [P, B, I], [P, B, O]
    total = vectors.new_zeros(queries, a.shape[1])
    for part in range(parts):
        matrices = vectors[:, part]  # [Q, O, I]
        if outputs <= inputs:
            reduced = (matrices.reshape(-1, inputs) @ a[part].T).view(queries, outputs, -1)
            total += reduced.mul_(g[part].T).sum(1)
        else:
            total += (g[part] @ matrices).mul_(a[part]).sum(2)
    return total


# Up to this many columns for each position, an embedding's gradients are laid out as matrices of columns: one product
# with zeros in it is faster than a gather.
DENSE_COLUMNS = 64


def _contract_rows(captured: BlockGradients, vectors: Tensor, columns: Tensor | None) -> Tensor:
    """:func:`contract` for one-hot activations, ``vectors [Q, O, C]``."""
    count = vectors.shape[2]
    if count <= DENSE_COLUMNS * captured.shape[2]:
        flat = vectors.mT.reshape(len(vectors), -1)  # [Q, C · O]
        step = max(1, CHUNK_FLOATS // max(1, flat.shape[1]))
        pieces = (captured.select(slice(i, i + step)) for i in range(0, captured.shape[1], step))
        return torch.cat([flat @ _in_columns(piece, columns, count).T for piece in pieces], 1)
    rows = captured.rows()
    rows, where = (rows, rows.tokens) if columns is None else rows.at(columns)
    total = vectors.new_zeros(len(vectors), captured.shape[1])
    step = max(1, CHUNK_FLOATS // (vectors.shape[0] * vectors.shape[1]))
    for start in range(0, len(where), step):
        piece = slice(start, start + step)
        products = (vectors[:, :, where[piece]] * rows.values[piece].mT).sum(1)
        total.index_add_(1, rows.examples[piece], products)
    return total


def _in_columns(captured: BlockGradients, columns: Tensor | None, count: int) -> Tensor:
    """An embedding's per-example gradients at some tokens, ``[B, C · O]``."""
    tokens, gradients = captured.activations[0], captured.gradients[0]  # [B, T], [B, T, O]
    examples, outputs = len(tokens), gradients.shape[-1]
    where = tokens if columns is None else torch.searchsorted(columns, tokens).clamp_max(max(0, count - 1))
    rows = where + count * torch.arange(examples, device=where.device).unsqueeze(1)
    if columns is not None and count:
        gradients = gradients * (columns[where] == tokens).unsqueeze(-1)
    dense = gradients.new_zeros(examples * count, outputs)
    if count:
        dense.index_add_(0, rows.flatten(), gradients.reshape(-1, outputs))
    return dense.view(examples, -1)


def contract_diagonal(captured: BlockGradients, query: BlockGradients, weights: Tensor) -> Tensor:
    """``Σ_oi weights ∘ (query gradient)_b ∘ (gradient)_b`` for every example ``b``, ``[B]``; ``weights [P, O, I]``."""
    if captured.vocabulary is not None:
        rows = query.rows()
        scaled = rows._replace(values=rows.values * weights[0][:, rows.tokens].mT)
        return captured.rows().products(scaled, captured.shape[1])
    if captured.shape[2] == query.shape[2] == 1:
        a, g = (x.squeeze(2) * y.squeeze(2) for x, y in zip(captured[:2], query[:2], strict=True))
        return ((g @ weights) * a).sum((0, 2))
    return torch.cat(
        [
            (x.per_example() * y.per_example() * weights.unsqueeze(1)).sum((0, 2, 3))
            for x, y in zip(chunks(captured), chunks(query), strict=True)
        ]
    )


def contract_pairs(captured: BlockGradients, vectors: Tensor) -> Tensor:
    """``⟨vectors[b], gradient of example b⟩``, ``[B]``, for ``vectors [B, P, O, I]`` in the same basis."""
    if captured.shape[2] == 1:
        a, g = (x.squeeze(2).transpose(0, 1).unsqueeze(-2) for x in captured[:2])  # [B, P, 1, I], [B, P, 1, O]
        return ((g @ vectors) * a).sum((1, 2, 3))
    pieces, start = [], 0
    for chunk in chunks(captured):
        stop = start + chunk.shape[1]
        pieces.append((chunk.per_example().transpose(0, 1) * vectors[start:stop]).sum((1, 2, 3)))
        start = stop
    return torch.cat(pieces)
