"""When epochs began is kept in a few numbers, whatever their count, and the Trainer's counters come back from them."""

from functools import reduce

import pytest
from helpers import Classifier, classes, fitted, mlp, quiet_trainer
from torch.utils.data import DataLoader

from lightning_source import SourceCallback
from lightning_source.capture.trainer_view import Moment
from lightning_source.recording.epochs import EpochMark, moment_at, with_mark
from lightning_source.recording.store import RunStore


@pytest.mark.parametrize(
    ("lengths", "kept"), [([3] * 50, 2), ([3, 3, 2, 2, 2], 3), ([1, 2, 3], 3), ([4], 1), ([2, 0, 2, 2], 4)]
)
@pytest.mark.parametrize("per_step", [1, 2])
def test_every_step_has_its_epoch_again(lengths, kept, per_step):
    """A first step of 5, as in a second stage; ``per_step`` optimizers count on the Trainer's side."""
    starts = [5 + sum(lengths[:epoch]) for epoch in range(len(lengths))]
    marks = [EpochMark(start, epoch, per_step * (start - 5)) for epoch, start in enumerate(starts)]
    stored = reduce(with_mark, marks, ())
    assert len(stored) == kept
    for epoch, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        for step in range(start, start + length):
            moment = moment_at(stored, step)
            assert moment.current_epoch == epoch
            if start < starts[-1]:  # how fast the Trainer counts in the last epoch is known when it ends
                assert moment.global_step == per_step * (step - 5)


def test_no_marks_no_moment():
    assert moment_at([], 3) is None


def test_a_step_before_the_first_mark_is_at_it():
    assert moment_at([EpochMark(4, 2, 9)], 3) == Moment(9, 2)


def test_a_fit_keeps_them(tmp_path):
    fitted(tmp_path, max_epochs=4)
    (stage,) = RunStore.open(tmp_path / "run").manifest.stages
    assert stage.epochs == (EpochMark(0, 0, 0), EpochMark(9, 3, 9))
    assert (stage.trainer.max_epochs, stage.trainer.num_training_batches) == (4, 3)


class TwoOptimizers(Classifier):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return [self.optimizer(self.net[0].parameters()), self.optimizer(self.net[2].parameters())]


def test_steps_of_all_optimizers_count(tmp_path):
    fitted(tmp_path, TwoOptimizers(mlp()), optimizer=0)
    (stage,) = RunStore.open(tmp_path / "run").manifest.stages
    assert [moment_at(stage.epochs, step) for step in (0, 2, 3, 6)] == [
        Moment(0, 0),
        Moment(4, 0),
        Moment(6, 1),
        Moment(12, 1),
    ]


def test_a_resumed_fit_goes_on_with_them(tmp_path):
    callback = SourceCallback(str(tmp_path / "run"))
    loader = DataLoader(classes(), 8)
    trainer = quiet_trainer(tmp_path, callback, max_epochs=2)
    trainer.fit(Classifier(mlp()), loader)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = quiet_trainer(tmp_path, SourceCallback(str(tmp_path / "run")), max_epochs=4)
    again.fit(Classifier(mlp()), loader, ckpt_path=tmp_path / "half.ckpt")
    (stage,) = RunStore.open(tmp_path / "run").manifest.stages
    assert [moment_at(stage.epochs, step) for step in (0, 5, 6, 12)] == [
        Moment(0, 0),
        Moment(5, 1),
        Moment(6, 2),
        Moment(12, 3),
    ]
