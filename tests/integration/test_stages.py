"""Each ``fit`` with one callback is a stage with its own examples, segments and N."""

import pytest
import torch
from helpers import QUERY, Classifier, classes, close, mlp, quiet_trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_source import SourceCallback, SourceScorer
from lightning_source.curvature.unroll import segment_decay, segment_response
from lightning_source.passes.query_gradients import QueryGradients

FIRST, SECOND = classes(24, seed=3), classes(16, seed=4)


def fit(tmp_path, source, module, data, epochs=2):
    trainer = quiet_trainer(tmp_path, source, max_epochs=epochs)
    trainer.fit(module, DataLoader(data, 8, shuffle=True))
    return trainer


@pytest.fixture
def two_stages(tmp_path):
    source, module = SourceCallback(str(tmp_path / "run")), Classifier(mlp())
    fit(tmp_path, source.stage("first"), module, FIRST)
    return fit(tmp_path, source.stage("second"), module, SECOND, epochs=3)


@pytest.mark.check("stage", "two stages", "own examples, N and segments")
def test_each_stage_has_its_own_examples(two_stages, tmp_path):
    first = two_stages.attribute(QUERY, stage="first")
    second = two_stages.attribute(QUERY)
    assert first.values.shape == (4, 24)
    assert second.values.shape == (4, 16)
    assert (first.metadata["stage"], second.metadata["stage"]) == ("first", "second")
    assert (first.metadata["examples"], second.metadata["examples"]) == (24, 16)
    scorer = SourceScorer.from_run(tmp_path / "run", Classifier(mlp()), stage=0)
    assert torch.equal(scorer.score(QUERY, FIRST).values, first.values)


@pytest.mark.check("stage", "two stages", "formula on dense matrices")
def test_the_first_stage_is_carried_through_the_second(two_stages):
    """The formula by hand on dense per-block matrices: ``∇fᵀ S₂ F_r(H₁) g / N₁``."""
    with two_stages.callbacks[0].scorer(two_stages, stage="first") as scorer:
        run = scorer.run
        (one,), (two,) = run.segments(), run.later_segments()
        h1, h2 = run.snapshot_factors(one), run.snapshot_factors(two)
        scorer.run.calibrate()
        from lightning_source.capture.data import query_of

        gradients = run.query_workspace.query_gradients(run.final(), query_of(QUERY, None), "loss").values
        total = torch.zeros(4, 24)
        for block in run.coverage.blocks:

            def dense(factors, spectral, name=block.name):
                basis = torch.kron(factors[name].basis.gradients[0], factors[name].basis.activations[0])
                return basis @ torch.diag(spectral(factors[name].eigenvalues[0].flatten())) @ basis.T

            (rate1,), (rate2,) = one.stretch.rates, two.stretch.rates
            carry = dense(h2, lambda x, r=rate2: segment_decay(x, r))
            respond = dense(h1, lambda x, r=rate1: segment_response(x, r))
            vectors = gradients[block.name].flatten(1) @ carry @ respond
            for snapshot, weight in zip(one.snapshots, one.weights, strict=True):
                shaped = {block.name: vectors.view(4, *block.shape)}

                def add(examples, products, parts, weight=weight):
                    total[:, examples] += weight / 24 * products

                run.workspace.inner_products(run.state(snapshot, "mean"), run.data, None, QueryGradients(shaped), add)
    close(two_stages.attribute(QUERY, stage="first", removal="few").values, total, 1e-4)


@pytest.mark.check("stage", "a layer frozen in stage 2", "stands still")
def test_a_layer_that_the_second_stage_froze_stands_still(tmp_path):
    source, module = SourceCallback(str(tmp_path / "run")), Classifier(mlp())
    fit(tmp_path, source, module, FIRST)
    module.net[0].requires_grad_(False)
    module.optimizer = lambda p: torch.optim.SGD([x for x in p if x.requires_grad], 0.1)
    trainer = fit(tmp_path, source, module, SECOND)
    with source.scorer(trainer, stage=0) as scorer:
        chains = scorer.run.curvatures(
            [*scorer.run.segments(), *scorer.run.later_segments()],
            [scorer.run.snapshot_factors(s) for s in [*scorer.run.segments(), *scorer.run.later_segments()]],
            scorer.run.surviving_blocks(),
        )
    assert {name: len(chain) for name, chain in chains.items()} == {"net.0": 1, "net.2": 2}
    assert trainer.attribute(QUERY, stage=0).values.abs().max() > 0
    assert not module.net[0].weight.requires_grad


@pytest.mark.check("stage", "a head drawn anew", "carries nothing")
def test_a_head_drawn_anew_carries_nothing(tmp_path):
    source, module = SourceCallback(str(tmp_path / "run")), Classifier(mlp())
    fit(tmp_path, source, module, FIRST)
    module.net[2].reset_parameters()
    trainer = fit(tmp_path, source, module, SECOND)
    with source.scorer(trainer, stage=0) as scorer:
        assert [block.name for block in scorer.run.surviving_blocks()] == ["net.0"]
    assert trainer.attribute(QUERY, stage=0).values.shape == (4, 24)


@pytest.mark.check("stage", "another head on a new module", "scores, from_run the same")
def test_another_head_on_a_new_module(tmp_path):
    """Stage 2 takes over the trunk of another module; stage 1's gradients need the module that it trained."""
    source, old = SourceCallback(str(tmp_path / "run")), Classifier(mlp())
    fit(tmp_path, source, old, FIRST)
    new = Classifier(nn.Sequential(old.net[0], nn.ReLU(), nn.Linear(5, 4)))
    new.net[0] = nn.Linear(6, 5)
    new.net[0].load_state_dict(old.net[0].state_dict())
    trainer = fit(tmp_path, source, new, SECOND)
    here = trainer.attribute(QUERY, stage=0).values
    assert here.abs().max() > 0
    scorer = SourceScorer.from_run(tmp_path / "run", new, stage=0, stage_models=[old, new])
    assert torch.equal(scorer.score(QUERY, FIRST).values, here)


@pytest.mark.check("stage", "a stage that is not there", "refused by name")
@pytest.mark.parametrize("stage", ["third", 2, -3])
def test_a_stage_that_is_not_there_is_named(two_stages, stage):
    with pytest.raises(MisconfigurationException, match='its stages are 0 "first", 1 "second"'):
        two_stages.attribute(QUERY, stage=stage)


@pytest.mark.check("stage", "a name given twice", "refused by name")
def test_a_name_is_given_once(two_stages, tmp_path):
    with pytest.raises(MisconfigurationException, match='a stage "first" already'):
        fit(tmp_path, two_stages.callbacks[0].stage("first"), Classifier(mlp()), FIRST)


@pytest.mark.check("stage", "two stages", "method {method}")
@pytest.mark.parametrize("method", ["fast-source", "influence", "tracin", "grad-dot", "grad-cos"])
def test_every_method_answers_for_both_stages(two_stages, method):
    for stage, count in ((0, 24), (1, 16)):
        values = two_stages.attribute(QUERY, stage=stage, method=method).values
        assert values.shape == (4, count)
        assert values.abs().max() > 0
