"""The manifest as dataclasses: what is on disk comes back, and what is wrong is named by file and field."""

import json
import shutil
from pathlib import Path

import pytest
from fixtures.make_runs import RUNS
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_source.recording.intervals import StepInterval
from lightning_source.recording.manifest import (
    MANIFEST,
    Manifest,
    ModuleRecord,
    PartialOf,
    Progress,
    ResumePoint,
    Seen,
    SegmentRecord,
    Settings,
    manifest_text,
    read_manifest,
)
from lightning_source.recording.parameter_groups import Phase
from lightning_source.recording.step_log import StepRecord
from lightning_source.recording.store import RunStore

FIXTURES = ["sgd", "adamw-two-stages", "interrupted"]


def known(values: object, found: object) -> object:
    """What of ``found`` has a counterpart in ``values``."""
    if isinstance(values, dict) and isinstance(found, dict):
        return {key: known(value, found.get(key)) for key, value in values.items()}
    if isinstance(values, list) and isinstance(found, list) and len(values) == len(found):
        return [known(value, item) for value, item in zip(values, found, strict=True)]
    return found


@pytest.mark.parametrize("run", FIXTURES)
def test_runs_of_schema_1_are_written_as_they_were_read(run: str) -> None:
    path = RUNS / run / "run" / MANIFEST
    before, after = json.loads(path.read_text()), json.loads(manifest_text(read_manifest(Manifest, path)))
    assert known(before, after) == before


def test_what_a_manifest_may_hold_comes_back(tmp_path: Path) -> None:
    interval = StepInterval(3, 7, (0.5, 0.25), (0.0, 1.0), "bins/a", 1)
    phase = Phase(3, "SGD", (("a", "b"), ("c",)), (0, None), (True, False))
    point = ResumePoint(
        file=None,
        bins=[interval],
        open=[StepRecord((0.1, 0.2), (1.0, 10.0), (0.0, 0.0), 0.5)],
        summed=1,
        bin_steps=2,
        limit=8,
        start=3,
        steps=8,
        boundaries=[5],
        trained=["a"],
        stage=Progress(phases=(phase,), seen=Seen(2, 16)),
    )
    store = RunStore.create(tmp_path)
    manifest = store.manifest
    manifest.settings = Settings(segments=[3, 7], factor_examples=None)
    manifest.resume = {8: point}
    manifest.segments = [SegmentRecord.over(interval, [0, 2])]
    manifest.couplings = {"mean-000007": 1.5}
    manifest.partial_of = PartialOf(run_id="x", bins=[interval])
    manifest.flags.resumed_mid_epoch = True
    store.commit()
    assert read_manifest(Manifest, tmp_path / MANIFEST) == manifest


def test_a_module_is_recorded_under_a_key_that_python_reserves(tmp_path: Path) -> None:
    shutil.copytree(RUNS / "sgd" / "run", tmp_path / "run")
    store = RunStore.open(tmp_path / "run")
    module = store.manifest.stages[0].module
    assert (module.class_name, module.parameters["net.0.bias"]) == ("Classifier", [6])
    store.commit()
    assert json.loads((store.path / MANIFEST).read_text())["stages"][0]["module"]["class"] == "Classifier"
    assert isinstance(RunStore.open(tmp_path / "run").manifest.stages[0].module, ModuleRecord)


MISSING = object()
# path of keys, what stands there, message
WRONG = {
    "a missing field": ("stages 0 phases 0 columns", MISSING, r"stages\[0\]\.phases\[0\]\.columns is missing"),
    "a string for a list": ("stages 0 phases 0 columns", "net", r"stages\[0\]\.phases\[0\]\.columns is 'net'"),
    "a number in a list of names": ("stages 0 phases 0 columns 0 1", 3, r"columns\[0\]\[1\] is 3 where a .* type str"),
    "a text for a number": ("segments 1 rates 0", "0.1", r"segments\[1\]\.rates\[0\] is '0\.1' where a .* type float"),
    "true for a count": ("steps", True, r": steps is True where a .* type int"),
    "an unknown choice": ("settings curvature", "full", r"settings\.curvature is 'full' where 'ekfac' or 'kfac'"),
    "null where a value must be": ("settings seed", None, r"settings\.seed is None where a .* type int"),
    "a list of the wrong length": ("stages 0 seen", [3], r"stages\[0\]\.seen has 1 entries where 2 are expected"),
    "an object for a list": ("snapshots", {}, r": snapshots is \{\} where a list is expected"),
    "a list for an object": ("stages 0 coverage", [], r"stages\[0\]\.coverage is \[\] where an object is expected"),
    "what capture owns": ("stages 0 coverage blocks 1 shape", [1, 2], r"coverage\.blocks\[1\]\.shape has 2 .* where 3"),
    "the objective's": ("stages 0 objective calls 0 kind", "median", r"objective\.calls\[0\]\.kind is 'median'"),
    "a file without its sha256": ("files final.safetensors", None, r"files\.final\.safetensors is None where"),
    "either of two types": ("settings segments", "auto", r"settings\.segments is 'auto' where"),
    "inside either of two types": (
        "settings segments",
        [1, "2"],
        r"settings\.segments\[1\] is '2' where a .* type int",
    ),
    "a step that is none": ("resume", {"last": {}}, r'resume has the key "last" where a number is expected'),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_by_file_and_field(tmp_path: Path, case: str) -> None:
    keys, wrong, message = WRONG[case]
    *outer, last = [int(key) if key.isdecimal() else key for key in keys.split()]
    values = json.loads((RUNS / "sgd" / "run" / MANIFEST).read_text())
    inside = values
    for key in outer:
        inside = inside[key]
    if wrong is MISSING:
        del inside[last]
    else:
        inside[last] = wrong
    (tmp_path / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(MisconfigurationException, match=rf"/manifest\.json`.*{message}"):
        RunStore.open(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", '{"files": {}}'])
def test_a_manifest_without_a_schema_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(MisconfigurationException, match=r"manifest\.json` has schema None; this version"):
        RunStore.open(tmp_path)


def test_what_a_later_version_adds_is_passed_over(tmp_path: Path) -> None:
    values = json.loads((RUNS / "sgd" / "run" / MANIFEST).read_text())
    values["stages"][0]["more"] = 1
    (tmp_path / MANIFEST).write_text(json.dumps(values))
    assert RunStore.open(tmp_path).manifest.stages[0].name == "fit"
