"""BlockGradients per-example gradients against autograd run on one example at a time."""

import pytest
import torch
import torch.nn.functional as F
from checks import measured
from helpers import Classifier, classes, fitted, mlp
from layers.singles import EXAMPLES, TOLERANCE, Apply, Net
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_source.capture.coverage import find_blocks
from lightning_source.capture.layer_gradients import GradientCapture
from lightning_source.capture.objective import Objective
from lightning_source.capture.probe import probe
from lightning_source.curvature.block_gradients import contract, squared_norms
from lightning_source.curvature.ekfac import Basis, rotated_matrices
from lightning_source.names import clean_name


class Plain(nn.Linear):
    """A subclass that computes what its base does."""


class Doubled(nn.Linear):
    """A subclass whose output is not ``W x + b`` but twice that."""

    def forward(self, x):
        return 2 * super().forward(x)


def frozen(module, name):
    getattr(module, name).requires_grad_(False)
    return module


def batch_of(*shape):
    return torch.randn(EXAMPLES, *shape), torch.randn(EXAMPLES, 1)


def one_group(module):
    return [list(module.parameters())]


def biases_apart(module):
    named = list(module.named_parameters())
    return [[p for n, p in named if not n.endswith("bias")], [p for n, p in named if n.endswith("bias")]]


def compare(net, shape, names, groups=one_group, memory_format=torch.contiguous_format, tolerance=TOLERANCE):
    """Every block's per-example gradients, and the dot products between examples, against single-example autograd."""
    module = Net(net)
    inputs, targets = batch_of(*shape)
    module.net(inputs)  # running statistics of BatchNorm
    module.eval()
    batch = inputs.contiguous(memory_format=memory_format), targets
    objective = Objective(module)
    coverage = probe(module, objective, find_blocks(module, groups(module)), batch, EXAMPLES)
    assert [block.name for block in coverage.blocks] == names
    recording = GradientCapture(module, coverage.blocks)
    losses = objective.evaluate(batch, EXAMPLES, recording)
    captured = recording.captured(losses.loss, EXAMPLES)
    singles = []
    for i in range(EXAMPLES):
        parameters = {clean_name(n): p for n, p in module.named_parameters() if p.requires_grad}
        loss = module.training_step((inputs[i : i + 1], targets[i : i + 1]), 0)
        singles.append(dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)))
    found, expected = torch.zeros(EXAMPLES, EXAMPLES), torch.zeros(EXAMPLES, EXAMPLES)
    for block in coverage.blocks:
        one = captured[block.name]
        reference = torch.stack([block.matrix(gradients) for gradients in singles])  # [B, P, O, I]
        matrices = one.per_example().transpose(0, 1)
        assert matrices.shape == reference.shape == (EXAMPLES, *block.shape)
        norms = reference.flatten(1).norm(dim=1)
        assert (norms > 0).all()
        error = (matrices - reference).flatten(1).norm(dim=1) / norms
        assert (error <= tolerance).all()
        measured(error.max())
        torch.testing.assert_close(squared_norms(one), norms**2, rtol=2 * tolerance, atol=0)
        found += contract(one, rotated_matrices(one, Basis(None, None)))
        expected += reference.flatten(1) @ reference.flatten(1).T
    lengths = expected.diagonal().sqrt()
    assert ((found - expected).abs() <= 2 * tolerance * torch.outer(lengths, lengths)).all()
    assert not any(m._forward_hooks for m in module.modules())
    assert all(p.grad is None for p in module.parameters())


LINEAR = {
    "[B, I]": (lambda: nn.Linear(5, 3), (5,), ["net"]),
    "[B, T, I]": (lambda: nn.Linear(5, 3), (6, 5), ["net"]),
    "[B, T1, T2, I]": (lambda: nn.Linear(5, 3), (2, 3, 5), ["net"]),
    "rows [B·T, I]": (
        lambda: Apply(lambda m, x: m.one(x.flatten(0, 1)).reshape(len(x), -1), one=nn.Linear(5, 3)),
        (6, 5),
        ["net.one"],
    ),
    "not contiguous": (lambda: Apply(lambda m, x: m.one(x.mT), one=nn.Linear(5, 3)), (5, 6), ["net.one"]),
    "no bias": (lambda: nn.Linear(5, 3, bias=False), (5,), ["net"]),
    "no bias, positions": (lambda: nn.Linear(5, 3, bias=False), (6, 5), ["net"]),
    "frozen weight": (lambda: frozen(nn.Linear(5, 3), "weight"), (6, 5), ["net.bias"]),
    "frozen bias": (lambda: frozen(nn.Linear(5, 3), "bias"), (6, 5), ["net.weight"]),
    "keyword input": (lambda: Apply(lambda m, x: m.one(input=x), one=nn.Linear(5, 3)), (5,), ["net.one"]),
    "in-place ReLU behind": (
        lambda: nn.Sequential(nn.Linear(5, 9), nn.ReLU(inplace=True), nn.Linear(9, 3)),
        (5,),
        ["net.0", "net.2"],
    ),
    "called twice": (lambda: Apply(lambda m, x: m.one(m.one(x).tanh()), one=nn.Linear(5, 5)), (5,), ["net.one"]),
    "called on two shapes": (
        lambda: Apply(lambda m, x: m.one(x) + m.one(x.mean(1)).unsqueeze(1), one=nn.Linear(5, 3)),
        (6, 5),
        ["net.one"],
    ),
    "one module under two names": (
        lambda: (lambda one: nn.Sequential(one, nn.Tanh(), one))(nn.Linear(5, 5)),
        (5,),
        ["net.0"],
    ),
    "checkpointed": (
        lambda: Apply(lambda m, x: checkpoint(m.one, x, use_reentrant=False), one=nn.Linear(5, 3)),
        (6, 5),
        ["net.one"],
    ),
    "subclass": (lambda: Plain(5, 3), (5,), ["net"]),
    "output changed in place": (lambda: Apply(lambda m, x: m.one(x).mul_(2), one=nn.Linear(5, 3)), (5,), ["net.one"]),
}


