"""Passes call a network as it was trained: in eval mode where that is the same, else in quiet training mode."""

import pytest
import torch
import torch.nn.functional as F
from helpers import AuxiliaryHead, Classifier, classes, fitted, gradient_rows, mlp
from torch import nn

from lightning_source import SourceScorer
from lightning_source.capture.isolation import undisturbed
from lightning_source.capture.modes import PassMode, Seen, choose_mode, in_mode
from lightning_source.capture.objective import Objective
from lightning_source.recording.store import RunStore

QUERY = [x[:4] for x in classes(8, seed=2).tensors]


class Margin(AuxiliaryHead):
    """A larger temperature in training mode: the same losses, of another size."""

    def forward(self, x):
        return [self.head(torch.tanh(self.body(x))) * (4.0 if self.training else 1.0)]


class Noisy(AuxiliaryHead):
    """Skips its hidden layer for some examples in training mode, as stochastic depth does."""

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        if self.training:
            hidden = hidden * torch.empty(len(x), 1).bernoulli_(0.5)
        return [self.head(hidden)]


class AlwaysDropping(AuxiliaryHead):
    def forward(self, x):
        return [self.head(F.dropout(torch.tanh(self.body(x)), 0.5))]


class Predicting(AuxiliaryHead):
    """Losses in training mode, predictions in eval mode, as detection models give them."""

    def forward(self, x, y=None):
        outputs = super().forward(x)
        if not self.training:
            return [{"labels": outputs[0].argmax(1)}]
        return {name: F.cross_entropy(output, y) for name, output in zip("ab", outputs, strict=True)}


class Detecting(Classifier):
    def training_step(self, batch, batch_idx):
        return sum(self.net(*batch).values())


class Heads(Classifier):
    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return sum(w * F.cross_entropy(o, targets) for w, o in zip((1.0, 0.5), self.net(inputs), strict=False))


class Neither(Classifier):
    def training_step(self, batch, batch_idx):
        raise KeyError("training" if self.training else "eval")


class EvalOnly(Classifier):
    def training_step(self, batch, batch_idx):
        if self.training:
            raise KeyError("training")
        return super().training_step(batch, batch_idx)


def chosen(module):
    objective = Objective(module)

    def evaluate():
        losses = objective.evaluate([x.clone() for x in classes().tensors], len(classes()))
        return Seen(tuple(call.name for call in losses.calls), float(losses.loss.detach()))

    torch.manual_seed(0)
    with undisturbed(module):
        return choose_mode(module, evaluate)


@pytest.mark.parametrize(
    ("module", "mode"),
    [
        (lambda: Classifier(mlp()), "eval"),
        (lambda: Classifier(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3))), "eval"),
        (lambda: Heads(AuxiliaryHead()), "train"),
        (lambda: Heads(Margin()), "train"),
        (lambda: Heads(Noisy()), "eval"),
        (lambda: Heads(AlwaysDropping()), "eval"),
        (lambda: Detecting(Predicting()), "train"),
        (lambda: EvalOnly(mlp()), "eval"),
    ],
    ids=["plain", "noise that is switched off", "heads", "margin", "noise", "always noise", "losses", "eval only"],
)
def test_the_mode_is_the_one_that_was_trained(module, mode):
    assert chosen(module()) == mode


def test_the_error_of_training_mode_comes_through():
    with pytest.raises(KeyError, match="training"):
        chosen(Neither(mlp()))


def test_modules_that_training_keeps_in_eval_mode_stay_so():
    network = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 5), nn.Dropout()), nn.Dropout())
    network[0].eval()
    with in_mode(network, PassMode("train", evaluating=("1.0", "gone"))):
        assert network.training
        assert network[0].training  # what passes are told counts, not what the module is now
        assert not network[1][0].training
        assert not network[1][1].training  # quiet
    assert not network[0].training
    assert network[1][1].training


def oracle(module):
    """Products of the gradients of single examples in training mode."""
    module.train()
    parameters = [
        p for name, p in module.named_parameters() if type(module.net) is AuxiliaryHead or "second" not in name
    ]

    def rows(examples):
        return gradient_rows((module.training_step([x[None], y[None]], 0) for x, y in examples), parameters)

    return rows(zip(*QUERY, strict=True)) @ rows(classes()).T


@pytest.mark.parametrize("network", [AuxiliaryHead, Margin])
def test_gradients_are_those_of_training(network, tmp_path):
    torch.manual_seed(0)
    module = Heads(network())
    trainer = fitted(tmp_path, module)
    for name in ("source", "influence"):
        here = trainer.attribute(QUERY, method=name).values
        there = SourceScorer.from_run(tmp_path / "run", Heads(network()).eval()).score(QUERY, classes(), method=name)
        assert torch.equal(there.values, here)
    assert RunStore.open(tmp_path / "run").manifest.stages[0].mode == "train"
    found, expected = trainer.attribute(QUERY, method="grad-dot").values, oracle(module)
    torch.testing.assert_close(found / found.norm(), expected / expected.norm(), rtol=1e-3, atol=1e-5)


def test_the_user_may_say_which(tmp_path):
    values = {}
    for passes in ("eval", "train"):
        torch.manual_seed(0)
        trainer = fitted(tmp_path / passes, Heads(Margin()), passes=passes)
        assert RunStore.open(tmp_path / passes / "run").manifest.stages[0].mode == passes
        values[passes] = trainer.attribute(QUERY).values
    assert not torch.allclose(values["eval"], values["train"], rtol=0.1)
    with pytest.raises(ValueError, match="passes"):
        fitted(tmp_path / "wrong", passes="test")


def test_layers_frozen_in_eval_mode_are_recorded(tmp_path):
    class Frozen(Heads):
        def on_train_start(self):
            self.net.body.eval()

    fitted(tmp_path, Frozen(AuxiliaryHead()))
    assert RunStore.open(tmp_path / "run").manifest.stages[0].evaluating == ("net.body",)
