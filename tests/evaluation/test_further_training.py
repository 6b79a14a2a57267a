"""The further-training gold standard, against closed forms, autograd through a run, and the plain loop."""

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, mlp
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from scipy.spatial.distance import cosine as cosine_distance
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_source import InfluenceScores
from lightning_source.evaluation.cosine import FinalModelCosine, cosine_by_query
from lightning_source.evaluation.curves import CosineCurve, curve_rows, plot_curves, write_curves
from lightning_source.evaluation.further_training import FurtherTraining, further_training


def sgd(rate: float, **options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, **options)


def problem(kind: str, examples: int = 15, queries: int = 4) -> tuple[Classifier, TensorDataset, list[Tensor]]:
    """A double-precision network with a loss, its data and one query batch."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(examples + queries, 6, generator=generator).double()
    labels = torch.randint(3, (examples + queries,), generator=generator)
    losses: dict[str, tuple[Any, Tensor]] = {
        "cross_entropy": (F.cross_entropy, labels),
        "mse": (lambda o, t: 0.5 * F.mse_loss(o, t), torch.randn(examples + queries, 3, generator=generator).double()),
        "bce": (F.binary_cross_entropy_with_logits, F.one_hot(labels, 3).double()),
        "sum": (lambda o, t: F.cross_entropy(o, t, reduction="sum"), labels),
        "penalty": (lambda o, t: F.cross_entropy(o, t) + 0.01 * o.square().mean(), labels),
    }
    loss, targets = losses[kind]
    module = Classifier(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), loss).double()
    train = TensorDataset(inputs[:examples], targets[:examples])
    return module, train, [inputs[examples:], targets[examples:]]


def close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("removal", ["downweight", "mask", "shift"])
@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        ("cross_entropy", sgd(0.1, momentum=0.9, weight_decay=0.01)),
        ("mse", lambda p: torch.optim.Adam(p, lr=0.01)),
        ("bce", lambda p: torch.optim.AdamW(p)),
    ],
    ids=["cross_entropy-sgd", "mse-adam", "bce-adamw"],
)
def test_stacked_copies_are_the_plain_loop(kind: str, optimizer: Any, removal: Any):
    module, train, query = problem(kind)
    options: dict[str, Any] = {
        "leave_out": [0, 7, 14],
        "epochs": 3,
        "seeds": 2,
        "batch_size": 4,
        "optimizer": optimizer,
        "removal": removal,
        "measurement": {"mse": "loss", "cross_entropy": "margin", "bce": lambda m, b: m.net(b[0])[:, 0]}[kind],
    }
    stacked = further_training(module, train, query, vectorize=True, copies=5, **options)
    plain = further_training(module, train, query, vectorize=False, **options)
    assert stacked.gold().abs().max() > 1e-6
    for name in ("left_out", "full", "start", "distances", "full_distances"):
        # Double precision; sums in another order.
        assert close(getattr(stacked, name), getattr(plain, name), 1e-10), name


def test_a_loss_of_single_examples_stands_in_for_the_training_step():
    module, train, query = problem("cross_entropy")
    options: dict[str, Any] = {"leave_out": [1, 2], "epochs": 2, "seeds": 1, "batch_size": 4, "optimizer": sgd(0.1)}
    expected = further_training(module, train, query, **options)
    for vectorize in (True, False):
        found = further_training(
            module,
            train,
            query,
            loss=lambda m, batch: F.cross_entropy(m.net(batch[0]), batch[1], reduction="none"),
            vectorize=vectorize,
            **options,
        )
        assert close(found.left_out, expected.left_out, 1e-12)


@pytest.mark.parametrize("kind", ["sum", "penalty"])
def test_losses_that_are_no_mean_run_one_after_the_other(kind: str):
    module, train, query = problem(kind)
    options: dict[str, Any] = {"leave_out": [1], "epochs": 1, "seeds": 1, "batch_size": 4, "optimizer": sgd(0.01)}
    with pytest.raises(MisconfigurationException, match=r"cannot be stacked.*vectorize=False"):
        further_training(module, train, query, vectorize=True, **options)
    assert further_training(module, train, query, **options).left_out.isfinite().all()


def test_a_penalty_beside_the_loss_leaves_with_its_example():
    """A step of gradient descent on all examples, without what one adds to the mean of the losses and penalties."""
    module, train, query = problem("penalty", examples=8)
    options: dict[str, Any] = {"leave_out": [2], "epochs": 1, "seeds": 1, "batch_size": 8, "optimizer": sgd(0.5)}
    result = further_training(module, train, query, measurement="loss", **options)
    values = {name: p.detach().requires_grad_() for name, p in module.net.named_parameters()}
    loss = lambda rows, given: module.loss(torch.func.functional_call(module.net, given, rows[0]), rows[1])  # noqa: E731
    moved = loss(train.tensors, values) - loss([rows[[2]] for rows in train.tensors], values) / 8
    gradients = torch.autograd.grad(moved, list(values.values()))
    ended = {name: p - 0.5 * g for (name, p), g in zip(values.items(), gradients, strict=True)}
    expected = torch.stack([loss([rows[[q]] for rows in query], ended) for q in range(len(query[0]))])
    assert close(result.left_out[0, :, 0, 0], expected, 1e-10)
    with pytest.raises(MisconfigurationException, match="needs the losses of single examples"):
        further_training(module, train, query, removal="mask", **options)


def test_a_sum_is_a_mean_at_a_larger_rate():
    """Method §4: a summed loss at rate η is a mean loss at rate ηB, the left-out example's share included."""
    mean, train, query = problem("cross_entropy", examples=16)
    total = problem("sum")[0]
    total.load_state_dict(mean.state_dict())
    options: dict[str, Any] = {"leave_out": [3, 9], "epochs": 2, "seeds": 2, "batch_size": 4}
    for removal in ("downweight", "mask"):
        one = further_training(mean, train, query, removal=removal, optimizer=sgd(0.4), **options)
        other = further_training(total, train, query, removal=removal, optimizer=sgd(0.1), **options)
        assert close(other.left_out, one.left_out, 1e-10)


