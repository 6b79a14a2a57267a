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
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# One chunk of per-example matrices (positions > 1) may hold this many floats: 64 MiB in float32.
CHUNK_FLOATS = 1 << 24


class Captured(NamedTuple):
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

    def select(self, examples: slice) -> Captured:
        """The same capture for some of the examples."""
        return self._replace(activations=self.activations[:, examples], gradients=self.gradients[:, examples])

    def per_example(self) -> Tensor:
        """Per-example gradients ``[P, B, O, I]``; materialised, so call it on chunks."""
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
        keys, where = (self.activations[0] + offsets[:, None]).unique(return_inverse=True)
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


def in_full_precision(captured: Captured) -> Captured:
    """In one dtype of at least float32: sides may differ under autocast, and half precision is not enough to go on."""
    if captured.vocabulary is not None:
        return captured._replace(gradients=captured.gradients.to(accumulator_dtype(captured.gradients)))
    dtype = torch.promote_types(accumulator_dtype(captured.activations), accumulator_dtype(captured.gradients))
    return captured._replace(activations=captured.activations.to(dtype), gradients=captured.gradients.to(dtype))


def join(pieces: Sequence[Captured], dim: int) -> Captured:
    """Captures of one block along examples (``dim`` 1) or positions (2)."""
    if len(pieces) == 1:
        return pieces[0]
    return pieces[0]._replace(
        activations=torch.cat([piece.activations for piece in pieces], dim),
        gradients=torch.cat([piece.gradients for piece in pieces], dim),
    )


class Basis(NamedTuple):
    """Eigenvectors of a block's two covariances, in columns; ``None`` stands for the identity."""

    activations: Tensor | None  # [P, I, I]
    gradients: Tensor | None  # [P, O, O]

    def to(self, device: torch.device) -> Basis:
        """The same on a device."""
        return Basis(*(None if vectors is None else vectors.to(device) for vectors in self))

    def rotate(self, captured: Captured) -> Captured:
        """Activations and output gradients in this basis: the example's gradient becomes ``Q_Gᵀ (Σ_t g aᵀ) Q_A``."""
        a, g = (_times(x, q) for x, q in zip(captured[:2], self, strict=True))
        return captured._replace(activations=a, gradients=g)

    def rotate_from(self, other: Basis, matrices: Tensor) -> Tensor:
        """Matrices ``[..., P, O, I]`` given in the basis ``other``, in this one; one product a side."""
        right = _change(other.activations, self.activations)
        left = _change(other.gradients, self.gradients)
        if right is not None:
            matrices = matrices @ right
        return matrices if left is None else left.mT @ matrices


IDENTITY = Basis(None, None)


def _times(x: Tensor, eigenvectors: Tensor | None) -> Tensor:
    """``x [P, B, T, F]`` times ``[P, F, F]``, as one matrix product a part."""
    return x if eigenvectors is None else (x.flatten(1, 2) @ eigenvectors).view(x.shape)


