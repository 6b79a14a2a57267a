"""Which layers are tracked, and what is said of the rest."""

import pytest
import torch
from helpers import Classifier, classes, fitted, mlp
from layers.oracle import Net, one_group
from torch import nn

from lightning_source.capture.coverage import find_blocks


@pytest.mark.parametrize(
    ("options", "tracked", "left"),
    [
        ({"include": ["net.2"]}, ["net.2"], {"net.0.weight": "not included", "net.0.bias": "not included"}),
        ({"exclude": ["*.2"]}, ["net.0"], {"net.2.weight": "excluded", "net.2.bias": "excluded"}),
        ({"include": ["net*"]}, ["net.0", "net.2"], {}),
    ],
)
def test_layers_are_chosen_by_name(options, tracked, left):
    module = Net(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))
    coverage = find_blocks(module, one_group(dict(module.named_parameters())), **options)
    assert [block.name for block in coverage.blocks] == tracked
    assert {name: reason for name, _, reason in coverage.left_out} == left


def test_parameters_that_no_optimizer_trains_are_not_counted():
    module = Net(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))
    coverage = find_blocks(module, [list(module.net[2].parameters())])
    assert [block.name for block in coverage.blocks] == ["net.2"]
    assert coverage.left_out == ()
    assert coverage.trainable == 15


def test_a_layer_that_no_example_reaches_counts_for_nothing(tmp_path):
    class Skips(nn.Sequential):
        def forward(self, x):
            return nn.Sequential(*list(self)[:-1])(x)

    def scores(name, wrap):
        torch.manual_seed(0)
        net = wrap(mlp())
        torch.manual_seed(1)
        return fitted(tmp_path / name, Classifier(net)).attribute(list(classes(4, seed=2).tensors)).values

    idle = scores("idle", lambda net: Skips(*net, nn.Linear(3, 3)))
    assert torch.equal(idle, scores("plain", lambda net: net))


@pytest.mark.parametrize(("layers", "more"), [(6, 0), (20, 28)])
def test_long_lists_of_layers_are_cut(layers, more):
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers)))
    coverage = find_blocks(net, [list(net.parameters())], exclude=["*"])
    line = coverage.summary().splitlines()[1]
    assert line.count(".weight") + line.count(".bias") == 2 * layers - more
    assert (f"and {more} more, which `lightning-source inspect` lists" in line) == (more > 0)
