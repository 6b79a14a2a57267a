"""The studies' quick versions: scikit-learn's digits, tiny sizes, and figures that must make sense."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One cache for all: the ground truth and the runs are made once."""
    sys.path.insert(0, str(BENCHMARKS))
    yield tmp_path_factory.mktemp("studies")
    sys.path.remove(str(BENCHMARKS))


def quick(folder, *more):
    return ["--quick", "--cache", str(folder / "cache"), *more]


def test_lds(folder):
    """SOURCE is well ahead of random scores and of the gradient product at the final model."""
    import lds_study

    rows = ["source", "influence", "grad-dot", "exact unrolling", "random"]
    (report,) = lds_study.main(quick(folder, "--rows", *rows))
    found = report["lds"]
    assert list(found) == rows
    assert found["source"]["mean"] > 0.5
    assert found["source"]["interval"][0] > report["control"]["interval"][1] + 0.2
    assert abs(found["random"]["mean"]) < 0.1
    assert found["grad-dot"]["source_ahead_interval"][0] > 0
    assert found["exact unrolling"]["mean"] > 0.3
    assert report["reliability"] > 0.3


def test_lds_of_a_first_stage(folder):
    """Two stages are trained and retrained; a subset of the first changes what the second leaves behind."""
    from dataclasses import replace

    import lds_study
    from harness import by
    from tasks import TASKS

    options = lds_study.parser(None).parse_args(quick(folder, "--seeds", "1"))
    lds_study.prepare(options)
    task = replace(TASKS["two-stage-upright"], epochs=2, later_epochs=1, subsets=30, retrainings=3)
    rows = {"source": by("source", {"snapshots": "point"}, segments=2), "influence": by("influence")}
    report = lds_study.study("two-stage-short", task, options, rows, "source", "lds")
    assert report["refused"] == {}
    assert report["lds"]["source"]["mean"] > 0.4
    assert report["reliability"] > 0.25


def test_scores_are_kept_apart_by_the_subsets_share(folder):
    """A row may depend on the share: a run as long as a retraining does."""
    import torch
    from harness import Trial
    from lds_study import scores_of
    from tasks import TASKS

    task = TASKS["quick"]
    halves, most = (Trial("quick", task, task.load(folder), 0, folder / "cache", share) for share in (0.5, 0.7))
    rows = {"share": lambda trial: torch.full((1, 1), trial.share)}
    assert float(scores_of(halves, "share", rows).values) != float(scores_of(most, "share", rows).values)


def test_ablations(folder):
    import ablations

    (report,) = ablations.main(quick(folder))
    found = report["lds"]
    assert set(found) == set(ablations.QUICK_ROWS)
    assert all(entry["mean"] > 0.3 for entry in found.values())
    assert len({entry["mean"] for entry in found.values()}) == len(found)  # every row did change something


def test_subset_removal(folder):
    """Without a twelfth of the data, the proponents, more queries flip than without random examples."""
    import removal_study

    (report,) = removal_study.main(quick(folder, "--removed", "0.04", "0.08", "--queries", "8"))
    source, random = report["flipped"]["source"], report["flipped"]["random, same label"]
    assert source["share"][1] >= source["share"][0]
    assert source["share"][1] > random["share"][1]


def test_mislabel_detection(folder):
    import mislabel_study

    (report,) = mislabel_study.main(quick(folder, "--seeds", "1"))
    for rows in report["noise"].values():
        assert all(entry["mean"] > 0.8 for entry in rows.values())
        assert rows["source"]["found"] == sorted(rows["source"]["found"])


@pytest.mark.parametrize("rows", ["few", pytest.param("all", marks=pytest.mark.slow)])
def test_final_model_only(folder, monkeypatch, rows):
    """With the horizon known, SOURCE and influence follow the first steps of further training closely."""
    import json

    import final_model_only

    if rows == "few":
        monkeypatch.setattr(final_model_only, "EPOCHS", (1, 5, 20))
        for method in ("influence-lissa", "astra", "influence-cg, horizon"):
            monkeypatch.delitem(final_model_only.METHODS, method)
    arguments = ["final_model_only.py", "--quick", "--out", str(folder / "fimo.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    final_model_only.main()
    (task,) = json.loads((folder / "fimo.json").read_text())["tasks"].values()
    found = task["removal"]["downweight"]["adjustment 17"]
    assert found["curves"]["source L=1, horizon"]["cosine"][0] > 0.9
    assert abs(found["random"][0]) < 0.5
    assert {"influence-cg", "datainf", "trak"} <= found["curves"].keys()


def test_the_page_holds_every_task_and_only_committed_figures(folder):
    """``docs/results.md`` is what its command writes, and the README quotes its table."""
    import make_results
    import page_lds
    from page import DOCS, ORDER, reports
    from tasks import TASKS

    assert set(TASKS) - {"quick"} <= set(ORDER)
    assert make_results.page() == (DOCS / "results.md").read_text()
    assert page_lds.summary(reports("lds")) in (DOCS.parent / "README.md").read_text()


def test_error_bars(folder):
    """An ensemble's intervals hold the mean over other runs; one run's bar does not see the seeds."""
    import error_bars
    from harness import prepare

    options = error_bars.options().parse_args(quick(folder, "--examples", "0"))
    prepare(options)
    options.seeds = 6
    found = error_bars.study("quick", options)["many"]
    assert 0.75 < found["ensemble of 3"]["covered"] <= 1
    assert found["ensemble of 3"]["significant"] < found["snapshots of one run"]["significant"]
