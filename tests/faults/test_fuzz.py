"""Directories and files that were changed at random: the same numbers or one clear error that names the place.

A manifest whose seal was made anew after the change is its writer's own: other numbers may come of it, but neither
another kind of error nor a wait nor anything outside the directory.
"""

import copy
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from faults.scenarios import StopAt, fit, further, model, retraining, score
from helpers import QUERY, classes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file, save_file

from lightning_source import InfluenceScores, SourceScorer
from lightning_source._files import sha256_of
from lightning_source.recording.manifest import MANIFEST, SEAL, _seal_of

BRIEF = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
LONG = settings(BRIEF, max_examples=600)

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=5),
    st.sampled_from(
        ["../outside.txt", "/etc/passwd", "..", "", "\0", "a/../../b", "bins", [], {}, [[]], {"a": 1}, [0, 1]]
    ),
)


class Hang(Exception):
    pass


def hang(*_):
    raise Hang


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run and one that was stopped, with the scores of each."""
    folder = tmp_path_factory.mktemp("runs")
    fit(folder / "finished")
    with pytest.raises(RuntimeError, match="stopped"):
        fit(folder / "stopped", StopAt(8), checkpoints=folder / "checkpoints")
    shutil.copytree(folder / "stopped", folder / "again")
    fit(folder / "adam", rule=torch.optim.Adam)
    asked = {"finished": "finished", "stopped": "again", "adam": "adam"}
    return {name: (folder / name, score(folder / of)) for name, of in asked.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


def verdict(place: Path, run: tuple[Path, torch.Tensor], change, *, own: bool = False) -> str:
    """What became of the scores after a change of a copy of a run."""
    source, expected = run
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / "outside.txt").write_text("mine")
    copied = place / "run"
    shutil.copytree(source, copied)
    change(copied)
    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(20)
    try:
        values = SourceScorer.from_run(str(copied), model()).score(QUERY, classes()).values
        found = "equal" if torch.equal(values, expected) else "own" if own else "silent"
    except (MisconfigurationException, FloatingPointError) as error:
        # What fits no model or data names these instead.
        found = "clear" if own or str(copied) in str(error) else f"does not name the place: {error}"
    except Hang:
        found = "hang"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    kept = sorted(path.name for path in place.iterdir())
    if kept != ["outside.txt", "run"] or (place / "outside.txt").read_text() != "mine":
        return "outside was touched"
    return found


def places_in(value, path=()):
    """Every path into nested lists and dictionaries."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places_in(item, (*path, key))


def altered(values, path, how, odd):
    """A copy in which something is deleted, replaced, or repeated."""
    values = copy.deepcopy(values)
    if not path:
        return odd if how == "replace" else values
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    if how == "delete":
        del inner[path[-1]]
    elif how == "repeat" and isinstance(inner, list):
        inner.insert(path[-1], inner[path[-1]])
    else:
        inner[path[-1]] = odd
    return values


def manifest_check(runs, place, name, sealed, number, how, odd):
    def change(run):
        values = json.loads((run / MANIFEST).read_text())
        paths = list(places_in(values))
        changed = altered(values, paths[number % len(paths)], how, odd)
        if sealed and isinstance(changed, dict):
            changed.pop(SEAL, None)
            changed[SEAL] = _seal_of(json.loads(json.dumps(changed)))
        (run / MANIFEST).write_text(json.dumps(changed))

    assert verdict(place, runs[name], change, own=sealed) in ("equal", "clear", "own")


def bytes_check(runs, place, name, number, position, piece, cut):
    def change(run):
        files = sorted(path for path in run.rglob("*") if path.is_file() and path.name != "lock")
        file = files[number % len(files)]
        content = file.read_bytes()
        at = position % (len(content) + 1)
        file.write_bytes(content[:at] + piece + content[at + cut :])

    assert verdict(place, runs[name], change) in ("equal", "clear")


TENSOR_CHANGES = {
    "missing": lambda tensors, key: tensors.pop(key),
    "one element": lambda tensors, key: tensors.update({key: tensors[key].reshape(-1)[:1].clone()}),
    "no element": lambda tensors, key: tensors.update({key: tensors[key].reshape(-1)[:0].clone()}),
    "a dimension more": lambda tensors, key: tensors.update({key: tensors[key][None].clone()}),
    "integers": lambda tensors, key: tensors.update({key: tensors[key].long()}),
    "half precision": lambda tensors, key: tensors.update({key: tensors[key].half()}),
    "NaN": lambda tensors, key: tensors.update({key: torch.full(tensors[key].shape, float("nan"))}),
    "infinity": lambda tensors, key: tensors.update({key: torch.full(tensors[key].shape, float("inf"))}),
    "another name": lambda tensors, key: tensors.update({key + "x": tensors.pop(key)}),
    "one more": lambda tensors, key: tensors.update({"more": torch.ones(1)}),
}


