"""Convolutions, normalisation layers, GPT-2's linear layer and adapters against autograd on one example at a time."""

import pytest
import torch
from checks import measured
from layers.singles import EXAMPLES, TOLERANCE, Apply, Net
from torch import nn

from lightning_source.capture.coverage import find_blocks
from lightning_source.capture.layer_gradients import GradientCapture
from lightning_source.capture.objective import Objective
from lightning_source.capture.probe import probe
from lightning_source.curvature.block_gradients import contract, squared_norms
from lightning_source.curvature.ekfac import (
    CovarianceSums,
    eigenbasis,
    eigenvalue_sums,
    mean_covariances,
    rotated_matrices,
)
from lightning_source.layers import form_of
from lightning_source.layers.linear import InputFirstForm
from lightning_source.names import clean_name


def one_group(module):
    return [list(module.parameters())]


def biases_apart(module):
    named = list(module.named_parameters())
    return [[p for n, p in named if not n.endswith("bias")], [p for n, p in named if n.endswith("bias")]]


def prepared(net, shape):
    """The module in eval mode, with running statistics and parameters that are not the initial ones and zeros."""
    module = Net(net)
    inputs, targets = torch.randn(EXAMPLES, *shape), torch.randn(EXAMPLES, 1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        module.net(inputs)
    return module.eval(), (inputs, targets)


def compare(net, shape, names, groups=one_group):
    """Per-example gradients and their dot products against autograd; then the curvature passes of EK-FAC."""
    module, batch = prepared(net, shape)
    objective = Objective(module)
    coverage = probe(module, objective, find_blocks(module, groups(module)), batch, EXAMPLES)
    assert coverage.share == 1
    if names is not None:
        assert [block.name for block in coverage.blocks] == names
    recording = GradientCapture(module, coverage.blocks)
    captured = recording.captured(objective.evaluate(batch, EXAMPLES, recording).loss, EXAMPLES)
    parameters = {clean_name(n): p for n, p in module.named_parameters() if p.requires_grad}
    singles = []
    for i in range(EXAMPLES):
        loss = module.training_step([x[i : i + 1] for x in batch], 0)
        singles.append(dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)))
    for block in coverage.blocks:
        one = captured[block.name]
        reference = torch.stack([block.matrix(gradients) for gradients in singles])  # [B, P, O, I]
        matrices = one.per_example().transpose(0, 1)
        assert matrices.shape == reference.shape == (EXAMPLES, *block.shape)
        assert block.numel == reference[0].numel()
        norms = reference.flatten(1).norm(dim=1)
        assert (norms > 0).all()
        error = (matrices - reference).flatten(1).norm(dim=1) / norms
        assert (error <= TOLERANCE).all()
        measured(error.max())
        torch.testing.assert_close(squared_norms(one), norms**2, rtol=2 * TOLERANCE, atol=0)
        curved(one, reference)
    return coverage


def curved(one, reference):
    """The eigenbasis is a rotation: squared norms and dot products are what they were."""
    basis, kronecker = eigenbasis(*mean_covariances([CovarianceSums.of(one)], [1.0]), torch.float32)
    eigenvalues = eigenvalue_sums(one, basis)
    assert kronecker.shape == eigenvalues.shape == reference.shape[1:]
    assert kronecker.isfinite().all()
    assert eigenvalues.isfinite().all()
    torch.testing.assert_close(eigenvalues.sum(), reference.square().sum(), rtol=1e-4, atol=0)
    found = contract(basis.rotate(one), rotated_matrices(one, basis))
    expected = reference.flatten(1) @ reference.flatten(1).T
    lengths = expected.diagonal().sqrt()
    assert ((found - expected).abs() <= 5 * TOLERANCE * torch.outer(lengths, lengths)).all()


CONV = {
    "plain": {},
    "padding": {"padding": 1},
    "valid": {"padding": "valid"},
    "same": {"padding": "same"},
    "same, even kernel, dilation": {"padding": "same", "kernel_size": 2, "dilation": 3},
    "same, even kernel, replicate": {"padding": "same", "kernel_size": 2, "padding_mode": "replicate"},
    "circular": {"padding": 2, "padding_mode": "circular"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "stride": {"padding": 1, "stride": 2},
    "stride beyond the kernel": {"kernel_size": 2, "stride": 3},
    "dilation": {"padding": 2, "dilation": 2},
    "groups": {"padding": 1, "groups": 2},
    "depthwise": {"padding": 1, "groups": 4, "out_channels": 8},
    "no bias": {"padding": 1, "bias": False},
    "grouped, no bias, stride": {"padding": 1, "bias": False, "groups": 2, "stride": 2},
    "kernel 1": {"kernel_size": 1},
    "whole image": {"kernel_size": 5},
}
SIDES = {1: (5,), 2: (5, 7), 3: (5, 6, 5)}


@pytest.mark.check("layer", "Conv1d/2d/3d, {case}", "gradients")
@pytest.mark.parametrize("case", CONV)
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_convolution(kind, case):
    dimensions = int(kind.__name__[-2])
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3} | CONV[case]
    compare(kind(**options), (4, *SIDES[dimensions]), ["net"])


