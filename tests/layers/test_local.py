"""Parameters without a form, by running their module alone again."""

import pytest
import torch
from layers.oracle import Apply, compare, floats, tokens
from torch import nn

from lightning_source.capture import broadcasts


def forms(coverage):
    return {block.name: block.form for block in coverage.blocks}


class Root(nn.Module):
    """A root mean square norm as language models define their own; ``shift`` is 1 in some of them."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.randn(6)), shift

    def forward(self, x):
        return (self.weight + self.shift) * x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


class Scale(nn.Module):
    """A learned scale that is no linear function of its parameter."""

    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.randn(()))

    def forward(self, hidden):
        return hidden * self.log.exp()


class Places(nn.Module):
    """Learned places and a token before them."""

    def __init__(self):
        super().__init__()
        self.first, self.places = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        return torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.places


class Branching(nn.Module):
    """Control flow that looks at the data, which cannot run for several examples at once."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return x * self.weight if float(x.sum()) < 1e30 else x


LOCAL = {
    "a library's RMSNorm": (Root, lambda m, x: m.one(x)),
    "a library's RMSNorm with 1 + weight": (lambda: Root(1.0), lambda m, x: m.one(x)),
    "a library's RMSNorm, called twice": (Root, lambda m, x: m.one(m.one(x).tanh())),
    "a library's RMSNorm, rows": (Root, lambda m, x: m.one(x.flatten(0, 1)).view_as(x)),
    "a library's RMSNorm, time before batch": (Root, lambda m, x: m.one(x.transpose(0, 1)).transpose(0, 1)),
    "scale": (Scale, lambda m, x: m.one(hidden=x)),
    "places and class token": (Places, lambda m, x: m.one(x)),
    "control flow": (Branching, lambda m, x: m.one(x)),
    "LSTM": (lambda: nn.LSTM(6, 6, batch_first=True), lambda m, x: m.one(x)[0]),
    "GRU, time before batch": (lambda: nn.GRU(6, 6), lambda m, x: m.one(x.transpose(0, 1))[0].transpose(0, 1)),
}


@pytest.fixture
def _no_broadcasts(monkeypatch):
    """As if it were never understood where a parameter enters."""
    monkeypatch.setattr(broadcasts.BroadcastTap, "_serves_all", lambda *_: False)


@pytest.mark.check("layer", "no form, {case}", "gradients")
@pytest.mark.parametrize("case", LOCAL)
@pytest.mark.usefixtures("_no_broadcasts")
def test_a_module_run_again_on_single_examples(case):
    make, run = LOCAL[case]
    # So much behind it that it is not most of the network.
    net = nn.Sequential(nn.Linear(6, 6), Apply(run, one=make()), nn.Linear(6, 60), nn.Tanh(), nn.Linear(60, 2))
    found = forms(compare(net, floats(3, 6)))
    assert {form for name, form in found.items() if name.startswith("net.1")} == {"LocalForm"}


@pytest.mark.usefixtures("_no_broadcasts")
def test_a_module_that_is_most_of_the_network_is_not_run_again():
    found = forms(compare(Apply(lambda m, x: m.head(m.one(x)), one=Places(), head=nn.Linear(6, 2)), floats(3, 6)))
    assert found["net.one.places"] == "FreeForm"


@pytest.mark.check("layer", "no form, given a mask", "gradients")
@pytest.mark.usefixtures("_no_broadcasts")
def test_a_module_that_is_given_a_second_tensor_costs_a_backward_an_example():
    """A mask with as many rows as there are examples could not be told from one row for each."""

    class Masked(Root):
        def forward(self, x, mask):
            return super().forward(mask @ x)

    mask = torch.rand(3, 3)
    net = Apply(lambda m, x: m.head(m.one(x, mask)), one=Masked(), head=nn.Linear(6, 3))
    assert forms(compare(net, floats(3, 6)))["net.one.weight"] == "FreeForm"


def test_a_wrapped_module_is_found_by_its_own_name():
    class Wrapper(nn.Module):
        """Like what `torch.compile` gives back."""

        def __init__(self, module):
            super().__init__()
            self._orig_mod = module

        def forward(self, *inputs):
            return self._orig_mod(*inputs)

    def run(m, x):
        return m.head(m.norm(m.one(x) + m.two(torch.arange(3))))

    children = {"one": nn.Embedding(11, 6), "two": Wrapper(nn.Embedding(3, 6)), "norm": Wrapper(Root())}
    found = forms(compare(Apply(run, **children, head=nn.Linear(6, 3)), tokens(3)))
    assert (found["net.two"], found["net.norm.weight"]) == ("PositionsForm", "BroadcastForm")
