"""Linear layers, their weights used by functions or by several modules, GPT-2's linear layer and adapters."""

import pytest
import torch
import torch.nn.functional as F
from layers.oracle import EXAMPLES, Apply, biases_apart, compare, floats, one_group, prepared
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_source.capture.layer_gradients import GradientCapture
from lightning_source.layers import form_of
from lightning_source.layers.linear import InputFirstForm


class Plain(nn.Linear):
    """A subclass that computes what its base does."""


class Doubled(nn.Linear):
    """A subclass whose output is not ``W x + b`` but twice that."""

    def forward(self, x):
        return 2 * super().forward(x)


def frozen(module, name):
    getattr(module, name).requires_grad_(False)
    return module


def one(function, inputs=5, outputs=3, **options):
    return Apply(function, one=nn.Linear(inputs, outputs, **options))


def before_a_head(first, size=5):
    return nn.Sequential(first, nn.Linear(size, 3))


def shared():
    layer = nn.Linear(5, 5)
    return nn.Sequential(layer, nn.Tanh(), layer)


def tied():
    first, last = nn.Linear(5, 5), nn.Linear(5, 5)
    last.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), last)


def attention():
    layer = nn.MultiheadAttention(6, 2, batch_first=True)
    return Apply(lambda m, x: m.one(x, x, x, need_weights=False)[0], one=layer)


def time_first():
    return one(lambda m, x: m.one(x.transpose(0, 1)).transpose(0, 1), 5, 5)


TIED = ["net.0.bias", "net.0.weight", "net.2.bias"]
# case: (network, shape of an example, names of the blocks)
CASES = {
    "[B, I]": (lambda: nn.Linear(5, 3), (5,), ["net"]),
    "[B, T, I]": (lambda: nn.Linear(5, 3), (6, 5), ["net"]),
    "[B, T1, T2, I]": (lambda: nn.Linear(5, 3), (2, 3, 5), ["net"]),
    "rows [B·T, I]": (lambda: one(lambda m, x: m.one(x.flatten(0, 1)).reshape(len(x), -1)), (6, 5), ["net.one"]),
    "not contiguous": (lambda: one(lambda m, x: m.one(x.mT)), (5, 6), ["net.one"]),
    "no bias": (lambda: nn.Linear(5, 3, bias=False), (5,), ["net"]),
    "no bias, positions": (lambda: nn.Linear(5, 3, bias=False), (6, 5), ["net"]),
    "frozen weight": (lambda: frozen(nn.Linear(5, 3), "weight"), (6, 5), ["net.bias"]),
    "frozen bias": (lambda: frozen(nn.Linear(5, 3), "bias"), (6, 5), ["net.weight"]),
    "keyword input": (lambda: one(lambda m, x: m.one(input=x)), (5,), ["net.one"]),
    "in-place ReLU behind": (
        lambda: nn.Sequential(nn.Linear(5, 9), nn.ReLU(inplace=True), nn.Linear(9, 3)),
        (5,),
        ["net.0", "net.2"],
    ),
    "called twice": (lambda: one(lambda m, x: m.one(m.one(x).tanh()), 5, 5), (5,), ["net.one"]),
    "called on two shapes": (
        lambda: one(lambda m, x: m.one(x) + m.one(x.mean(1)).unsqueeze(1)),
        (6, 5),
        ["net.one"],
    ),
    "one module under two names": (shared, (5,), ["net.0"]),
    "checkpointed": (lambda: one(lambda m, x: checkpoint(m.one, x, use_reentrant=False)), (6, 5), ["net.one"]),
    "subclass": (lambda: Plain(5, 3), (5,), ["net"]),
    "output changed in place": (lambda: one(lambda m, x: m.one(x).mul_(2)), (5,), ["net.one"]),
    # The weight, the layout or the forward is not that of a plain layer, yet the gradients are known.
    "tied weights": (tied, (5,), TIED),
    "tied weights, positions": (tied, (6, 5), TIED),
    "tied weights before another layer": (
        lambda: before_a_head(tied()),
        (5,),
        ["net.0.0.bias", "net.0.0.weight", "net.0.2.bias", "net.1"],
    ),
    "attention's projections": (
        lambda: before_a_head(attention(), 6),
        (5, 6),
        ["net.0.one.in_proj", "net.0.one.out_proj", "net.1"],
    ),
    "weight only used functionally": (
        lambda: before_a_head(one(lambda m, x: F.linear(x, m.one.weight), 5, 5, bias=False)),
        (5,),
        ["net.0.one", "net.1"],
    ),
    "subclass with another forward": (lambda: before_a_head(Doubled(5, 5)), (5,), ["net.0", "net.1"]),
    "time before batch": (lambda: before_a_head(time_first()), (3, 5), ["net.0.one", "net.1"]),
    # The shape alone does not tell which dimension is the batch.
    "as much time before as batch": (lambda: before_a_head(time_first()), (EXAMPLES, 5), ["net.0.one", "net.1"]),
}


