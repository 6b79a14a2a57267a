"""The worked examples of CONTRIBUTING.md, each saved as the one file that it is, imported and used."""

import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from code_blocks import blocks_of
from helpers import Classifier, classes, fitted, mlp
from layers.oracle import compare, floats
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_source.capture import loss_calls
from lightning_source.estimators import registry as estimators
from lightning_source.layers import contract
from lightning_source.layers import registry as layers
from lightning_source.optimizers import _RULES, rule_for
from lightning_source.passes.gauss_newton import GaussNewton
from lightning_source.recording.step_log import StepLog

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
# Of each section by the last word of its heading, the first block of Python.
EXAMPLES = {
    section.splitlines()[0].split()[-1]: blocks_of(section)[0].code
    for section in re.split(r"^##+ ", PAGE, flags=re.MULTILINE)
    if section.startswith("Add a")
}
REGISTRIES = (contract.forms_by_name, layers._FORMS, _RULES, estimators._ESTIMATORS, loss_calls._READERS)
QUERY = [x[:4] for x in classes(8, seed=2).tensors]


@contextmanager
def importing(folder: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Imports the example of a kind of extension from a folder; what it registers is forgotten at the end."""
    with ExitStack() as stack:
        for registry in REGISTRIES:
            stack.enter_context(mock.patch.dict(registry))
        stack.enter_context(mock.patch.object(sys, "path", [str(folder), *sys.path]))

        def imported(kind: str) -> ModuleType:
            name = f"contributed_{kind}"
            (folder / f"{name}.py").write_text(EXAMPLES[kind], encoding="utf-8")
            importlib.invalidate_caches()
            stack.callback(sys.modules.pop, name)
            return importlib.import_module(name)

        yield imported


@pytest.fixture
def example(tmp_path):
    with importing(tmp_path) as imported:
        yield imported


def steps_of(path: Path) -> StepLog:
    return StepLog(load_file(path / "run" / "steps.safetensors")["steps"])


def close(actual: Tensor, expected: Tensor, share: float) -> None:
    """Equal to a share of the largest entry."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=share * float(expected.abs().max()))


def test_there_is_an_example_of_each_kind():
    assert list(EXAMPLES) == ["layer", "optimizer", "estimator", "measurement", "loss"]


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")])
def test_the_examples_follow_the_style(tmp_path, arguments):
    for kind, text in EXAMPLES.items():
        (tmp_path / f"{kind}.py").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "ruff", *arguments, "--config", REPOSITORY / "pyproject.toml", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_files_and_tests_that_the_page_cites_exist():
    links = {link for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGE)}
    paths = set(re.findall(r"`((?:tests|docs|benchmarks|lightning_source|\.ci)/[\w./]+)`", PAGE))
    inside = set(re.findall(r"`((?:layers|estimators|capture|recording)/[\w.]*|optimizers\.py)`", PAGE))
    assert links
    assert paths
    assert inside
    assert {path for path in links | paths if not (REPOSITORY / path).exists()} == set()
    assert {path for path in inside if not (REPOSITORY / "lightning_source" / path).exists()} == set()
    defined = "\n".join(path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    assert {name for name in re.findall(r"\b(test_\w+)\b(?!\.py)", PAGE) if f"def {name}(" not in defined} == set()


# ---------------------------------------------------------------- a layer


@pytest.mark.parametrize("shape", [(6,), (3, 6)])
def test_an_added_layer_has_the_gradients_of_single_examples(example, shape):
    circulant = example("layer")
    coverage = compare(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), circulant.Circulant(5), nn.Tanh()), floats(*shape))
    assert {block.name: block.form for block in coverage.blocks}["net.2"] == "CirculantForm"


def test_an_added_layer_is_a_circulant_matrix(example):
    layer, inputs = example("layer").Circulant(5), torch.randn(2, 5)
    matrix = torch.stack([torch.stack([layer.weight[(i - j) % 5] for j in range(5)]) for i in range(5)])
    torch.testing.assert_close(layer(inputs), inputs @ matrix.T)


def test_a_run_with_an_added_layer_is_attributed_whole(example, tmp_path):
    circulant = example("layer")
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), circulant.Circulant(5), nn.Tanh(), nn.Linear(5, 3))
    scores = fitted(tmp_path, Classifier(net)).attribute(QUERY)
    assert scores.metadata["coverage"] == 1
    assert scores.values.isfinite().all()
    assert scores.values.abs().min() > 0


# ---------------------------------------------------------------- an optimizer


