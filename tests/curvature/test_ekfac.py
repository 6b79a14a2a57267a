"""EK-FAC's sums against materialised per-example gradients, and its blocks against dense Fisher matrices."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, classes, mlp
from torch import nn
from torch.func import functional_call, jacrev
from torch.utils.data import TensorDataset

from lightning_source.capture.coverage import find_blocks
from lightning_source.capture.data import Examples
from lightning_source.capture.objective import Objective
from lightning_source.curvature import block_gradients as factors
from lightning_source.curvature.block_gradients import (
    BlockGradients,
    contract,
    contract_diagonal,
    contract_pairs,
    squared_norms,
)
from lightning_source.curvature.ekfac import (
    Basis,
    BlockFactors,
    CovarianceSums,
    eigenbasis,
    eigenvalue_sums,
    eigh,
    mean_covariances,
    meeting_place,
    rotated_matrices,
)
from lightning_source.passes.calibration import calibrate
from lightning_source.passes.factors import WeightedState, fit_factors
from lightning_source.passes.workspace import Workspace

B = 6
SIZES = [(2, 5), (5, 2), (4, 4)]
KINDS = [(parts, positions, *sizes) for parts in (1, 2) for positions in (1, 3, 50) for sizes in SIZES]
BASES = ["full", "activations", "gradients", "none"]


def captured(parts, positions, outputs, inputs, examples=B, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    a, g = (torch.randn(parts, examples, positions, f, generator=generator).to(dtype) for f in (inputs, outputs))
    return BlockGradients(a, g)


def matrices(one):
    """Per-example gradients ``[B, P, O, I]``, one outer product after another."""
    parts, examples, positions, outputs, inputs = one.shape
    total = torch.zeros(examples, parts, outputs, inputs, dtype=one.activations.dtype)
    for b in range(examples):
        for p in range(parts):
            for t in range(positions):
                total[b, p] += torch.outer(one.gradients[p, b, t], one.activations[p, b, t])
    return total


def a_basis(parts, positions, outputs, inputs, kind="full", seed=5):
    torch.manual_seed(seed)
    qa, qg = (torch.linalg.qr(torch.randn(parts, f, f, dtype=torch.float64)).Q for f in (inputs, outputs))
    return Basis(qa if kind in ("full", "activations") else None, qg if kind in ("full", "gradients") else None)


def rotated(basis, found):
    """``Q_Gᵀ M Q_A`` of ``[B, P, O, I]``."""
    left = found if basis.gradients is None else torch.einsum("pxo,bpxi->bpoi", basis.gradients, found)
    return left if basis.activations is None else torch.einsum("bpox,pxi->bpoi", left, basis.activations)


def results(shape):
    """What every function gives for one shape, and what it should give."""
    one, other, basis = captured(*shape), captured(*shape, seed=1), a_basis(*shape)
    found, second = matrices(one), matrices(other)
    vectors = torch.randn(4, *found.shape[1:], dtype=torch.float64)
    pairs = torch.randn(B, *found.shape[1:], dtype=torch.float64)
    weights = torch.randn(found.shape[1:], dtype=torch.float64)
    yield eigenvalue_sums(one, basis), rotated(basis, found).square().sum(0)
    yield rotated_matrices(one, basis), rotated(basis, found)
    yield basis.rotate(one).per_example().transpose(0, 1), rotated(basis, found)
    yield squared_norms(one), found.square().sum((1, 2, 3))
    yield contract(one, vectors), torch.einsum("qpoi,bpoi->qb", vectors, found)
    yield contract_pairs(one, pairs), (pairs * found).sum((1, 2, 3))
    yield contract_diagonal(one, other, weights), (weights * found * second).sum((1, 2, 3))
    sums = CovarianceSums.of(one)
    yield sums.activations, torch.einsum("pbti,pbtj->pij", one.activations, one.activations) / shape[1]
    yield sums.gradients, torch.einsum("pbto,pbtq->poq", one.gradients, one.gradients)


@pytest.mark.parametrize("shape", KINDS)
def test_every_function_equals_the_materialised_loop(shape):
    for value, expected in results(shape):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("floats", [1, 40])
def test_chunking_changes_nothing(monkeypatch, floats):
    monkeypatch.setattr(factors, "CHUNK_FLOATS", floats)
    shape = (2, 3, 2, 5)
    sizes = [chunk.shape[1] for chunk in factors.chunks(captured(*shape))]
    assert sizes == {1: [1] * 6, 40: [2] * 3}[floats]
    for value, expected in results(shape):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("positions", [1, 3, 50])
def test_a_missing_side_of_a_basis_is_the_identity(kind, positions):
    shape = (2, positions, 2, 5)
    one, basis = captured(*shape), a_basis(*shape, kind=kind)
    expected = rotated(basis, matrices(one))
    torch.testing.assert_close(rotated_matrices(one, basis), expected)
    torch.testing.assert_close(eigenvalue_sums(one, basis), expected.square().sum(0))
    for other in BASES:  # from any basis into any other
        start = a_basis(*shape, kind=other, seed=6)
        torch.testing.assert_close(basis.rotate_from(start, rotated(start, matrices(one))), expected)


@pytest.mark.parametrize(("first", "second"), [(1, 3), (3, 1)])
def test_a_query_may_have_other_positions_than_the_examples(first, second):
    one, query = captured(2, first, 3, 4), captured(2, second, 3, 4, seed=1)
    weights = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = (weights * matrices(one) * matrices(query)).sum((1, 2, 3))
    torch.testing.assert_close(contract_diagonal(one, query, weights), expected)


@pytest.mark.parametrize("positions", [1, 3])
def test_merging_adds_up(positions):
    whole = captured(2, positions, 3, 4, examples=10)
    pieces = [CovarianceSums.of(whole.select(slice(*ends))) for ends in ((0, 1), (1, 7), (7, 10))]
    merged = pieces[0].merge(pieces[1]).merge(pieces[2])
    expected = CovarianceSums.of(whole)
    assert merged.examples == 10
    torch.testing.assert_close(merged.activations, expected.activations)
    torch.testing.assert_close(merged.gradients, expected.gradients)
    mean = mean_covariances([pieces[0], expected], [0.25, 0.75])
    torch.testing.assert_close(mean[0], 0.25 * pieces[0].activations + 0.075 * expected.activations)
    torch.testing.assert_close(mean[1], 0.25 * pieces[0].gradients + 0.075 * expected.gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("positions", [1, 2])
def test_half_precision_adds_up_in_float32(dtype, positions):
    """Sums of ones in bfloat16 stop at 256, in float16 at 2048; 4,000 batches must add up to 4,000."""
    batch = captured(1, positions, 2, 3, examples=1, dtype=dtype)
    one = BlockGradients(torch.ones_like(batch.activations), torch.ones_like(batch.gradients))
    total, values = CovarianceSums.of(one), eigenvalue_sums(one, Basis(None, None))
    for _ in range(3999):
        total = total.merge(CovarianceSums.of(one))
        values += eigenvalue_sums(one, Basis(None, None))
    assert total.activations.dtype == total.gradients.dtype == values.dtype == torch.float32
    assert total.activations.unique().tolist() == [4000]
    assert total.gradients.unique().tolist() == [4000 * positions]
    assert values.unique().tolist() == [4000 * positions**2]


def test_the_eigenbasis_diagonalises_both_covariances():
    sums = CovarianceSums.of(captured(2, 3, 4, 5, examples=40))
    mean = mean_covariances([sums], [1.0])
    basis, kronecker = eigenbasis(*mean, dtype=torch.float64)
    for covariance, vectors in zip(mean, basis, strict=True):
        inner = vectors.mT @ covariance @ vectors
        torch.testing.assert_close(inner, torch.diag_embed(inner.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-10)
    values = [q.mT @ c @ q for q, c in zip(basis, mean, strict=True)]
    a, g = (v.diagonal(dim1=1, dim2=2) for v in values)
    torch.testing.assert_close(kronecker, g.unsqueeze(2) * a.unsqueeze(1))
    rank_one = torch.ones(1, 3, 3, dtype=torch.float64)
    assert eigenbasis(rank_one, rank_one, torch.float64)[1].min() >= 0


@pytest.mark.parametrize("positions", [1, 3, 50])
def test_kronecker_eigenvalues_are_at_the_scale_of_the_fitted_ones(positions):
    """Where activations and gradients are independent, both add up to one trace: no factor of the positions."""
    one = captured(2, positions, 3, 4, examples=3000)
    sums = CovarianceSums.of(one)
    basis, kronecker = eigenbasis(*mean_covariances([sums], [1.0]), dtype=torch.float64)
    torch.testing.assert_close(eigenvalue_sums(one, basis).sum((1, 2)) / 3000, kronecker.sum((1, 2)), rtol=0.04, atol=0)


# ---------------------------------------------------------------- against dense Fisher matrices


def workspace(module, data, **options):
    blocks = find_blocks(module, [list(module.parameters())]).blocks
    space = Workspace(module, blocks, Objective(module))
    examples = Examples(data, 50)
    calibrate(space, examples, 50)
    return space, examples


def fit(space, examples, curvature="ekfac", samples=1, states=None, weights=(1.0,)):
    states = states or [dict(space.module.state_dict())]
    loads = [lambda s=s: s for s in states]
    ids = torch.arange(len(examples))
    found = fit_factors(space, examples, ids, [*map(WeightedState, loads, weights)], curvature, samples).factors
    return found


def dense(one: BlockFactors):
    """``Q diag(λ) Qᵀ`` over the row-major flattened ``[O, I]``."""
    q = torch.kron(one.basis.gradients[0], one.basis.activations[0])
    return q @ one.eigenvalues.flatten().diag() @ q.T


def jacobians(module, block, inputs):
    """Of the outputs with respect to a block, ``[outputs' shape, O · I]``."""

    def run(*values):
        return functional_call(module.net, dict(zip(names, values, strict=True)), (inputs,))

    names = [name.removeprefix("net.") for name in block.parameters]
    values = [module.net.get_parameter(name).detach() for name in names]
    found, outputs = jacrev(run, tuple(range(len(names))))(*values), run(*values)
    pieces = [j.reshape(*outputs.shape, block.shape[1], -1) for j in found]
    return torch.cat(pieces, -1).flatten(-2).detach(), outputs.detach()


def categorical_fisher(module, block, inputs):
    """Every label enumerated with its probability; the mean over examples and positions."""
    j, logits = jacobians(module, block, inputs)  # [..., C, D], [..., C]
    p = logits.softmax(-1)
    score = j - (p.unsqueeze(-1) * j).sum(-2, keepdim=True)
    flat = score.flatten(0, -2)
    return flat.T @ (flat * p.flatten().unsqueeze(1)) / p[..., 0].numel()


def squared_fisher(module, block, inputs):
    """Gauss-Newton matrix of the mean squared error over all elements: ``2 JᵀJ`` over their number."""
    flat = jacobians(module, block, inputs)[0].flatten(0, -2)
    return 2 * flat.T @ flat / flat.shape[0]


def sampled_fisher(space, examples, samples, state=None):
    """Second moments by block of the very gradients that the eigenvalues are fitted to."""
    total = {}
    with space.at(state or {}):
        for draw in range(1, samples + 1):
            for _, found in space.captures(examples, space.sampled(draw), torch.arange(len(examples))):
                for name, one in found.items():
                    rows = matrices(one).flatten(1)
                    total[name] = total.get(name, 0) + rows.T @ rows
    return {name: value / (len(examples) * samples) for name, value in total.items()}


def regression(examples, inputs, outputs, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(examples, f, generator=generator) for f in (inputs, outputs))
    return TensorDataset(x @ torch.randn(inputs, inputs, generator=generator), y)


def relative(value, expected):
    return float((value - expected).norm() / expected.norm())


SQUARED = {
    "mean": (F.mse_loss, 1),
    "sum": (lambda p, y: F.mse_loss(p, y, reduction="sum"), 50),  # examples in a batch
    "half": (lambda p, y: 0.5 * F.mse_loss(p, y), 0.5),
}
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.02, torch.float16: 0.003}


