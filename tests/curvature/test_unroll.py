"""The spectral functions of method §2 against plain formulas, and the walk over segments against dense matrices."""

import math

import pytest
import torch

from lightning_source.curvature.ekfac import Basis
from lightning_source.curvature.unroll import (
    SegmentCurvature,
    damped_inverse,
    finite_step_response,
    reverse_walk,
    segment_decay,
    segment_response,
)

TINY = [0.0, 1e-45, 1e-30, 1e-12]


@pytest.mark.parametrize("rate", [0.3, 1e-6, 1e6])
def test_a_flat_direction_moves_by_the_whole_rate(rate):
    sigma = torch.tensor(TINY) / max(rate, 1)
    assert torch.equal(segment_response(sigma, rate), torch.full((4,), rate))
    assert torch.equal(segment_decay(sigma, rate), torch.ones(4))


def test_a_steep_direction_moves_by_the_inverse():
    sigma = torch.logspace(-2, 30, 33)
    torch.testing.assert_close(segment_response(sigma, 1e5), 1 / sigma, rtol=3e-7, atol=0)
    assert segment_decay(sigma, 1e5).max() == 0
    assert segment_response(torch.tensor(torch.inf), 2.0) == 0


@pytest.mark.parametrize("decay", [0.0, 0.25])
def test_round_off_negatives_count_as_zero(decay):
    negative, zero = torch.tensor([-1e-7, -3.0]), torch.zeros(2)
    for function in (segment_response, segment_decay):
        assert torch.equal(function(negative, 2.0, decay), function(zero, 2.0, decay))
    assert torch.equal(finite_step_response(negative, 0.1, 7), finite_step_response(zero, 0.1, 7))
    assert torch.equal(damped_inverse(negative, 0.5), torch.full((2,), 2.0))