# ---------------------------------------------------------------- closed forms


def least_squares(examples: int = 12) -> tuple[Classifier, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(examples, 3, generator=generator).double()
    targets = inputs @ torch.tensor([1.0, -2.0, 0.5]).double() + torch.randn(examples, generator=generator).double()
    module = Classifier(nn.Sequential(nn.Linear(3, 1, bias=False), nn.Flatten(0)), F.mse_loss).double()
    return module, inputs, targets


def test_full_batch_gradient_descent_on_a_quadratic_has_a_closed_form():
    """``θ_K = θ* + (I - ηH)^K (θ_0 - θ*)`` on the risk less the example's share of it."""
    module, inputs, targets = least_squares()
    query = [torch.eye(3).double(), torch.zeros(3).double()]
    rate, steps, n = 0.05, 8, len(inputs)
    result = further_training(
        module,
        TensorDataset(inputs, targets),
        query,
        leave_out=[2, 11],
        epochs=steps,
        seeds=1,
        batch_size=n,
        optimizer=sgd(rate),
    )
    start = module.net[0].weight.detach().flatten()

    def after(kept: Tensor, steps: int) -> Tensor:
        hessian = 2 / n * inputs.T @ (kept[:, None] * inputs)
        optimum = torch.linalg.solve(hessian, 2 / n * inputs.T @ (kept * targets))
        return optimum + torch.linalg.matrix_power(torch.eye(3) - rate * hessian, steps) @ (start - optimum)

    for epoch in range(steps):
        full = after(torch.ones(n).double(), epoch + 1)
        for column, point in enumerate(result.leave_out):
            weights = torch.ones(n).double()
            weights[point] = 0
            moved = after(weights, epoch + 1)
            expected = moved.square() - full.square()  # the queries' losses: (θ_q - 0)²
            assert torch.allclose(result.gold(17)[epoch, :, column], expected, rtol=1e-9, atol=1e-12)
            assert torch.allclose(result.distances[epoch, column, 0], (moved - start).norm(), rtol=1e-9)
        assert torch.allclose(result.full_distances[epoch, 0], (full - start).norm(), rtol=1e-9)


@pytest.mark.parametrize("removal", ["downweight", "mask", "shift"])
def test_runs_are_those_of_a_loop_written_out(removal: Any):
    """The rules of leaving out, on two steps an epoch with momentum, by hand."""
    module, inputs, targets = least_squares(7)
    n, size, point, rate, beta = 7, 4, 5, 0.05, 0.5
    result = further_training(
        module,
        TensorDataset(inputs, targets),
        [inputs[:2], targets[:2]],
        leave_out=[point],
        epochs=2,
        seeds=[11],
        batch_size=size,
        optimizer=sgd(rate, momentum=beta),
        removal=removal,
    )
    weights, velocity = module.net[0].weight.detach().flatten().clone(), torch.zeros(3).double()
    generator = torch.Generator().manual_seed(11)
    for epoch in range(2):
        order = torch.randperm(n, generator=generator).tolist()
        if removal == "shift":
            order.remove(point)
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            gradient = torch.zeros(3).double()
            for i in batch:
                if removal != "mask" or i != point:
                    gradient += 2 * (inputs[i] @ weights - targets[i]) * inputs[i] / len(batch)
            if removal == "downweight":
                gradient -= 2 * (inputs[point] @ weights - targets[point]) * inputs[point] / n
            velocity = beta * velocity + gradient
            weights = weights - rate * velocity
        expected = (inputs[:2] @ weights - targets[:2]).square()
        assert torch.allclose(result.left_out[epoch, :, 0, 0], expected, rtol=1e-10)


def test_downweighting_is_the_derivative_to_first_order():
    """Autograd through the whole run, with respect to the weight of the example; second order is O(1/N)."""
    module, train, query = problem("cross_entropy", examples=200)
    result = further_training(
        module, train, query, leave_out=[4, 40], epochs=2, seeds=[2], batch_size=50, optimizer=sgd(0.1)
    )
    inputs, targets = train.tensors
    for column, point in enumerate(result.leave_out):
        removed = torch.zeros((), dtype=torch.float64, requires_grad=True)
        values = {name: p.detach().requires_grad_() for name, p in module.net.named_parameters()}
        generator = torch.Generator().manual_seed(2)
        for _ in range(2):
            for ids in torch.randperm(200, generator=generator).split(50):
                each = F.cross_entropy(torch.func.functional_call(module.net, values, inputs[ids]), targets[ids])
                own = F.cross_entropy(torch.func.functional_call(module.net, values, inputs[[point]]), targets[[point]])
                gradients = torch.autograd.grad(each - removed * own / 200, list(values.values()), create_graph=True)
                values = {name: v - 0.1 * g for (name, v), g in zip(values.items(), gradients, strict=True)}
        final = F.cross_entropy(torch.func.functional_call(module.net, values, query[0]), query[1], reduction="none")
        derivative = torch.stack([torch.autograd.grad(f, removed, retain_graph=True)[0] for f in final])
        assert close(result.gold()[-1, :, column], derivative, 0.02)


def test_the_three_removals_agree_in_expectation():
    """At the minimum, to first order in the rate: a deleted example leaves the others N / (N - 1) of their weight."""
    module, inputs, targets = least_squares(6)
    optimum = torch.linalg.lstsq(inputs, targets[:, None]).solution
    with torch.no_grad():
        module.net[0].weight.copy_(optimum.T)
    found = {}
    for removal in ("downweight", "mask", "shift"):
        result = further_training(
            module,
            TensorDataset(inputs, targets),
            [torch.eye(3).double(), torch.full((3,), 2.0).double()],
            leave_out=[0, 3],
            epochs=1,
            seeds=1500,
            batch_size=2,
            optimizer=sgd(1e-4),
            removal=removal,
            copies=4500,
        )
        found[removal] = result
    expected = found["downweight"].gold()[0]
    assert close(found["mask"].gold()[0], expected, 2e-3)
    shift = found["shift"]
    one = (shift.left_out - shift.full[:, :, None])[0] * 5 / 6
    error = one.std(-1) / 1500**0.5
    assert ((one.mean(-1) - expected).abs() < 4 * error + 2e-3 * expected.abs()).all()
    assert (error < 0.2 * expected.abs().max()).all()  # or the comparison would say nothing


# ---------------------------------------------------------------- randomness and modes


class Weighted(Classifier):
    """Examples carry a weight, and the network drops out."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 1), nn.Flatten(0)))

    @staticmethod
    def each(module: Any, batch: Any) -> Tensor:
        return batch[2] * (module.net(batch[0]) - batch[1]).square()


@pytest.mark.parametrize("removal", ["downweight", "mask"])
def test_train_mode_draws_the_same_with_and_without_the_example(removal: Any):
    """An example without weight cannot matter, unless leaving it out moved the dropout masks."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.ones(9)
    weights[4] = 0
    train = TensorDataset(torch.randn(9, 6, generator=generator), torch.randn(9, generator=generator), weights)
    query = [torch.randn(3, 6, generator=generator), torch.zeros(3), torch.ones(3)]
    module = Weighted()
    options: dict[str, Any] = {"leave_out": [4, 5], "epochs": 2, "seeds": 2, "batch_size": 4, "optimizer": sgd(0.05)}
    result = further_training(module, train, query, loss=Weighted.each, mode="train", removal=removal, **options)
    assert (result.gold()[:, :, 0] == 0).all()
    assert (result.gold()[:, :, 1] != 0).any()
    quiet = further_training(module, train, query, loss=Weighted.each, removal=removal, **options)
    assert not torch.allclose(quiet.full, result.full)  # eval mode drops nothing


def test_the_model_and_the_process_are_left_as_they_were():
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    module = Classifier(net)
    module.train()
    net[1].eval()
    net[0].weight.grad = torch.ones(4, 6)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [m.training for m in module.modules()]
    _, train, query = problem("cross_entropy")
    train = TensorDataset(train.tensors[0].float(), train.tensors[1])
    generators = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    further_training(
        module,
        train,
        [query[0].float(), query[1]],
        leave_out=[0],
        epochs=1,
        seeds=1,
        batch_size=5,
        removal="mask",
        mode="train",
    )
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [m.training for m in module.modules()] == modes
    assert torch.equal(net[0].weight.grad, torch.ones(4, 6))
    assert net[3].weight.grad is None
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert np.random.get_state()[1].tolist() == generators[2]


# ---------------------------------------------------------------- the sweep on disk


class Killed(Exception):
    pass


def test_a_killed_sweep_resumes_and_refuses_another(tmp_path):
    module, train, query = problem("cross_entropy")
    options: dict[str, Any] = {"leave_out": [1, 3, 5], "epochs": 2, "batch_size": 4, "optimizer": sgd(0.1)}
    expected = further_training(module, train, query, seeds=3, **options)

    def kill(done: int, total: int) -> None:
        assert total == 8
        if done >= 4:
            raise Killed

    with pytest.raises(Killed):
        further_training(module, train, query, seeds=2, dirpath=tmp_path / "s", copies=2, progress=kill, **options)
    blocks = sorted((tmp_path / "s" / "blocks").iterdir())
    times = [b.stat().st_mtime_ns for b in blocks]
    assert len(blocks) == 2
    calls: list[tuple[int, int]] = []
    resumed = further_training(  # with another seed, and other blocks
        module,
        train,
        query,
        seeds=3,
        dirpath=tmp_path / "s",
        copies=8,
        progress=lambda *counts: calls.append(counts),
        **options,
    )
    assert calls == [(12, 12)]
    assert [b.stat().st_mtime_ns for b in blocks] == times
    assert close(resumed.left_out, expected.left_out, 1e-12)
    assert close(resumed.full_distances, expected.full_distances, 1e-12)
    for change in ({"removal": "mask"}, {"optimizer": sgd(0.2)}, {"leave_out": [1, 3]}, {"epochs": 3}):
        with pytest.raises(MisconfigurationException, match=f"another sweep.*{next(iter(change))}"):
            further_training(module, train, query, seeds=2, dirpath=tmp_path / "s", **(options | change))
    with torch.no_grad():
        module.net[0].bias += 1
    with pytest.raises(MisconfigurationException, match="its parameters is"):
        further_training(module, train, query, seeds=2, dirpath=tmp_path / "s", **options)
    assert {p.suffix or p.name for p in (tmp_path / "s").rglob("*") if p.is_file()} == {".json", ".safetensors", "lock"}


# ---------------------------------------------------------------- the result


def result_of(seed: int = 0) -> FurtherTraining:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, 4, 5)
    left_out, full = torch.randn(shape, generator=generator), torch.randn(2, 3, 5, generator=generator)
    metadata = {"rates_per_epoch": [0.5, 1.0], "optimizer": {"class": "SGD"}}
    return FurtherTraining(
        left_out, full, full[0, :, 0], left_out[:, 0], full[:, 0], [2, 0, 9, 4], [*range(5)], metadata
    )


