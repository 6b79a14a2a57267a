"""Exact references against closed forms, autograd one at a time, torch's optimizers and finite differences; float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jacrev

from lightning_source.curvature.unroll import finite_step_response, segment_response
from lightning_source.evaluation.exact import (
    DenseSegment,
    dense_segment,
    dense_source,
    example_gradients,
    flat_network,
    gauss_newton,
)
from lightning_source.evaluation.unrolled import Batch, adam, batches, run, sgd, unrolled_scores

EXAMPLES, CLASSES = 12, 3


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum()


@pytest.fixture
def smooth() -> tuple[nn.Module, Tensor, Tensor]:
    """A classifier without kinks, whose finite differences converge, and its data."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    return net, torch.randn(EXAMPLES, 4).double(), torch.randint(CLASSES, (EXAMPLES,))


def spd(size: int) -> Tensor:
    root = torch.randn(size, size).double()
    return root @ root.T / size + 0.1 * torch.eye(size)


def test_flat_network_is_the_module_and_leaves_frozen_parameters(smooth):
    net, inputs, _ = smooth
    net[0].bias.requires_grad_(False)
    vector, network = flat_network(net)
    assert len(vector) == 4 * 5 + 5 * 3 + 3
    torch.testing.assert_close(network(vector, inputs), net(inputs), rtol=0, atol=0)
    moved = network(vector + 1, inputs)
    with torch.no_grad():
        for parameter in (net[0].weight, net[2].weight, net[2].bias):
            parameter += 1
    torch.testing.assert_close(moved, net(inputs))


def test_example_gradients_are_autograds_one_at_a_time(smooth):
    net, inputs, targets = smooth
    vector, network = flat_network(net)
    found = example_gradients(network, F.cross_entropy, vector, inputs, targets)
    for row, x, y in zip(found, inputs, targets, strict=True):
        expected = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
        torch.testing.assert_close(row, torch.cat([g.flatten() for g in expected]))


def test_gauss_newton_is_the_fisher_matrix_summed_over_labels(smooth):
    net, inputs, targets = smooth
    vector, network = flat_network(net)
    expected = torch.zeros(len(vector), len(vector), dtype=torch.float64)
    for label in range(CLASSES):
        gradients = example_gradients(network, F.cross_entropy, vector, inputs, torch.full_like(targets, label))
        probability = net(inputs).softmax(1)[:, label].detach()
        expected += gradients.T @ (probability[:, None] * gradients) / EXAMPLES
    torch.testing.assert_close(gauss_newton(network, F.cross_entropy, vector, inputs, targets, chunk=5), expected)


def test_gauss_newton_of_least_squares_by_hand():
    vector, network = flat_network(nn.Linear(4, 1, bias=False).double())
    inputs, targets = torch.randn(EXAMPLES, 4).double(), torch.randn(EXAMPLES, 1).double()
    torch.testing.assert_close(
        gauss_newton(network, squared, vector, inputs, targets), 2 * inputs.T @ inputs / EXAMPLES
    )


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_dense_source_is_the_matrix_exponential_of_every_segment(preconditioned, decoupled):
    size, rates, decay = 6, (0.7, 2.0, 0.3), 0.2
    queries, gradients = torch.randn(3, size).double(), torch.randn(len(rates), EXAMPLES, size).double()
    diagonals = torch.rand(len(rates), size).double() + 0.5
    segments = [
        DenseSegment(spd(size), g, rate, decay, p if preconditioned else None, decoupled)
        for g, rate, p in zip(gradients, rates, diagonals, strict=True)
    ]
    shares = dense_source(queries, segments)
    identity = torch.eye(size, dtype=torch.float64)
    carried = identity
    for segment, share in reversed(list(zip(segments, shares, strict=True))):
        scale = identity if segment.preconditioner is None else torch.diag(segment.preconditioner)
        generator = scale @ segment.curvature + decay * (identity if decoupled else scale)
        moved = torch.matrix_exp(-segment.rate * generator)
        response = torch.linalg.solve(generator, (identity - moved) @ scale @ segment.gradients.T) / EXAMPLES
        torch.testing.assert_close(share, queries @ carried @ response)
        carried = carried @ moved


def test_equal_segments_are_one_of_their_summed_rate():
    curvature, gradients, queries = spd(5), torch.randn(EXAMPLES, 5).double(), torch.randn(2, 5).double()
    parts = dense_source(queries, [DenseSegment(curvature, gradients, rate) for rate in (0.5, 1.5, 1.0)]).sum(0)
    torch.testing.assert_close(parts, dense_source(queries, [DenseSegment(curvature, gradients, 3.0)])[0])


