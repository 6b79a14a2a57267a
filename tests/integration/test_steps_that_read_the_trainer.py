"""A step that reads the Trainer sees training at the snapshot that is examined, with and without a Trainer at hand."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, classes, fitted, gradient_rows, mlp
from torch import nn
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


class AsksForItsClass(Annealed):
    """Anneals where it is trained by a Trainer, and not in a script of its own."""

    def weight(self):
        return super().weight() if isinstance(self.trainer, L.Trainer) else 0.0


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


@pytest.mark.parametrize("kind", [Annealed, BySteps, Schedule, OfAnotherStage, Logging, AsksForItsClass])
def test_scores_with_and_without_the_trainer_are_equal(kind, tmp_path):
    trainer = fitted(tmp_path, kind(mlp()), max_epochs=4)
    scorer = SourceScorer.from_run(tmp_path / "run", kind(mlp()))
    for method in METHODS:
        here = trainer.attribute(QUERY, method=method).values
        assert torch.equal(scorer.score(QUERY, classes(), method=method).values, here)
        assert here.abs().sum() > 0


def test_a_step_that_asks_for_its_trainers_class_is_answered_as_in_fit(tmp_path):
    scores = []
    for kind in (Annealed, AsksForItsClass):
        torch.manual_seed(0)
        module = kind(mlp())
        trainer = fitted(tmp_path / kind.__name__, module, DataLoader(classes(), 8), max_epochs=4)
        scores.append(trainer.attribute(QUERY).values)
    assert torch.equal(*scores)


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

    def rows(examples):
        losses = (module.training_step([x[None], y[None]], 0) for x, y in examples)
        return gradient_rows(losses, list(module.parameters()))

    queries, examples = rows(zip(*QUERY, strict=True)), rows(classes())
    rates = 12 * 0.1  # of all steps
    torch.testing.assert_close(found, rates / len(classes()) * queries @ examples.T, rtol=1e-4, atol=1e-6)


def test_the_trainer_is_back_afterwards(tmp_path):
    module = Annealed(mlp())
    trainer = fitted(tmp_path, module)
    trainer.attribute(DataLoader(classes(), 4))
    assert module.trainer is trainer
    assert not trainer.training


class Schedules:
    """A helper object that a hook moves on."""

    def __init__(self):
        self.beta = 0.0


class OfEpochHook(Annealed):
    def on_train_epoch_start(self):
        self.beta = 0.3 * self.current_epoch

    def weight(self):
        return self.beta


class OfBatchHook(OfEpochHook):
    def on_train_epoch_start(self):
        pass

    def on_train_batch_start(self, batch, batch_idx):
        self.beta = torch.tensor(0.1 * self.trainer.global_step)


class OfHelper(OfEpochHook):
    def __init__(self, net):
        super().__init__(net)
        self.schedule, self.weights, self.phase = Schedules(), {"mse": 0.0}, "cold"
        self.save_hyperparameters({"beta": 0.0})

    def on_train_epoch_start(self):
        self.schedule.beta = self.weights["mse"] = self.hparams.beta = 0.1 * self.current_epoch
        self.phase = "warm" if self.current_epoch else "cold"

    def weight(self):
        return (self.schedule.beta + self.weights["mse"] + self.hparams.beta) * (self.phase == "warm")


class OfPart(Annealed):
    """A network of the user's that counts its own calls of an epoch."""

    def __init__(self, net):
        super().__init__(net)
        self.part = nn.Module()
        self.part.__class__ = type("Part", (nn.Module,), {"__module__": __name__})
        self.part.warm = False

    def on_train_epoch_end(self):
        self.part.warm = True

    def weight(self):
        return 0.5 * self.part.warm


@pytest.mark.parametrize("kind", [OfEpochHook, OfBatchHook, OfHelper, OfPart])
def test_attributes_that_hooks_set_are_those_of_the_snapshot(kind, tmp_path):
    trainer = fitted(tmp_path, kind(mlp()), max_epochs=4, snapshots_per_segment=4)
    scorer = SourceScorer.from_run(tmp_path / "run", kind(mlp()))
    for method in METHODS:
        here = trainer.attribute(QUERY, method=method).values
        assert torch.equal(scorer.score(QUERY, classes(), method=method).values, here)
        assert here.abs().sum() > 0


def test_attributes_come_back_and_have_the_values_of_their_epoch(tmp_path):
    module = OfEpochHook(mlp())
    trainer = fitted(tmp_path, module, max_epochs=4, snapshots_per_segment=4)
    module.beta = 17.0
    seen = []
    with trainer.callbacks[0].scorer(trainer) as scorer:
        run = scorer.run
        for state in [*(run.state(snapshot, "mean") for snapshot in run.snapshots), run.final()]:
            with run.workspace.at(state):
                seen.append(module.beta)
    assert seen == pytest.approx([0.0, 0.3, 0.6, 0.9, 0.9])
    assert module.beta == 17.0


def test_what_training_leaves_alone_is_the_models_own(tmp_path):
    """A model that is built with another constant than training had keeps it, as it keeps any other code of its own."""

    class Weighted(OfEpochHook):
        factor = 1.0

        def __init__(self, net, factor):
            super().__init__(net)
            self.factor = factor

        def weight(self):
            return self.factor * self.beta

    trainer = fitted(tmp_path, Weighted(mlp(), 1.0), max_epochs=4)
    here = trainer.attribute(QUERY, method="grad-dot").values
    other = SourceScorer.from_run(tmp_path / "run", Weighted(mlp(), 2.0)).score(QUERY, classes(), method="grad-dot")
    assert not torch.allclose(other.values, here)
