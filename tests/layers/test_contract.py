"""What a file outside the package may define: unusual layers with forms of their own, against autograd."""

import json
from dataclasses import replace

import pytest
import torch
from layers.oracle import Apply, compare, floats
from torch import nn

from lightning_source.capture.coverage import Coverage
from lightning_source.curvature.block_gradients import join
from lightning_source.layers import Block, LayerForm, MatrixForm, VectorForm, form_of, register_layer
from lightning_source.layers.forms import rows_by_example
from lightning_source.recording.typed_json import from_json, to_json


class Gain(nn.Module):
    """Scales and shifts its features, which it takes by a name of its own."""

    def __init__(self, size):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(size)), nn.Parameter(torch.rand(size))

    def forward(self, features):
        return features * self.weight + self.bias


@register_layer(Gain)
class GainForm(VectorForm):
    def rows(self, module, values, examples):
        return rows_by_example(values, examples)[0]

    def normalized(self, module, inputs):
        return inputs


class Pairs(nn.Bilinear):
    """A form takes both of its inputs, and its weight has a dimension for each."""


@register_layer(Pairs)
class PairsForm(MatrixForm):
    def keep(self, module, args, kwargs):
        return [tensor.detach() for tensor in args]

    def shape(self, module):
        return 1, module.out_features, module.in1_features * module.in2_features

    def activations(self, module, inputs, examples):
        first, second = (rows_by_example(tensor, examples) for tensor in inputs)
        return (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2)

    def gradients(self, module, gradients, examples):
        return rows_by_example(gradients, examples)


class Twofold(nn.Module):
    """Gives two outputs of one weight, the second backwards in time."""

    def __init__(self, size, features_first=False):
        super().__init__()
        self.weight, self.features_first = nn.Parameter(torch.rand(size, size)), features_first

    def forward(self, x):
        x = x.mT if self.features_first else x
        outputs = x @ self.weight.T, x.flip(1) @ self.weight.T
        return tuple(y.mT for y in outputs) if self.features_first else outputs


@register_layer(Twofold)
class TwofoldForm(MatrixForm):
    """Features in the last dimension, or else in the first, which only a real batch shows."""

    def shape(self, module):
        return 1, *module.weight.shape

    def outputs(self, output):
        return list(output)

    def attempts(self, block, network):
        return [block, replace(block, form=FeaturesFirstForm.__name__)]

    def combine(self, block, module, calls, examples):
        return join([self.of_call(module, call, examples) for call in calls], dim=2)

    def of_call(self, module, call, examples):
        inputs = call.inputs.flip(1) if call.output else call.inputs
        return self.capture(module, inputs, call.gradients, examples, True, False)

    def activations(self, module, inputs, examples):
        return rows_by_example(inputs, examples)

    gradients = activations


@register_layer()
class FeaturesFirstForm(TwofoldForm):
    def of_call(self, module, call, examples):
        return super().of_call(module, call._replace(inputs=call.inputs.mT, gradients=call.gradients.mT), examples)


def forms(coverage):
    return {block.name: block.form for block in coverage.blocks}


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_a_vector_form_whose_layer_is_called_by_keyword(shape):
    net = Apply(lambda m, x: m.one(features=x), one=Gain(5))
    assert forms(compare(net, floats(*shape))) == {"net.one": "GainForm"}


def test_a_matrix_form_that_keeps_two_inputs():
    net = Apply(lambda m, x, y: m.one(x, y), one=Pairs(3, 4, 2))
    assert forms(compare(net, floats(5, 3), floats(5, 4))) == {"net.one": "PairsForm"}


@pytest.mark.parametrize(("features_first", "form"), [(False, "TwofoldForm"), (True, "FeaturesFirstForm")])
@pytest.mark.parametrize("steps", [4, 5])
def test_a_form_of_several_outputs_that_falls_back_on_another(features_first, form, steps):
    """With as many steps as features, both forms make a matrix of the right shape, one of them the right values."""
    net = Apply(
        lambda m, x: torch.cat([y * y.detach().cos() for y in m.one(x)], 1).tanh(), one=Twofold(4, features_first)
    )
    coverage = compare(net, floats(4, steps) if features_first else floats(steps, 4))
    assert forms(coverage) == {"net.one": form}
    assert from_json(Coverage, json.loads(json.dumps(to_json(coverage)))) == coverage


def test_a_form_with_the_name_of_another_is_refused():
    class LinearForm(LayerForm):
        pass

    with pytest.raises(ValueError, match=r"`LinearForm` is registered already: lightning_source.layers.linear.Linear"):
        register_layer(nn.Linear)(LinearForm)
    assert form_of(nn.Linear(1, 1)).representation


def test_a_block_of_a_form_that_was_not_imported_is_named():
    block = Block("net.one", "net.one", "net.one.weight", None, 0, (1, 2, 2), "ElsewhereForm", (4,))
    with pytest.raises(LookupError, match=r"`net.one` is a layer of the form `ElsewhereForm`, which is not registered"):
        block.matrix({"net.one.weight": torch.ones(2, 2)})


class Short(nn.Linear):
    pass


@register_layer(Short)
class ShortForm(MatrixForm):
    """Forgets the bias in its shape's inputs."""

    def shape(self, module):
        return 1, module.out_features, module.in_features - 1

    activations = gradients = TwofoldForm.activations


def test_a_form_that_contradicts_itself_is_left_out_with_both_shapes():
    net = Apply(lambda m, x: m.two(m.one(x)), one=Short(3, 2), two=nn.Linear(2, 2))
    (names, _, reason), *_ = compare(net, floats(3), share=0.4).left_out
    assert names == "net.one.weight"
    assert "`ShortForm` makes activations (1, 4, 1, 4) and gradients (1, 4, 1, 2) of it" in reason
    assert "no block (1, 2, 3) of 4 examples" in reason
