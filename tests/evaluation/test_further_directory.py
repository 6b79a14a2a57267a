"""The directory of further training: whole runs, of one sweep, and files that are what the manifest says."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_source.evaluation.further_runs.directory import FurtherTrainingDirectory
from lightning_source.evaluation.further_runs.recipe import Pair, Trace

ASKED: dict[str, object] = {"epochs": 2, "leave_out": list(range(1000))}
PAIRS: list[Pair] = [(None, 0), (3, 0)]


def filled(path: Path) -> Trace:
    trace = Trace(torch.rand(2, 4, 2), torch.rand(2, 2))
    FurtherTrainingDirectory(path, ASKED).add(PAIRS, trace)
    return trace


def test_runs_come_back_as_they_were(tmp_path: Path) -> None:
    trace = filled(tmp_path / "sweep")
    runs = FurtherTrainingDirectory(tmp_path / "sweep", ASKED).runs
    assert list(runs) == PAIRS
    for column, pair in enumerate(PAIRS):
        assert torch.equal(runs[pair].measurements, trace.measurements[:, :, column])
        assert torch.equal(runs[pair].distances, trace.distances[:, column])


def test_another_sweep_is_refused_with_all_that_differs_in_few_words(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(MisconfigurationException, match="epochs is 2, not 3; its mode is None, not 'eval'") as caught:
        FurtherTrainingDirectory(tmp_path, ASKED | {"epochs": 3, "mode": "eval"})
    assert "leave_out" not in str(caught.value)
    with pytest.raises(MisconfigurationException, match="its leave_out is") as caught:
        FurtherTrainingDirectory(tmp_path, ASKED | {"leave_out": list(range(999))})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"torn")], ids=["missing", "torn"])
def test_a_damaged_file_is_named(tmp_path: Path, damage) -> None:
    filled(tmp_path)
    damage(tmp_path / "blocks" / "000000.safetensors")
    reason = r"000000.safetensors` (is missing from the run|does not match the sha256)"
    with pytest.raises(MisconfigurationException, match=reason):
        FurtherTrainingDirectory(tmp_path, ASKED)
