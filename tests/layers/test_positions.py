"""Embeddings of positions, which are the same for every example."""

import pytest
import torch
from layers.oracle import EXAMPLES, Apply, compare, tokens
from torch import nn


def forms(coverage):
    return {block.name: block.form for block in coverage.blocks}


@pytest.mark.check("layer", "Embedding of positions", "gradients")
@pytest.mark.parametrize("length", [3, EXAMPLES])
@pytest.mark.parametrize("batched", [True, False])
def test_an_embedding_of_positions(length, batched):
    """One row for all examples, or none."""

    def run(m, x):
        places = torch.arange(length)
        return m.head((m.one(x) + m.two(places.unsqueeze(0) if batched else places)).tanh())

    net = Apply(run, one=nn.Embedding(11, 6), two=nn.Embedding(length, 6), head=nn.Linear(6, 2))
    assert forms(compare(net, tokens(length))) == {
        "net.one": "EmbeddingForm",
        "net.two": "PositionsForm",
        "net.head": "LinearForm",
    }


@pytest.mark.check("layer", "Embedding of positions, time before batch", "gradients")
def test_an_embedding_of_positions_before_examples():
    def run(m, x):
        places = torch.arange(3).unsqueeze(1)
        return m.head((m.one(x.T) + m.two(places)).tanh()).transpose(0, 1)

    net = Apply(run, one=nn.Embedding(11, 6), two=nn.Embedding(3, 6), head=nn.Linear(6, 2))
    coverage = compare(net, tokens(3))
    assert forms(coverage)["net.two"] == "PositionsForm"
    assert [block.layout for block in coverage.blocks] == [1, 1, 1]


def relative(m, x):
    """A repeated output has a dimension too many for what follows."""
    places = torch.arange(3)
    bias = m.two((places - places[:, None]).abs()).permute(2, 0, 1).mean(0)
    return m.head(bias.softmax(-1) @ m.one(x))


def averaged(m, x):
    """No error would tell that a repeated output is averaged over another dimension."""
    return m.head(m.one(x) * m.two(torch.arange(3)).mean(0))


@pytest.mark.check("layer", "Embedding of positions, {use}", "gradients")
@pytest.mark.parametrize("use", [relative, averaged])
def test_rows_that_cannot_be_repeated_cost_a_backward_each(use):
    children = {"one": nn.Embedding(11, 6), "two": nn.Embedding(3, 6 if use is averaged else 2)}
    coverage = compare(Apply(use, **children, head=nn.Linear(6, 2)), tokens(3))
    assert forms(coverage)["net.two"] == "FreeForm"
