"""The curvature that layers have together, against dense matrices."""

import pytest
import torch
from helpers import QUERY, Classifier, classes, fitted, mlp
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.utils.data import TensorDataset

from lightning_source.curvature.block_gradients import BlockGradients, gram
from lightning_source.passes.factors import deal, dealt_ids, eigenvalues_and_traces, eigenvalues_of


def gauss_newton(module, state, inputs):
    """``E[Jᵀ (diag p - p pᵀ) J]`` of cross entropy, dense, its rows in the order of the module's parameters."""
    values = {name[4:]: value.double() for name, value in state.items()}
    net = module.net.double()
    jacobians = vmap(jacrev(lambda p, x: functional_call(net, p, (x[None],))[0]), (None, 0))(values, inputs)
    rows = torch.cat([j.flatten(2) for j in jacobians.values()], 2)
    probabilities = functional_call(net, values, (inputs,)).softmax(-1)
    centred = rows - (probabilities[:, :, None] * rows).sum(1, keepdim=True)
    scaled = (probabilities.sqrt()[:, :, None] * centred).flatten(0, 1)
    return scaled.T @ scaled / len(inputs)


@pytest.mark.parametrize("net", [mlp, lambda: nn.Sequential(nn.Linear(6, 3))], ids=["two layers", "one layer"])
def test_squared_traces_are_those_of_dense_matrices(tmp_path, net):
    """To 15 %: the labels of 4,000 examples, and pairs of examples, are drawn."""
    data = classes(4000)
    trainer = fitted(tmp_path, Classifier(net()), data, batch_size=100, max_epochs=1, factor_examples=4000)
    with trainer.callbacks[0].scorer(trainer) as scorer:
        run = scorer.run
        (segment,) = run.segments()
        factors = run.snapshot_factors(segment, "mean")
        state = run.state(segment.snapshots[-1], "mean")
        bases = {name: one.basis for name, one in factors.items()}
        ids = torch.arange(4000)
        found, (full, blocks) = eigenvalues_and_traces(run.workspace, state, run.data, ids, bases)
        moved = {name: 0.5 if "0" in name else 1.0 for name in bases}
        _, weighted = eigenvalues_and_traces(run.workspace, state, run.data, ids, bases, moved=moved)
        values = eigenvalues_of(run.workspace, state, run.data, ids, bases, 8)
        module = trainer.lightning_module
        dense = gauss_newton(module, state, data.tensors[0].double())
    rates = torch.cat([p.new_full((p.numel(),), 0.5 if "0" in n else 1.0) for n, p in module.net.named_parameters()])
    both = rates.double()[:, None] * dense
    assert weighted.full == pytest.approx(float((both * both.T).sum()), rel=0.15)
    for name, of_one_draw in found.items():
        torch.testing.assert_close(of_one_draw.sum(), values[name].sum(), rtol=0.1, atol=0)
    assert full == pytest.approx(float(dense.square().sum()), rel=0.15)
    assert blocks == pytest.approx(sum(float(v.square().sum()) for v in values.values()), rel=0.15)


def test_scores_are_those_of_scaled_eigenvalues(tmp_path, monkeypatch):
    trainer = fitted(tmp_path, data=classes(200), segments=2)
    plain = trainer.attribute(QUERY, removal="few").values
    scores = trainer.attribute(QUERY, removal="few", cross_layer=True)
    with trainer.callbacks[0].scorer(trainer) as scorer:
        scales = [scorer.run.store.manifest.couplings[f"mean-{names}"] for names in _names(scorer.run)]
        assert all(scale >= 1 for scale in scales)
        assert max(scales) > 1.2  # two layers share directions
        monkeypatch.setattr(
            type(scorer.run),
            "cross_layer_factors",
            lambda run, segment, which: run.snapshot_factors(segment, which),
        )
        assert torch.equal(trainer.attribute(QUERY, removal="few", cross_layer=True).values, plain)
    assert scores.values.norm() < plain.norm()  # more curvature, less response
    monkeypatch.undo()
    again = trainer.attribute(QUERY, removal="few", cross_layer=True)
    assert torch.equal(again.values, scores.values)


def _names(run):
    return ["+".join(f"{s.last:06d}" for s in segment.snapshots) for segment in run.segments()]


@pytest.mark.parametrize("positions", [1, 3])
def test_inner_products_of_all_pairs(positions):
    one = BlockGradients(torch.randn(2, 5, positions, 4), torch.randn(2, 5, positions, 3))
    flat = one.per_example().transpose(0, 1).flatten(1)
    torch.testing.assert_close(gram(one), flat @ flat.T)
    rows = BlockGradients(torch.randint(7, (1, 5, positions)), torch.randn(1, 5, positions, 3), 7)
    flat = rows.per_example().transpose(0, 1).flatten(1)
    torch.testing.assert_close(gram(rows), flat @ flat.T)


def test_factor_examples_are_dealt():
    """Together the snapshots see all, each as many, and each the same ones again; few examples are not dealt."""
    ids = torch.arange(0, 12_000, 2)
    parts = [dealt_ids(ids, place, 6, seed=3, fewest=512) for place in range(6)]
    assert all(len(part) == 1000 for part in parts)
    assert torch.equal(torch.cat(parts).sort().values, ids)
    assert torch.equal(dealt_ids(ids, 2, 6, seed=3, fewest=512), parts[2])
    assert not torch.equal(dealt_ids(ids, 2, 6, seed=4, fewest=512), parts[2])
    few = [dealt_ids(ids[:900], place, 6, seed=3, fewest=512) for place in range(6)]
    assert all(len(part) == 512 for part in few)
    assert torch.equal(torch.cat(few).unique(), ids[:900])
    assert torch.equal(dealt_ids(ids[:100], 1, 6, seed=3, fewest=512), ids[:100])
    assert torch.equal(dealt_ids(ids, 0, 1, seed=3, fewest=512), ids)


@pytest.mark.parametrize(("labels", "size"), [(1, 512), (4, 128), (63, 64)])
def test_examples_with_more_labels_are_dealt_in_smaller_parts(tmp_path, labels, size):
    """A snapshot sees 512 labels at least, and 64 examples."""
    data = TensorDataset(torch.randn(600, labels, 5), torch.randint(3, (600, labels)))

    class Tokens(Classifier):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]).transpose(1, 2), batch[1])

    trainer = fitted(tmp_path, Tokens(nn.Linear(5, 3)), data, batch_size=100, max_epochs=1, mode="deferred")
    with trainer.callbacks[0].scorer(trainer) as scorer:
        run = scorer.run
        run.calibrate()
        parts = deal(run.workspace, run.final_of_stage, run.data, torch.arange(600), 10)
    assert [len(part) for part in parts] == [max(60, size)] * 10


class ZeroesInAHook(Classifier):
    """Old rows of a table are kept fixed by zeroing their gradient (reported against two libraries)."""

    def on_after_backward(self):
        self.net[0].weight.grad.zero_()


def test_a_layer_that_stood_still_has_no_part_in_what_the_others_have_together(tmp_path):
    """To 1e-4: both runs train the same weights, and the still layer's noise must not reach the others' scores."""
    scores = []
    for kind in (Classifier, ZeroesInAHook):
        torch.manual_seed(0)
        module = kind(mlp())
        if kind is Classifier:
            module.net[0].weight.requires_grad_(False)
        trainer = fitted(tmp_path / kind.__name__, module, classes(200), segments=2, max_epochs=3)
        scores.append(trainer.attribute(QUERY).values)
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-4 * float(scores[0].abs().max()))
