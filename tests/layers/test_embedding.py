"""Embeddings, bags of them, and weights tied to them."""

import pytest
import torch
import torch.nn.functional as F
from layers.oracle import EXAMPLES, Apply, compare, covered, floats, prepared, tokens
from torch import nn

SIZE, WIDTH = 11, 6


def forms(coverage):
    return [block.form for block in coverage.blocks]


@pytest.mark.check("layer", "Embedding, {options}", "gradients")
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3)])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"padding_idx": -2}, {"sparse": True}])
def test_embedding(shape, options):
    ids = tokens(*shape)
    ids[0].view(-1)[0] = 1  # an example of padding alone would have no gradient
    coverage = compare(nn.Sequential(nn.Embedding(SIZE, WIDTH, **options), nn.Tanh(), nn.Linear(WIDTH, 2)), ids)
    block = coverage.blocks[0]
    assert (block.form, block.shape, block.indexed) == ("EmbeddingForm", (1, WIDTH, SIZE), True)


@pytest.mark.check("layer", "Embedding", "called twice")
def test_several_uses_of_one_embedding():
    def run(m, x, y):
        return m.head(m.one(x).mean(1) * m.one(y).sum(1))

    compare(Apply(run, one=nn.Embedding(SIZE, WIDTH), head=nn.Linear(WIDTH, 2)), tokens(5), tokens(3))


@pytest.mark.check("layer", "Embedding, time before batch", "gradients")
@pytest.mark.parametrize("length", [EXAMPLES, 3])
def test_tokens_before_examples(length):
    def run(m, x):
        return m.head(m.one(x.T)).transpose(0, 1)

    coverage = compare(Apply(run, one=nn.Embedding(SIZE, WIDTH), head=nn.Linear(WIDTH, 2)), tokens(length))
    assert [block.layout for block in coverage.blocks] == [1, 1]


@pytest.mark.check("layer", "EmbeddingBag, {mode}", "gradients")
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}])
def test_bags(mode, options):
    bag = nn.EmbeddingBag(SIZE, WIDTH, mode=mode, **options)
    compare(nn.Sequential(bag, nn.Tanh(), nn.Linear(WIDTH, 2)), tokens(5))


@pytest.mark.check("layer", "EmbeddingBag, {mode}, offsets", "gradients")
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("last", [True, False])
def test_bags_with_offsets(mode, last):
    def run(m, x, lengths):
        lengths = lengths.flatten()
        ids = torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])
        ends = lengths.cumsum(0)
        return m.head(m.one(ids, torch.cat([ends.new_zeros(1), ends if last else ends[:-1]])).tanh())

    bag = nn.EmbeddingBag(SIZE, WIDTH, mode=mode, include_last_offset=last)
    compare(Apply(run, one=bag, head=nn.Linear(WIDTH, 2)), tokens(5), torch.tensor([[2], [5], [1], [3]]))


@pytest.mark.check("layer", "EmbeddingBag, weighted", "gradients")
def test_weighted_bags():
    def run(m, x, weights):
        return m.head(m.one(x, per_sample_weights=weights).tanh())

    compare(Apply(run, one=nn.EmbeddingBag(SIZE, WIDTH, mode="sum"), head=nn.Linear(WIDTH, 2)), tokens(5), floats(5))


@pytest.mark.check("layer", "EmbeddingBag, max", "left out by name")
def test_the_maximum_over_a_bag_is_left_out():
    net = nn.Sequential(nn.EmbeddingBag(SIZE, WIDTH, mode="max"), nn.Linear(WIDTH, 2))
    coverage = compare(net, tokens(5), share=0.1)
    assert coverage.left_out == (("net.0.weight", SIZE * WIDTH, "the maximum over a bag is no sum over its tokens"),)


def tie(one, *others):
    for other in others:
        other.weight = one.weight
    return one


@pytest.mark.check("layer", "Embedding tied to the head, cross terms included", "gradients")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("functional", [True, False])
def test_an_embedding_tied_to_the_head(bias, length, padding, functional):
    def run(m, x):
        hidden = m.middle(m.one(x)).tanh()
        return F.linear(hidden, m.one.weight) if functional else m.head(hidden)

    head = nn.Linear(WIDTH, SIZE, bias=bias)
    children = {"one": nn.Embedding(SIZE, WIDTH, padding_idx=padding), "middle": nn.Linear(WIDTH, WIDTH)}
    if not functional:
        tie(children["one"], head)
        children["head"] = head
    coverage = compare(Apply(run, **children), tokens(length))
    form = {block.name: (block.form, block.shape) for block in coverage.blocks}
    weight = "net.one" if functional else "net.one.weight"
    assert form[weight] == ("FunctionalLinearForm", (1, SIZE, WIDTH))
    assert len(form) == 2 + (bias and not functional)


@pytest.mark.check("layer", "Embedding tied to the head, cross terms included", "under autocast")
def test_tied_weights_under_autocast():
    def half(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m.head(m.middle(m.one(x)).relu()).float()

    one, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    head.weight = one.weight
    net = Apply(half, one=one, middle=nn.Linear(6, 6), head=head)
    assert covered(*prepared(net, tokens(5))).share == 1


@pytest.mark.check("layer", "Embeddings tied", "gradients")
def test_tied_embeddings():
    def run(m, x, y):
        return m.head(m.one(x).mean(1) * m.two(y).mean(1))

    one, two = nn.Embedding(SIZE, WIDTH), nn.Embedding(SIZE, WIDTH, padding_idx=2)
    coverage = compare(Apply(run, one=tie(one, two), two=two, head=nn.Linear(WIDTH, 2)), tokens(5), tokens(3))
    assert forms(coverage) == ["FunctionalEmbeddingForm", "LinearForm"]


@pytest.mark.check("layer", "Linear tied to Conv1d", "left out by name")
def test_weights_tied_to_another_kind_of_layer_are_left_out():
    one, two = nn.Linear(1, 4, bias=False), nn.Conv1d(1, 4, 1, bias=False)
    two.weight = nn.Parameter(torch.randn(4, 1, 1))
    one.weight = two.weight
    net = nn.Sequential(
        nn.Linear(3, 4), Apply(lambda m, x: F.linear(x[:, :1], m.two.weight[:, :, 0]), one=one, two=two)
    )
    coverage = compare(net, floats(3), share=0.1)
    assert ("net.1.one.weight", 4, "weights tied between modules") in coverage.left_out
