"""The bytes that are foretold are those that are there in the end."""

import pytest
import torch
from helpers import QUERY, Classifier, classes, fitted, mlp
from torch import nn

from lightning_source.recording.footprint import expected_footprint, readable, size_on_disk
from lightning_source.recording.store import RunStore

OPTIONS = {
    "plain": {},
    "segments": {"segments": 2, "snapshots_per_segment": 3},
    "points": {"snapshots": "point"},
    "covariances": {"keep": "covariances"},
    "diagonal": {"curvature": "diagonal"},
}


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("case", OPTIONS)
def test_what_is_foretold_is_taken(tmp_path, case, adaptive):
    """Within a tenth of tensors of 30,000 numbers: heads of files, the step log and the manifest are beside."""
    rule = (lambda p: torch.optim.Adam(p)) if adaptive else None
    net = nn.Sequential(nn.Linear(6, 100), nn.BatchNorm1d(100), nn.ReLU(), nn.Linear(100, 300), nn.Linear(300, 3))
    module = Classifier(net, optimizer=rule)
    fitted(tmp_path, module, classes(96), max_epochs=6, **OPTIONS[case])
    store = RunStore.open(tmp_path / "run")
    (stage,) = store.manifest.stages
    trained = {name for name, _ in module.named_parameters()}
    expected = expected_footprint(store.manifest.settings, module, trained, stage.coverage, adaptive)
    kinds = {"factors": 0, "record": 0}
    for name in store.manifest.files:
        factors = name.startswith("segments/") or "covariances" in name
        kinds["factors" if factors else "record"] += (store.path / name).stat().st_size
    assert kinds["record"] == pytest.approx(expected.record, rel=0.1)
    assert kinds["factors"] == pytest.approx(expected.factors, rel=0.1)
    assert size_on_disk(store) == sum(kinds.values())


def test_the_lines_say_so(tmp_path, monkeypatch):
    lines = []
    for place in ("recording.session", "callback"):
        monkeypatch.setattr(f"lightning_source.{place}.rank_zero_info", lines.append)
    fitted(tmp_path, Classifier(mlp()))
    size = readable(size_on_disk(RunStore.open(tmp_path / "run")))
    assert "will take about" in lines[1]
    assert f"holds 6 steps in {size}; recording took" in lines[2]


def test_other_segments_are_cut_with_and_without_covariances(tmp_path):
    scores = []
    for keep in ("covariances", None):
        torch.manual_seed(0)
        trainer = fitted(tmp_path / str(keep), Classifier(mlp()), keep=keep, snapshots_per_segment=4)
        files = RunStore.open(tmp_path / str(keep) / "run").manifest.files
        assert any("covariances" in name for name in files) == (keep is not None)
        scores.append(trainer.attribute(QUERY, segments=2).values)
    assert torch.equal(*scores)
