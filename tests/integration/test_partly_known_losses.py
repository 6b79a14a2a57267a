"""Losses that are torch's in part: what stands beside them counts, in batches where their rows hold it by example.

The oracle is autograd on one example's loss at a time. Scores of ``"grad-dot"`` are compared up to one factor, the sum
of learning rates over the number of examples.
"""

import re
import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, classes, gradient_rows, mlp, quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_source import SourceCallback

SINGLES = [(x[None], y[None]) for x, y in classes()]


def rows(module: L.LightningModule, loss) -> Tensor:
    """Gradients ``[N, scalars]`` of single examples' losses."""
    return gradient_rows((loss(module, *example) for example in SINGLES), [*module.parameters()])


def scored(tmp_path, loss, match: str | None = "none of torch's"):
    """A trained module and its scores of the training examples on each other; training is bit-identical."""

    class Module(Classifier):
        def training_step(self, batch, batch_idx):
            return loss(self, *batch)

    def trained(*callbacks):
        torch.manual_seed(0)
        module, trainer = Module(mlp()), quiet_trainer(tmp_path, *callbacks, max_epochs=3)
        trainer.fit(module, DataLoader(classes(), 8))
        return module, trainer

    alone, _ = trained()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        module, trainer = trained(SourceCallback(str(tmp_path / "run")))
    said = " ".join(str(warning.message) for warning in seen)
    assert re.search(match, said) if match else "one at a time" not in said
    assert all(torch.equal(p, q) for p, q in zip(alone.parameters(), module.parameters(), strict=True))
    return module, trainer.attribute(list(classes().tensors), method="grad-dot").values, trainer


def off(scores: Tensor, expected: Tensor) -> float:
    factor = (scores * expected).sum() / expected.square().sum()
    return float((scores / factor - expected).norm() / expected.norm())


def known(module, x, y):
    return F.cross_entropy(module.net(x), y)


def hidden(module, x):
    return module.net[0](x).square().sum(1)


def on_gradients(weight):
    """A penalty that is differentiated through the layers' gradients, not through their outputs alone."""

    def loss(module, x, y):
        inputs = x.clone().requires_grad_(True)
        outputs = module.net(inputs)
        (gradient,) = torch.autograd.grad(outputs.logsumexp(1).sum(), inputs, create_graph=True)
        return F.cross_entropy(outputs, y) + weight * gradient.square().sum(1).mean()

    return loss


def between_passes(module, x, y):
    """Two passes over other views of an example must agree, by a divergence whose target has a gradient as well."""
    one, other = (module.net(scale * x).log_softmax(1) for scale in (1, 0.8))
    return F.nll_loss(one, y) + 0.5 * F.kl_div(one, other, log_target=True, reduction="batchmean")


def of_another_pass(module, x, y):
    """The layers run once more for what no recognised loss sees."""
    return known(module, x, y) + 0.03 * module.net(0.5 * x).exp().sum(1).mean()


@pytest.mark.check("loss", "a penalty beside a recognised loss", "scores of the whole loss")
@pytest.mark.parametrize(
    ("loss", "in_the_end", "match"),
    [
        (lambda m, x, y: known(m, x, y) + 0.2 * hidden(m, x).mean(), None, None),
        (lambda m, x, y: known(m, x, y) + 0.002 * hidden(m, x).mean(), None, None),
        (
            lambda m, x, y: known(m, x, y) + 0.1 * m.current_epoch * hidden(m, x).mean(),
            lambda m, x, y: known(m, x, y) + 0.1 * 2 * hidden(m, x).mean(),
            None,
        ),
        (between_passes, None, None),
        (of_another_pass, None, None),
        (on_gradients(3), None, "none of torch's"),
        (on_gradients(1), None, "none of torch's"),
        (on_gradients(0.1), None, "none of torch's"),
    ],
    ids=[
        "on a layer",
        "small",
        "annealed",
        "between passes",
        "another pass",
        "on gradients",
        "a third of it",
        "small on gradients",
    ],
)
def test_what_stands_beside_a_known_loss_counts(tmp_path, loss, in_the_end, match):
    """Examples are run one at a time only where no batch tells what each of them adds."""
    module, scores, trainer = scored(tmp_path, loss, match)
    gradients = rows(module, in_the_end or loss)
    assert off(scores, gradients @ gradients.T) < 1e-5
    assert trainer.attribute(list(classes().tensors)).values.isfinite().all()


def test_a_penalty_that_is_a_sum_weighs_as_in_training(tmp_path):
    """A batch of 8 has the mean of 8 losses and the sum of 8 penalties; a query is a batch of one."""
    loss = lambda m, x, y: known(m, x, y) + 0.05 * hidden(m, x).sum()  # noqa: E731
    module, scores, _ = scored(tmp_path, loss, match=None)
    trained = rows(module, known) + 8 * rows(module, lambda m, x, y: 0.05 * hidden(m, x).sum())
    assert off(scores, rows(module, loss) @ trained.T) < 1e-5


def test_a_penalty_of_the_weights_belongs_to_no_example(tmp_path, recwarn):
    """Alone it costs nothing; beside another one it stays out of the examples' gradients."""
    weights = lambda m: 0.1 * sum(p.square().sum() for p in m.parameters())  # noqa: E731
    module, scores, _ = scored(tmp_path / "a", lambda m, x, y: known(m, x, y) + weights(m), match=None)
    gradients = rows(module, known)
    assert off(scores, gradients @ gradients.T) < 1e-5
    assert not [w for w in recwarn if "one at a time" in str(w.message)]
    both = lambda m, x, y: known(m, x, y) + 0.2 * hidden(m, x).mean()  # noqa: E731
    module, scores, _ = scored(tmp_path / "b", lambda m, x, y: both(m, x, y) + weights(m), match=None)
    gradients = rows(module, both)
    assert off(scores, gradients @ gradients.T) < 1e-5


def test_a_penalty_that_couples_examples_is_named_and_left_out(tmp_path):
    def loss(module, x, y):
        features = F.normalize(module.net[0](x), dim=1)
        return known(module, x, y) + (features @ features.T / 0.1).logsumexp(1).mean()

    module, scores, _ = scored(tmp_path, loss, match="no score counts it, since .* depends on the other examples")
    gradients = rows(module, known)
    assert off(scores, gradients @ gradients.T) < 1e-5


def test_a_step_that_mixes_examples_is_named(tmp_path):
    def mixed(module, x, y):
        partners = torch.randperm(len(x))
        outputs = module.net(0.7 * x + 0.3 * x[partners])
        return 0.7 * F.cross_entropy(outputs, y) + 0.3 * F.cross_entropy(outputs, y[partners])

    _, scores, _ = scored(tmp_path, mixed, match=r"draws other examples of the batch .*mixup")
    assert scores.isfinite().all()


def test_noise_of_an_example_of_its_own_is_not_taken_for_mixing(tmp_path, recwarn):
    scored(tmp_path, lambda m, x, y: known(m, x + 0.1 * torch.randn_like(x), y), match=None)
    assert not [w for w in recwarn if "mixup" in str(w.message)]
