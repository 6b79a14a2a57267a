import pytest
import torch
import torch.nn.functional as F
from layers.singles import EXAMPLES, Apply, Net, compare, floats
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_source.capture.coverage import find_blocks
from lightning_source.capture.objective import Objective
from lightning_source.capture.probe import probe


def names(coverage):
    return [block.name for block in coverage.blocks]


def order(batch_first, *inputs):
    return inputs if batch_first else [x.transpose(0, 1) for x in inputs]


def attend(batch_first=True, **options):
    """Self-attention on one input, cross-attention on two or three; inputs come with the examples first."""

    def function(m, query, key=None, value=None):
        one = key is None
        query, *rest = order(batch_first, *(x for x in (query, key, value) if x is not None))
        if one:
            key = value = query
        else:
            key, value = rest if len(rest) == 2 else (rest[0], rest[0])
        output = m.one(query, key, value, **options)[0]
        return output if batch_first else output.transpose(0, 1)

    return function


@pytest.mark.check("layer", "MultiheadAttention", "gradients")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("length", [1, 5])
def test_self_attention(batch_first, need_weights, bias, length):
    layer = nn.MultiheadAttention(6, 2, bias=bias, batch_first=batch_first)
    net = Apply(attend(batch_first, need_weights=need_weights), one=layer)
    coverage = compare(net, floats(length, 6))
    # Without a bias in the form's block, the names say that it is the weight alone.
    assert names(coverage) == ["net.one.in_proj" if bias else "net.one.in_proj_weight", "net.one.out_proj"]
    assert coverage.blocks[0].shape == (3, 6, 6 + bias)


@pytest.mark.check("layer", "MultiheadAttention, cross-attention", "gradients")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("length", [EXAMPLES, 3])
@pytest.mark.parametrize("inputs", [2, 3])
def test_cross_attention(batch_first, length, inputs):
    layer = nn.MultiheadAttention(6, 3, batch_first=batch_first)
    coverage = compare(
        Apply(attend(batch_first), one=layer), floats(5, 6), *(floats(length, 6) for _ in range(inputs - 1))
    )
    assert names(coverage) == ["net.one.in_proj", "net.one.out_proj"]


@pytest.mark.check("layer", "MultiheadAttention, kdim and vdim", "gradients")
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_sizes_of_key_and_value(need_weights, bias):
    layer = nn.MultiheadAttention(6, 2, kdim=4, vdim=3, bias=bias, batch_first=True)
    coverage = compare(Apply(attend(need_weights=need_weights), one=layer), floats(5, 6), floats(2, 4), floats(2, 3))
    weights = [f"net.one.{x}_proj_weight" for x in "qkv"]
    assert names(coverage) == [*weights, *["net.one.in_proj_bias"] * bias, "net.one.out_proj"]


@pytest.mark.check("layer", "MultiheadAttention", "bias in its own group")
def test_biases_in_their_own_optimizer_group():
    net = Apply(attend(), one=nn.MultiheadAttention(6, 2, batch_first=True))

    def groups(named):
        return [[p for n, p in named.items() if ("bias" in n) == apart] for apart in (False, True)]

    coverage = compare(net, floats(5, 6), groups=groups)
    prefix = "net.one."
    assert names(coverage) == [
        prefix + x for x in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    ]
    assert [block.group for block in coverage.blocks] == [0, 1, 0, 1]


@pytest.mark.check("layer", "MultiheadAttention, add_bias_kv", "gradients")
def test_added_key_and_value():
    layer = nn.MultiheadAttention(6, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True)
    nn.init.normal_(layer.bias_k)
    coverage = compare(Apply(attend(), one=layer), floats(5, 6))
    assert [block.free for block in coverage.blocks] == [False, True, True, False]


def test_frozen_projections_are_not_blocks():
    layer = nn.MultiheadAttention(6, 2, batch_first=True)
    layer.in_proj_weight.requires_grad_(False)
    assert names(compare(Apply(attend(), one=layer), floats(5, 6))) == ["net.one.in_proj_bias", "net.one.out_proj"]


@pytest.mark.check("layer", "MultiheadAttention", "called twice")
def test_one_attention_called_twice():
    def twice(m, x, y):
        return m.one(m.one(x, x, x)[0], y, y)[0]

    compare(Apply(twice, one=nn.MultiheadAttention(6, 2, batch_first=True)), floats(5, 6), floats(2, 6))


def encoder(batch_first, norm_first=False, **options):
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first, norm_first=norm_first, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first and batch_first)


@pytest.mark.check("layer", "TransformerEncoder", "gradients")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("length", [EXAMPLES, 5])
def test_encoder(batch_first, norm_first, length):
    def run(m, x):
        (x,) = order(batch_first, x)
        mask = nn.Transformer.generate_square_subsequent_mask(len(x[0]) if batch_first else len(x))
        return m.head(order(batch_first, m.one(x, mask=mask, is_causal=True))[0])

    # A last normalisation alone has hardly a gradient to compare.
    coverage = compare(Apply(run, one=encoder(batch_first, norm_first), head=nn.Linear(8, 3)), floats(length, 8))
    assert len(coverage.blocks) == 2 * 6 + 1
    assert {block.layout for block in coverage.blocks if "one" in block.name and "proj" not in block.name} == {
        0 if batch_first else 1
    }