def test_adjustments_and_cosines_by_numpy_and_scipy():
    result = result_of()
    left_out, full = result.left_out.double().numpy(), result.full.double().numpy()
    eq17 = (left_out - full[:, :, None]).mean(-1)
    eq13 = left_out.mean(-1) - left_out.mean(-1).mean(-1, keepdims=True)
    assert np.allclose(result.gold(17), eq17)
    assert np.allclose(result.gold(13), eq13)
    assert np.allclose(result.gold(17, seeds=2), (left_out - full[:, :, None])[..., :2].mean(-1))
    estimate = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    scores = InfluenceScores(estimate, torch.arange(10), torch.arange(3))
    curve = result.cosine(scores, adjustment=13)
    for epoch in range(2):
        each = [1 - cosine_distance(eq13[epoch, q], estimate[q, [2, 0, 9, 4]].double().numpy()) for q in range(3)]
        assert float(curve.mean[epoch]) == pytest.approx(np.mean(each), abs=1e-12)
        assert float(curve.sem[epoch]) == pytest.approx(np.std(each, ddof=1) / 3**0.5, abs=1e-12)
    by_epoch = result.cosine(result.gold(17) * 7, epochs=None)
    assert torch.allclose(by_epoch.mean, torch.ones(2).double())
    assert result.cosine(scores, epochs=[2]).epochs == [2]
    assert torch.equal(result.rates, torch.tensor([[0.5, 1.0], [1.0, 2.0]]).double())
    with pytest.raises(ValueError, match="13 or 17"):
        result.gold(12)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="were not scored"):
        result.cosine(InfluenceScores(estimate[:, :4], torch.arange(4), torch.arange(3)))
    with pytest.raises(ValueError, match="10 columns for 4"):
        result.cosine(estimate)