def test_a_segments_averages_over_its_snapshots(smooth):
    net, inputs, targets = smooth
    vector, network = flat_network(net)
    snapshots = [vector, vector + 0.3]
    segment = dense_segment(network, F.cross_entropy, snapshots, inputs, targets, rate=0.4, weight_decay=0.1)
    parts = [dense_segment(network, F.cross_entropy, [v], inputs, targets, rate=0.4) for v in snapshots]
    torch.testing.assert_close(segment.curvature, (parts[0].curvature + parts[1].curvature) / 2)
    torch.testing.assert_close(segment.gradients, (parts[0].gradients + parts[1].gradients) / 2)
    assert (segment.rate, segment.weight_decay) == (0.4, 0.1)


def regression() -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor, Tensor]:
    """Least squares started at its solution: losses, solution, Hessian and each example's gradient there."""
    inputs, targets = torch.randn(EXAMPLES, 4).double(), torch.randn(EXAMPLES).double()
    solution = torch.linalg.lstsq(inputs, targets[:, None]).solution[:, 0]

    def losses(parameters: Tensor, positions: Tensor) -> Tensor:
        return (inputs[positions] @ parameters - targets[positions]).square() / 2

    return losses, solution, inputs.T @ inputs / EXAMPLES, (inputs @ solution - targets)[:, None] * inputs


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_unrolling_on_a_quadratic_is_the_geometric_sum(steps):
    """At the solution gradients stand still, so the derivative is ``(1/N) Σ_k η (I - ηH)^k g``."""
    losses, solution, hessian, gradients = regression()
    start, step = sgd(losses)
    record = batches([torch.arange(EXAMPLES)] * steps, 0.05)
    queries = torch.randn(3, 4).double()
    found = unrolled_scores(step, start(solution), record, lambda _: queries, EXAMPLES)
    values, basis = torch.linalg.eigh(hessian)
    response = basis @ torch.diag(finite_step_response(values, 0.05, steps)) @ basis.T
    torch.testing.assert_close(found, queries @ response @ gradients.T / EXAMPLES)


def test_unrolling_on_a_quadratic_nears_source_as_steps_shrink():
    """``ηK`` fixed: halving the steps halves the difference from dense SOURCE."""
    losses, solution, hessian, gradients = regression()
    start, step = sgd(losses)
    queries = torch.randn(3, 4).double()
    source = dense_source(queries, [DenseSegment(hessian, gradients, rate=2.0)])[0]
    errors = []
    for count in (20, 40, 80):
        record = batches([torch.arange(EXAMPLES)] * count, 2.0 / count)
        exact = unrolled_scores(step, start(solution), record, lambda _: queries, EXAMPLES)
        errors.append(float((exact - source).norm() / source.norm()))
    assert errors[2] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.15)


def test_momentum_on_a_quadratic_nears_its_terminal_velocity():
    """Many small steps with momentum ``β`` are SOURCE with the effective rate ``η / (1 - β)``."""
    losses, solution, hessian, gradients = regression()
    start, step = sgd(losses, momentum=0.9)
    queries, rate, steps = torch.randn(3, 4).double(), 0.005, 400
    record = batches([torch.arange(EXAMPLES)] * steps, rate)
    exact = unrolled_scores(step, start(solution), record, lambda _: queries, EXAMPLES)
    values, basis = torch.linalg.eigh(hessian)
    response = basis @ torch.diag(segment_response(values, rate * steps / 0.1)) @ basis.T
    source = queries @ response @ gradients.T / EXAMPLES
    assert float((exact - source).norm() / source.norm()) < 0.025  # velocity builds up over 10 of the 400 steps


# name -> (step, its torch counterpart, options of both, options of the step alone, learning rate)
RULES: dict[str, tuple[Callable, type[torch.optim.Optimizer], dict, dict, float]] = {
    "sgd": (sgd, torch.optim.SGD, {}, {}, 0.3),
    "momentum": (sgd, torch.optim.SGD, {"momentum": 0.9}, {}, 0.1),
    "dampening and decay": (
        sgd,
        torch.optim.SGD,
        {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.05},
        {},
        0.2,
    ),
    "nesterov": (sgd, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02}, {}, 0.1),
    "adam": (adam, torch.optim.Adam, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}, {}, 0.05),
    "adamw": (adam, torch.optim.AdamW, {"eps": 1e-3, "weight_decay": 0.3}, {"decoupled": True}, 0.05),
}


def recorded(rate: float, steps: int = 10) -> list[Batch]:
    """Random batches with a falling rate; the second half of each repeats an example."""
    positions = [torch.cat([p := torch.randperm(EXAMPLES)[:4], p[:1]]) for _ in range(steps)]
    return batches(positions, [rate * (1 - k / (2 * steps)) for k in range(steps)])


