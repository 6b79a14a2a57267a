"""A plain loop records through the session that the callback uses, and gets the run that the Trainer would give it."""

from pathlib import Path

import pytest
import torch
from helpers import Classifier, classes, mlp, quiet_trainer
from torch.utils.data import DataLoader

from lightning_source import SourceCallback, SourceScorer
from lightning_source.capture.data import examples_of
from lightning_source.recording.manifest import Settings
from lightning_source.recording.optimizer_hooks import PlainLoop
from lightning_source.recording.session import RecordingSession
from lightning_source.recording.store import RunStore

QUERY = [x[:4] for x in classes(8, seed=2).tensors]
OPTIMIZERS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 0.01, weight_decay=0.1),
}
SETTINGS = {"segments": 2, "snapshots_per_segment": 2}


class Stops(Exception):
    pass


def model(optimizer: str) -> Classifier:
    torch.manual_seed(5)
    return Classifier(mlp(), optimizer=OPTIMIZERS[optimizer])


def lightning_run(path: Path, optimizer: str, accumulate: int, clip: float | None) -> Classifier:
    module = model(optimizer)
    trainer = quiet_trainer(
        path.parent,
        SourceCallback(str(path), **SETTINGS),
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
    )
    trainer.fit(module, DataLoader(classes(), 4))
    return module


def train(
    session: RecordingSession | None,
    module: Classifier,
    optimizer: torch.optim.Optimizer,
    accumulate: int = 1,
    clip: float | None = None,
    epochs: range = range(3),
    stop_after: int | None = None,
) -> None:
    """What Lightning does, written out; without a session the same training unrecorded."""
    session = session or Unrecorded()
    batches = 0
    for _ in epochs:
        for index, batch in enumerate(DataLoader(classes(), 4)):
            session.on_batch_start(batch, index)
            if index % accumulate == 0:
                optimizer.zero_grad()
                session.on_zero_grad()
            (module.training_step(batch, index) / accumulate).backward()
            session.on_after_backward()
            if (index + 1) % accumulate == 0:
                session.on_before_step(optimizer)
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
                optimizer.step()
            session.on_batch_end()
            batches += 1
            if batches == stop_after:
                raise Stops


class Unrecorded:
    def __getattr__(self, name):
        return lambda *args: None


def recorded(path: Path, optimizer: str, accumulate: int = 1, clip: float | None = None) -> Classifier:
    module = model(optimizer)
    stepper = module.configure_optimizers()
    session = RecordingSession(Settings(**SETTINGS))
    session.prepare(module, PlainLoop([stepper], accumulate, remaining_steps=18 // accumulate))
    session.open(path)
    session.begin(examples_of(DataLoader(classes(), 4)))
    train(session, module, stepper, accumulate, clip)
    assert session.close("finished")
    return module


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, 0.5)])
def test_a_plain_loop_gives_the_run_that_the_trainer_gives(tmp_path, optimizer, accumulate, clip):
    by_trainer = lightning_run(tmp_path / "trainer", optimizer, accumulate, clip)
    by_hand = recorded(tmp_path / "loop", optimizer, accumulate, clip)
    unrecorded = model(optimizer)
    train(None, unrecorded, unrecorded.configure_optimizers(), accumulate, clip)
    for name, value in unrecorded.state_dict().items():
        assert torch.equal(by_hand.state_dict()[name], value)
        assert torch.equal(by_trainer.state_dict()[name], value)
    one, other = (RunStore.open(tmp_path / name) for name in ("trainer", "loop"))
    for key in ("snapshots", "segments", "steps"):
        assert getattr(one.manifest, key) == getattr(other.manifest, key)
    assert torch.equal(one.read("steps.safetensors")["steps"], other.read("steps.safetensors")["steps"])
    scores = [
        SourceScorer.from_run(tmp_path / name, model(optimizer)).score(QUERY, classes()).values
        for name in ("trainer", "loop")
    ]
    assert scores[0].abs().max() > 0
    assert torch.equal(scores[0], scores[1])


def test_a_plain_loop_resumes_from_the_state_that_its_checkpoint_kept(tmp_path):
    recorded(tmp_path / "whole", "momentum")
    module = model("momentum")
    optimizer = module.configure_optimizers()
    session = RecordingSession(Settings(**SETTINGS))
    session.prepare(module, PlainLoop([optimizer], remaining_steps=18))
    session.open(tmp_path / "cut")
    session.begin(examples_of(DataLoader(classes(), 4)))
    train(session, module, optimizer, epochs=range(1))
    checkpoint = {
        "module": {name: value.clone() for name, value in module.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "session": session.state(),
    }
    kept = {key: value["momentum_buffer"].clone() for key, value in checkpoint["optimizer"]["state"].items()}
    with pytest.raises(Stops):
        train(session, module, optimizer, epochs=range(1), stop_after=2)
    session.close("interrupted")

    module.load_state_dict(checkpoint["module"])
    optimizer = module.configure_optimizers()
    for key, value in kept.items():
        checkpoint["optimizer"]["state"][key]["momentum_buffer"] = value
    optimizer.load_state_dict(checkpoint["optimizer"])
    session = RecordingSession(Settings(**SETTINGS))
    session.restored = checkpoint["session"]
    session.prepare(module, PlainLoop([optimizer], steps=6, remaining_steps=12))
    session.open(tmp_path / "cut")
    assert session.begin(examples_of(DataLoader(classes(), 4))) == 0
    train(session, module, optimizer, epochs=range(2))
    session.close("finished")
    scores = [
        SourceScorer.from_run(tmp_path / name, model("momentum")).score(QUERY, classes()).values
        for name in ("whole", "cut")
    ]
    assert torch.equal(scores[0], scores[1])
    assert [stage.name for stage in RunStore.open(tmp_path / "cut").manifest.stages] == ["fit"]


def test_a_later_stage_does_not_take_back_what_the_flags_said(tmp_path):
    module = model("momentum")
    optimizer = module.configure_optimizers()
    session = RecordingSession(Settings(**SETTINGS))
    examples = examples_of(DataLoader(classes(), 4))
    session.prepare(module, PlainLoop([optimizer], steps=4))
    session.open(tmp_path)
    with pytest.warns(UserWarning, match="Training resumes at step 4"):
        session.begin(examples, "first")
    for name in ("first", "second"):
        if name == "second":
            session.prepare(module, PlainLoop([optimizer], steps=22))
            session.begin(examples, name)
        train(session, module, optimizer)
        session.close("finished")
        assert RunStore.open(tmp_path).manifest.flags.history_incomplete
    assert [stage.name for stage in RunStore.open(tmp_path).manifest.stages] == ["first", "second"]