def test_results_survive_the_disk(tmp_path):
    result = result_of()
    result.save(tmp_path / "r.safetensors")
    again = FurtherTraining.load(tmp_path / "r.safetensors")
    assert torch.equal(again.left_out, result.left_out)
    assert torch.equal(again.gold(13), result.gold(13))
    assert (again.leave_out, again.seeds, again.metadata) == (result.leave_out, result.seeds, result.metadata)
    InfluenceScores(torch.zeros(1, 1), torch.zeros(1), torch.zeros(1)).save(tmp_path / "s.safetensors")
    with pytest.raises(MisconfigurationException, match="no further training"):
        FurtherTraining.load(tmp_path / "s.safetensors")


def test_rates_are_effective():
    module, train, query = problem("cross_entropy")
    options: dict[str, Any] = {"leave_out": [0], "epochs": 2, "seeds": 1, "batch_size": 4}
    found = further_training(module, train, query, optimizer=sgd(0.01, momentum=0.9), **options)
    # 15 examples in batches of 4 are 4 steps; momentum 0.9 moves ten times as far.
    assert torch.allclose(found.rates, torch.tensor([[0.4], [0.8]]).double())
    assert found.metadata["removal"] == "downweight"

    unknown = further_training(module, train, query, optimizer=lambda p: torch.optim.Adamax(p, lr=0.01), **options)
    with pytest.raises(MisconfigurationException, match="`Adamax` is not known"):
        _ = unknown.rates