def tensors_check(runs, place, name, number, which, how):
    """The digests are made anew, as by somebody who knows how."""

    def change(run):
        values = json.loads((run / MANIFEST).read_text())
        values.pop(SEAL)
        file = sorted(values["files"])[number % len(values["files"])]
        tensors = load_file(run / file)
        if not tensors:
            return
        TENSOR_CHANGES[how](tensors, sorted(tensors)[which % len(tensors)])
        save_file(tensors, run / file)
        values["files"][file] = sha256_of(run / file)
        (run / MANIFEST).write_text(json.dumps({**values, SEAL: _seal_of(values)}))

    assert verdict(place, runs[name], change, own=True) in ("equal", "clear", "own")


def scores_check(runs, place, position, piece, cut):
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    path = place / "scores.safetensors"
    whole = InfluenceScores(
        torch.rand(3, 5), torch.arange(5), torch.arange(3), metadata={"method": "source", "unit": "loss"}
    )
    whole.save(path)
    content = path.read_bytes()
    at = position % (len(content) + 1)
    path.write_bytes(content[:at] + piece + content[at + cut :])
    try:
        found = InfluenceScores.load(path)
    except MisconfigurationException as error:
        named = str(path) in str(error)
    else:
        named = torch.equal(found.values, whole.values) and torch.equal(found.train_ids, whole.train_ids)
        named &= found.metadata == whole.metadata
    assert named


NAMES = st.sampled_from(["finished", "stopped", "adam"])
NUMBER = st.integers(0, 10**6)
PIECE = st.binary(max_size=8)
MANIFESTS = (NAMES, st.booleans(), NUMBER, st.sampled_from(["delete", "replace", "repeat"]), ODD)
BYTES = (NAMES, NUMBER, NUMBER, PIECE, st.integers(0, 64))
TENSORS = (NAMES, NUMBER, NUMBER, st.sampled_from(sorted(TENSOR_CHANGES)))
SCORES = (NUMBER, PIECE, st.integers(0, 64))


CHECKS = {
    "manifests": (manifest_check, MANIFESTS),
    "bytes": (bytes_check, BYTES),
    "tensors": (tensors_check, TENSORS),
    "scores": (scores_check, SCORES),
}


def fuzz(runs, place, what, profile):
    check, parts = CHECKS[what]

    @profile
    @given(st.tuples(*parts))
    def run(drawn):
        check(runs, place / what, *drawn)

    run()


@pytest.mark.parametrize("what", CHECKS)
def test_in_brief(runs, place, what):
    fuzz(runs, place, what, BRIEF)


@pytest.mark.parametrize("how", TENSOR_CHANGES)
@pytest.mark.parametrize(
    ("name", "file", "tensor"), [("stopped", "bins/steps", "steps"), ("adam", "snapshots/", "scale/")]
)
def test_tables_of_steps_and_scales(runs, place, name, file, tensor, how):
    """They are few among all tensors, and seldom drawn."""
    files = sorted(json.loads((runs[name][0] / MANIFEST).read_text())["files"])
    number = next(i for i, one in enumerate(files) if one.startswith(file))
    keys = sorted(load_file(runs[name][0] / files[number]))
    which = next(i for i, key in enumerate(keys) if key.startswith(tensor))
    tensors_check(runs, place / "table", name, number, which, how)


@pytest.mark.slow
@pytest.mark.parametrize("what", CHECKS)
def test_at_length(runs, place, what):
    fuzz(runs, place, what, LONG)


@pytest.mark.parametrize("sweep", [retraining, further])
@pytest.mark.parametrize("number", range(12))
def test_files_of_sweeps(tmp_path, sweep, number):
    """A byte of each file flipped, each file cut: the sweep gives what it gave, or names the file."""
    from faults.scenarios import Stops

    stops = Stops(tmp_path / "stops")
    stops.folder.mkdir()
    assert sweep(tmp_path, "fail", None, stops) == ["equal", "equal"]
    files = sorted(p for p in (tmp_path / "sweep").rglob("*") if p.is_file() and p.name != "lock")
    file = files[number % len(files)]
    content = bytearray(file.read_bytes())
    if number % 2:
        content = content[: len(content) // 2]
    else:
        content[number * 7919 % len(content)] ^= 4
    file.write_bytes(content)
    assert set(sweep(tmp_path, "fail", None, stops)) <= {"equal", "clear"}