UNEQUAL = {"kernel_size": (3, 2, 1), "stride": (1, 3, 2), "padding": (2, 0, 1), "dilation": (1, 2, 3)}


@pytest.mark.check("layer", "Conv1d/2d/3d and transposed, other options in each dimension", "gradients")
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_options_that_differ_by_dimension(dimensions, transposed):
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dimensions}d")
    options = {name: value[-dimensions:] for name, value in UNEQUAL.items()}
    names = ["net.weight", "net.bias"] if transposed else ["net"]
    compare(kind(4, 6, **options), (4, *SIDES[dimensions]), names)


TRANSPOSED = {
    "plain": {},
    "padding": {"padding": 1},
    "stride": {"stride": 2},
    "stride, padding and output padding": {"stride": 3, "padding": 1, "output_padding": 2},
    "stride beyond the kernel": {"kernel_size": 2, "stride": 3},
    "dilation": {"dilation": 2},
    "output padding beyond the stride": {"dilation": 3, "output_padding": 2},
    "groups": {"groups": 2, "stride": 2},
    "depthwise": {"groups": 4, "out_channels": 8},
    "no bias": {"bias": False, "padding": 2},
    "kernel 1": {"kernel_size": 1},
}


@pytest.mark.check("layer", "ConvTranspose1d/2d/3d, {case}", "gradients")
@pytest.mark.parametrize("case", TRANSPOSED)
@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_transposed_convolution(kind, case):
    """Other forms join the bias to the weight; here each is a block."""
    dimensions = int(kind.__name__[-2])
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3} | TRANSPOSED[case]
    names = ["net"] if options.get("bias") is False else ["net.weight", "net.bias"]
    compare(kind(**options), (4, *(4, 3, 3)[:dimensions]), names)


@pytest.mark.check("layer", "ConvTranspose2d, output_size", "gradients")
def test_transposed_convolution_to_a_given_size():
    net = Apply(lambda m, x: m.one(x, output_size=(10, 14)), one=nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1))
    compare(net, (4, 5, 7), ["net.one.weight", "net.one.bias"])


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize(
    "net", [lambda: nn.Conv1d(4, 6, 3), lambda: nn.ConvTranspose1d(4, 6, 3), lambda: nn.BatchNorm1d(4)]
)
def test_half_frozen(net, frozen):
    net = net()
    getattr(net, frozen).requires_grad_(False)
    compare(net, (4, 7), ["net." + ("bias" if frozen == "weight" else "weight")])


NORM = {
    "LayerNorm": (lambda: nn.LayerNorm(5), (5,)),
    "LayerNorm, tokens": (lambda: nn.LayerNorm(5), (6, 5)),
    "LayerNorm, two dimensions": (lambda: nn.LayerNorm((6, 5)), (6, 5)),
    "LayerNorm, two dimensions, positions": (lambda: nn.LayerNorm((6, 5)), (2, 3, 6, 5)),
    "LayerNorm, no bias, eps": (lambda: nn.LayerNorm(5, bias=False, eps=0.1), (6, 5)),
    "LayerNorm, rows": (
        lambda: Apply(lambda m, x: m.one(x.flatten(0, 1)).reshape(len(x), -1), one=nn.LayerNorm(5)),
        (6, 5),
    ),
    "RMSNorm": (lambda: nn.RMSNorm(5), (5,)),
    "RMSNorm, tokens, eps": (lambda: nn.RMSNorm(5, eps=0.1), (6, 5)),
    "RMSNorm, two dimensions": (lambda: nn.RMSNorm((6, 5)), (2, 6, 5)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), (6,)),
    "GroupNorm, images": (lambda: nn.GroupNorm(2, 6), (6, 3, 4)),
    "GroupNorm, a group a channel, eps": (lambda: nn.GroupNorm(6, 6, eps=0.1), (6, 5)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), (6,)),
    "BatchNorm1d, positions": (lambda: nn.BatchNorm1d(6, eps=0.1), (6, 5)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), (6, 3, 4)),
    "BatchNorm2d, cumulative": (lambda: nn.BatchNorm2d(6, momentum=None), (6, 3, 4)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(6), (6, 2, 3, 4)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(6).eval(), (6, 3, 4)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(6, affine=True), (6, 5)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(6, affine=True, eps=0.1), (6, 3, 4)),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(6, affine=True), (6, 2, 3, 4)),
    "InstanceNorm1d, running": (lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True), (6, 5)),
    "InstanceNorm2d, running": (lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True), (6, 3, 4)),
    "InstanceNorm3d, running": (lambda: nn.InstanceNorm3d(6, affine=True, track_running_stats=True), (6, 2, 3, 4)),
}


