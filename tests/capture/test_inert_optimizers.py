"""A step that asks for its optimizers in a pass gets inert ones, of the same classes and with the same numbers."""

import pytest
import torch
from helpers import Classifier, classes, fitted, mlp
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, StepLR

from lightning_source import SourceScorer
from lightning_source.capture.inert_optimizers import kind_of
from lightning_source.capture.manual_optimization import ManualStep
from lightning_source.capture.objective import Objective

QUERY = [x[:4] for x in classes(8, seed=2).tensors]


class Own(torch.optim.SGD):
    """A user's own optimizer."""


class Computed(torch.optim.SGD):
    """Takes its groups from elsewhere, so they cannot be set."""

    @property
    def param_groups(self):
        return []


def of_kind(kind):
    (optimizer,) = ManualStep(groups=[[{"lr": 0.5}, {"lr": 0.1}]], kinds=[kind]).optimizers
    return optimizer


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.LBFGS, Own])
def test_the_class_is_the_real_ones(kind):
    optimizer = of_kind(kind_of(kind([nn.Parameter(torch.zeros(2))], lr=0.5)))
    assert isinstance(optimizer, LightningOptimizer)
    assert isinstance(optimizer, kind)
    assert isinstance(optimizer.optimizer, kind)
    assert not isinstance(optimizer.optimizer, LightningOptimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    assert optimizer.step(lambda: 3) == 3
    optimizer.zero_grad()
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("kind", ["", "no.such.module:Class", "torch.optim:no_such_class", "torch:nn.Linear"])
def test_a_class_that_is_not_loaded_is_an_optimizer(kind):
    assert isinstance(of_kind(kind), (torch.optim.Optimizer, LightningOptimizer))


def test_a_class_that_computes_its_groups_is_an_optimizer():
    optimizer = of_kind(f"{__name__}:Computed")
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    assert not isinstance(optimizer, Computed)


def test_schedulers_show_their_optimizers_rates():
    (scheduler,) = ManualStep(schedulers=1, groups=[[{"lr": 0.5}]]).schedulers
    scheduler.step()
    assert isinstance(scheduler, LRScheduler)
    assert scheduler.get_last_lr() == [0.5]


def checked(module):
    optimizer, raw, scheduler = module.optimizers(), module.optimizers(use_pl_optimizer=False), module.lr_schedulers()
    assert isinstance(optimizer, (torch.optim.Optimizer, LightningOptimizer))
    assert isinstance(raw, torch.optim.SGD)
    assert isinstance(scheduler, LRScheduler)
    return optimizer


def with_scheduler(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return [optimizer], [StepLR(optimizer, 100)]


class ByHand(Classifier):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = checked(self)
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self):
        return with_scheduler(self)


class Looking(Classifier):
    """Optimizes automatically, and weights its loss by a rate."""

    def training_step(self, batch, batch_idx):
        optimizer = checked(self)
        optimizer.zero_grad()
        rate = optimizer.param_groups[0]["lr"] + self.lr_schedulers().get_last_lr()[0]
        return (1 + rate) * super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return with_scheduler(self)


@pytest.mark.parametrize("kind", [ByHand, Looking])
def test_scores_with_and_without_the_trainer_are_equal(kind, tmp_path):
    module = kind(mlp())
    trainer = fitted(tmp_path, module)
    after = [p.detach().clone() for p in module.parameters()]
    here = trainer.attribute(QUERY).values
    assert all(torch.equal(p, kept) for p, kept in zip(module.parameters(), after, strict=True))
    there = SourceScorer.from_run(tmp_path / "run", kind(mlp())).score(QUERY, classes()).values
    assert torch.equal(here, there)


def test_without_a_trainer_the_step_is_answered_and_its_methods_come_back():
    module = Looking(mlp())
    losses = Objective(module, schedulers=1, kinds=["torch.optim.sgd:SGD"]).evaluate(QUERY, 4)
    assert float(losses.loss) > 0
    assert not {"optimizers", "lr_schedulers"} & vars(module).keys()
