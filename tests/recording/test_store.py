"""The run directory: whatever goes in comes out, and a kill at any moment leaves a run that opens."""

import json
import os

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_source._files import SCRATCH
from lightning_source.recording.manifest import MANIFEST, SEAL, Settings, StageRecord
from lightning_source.recording.parameter_groups import Phase
from lightning_source.recording.recorder import Recorder
from lightning_source.recording.snapshots import assemble, final_parameters, snapshot_parameters
from lightning_source.recording.store import RunStore

shared = torch.arange(12.0).view(3, 4)
TENSORS = {
    "tied": {"a": shared, "b": shared, "view": shared[1]},
    "transposed": {"a": shared.T, "strided": shared[:, ::2], "expanded": torch.ones(1).expand(5)},
    "dtypes": {
        "bf16": torch.randn(3).bfloat16(),
        "half": torch.randn(3).half(),
        "double": torch.randn(3).double(),
        "long": torch.tensor([1 << 40]),
        "bool": torch.tensor([True, False]),
    },
    "scalars": {"float": torch.tensor(2.5), "long": torch.tensor(7), "empty": torch.empty(0, 3)},
    "parameter": {"weight": nn.Linear(2, 3).weight},
    "special": {"values": torch.tensor([torch.inf, -torch.inf, -0.0, 1e-45])},
    "nothing": {},
}


def written(path, **files):
    store = RunStore.create(path)
    for name, tensors in files.items():
        store.write(f"{name}.safetensors", tensors)
    store.commit()
    return store


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_round_trip(tmp_path, kind):
    written(tmp_path, x=TENSORS[kind])
    read = RunStore.open(tmp_path).read("x.safetensors")
    assert read.keys() == TENSORS[kind].keys()
    for name, tensor in TENSORS[kind].items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name], tensor)
        assert not read[name].requires_grad


def test_the_manifest_round_trips(tmp_path):
    store = RunStore.create(tmp_path / "deep" / "run")
    store.manifest.settings = Settings(segments=[3, 7], factor_examples=None)
    store.commit()
    assert RunStore.open(tmp_path / "deep" / "run").manifest == store.manifest
    assert RunStore.create(tmp_path / "other").manifest.run_id != store.manifest.run_id


# ---------------------------------------------------------------- what cannot be read


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def set_manifest(path, **values):
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key != SEAL}
    path.write_text(json.dumps(kept | values))


HARMS = {
    "a flipped bit": (lambda path: damage(path / "x.safetensors"), r"x\.safetensors.*does not match the sha256"),
    "a lost file": (lambda path: (path / "x.safetensors").unlink(), r"x\.safetensors.*is missing"),
    "an unnamed file": (lambda path: set_manifest(path / MANIFEST, files={}), r"x\.safetensors.*is missing"),
    "another schema": (lambda path: set_manifest(path / MANIFEST, schema=99), "schema 99; this version reads schema 1"),
    "a torn manifest": (
        lambda path: (path / MANIFEST).write_text('{"schema": 1, "fi'),
        "manifest.json.*not valid JSON",
    ),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), "holds no run"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_run_is_refused_by_name(tmp_path, harm):
    written(tmp_path, x=TENSORS["tied"], y=TENSORS["scalars"])
    do, message = HARMS[harm]
    do(tmp_path)
    with pytest.raises(MisconfigurationException, match=message):
        RunStore.open(tmp_path).read("x.safetensors")


def test_a_damaged_file_leaves_the_others(tmp_path):
    written(tmp_path, x=TENSORS["tied"], y=TENSORS["scalars"])
    damage(tmp_path / "x.safetensors")
    assert RunStore.open(tmp_path).read("y.safetensors")["long"] == 7


def test_a_directory_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MisconfigurationException, match="cannot be a run directory"):
        RunStore.create(tmp_path / "file" / "run")


# ---------------------------------------------------------------- a second run in the same place


def test_an_existing_run_is_not_replaced_unasked(tmp_path):
    written(tmp_path, x=TENSORS["tied"])
    with pytest.raises(MisconfigurationException, match="already holds a run"):
        RunStore.create(tmp_path)
    assert RunStore.open(tmp_path).read("x.safetensors")


@pytest.mark.parametrize("torn", [False, True])
def test_overwriting_deletes_the_runs_files_and_no_others(tmp_path, torn):
    store = RunStore.create(tmp_path)
    store.write("bins/x.safetensors", TENSORS["tied"])
    store.commit()
    kept = [tmp_path / "notes.txt", tmp_path / "bins" / "mine.safetensors", tmp_path / "checkpoints" / "last.ckpt"]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    if torn:  # nothing says what belongs to the run, so only the manifest goes
        (tmp_path / MANIFEST).write_text("{")
        kept.append(tmp_path / "bins" / "x.safetensors")
    new = RunStore.create(tmp_path, overwrite=True)
    assert (tmp_path / "bins" / "x.safetensors").exists()  # until the new run writes something
    new.commit()
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == sorted([*kept, tmp_path / MANIFEST])