def _change(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """The orthogonal matrix that takes coordinates in ``old`` to coordinates in ``new``."""
    if old is None or new is None:
        return new if old is None else old.mT
    return old.mT @ new


# A side longer than this keeps only its variances and the identity as eigenbasis; so does a vector-valued block (a
# normalisation layer) longer than the second figure, where a full basis is not worth its cost.
MAX_SIDE, MAX_VECTOR = 8192, 1024


@dataclass
class CovarianceSums:
    """Uncentred covariance sums of one block; :meth:`merge` adds up snapshots, batches and ranks."""

    activations: Tensor  # [P, I, I], Σ over examples of the mean over positions of a aᵀ; [P, I] if only variances
    gradients: Tensor  # [P, O, O], Σ over examples and positions of g gᵀ; [P, O] if only variances
    examples: int  # number of examples summed

    @classmethod
    def of(cls, captured: Captured) -> CovarianceSums:
        """The sums of one batch. Dividing ``a aᵀ`` by ``T`` keeps ``G ⊗ A`` at the scale of the EK-FAC eigenvalues."""
        _, examples, positions, _, inputs = captured.shape
        own = positions if captured.own is None else captured.own
        dtype = accumulator_dtype(captured.gradients)
        a, g = (x[:, :, :own].flatten(1, 2) for x in captured[:2])
        limit = MAX_VECTOR if inputs == 1 else MAX_SIDE
        if captured.vocabulary is None:
            moment = _second_moment(a.to(dtype), MAX_SIDE)
        else:
            moment = a[0].bincount(minlength=inputs).to(dtype).unsqueeze(0)
        return cls(moment / max(1, own), _second_moment(g.to(dtype), limit), examples)

    @classmethod
    def zeros(cls, shape: tuple[int, int, int], indexed: bool, like: Tensor) -> CovarianceSums:
        """The sums over no example of a block of this shape, ``(P, O, I)``."""
        parts, outputs, inputs = shape
        if indexed:
            empty = Captured(like.new_zeros(1, 0, 0, dtype=torch.int64), like.new_zeros(1, 0, 0, outputs), inputs)
        else:
            empty = Captured(like.new_zeros(parts, 0, 1, inputs), like.new_zeros(parts, 0, 1, outputs))
        return cls.of(empty)

    def merge(self, other: CovarianceSums) -> CovarianceSums:
        """The sums over both."""
        return CovarianceSums(
            self.activations + other.activations, self.gradients + other.gradients, self.examples + other.examples
        )


def _second_moment(x: Tensor, limit: int) -> Tensor:
    return x.mT @ x if x.shape[-1] <= limit else x.square().sum(1)


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """float64 stays; everything else accumulates in float32, since sums in half precision stall."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def mean_covariances(sums: Sequence[CovarianceSums], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """``E[a aᵀ]`` and ``E[g gᵀ]`` averaged over a segment's snapshots with the given weights (they sum to 1)."""
    a = sum(w * s.activations.double() / s.examples for w, s in zip(weights, sums, strict=True))
    g = sum(w * s.gradients.double() / s.examples for w, s in zip(weights, sums, strict=True))
    assert isinstance(a, Tensor)
    assert isinstance(g, Tensor)
    return a, g


def eigenbasis(activations: Tensor, gradients: Tensor, dtype: torch.dtype) -> tuple[Basis, Tensor]:
    """Eigenvectors of both covariances and the Kronecker eigenvalues ``λ_G ⊗ λ_A`` (K-FAC), in ``dtype``.

    The decomposition itself runs in float64.

    Args:
        activations: ``E[a aᵀ]``, ``[P, I, I]``.
        gradients: ``E[g gᵀ]``, ``[P, O, O]``.
        dtype: the dtype of what is returned.
    """
    values_a, vectors_a = _eigh(activations)
    values_g, vectors_g = _eigh(gradients)
    kronecker = values_g.clamp_min(0).unsqueeze(-1) * values_a.clamp_min(0).unsqueeze(-2)
    # Laid out as they come back from disk: products of another layout round differently.
    both = (None if v is None else v.to(dtype).contiguous() for v in (vectors_a, vectors_g))
    basis = Basis(*both)
    return basis, kronecker.to(dtype)


def _eigh(moment: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues and eigenvectors of a covariance ``[P, F, F]``; of variances ``[P, F]``, themselves and none."""
    if moment.dim() == 2:
        return moment.double(), None
    values, vectors = torch.linalg.eigh(moment.double())
    return values, vectors


def eigenvalue_sums(captured: Captured, basis: Basis) -> Tensor:
    """``Σ_examples (Q_Gᵀ (Σ_t g_t a_tᵀ) Q_A)²``, ``[P, O, I]``: EK-FAC's eigenvalues before the mean.

    With one position this is a single product of squares and no per-example matrix exists.
    """
    parts, _, positions, outputs, inputs = captured.shape
    dtype = accumulator_dtype(captured.gradients)
    total = captured.gradients.new_zeros(parts, outputs, inputs, dtype=dtype)
    if captured.vocabulary is not None:
        rows = basis.rotate(captured).rows()
        total[0].index_add_(1, rows.tokens, rows.values.to(dtype).square().mT)
        return total
    if positions == 1:
        a, g = (x.squeeze(2).to(dtype).square() for x in basis.rotate(captured)[:2])
        return g.mT @ a
    for chunk in chunks(captured):
        total += rotated_matrices(chunk, basis).to(dtype).square_().sum(0)
    return total


def rotated_matrices(captured: Captured, basis: Basis) -> Tensor:
    """Per-example gradients in a basis, ``[B, P, O, I]``; each side is rotated where it costs less.

    Rotating activations before the sum over positions costs ``T·I²`` an example, afterwards ``O·I²``: the same factor
    decides for either side.
    """
    _, _, positions, outputs, inputs = captured.shape
    first = Basis(basis.activations if positions < outputs else None, basis.gradients if positions < inputs else None)
    rest = Basis(
        None if first.activations is not None else basis.activations,
        None if first.gradients is not None else basis.gradients,
    )
    return rest.rotate_from(IDENTITY, first.rotate(captured).per_example().transpose(0, 1))


def chunks(captured: Captured) -> list[Captured]:
    """The capture split along its examples so that the per-example matrices of one chunk fit ``CHUNK_FLOATS``."""
    parts, examples, _, outputs, inputs = captured.shape
    step = max(1, CHUNK_FLOATS // (parts * outputs * inputs))
    return [captured.select(slice(start, start + step)) for start in range(0, examples, step)]


def squared_norms(captured: Captured) -> Tensor:
    """Squared norm of each example's gradient, ``[B]``, without its matrix where there is one position."""
    if captured.vocabulary is not None:
        rows = captured.rows()
        return rows.values.new_zeros(captured.shape[1]).index_add_(0, rows.examples, rows.values.square().sum(1))
    if captured.shape[2] == 1:
        a, g = (x.squeeze(2).square().sum(-1) for x in captured[:2])
        return (a * g).sum(0)
    return torch.cat([chunk.per_example().square().sum((0, 2, 3)) for chunk in chunks(captured)])


def gram(captured: Captured) -> Tensor:
    """Inner products of all examples' gradients with each other, ``[B, B]``."""
    if captured.vocabulary is not None:
        rows = captured.rows()
        tokens, where = rows.tokens.unique(return_inverse=True)
        dense = rows.values.new_zeros(captured.shape[1], len(tokens), rows.values.shape[1])
        dense[rows.examples, where] = rows.values
        flat = dense.flatten(1)
        return flat @ flat.T
    if captured.shape[2] == 1:
        a, g = (x.squeeze(2) for x in captured[:2])
        return ((a @ a.mT) * (g @ g.mT)).sum(0)
    return torch.cat([contract(captured, chunk.per_example().transpose(0, 1)) for chunk in chunks(captured)])


def contract(captured: Captured, vectors: Tensor, columns: Tensor | None = None) -> Tensor:
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


def _contract_rows(captured: Captured, vectors: Tensor, columns: Tensor | None) -> Tensor:
    rows = captured.rows()
    rows, where = (rows, rows.tokens) if columns is None else rows.at(columns)
    total = vectors.new_zeros(len(vectors), captured.shape[1])
    step = max(1, CHUNK_FLOATS // (vectors.shape[0] * vectors.shape[1]))
    for start in range(0, len(where), step):
        piece = slice(start, start + step)
        products = (vectors[:, :, where[piece]] * rows.values[piece].mT).sum(1)
        total.index_add_(1, rows.examples[piece], products)
    return total


def contract_diagonal(captured: Captured, query: Captured, weights: Tensor) -> Tensor:
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


def contract_pairs(captured: Captured, vectors: Tensor) -> Tensor:
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