@pytest.mark.parametrize("loss", SQUARED)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_one_linear_output_under_squared_error_is_exact(loss, dtype):
    """``H = 2 E[a aᵀ]`` times what the loss multiplies it by, with one draw of the labels, in any precision."""
    function, factor = SQUARED[loss]
    x, y = (t.to(dtype) for t in regression(60, 4, 1).tensors)
    space, examples = workspace(Classifier(nn.Linear(4, 1), function).to(dtype), TensorDataset(x, y))
    a = torch.cat([x.double(), torch.ones(60, 1)], 1)
    for curvature in ("ekfac", "kfac"):
        (one,) = fit(space, examples, curvature).values()
        assert one.eigenvalues.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert relative(dense(one).double(), factor * 2 * a.T @ a / 60) < TOLERANCES[dtype]


def test_several_linear_outputs_under_squared_error_are_exact_in_expectation():
    """40 draws of 500 × 3 labels leave about 1 % of noise."""
    data = regression(500, 4, 3)
    module = Classifier(nn.Linear(4, 3), F.mse_loss)
    space, examples = workspace(module, data)
    (one,) = fit(space, examples, samples=40).values()
    expected = squared_fisher(module, space.blocks[0], data.tensors[0])
    a = torch.cat([data.tensors[0], torch.ones(500, 1)], 1)
    torch.testing.assert_close(expected, torch.kron(torch.eye(3), 2 / 3 * a.T @ a / 500))
    assert relative(dense(one), expected) < 0.03


