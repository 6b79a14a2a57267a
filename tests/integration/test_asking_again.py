"""Asking leaves no trace: queries come back as they were, a second answer is the first, gradients stay the user's."""

import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, classes, fitted, mlp
from torch.utils.data import DataLoader

from lightning_source import SourceScorer

METHODS = ("source", "grad-dot", "influence-cg", "datainf", "repsim")


def named(items):
    inputs, targets = zip(*items, strict=True)
    return {"inputs": torch.stack(inputs), "targets": torch.stack(targets)}


class TakesApart(Classifier):
    """Its step leaves nothing of the batch."""

    def training_step(self, batch, batch_idx):
        targets = batch.pop("targets")
        return self.loss(self.net(batch["inputs"].mul_(0.5)), targets)


class TransfersInPlace(Classifier):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        batch[0].mul_(0.5)
        return batch


class BackwardInside(Classifier):
    """Trains on inputs that were moved up its own gradient, which also adds to that of the parameters."""

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        inputs = inputs.clone().requires_grad_()
        self.loss(self.net(inputs), targets).backward()
        assert inputs.grad is not None
        return self.loss(self.net((inputs + 0.1 * inputs.grad.sign()).detach()), targets)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_takes_its_batch_apart_gets_copies(method, tmp_path):
    loader = DataLoader(classes(), 8, collate_fn=named)
    trainer = fitted(tmp_path, TakesApart(mlp()), loader)
    query = named([classes()[i] for i in range(4)])
    before = {key: value.clone() for key, value in query.items()}
    first = trainer.attribute(query, method=method).values
    assert query.keys() == before.keys()
    assert all(torch.equal(query[key], before[key]) for key in query)
    assert torch.equal(trainer.attribute(query, method=method).values, first)
    by_loader = trainer.attribute(DataLoader(classes(), 4, collate_fn=named), method=method).values[:4]
    torch.testing.assert_close(by_loader, first)


def test_transfer_hooks_get_copies_too(tmp_path):
    trainer = fitted(tmp_path, TransfersInPlace(mlp()))
    query = [x[:4].clone() for x in classes().tensors]
    first = trainer.attribute(query).values
    assert torch.equal(query[0], classes().tensors[0][:4])
    assert torch.equal(trainer.attribute(query).values, first)


def test_a_step_that_goes_backward_itself_leaves_no_gradients(tmp_path):
    module = BackwardInside(mlp())
    trainer = fitted(tmp_path, module)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    kept = [parameter.grad for parameter in module.parameters()]
    trainer.attribute([x[:4] for x in classes().tensors])
    for parameter, gradient in zip(module.parameters(), kept, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, torch.full_like(gradient, 3.0))


def test_every_call_of_a_step_finds_no_gradients(tmp_path):
    calls = []

    class Watches(BackwardInside):
        def training_step(self, batch, batch_idx):
            calls.append(self.net[0].weight.grad is None)
            return super().training_step(batch, batch_idx)

    trainer = fitted(tmp_path, Watches(mlp()))
    calls.clear()
    trainer.attribute(DataLoader(classes(), 4), method="grad-dot")
    assert len(calls) > 6
    assert all(calls)


def norm_of_logits(module, batch):
    return module.net(batch[0].mul_(2)).square().sum(1)


def test_measurements_get_copies(tmp_path):
    trainer = fitted(tmp_path)
    query = [x[:4].clone() for x in classes().tensors]
    first = trainer.attribute(query, measurement=norm_of_logits).values
    assert torch.equal(query[0], classes().tensors[0][:4])
    assert torch.equal(trainer.attribute(query, measurement=norm_of_logits).values, first)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", METHODS)
def test_asked_without_gradients(mode, method, tmp_path):
    module = Classifier(mlp(), F.cross_entropy)
    trainer = fitted(tmp_path, module, mode="deferred")
    with mode():
        query = [x[:4].clone() for x in classes().tensors]
        inside = trainer.attribute(query, method=method).values
        scorer = SourceScorer.from_run(tmp_path / "run", module)
        in_another = scorer.score(query, classes(), method=method).values
    outside = trainer.attribute([x[:4] for x in classes().tensors], method=method).values
    assert torch.equal(inside, outside)
    assert torch.equal(in_another, outside)
    assert not any(parameter.is_inference() for parameter in module.parameters())
