"""A run that was killed and resumed from a checkpoint is the run that was never interrupted."""

import pickle
import shutil
import warnings

import lightning as L
import pytest
import torch
from helpers import QUERY, Classifier, classes, mlp, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_source import SourceCallback, SourceScorer
from lightning_source.recording.snapshots import mean_parameters
from lightning_source.recording.store import RunStore


class Dies(L.Callback):
    """Raises after the step with this number, as a crash would."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


def fit(tmp_path, *callbacks, epochs=6, ckpt=None, seed=0, batch_size=8, **options):
    torch.manual_seed(seed)
    settings = {"segments": 2, "snapshots_per_segment": 2} | options.pop("settings", {})
    source = SourceCallback(str(tmp_path / "run"), **settings)
    trainer = quiet_trainer(tmp_path, source, *callbacks, max_epochs=epochs, enable_checkpointing=True, **options)
    module = Classifier(mlp(), optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9))
    trainer.fit(module, DataLoader(classes(), batch_size), ckpt_path=ckpt)
    return trainer


def saves(tmp_path, every):
    return ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=every, save_top_k=-1, filename="{step}")


# every: steps between checkpoints; from: the one resumed from; dies: the crash
@pytest.mark.parametrize(("every", "start", "dies"), [(3, 6, 8), (4, 8, 17), (2, 2, 3), (5, 15, 16)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, every, start, dies, accumulate):
    """Bins have merged and doubled between checkpoint and crash in some of these.

    Every step ends an epoch: Lightning itself begins an epoch's loader anew when it resumes within one.
    """
    options = {"accumulate_grad_batches": accumulate, "epochs": 18, "batch_size": 24 // accumulate}
    whole = fit(tmp_path / "whole", **options)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path / "cut", saves(tmp_path, every), Dies(dies), **options)
    ckpt = next((tmp_path / "ckpt").glob(f"step={start}.ckpt"))
    resumed = fit(tmp_path / "cut", ckpt=ckpt, seed=9, **options)
    one, other = (RunStore.open(tmp_path / name / "run") for name in ("whole", "cut"))
    for key in ("snapshots", "segments", "steps"):
        assert getattr(one.manifest, key) == getattr(other.manifest, key)
    assert len(one.manifest.files) == len(other.manifest.files)
    for name in ("steps.safetensors", "final.safetensors", *(s.file for s in one.manifest.snapshots)):
        for key, value in one.read(name).items():
            assert torch.equal(value, other.read(name)[key]), (name, key)
    assert torch.equal(whole.attribute(QUERY).values, resumed.attribute(QUERY).values)


def test_only_the_last_checkpoints_can_be_resumed_and_older_ones_say_so(tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, saves(tmp_path, 1), Dies(10))
    with pytest.warns(UserWarning, match="keeps no record to go on"):
        trainer = fit(tmp_path, ckpt=tmp_path / "ckpt" / "step=2.ckpt")
    assert trainer.attribute(QUERY).values.isfinite().all()


def test_a_checkpoint_without_our_state(tmp_path):
    plain = quiet_trainer(tmp_path, saves(tmp_path, 3), enable_checkpointing=True)
    plain.fit(Classifier(mlp(), optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)), DataLoader(classes(), 8))
    with pytest.warns(UserWarning, match="resumes at step 3"):
        trainer = fit(tmp_path, ckpt=tmp_path / "ckpt" / "step=3.ckpt")
    manifest = RunStore.open(tmp_path / "run").manifest
    assert manifest.flags.history_incomplete
    assert manifest.steps == 15
    assert trainer.attribute(QUERY).values.shape == (4, 24)


def test_a_finished_run_can_be_resumed_and_asked(tmp_path):
    before = fit(tmp_path, saves(tmp_path, 18)).attribute(QUERY).values
    trainer = fit(tmp_path, ckpt=tmp_path / "ckpt" / "step=18.ckpt")  # no step is left
    assert torch.equal(trainer.attribute(QUERY, train=classes()).values, before)


@pytest.mark.check("stage", "a finished run, continued", "one stage; means and rates equal to the uninterrupted run")
@pytest.mark.parametrize("settings", [{}, {"segments": [4]}])
def test_a_finished_run_that_is_continued_is_one_run(tmp_path, settings):
    """Its snapshots are merged with the new ones, so means of the parameters are those of the whole run."""
    whole = fit(tmp_path / "whole", epochs=12, settings=settings)
    fit(tmp_path / "cut", saves(tmp_path, 18), settings=settings).attribute(QUERY, method="influence")
    resumed = fit(tmp_path / "cut", ckpt=tmp_path / "ckpt" / "step=18.ckpt", epochs=12, seed=9, settings=settings)
    one, other = (RunStore.open(tmp_path / name / "run") for name in ("whole", "cut"))
    assert [stage.name for stage in other.manifest.stages] == ["fit"]
    for a, b in zip(one.manifest.segments, other.manifest.segments, strict=True):
        assert abs(a.last - b.last) <= 1  # bins are longer
    assert torch.equal(one.read("steps.safetensors")["steps"], other.read("steps.safetensors")["steps"])
    means = [mean_parameters(s, s.manifest.snapshots) for s in (one, other)]
    for name, value in means[0].items():
        torch.testing.assert_close(means[1][name], value, rtol=1e-5, atol=1e-7)
    on_disk = {str(p.relative_to(other.path)) for p in other.path.rglob("*.safetensors")}
    assert on_disk == set(other.manifest.files)
    expected, found = (t.attribute(QUERY, segments=1).values for t in (whole, resumed))
    # Snapshots that differ by a step draw a few of the 24 examples' labels otherwise.
    assert torch.corrcoef(torch.stack([expected.flatten(), found.flatten()]))[0, 1] > 0.97


def test_an_older_checkpoint_of_a_finished_run_begins_another_stage(tmp_path):
    fit(tmp_path, saves(tmp_path, 9))
    with pytest.warns(UserWarning, match="as a stage of their own"):
        trainer = fit(tmp_path, ckpt=tmp_path / "ckpt" / "step=9.ckpt", epochs=8)
    stages = RunStore.open(tmp_path / "run").manifest.stages
    assert [stage.name for stage in stages] == ["fit", "fit-1"]
    assert trainer.attribute(QUERY, stage=1).values.isfinite().all()


def test_an_interrupted_run_can_be_asked_before_it_is_resumed(tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, saves(tmp_path, 3), Dies(8))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    model = Classifier(mlp())
    scores = SourceScorer.from_run(tmp_path / "copy", model).score(QUERY, classes())
    assert scores.values.isfinite().all()
    fit(tmp_path, ckpt=tmp_path / "ckpt" / "step=6.ckpt")
    assert RunStore.open(tmp_path / "run").manifest.steps == 18


def test_testing_a_checkpoint_leaves_the_recording_alone(tmp_path):
    class Tested(Classifier):
        def test_step(self, batch, batch_idx):
            self.loss(self.net(batch[0]), batch[1])

    source = SourceCallback(str(tmp_path / "run"))
    trainer = quiet_trainer(tmp_path, source, saves(tmp_path, 2), enable_checkpointing=True)
    module = Tested(mlp())
    trainer.fit(module, DataLoader(classes(), 8))
    before = trainer.attribute(QUERY).values
    trainer.test(module, DataLoader(classes(), 8), ckpt_path=tmp_path / "ckpt" / "step=2.ckpt", verbose=False)
    assert torch.equal(trainer.attribute(QUERY).values, before)


def test_a_resume_within_an_epoch_is_recorded(tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, saves(tmp_path, 4), Dies(5))
    trainer = fit(tmp_path, ckpt=tmp_path / "ckpt" / "step=4.ckpt")
    manifest = RunStore.open(tmp_path / "run").manifest
    assert manifest.flags.resumed_mid_epoch
    assert manifest.steps == trainer.global_step
    assert trainer.attribute(QUERY).values.isfinite().all()


def test_the_state_in_a_checkpoint_is_small_and_plain(tmp_path):
    fit(tmp_path, saves(tmp_path, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint = torch.load(tmp_path / "ckpt" / "step=9.ckpt", weights_only=True)
    (state,) = (v for k, v in checkpoint["callbacks"].items() if k.startswith("SourceCallback"))
    assert len(pickle.dumps(state)) < 4096
    assert all(isinstance(value, (int, str)) for value in state.values())


def test_a_checkpoint_saved_after_the_fit_can_be_continued(tmp_path):
    trainer = fit(tmp_path)
    trainer.attribute(QUERY, method="influence")
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    before = RunStore.open(tmp_path / "run").manifest.files
    assert "segments/0.safetensors" in before
    resumed = fit(tmp_path, ckpt=tmp_path / "last.ckpt", epochs=8)
    manifest = RunStore.open(tmp_path / "run").manifest
    assert (len(manifest.stages), manifest.steps) == (1, 24)
    assert resumed.attribute(QUERY).values.isfinite().all()


def test_a_continued_run_that_dies_at_once_is_continued_again(tmp_path):
    fit(tmp_path, saves(tmp_path, 18))
    ckpt = tmp_path / "ckpt" / "step=18.ckpt"
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, Dies(20), ckpt=ckpt, epochs=8)
    fit(tmp_path, ckpt=ckpt, epochs=8)
    manifest = RunStore.open(tmp_path / "run").manifest
    assert (len(manifest.stages), manifest.steps) == (1, 24)


def test_a_run_asked_before_it_is_resumed_is_still_one_run(tmp_path):
    """What a scorer makes of an unfinished run lies beside it, and is found again."""
    whole = fit(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path / "cut", saves(tmp_path, 3), Dies(8))
    first = SourceScorer.from_run(tmp_path / "cut" / "run", Classifier(mlp())).score(QUERY, classes())
    again = SourceScorer.from_run(tmp_path / "cut" / "run", Classifier(mlp())).score(QUERY, classes())
    assert torch.equal(first.values, again.values)
    assert (tmp_path / "cut" / "run" / "partial" / "manifest.json").exists()
    resumed = fit(tmp_path / "cut", ckpt=tmp_path / "ckpt" / "step=6.ckpt", seed=9)
    manifest = RunStore.open(tmp_path / "cut" / "run").manifest
    assert (len(manifest.stages), manifest.steps) == (1, 18)
    assert torch.equal(resumed.attribute(QUERY).values, whole.attribute(QUERY).values)


class Asks(L.Callback):
    """Scores the run from outside while it is being recorded."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 7:
            path = trainer.callbacks[0].dirpath
            self.scores = SourceScorer.from_run(path, Classifier(mlp())).score(QUERY, classes())


