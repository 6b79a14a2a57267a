"""Bars of passes: of the Trainer's own kind, with the number of batches, and none where nobody wants one."""

import lightning as L
import pytest
import torch
from helpers import QUERY, Classifier, classes, mlp
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader

from lightning_source import SourceCallback, SourceScorer, _progress


class Bars:
    """Stands for tqdm: which bars were shown, and how far they came."""

    def __init__(self):
        self.seen = []

    def __call__(self, items, desc, total, **_):
        done = [desc, total, 0]
        self.seen.append(done)
        for item in items:
            yield item
            done[2] += 1


@pytest.fixture
def bars(monkeypatch):
    bars = Bars()
    monkeypatch.setattr(_progress, "tqdm", bars)
    return bars


def trained(tmp_path, *callbacks, **options):
    source = SourceCallback(str(tmp_path / "run"), snapshots_per_segment=2)
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(callbacks=[source, *callbacks], default_root_dir=tmp_path, **(defaults | options))
    trainer.fit(Classifier(mlp()), DataLoader(classes(), 8))
    return trainer


def test_passes_show_their_batches_in_full(tmp_path, bars):
    trainer = trained(tmp_path, TQDMProgressBar())
    # Covariances, then eigenvalues with the curvature across layers, at two snapshots.
    assert [tuple(bar) for bar in bars.seen] == [("factors", 3, 3)] * 4
    bars.seen.clear()
    trainer.attribute(QUERY)
    assert [tuple(bar) for bar in bars.seen] == [("scores", 3, 3)] * 2


def test_there_is_none_where_bars_are_turned_off(tmp_path, bars):
    trainer = trained(tmp_path, enable_progress_bar=False)
    trainer.attribute(QUERY)
    assert bars.seen == []


@pytest.mark.parametrize(("watched", "expected"), [(False, 0), (True, 2)])
def test_a_scorer_alone_shows_one_where_somebody_watches(tmp_path, bars, monkeypatch, watched, expected):
    trained(tmp_path, enable_progress_bar=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: watched, raising=False)
    SourceScorer.from_run(str(tmp_path / "run"), Classifier(mlp())).score(QUERY, classes())
    assert len(bars.seen) == expected


def test_scores_do_not_depend_on_bars(tmp_path, bars):
    torch.manual_seed(0)
    hidden = trained(tmp_path / "hidden", enable_progress_bar=False)
    torch.manual_seed(0)
    shown = trained(tmp_path / "shown", TQDMProgressBar()).attribute(QUERY).values
    assert torch.equal(shown, hidden.attribute(QUERY).values)


def test_the_display_of_rich_has_the_lines(tmp_path, bars, monkeypatch):
    pytest.importorskip("rich")
    lines = []
    over = _progress.RichProgress.over

    def watched(self, items, total, what):
        display = self.bar.progress
        lines.append((what, total, display is not None and display.live.is_started))
        yield from over(self, items, total, what)
        assert all(task.description != what for task in display.tasks)  # gone when the pass has ended

    monkeypatch.setattr(_progress.RichProgress, "over", watched)
    trained(tmp_path, RichProgressBar())
    assert lines
    assert all(live for _, _, live in lines)
    assert bars.seen == []