def test_recorded_rates_of_an_added_optimizer_are_what_its_steps_did(example, tmp_path):
    """Without momentum a step is exactly the rate times gradient and decay; the rate is changed on the way."""
    kind = example("optimizer").AveragedSGD
    starts, directions = [], []

    class Watched(Classifier):
        def on_before_optimizer_step(self, optimizer):
            starts.append(torch.cat([p.detach().flatten() for p in self.parameters()]))
            directions.append(torch.cat([p.grad.flatten() for p in self.parameters()]) + 0.3 * starts[-1])

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.optimizers().param_groups[0]["lr"] *= 0.8

    trainer = fitted(tmp_path, Watched(mlp(), optimizer=lambda p: kind(p, 0.1, momentum=0.0, weight_decay=0.3)))
    ends = [*starts[1:], torch.cat([p.detach().flatten() for p in trainer.lightning_module.parameters()])]
    log = steps_of(tmp_path)
    assert log.effective_rate.shape == (len(starts), 1) == (6, 1)
    torch.testing.assert_close(log.effective_rate[:, 0], 0.1 * 0.8 ** torch.arange(6, dtype=torch.float64))
    assert (log.decay == 0.3).all()
    for rate, start, end, direction in zip(log.effective_rate, starts, ends, directions, strict=True):
        close(start - end, rate * direction, 1e-5)  # float32


def test_the_rule_of_an_added_optimizer_is_its_terminal_velocity(example):
    """300 steps of a constant gradient leave 0.9 ** 300, about 2e-14, of the way to the terminal velocity."""
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = example("optimizer").AveragedSGD([parameter], lr=0.1)
    gradient = torch.randn(4, dtype=torch.float64)
    for _ in range(300):
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        optimizer.step()
    rule = rule_for(optimizer)(optimizer.param_groups[0])
    torch.testing.assert_close(before - parameter.detach(), rule.rate_multiplier * 0.1 * gradient)


def test_an_added_optimizer_that_is_sgd_in_disguise_has_its_scores(example, tmp_path):
    """A mean of gradients at a rate is a sum of them at ``1 - β`` of that rate."""
    kind = example("optimizer").AveragedSGD
    runs = {
        "own": lambda parameters: kind(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.01),
    }
    scores = {}
    for name, optimizer in runs.items():
        torch.manual_seed(3)
        scores[name] = fitted(tmp_path / name, Classifier(mlp(), optimizer=optimizer)).attribute(QUERY).values
    own, sgd = (steps_of(tmp_path / name) for name in runs)
    torch.testing.assert_close(own.effective_rate, sgd.effective_rate)
    assert torch.equal(own.decay, sgd.decay)
    assert scores["own"].isfinite().all()
    close(scores["own"], scores["sgd"], 1e-4)  # two trainings in float32, in another order of operations


# ---------------------------------------------------------------- an estimator


def of_last_layer(net: nn.Sequential, inputs: Tensor, targets: Tensor) -> Tensor:
    """The gradients of single examples' cross entropy, ``[B, O, I + 1]``: ``(p - y) (h, 1)ᵀ``."""
    hidden = net[:-1](inputs)
    slopes = net(inputs).softmax(1) - F.one_hot(targets, 3)
    return slopes.unsqueeze(2) * torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1).unsqueeze(1)


def test_an_added_estimator_has_its_closed_form(example, tmp_path):
    example("estimator")
    trainer = fitted(tmp_path, Classifier(mlp()))
    scores = trainer.attribute(QUERY, method="last-layers")
    net = trainer.lightning_module.net
    with torch.no_grad():
        queries, examples = (of_last_layer(net, *tensors).flatten(1) for tensors in (QUERY, classes().tensors))
    close(scores.values, queries @ examples.T / len(examples), 1e-5)
    assert scores.metadata["unit"] == "gradient product"


def test_an_added_estimators_option_takes_all_layers(example, tmp_path):
    """Over all layers it is the package's own dot product without its one rate."""
    example("estimator")
    trainer = fitted(tmp_path, Classifier(mlp()))
    both = trainer.attribute(QUERY, method="last-layers", layers=2).values
    rate = float(steps_of(tmp_path).effective_rate.sum())
    close(rate * both, trainer.attribute(QUERY, method="grad-dot").values, 1e-5)
    assert not torch.allclose(both, trainer.attribute(QUERY, method="last-layers").values, rtol=0.01)
    with pytest.raises(MisconfigurationException, match=r"takes no option `blocks`.*its options are `layers`"):
        trainer.attribute(QUERY, method="last-layers", blocks=2)


# ---------------------------------------------------------------- a measurement