@pytest.mark.check("layer", "{case}", "gradients")
@pytest.mark.parametrize("case", NORM)
def test_normalisation(case):
    net, shape = NORM[case]
    compare(net(), shape, None)


@pytest.mark.check("layer", "{case}", "bias in its own group")
@pytest.mark.parametrize("case", ["LayerNorm, tokens", "BatchNorm2d", "GroupNorm"])
def test_normalisation_with_its_bias_in_another_optimizer_group(case):
    net, shape = NORM[case]
    compare(net(), shape, ["net.weight", "net.bias"], biases_apart)


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
    compare(net, shape, ["net"] if groups is one_group else ["net.weight", "net.bias"], groups)


@pytest.mark.parametrize(
    "net", [lambda: nn.Conv2d(4, 6, 3), lambda: nn.ConvTranspose2d(4, 6, 3), lambda: nn.BatchNorm2d(4)]
)
def test_frames_of_an_example_in_the_batch_dimension(net):
    """As where a video goes through a network for images."""
    compare(Apply(lambda m, x: m.one(x.flatten(0, 1)).unflatten(0, (len(x), -1)), one=net()), (3, 4, 5, 5), None)


def test_a_network_of_transposed_convolutions():
    net = nn.Sequential(
        nn.Conv1d(4, 6, 3, stride=2, bias=False),
        nn.GroupNorm(3, 6),
        nn.ReLU(inplace=True),
        nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1),
        nn.Tanh(),
        nn.InstanceNorm1d(4, affine=True),
        nn.Tanh(),
    )
    compare(net, (4, 9), ["net.0", "net.1", "net.3.weight", "net.3.bias", "net.5"])


class Residual(nn.Module):
    """A basic block of a ResNet."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


def test_a_residual_network_is_covered_completely():
    stem = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    coverage = compare(nn.Sequential(*stem, Residual(4, 4, 1), Residual(4, 8, 2), *head), (3, 10, 10), None)
    assert len(coverage.blocks) == 2 + 2 * 6 + 1
    assert coverage.left_out == ()


def first(module):
    """What is refused, with a layer behind it that is not."""
    return nn.Sequential(module, nn.Flatten(), nn.LazyLinear(3))


OWN = "it normalises by the batch's own statistics, which mix examples"
REFUSED = {
    "BatchNorm1d without running statistics": (lambda: nn.BatchNorm1d(5, track_running_stats=False), (5,), OWN),
    "BatchNorm2d without running statistics": (lambda: nn.BatchNorm2d(5, track_running_stats=False), (5, 2, 2), OWN),
    "LayerNorm over the batch": (
        lambda: Apply(lambda m, x: m.one(x.T).T, one=nn.LayerNorm(EXAMPLES)),
        (EXAMPLES,),
        "examples of a batch influence each other's rows",
    ),
    "LayerNorm of one row": (
        lambda: Apply(lambda m, x: m.one(x.flatten()).view_as(x), one=nn.LayerNorm(5 * EXAMPLES)),
        (5,),
        "its input of shape (20,) does not begin with",
    ),
    "image without batch": (
        lambda: Apply(lambda m, x: m.one(x), one=nn.Conv2d(EXAMPLES, EXAMPLES, 1)),
        (2, 5),
        "its input of shape (4, 2, 5) is not [batch of 4",
    ),
    "InstanceNorm without batch": (
        lambda: Apply(lambda m, x: m.one(x), one=nn.InstanceNorm1d(EXAMPLES, affine=True)),
        (5,),
        "its input of shape (4, 5) is not [batch of 4",
    ),
}


@pytest.mark.check("layer", "{case}", "left out by name")
@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:.*Lazy modules:UserWarning")
def test_what_mixes_examples_is_left_out_by_name(case):
    net, shape, expected = REFUSED[case]
    net = first(net())
    net.eval()(torch.randn(EXAMPLES, *shape))  # materialises the linear layer
    module, batch = prepared(net, shape)
    checked = probe(module, Objective(module), find_blocks(module, one_group(module)), batch, EXAMPLES)
    assert [block.name for block in checked.blocks] == ["net.2"]
    assert {name.rsplit(".", 1)[1] for name, _, _ in checked.left_out} == {"weight", "bias"}
    assert all(reason.startswith(expected) for _, _, reason in checked.left_out)


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
    coverage = compare(net, (6, 7), names)
    assert coverage.left_out == ()
    assert coverage.trainable == sum(block.numel for block in coverage.blocks) == 2 * (7 + 9) + 2 * (9 + 3)
    module, batch = prepared(net, (6, 7))
    recording = GradientCapture(module, coverage.blocks)
    with recording.listening(EXAMPLES):
        assert not any(base._forward_hooks for base in (net[0].base_layer, net[2], net[3].base_layer))
        loss = module.training_step(batch, 0)
    assert list(recording.captured(loss, EXAMPLES)) == names
    assert [block.shape for block in coverage.blocks] == [(1, 2, 7), (1, 9, 2), (1, 2, 9), (1, 3, 2)]