# ---------------------------------------------------------------- the metric, the table and the plot


def test_the_metric_is_scipys_cosine():
    generator = torch.Generator().manual_seed(0)
    gold, scores = torch.randn(2, 6, 20, generator=generator)
    metric = FinalModelCosine(controls=500)
    metric.update(gold[:2], scores[:2])
    metric.update(gold[2:], 1e-30 * scores[2:])  # the scale of an estimate is nothing
    found = metric.compute()
    each = [1 - cosine_distance(gold[q].double(), scores[q].double()) for q in range(6)]
    assert float(found["cosine"]) == pytest.approx(np.mean(each), abs=1e-7)
    assert float(found["sem"]) == pytest.approx(np.std(each, ddof=1) / 6**0.5, abs=1e-7)
    # Cosines of random directions have mean 0 and variance 1/20: the mean of 3,000 has deviation 0.004.
    assert abs(float(found["control"])) < 0.017
    metric.reset()
    metric.update(gold, gold)
    assert float(metric.compute()["cosine"]) == pytest.approx(1, abs=1e-12)


def test_cosines_of_what_has_no_direction():
    assert cosine_by_query(torch.ones(1, 3), torch.zeros(1, 3)).tolist() == [0]
    with pytest.raises(ValueError, match="not finite"):
        cosine_by_query(torch.ones(1, 3), torch.tensor([[1.0, float("nan"), 0]]))
    with pytest.raises(ValueError, match="same queries"):
        cosine_by_query(torch.ones(1, 3), torch.ones(1, 4))
    with pytest.raises(ValueError, match="at least 1"):
        FinalModelCosine(controls=0)


