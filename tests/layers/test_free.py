"""Parameters that no layer form knows, at a backward for each example."""

import pytest
import torch
from layers.oracle import Apply, Net, compare, covered, floats
from torch import nn

from lightning_source.capture import broadcasts
from lightning_source.capture import layer_gradients as capture
from lightning_source.layers import free


def blocks(coverage):
    return {block.name: block.form for block in coverage.blocks}


class Patches(nn.Module):
    """A class token, positions and a learned scale, as in a vision transformer."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.positions = nn.Parameter(torch.randn(4, 6))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.one, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head((self.one(x).tanh() * self.scale.exp()).mean(1))


@pytest.mark.check("layer", "free parameters: class token, positions, scale", "gradients")
@pytest.mark.parametrize("at_once", [1, 3, 16])
def test_parameters_used_in_forward(monkeypatch, at_once):
    monkeypatch.setattr(broadcasts.BroadcastTap, "_serves_all", lambda *_: False)
    monkeypatch.setattr(capture, "EXAMPLES_AT_ONCE", at_once)
    coverage = compare(Patches(), floats(3, 6))
    assert {b.name: b.shape for b in coverage.blocks if b.free} == {
        "net.token": (1, 6, 1),
        "net.positions": (1, 24, 1),
        "net.scale": (1, 1, 1),
    }
    assert "a backward for each example, as they have no layer form: net.token, net.positions" in coverage.summary()


@pytest.mark.check("layer", "free parameter of a subclass of Linear", "gradients")
def test_a_parameter_beside_a_layers_own():
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(5, 3)
            self.gain = nn.Parameter(torch.rand(3))

        def forward(self, x):
            return super().forward(x) * self.gain

    coverage = compare(Apply(lambda m, x: m.one(x), one=Scaled()), floats(5))
    assert blocks(coverage) == {"net.one": "FunctionalLinearForm", "net.one.gain": "BroadcastForm"}


@pytest.mark.check("layer", "{kind}", "gradients")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_layers(kind, batch_first):
    def run(m, x):
        return m.head(m.one(x)[0][:, -1] if batch_first else m.one(x.transpose(0, 1))[0][-1])

    coverage = compare(Apply(run, one=kind(3, 4, batch_first=batch_first), head=nn.Linear(4, 2)), floats(5, 3))
    assert sum(block.free for block in coverage.blocks) == 4


class NoRule(torch.autograd.Function):
    """An operation whose backward cannot run for several examples at once."""

    @staticmethod
    def forward(context, x):
        return x * 2

    @staticmethod
    def backward(context, gradient):
        return gradient * (2 if float(gradient.sum()) < 1e30 else 0)


def test_an_operation_without_a_batching_rule():
    net = Apply(lambda m, x: m.head(NoRule.apply(x * m.scale)), scale=nn.Parameter(torch.rand(5)), head=nn.Linear(5, 2))
    compare(net, floats(5))


@pytest.mark.check("layer", "free parameter beyond the size limit", "left out by name")
def test_what_is_too_large_is_left_out_by_name(monkeypatch):
    monkeypatch.setattr(free, "MAX_FREE", 10)
    coverage = compare(Patches(), floats(3, 6), share=0.7)
    assert coverage.left_out == (("net.positions", 24, "no layer form for Patches"),)


class Whole(Net):
    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return (self.net(inputs) - targets).square().sum()


def test_a_loss_known_only_as_a_whole_has_no_gradients_of_single_examples(monkeypatch):
    module, batch = Whole(Patches()).eval(), (floats(3, 6), floats(1))
    known = dict.fromkeys(("net.one", "net.head"), "LinearForm")
    entering = dict.fromkeys(("net.token", "net.positions", "net.scale"), "BroadcastForm")
    assert blocks(covered(module, batch)) == known | entering
    monkeypatch.setattr(broadcasts.BroadcastTap, "_serves_all", lambda *_: False)
    coverage = covered(module, batch)
    assert blocks(coverage) == known
    assert [(name, why.partition(",")[0]) for name, _, why in coverage.left_out] == [
        (f"net.{name}", "no layer form") for name in ("token", "positions", "scale")
    ]