def test_an_added_measurements_scores_are_finite_differences(example, tmp_path):
    """The gradient product is the measurement's slope along an example's gradient, here by a step of 1e-5 each way."""
    entropy = example("measurement").entropy
    data, query = (TensorDataset(x[:n].double(), y[:n]) for (x, y), n in ((classes().tensors, 6), (QUERY, 4)))
    trainer = fitted(tmp_path, Classifier(mlp().double()), data, batch_size=3, max_epochs=4)
    batch = list(query.tensors)
    scores = trainer.attribute(batch, measurement=entropy, method="grad-dot").values
    module = trainer.lightning_module
    rate, parameters = float(steps_of(tmp_path).effective_rate.sum()), list(module.parameters())
    columns = []
    for inputs, target in data:
        gradients = torch.autograd.grad(module.training_step((inputs[None], target[None]), 0), parameters)
        values = []
        for step in (1e-5, -2e-5, 1e-5):  # ahead, behind, and back where it was
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter += step * gradient
                values.append(entropy(module, batch))
        columns.append((values[0] - values[1]) / 2e-5)
    close(scores, rate / len(data) * torch.stack(columns, 1), 1e-4)
    assert (scores < 0).any()
    assert (scores > 0).any()


# ---------------------------------------------------------------- a loss


def of_loss(path: Path, loss: Callable[..., Tensor]):
    """A linear regression under a loss, trained on 100 examples of 2 outputs, and its examples."""
    data = TensorDataset(torch.randn(100, 3), 3 * torch.randn(100, 2))
    return fitted(path, Classifier(nn.Linear(3, 2), loss), data, batch_size=100), data


def test_the_added_losses_values_are_the_formulas(example):
    log_cosh = example("loss").log_cosh
    outputs, targets = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    elements = (outputs - targets).cosh().log()
    torch.testing.assert_close(log_cosh(outputs, targets), elements.mean())
    torch.testing.assert_close(log_cosh(outputs, targets, reduction="sum"), elements.sum())
    torch.testing.assert_close(log_cosh(100 * outputs, 0 * targets, "none").isfinite().all(), torch.tensor(True))


def test_an_added_loss_is_recognised_and_its_fisher_is_its_gauss_newton_matrix(example, tmp_path):
    """Sampled labels against exact products, and both against the closed form.

    For a linear network under a mean over 2 outputs, each row's matrix is ``1/2 · 1/2 · E[(x, 1) (x, 1)ᵀ]``. The mean
    over 200 draws of 100 examples must lie within 5 of its own standard errors.
    """
    trainer, data = of_loss(tmp_path, example("loss").log_cosh)
    inputs = torch.cat([data.tensors[0], torch.ones(100, 1)], 1)
    expected = torch.kron(torch.eye(2), inputs.T @ inputs / 100 / 4)
    with trainer.callbacks[0].scorer(trainer) as scorer:
        run = scorer.run
        run.calibrate()
        spec = run.workspace.spec
        assert (spec.origin, spec.fisher, [call.name for call in spec.calls]) == ("recognised", "true", ["log_cosh"])
        matrix = GaussNewton(run.workspace, run.data, run.final)
        close(matrix(torch.eye(matrix.layout.width)), expected, 1e-5)
        products = []
        with run.workspace.at(run.final()):
            for draw in range(200):
                ((_, captured),) = run.workspace.captures(run.data, run.workspace.sampled(draw), range(100))
                rows = captured["net"].per_example()[0].flatten(1)
                products.append(rows.T @ rows / 100)
    draws = torch.stack(products)
    error = 5 * draws.std(0) / len(draws) ** 0.5
    assert error.max() < 0.1 * expected.max()
    assert ((draws.mean(0) - expected).abs() <= error).all()


def test_an_added_loss_needs_neither_the_empirical_fisher_nor_its_warning(example, tmp_path, recwarn):
    log_cosh = example("loss").log_cosh
    trainer, data = of_loss(tmp_path / "own", log_cosh)
    query = [x[:3] for x in data.tensors]
    scores = trainer.attribute(query, measurement="log-prob")
    assert scores.values.isfinite().all()
    assert scores.values.abs().max() > 0
    assert not [w for w in recwarn if "empirical" in str(w.message)]
    with pytest.warns(UserWarning, match="empirical Fisher"):
        of_loss(tmp_path / "unseen", log_cosh.__wrapped__)


# ---------------------------------------------------------------- what the tests leave behind


def test_nothing_stays_registered(tmp_path):
    before = [dict(registry) for registry in REGISTRIES]
    with importing(tmp_path) as imported:
        for kind in EXAMPLES:
            imported(kind)
        assert all(len(registry) == len(old) + 1 for registry, old in zip(REGISTRIES, before, strict=True))
    assert [dict(registry) for registry in REGISTRIES] == before
    assert not [name for name in sys.modules if name.startswith("contributed_")]
