"""Bare parameters that meet the batch in an elementwise function, captured there."""

import pytest
import torch
import torch.nn.functional as F
from layers.oracle import Apply, compare, floats
from torch import nn

from lightning_source.capture import layer_gradients


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


def transposed(m, x):
    return (m.one(x).transpose(0, 1) + m.w).transpose(0, 1)


def in_place(m, x):
    y = m.one(x)
    y += m.w
    y.mul_(m.g)
    return y


def cases(places):
    return {
        "added": (dict(w=parameter(places, 6)), lambda m, x: m.one(x) + m.w),
        "added first": (dict(w=parameter(places, 6)), lambda m, x: m.w + m.one(x)),
        "of one example": (dict(w=parameter(1, places, 6)), lambda m, x: m.one(x) + m.w),
        "a slice": (dict(w=parameter(9, 6)), lambda m, x: m.one(x) + m.w[: x.shape[1]]),
        "a slice of one example": (dict(w=parameter(1, 9, 6)), lambda m, x: m.one(x) + m.w[:, : x.shape[1]]),
        "a scalar": (dict(w=parameter()), lambda m, x: m.one(x) * m.w),
        "a scalar that meets one number an example": (
            dict(w=parameter()),
            lambda m, x: m.one(x) + (m.w * x.mean((1, 2)))[:, None, None],
        ),
        "scale and shift": (dict(w=parameter(6), g=parameter(6)), lambda m, x: m.one(x) * m.g + m.w),
        "subtracted and divided": (
            dict(w=parameter(6), g=parameter(6)),
            lambda m, x: (m.w - m.one(x)) / (m.g.exp() + 1),
        ),
        "a gate": (dict(g=parameter(6)), lambda m, x: m.one(x) * m.g.sigmoid()),
        "a gate between two": (dict(g=parameter(6)), lambda m, x: torch.lerp(m.one(x), x, m.g.sigmoid())),
        "a softmax of weights": (dict(w=parameter(places)), lambda m, x: m.one(x) * F.softmax(m.w, 0)[:, None]),
        "a class token": (
            dict(w=parameter(1, 1, 6)),
            lambda m, x: m.one(torch.cat([m.w.expand(len(x), -1, -1), x], 1)),
        ),
        "a repeated token": (
            dict(w=parameter(1, 2, 6)),
            lambda m, x: m.one(torch.cat([m.w.repeat(len(x), 1, 1), x], 1)),
        ),
        "used twice": (dict(w=parameter(places, 6)), lambda m, x: m.one(m.one(x + m.w).tanh() + m.w)),
        "where": (dict(w=parameter(6)), lambda m, x: torch.where(x > 0, m.one(x), m.w)),
        "in place": (dict(w=parameter(6), g=parameter(6)), in_place),
        "broadcast within an example": (dict(w=parameter(places, 1)), lambda m, x: m.one(x) + m.w),
        "a vector along the positions": (dict(w=parameter(places)), lambda m, x: m.one(x) * m.w.view(1, -1, 1)),
        "time before batch": (dict(w=parameter(places, 1, 6)), transposed),
        "a power": (dict(w=parameter(6)), lambda m, x: m.one(x).abs().add(1).pow(m.w)),
        "reached by another": (dict(w=parameter(6)), lambda m, x: m.one(x) + 2 * m.w.abs() + m.w**2),
    }


@pytest.mark.check("layer", "bare parameter, {case}", "gradients")
@pytest.mark.parametrize("case", cases(1))
@pytest.mark.parametrize("places", [5, 4])
def test_where_a_parameter_enters(case, places):
    """Of four examples: with four places, positions are laid out as examples are."""
    own, run = cases(places)[case]
    net = Apply(lambda m, x: m.head(run(m, x).tanh()), one=nn.Linear(6, 6), head=nn.Linear(6, 2), **own)
    found = {block.name: block.form for block in compare(net, floats(places, 6)).blocks}
    assert {found[f"net.{name}"] for name in own} <= {"BroadcastForm", "FreeForm"}
    if places != 4:
        assert {found[f"net.{name}"] for name in own} == {"BroadcastForm"}


ELSEWHERE = {
    "a matrix product": (dict(w=parameter(6, 6)), lambda m, x: m.one(x) @ m.w),
    "a table in an einsum": (dict(w=parameter(5, 6)), lambda m, x: torch.einsum("btf,tf->bf", m.one(x), m.w)[:, None]),
    "two parameters together": (dict(w=parameter(6), g=parameter(6)), lambda m, x: m.one(x) + m.w * m.g),
    "joined": (dict(w=parameter(1, 6)), lambda m, x: m.one(torch.stack([torch.cat([m.w, row]) for row in x]))),
    "normalised": (dict(w=parameter(6)), lambda m, x: F.layer_norm(m.one(x), (6,), m.w)),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_another_use_costs_a_backward_an_example(case):
    own, run = ELSEWHERE[case]
    net = Apply(lambda m, x: m.head(run(m, x).tanh()), one=nn.Linear(6, 6), head=nn.Linear(6, 2), **own)
    coverage = compare(net, floats(5, 6))
    assert {b.form for b in coverage.blocks if b.name.removeprefix("net.") in own} == {"FreeForm"}


def test_a_parameter_that_enters_costs_no_backward_of_its_own(monkeypatch):
    def refuse(*_):
        raise AssertionError("a backward for each example")

    own, run = cases(5)["scale and shift"]
    net = Apply(lambda m, x: m.head(run(m, x)), one=nn.Linear(6, 6), head=nn.Linear(6, 2), **own)
    monkeypatch.setattr(layer_gradients, "per_example_gradients", refuse)
    compare(net, floats(5, 6))