@pytest.mark.check("layer", "MultiheadAttention and TransformerEncoder, padding mask", "gradients")
@pytest.mark.parametrize("need_weights", [True, False])
def test_padding(need_weights):
    def run(m, x, lengths):
        padding = torch.arange(x.shape[1]) >= lengths
        y = m.two(x, src_key_padding_mask=padding)
        return m.one(y, y, y, key_padding_mask=padding, need_weights=need_weights)[0] * (~padding).unsqueeze(2)

    net = Apply(run, one=nn.MultiheadAttention(8, 2, batch_first=True), two=encoder(True))
    compare(net, floats(5, 8), torch.tensor([[5], [2], [3], [4]]))


@pytest.mark.check("layer", "Transformer, encoder and decoder", "gradients")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_transformer(batch_first):
    def run(m, x, y):
        return m.head(order(batch_first, m.one(*order(batch_first, x, y)))[0])

    net = Apply(run, one=nn.Transformer(8, 2, 1, 1, 12, batch_first=batch_first), head=nn.Linear(8, 3))
    coverage = compare(net, floats(5, 8), floats(3, 8))
    assert {block.form for block in coverage.blocks} == {
        "InProjectionForm",
        "FunctionalLinearForm",
        "LinearForm",
        "LayerNormForm",
    }


@pytest.mark.parametrize("length", [EXAMPLES, 3])
@pytest.mark.parametrize("rows", [True, False])
def test_sequences_before_examples(length, rows):
    """Also as rows [T · B, I], which no shape tells from [B · T, I]."""

    def run(m, x):
        x = x.transpose(0, 1)
        y = m.two(m.one(x.flatten(0, 1) if rows else x))
        return y.view(length, EXAMPLES if len(x[0]) > 1 else 1, 5).transpose(0, 1)

    net = Apply(run, one=nn.Linear(5, EXAMPLES), two=nn.Linear(EXAMPLES, 5))
    coverage = compare(net, floats(length, 5))
    assert [block.layout for block in coverage.blocks] == [1, 1]


def test_a_weight_that_functions_use():
    def run(m, x):
        return F.linear(m.one(x), m.one.weight, m.one.bias) + F.linear(x, m.two.weight)

    net = Apply(run, one=nn.Linear(5, 5), two=nn.Linear(5, 5, bias=False))
    assert {block.form for block in compare(net, floats(3, 5)).blocks} == {"FunctionalLinearForm"}


@pytest.mark.check("layer", "MultiheadAttention over the batch", "left out by name")
def test_examples_that_attend_to_each_other_are_left_out():
    """Attention over [B, T, E] by a layer that takes [T, B, E]."""
    layer = nn.MultiheadAttention(6, 2)
    module = Net(nn.Sequential(nn.Linear(5, 6), Apply(lambda m, x: m.one(x, x, x)[0], one=layer), nn.Linear(6, 3)))
    module.eval()
    found = find_blocks(module, [list(module.parameters())])
    coverage = probe(module, Objective(module), found, (floats(EXAMPLES, 5), floats(1)), EXAMPLES)
    left = {name: reason for name, _, reason in coverage.left_out}
    mixing = "examples of a batch influence each other's rows"
    for name in ("net.0.weight", "net.1.one.in_proj_weight", "net.1.one.in_proj_bias"):
        assert left[name] == mixing


def coverage_of(net, *inputs):
    module = Net(net).eval()
    found = find_blocks(module, [list(module.parameters())])
    return probe(module, Objective(module), found, (*inputs, floats(1)), EXAMPLES)


@pytest.mark.check("layer", "MultiheadAttention", "under autocast")
def test_autocast():
    """Attention under autocast is checked to the 8 bits that autograd itself keeps."""

    def half(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m.two(m.one(x, x, x)[0]).float()

    net = Apply(half, one=nn.MultiheadAttention(6, 2, batch_first=True), two=nn.Linear(6, 3))
    assert coverage_of(net, floats(5, 6)).share == 1


@pytest.mark.check("layer", "Embedding tied to the head, cross terms included", "under autocast")
def test_tied_weights_under_autocast():
    def half(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m.head(m.middle(m.one(x)).relu()).float()

    one, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    head.weight = one.weight
    assert (
        coverage_of(Apply(half, one=one, middle=nn.Linear(6, 6), head=head), torch.randint(11, (EXAMPLES, 5))).share
        == 1
    )


def test_attention_under_reentrant_checkpointing_is_left_out():
    def run(m, x):
        return m.two(checkpoint(lambda z: m.one(z, z, z)[0], x.clone().requires_grad_(), use_reentrant=True))

    net = Apply(run, one=nn.MultiheadAttention(6, 2, batch_first=True), two=nn.Linear(6, 3))
    coverage = coverage_of(net, floats(5, 6))
    assert [block.name for block in coverage.blocks] == ["net.two"]
    assert all(reason.startswith("its output carries no gradient") for _, _, reason in coverage.left_out)