@pytest.mark.check("layer", "Linear, {case}", "gradients")
@pytest.mark.parametrize("case", CASES)
def test_linear(case):
    net, shape, names = CASES[case]
    compare(net(), floats(*shape), names=names)


@pytest.mark.check("layer", "Linear", "bias in its own group")
@pytest.mark.parametrize("shape", [(5,), (6, 5)])
def test_a_bias_in_its_own_optimizer_group_is_a_block(shape):
    compare(nn.Linear(5, 3), floats(*shape), names=["net.weight", "net.bias"], groups=biases_apart)


@pytest.mark.check("layer", "Linear", "under autocast")
def test_autocast_in_the_training_step():
    """Output gradients are in bfloat16, 8 bits, and so is what autograd multiplies them to; activations are not."""

    def half(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m.two(m.one(x).relu()).float()

    net = Apply(half, one=nn.Linear(5, 9), two=nn.Linear(9, 3))
    compare(net, floats(6, 5), names=["net.one", "net.two"], tolerance=2e-2)


@pytest.mark.parametrize("length", [EXAMPLES, 3])
@pytest.mark.parametrize("rows", [True, False])
def test_sequences_before_examples(length, rows):
    """Also as rows [T · B, I], which no shape tells from [B · T, I]."""

    def run(m, x):
        x = x.transpose(0, 1)
        y = m.two(m.one(x.flatten(0, 1) if rows else x))
        return y.view(length, EXAMPLES if len(x[0]) > 1 else 1, 5).transpose(0, 1)

    net = Apply(run, one=nn.Linear(5, EXAMPLES), two=nn.Linear(EXAMPLES, 5))
    assert [block.layout for block in compare(net, floats(length, 5)).blocks] == [1, 1]


def test_a_weight_that_functions_use():
    def run(m, x):
        return F.linear(m.one(x), m.one.weight, m.one.bias) + F.linear(x, m.two.weight)

    net = Apply(run, one=nn.Linear(5, 5), two=nn.Linear(5, 5, bias=False))
    assert {block.form for block in compare(net, floats(3, 5)).blocks} == {"FunctionalLinearForm"}


class Conv1D(nn.Module):
    """What ``transformers.pytorch_utils.Conv1D`` computes, which is not imported here either."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class Projection(Conv1D):
    """A subclass elsewhere."""


@pytest.mark.check("layer", "Hugging Face Conv1D", "gradients")
@pytest.mark.parametrize("kind", [Conv1D, Projection])
@pytest.mark.parametrize("shape", [(5,), (6, 5)])
@pytest.mark.parametrize("groups", [one_group, biases_apart])
def test_a_class_known_by_its_name(kind, shape, groups):
    net = kind(3, 5)
    assert isinstance(form_of(net), InputFirstForm)
    names = ["net"] if groups is one_group else ["net.weight", "net.bias"]
    compare(net, floats(*shape), names=names, groups=groups)


class LoRA(nn.Module):
    """A frozen base with a trained update of low rank, as peft builds it."""

    def __init__(self, base, rank):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + 2 * self.lora_B["default"](self.lora_A["default"](x))


@pytest.mark.check("layer", "LoRA on a frozen base", "gradients")
def test_only_adapters_are_tracked():
    """Nothing is kept of the frozen base: no block, no hook, no activations."""
    net = nn.Sequential(
        LoRA(nn.Linear(7, 9), 2), nn.GELU(), nn.LayerNorm(9).requires_grad_(False), LoRA(nn.Linear(9, 3), 2)
    )
    names = [f"net.{i}.{side}.default" for i in (0, 3) for side in ("lora_A", "lora_B")]
    coverage = compare(net, floats(6, 7), names=names)
    assert coverage.left_out == ()
    assert coverage.trainable == sum(block.numel for block in coverage.blocks) == 2 * (7 + 9) + 2 * (9 + 3)
    module, batch = prepared(net, floats(6, 7))
    capture = GradientCapture(module, coverage.blocks)
    with capture.listening(EXAMPLES):
        assert not any(base._forward_hooks for base in (net[0].base_layer, net[2], net[3].base_layer))
        loss = module.training_step(batch, 0)
    assert list(capture.captured(loss, EXAMPLES)) == names
    assert [block.shape for block in coverage.blocks] == [(1, 2, 7), (1, 9, 2), (1, 2, 9), (1, 3, 2)]
