"""Runs that are killed, moved, resumed, shared and asked in between: the whole record, or a word."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from faults.processes import in_child
from faults.scenarios import (
    EPOCHS,
    QUERY,
    StopAt,
    fit,
    further,
    last_checkpoint,
    model,
    retraining,
    score,
)
from helpers import Classifier, classes, mlp, quiet_trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_source import SourceCallback, SourceScorer, callback
from lightning_source._files import SCRATCH
from lightning_source.evaluation import random_subsets, retrain
from lightning_source.recording.claim import Claim, ClaimedError
from lightning_source.recording.manifest import MANIFEST
from lightning_source.recording.session import RecordingSession
from lightning_source.recording.store import RunStore
from lightning_source.runs.run import Run

WHOLE = EPOCHS * 3


def killed_at(place, name, run, checkpoints):
    """A fit that is killed when a method is called."""

    def work():
        setattr(place, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        fit(run, checkpoints=checkpoints)

    assert in_child(work).how == "killed"


# ---------------------------------------------------------------- the whole run


def test_killed_before_the_last_bin_and_resumed_with_nothing_left_to_train(tmp_path, stops):
    run, checkpoints = tmp_path / "run", tmp_path / "checkpoints"
    killed_at(RecordingSession, "close", run, checkpoints)
    assert RunStore.open(run).manifest.status == "running"
    trainer, _ = fit(run, checkpoint=last_checkpoint(checkpoints))
    assert trainer.global_step == WHOLE
    assert torch.equal(trainer.attribute(QUERY).values, stops[WHOLE])
    assert torch.equal(score(run), stops[WHOLE])
    assert RunStore.open(run).manifest.status == "finished"


@pytest.mark.parametrize("step", [3, 6, 9, 12])
def test_killed_while_factors_are_made_and_resumed_from_any_checkpoint(tmp_path, stops, step):
    run, checkpoints = tmp_path / "run", tmp_path / "checkpoints"
    killed_at(Run, "cross_layer_factors", run, checkpoints)
    if step != WHOLE:
        assert torch.equal(score(run), stops[WHOLE])  # asking the run in between changes nothing
    kept = sorted(RunStore.open(run).manifest.resume)
    checkpoint = checkpoints / f"step={step}.ckpt"
    trainer, _ = fit(run, checkpoint=checkpoint)
    if step not in kept:  # older than the last three
        assert [stage.name for stage in RunStore.open(run).manifest.stages] == ["fit", "fit-1"]
        return
    assert torch.equal(trainer.attribute(QUERY).values, stops[WHOLE])
    assert RunStore.open(run).manifest.resume == {}
    assert not list((run / "bins").iterdir())


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again(tmp_path, stops, seed):
    from faults.events import Faults
    from faults.scenarios import under

    run, checkpoints = tmp_path / "run", tmp_path / "checkpoints"
    generator = torch.Generator().manual_seed(seed)
    for _ in range(8):
        last = last_checkpoint(checkpoints)
        at = int(torch.randint(30, 330, (1,), generator=generator))
        outcome = under(
            Faults(run, "kill", at),
            lambda last=last: fit(run, checkpoint=last, checkpoints=checkpoints, overwrite=last is None)[1],
        )
        if outcome.how == "done":
            break
        assert outcome.how == "killed"
    else:
        fit(run, checkpoint=last_checkpoint(checkpoints), overwrite=last_checkpoint(checkpoints) is None)
    assert torch.equal(score(run), stops[WHOLE])


def test_the_model_as_it_is_now_is_asked_about_on_wish(tmp_path):
    """As if those had been the weights that training ended with."""
    trainer, _ = fit(tmp_path / "run")
    before = trainer.attribute(QUERY, method="influence").values
    other = Classifier(mlp())
    trainer.lightning_module.load_state_dict(other.state_dict())
    now = trainer.attribute(QUERY, weights="module", method="grad-cos").values
    expected = SourceScorer.from_model(other, classes(), batch_size=8).score(QUERY, method="grad-cos").values
    torch.testing.assert_close(now, expected, rtol=0, atol=float(1e-5 * expected.abs().max()))
    for method in ("source", "influence"):
        values = trainer.attribute(QUERY, weights="module", method=method).values
        assert not torch.equal(values, trainer.attribute(QUERY, weights="record", method=method).values)
    assert torch.equal(trainer.attribute(QUERY, weights="record", method="influence").values, before)
    with pytest.raises(MisconfigurationException, match=r'query_at="trajectory"'):
        trainer.attribute(QUERY, weights="module", query_at="trajectory")
    with pytest.raises(MisconfigurationException, match=r'weights="best"'):
        trainer.attribute(QUERY, weights="best")


def test_a_module_that_is_not_what_the_record_ends_with_is_named(tmp_path):
    trainer, _ = fit(tmp_path / "run")
    with torch.no_grad():
        trainer.lightning_module.net[0].weight.add_(1.0)
    with pytest.warns(UserWarning, match=r"1 of 4 parameters.*net\.0\.weight"):
        trainer.attribute(QUERY)


def test_a_run_that_did_not_end_says_so(tmp_path):
    with pytest.raises(RuntimeError, match="stopped"):
        fit(tmp_path / "run", StopAt(8))
    with pytest.warns(UserWarning, match="has not ended.*first 8 steps"):
        SourceScorer.from_run(str(tmp_path / "run"), model())


class SaveAt(L.Callback):
    """A checkpoint in the middle of a bin."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("harm", ["resume", "bins"])
