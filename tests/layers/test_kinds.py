"""Every kind of layer in the situations that networks put it in: subclassed, called twice, shared, skipped, frozen."""

import pytest
import torch
from layers.oracle import EXAMPLES, Apply, compare, covered, floats, prepared, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lightning_source.capture.layer_gradients import GradientCapture
from lightning_source.capture.objective import Objective
from lightning_source.layers import form_of


def plain(layer, x):
    return layer(x)


def attend(layer, x):
    return layer(x, x, x, need_weights=False)[0]


def decode(layer, x):
    return layer(x, x.flip(1))


def run(layer, x):
    return layer(x)[0]


def lookup(layer, ids):
    """Tokens, or what stands for them where a first use has made numbers of them."""
    return layer(ids if ids.dtype == torch.int64 else ids.detach().abs().sum(-1).long().clamp_max(10))


# kind: (arguments, shape of the input, how it is called); outputs have the shape of inputs
KINDS = {
    nn.Linear: ({"in_features": 6, "out_features": 6}, (3, 6), plain),
    nn.Conv1d: ({"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1}, (4, 6), plain),
    nn.Conv2d: ({"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1, "groups": 2}, (4, 4, 6), plain),
    nn.Conv3d: ({"in_channels": 2, "out_channels": 2, "kernel_size": 3, "padding": 1}, (2, 3, 3, 6), plain),
    nn.ConvTranspose1d: ({"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1}, (4, 6), plain),
    nn.ConvTranspose2d: ({"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1}, (4, 4, 6), plain),
    nn.ConvTranspose3d: ({"in_channels": 2, "out_channels": 2, "kernel_size": 3, "padding": 1}, (2, 3, 3, 6), plain),
    nn.Embedding: ({"num_embeddings": 11, "embedding_dim": 6}, (3,), lookup),
    nn.LayerNorm: ({"normalized_shape": 6}, (3, 6), plain),
    nn.RMSNorm: ({"normalized_shape": 6}, (3, 6), plain),
    nn.GroupNorm: ({"num_groups": 2, "num_channels": 4}, (4, 6), plain),
    nn.BatchNorm1d: ({"num_features": 4}, (4, 6), plain),
    nn.BatchNorm2d: ({"num_features": 4}, (4, 4, 6), plain),
    nn.BatchNorm3d: ({"num_features": 2}, (2, 3, 3, 6), plain),
    nn.InstanceNorm1d: ({"num_features": 4, "affine": True}, (4, 6), plain),
    nn.InstanceNorm2d: ({"num_features": 4, "affine": True}, (4, 4, 6), plain),
    nn.InstanceNorm3d: ({"num_features": 2, "affine": True}, (2, 3, 3, 6), plain),
    nn.MultiheadAttention: ({"embed_dim": 6, "num_heads": 2, "batch_first": True}, (3, 6), attend),
    nn.TransformerEncoderLayer: (
        {"d_model": 6, "nhead": 2, "dim_feedforward": 8, "batch_first": True},
        (3, 6),
        plain,
    ),
    nn.TransformerDecoderLayer: (
        {"d_model": 6, "nhead": 2, "dim_feedforward": 8, "batch_first": True},
        (3, 6),
        decode,
    ),
    nn.LSTM: ({"input_size": 6, "hidden_size": 6, "batch_first": True}, (3, 6), run),
    nn.GRU: ({"input_size": 6, "hidden_size": 6, "batch_first": True}, (3, 6), run),
    Conv1D: ({"nf": 6, "nx": 6}, (3, 6), plain),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def made(kind, base=None):
    """A layer, a batch for it, and how it is called."""
    options, shape, call = KINDS[base or kind]
    return kind(**options), (tokens(*shape) if call is lookup else floats(*shape)), call


def head():
    return nn.Linear(6, 3)


@pytest.mark.check("layer", "{kind}", "gradients")
@kinds
def test_a_layer(kind):
    layer, x, call = made(kind)
    compare(Apply(lambda m, x: m.head(call(m.one, x)), one=layer, head=head()), x)


@pytest.mark.check("layer", "{kind}", "subclass")
@kinds
def test_a_subclass(kind):
    layer, x, call = made(type("Own", (kind,), {}), kind)
    assert type(form_of(layer)) is type(form_of(made(kind)[0]))
    compare(Apply(lambda m, x: m.head(call(m.one, x)), one=layer, head=head()), x)


@pytest.mark.check("layer", "{kind}", "called twice")
@kinds
def test_called_twice(kind):
    layer, x, call = made(kind)
    compare(Apply(lambda m, x: m.head(call(m.one, call(m.one, x).tanh())), one=layer, head=head()), x)


@pytest.mark.check("layer", "{kind}", "under two names")
@kinds
def test_one_module_under_two_names(kind):
    layer, x, call = made(kind)
    net = Apply(lambda m, x: m.head(call(m.two, call(m.one, x).tanh())), one=layer, two=layer, head=head())
    names = [block.name for block in compare(net, x).blocks]
    assert not any(name.startswith("net.two") for name in names)


@pytest.mark.check("layer", "{kind}", "checkpointed")
@kinds
def test_under_checkpointing_that_is_not_reentrant(kind):
    layer, x, call = made(kind)

    def checkpointed(m, x):
        return m.head(checkpoint(lambda y: call(m.one, y), x, use_reentrant=False))

    compare(Apply(checkpointed, one=layer, head=head()), x)


@pytest.mark.check("layer", "{kind}", "skipped by control flow")
@kinds
def test_skipped_by_control_flow(kind):
    """A batch that skips the layer has no gradient there; what stands for it elsewhere is right."""
    layer, x, call = made(kind)
    size = x.shape[-1] if call is not lookup else 6

    def run(m, x):
        return m.head(m.other(x) if m.skips else call(m.one, x))

    other = nn.Embedding(11, 6) if call is lookup else nn.Linear(size, 6)
    net = Apply(run, one=layer, head=head(), other=other)
    net.skips = False
    module, batch = prepared(net, x)
    objective = Objective(module)
    coverage = covered(module, batch, objective=objective)
    assert coverage.share == 1
    net.skips = True
    capture = GradientCapture(module, coverage.blocks)
    captured = capture.captured(objective.evaluate(batch, EXAMPLES, capture).each(), EXAMPLES)
    assert set(captured) == {"net.head", "net.other"}


def test_a_module_that_the_first_batch_skips_is_attributed_all_the_same():
    net = Apply(lambda m, x: m.head(m.one(x) if x.sum() > 1e6 else x), one=nn.Linear(6, 6), head=head())
    coverage = covered(*prepared(net, floats(6)))
    assert [block.name for block in coverage.blocks] == ["net.one", "net.head"]


@pytest.mark.check("layer", "TransformerEncoder, partly frozen, in eval mode", "gradients")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_fused_path_of_an_encoder_is_not_taken():
    """Torch runs an encoder in eval mode as one fused operation where nothing in it needs a gradient."""
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    layer.self_attn.requires_grad_(False)
    encoder = nn.TransformerEncoder(layer, 2)
    padding = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 1], [0, 0, 0]]).bool()

    def run(m, x, mask):
        return m.head(m.one(x, src_key_padding_mask=mask)) * (~mask).unsqueeze(2)

    coverage = compare(Apply(run, one=encoder, head=head()), floats(3, 6), padding)
    assert len(coverage.blocks) == 2 * 4 + 1


@pytest.mark.check("layer", "{kind}", "left out by name under reentrant checkpointing")
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d, nn.LayerNorm, nn.MultiheadAttention])
def test_under_reentrant_checkpointing(kind):
    layer, x, call = made(kind)

    def run(m, x):
        return m.head(checkpoint(lambda y: call(m.one, y), x.clone().requires_grad_(), use_reentrant=True))

    coverage = covered(*prepared(Apply(run, one=layer, head=head()), x))
    assert [block.name for block in coverage.blocks] == ["net.head"]
    for _, _, reason in coverage.left_out:
        assert reason.startswith("its output carries no gradient")
        assert "reentrant checkpointing" in reason