def test_one_example_with_one_output_is_exact_in_every_block():
    module = Classifier(mlp(4, 3, 1), F.mse_loss)
    data = regression(1, 4, 1)
    space, examples = workspace(module, data)
    found = fit(space, examples)
    assert len(found) == 2
    for block in space.blocks:
        assert relative(dense(found[block.name]), squared_fisher(module, block, data.tensors[0])) < 1e-5


class Named(Classifier):
    """Names its own losses, so that the empirical Fisher is used: no labels are sampled."""

    def attribution_losses(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")


def test_the_empirical_fisher_of_one_example_is_exact():
    module, data = Named(mlp(4, 5, 3)), classes(1, 4)
    space, examples = workspace(module, data)
    found = fit(space, examples)
    assert space.spec.fisher == "empirical"
    for block in space.blocks:
        gradients = torch.autograd.grad(
            F.cross_entropy(module.net(data.tensors[0]), data.tensors[1]),
            [module.get_parameter(name) for name in block.parameters],
        )
        rows = torch.cat([g.reshape(block.shape[1], -1) for g in gradients], 1).flatten()
        assert relative(dense(found[block.name]), torch.outer(rows, rows)) < 1e-5


def test_copies_of_one_example_are_exact_in_expectation():
    """Every activation is the same, so the Fisher factorises; 200 × 20 labels leave about 4 % of noise."""
    x, y = classes(1, 4).tensors
    module, data = Classifier(mlp(4, 5, 3)), TensorDataset(x.repeat(200, 1), y.repeat(200))
    space, examples = workspace(module, data)
    found = fit(space, examples, samples=20)
    for block in space.blocks:
        assert relative(dense(found[block.name]), categorical_fisher(module, block, x)) < 0.1


class Tokens(L.LightningModule):
    """A class for every token; tokens do not meet each other."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]).transpose(1, 2), batch[1])


def tokens(examples=40, positions=8):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(examples, positions, 4, generator=generator) * torch.tensor([2.0, 1.0, 0.5, 0.1])
    return TensorDataset(x, torch.randint(3, (examples, positions), generator=generator))


NETWORKS = {
    "classes": (lambda: Classifier(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))), lambda: classes(60)),
    "tokens": (Tokens, tokens),
}


def network(kind):
    """A model and its data; weights so large that gradients depend on activations, and nothing factorises."""
    torch.manual_seed(3)
    module, data = (make() for make in NETWORKS[kind])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    return module, data


@pytest.mark.parametrize("kind", NETWORKS)
def test_eigenvalues_are_the_diagonal_of_the_sampled_fisher(kind):
    """The best diagonal in its basis, so nearer than any other (K-FAC's) and of equal trace."""
    module, data = network(kind)
    space, examples = workspace(module, data)
    ekfac, kfac = fit(space, examples, samples=2), fit(space, examples, "kfac")
    for name, fisher in sampled_fisher(space, examples, 2).items():
        one = ekfac[name]
        q = torch.kron(one.basis.gradients[0], one.basis.activations[0])
        torch.testing.assert_close(one.eigenvalues.flatten(), (q.T @ fisher @ q).diagonal(), rtol=1e-3, atol=1e-6)
        assert one.eigenvalues.sum() == pytest.approx(float(fisher.trace()), rel=1e-5)
        assert torch.equal(one.basis.activations, kfac[name].basis.activations)
        assert (dense(one) - fisher).norm() < 0.98 * (dense(kfac[name]) - fisher).norm()


@pytest.mark.parametrize("kind", NETWORKS)
def test_blocks_approach_the_fisher_with_enumerated_labels(kind):
    """Traces agree within the sampling noise, K-FAC's within a half (it has 8 positions); EK-FAC is nearer."""
    module, data = network(kind)
    space, examples = workspace(module, data)
    ekfac, kfac = fit(space, examples, samples=40), fit(space, examples, "kfac")
    for block in space.blocks:
        fisher = categorical_fisher(module, block, data.tensors[0])
        assert ekfac[block.name].eigenvalues.sum() == pytest.approx(float(fisher.trace()), rel=0.06)
        assert kfac[block.name].eigenvalues.sum() == pytest.approx(float(fisher.trace()), rel=0.5)
        distances = [relative(dense(found[block.name]), fisher) for found in (ekfac, kfac)]
        assert distances[0] < 0.99 * distances[1]  # 40 draws of labels decide by how much


def test_snapshots_are_averaged_in_one_basis():
    """Eigenvalues of both snapshots are taken in the basis of the averaged covariances, then averaged themselves."""
    module, data = network("classes")
    space, examples = workspace(module, data)
    states = [{k: v * scale for k, v in module.state_dict().items()} for scale in (1.0, -2.0)]
    found = fit(space, examples, states=states, weights=(0.25, 0.75))
    first, second = (sampled_fisher(space, examples, 1, state) for state in states)
    for name, one in found.items():
        q = torch.kron(one.basis.gradients[0], one.basis.activations[0])
        expected = (q.T @ (0.25 * first[name] + 0.75 * second[name]) @ q).diagonal()
        torch.testing.assert_close(one.eigenvalues.flatten(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 9, 13, 10**6], ids=["none", "one side", "the other", "both"])
@pytest.mark.parametrize("kind", BASES)
def test_vectors_meet_gradients_in_whichever_basis(rows, kind):
    shape = (2, 3, 4, 3)
    one, basis = captured(*shape), a_basis(*shape, kind)
    vectors = torch.randn(3, 2, 4, 3, dtype=torch.float64)
    expected = contract(basis.rotate(one), vectors)
    met, left = meeting_place(vectors, basis, rows)
    torch.testing.assert_close(contract(left.rotate(one), met), expected, rtol=1e-10, atol=1e-10)
    # Rotating costs rows · F² a side, going back 3 queries times the other side (4 outputs, 3 inputs) times F².
    assert (left.activations is None) == (basis.activations is None or rows > 3 * 4)
    assert (left.gradients is None) == (basis.gradients is None or rows > 3 * 3)


@pytest.mark.parametrize("dense", [0, 64], ids=["gathered", "dense"])
@pytest.mark.parametrize("columns", [None, [1, 2, 4], [5], []], ids=str)
@pytest.mark.parametrize("floats", [1, 1 << 24])
def test_rows_meet_the_columns_of_their_tokens(monkeypatch, dense, columns, floats):
    monkeypatch.setattr(factors, "DENSE_COLUMNS", dense)
    monkeypatch.setattr(factors, "CHUNK_FLOATS", floats)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(6, (1, B, 3), generator=generator)
    one = BlockGradients(tokens, torch.randn(1, B, 3, 4, generator=generator, dtype=torch.float64), 6)
    whole = torch.randn(5, 1, 4, 6, generator=generator, dtype=torch.float64)
    kept = None if columns is None else torch.tensor(columns, dtype=torch.int64)
    vectors = whole if kept is None else whole[..., kept]
    left = torch.zeros_like(whole)
    left[..., slice(None) if kept is None else kept] = vectors
    hot = one._replace(activations=F.one_hot(tokens, 6).double(), vocabulary=None)
    torch.testing.assert_close(contract(one, vectors, kept), contract(hot, left), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("parts", [1, 2])
def test_units_that_are_always_zero_have_eigenvectors_of_their_own(parts):
    """Padding that an input never leaves, units that never fire: no decomposition of their zeros is tried."""
    x = torch.randn(parts, 9, 6, dtype=torch.float64)
    x[..., [1, 4]] = 0
    moment = x.mT @ x
    values, vectors = eigh(moment)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(6, dtype=torch.float64).expand(parts, 6, 6))
    torch.testing.assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, moment)
    assert (values.diff() >= -1e-9).all()
    assert (values[:, :2] == 0).all()


def test_a_decomposition_that_does_not_converge_is_tried_on_a_matrix_beside(monkeypatch):
    x = torch.randn(1, 3, 6, dtype=torch.float64)
    moment, own, calls = x.mT @ x, torch.linalg.eigh, []

    def refuses_the_first(matrix):
        calls.append(matrix)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return own(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", refuses_the_first)
    values, vectors = eigh(moment)
    torch.testing.assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, moment, rtol=1e-7, atol=1e-7)
