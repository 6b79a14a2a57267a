"""Runs that somebody damaged or made up: one error that names the file, and nothing outside is touched."""

import json
import os
import shutil

import pytest
import torch
from helpers import QUERY, Classifier, classes, fitted, mlp
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file, save_file

from lightning_source import SourceScorer
from lightning_source._files import inside, sha256_of
from lightning_source.recording.manifest import MANIFEST, SEAL, manifest_text
from lightning_source.recording.store import RunStore


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    fitted(path, segments=2, snapshots_per_segment=2, max_epochs=4)
    return path / "run"


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def score(path):
    scorer = SourceScorer.from_run(path, Classifier(mlp()))
    return [scorer.score(QUERY, classes(), removal=removal).values for removal in ("many", "few")]


def rewrite(path, change, sealed=False):
    """Change a manifest as JSON; without a seal, or under one that its writer made anew."""
    file = path / MANIFEST
    values = json.loads(file.read_text())
    del values[SEAL]
    change(values)
    file.write_text(json.dumps(values))
    if sealed:
        store = RunStore.open(path)
        file.write_text(manifest_text(store.manifest))


# ---------------------------------------------------------------- one door


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "a/../../x.safetensors", "/etc/passwd", "C:\\x", "..\\x", "a\0b", "", None, 7]
)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, name):
    with pytest.raises(MisconfigurationException, match="which is no name inside it"):
        inside(tmp_path, name)


def test_a_link_that_leads_elsewhere_is_refused(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "bins").symlink_to(tmp_path / "outside")
    with pytest.raises(MisconfigurationException, match="leads out of"):
        inside(tmp_path / "run", "bins/x.safetensors")


def test_a_pipe_is_refused_and_not_waited_for(run):
    os.remove(run / "final.safetensors")
    os.mkfifo(run / "final.safetensors")
    with pytest.raises(MisconfigurationException, match=r"final\.safetensors` is not a regular file"):
        score(run)
    os.remove(run / MANIFEST)
    os.mkfifo(run / MANIFEST)
    with pytest.raises(MisconfigurationException, match=r"manifest\.json` is not a regular file"):
        RunStore.open(run)


@pytest.mark.parametrize("name", ["bins/../../../precious.txt", "../precious.txt", "precious/../../precious.txt"])
def test_nothing_outside_is_deleted_on_opening_or_replacing(run, tmp_path, name):
    (tmp_path / "precious.txt").write_text("mine")
    (run / "notes.safetensors.txt").write_text("mine")
    rewrite(run, lambda values: values["files"].update({name: "0", "notes.safetensors.txt": "0"}))
    with pytest.raises(MisconfigurationException, match="which is no name inside it"):
        score(run)
    store = RunStore.create(run, overwrite=True)
    store.write("final.safetensors", {"x": torch.ones(1)})
    store.commit()
    assert (tmp_path / "precious.txt").read_text() == "mine"
    assert (run / "notes.safetensors.txt").read_text() == "mine"
    assert not (run / "segments" / "0.safetensors").exists()  # the run's own went


# ---------------------------------------------------------------- the manifest


def test_a_seal_tells_a_manifest_that_was_changed(run):
    expected = score(run)
    file = run / MANIFEST
    text = file.read_text()
    file.write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(MisconfigurationException, match=r"manifest\.json` does not match its `sha256`"):
        score(run)
    file.write_text(json.dumps(json.loads(text), sort_keys=True))  # another form of the same
    assert all(map(torch.equal, score(run), expected))


def test_a_manifest_without_a_seal_opens_with_a_note(run, monkeypatch):
    notes = []
    monkeypatch.setattr("lightning_source.recording.manifest.rank_zero_info", notes.append)
    expected = score(run)
    assert not notes
    rewrite(run, lambda values: None)
    assert all(map(torch.equal, score(run), expected))
    assert "carries no seal" in notes[0]


def remove_last(name):
    return lambda values: values[name].pop()


def put(*keys, value):
    def change(values):
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value

    return change