def losses_of(network: Callable, inputs: Tensor, targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def losses(parameters: Tensor, positions: Tensor) -> Tensor:
        return F.cross_entropy(network(parameters, inputs[positions]), targets[positions], reduction="none")

    return losses


@pytest.mark.parametrize("name", RULES)
def test_steps_are_torchs(smooth, name):
    make, kind, options, own, rate = RULES[name]
    net, inputs, targets = smooth
    vector, network = flat_network(net)
    record = recorded(rate)
    start, step = make(losses_of(network, inputs, targets), **options, **own)
    found = run(step, start(vector), record)[0]
    optimizer = kind(net.parameters(), lr=rate, **options)
    for batch in record:
        optimizer.param_groups[0]["lr"] = batch.learning_rate
        optimizer.zero_grad()
        F.cross_entropy(net(inputs[batch.examples]), targets[batch.examples]).backward()
        optimizer.step()
    torch.testing.assert_close(found, flat_network(net)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_scores_are_finite_differences_of_the_weighted_run(smooth, name):
    make, _, options, own, rate = RULES[name]
    net, inputs, targets = smooth
    vector, network = flat_network(net)
    record = recorded(rate)
    start, step = make(losses_of(network, inputs, targets), **options, **own)
    query_x, query_y = torch.randn(3, 4).double(), torch.tensor([0, 1, 2])

    def measure(parameters: Tensor) -> Tensor:
        return F.cross_entropy(network(parameters, query_x), query_y, reduction="none")

    found = unrolled_scores(step, start(vector), record, jacrev(measure), EXAMPLES)
    size, differences = 1e-5, torch.empty(3, EXAMPLES, dtype=torch.float64)
    for example in range(EXAMPLES):
        weights = torch.ones(2, EXAMPLES, dtype=torch.float64)
        weights[0, example] -= size
        weights[1, example] += size
        low, high = (measure(run(step, start(vector), record, w)[0]) for w in weights)
        differences[:, example] = (low - high) / (2 * size)  # less of the example raises the measurement
    assert found.abs().max() > 1e-3
    # Central differences err by O(size²) times a third derivative, which Adam's small denominators make large: at ten
    # times the size its error is a hundred times as large. SGD's is the round-off of the difference.
    tolerance = 3e-6 if make is adam else 1e-9
    torch.testing.assert_close(found, differences, rtol=0, atol=tolerance * float(found.abs().max()))


def test_checkpoints_and_chunks_change_nothing(smooth):
    net, inputs, targets = smooth
    vector, network = flat_network(net)
    record = recorded(0.1, steps=11)
    start, step = sgd(losses_of(network, inputs, targets), momentum=0.9)
    queries = torch.randn(5, len(vector)).double()
    found = [
        unrolled_scores(step, start(vector), record, lambda _: queries, EXAMPLES, checkpoint_every=every)
        for every in (None, 1, 4, 11, 50)
    ]
    for other in found[1:]:
        assert torch.equal(other, found[0])
    chunked = unrolled_scores(step, start(vector), record, lambda _: queries, EXAMPLES, queries_at_once=2)
    torch.testing.assert_close(chunked, found[0])


def test_adam_on_parameters_without_gradient_gives_zero_not_nan():
    """A dead unit: its second moment stays 0, where the root has no derivative."""
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, CLASSES)).double()
    with torch.no_grad():
        net[0].bias[0] = -1e3
    vector, network = flat_network(net)
    start, step = adam(losses_of(network, torch.randn(EXAMPLES, 4).double(), torch.randint(CLASSES, (EXAMPLES,))))
    queries = torch.ones(1, len(vector)).double()
    found = unrolled_scores(step, start(vector), recorded(0.01), lambda _: queries, EXAMPLES)
    assert found.isfinite().all()
    assert found.abs().max() > 0


def test_an_example_in_no_batch_scores_zero(smooth):
    net, inputs, targets = smooth
    vector, network = flat_network(net)
    start, step = sgd(losses_of(network, inputs, targets))
    record = batches([torch.tensor([0, 1]), torch.tensor([1, 3])], 0.1)
    found = unrolled_scores(step, start(vector), record, lambda p: torch.ones_like(p)[None], EXAMPLES)
    assert found[0].nonzero().flatten().tolist() == [0, 1, 3]


def test_as_many_rates_as_steps():
    with pytest.raises(ValueError, match="2 learning rates for 1 steps"):
        batches([torch.arange(3)], [0.1, 0.2])