def test_no_training_no_response():
    sigma = torch.tensor([0.0, 1.0, 1e9])
    assert torch.equal(segment_response(sigma, 0.0), torch.zeros(3))
    assert torch.equal(segment_decay(sigma, 0.0), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_digits_are_lost_between_the_limits(dtype):
    """``1 - exp(-x)`` in float32 has none left at x = 1e-8; ``expm1`` keeps them all."""
    rate = 0.5
    sigma = torch.logspace(-14, 3, 400, dtype=dtype)
    reference = torch.tensor([-math.expm1(-rate * s) / s for s in sigma.tolist()], dtype=torch.float64)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(segment_response(sigma, rate).double(), reference, rtol=tolerance, atol=0)
    assert (segment_response(sigma, rate) <= rate).all()


def test_distance_from_the_damped_inverse():
    """``1 / (σ + 1/Λ)`` agrees in both limits; in between it is at most 1.298 times smaller."""
    rate = 7.0
    sigma = torch.logspace(-6, 6, 200_001, dtype=torch.float64) / rate
    ratio = segment_response(sigma, rate) / damped_inverse(sigma, 1 / rate)
    assert ratio.max() == pytest.approx(1.298, abs=5e-4)
    assert rate * sigma[ratio.argmax()] == pytest.approx(1.793, abs=2e-3)
    assert ratio.min() >= 1
    assert ratio[[0, -1]].tolist() == pytest.approx([1, 1], abs=2e-6)


@pytest.mark.parametrize("steps", [1, 2, 37])
def test_finite_steps_are_the_geometric_sum(steps):
    sigma = torch.tensor([0.0, 1e-9, 0.01, 1.0, 5.0, 9.9, 10.0], dtype=torch.float64)
    explicit = sum(0.1 * (1 - 0.1 * sigma) ** k for k in range(steps))
    torch.testing.assert_close(finite_step_response(sigma, 0.1, steps), explicit, rtol=1e-12, atol=0)


def test_many_small_steps_are_the_smooth_response():
    sigma = torch.tensor([0.0, 0.1, 1.0, 3.0], dtype=torch.float64)
    smooth = segment_response(sigma, 2.0)
    errors = [(finite_step_response(sigma, 2.0 / k, k) - smooth).abs().max() for k in (100, 1000, 10_000)]
    assert errors[0] < 2e-2
    assert errors[1] / errors[0] == pytest.approx(0.1, rel=0.05)  # first order in the learning rate
    assert errors[2] / errors[1] == pytest.approx(0.1, rel=0.05)


def test_weight_decay_shifts_the_curvature():
    sigma = torch.tensor([0.0, 0.2, 4.0])
    for function in (segment_response, segment_decay):
        torch.testing.assert_close(function(sigma, 1.5, 0.3), function(sigma + 0.3, 1.5))
        assert (function(sigma, 1.5, 0.3) < function(sigma, 1.5)).all()


# ---------------------------------------------------------------- the walk


def curvature(generator, parts, outputs, inputs, rate, decay=0.0, identity=False):
    def rotation(size):
        return torch.linalg.qr(torch.randn(parts, size, size, generator=generator, dtype=torch.float64)).Q

    values = torch.rand(parts, outputs, inputs, generator=generator, dtype=torch.float64).mul(3)
    values[:, 0, 0] = 0  # flat directions have no inverse
    basis = Basis(None, None) if identity else Basis(rotation(inputs), rotation(outputs))
    return SegmentCurvature(basis, values, rate, decay)


def eigenvectors(segment):
    """Columns in parameter space, all parts in one block-diagonal matrix."""
    parts, outputs, inputs = segment.eigenvalues.shape
    a, g = segment.basis
    a = torch.eye(inputs, dtype=torch.float64).expand(parts, -1, -1) if a is None else a
    g = torch.eye(outputs, dtype=torch.float64).expand(parts, -1, -1) if g is None else g
    return torch.block_diag(*(torch.kron(g[part], a[part]) for part in range(parts)))


def dense(segment):
    """``(exp(-Λ (H + w)), ∫ exp(-s (H + w)) ds)`` as matrices: one exponential, no eigenvalues, no inverse."""
    q = eigenvectors(segment)
    size = len(q)
    eye = torch.eye(size, dtype=torch.float64)
    h = q @ segment.eigenvalues.flatten().diag() @ q.T + segment.weight_decay * eye
    both = torch.linalg.matrix_exp(segment.rate * torch.cat([torch.cat([-h, eye], 1), torch.zeros(size, 2 * size)]))
    return both[:size, :size], both[:size, size:]


CHAINS = [
    pytest.param(1, 3, 4, [(0.7, 0.0, False)], id="one segment"),
    pytest.param(1, 2, 3, [(0.7, 0.0, False), (0.2, 0.4, False), (1.1, 0.1, False)], id="three segments"),
    pytest.param(2, 3, 2, [(0.5, 0.0, False), (0.9, 0.0, False)], id="two parts"),
    pytest.param(1, 3, 3, [(0.5, 0.0, True), (0.9, 0.0, False), (0.4, 0.2, True)], id="some without a basis"),
]


@pytest.mark.parametrize(("parts", "outputs", "inputs", "chain"), CHAINS)
def test_the_walk_is_the_product_of_matrix_exponentials(parts, outputs, inputs, chain):
    generator = torch.Generator().manual_seed(len(chain))
    segments = [curvature(generator, parts, outputs, inputs, *one) for one in chain]
    query = torch.randn(5, parts, outputs, inputs, generator=generator, dtype=torch.float64)
    flat = query.flatten(1)
    walked = list(reverse_walk((flat @ eigenvectors(segments[-1])).view_as(query), segments[-1].basis, segments))
    assert len(walked) == len(segments)
    carried = flat
    for segment, vectors in zip(reversed(segments), walked, strict=True):
        decay, response = dense(segment)
        in_parameters = vectors.flatten(1) @ eigenvectors(segment).T
        torch.testing.assert_close(in_parameters, carried @ response, rtol=1e-10, atol=1e-12)
        carried = carried @ decay
    if len(segments) > 1:  # they do not commute, so their order is tested
        forwards = flat
        for segment in segments:
            forwards = forwards @ dense(segment)[0]
        assert (forwards - carried).abs().max() > 1e-3


def test_equal_segments_are_one_long_segment():
    generator = torch.Generator().manual_seed(0)
    whole = curvature(generator, 2, 3, 4, 1.7, 0.2)
    query = torch.randn(5, 2, 3, 4, generator=generator, dtype=torch.float64)
    pieces = [whole._replace(rate=rate) for rate in (0.9, 0.0, 0.5, 0.3)]
    (expected,) = reverse_walk(query, whole.basis, [whole])
    torch.testing.assert_close(sum(reverse_walk(query, pieces[-1].basis, pieces)), expected, rtol=1e-12, atol=1e-13)


def test_the_walk_leaves_the_query_alone():
    generator = torch.Generator().manual_seed(0)
    segments = [curvature(generator, 1, 2, 3, 1.0) for _ in range(3)]
    query = torch.randn(2, 1, 2, 3, dtype=torch.float64)
    before = query.clone()
    list(reverse_walk(query, segments[-1].basis, segments))
    assert torch.equal(query, before)


def _adaptive(values, scale, rate=0.7, decay=0.0, decoupled=False):
    generator = torch.Generator().manual_seed(5)
    basis = Basis(*(torch.linalg.qr(torch.randn(1, n, n, generator=generator).double())[0] for n in (4, 3)))
    return SegmentCurvature(basis, values, rate, decay, scale, decoupled, symmetric=True)


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_preconditioner_that_is_one_number_is_a_learning_rate(decoupled):
    """Two segments of the symmetric operator against gradient steps at ``p`` times the rate."""
    torch.manual_seed(0)
    values, p, decay = torch.rand(1, 3, 4).double() * 3, 0.25, 0.3
    adaptive = _adaptive(values, torch.full((1, 3, 4), p).double(), decay=decay, decoupled=decoupled)
    # A decoupled decay is not scaled by p, so at p times the rate it is 1/p times as large.
    plain = SegmentCurvature(adaptive.basis, values, 0.7 * p, decay / p if decoupled else decay)
    query = torch.randn(2, 1, 3, 4).double()
    identity = Basis(None, None)
    for one, other in zip(
        reverse_walk(query, identity, [adaptive] * 2), reverse_walk(query, identity, [plain] * 2), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_without_curvature_a_preconditioned_step_is_the_scaled_gradient():
    torch.manual_seed(0)
    scale = torch.rand(1, 3, 4).double() + 0.1
    segment = _adaptive(torch.zeros(1, 3, 4).double(), scale)
    query = torch.randn(2, 1, 3, 4).double()
    found = list(reverse_walk(query, Basis(None, None), [segment] * 2))
    expected = segment.basis.rotate_from(Basis(None, None), 0.7 * scale * query)
    for response in found:  # nothing decays either
        torch.testing.assert_close(response, expected, rtol=1e-10, atol=1e-12)


def test_the_symmetric_operator_is_its_own_dense_form():
    """``r`` and ``S`` of one matrix ``M`` whose eigenvalues are ``p̂σ`` in the basis of ``H``."""
    torch.manual_seed(0)
    values, scale = torch.rand(1, 3, 4).double(), torch.rand(1, 3, 4).double() + 0.1
    segment = _adaptive(values, scale)
    q = torch.kron(segment.basis.gradients[0], segment.basis.activations[0])
    root = torch.diag(scale.flatten().sqrt())
    spectrum = torch.diag(q.T @ torch.diag(scale.flatten()) @ q) * values.flatten()
    operator = q @ torch.diag(spectrum) @ q.T
    decay = torch.linalg.inv(root) @ torch.matrix_exp(-0.7 * operator) @ root
    response = root @ q @ torch.diag(segment_response(spectrum, 0.7)) @ q.T @ root
    query = torch.randn(12).double()
    last, first = reverse_walk(query.view(1, 1, 3, 4), Basis(None, None), [segment] * 2)
    torch.testing.assert_close(last.flatten(), q.T @ response @ query, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(first.flatten(), q.T @ response @ decay @ query, rtol=1e-10, atol=1e-12)
