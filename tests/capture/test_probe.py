"""What a probe finds that cannot be attributed is left out by name, and nothing else."""

import math

import pytest
from layers.oracle import EXAMPLES, Apply, compare, covered, floats, prepared
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_source.layers import free


def reentrant(m, x):
    """Hides its backward from hooks and from ``torch.autograd.grad``."""
    return checkpoint(m.one, x.clone().requires_grad_(), use_reentrant=True)


def called(layer, function=lambda m, x: m.one(x)):
    return Apply(function, one=layer)


MIXING = "examples of a batch influence each other's rows"
OWN = "it normalises by the batch's own statistics, which mix examples"
UNBATCHED = "its input of shape {} is not [batch of 4"
# case: (network, shape of an example's input and output, how the reason begins)
CASES = {
    "Linear, reentrant checkpointing": (
        lambda: called(nn.Linear(5, 5), reentrant),
        (5,),
        "its output carries no gradient",
    ),
    "Linear, examples mixed behind the layer": (
        lambda: called(nn.Linear(5, 5), lambda m, x: m.one(x) - m.one(x).mean(0)),
        (5,),
        MIXING,
    ),
    "BatchNorm1d without running statistics": (lambda: nn.BatchNorm1d(5, track_running_stats=False), (5,), OWN),
    "BatchNorm2d without running statistics": (lambda: nn.BatchNorm2d(5, track_running_stats=False), (5, 2, 2), OWN),
    "LayerNorm over the batch": (
        lambda: called(nn.LayerNorm(EXAMPLES), lambda m, x: m.one(x.T).T),
        (EXAMPLES,),
        MIXING,
    ),
    "LayerNorm of one row": (
        lambda: called(nn.LayerNorm(5 * EXAMPLES), lambda m, x: m.one(x.flatten()).view_as(x)),
        (5,),
        "its input of shape (20,) does not begin with",
    ),
    "image without batch": (lambda: called(nn.Conv2d(EXAMPLES, EXAMPLES, 1)), (2, 5), UNBATCHED.format((4, 2, 5))),
    "InstanceNorm without batch": (
        lambda: called(nn.InstanceNorm1d(EXAMPLES, affine=True)),
        (5,),
        UNBATCHED.format((4, 5)),
    ),
}


@pytest.mark.check("layer", "{case}", "left out by name")
@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_attributed_is_left_out_by_name(case):
    net, shape, reason = CASES[case]
    refused, head = net(), nn.Linear(math.prod(shape), 3)
    module, batch = prepared(nn.Sequential(refused, nn.Flatten(), head), floats(*shape))
    coverage = covered(module, batch)
    assert [block.name for block in coverage.blocks] == ["net.2"]
    sizes = {f"net.0.{name}": p.numel() for name, p in refused.named_parameters()}
    assert {name: size for name, size, _ in coverage.left_out} == sizes
    assert all(why.startswith(reason) for _, _, why in coverage.left_out)
    assert all(name in coverage.summary() for name in sizes)
    kept = sum(p.numel() for p in head.parameters())
    assert coverage.share == pytest.approx(kept / (kept + sum(sizes.values())))


BESIDES = {
    "Linear, weight also used functionally": (lambda: nn.Linear(5, 5), lambda m, x: m.one(x) + x @ m.one.weight.T),
    "Linear, never called": (lambda: nn.Linear(5, 5), lambda m, x: x @ m.one.weight.T.exp() + m.one.bias.sin()),
    "LayerNorm, weight also used functionally": (lambda: nn.LayerNorm(5), lambda m, x: m.one(x) * m.one.weight.sum()),
    "Conv1d, weight also used functionally": (lambda: nn.Conv1d(3, 3, 1), lambda m, x: m.one(x) + m.one.weight.mean()),
}


@pytest.mark.check("layer", "{case}", "gradients, a backward for each example")
@pytest.mark.parametrize("case", BESIDES)
def test_weights_that_serve_more_than_their_layers_output_are_held_whole(case):
    make, function = BESIDES[case]
    layer = make()
    shape = (3, 5) if isinstance(layer, nn.Conv1d) else (5,)
    coverage = compare(
        nn.Sequential(called(layer, function), nn.Flatten(), nn.Linear(math.prod(shape), 3)), floats(*shape)
    )
    assert [block.name for block in coverage.blocks] == ["net.0.one.weight", "net.0.one.bias", "net.2"]
    assert [block.free for block in coverage.blocks] == [True, True, False]


def test_what_is_too_large_to_be_held_whole_is_left_out_by_name(monkeypatch):
    monkeypatch.setattr(free, "MAX_FREE", 10)
    make, function = BESIDES["Linear, weight also used functionally"]
    coverage = compare(nn.Sequential(called(make(), function), nn.Linear(5, 3)), floats(5), share=0.3)
    assert [name for name, _, _ in coverage.left_out] == ["net.0.one.weight", "net.0.one.bias"]
    assert coverage.left_out[0][2].startswith("captured gradient differs from autograd's")


@pytest.mark.check("layer", "MultiheadAttention over the batch", "left out by name")
def test_examples_that_attend_to_each_other_are_left_out():
    """Attention over [B, T, E] by a layer that takes [T, B, E]."""
    attention = called(nn.MultiheadAttention(6, 2), lambda m, x: m.one(x, x, x)[0])
    net = nn.Sequential(nn.Linear(5, 6), attention, nn.Linear(6, 3))
    left = {name: reason for name, _, reason in covered(*prepared(net, floats(EXAMPLES, 5))).left_out}
    for name in ("net.0.weight", "net.1.one.in_proj_weight", "net.1.one.in_proj_bias"):
        assert left[name] == MIXING


def test_nothing_to_attribute_is_an_error():
    net = called(nn.Linear(5, 3), lambda m, x: m.one(x) - m.one(x).mean(0))
    with pytest.raises(MisconfigurationException, match=r"`Net` has no layer whose gradients can be attributed"):
        compare(net, floats(5))
