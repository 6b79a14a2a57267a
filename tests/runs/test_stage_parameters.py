"""Parameters that come or go between stages: what both stages trained carries over, and nothing else."""

import pytest
import torch
from checks import measured
from helpers import QUERY, Classifier, classes, mlp, quiet_trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_source import SourceCallback, SourceScorer

FIRST, SECOND = classes(24, seed=3), classes(16, seed=4)
METHODS = ["source", "fast-source", "influence", "tracin", "grad-dot", "grad-cos"]


class Layers(Classifier):
    """A trunk and what is named; layers go one after another."""

    def __init__(self, **layers):
        super().__init__(nn.Sequential())
        for name, layer in layers.items():
            self.net.add_module(name, layer)


def first_module():
    return Layers(trunk=nn.Linear(6, 5), tanh=nn.Tanh(), middle=nn.Linear(5, 5), head=nn.Linear(5, 3))


def second_module(old, change):
    """What goes on from the first: with a layer more, one less, both, or another width that needs all anew."""
    layers = {name: layer for name, layer in old.net.named_children()}
    if "removed" in change:
        del layers["middle"]
    if "added" in change:
        head = layers.pop("head")
        layers |= {"more": nn.Linear(5, 5), "head": head}
    return Layers(**layers)


def two_stages(path, change):
    torch.manual_seed(0)
    source, old = SourceCallback(str(path / "run")), first_module()
    trainer = quiet_trainer(path, source.stage("first"))
    trainer.fit(old, DataLoader(FIRST, 8))
    kept = {name: p.detach().clone() for name, p in old.named_parameters()}
    new = second_module(old, change)
    trainer = quiet_trainer(path, source.stage("second"))
    trainer.fit(new, DataLoader(SECOND, 8))
    # The first stage's module shares its layers with the second; its own copy is what that stage trained.
    separate = first_module()
    separate.load_state_dict(kept)
    return trainer, separate, new


CARRIED = {"added": ["trunk", "middle", "head"], "removed": ["trunk", "head"], "added and removed": ["trunk", "head"]}


@pytest.mark.check("stage", "parameters {change} between stages", "scores, from_run the same")
@pytest.mark.parametrize("change", CARRIED)
def test_what_both_stages_hold_is_carried(tmp_path, change):
    trainer, old, new = two_stages(tmp_path, change)
    with trainer.callbacks[0].scorer(trainer, stage="first") as scorer:
        assert [block.name for block in scorer.run.surviving_blocks()] == [f"net.{name}" for name in CARRIED[change]]
    for method in METHODS:
        here = trainer.attribute(QUERY, stage="first", method=method).values
        assert here.isfinite().all()
        assert here.abs().max() > 0
        scorer = SourceScorer.from_run(tmp_path / "run", new, stage="first", stage_models=[old, new])
        assert torch.equal(scorer.score(QUERY, FIRST, method=method).values, here)
    second = trainer.attribute(QUERY, stage="second").values
    assert second.shape == (4, 16)


def gradient(module, names, example):
    """Of one example's loss with respect to the named layers, flattened."""
    parameters = [p for name in names for p in module.get_submodule(f"net.{name}").parameters()]
    return torch.cat([g.flatten() for g in torch.autograd.grad(module.training_step(example, 0), parameters)])


@pytest.mark.check("stage", "parameters {change} between stages", "gradient dot against autograd")
@pytest.mark.parametrize("change", CARRIED)
def test_gradients_are_taken_in_each_stages_own_model(tmp_path, change):
    """``Λ / N ∇f · ∇ℓ``: the query at the end, the example in its own model with what the second stage made of it."""
    trainer, old, new = two_stages(tmp_path, change)
    final = new.state_dict()
    old.load_state_dict({name: final.get(name, own) for name, own in old.state_dict().items()})
    scores = trainer.attribute(QUERY, stage="first", method="grad-dot")
    names = CARRIED[change]
    asked = torch.stack([gradient(new, names, [x[i : i + 1] for x in QUERY]) for i in range(4)])
    given = torch.stack([gradient(old, names, [x[i : i + 1] for x in FIRST.tensors]) for i in range(24)])
    (segment,) = scores.metadata["segments"]
    expected = segment["rates"][0] / 24 * asked @ given.T
    error = (scores.values - expected).abs().max() / expected.abs().max()
    assert error <= 1e-4
    measured(error)


@pytest.mark.check("stage", "parameters {change} between stages", "one model for both refused by name")
@pytest.mark.parametrize("change", CARRIED)
def test_one_model_for_two_shapes_is_refused(tmp_path, change):
    _, _, new = two_stages(tmp_path, change)
    with pytest.raises(MisconfigurationException, match="does not match the run"):
        SourceScorer.from_run(tmp_path / "run", new, stage="first")


@pytest.mark.check("stage", "no layer in common", "refused by name")
def test_nothing_in_common_is_an_error(tmp_path):
    source = SourceCallback(str(tmp_path / "run"))
    quiet_trainer(tmp_path, source.stage("first")).fit(Classifier(mlp(hidden=5)), DataLoader(FIRST, 8))
    trainer = quiet_trainer(tmp_path, source.stage("second"))
    trainer.fit(Layers(trunk=nn.Linear(6, 3)), DataLoader(SECOND, 8))
    with pytest.raises(MisconfigurationException, match='no layer that stage "first" trained was taken over'):
        trainer.attribute(QUERY, stage="first")
    assert trainer.attribute(QUERY, stage="second").values.any()
