"""EK-FAC of one block: covariances as sums that add up, their eigenbases, and eigenvalues in those. Pure tensors.

Source: George et al. 2018 (EK-FAC); Bae et al. 2024, App. D; method §4 for the scale, which the caller puts into
the output gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_source.curvature.block_gradients import BlockGradients, accumulator_dtype, chunks


class Basis(NamedTuple):
    """Eigenvectors of a block's two covariances, in columns; ``None`` stands for the identity."""

    activations: Tensor | None  # [P, I, I]
    gradients: Tensor | None  # [P, O, O]

    def to(self, device: torch.device) -> Basis:
        """The same on a device."""
        return Basis(*(None if vectors is None else vectors.to(device) for vectors in self))

    def rotate(self, captured: BlockGradients) -> BlockGradients:
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


def meeting_place(vectors: Tensor, basis: Basis, rows: int) -> tuple[Tensor, Basis]:
    """Vectors and the basis in which they meet examples' gradients, each side where rotating costs less.

    A side of ``F`` of the other's ``G`` is rotated at every position, ``rows · F²`` products, or once back in every
    query's matrix, ``Q · G · F²``. Products of both are the same.

    Args:
        vectors: the queries' matrices ``[Q, P, O, I]`` in ``basis``.
        basis: of the vectors.
        rows: positions of all examples that they are to meet.

    Returns:
        The vectors, and the basis that the gradients still have to be rotated into.
    """
    queries, _, outputs, inputs = vectors.shape
    back = Basis(
        basis.activations if queries * outputs < rows else None, basis.gradients if queries * inputs < rows else None
    )
    left = Basis(*(None if there is not None else own for there, own in zip(back, basis, strict=True)))
    return IDENTITY.rotate_from(back, vectors), left


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
    def of(cls, captured: BlockGradients) -> CovarianceSums:
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
            empty = BlockGradients(like.new_zeros(1, 0, 0, dtype=torch.int64), like.new_zeros(1, 0, 0, outputs), inputs)
        else:
            empty = BlockGradients(like.new_zeros(parts, 0, 1, inputs), like.new_zeros(parts, 0, 1, outputs))
        return cls.of(empty)

    def merge(self, other: CovarianceSums) -> CovarianceSums:
        """The sums over both."""
        return CovarianceSums(
            self.activations + other.activations, self.gradients + other.gradients, self.examples + other.examples
        )


def _second_moment(x: Tensor, limit: int) -> Tensor:
    return x.mT @ x if x.shape[-1] <= limit else x.square().sum(1)


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
    values_a, vectors_a = eigh(activations)
    values_g, vectors_g = eigh(gradients)
    kronecker = values_g.clamp_min(0).unsqueeze(-1) * values_a.clamp_min(0).unsqueeze(-2)
    # Laid out as they come back from disk: products of another layout round differently.
    both = (None if v is None else v.to(dtype).contiguous() for v in (vectors_a, vectors_g))
    basis = Basis(*both)
    return basis, kronecker.to(dtype)


def eigh(moment: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues and eigenvectors of a covariance ``[P, F, F]``; of variances ``[P, F]``, themselves and none."""
    if moment.dim() == 2:
        return moment.double(), None
    moment = moment.double()
    seen = (moment.diagonal(dim1=-2, dim2=-1) != 0).any(0)
    if not seen.all():  # units that are always 0, or inputs that are padding: rows and columns of nothing but 0
        values, vectors = eigh(moment[:, seen][:, :, seen])
        return _with_unseen(values, vectors, seen)
    try:
        values, vectors = torch.linalg.eigh(moment)
    except torch.linalg.LinAlgError:
        # Divide and conquer may fail on a matrix of low rank, whose many eigenvalues 0 are all alike. A part in 1e9 of
        # its trace, different along the diagonal, sets them apart, and is below what the moments are accurate to.
        ramp = torch.linspace(1, 2, moment.shape[-1], dtype=moment.dtype, device=moment.device)
        trace = moment.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
        values, vectors = torch.linalg.eigh(moment + torch.diag_embed(1e-9 * trace / moment.shape[-1] * ramp))
    return values, vectors


def _with_unseen(values: Tensor, vectors: Tensor | None, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The decomposition of a matrix whose rows and columns are 0 except the ``seen`` ones, from that of those."""
    assert vectors is not None
    parts, unseen = len(values), len(seen) - int(seen.sum())
    whole = vectors.new_zeros(parts, len(seen), len(seen))
    whole[:, ~seen, :unseen] = torch.eye(unseen, dtype=vectors.dtype, device=vectors.device)
    whole[:, seen, unseen:] = vectors
    return torch.cat([values.new_zeros(parts, unseen), values], 1), whole


def eigenvalue_sums(captured: BlockGradients, basis: Basis) -> Tensor:
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


def rotated_matrices(captured: BlockGradients, basis: Basis) -> Tensor:
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


@dataclass
class BlockFactors:
    """EK-FAC of one block: ``H = (Q_G ⊗ Q_A) diag(eigenvalues) (Q_G ⊗ Q_A)ᵀ``."""

    basis: Basis
    eigenvalues: Tensor  # [P, O, I]

    def to_tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors for a file."""
        tensors = {"activations": self.basis.activations, "gradients": self.basis.gradients, "values": self.eigenvalues}
        return {f"{key}/{name}": value for key, value in tensors.items() if value is not None}

    @classmethod
    def from_tensors(cls, name: str, tensors: Mapping[str, Tensor]) -> BlockFactors:
        """The inverse of :meth:`to_tensors`."""
        basis = Basis(tensors.get(f"activations/{name}"), tensors.get(f"gradients/{name}"))
        return cls(basis, tensors[f"values/{name}"])


Factors = dict[str, BlockFactors]  # by block name