def test_tables_and_plots(tmp_path):
    curves = {
        "a": CosineCurve([1, 5], torch.tensor([0.5, 0.25]), torch.tensor([0.1, 0.2])),
        "b": CosineCurve([1, 5], torch.tensor([0.125, 0.0]), torch.tensor([0.0, 0.0])),
    }
    assert curve_rows(curves)[1] == {"method": "a", "epoch": 5, "cosine": 0.25, "sem": 0.2}
    write_curves(tmp_path / "c.csv", curves)
    assert (tmp_path / "c.csv").read_text().splitlines()[:2] == ["method,epoch,cosine,sem", "a,1,0.5,0.1"]
    write_curves(tmp_path / "c.json", curves, {"seeds": 3})
    assert json.loads((tmp_path / "c.json").read_text()) == {"seeds": 3, "curves": curve_rows(curves)}
    with pytest.raises(ValueError, match=r"\.csv or \.json"):
        write_curves(tmp_path / "c.txt", curves)
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    ax = plot_curves([1, 5], {k: c.mean for k, c in curves.items()}, {"a": curves["a"].sem})
    assert [line.get_ydata()[0] for line in ax.get_lines()[:2]] == [0.5, 0.125]
    assert len(ax.collections) == 1
    assert plot_curves([1, 5], {"a": [0, 1]}, {}, ax) is ax


# ---------------------------------------------------------------- refusals


def test_wrong_set_ups_are_named():
    module, train, query = problem("cross_entropy")
    good: dict[str, Any] = {"leave_out": [0], "epochs": 1, "seeds": 1, "batch_size": 4}
    for change, message in (
        ({"removal": "drop"}, r'`removal="drop"` is not known. HINT'),
        ({"mode": "test"}, r'`mode="test"` is not known'),
        ({"measurement": "accuracy"}, "measurement='accuracy'` is not known"),
        ({"measurement": "margin", "loss": Weighted.each}, "beside `loss=`"),
        ({"epochs": 0}, "`epochs=0` must be at least 1"),
        ({"batch_size": None}, "batch size .* is not known. HINT"),
        ({"leave_out": [15]}, "some of the 15 training examples, 0 to 14"),
        ({"leave_out": [1, 1]}, "none twice"),
        ({"seeds": [1, 1]}, "none twice"),
        ({"optimizer": lambda p: [torch.optim.SGD(p)]}, "got a list. HINT: pass `optimizer="),
        (
            {"loss": lambda m, b: m.net(b[0]), "measurement": lambda m, b: m.net(b[0])[:, 0]},
            r"a tensor \[\d+\]; it returned",
        ),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            further_training(module, train, query, **(good | change))
    norm = Classifier(nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))).double()
    with pytest.raises(MisconfigurationException, match=r"`net\.1` normalises by the batch.*HINT"):
        further_training(norm, train, query, mode="train", **good)
    whole = Classifier(mlp(), lambda o, t: (o.exp().sum(1).log() - o[range(len(t)), t]).mean()).double()
    with pytest.raises(MisconfigurationException, match=r'`removal="mask"` needs the losses of single examples.*HINT'):
        further_training(whole, train, TensorDataset(*query), removal="mask", **good)
    with pytest.raises(FloatingPointError, match=r"all examples with seed 0 diverged\. HINT"):
        further_training(module, train, query, optimizer=sgd(1e300), **good)


def test_a_loss_that_is_only_known_as_a_whole():
    """The rules of leaving out that look at no part of a batch's loss do without its parts."""
    _, train, query = problem("cross_entropy")
    whole = Classifier(mlp(), lambda o, t: (o.exp().sum(1).log() - o[range(len(t)), t]).mean()).double()
    known = Classifier(whole.net).double()
    for removal, queries in (("downweight", TensorDataset(*query)), ("shift", query)):
        options: dict[str, Any] = {"leave_out": [0], "epochs": 2, "seeds": 1, "batch_size": 4, "removal": removal}
        found, expected = (further_training(m, train, queries, **options) for m in (whole, known))
        assert close(found.gold(), expected.gold(), 1e-9)


def test_a_loader_knows_its_batch_size():
    module, train, query = problem("cross_entropy")
    options: dict[str, Any] = {"leave_out": [0], "epochs": 1, "seeds": 1}
    one = further_training(module, DataLoader(train, 4, shuffle=True), TensorDataset(*query), **options)
    other = further_training(module, train, query, batch_size=4, **options)
    assert torch.equal(one.left_out, other.left_out)