CHANGES = {
    "a segment deleted": (remove_last("segments"), r"`segments` are made of the snapshots \[0, 1\], of 4"),
    "a snapshot deleted": (remove_last("snapshots"), r"`segments` are made of the snapshots"),
    "a negative rate": (put("snapshots", 0, "rates", 0, value=-0.3), r"`snapshots\.0\.rates` are \[-0\.3"),
    "a rate of a segment": (put("segments", 1, "rates", 0, value=9.0), r"`segments\.1\.rates` are not the sums"),
    "an infinite rate": (put("segments", 0, "rates", 0, value=float("inf")), "not valid JSON: Infinity is no number"),
    "not a number": (put("steps", value=float("nan")), "not valid JSON: NaN is no number"),
    "a gap": (put("snapshots", 1, "first", value=4), r"`snapshots\.1` begins at step 4, where the one before ends"),
    "no steps": (put("snapshots", 0, "last", value=0), r"`snapshots\.0` goes from step 0 to 0"),
    "label draws without end": (put("settings", "label_samples", value=10**12), "`settings.label_samples` is 1000000"),
    "no label draws": (put("settings", "label_samples", value=0), "`label_samples=0` must be at least 1"),
    "a stage that is not": (put("snapshots", 0, "stage", value=5), r"`snapshots\.0\.stage` is 5, of 1 stages"),
    "a file that is not": (put("snapshots", 0, "file", value="snapshots/x"), r"`snapshots\.0\.file` names"),
    "no final parameters": (put("stages", 0, "final", value="gone"), r"`stages\.0\.final` names 'gone'"),
    "a coupling of 0": (put("couplings", value={"mean-000006": 0.0}), r"`couplings\.mean-000006` is 0"),
    "a negative count": (put("stages", 0, "examples", value=-24), r"`stages\.0\.examples` is -24"),
    "an empty batch": (put("stages", 0, "examples_per_batch", value=0), r"`stages\.0\.examples_per_batch` is 0"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_that_does_not_fit_together_names_the_field(run, change):
    do, message = CHANGES[change]
    rewrite(run, do)
    with pytest.raises(MisconfigurationException, match=r"manifest\.json`.*" + message):
        score(run)


def test_a_key_that_is_there_twice_is_refused(run):
    text = (run / MANIFEST).read_text()
    (run / MANIFEST).write_text(text.replace('"steps":', '"steps": 3, "steps":', 1))
    with pytest.raises(MisconfigurationException, match="'steps' is there twice"):
        RunStore.open(run)


# ---------------------------------------------------------------- tensors


def replace_tensors(path, name, change):
    """Change a file's tensors, and enter its new sha256."""
    tensors = load_file(path / name)
    change(tensors)
    save_file(tensors, path / name)
    rewrite(path, lambda values: values["files"].update({name: sha256_of(path / name)}))


TENSORS = {
    "missing": (lambda t, key: t.pop(key), "holds no `net.0.weight`, a parameter of the model"),
    "one element": (lambda t, key: t.update({key: torch.ones(1)}), r"holds `net\.0\.weight` as torch\.float32 \[1\]"),
    "integers": (lambda t, key: t.update({key: t[key].long()}), r"holds `net\.0\.weight` as torch\.int64 \[5, 6\]"),
    "not finite": (lambda t, key: t.update({key: t[key] / 0}), r"non-finite parameters at `net\.0\.weight`"),
}


@pytest.mark.parametrize("how", TENSORS)
@pytest.mark.parametrize("file", ["final", "snapshot"])
def test_tensors_that_are_not_the_models(run, how, file):
    name = "final.safetensors" if file == "final" else RunStore.open(run).manifest.snapshots[1].file
    key = "net.0.weight" if file == "final" else "mean/net.0.weight"
    change, message = TENSORS[how]
    replace_tensors(run, name, lambda tensors: change(tensors, key))
    with pytest.raises((MisconfigurationException, FloatingPointError), match=message):
        score(run)


def test_what_is_no_safetensors_file_is_named(run):
    (run / "final.safetensors").write_bytes(b"nothing of the kind")
    rewrite(run, lambda v: v["files"].update({"final.safetensors": sha256_of(run / "final.safetensors")}))
    with pytest.raises(MisconfigurationException, match=r"final\.safetensors` is no safetensors file"):
        score(run)
