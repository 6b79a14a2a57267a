"""Attention, and the encoders and decoders made of it."""

import pytest
import torch
from layers.oracle import EXAMPLES, Apply, biases_apart, compare, covered, floats, prepared
from torch import nn


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

    coverage = compare(net, floats(5, 6), groups=biases_apart)
    prefix = "net.one."
    assert names(coverage) == [
        prefix + x for x in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    ]
    assert [block.group for block in coverage.blocks] == [0, 1, 0, 1]


@pytest.mark.check("layer", "MultiheadAttention, add_bias_kv", "gradients")
def test_added_key_and_value():
    layer = nn.MultiheadAttention(6, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True)
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


@pytest.mark.check("layer", "MultiheadAttention", "under autocast")
def test_autocast():
    """Attention under autocast is checked to the 8 bits that autograd itself keeps."""

    def half(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m.two(m.one(x, x, x)[0]).float()

    net = Apply(half, one=nn.MultiheadAttention(6, 2, batch_first=True), two=nn.Linear(6, 3))
    assert covered(*prepared(net, floats(5, 6))).share == 1
