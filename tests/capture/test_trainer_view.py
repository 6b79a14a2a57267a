"""A step that reads the Trainer sees the moment of training that is examined, with and without a Trainer at hand."""

import lightning as L
import pytest
from lightning.pytorch.trainer.states import RunningStage, TrainerFn

from lightning_source.capture.trainer_view import Moment, TrainerFacts, TrainerView, seen_by


class Nested(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.inner = L.LightningModule()


def view(real=None, **facts) -> TrainerView:
    return TrainerView(Moment(global_step=7, current_epoch=2), TrainerFacts(**facts), real)


@pytest.mark.parametrize("real", [None, "trainer"])
def test_the_module_stands_at_the_moment(real, tmp_path):
    module = Nested()
    trainer = L.Trainer(default_root_dir=tmp_path, logger=False) if real else None
    with seen_by(module, view(trainer)):
        for part in (module, module.inner):
            assert (part.global_step, part.current_epoch) == (7, 2)
            assert part.trainer.training
            assert part.trainer.state.fn == TrainerFn.FITTING
            assert part.trainer.state.stage == RunningStage.TRAINING == "train"
            assert not part.trainer.sanity_checking
    assert module._trainer is None
    assert module.inner._trainer is None


def test_it_goes_when_the_step_fails():
    module = Nested()
    with pytest.raises(RuntimeError), seen_by(module, view()):
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
        ({"max_epochs": -1, "num_training_batches": 5}, float("inf")),
    ],
)
def test_schedules_over_the_whole_run_have_its_length(facts, steps):
    assert view(**facts).estimated_stepping_batches == steps


def test_what_no_run_knows_is_named():
    with pytest.raises(AttributeError, match=r"`training_step` reads `trainer\.profiler`.*HINT"):
        _ = view().profiler


def test_facts_go_into_a_manifest():
    assert TrainerFacts(num_training_batches=float("inf")).to_json().get("num_training_batches") is None
    assert TrainerFacts(**TrainerFacts(max_epochs=4).to_json()) == TrainerFacts(max_epochs=4)
