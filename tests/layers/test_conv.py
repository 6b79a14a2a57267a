"""Convolutions and transposed convolutions, alone and in networks."""

import pytest
import torch
from layers.oracle import Apply, biases_apart, compare, floats
from torch import nn

SIDES = {1: (5,), 2: (5, 7), 3: (5, 6, 5)}
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
# Other values in each dimension, as only images have them.
CONV2D = {
    "padding (2, 1)": {"padding": (2, 1)},
    "same, even kernel": {"padding": "same", "kernel_size": (2, 4)},
    "same, even kernel, other dilations": {"padding": "same", "kernel_size": (4, 3), "dilation": (1, 2)},
    "same, even kernel, reflect": {"padding": "same", "kernel_size": (2, 4), "padding_mode": "reflect"},
    "circular (1, 2)": {"padding": (1, 2), "padding_mode": "circular"},
    "reflect (1, 2)": {"padding": (1, 2), "padding_mode": "reflect"},
    "replicate (1, 2)": {"padding": (1, 2), "padding_mode": "replicate"},
    "stride (2, 3)": {"padding": (0, 1), "stride": (2, 3)},
    "dilation (2, 1)": {"padding": 2, "dilation": (2, 1)},
    "whole image (5, 7)": {"kernel_size": (5, 7)},
}
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
UNEQUAL = {"kernel_size": (3, 2, 1), "stride": (1, 3, 2), "padding": (2, 0, 1), "dilation": (1, 2, 3)}


def made(kind, options):
    return kind(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3} | options)


def named(layer):
    """A transposed convolution's bias is a block of its own; other forms join it to the weight."""
    if layer.transposed and layer.bias is not None:
        return ["net.weight", "net.bias"]
    return ["net"]


@pytest.mark.check("layer", "Conv1d/2d/3d, {case}", "gradients")
@pytest.mark.parametrize("case", CONV)
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_convolution(kind, case):
    compare(made(kind, CONV[case]), floats(4, *SIDES[int(kind.__name__[-2])]), names=["net"])


@pytest.mark.check("layer", "Conv1d/2d/3d, {case}", "gradients")
@pytest.mark.parametrize(
    ("case", "memory_format"),
    [(case, torch.channels_last) for case in CONV | CONV2D] + [(case, torch.contiguous_format) for case in CONV2D],
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_images(case, memory_format):
    images = floats(4, 5, 7).contiguous(memory_format=memory_format)
    compare(made(nn.Conv2d, (CONV | CONV2D)[case]), images, names=["net"])


@pytest.mark.check("layer", "ConvTranspose1d/2d/3d, {case}", "gradients")
@pytest.mark.parametrize("case", TRANSPOSED)
@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_transposed_convolution(kind, case):
    layer = made(kind, TRANSPOSED[case])
    compare(layer, floats(4, *(4, 3, 3)[: int(kind.__name__[-2])]), names=named(layer))


@pytest.mark.check("layer", "Conv1d/2d/3d and transposed, other options in each dimension", "gradients")
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_options_that_differ_by_dimension(dimensions, transposed):
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dimensions}d")
    layer = made(kind, {name: value[-dimensions:] for name, value in UNEQUAL.items()})
    compare(layer, floats(4, *SIDES[dimensions]), names=named(layer))


@pytest.mark.check("layer", "ConvTranspose2d, output_size", "gradients")
def test_transposed_convolution_to_a_given_size():
    net = Apply(lambda m, x: m.one(x, output_size=(10, 14)), one=nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1))
    compare(net, floats(4, 5, 7), names=["net.one.weight", "net.one.bias"])


@pytest.mark.check("layer", "Conv2d", "bias in its own group")
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"groups": 2, "padding": "same"}])
def test_a_bias_in_its_own_optimizer_group(options):
    names = ["net"] if options.get("bias") is False else ["net.weight", "net.bias"]
    compare(made(nn.Conv2d, options), floats(4, 7, 6), names=names, groups=biases_apart)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize(
    "net", [lambda: nn.Conv1d(4, 6, 3), lambda: nn.ConvTranspose1d(4, 6, 3), lambda: nn.BatchNorm1d(4)]
)
def test_half_frozen(net, frozen):
    net = net()
    getattr(net, frozen).requires_grad_(False)
    compare(net, floats(4, 7), names=["net." + ("bias" if frozen == "weight" else "weight")])


@pytest.mark.parametrize(
    "net", [lambda: nn.Conv2d(4, 6, 3), lambda: nn.ConvTranspose2d(4, 6, 3), lambda: nn.BatchNorm2d(4)]
)
def test_frames_of_an_example_in_the_batch_dimension(net):
    """As where a video goes through a network for images."""
    frames = Apply(lambda m, x: m.one(x.flatten(0, 1)).unflatten(0, (len(x), -1)), one=net())
    compare(frames, floats(3, 4, 5, 5))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_network(groups):
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
    compare(net, floats(4, 7, 6), names=["net.0", "net.3", "net.7"])


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
    compare(net, floats(4, 9), names=["net.0", "net.1", "net.3.weight", "net.3.bias", "net.5"])


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
    coverage = compare(nn.Sequential(*stem, Residual(4, 4, 1), Residual(4, 8, 2), *head), floats(3, 10, 10))
    assert len(coverage.blocks) == 2 + 2 * 6 + 1
    assert coverage.left_out == ()
