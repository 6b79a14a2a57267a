"""A step that reads the Trainer sees the moment of training that is examined, with and without a Trainer at hand."""

import math

import lightning as L
import pytest
from lightning.pytorch.trainer.states import RunningStage, TrainerFn

from lightning_source.capture.trainer_view import Moment, TrainerFacts, TrainerView, training_seen
from lightning_source.recording.typed_json import from_json, to_json

MOMENT = Moment(global_step=7, current_epoch=2)


class Nested(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.inner = L.LightningModule()


def view(real=None, **facts) -> TrainerView:
    return TrainerView(MOMENT, TrainerFacts(**facts), real)


@pytest.mark.parametrize("real", [None, "trainer"])
def test_the_module_stands_at_the_moment(real, tmp_path):
    module = Nested()
    trainer = L.Trainer(default_root_dir=tmp_path, logger=False) if real else None
    if trainer is not None:
        module.trainer = trainer
    with training_seen(module, MOMENT):
        for part in (module, module.inner):
            assert (part.global_step, part.current_epoch) == (7, 2)
            assert part.trainer.training
            assert part.trainer.state.fn == TrainerFn.FITTING
            assert part.trainer.state.stage == RunningStage.TRAINING == "train"
            assert not part.trainer.sanity_checking
    assert module._trainer is trainer
    assert module.inner._trainer is trainer


def test_it_goes_when_the_step_fails():
    module = Nested()
    with pytest.raises(RuntimeError), training_seen(module, MOMENT):
        raise RuntimeError
    assert module._trainer is None


def test_the_real_trainer_answers_the_rest(tmp_path):
    trainer = L.Trainer(default_root_dir=tmp_path, logger=False)
    assert view(trainer).strategy is trainer.strategy


@pytest.mark.parametrize(
    ("facts", "steps"),
    [
        ({"max_steps": 12}, 12),
        ({"max_epochs": 3, "num_training_batches": 5}, 15),
        ({"max_epochs": 3, "num_training_batches": 5, "accumulate_grad_batches": 2}, 9),
        ({"max_epochs": 3, "num_training_batches": 5, "max_steps": 12}, 12),
        ({"max_epochs": -1, "num_training_batches": 5}, float("inf")),
        ({"max_epochs": 3, "num_training_batches": None}, float("inf")),
    ],
)
def test_schedules_over_the_whole_run_have_its_length(facts, steps):
    assert view(**facts).estimated_stepping_batches == steps


def test_what_no_run_knows_is_named():
    with pytest.raises(AttributeError, match=r"`training_step` reads `trainer\.profiler`.*HINT"):
        _ = view().profiler


@pytest.mark.parametrize("batches", [5, None])
def test_facts_go_into_a_manifest(batches):
    facts = TrainerFacts(max_epochs=4, num_training_batches=batches)
    assert from_json(TrainerFacts, to_json(facts)) == facts


def test_without_word_it_shows_what_the_trainer_shows(tmp_path):
    module = Nested()
    module.trainer = trainer = L.Trainer(default_root_dir=tmp_path, logger=False, max_epochs=5)
    trainer.fit_loop.epoch_progress.current.completed = 3
    with training_seen(module):
        assert (module.trainer.max_epochs, module.current_epoch, module.trainer.num_training_batches) == (
            5,
            3,
            math.inf,
        )
        with training_seen(module, MOMENT):  # passes within passes
            assert module.trainer.real_trainer is trainer
            assert module.current_epoch == 2
        assert module.current_epoch == 3


def test_a_datamodules_hooks_see_it_too():
    datamodule = L.LightningDataModule()
    with training_seen(Nested(), MOMENT, datamodule=datamodule):
        assert datamodule.trainer.training
    assert datamodule.trainer is None


def test_loggers_take_what_they_are_given():
    module = Nested()
    with training_seen(module, MOMENT):
        module.logger.experiment.add_scalar("loss", 1.0)
        assert module.trainer.lightning_module is module
