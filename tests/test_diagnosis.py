"""What a run's health says, and that NaN never passes for a score."""

import pytest
import torch
import torch.nn.functional as F
from helpers import QUERY, Classifier, classes, fitted, mlp, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_source import SourceCallback, SourceScorer


def scorer_of(tmp_path, module):
    return SourceScorer.from_run(str(tmp_path / "run"), module)


def test_nothing_speaks_against_a_plain_run(tmp_path):
    fitted(tmp_path, data=classes(120), max_epochs=5)
    diagnosis = scorer_of(tmp_path, Classifier(mlp())).diagnose(classes(120))
    assert diagnosis.trustworthy
    assert {finding.severity for finding in diagnosis.findings} == {"note"}
    (blocks,) = diagnosis.segments
    assert [block.name for block in blocks] == ["net.0", "net.2"]
    assert "Nothing speaks against these scores" in str(diagnosis)


def test_saturation_and_rank_are_those_of_the_factors(tmp_path):
    """By hand from the eigenvalues on disk."""
    trainer = fitted(tmp_path, data=classes(120), max_epochs=5)
    scorer = scorer_of(tmp_path, Classifier(mlp()))
    (blocks,) = scorer.diagnose(classes(120)).segments
    (segment,) = scorer.run.segments()
    factors = scorer.run.snapshot_factors(segment)
    rate = 0.1 * trainer.global_step
    for block in blocks:
        values = factors[block.name].eigenvalues
        assert block.saturated_share == float((rate * values > 1).double().mean())
        assert block.largest == float(values.max())
        assert block.zero_share == float((values <= 1e-7 * values.max()).double().mean())


class SeesTheBatch(Classifier):
    """Each example's loss depends on the others, by less than what is refused."""

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return F.cross_entropy(self.net(inputs + 0.003 * inputs.mean(0)), targets)


def test_examples_that_see_each_other_are_told(tmp_path):
    fitted(tmp_path, SeesTheBatch(mlp()), data=classes(120))
    diagnosis = scorer_of(tmp_path, SeesTheBatch(mlp())).diagnose(classes(120))
    assert not diagnosis.trustworthy or any("one at a time" in f.message for f in diagnosis.findings)


def test_what_the_record_lacks_is_told(tmp_path):
    fitted(tmp_path, data=classes(24), exclude=["net.0"])
    diagnosis = scorer_of(tmp_path, Classifier(mlp())).diagnose(classes(24))
    messages = " ".join(finding.message for finding in diagnosis.findings)
    assert "34.0% of the trained parameters are attributed" in messages
    assert "curvature is an average over 24 examples only" in messages
    assert not diagnosis.trustworthy


class Dead(nn.Sequential):
    """A layer whose output counts for nothing."""

    def __init__(self):
        super().__init__(nn.Linear(6, 5), nn.Linear(6, 3))

    def forward(self, inputs):
        return self[1](inputs) + 0.0 * self[0](inputs).sum()


def test_a_layer_that_sees_no_gradient_is_named(tmp_path):
    fitted(tmp_path, Classifier(Dead()), data=classes(120))
    diagnosis = scorer_of(tmp_path, Classifier(Dead())).diagnose(classes(120))
    assert any("no factor example has a gradient at `net.0`" in f.message for f in diagnosis.findings)


# ---------------------------------------------------------------- diverged


def diverging():
    net = nn.Linear(6, 1)
    return Classifier(net, lambda outputs, targets: F.mse_loss(outputs[:, 0], targets.float()))


@pytest.mark.parametrize("method", ["source", "influence", "grad-dot", "trak"])
def test_a_run_that_diverged_is_refused_with_the_reason(tmp_path, method):
    module = diverging()
    module.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=3.0)
    trainer = fitted(tmp_path, module, max_epochs=4)
    assert module.net.weight.isfinite().all()
    with pytest.raises(FloatingPointError, match="record of a training that diverged"):
        trainer.attribute(QUERY, method=method)
    with pytest.raises(FloatingPointError, match="record of a training that diverged"):
        scorer_of(tmp_path, diverging()).self_influence(classes())
    diagnosis = scorer_of(tmp_path, diverging()).diagnose(classes())
    assert not diagnosis.trustworthy
    assert "training diverged: its loss went from" in str(diagnosis)


# ---------------------------------------------------------------- NaN


class Root(nn.Module):
    """A square root, whose infinite derivative at 0 makes NaN of what is multiplied by 0, under a finite loss."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, inputs):
        return self.linear(inputs) * (
            1 + 0 * (self.linear(inputs) * inputs[:, :1]).square().sum(1, keepdim=True).sqrt()
        )


def with_a_bad_example(count=24):
    inputs, targets = classes(count).tensors
    inputs = inputs.clone()
    inputs[7] = 0.0
    return TensorDataset(inputs, targets)


METHODS = ("source", "fast-source", "influence", "tracin", "grad-dot", "grad-cos", "trak", "datainf", "influence-cg")


@pytest.fixture(scope="module")
def rooted(tmp_path_factory):
    """A run on good examples, asked about one whose gradient is NaN."""
    path = tmp_path_factory.mktemp("rooted")
    source = SourceCallback(str(path / "run"), mode="deferred", factor_examples=None)
    quiet_trainer(path, source).fit(Classifier(Root()), DataLoader(classes(), 8))
    return path


@pytest.mark.parametrize("method", METHODS)
def test_an_example_with_a_nan_gradient_is_named(rooted, method):
    scorer = scorer_of(rooted, Classifier(Root()))
    scorer.score(QUERY, classes(), method=method)  # factors of good examples
    # Products with the exact matrix know the batch alone, here of examples 0 to 7.
    named = r"examples 0, 1, 2, 3, 4 and 3 more" if method == "influence-cg" else r"examples 7\b"
    with pytest.raises(FloatingPointError, match=named):
        scorer_of(rooted, Classifier(Root())).score(QUERY, with_a_bad_example(), method=method)


def test_a_nan_self_influence_is_named(rooted):
    scorer_of(rooted, Classifier(Root())).self_influence(classes())
    with pytest.raises(FloatingPointError, match=r"gradients of examples 7 at `net\.linear`"):
        scorer_of(rooted, Classifier(Root())).self_influence(with_a_bad_example())


def test_a_query_with_a_nan_gradient_is_named(rooted):
    inputs, targets = (tensor.clone() for tensor in QUERY)
    inputs[2] = 0.0
    with pytest.raises(FloatingPointError, match=r"query gradients at `net\.linear`, of queries 2, at the"):
        scorer_of(rooted, Classifier(Root())).score([inputs, targets], classes(), query_at="final")


class Aside(nn.Module):
    """A layer beside, whose input divides by a feature and whose output counts for nothing."""

    def __init__(self):
        super().__init__()
        self.head, self.side = nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, inputs):
        self.side(inputs / inputs[:, :1])
        return self.head(inputs)


def test_a_representation_that_is_not_finite_is_named(tmp_path):
    fitted(tmp_path, Classifier(Aside()))
    scorer = scorer_of(tmp_path, Classifier(Aside()))
    inputs, targets = classes().tensors
    bad = inputs.clone()
    bad[3, 0] = 0.0
    scorer.score(QUERY, classes(), method="repsim", module="net.side")
    with pytest.raises(FloatingPointError, match=r"input of `net\.side` on examples 3, at the end of training"):
        scorer.score(QUERY, TensorDataset(bad, targets), method="repsim", module="net.side")