def test_a_damaged_resume_point_is_named_and_the_steps_from_here_on_recorded(tmp_path, harm):
    run, checkpoint = tmp_path / "run", tmp_path / "seven.ckpt"
    with pytest.raises(RuntimeError, match="stopped"):
        fit(run, SaveAt(7, checkpoint), StopAt(8))
    file = min((run / harm).glob("step*"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.warns(UserWarning, match=f"{file.name}.*does not match the sha256") as said:
        _, weights = fit(run, checkpoint=checkpoint)
    assert any("keeps no record to go on from" in str(one.message) for one in said)
    assert torch.equal(weights, fit(None, checkpoint=checkpoint)[1])
    manifest = RunStore.open(run).manifest
    # What cannot be read of the first stage is given up.
    assert [stage.name for stage in manifest.stages] == {"resume": ["fit", "fit-1"], "bins": ["fit"]}[harm]
    assert manifest.segments[-1].last - manifest.segments[-1].first > 0


# ---------------------------------------------------------------- recognised by the run


@pytest.mark.parametrize("then", ["run", "./run", "run/", "other/../run", "absolute", "moved"])
def test_a_run_is_resumed_however_its_directory_is_spelled(tmp_path, monkeypatch, stops, then):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    checkpoints = tmp_path / "checkpoints"
    with pytest.raises(RuntimeError, match="stopped"):
        fit(Path("run"), StopAt(8), checkpoints=checkpoints)
    if then == "moved":
        shutil.move("run", "moved")
    spelled = str(tmp_path / "run") if then == "absolute" else then
    torch.manual_seed(0)
    source = SourceCallback(spelled, segments=2, snapshots_per_segment=2)
    trainer = quiet_trainer(tmp_path, source, max_epochs=EPOCHS)
    trainer.fit(model(), DataLoader(classes(), 8), ckpt_path=last_checkpoint(checkpoints))
    assert [stage.name for stage in RunStore.open(spelled).manifest.stages] == ["fit"]
    assert torch.equal(trainer.attribute(QUERY).values, stops[WHOLE])


def test_another_run_in_the_directory_is_not_gone_on_with(tmp_path):
    with pytest.raises(RuntimeError, match="stopped"):
        fit(tmp_path / "run", StopAt(8), checkpoints=tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "run")
    fit(tmp_path / "run")
    with pytest.raises(MisconfigurationException, match="already holds a run"):
        fit(tmp_path / "run", checkpoint=last_checkpoint(tmp_path / "checkpoints"))


def test_a_resume_point_grows_by_a_row_a_step(tmp_path):
    class Late(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 295:
                trainer.save_checkpoint(tmp_path / "late.ckpt")

    source = SourceCallback(str(tmp_path / "run"), snapshots_per_segment=1, mode="deferred")
    trainer = quiet_trainer(tmp_path, source, Late(), StopAt(296), max_epochs=200)
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.fit(Classifier(mlp()), DataLoader(classes(), 8))
    store = RunStore.open(tmp_path / "run")
    point = store.manifest.resume[295]
    steps = store.read(point.file)["open"]
    assert steps.shape == (295 - point.bins[-1].last, 4)
    assert point.open == []
    assert len((tmp_path / "run" / MANIFEST).read_text()) < 20_000
    assert len(json.dumps(torch.load(tmp_path / "late.ckpt", weights_only=False)["callbacks"])) < 2_000


# ---------------------------------------------------------------- stages


@pytest.mark.parametrize("end", ["finished", "killed"])
def test_an_earlier_stage_can_be_asked(tmp_path, end):
    """The stages before a stage that was killed, or has no factors yet, are asked as they are."""
    source = SourceCallback(str(tmp_path / "run"), mode="deferred", segments=2, snapshots_per_segment=1)
    module = model()

    def stage(*callbacks):
        trainer = quiet_trainer(tmp_path, source, *callbacks, max_epochs=3)
        trainer.fit(module, DataLoader(classes(), 8))
        return trainer

    stage()
    if end == "finished":
        stage()
        shutil.copytree(tmp_path / "run", tmp_path / "asked")
        data = {0: classes(), 1: classes()}
        ask = partial(SourceScorer.from_run, str(tmp_path / "asked"), model(), stage_data=data)
        here = [ask(stage=index).score(QUERY).values for index in (0, 1)]
    else:
        with pytest.raises(RuntimeError, match="stopped"):
            stage(StopAt(7))
        here = [None, None]
    with pytest.raises(MisconfigurationException, match=r'stage "fit-1" are needed.*stage_data={"fit-1"'):
        SourceScorer.from_run(str(tmp_path / "run"), model(), stage=0).score(QUERY, classes())
    for index in (0, 1):
        data = {"fit-1": classes()}
        scorer = SourceScorer.from_run(str(tmp_path / "run"), model(), stage=index, stage_data=data)
        values = scorer.score(QUERY, classes()).values
        assert values.isfinite().all()
        assert here[index] is None or torch.equal(values, here[index])


def test_what_another_stage_of_the_run_needs_is_said(tmp_path):
    source = SourceCallback(str(tmp_path / "run"), mode="deferred")
    for size in (24, 16):
        quiet_trainer(tmp_path, source, max_epochs=1).fit(model(), DataLoader(classes(size), 8))
    with pytest.raises(MisconfigurationException, match="24"):
        SourceScorer.from_run(str(tmp_path / "run"), model(), stage=0).score(QUERY, classes(16))


# ---------------------------------------------------------------- one writer


def test_a_second_fit_is_refused_while_the_first_one_lasts(tmp_path):
    """With and without ``overwrite``; the first one ends as it would have alone."""
    import helpers

    code = f"""
import sys; sys.path[:0] = {[str(Path(helpers.__file__).parent), str(Path(callback.__file__).parents[1])]!r}
import time, pathlib
from faults.scenarios import fit, L
class Waits(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        pathlib.Path({str(tmp_path / "begun")!r}).touch()
        while trainer.global_step == 5 and not pathlib.Path({str(tmp_path / "go")!r}).exists():
            time.sleep(.01)
fit(pathlib.Path({str(tmp_path / "run")!r}), Waits())
"""
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "begun").exists():
        assert first.poll() is None, first.stderr.read()[-2000:]
        time.sleep(0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_source.recording.claim.PATIENCE", 0.2)
        for overwrite in (False, True):
            with pytest.raises(MisconfigurationException, match=r"already holds a run|another process is writing"):
                fit(tmp_path / "run", overwrite=overwrite)
    (tmp_path / "go").touch()
    assert first.wait(60) == 0
    assert RunStore.open(tmp_path / "run").manifest.status == "finished"


def test_a_claim_ends_with_the_process_that_held_it(tmp_path):
    ready = tmp_path / "ready"

    def hold():
        Claim(tmp_path).take()
        ready.touch()
        time.sleep(60)

    pid = os.fork()
    if pid == 0:
        hold()
        os._exit(0)
    while not ready.exists():
        time.sleep(0.01)
    with pytest.raises(ClaimedError, match="another process is writing"):
        Claim(tmp_path).take(patience=0.1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with Claim(tmp_path):
        pass


def test_a_claim_is_held_until_the_last_holder_in_a_process_lets_go(tmp_path):
    first, second = Claim(tmp_path), Claim(tmp_path)
    first.take()
    second.take()
    first.release()
    assert in_child(lambda: Claim(tmp_path).take(patience=0.1)).value[0][0] == "ClaimedError"
    second.release()
    assert in_child(lambda: Claim(tmp_path).take(patience=0.1)).how == "done"


@pytest.mark.parametrize("sweep", [retraining, further])
def test_a_second_sweep_is_refused_while_the_first_one_lasts(tmp_path, stops, sweep, monkeypatch):
    (tmp_path / "sweep").mkdir()
    monkeypatch.setattr("lightning_source.recording.claim.PATIENCE", 0.2)
    assert sweep(tmp_path, "fail", None, stops) == ["equal", "equal"]
    with Claim(tmp_path / "sweep"):
        # In another process than the one that holds the claim.
        assert sweep(tmp_path, "fail", None, stops) == ["clear", "clear"]
    assert sweep(tmp_path, "fail", None, stops) == ["equal", "equal"]


def test_another_run_that_came_in_its_place_is_left_alone(tmp_path):
    """Where a directory is deleted by hand and used again while a fit still records into it."""

    class Replaces(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 4:
                shutil.rmtree(tmp_path / "run")
                RunStore.create(tmp_path / "run").commit()

    with pytest.warns(UserWarning, match="holds another run by now"):
        fit(tmp_path / "run", Replaces())
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [SCRATCH, MANIFEST]


def test_scorers_of_one_run_use_each_others_factors(tmp_path, stops):
    fit(tmp_path / "run", mode="deferred")
    one, other = (SourceScorer.from_run(str(tmp_path / "run"), model()) for _ in range(2))
    values = [one.score(QUERY, classes()).values, other.score(QUERY, classes(), method="influence").values]
    assert torch.equal(values[0], stops[WHOLE])
    files = RunStore.open(tmp_path / "run").manifest.files
    assert {"segments/0.safetensors", "segments/final-of-0-at-0.safetensors"} <= files.keys()
    assert torch.equal(other.score(QUERY, classes()).values, stops[WHOLE])


def test_a_scorer_does_not_write_over_what_was_recorded_since(tmp_path):
    source = SourceCallback(str(tmp_path / "run"), mode="deferred")
    module = model()
    quiet_trainer(tmp_path, source, max_epochs=1).fit(module, DataLoader(classes(), 8))
    scorer = SourceScorer.from_run(str(tmp_path / "run"), model())
    quiet_trainer(tmp_path, source, max_epochs=1).fit(module, DataLoader(classes(), 8))
    with pytest.warns(UserWarning, match="recorded further since"):
        scorer.score(QUERY, classes())
    assert len(RunStore.open(tmp_path / "run").manifest.stages) == 2


# ---------------------------------------------------------------- nothing is left behind


def test_the_next_owner_sweeps_what_a_kill_left(tmp_path):
    run, checkpoints = tmp_path / "run", tmp_path / "checkpoints"
    with pytest.raises(RuntimeError, match="stopped"):
        fit(run, StopAt(8), checkpoints=checkpoints)
    (run / SCRATCH / "0123.new").write_text("torn")
    (run / "bins" / "steps=000001-000002.safetensors").write_text("never named")
    (run / "notes.txt").write_text("mine")
    fit(run, checkpoint=last_checkpoint(checkpoints))
    named = {*RunStore.open(run).manifest.files, MANIFEST, f"{SCRATCH}/lock", "notes.txt"}
    assert {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()} == named


def test_fast_dev_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = SourceCallback(str(tmp_path / "run"))
    trainer = quiet_trainer(tmp_path, source, fast_dev_run=3)
    trainer.fit(model(), DataLoader(classes(), 8))
    assert trainer.attribute(QUERY).values.isfinite().all()
    source.__dict__["_path"] = None
    del trainer, source
    import gc

    gc.collect()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(("run", "source-run"))]


def build_slowly(kept, seed):
    class Slow(L.Callback):
        def on_train_batch_end(self, *_):
            time.sleep(0.5)

    data = torch.utils.data.Subset(classes(), kept)
    return Classifier(mlp()), DataLoader(data, 8), quiet_trainer("/nonexistent", Slow(), max_epochs=60)


def count_ones(module):
    return torch.ones(1)


def test_workers_end_with_a_sweep_that_is_killed(tmp_path):
    def children(pid):
        found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [*found, *(g for child in found for g in children(child))]

    def lives(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        retrain(build_slowly, random_subsets(4, 24), [0], count_ones, tmp_path / "sweep", n_jobs=2, progress=False)
        os._exit(0)
    deadline, workers = time.time() + 60, []
    while time.time() < deadline and len(workers) < 2:
        time.sleep(0.2)
        names = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children(pid)}
        workers = [child for child, line in names.items() if b"loky" in line and b"tracker" not in line]
    assert len(workers) >= 2
    time.sleep(3)  # until they have begun a run
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    deadline = time.time() + 30
    while time.time() < deadline and any(map(lives, workers)):
        time.sleep(0.2)
    assert not any(map(lives, workers))


def test_a_pipe_in_the_place_of_a_file_is_refused(tmp_path):
    fit(tmp_path / "run")
    (tmp_path / "run" / "segments" / "0.safetensors").unlink()
    os.mkfifo(tmp_path / "run" / "segments" / "0.safetensors")
    with pytest.raises(MisconfigurationException, match="not a regular file"):
        score(tmp_path / "run")
