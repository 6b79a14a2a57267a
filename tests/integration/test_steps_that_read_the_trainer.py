"""A step that reads the Trainer sees training at the snapshot that is examined, with and without a Trainer at hand."""

import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, classes, fitted, mlp
from torch.utils.data import DataLoader

from lightning_source import SourceScorer
from lightning_source.passes.states import moment_of

QUERY = [x[:4] for x in classes(8, seed=2).tensors]
METHODS = ("source", "fast-source", "influence", "tracin", "grad-dot")


class Annealed(Classifier):
    def weight(self):
        return self.current_epoch / 4

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        outputs = self.net(inputs)
        return F.cross_entropy(outputs, targets) + self.weight() * F.mse_loss(outputs, F.one_hot(targets, 3).float())


class BySteps(Annealed):
    def weight(self):
        return min(1.0, self.trainer.global_step / self.trainer.estimated_stepping_batches)


class Schedule(Annealed):
    """A list with an entry for each epoch, and none for the epoch after the last."""

    def weight(self):
        return [0.1, 0.2, 0.4, 0.8][self.trainer.current_epoch]


class OfAnotherStage(Annealed):
    """Gives a loss in training only, as libraries do whose step is shared with validation."""

    def training_step(self, batch, batch_idx):
        if not self.trainer.training or self.trainer.state.stage != "train" or self.trainer.sanity_checking:
            return None
        return super().training_step(batch, batch_idx)


class Logging(Annealed):
    """Reads what does not change the loss, in all the ways that lead to the Trainer."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        rates = [group["lr"] for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        assert len(rates) == 1
        assert self.trainer.max_epochs == 4
        assert self.trainer.num_training_batches == 3
        if self.trainer.is_global_zero and self.logger is not None and self.global_step % 2:
            self.logger.log_metrics({"rate": rates[0]})
        return loss / self.trainer.world_size


@pytest.mark.parametrize("kind", [Annealed, BySteps, Schedule, OfAnotherStage, Logging])
def test_scores_with_and_without_the_trainer_are_equal(kind, tmp_path):
    trainer = fitted(tmp_path, kind(mlp()), max_epochs=4)
    scorer = SourceScorer.from_run(tmp_path / "run", kind(mlp()))
    for method in METHODS:
        here = trainer.attribute(QUERY, method=method).values
        assert torch.equal(scorer.score(QUERY, classes(), method=method).values, here)
        assert here.abs().sum() > 0


def test_each_snapshot_has_the_epoch_that_it_is_of(tmp_path):
    """Four epochs of three steps in four snapshots: their middles, and the end, which is still the last epoch."""
    trainer = fitted(tmp_path, Annealed(mlp()), max_epochs=4, snapshots_per_segment=4)
    with trainer.callbacks[0].scorer(trainer) as scorer:
        run = scorer.run
        moments = [moment_of(run.state(snapshot, "mean")) for snapshot in run.snapshots]
        assert [m.current_epoch for m in moments] == [0, 1, 2, 3]
        assert [m.global_step for m in moments] == [1, 4, 7, 10]
        assert (run.workspace.end.global_step, run.workspace.end.current_epoch) == (12, 3)


def test_gradients_are_those_of_the_loss_at_the_end(tmp_path):
    """Products of gradients that were taken by hand, with the weight of the last epoch."""
    module = Annealed(mlp())
    trainer = fitted(tmp_path, module, max_epochs=4)
    found = trainer.attribute(QUERY, method="grad-dot").values
    module.weight = lambda: 3 / 4

    def gradient(inputs, target):
        loss = module.training_step([inputs[None], target[None]], 0)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])

    queries = torch.stack([gradient(*item) for item in zip(*QUERY, strict=True)])
    examples = torch.stack([gradient(*item) for item in classes()])
    rates = 12 * 0.1  # of all steps
    torch.testing.assert_close(found, rates / len(classes()) * queries @ examples.T, rtol=1e-4, atol=1e-6)


def test_the_trainer_is_back_afterwards(tmp_path):
    module = Annealed(mlp())
    trainer = fitted(tmp_path, module)
    trainer.attribute(DataLoader(classes(), 4))
    assert module.trainer is trainer
    assert not trainer.training