def test_a_run_may_be_asked_while_it_is_recorded(tmp_path):
    asks = Asks()
    trainer = fit(tmp_path / "a", asks)
    expected = fit(tmp_path / "b")
    assert asks.scores.metadata["segments"][-1]["last"] == 4  # the last bin that ended
    assert torch.equal(trainer.attribute(QUERY).values, expected.attribute(QUERY).values)


def test_a_fit_that_fails_before_its_first_step_leaves_the_callback_usable(tmp_path):
    class Fails(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            raise RuntimeError("at once")

    source = SourceCallback(str(tmp_path / "run"))
    loader = DataLoader(classes(), 8)
    with pytest.raises(RuntimeError, match="at once"):
        quiet_trainer(tmp_path, source, Fails()).fit(Classifier(mlp()), loader)
    trainer = quiet_trainer(tmp_path, source)
    trainer.fit(Classifier(mlp()), loader)
    assert [stage.name for stage in RunStore.open(tmp_path / "run").manifest.stages] == ["fit"]
    assert trainer.attribute(QUERY).values.isfinite().all()


def test_influence_after_another_stage_is_that_of_the_new_final_model(tmp_path):
    trainer = fit(tmp_path, saves(tmp_path, 9))
    trainer.attribute(QUERY, method="influence")
    with pytest.warns(UserWarning, match="as a stage of their own"):
        later = fit(tmp_path, ckpt=tmp_path / "ckpt" / "step=9.ckpt", epochs=9)
    found = later.attribute(QUERY, method="influence").values
    with later.callbacks[0].scorer(later) as scorer:
        run = scorer.run
        for name in [n for n in run.store.manifest.files if "final-of" in n]:
            del run.store.manifest.files[name]
        fresh = scorer.score(QUERY, method="influence").values
    assert torch.equal(found, fresh)


def test_a_full_disk_does_not_end_training(tmp_path, monkeypatch):
    write, calls = RunStore.write, []

    def full(self, name, tensors):
        calls.append(name)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        return write(self, name, tensors)

    monkeypatch.setattr(RunStore, "write", full)
    with pytest.warns(UserWarning, match="stops recording"):
        trainer = fit(tmp_path)
    assert trainer.global_step == 18
    monkeypatch.undo()
    scores = SourceScorer.from_run(tmp_path / "run", Classifier(mlp())).score(QUERY, classes())
    assert scores.values.isfinite().all()
