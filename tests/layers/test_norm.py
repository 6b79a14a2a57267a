"""Normalisation layers."""

import pytest
from layers.oracle import Apply, biases_apart, compare, floats
from torch import nn

CASES = {
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
@pytest.mark.parametrize("case", CASES)
def test_normalisation(case):
    net, shape = CASES[case]
    compare(net(), floats(*shape))


@pytest.mark.check("layer", "{case}", "bias in its own group")
@pytest.mark.parametrize("case", ["LayerNorm, tokens", "BatchNorm2d", "GroupNorm"])
def test_normalisation_with_its_bias_in_another_optimizer_group(case):
    net, shape = CASES[case]
    compare(net(), floats(*shape), names=["net.weight", "net.bias"], groups=biases_apart)