@pytest.mark.check("layer", "Linear, {case}", "gradients")
@pytest.mark.parametrize("case", LINEAR)
def test_linear(case):
    net, shape, names = LINEAR[case]
    compare(net(), shape, names)


@pytest.mark.check("layer", "Linear", "bias in its own group")
@pytest.mark.parametrize("shape", [(5,), (6, 5)])
def test_a_bias_in_its_own_optimizer_group_is_a_block(shape):
    compare(nn.Linear(5, 3), shape, ["net.weight", "net.bias"], biases_apart)


@pytest.mark.check("layer", "Linear", "under autocast")
def test_autocast_in_the_training_step():
    """Output gradients are in bfloat16, 8 bits, and so is what autograd multiplies them to; activations are not."""

    def half(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m.two(m.one(x).relu()).float()

    net = Apply(half, one=nn.Linear(5, 9), two=nn.Linear(9, 3))
    compare(net, (6, 5), ["net.one", "net.two"], tolerance=2e-2)


CONV = {
    "plain": {},
    "padding 1": {"padding": 1},
    "padding (2, 1)": {"padding": (2, 1)},
    "valid": {"padding": "valid"},
    "same": {"padding": "same"},
    "same, even kernel": {"padding": "same", "kernel_size": (2, 4)},
    "same, even kernel, dilation": {"padding": "same", "kernel_size": (4, 3), "dilation": (1, 2)},
    "same, even kernel, reflect": {"padding": "same", "kernel_size": (2, 4), "padding_mode": "reflect"},
    "circular": {"padding": (1, 2), "padding_mode": "circular"},
    "reflect": {"padding": (1, 2), "padding_mode": "reflect"},
    "replicate": {"padding": (1, 2), "padding_mode": "replicate"},
    "stride": {"padding": 1, "stride": 2},
    "stride (2, 3)": {"padding": (0, 1), "stride": (2, 3)},
    "dilation": {"padding": 2, "dilation": (2, 1)},
    "groups": {"padding": 1, "groups": 2},
    "depthwise": {"padding": 1, "groups": 4, "out_channels": 8},
    "no bias": {"padding": 1, "bias": False},
    "grouped, no bias, stride": {"padding": 1, "bias": False, "groups": 2, "stride": 2},
    "kernel 1": {"kernel_size": 1},
    "whole image": {"kernel_size": (7, 6)},
}


@pytest.mark.check("layer", "Conv1d/2d/3d, {case}", "gradients")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CONV)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_conv2d(case, memory_format):
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3} | CONV[case]
    compare(nn.Conv2d(**options), (4, 7, 6), ["net"], memory_format=memory_format)


@pytest.mark.parametrize("groups", [1, 2])
def test_conv2d_in_a_network(groups):
    """In-place ReLU and BatchNorm behind it, as in a ResNet."""
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=groups),
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(6, affine=False),
        nn.Conv2d(6, 4, 3, stride=2, bias=False),
        nn.BatchNorm2d(4, affine=False),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(24, 3),
    )
    compare(net, (4, 7, 6), ["net.0", "net.3", "net.7"])


@pytest.mark.check("layer", "Conv2d", "bias in its own group")
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"groups": 2, "padding": "same"}])
def test_a_conv2d_bias_in_its_own_optimizer_group(options):
    names = ["net"] if options.get("bias") is False else ["net.weight", "net.bias"]
    compare(nn.Conv2d(4, 6, 3, **options), (4, 7, 6), names, biases_apart)


def tied(two):
    two[2].weight = two[0].weight
    return two


def attend(m, x):
    return m.one(x, x, x, need_weights=False)[0]


def reentrant(m, x):
    return checkpoint(m.one, x.clone().requires_grad_(), use_reentrant=True)


