"""Scores as of a moment of training are those of the training that had ended there.

The oracle is that training itself, run anew with the same seed. Where the query's gradient is averaged along the
trajectory the two are the same numbers; what asks for the parameters at the end gets them between two running means.
"""

import pytest
import torch
from helpers import QUERY, Classifier, classes, close, fitted, quiet_trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_source import SourceCallback, SourceScorer

EPOCH = 3  # optimizer steps


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def trained(path, epochs, segments=1, optimizer=None, snapshots=None):
    """A snapshot for each epoch, if not said otherwise, and the factors of all examples."""
    torch.manual_seed(0)
    module = Classifier(optimizer=optimizer)
    return fitted(
        path,
        module,
        DataLoader(classes(), 8),
        max_epochs=epochs,
        segments=segments,
        snapshots_per_segment=(snapshots or epochs) // segments,
        factor_examples=None,
    )


@pytest.mark.check("stage", "an earlier moment of it", "scores of the training that ended there")
@pytest.mark.parametrize("optimizer", [None, adam], ids=["SGD", "Adam"])
@pytest.mark.parametrize(("at", "epochs", "segments"), [("epoch 2", 2, 1), (2 * EPOCH, 2, 1), (0.75, 3, 1)])
@pytest.mark.parametrize("options", [{}, {"method": "tracin", "per_segment": True}], ids=["source", "tracin"])
def test_scores_are_those_of_the_training_that_ended_there(tmp_path, optimizer, at, epochs, segments, options):
    """Where the moment is within a segment, what is left of it is one."""
    long = trained(tmp_path / "long", 4, 2 if epochs == 2 else 1, optimizer)
    short = trained(tmp_path / "short", epochs, segments, optimizer)
    found = long.attribute(QUERY, at=at, **options)
    close(found.values, short.attribute(QUERY, **options).values)
    assert found.metadata["step"] == epochs * EPOCH
    again = SourceScorer.from_run(tmp_path / "long" / "run", Classifier(), at=at).score(QUERY, classes(), **options)
    assert torch.equal(again.values, found.values)


def test_the_end_is_asked_as_before(tmp_path):
    trainer = trained(tmp_path, 4, 2)
    before = trainer.attribute(QUERY).values
    assert not torch.equal(trainer.attribute(QUERY, at=0.5).values, before)
    assert torch.equal(trainer.attribute(QUERY, at="epoch 4").values, before)
    assert torch.equal(trainer.attribute(QUERY, at=1.0).values, before)
    assert torch.equal(trainer.attribute(QUERY).values, before)


def test_parameters_are_between_the_means_on_either_side(tmp_path):
    long, short = (trained(tmp_path / str(n), 10 * n, snapshots=2 * n) for n in (2, 1))
    ended = {name: p.detach() for name, p in short.lightning_module.named_parameters()}

    def distance(state):
        return sum((state[name] - value).square().sum() for name, value in ended.items()).sqrt()

    scorer = SourceScorer.from_run(tmp_path / "2" / "run", Classifier(), at=0.5)
    last = scorer.run.state(scorer.run.snapshots[-1], "mean")
    # A mean lags behind by half a snapshot, the line through two of them by the curvature of the way.
    assert distance(scorer.run.final()) < 0.2 * distance(last)
    scores = [t.attribute(QUERY, method="grad-cos", **o).values for t, o in ((long, {"at": 0.5}), (short, {}))]
    assert (scores[0] - scores[1]).norm() < 0.05 * scores[1].norm()


def test_an_earlier_stage_and_the_way_into_a_later_one(tmp_path):
    source, module = SourceCallback(str(tmp_path / "run"), snapshots_per_segment=2), Classifier()
    for name in ("first", "second"):
        trainer = quiet_trainer(tmp_path, source.stage(name), max_epochs=2)
        trainer.fit(module, DataLoader(classes(), 8))
        if name == "first":
            alone = trainer.attribute(QUERY).values
    close(trainer.attribute(QUERY, at=2 * EPOCH).values, alone)
    close(trainer.attribute(QUERY, at="epoch 2", stage="first").values, alone)
    carried = trainer.attribute(QUERY, at=3 * EPOCH, stage="first")
    assert carried.metadata["step"] == 3 * EPOCH
    assert not torch.allclose(carried.values, alone)
    # The data of a stage that has not begun are not asked for.
    early = SourceScorer.from_run(tmp_path / "run", Classifier(), at=EPOCH, stage_data={"second": classes()})
    assert early.score(QUERY, classes()).metadata["stage"] == "first"
    with pytest.raises(MisconfigurationException, match=r'`stage="second"`|`stage=.second.`'):
        trainer.attribute(QUERY, at=EPOCH, stage="second")


def test_a_step_between_snapshots_is_said_to_be_another(tmp_path):
    trainer = trained(tmp_path, 4)
    with pytest.warns(UserWarning, match=r"`at=5` is step 5, and the run is known after the steps 3, 6, 9, 12: .* 6\."):
        scores = trainer.attribute(QUERY, at=5)
    assert torch.equal(scores.values, trainer.attribute(QUERY, at=6).values)


@pytest.mark.parametrize("at", [0, 13, -1, 1.5, 0.0, "epoch 5", "epoch", True, "0.5", [3]])
def test_what_is_no_point_of_the_run_is_refused(tmp_path, at):
    with pytest.raises(MisconfigurationException, match=r"is no point of this run, which has 12 steps\. HINT"):
        trained(tmp_path, 4).attribute(QUERY, at=at)