def test_commit_deletes_what_it_no_longer_names(tmp_path):
    store = written(tmp_path, x=TENSORS["tied"], y=TENSORS["scalars"])
    store.commit(remove=("x.safetensors",))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != SCRATCH) == [MANIFEST, "y.safetensors"]
    assert not list((tmp_path / SCRATCH).iterdir())
    assert list(RunStore.open(tmp_path).manifest.files) == ["y.safetensors"]


# ---------------------------------------------------------------- kills


class Killed(BaseException):
    pass


def killed_at(monkeypatch, call, before, work):
    """Run ``work`` up to its ``call``-th replacement of a file, just before or after which it dies; whether it did."""
    seen, replace = [], os.replace

    def dying(source, target):
        seen.append(target)
        if len(seen) <= call:
            return replace(source, target)
        if not before:
            replace(source, target)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        try:
            work()
        except Killed:
            return True
    return False


def contents(path):
    """Every tensor of an opened run; reading checks every sha256."""
    store = RunStore.open(path)
    return {name: {k: v.tolist() for k, v in store.read(name).items()} for name in store.manifest.files}


@pytest.mark.parametrize("before", [True, False])
def test_a_kill_leaves_the_previous_or_the_next_state(tmp_path, monkeypatch, before):
    one, two = {"a": torch.ones(2)}, {"b": torch.zeros(3)}
    states = [{"bins/1": {"a": [1, 1]}}, {"bins/1": {"a": [1, 1]}, "bins/2": {"b": [0, 0, 0]}}, {"all": {"b": [0] * 3}}]
    seen, call, alive = [], 0, True
    while alive:
        path = tmp_path / str(call)

        def work(path=path):
            store = RunStore.create(path)
            store.write("bins/1", one)
            store.commit()
            store.write("bins/2", two)
            store.commit()
            store.write("all", two)
            store.commit(remove=("bins/1", "bins/2"))

        alive = killed_at(monkeypatch, call, before, work)
        if (path / MANIFEST).exists():
            seen.append(states.index(contents(path)))
        else:
            assert call < 2  # nothing was committed yet
        call += 1
    assert call == 7  # six replacements and the run that nobody killed
    assert seen == ([0, 0, 1, 1, 2] if before else [0, 0, 1, 1, 2, 2])


def record(path, steps=11):
    """A training of one weight by -1 a step, in bins that merge, and its snapshots."""
    store = RunStore.create(path)
    module = nn.Linear(1, 1, bias=False)
    stage = StageRecord.begin("fit", module, None, maximize=False)
    stage.phases = (Phase.after(None, 0, "SGD", [["weight"]], [False]),)
    store.manifest.stages = [stage]
    nn.init.zeros_(module.weight)
    recorder = Recorder(store, module, bins=4, boundaries=[3])
    for _ in range(steps):
        recorder.before_step()
        with torch.no_grad():
            module.weight -= 1
        recorder.after_step([0.5], [1.0], [0.0], 1.0, None)
        recorder.flush()
    recorder.finish()
    assemble(store, 2, 2)


@pytest.mark.parametrize("before", [True, False])
def test_a_recording_killed_anywhere_opens_and_says_what_it_holds(tmp_path, monkeypatch, before):
    steps, call, alive = [], 0, True
    while alive:
        path = tmp_path / str(call)
        alive = killed_at(monkeypatch, call, before, lambda path=path: record(path))
        call += 1
        if not (path / MANIFEST).exists():
            continue
        contents(path)
        store = RunStore.open(path)
        assemble(store, 2, 2)
        contents(path)
        snapshots = store.manifest.snapshots
        assert [s.first for s in snapshots] == [0, *(s.last for s in snapshots[:-1])]
        steps.append(snapshots[-1].last)
        assert final_parameters(store)["weight"].item() == -steps[-1]
        for s in snapshots:  # the mean of -first … -(last - 1)
            assert snapshot_parameters(store, s, "mean")["weight"].item() == pytest.approx(-(s.first + s.last - 1) / 2)
            assert s.rates == (0.5 * s.steps,)
    assert steps == sorted(steps)
    assert {steps[0], steps[-1]} == {1, 11}
    assert len(set(steps)) > 5