def head(first, size=5):
    """What is examined, with a plain layer behind it."""
    return nn.Sequential(first, nn.Linear(size, 3))


def time_first(m, x):
    return m.one(x.transpose(0, 1)).transpose(0, 1)


# Layers of which the weight, the layout or the forward is not that of a plain layer, yet the gradients are known.
UNUSUAL = {
    "tied weights": (
        lambda: tied(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))),
        (5,),
        ["net.0.0.bias", "net.0.0.weight", "net.0.2.bias", "net.1"],
    ),
    "attention's projections": (
        lambda: Apply(attend, one=nn.MultiheadAttention(6, 2, batch_first=True)),
        (5, 6),
        ["net.0.one.in_proj", "net.0.one.out_proj", "net.1"],
    ),
    "weight only used functionally": (
        lambda: Apply(lambda m, x: F.linear(x, m.one.weight), one=nn.Linear(5, 5, bias=False)),
        (5,),
        ["net.0.one", "net.1"],
    ),
    "subclass with another forward": (lambda: Doubled(5, 5), (5,), ["net.0", "net.1"]),
    "time before batch": (lambda: Apply(time_first, one=nn.Linear(5, 5)), (3, 5), ["net.0.one", "net.1"]),
    # The shape alone does not tell which dimension is the batch.
    "as much time before as batch": (
        lambda: Apply(time_first, one=nn.Linear(5, 5)),
        (EXAMPLES, 5),
        ["net.0.one", "net.1"],
    ),
}


@pytest.mark.check("layer", "Linear, {case}", "gradients")
@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_use(case):
    net, shape, names = UNUSUAL[case]
    compare(head(net(), shape[-1]), shape, names)


MIXING, DIFFERS = "examples of a batch influence each other's rows", "captured gradient differs from autograd's"
REFUSED = {
    "reentrant checkpointing": (  # hides its backward from hooks and from torch.autograd.grad
        lambda: head(Apply(reentrant, one=nn.Linear(5, 5))),
        (5,),
        dict.fromkeys(["net.0.one.weight", "net.0.one.bias"], "its output carries no gradient"),
    ),
    "weight also used functionally": (
        lambda: head(Apply(lambda m, x: m.one(x) + x @ m.one.weight.T, one=nn.Linear(5, 5))),
        (5,),
        dict.fromkeys(["net.0.one.weight", "net.0.one.bias"], DIFFERS),
    ),
    "examples mixed behind the layer": (
        lambda: head(Apply(lambda m, x: m.one(x) - m.one(x).mean(0), one=nn.Linear(5, 5))),
        (5,),
        dict.fromkeys(["net.0.one.weight", "net.0.one.bias"], MIXING),
    ),
    "image without batch": (
        lambda: head(Apply(lambda m, x: m.one(x), one=nn.Conv2d(EXAMPLES, EXAMPLES, 1))),
        (2, 5),
        dict.fromkeys(["net.0.one.weight", "net.0.one.bias"], "its input of shape (4, 2, 5) is not [batch of 4"),
    ),
}


@pytest.mark.check("layer", "Linear, {case}", "left out by name")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_attributed_is_left_out_by_name(case):
    net, shape, expected = REFUSED[case]
    module = Net(net())
    module.eval()
    coverage = find_blocks(module, one_group(module))
    checked = probe(module, Objective(module), coverage, batch_of(*shape), EXAMPLES)
    assert [block.name for block in checked.blocks] == ["net.1"]
    reasons = {name: reason for name, _, reason in checked.left_out}
    assert reasons.keys() == expected.keys()
    for name, reason in expected.items():
        assert reasons[name].startswith(reason)
        assert name in checked.summary()
    sizes = {name: p.numel() for name, p in module.named_parameters()}
    assert {name: size for name, size, _ in checked.left_out} == {name: sizes[name] for name in expected}
    assert checked.share == pytest.approx(1 - sum(sizes[name] for name in expected) / sum(sizes.values()))


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
    coverage = find_blocks(module, one_group(module), **options)
    assert [block.name for block in coverage.blocks] == tracked
    assert {name: reason for name, _, reason in coverage.left_out} == left


def test_parameters_that_no_optimizer_trains_are_not_counted():
    module = Net(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))
    coverage = find_blocks(module, [list(module.net[2].parameters())])
    assert [block.name for block in coverage.blocks] == ["net.2"]
    assert coverage.left_out == ()
    assert coverage.trainable == 15


def test_nothing_to_attribute_is_an_error():
    module = Net(Apply(lambda m, x: m.one(x) - m.one(x).mean(0), one=nn.Linear(5, 3))).eval()
    coverage = find_blocks(module, one_group(module))
    with pytest.raises(MisconfigurationException, match=r"`Net` has no layer whose gradients can be attributed"):
        probe(module, Objective(module), coverage, batch_of(5), EXAMPLES)


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
