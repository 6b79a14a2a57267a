"""Sweeps of retrainings equal a plain loop in every backend, resume when killed, and refuse another sweep's files."""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, classes, fitted, mlp, quiet_trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_source.evaluation import RemovalCorrelation, linear_datamodeling_score, random_subsets, retrain

EXAMPLES = 24
QUERIES = classes(5, seed=2).tensors


def build(kept: list[int], seed: int) -> tuple[L.LightningModule, DataLoader, L.Trainer]:
    """Draws from torch (initialisation, order) and from NumPy (noise on the first layer)."""
    module = Classifier(mlp())
    with torch.no_grad():
        module.net[0].bias += torch.as_tensor(np.random.randn(5), dtype=torch.float32)
    loader = DataLoader(Subset(classes(EXAMPLES), kept), 4, shuffle=True, drop_last=True)
    return module, loader, quiet_trainer(None, max_epochs=1)


def query_losses(module: L.LightningModule) -> Tensor:
    assert not module.training
    assert not torch.is_grad_enabled()
    inputs, targets = QUERIES
    return F.cross_entropy(module.net(inputs), targets, reduction="none")


def plain_loop(subsets: Tensor, seeds: list[int]) -> Tensor:
    rows = []
    for seed in seeds:
        for subset in subsets:
            L.seed_everything(seed, workers=True, verbose=False)
            module, data, trainer = build(subset.nonzero().flatten().tolist(), seed)
            trainer.fit(module, data)
            with torch.no_grad():
                rows.append(query_losses(module.eval()))
    return torch.stack(rows).unflatten(0, (len(seeds), len(subsets)))


@pytest.fixture
def subsets() -> Tensor:
    return random_subsets(3, EXAMPLES, seed=1)


def options(path: Path) -> dict:
    return {"dirpath": path, "progress": False}


def files(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir() if file.is_file())


def test_equals_a_plain_loop_bit_for_bit_and_leaves_the_generators_alone(tmp_path, subsets):
    expected = plain_loop(subsets, [0, 7])
    torch.manual_seed(11)
    after = torch.rand(3)
    torch.manual_seed(11)
    measured = retrain(build, subsets, [0, 7], query_losses, **options(tmp_path))
    assert torch.equal(torch.rand(3), after)
    assert measured.shape == (2, 3, 5)
    assert torch.equal(measured, expected)
    assert not torch.equal(measured[0], measured[1])


def test_a_data_module_trains_as_its_loader_does(tmp_path, subsets):
    class Data(L.LightningDataModule):
        def __init__(self, loader):
            super().__init__()
            self.loader = loader

        def train_dataloader(self):
            return self.loader

    def build_with_module(kept, seed):
        module, loader, trainer = build(kept, seed)
        return module, Data(loader), trainer

    expected = retrain(build, subsets, [0], query_losses, **options(tmp_path / "loader"))
    found = retrain(build_with_module, subsets, [0], query_losses, **options(tmp_path / "module"))
    assert torch.equal(found, expected)


# Forked processes need not import torch and Lightning anew, which takes loky's several seconds.
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA forbids forked processes")
@pytest.mark.parametrize("backend", ["threading", "multiprocessing", pytest.param("loky", marks=pytest.mark.slow)])
def test_parallel_equals_serial_bit_for_bit(tmp_path, subsets, backend):
    from joblib import parallel_config

    serial = retrain(build, subsets, [0, 1], query_losses, **options(tmp_path / "serial"))
    with parallel_config(backend=backend, n_jobs=2):
        parallel = retrain(build, subsets, [0, 1], query_losses, **options(tmp_path / "parallel"))
    assert torch.equal(parallel, serial)
    assert files(tmp_path / "parallel") == files(tmp_path / "serial")


def test_a_sweep_that_failed_resumes_with_what_is_missing(tmp_path, subsets):
    expected = retrain(build, subsets, [3], query_losses, **options(tmp_path / "whole"))
    trained = []

    def counting(kept, seed):
        trained.append(kept)
        return build(kept, seed)

    def failing(kept, seed):
        if len(trained) == 2:
            raise RuntimeError("power cut")
        return counting(kept, seed)

    failing.__qualname__ = counting.__qualname__  # one sweep, one function
    with pytest.raises(RuntimeError, match="power cut"):
        retrain(failing, subsets, [3], query_losses, **options(tmp_path / "cut"))
    assert len(files(tmp_path / "cut")) == 1 + 2
    measured = retrain(counting, subsets, [3], query_losses, **options(tmp_path / "cut"))
    assert torch.equal(measured, expected)
    assert trained == [row.nonzero().flatten().tolist() for row in subsets]
    again = retrain(counting, subsets, [3], query_losses, **options(tmp_path / "cut"))
    assert torch.equal(again, expected)
    assert len(trained) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA forbids forked processes")
def test_a_killed_process_leaves_what_was_finished(tmp_path, subsets, capfd):
    """The process dies without any clean-up in its second run."""
    runs = []

    def dying(kept, seed):
        runs.append(kept)
        if len(runs) == 2:
            os._exit(9)
        return build(kept, seed)

    dying.__qualname__ = build.__qualname__
    process = multiprocessing.get_context("fork").Process(
        target=retrain, args=(dying, subsets, [0], query_losses), kwargs=options(tmp_path)
    )
    process.start()
    process.join()
    assert process.exitcode == 9
    file = tmp_path / "subset=00000-seed=0.safetensors"
    assert files(tmp_path) == [file.name, "sweep.json"]
    stamp = file.stat().st_mtime_ns
    measured = retrain(build, subsets, [0], query_losses, tmp_path)
    assert "1/3" in capfd.readouterr().err  # the progress bar goes on where the sweep was
    assert file.stat().st_mtime_ns == stamp
    assert torch.equal(measured, plain_loop(subsets, [0]))


def test_more_seeds_extend_a_sweep(tmp_path, subsets):
    first = retrain(build, subsets, [0], query_losses, **options(tmp_path))
    both = retrain(build, subsets, [4, 0], query_losses, **options(tmp_path))
    assert torch.equal(both[1], first[0])


def test_another_sweep_is_refused_by_name(tmp_path, subsets):
    retrain(build, subsets, [0], query_losses, **options(tmp_path), recipe={"lr": 0.1})

    def other(module):
        return query_losses(module)

    cases = [
        ((build, ~subsets, [0], query_losses), {"lr": 0.1}, "its subsets is"),
        ((build, subsets, [0], query_losses), {"lr": 0.2}, r"its recipe is {'lr': 0.1}, not {'lr': 0.2}"),
        ((build, subsets, [0], other), {"lr": 0.1}, "its measure is .*query_losses"),
        ((plain_loop, subsets, [0], query_losses), {"lr": 0.1}, "its build is .*build"),
    ]
    for arguments, recipe, message in cases:
        with pytest.raises(MisconfigurationException, match=message):
            retrain(*arguments, **options(tmp_path), recipe=recipe)


def test_damaged_and_foreign_files_are_named(tmp_path, subsets):
    for name in ("a", "b"):
        retrain(build, subsets[:1], [0], query_losses, **options(tmp_path / name))
    file = "subset=00000-seed=0.safetensors"
    (tmp_path / "b" / file).write_bytes((tmp_path / "a" / file).read_bytes())
    with pytest.raises(MisconfigurationException, match=r"subset=00000-seed=0.* belongs to another sweep"):
        retrain(build, subsets[:1], [0], query_losses, **options(tmp_path / "b"))
    (tmp_path / "a" / file).write_bytes(b"torn")
    with pytest.raises(MisconfigurationException, match=r"subset=00000-seed=0.* is not a finished run"):
        retrain(build, subsets[:1], [0], query_losses, **options(tmp_path / "a"))
    (tmp_path / "a" / "sweep.json").unlink()
    with pytest.raises(MisconfigurationException, match=r"no `sweep.json`"):
        retrain(build, subsets[:1], [0], query_losses, **options(tmp_path / "a"))


def test_bad_measurements_and_arguments(tmp_path, subsets):
    with pytest.raises(MisconfigurationException, match=r"shape \(5, 1\)"):
        retrain(build, subsets, [0], lambda module: query_losses(module)[:, None], **options(tmp_path / "shape"))
    with pytest.warns(UserWarning, match="3 of 3 runs .* did they diverge"):
        retrain(build, subsets, [0], lambda module: query_losses(module) / 0, **options(tmp_path / "nan"))
    for seeds in ([], [1, 1]):
        with pytest.raises(ValueError, match="different integers"):
            retrain(build, subsets, seeds, query_losses, **options(tmp_path / "seeds"))
    empty = subsets.clone()
    empty[1] = False
    with pytest.raises(ValueError, match="subset 1 keeps no example"):
        retrain(build, empty, [0], query_losses, **options(tmp_path / "empty"))


def test_joblib_is_named_where_it_is_missing(tmp_path, subsets, monkeypatch):
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(MisconfigurationException, match=r"lightning_source\[evaluation\]"):
        retrain(build, subsets, [0], query_losses, **options(tmp_path))


def test_manifest_says_what_was_asked(tmp_path, subsets):
    retrain(build, subsets, [0], query_losses, **options(tmp_path), recipe={"widths": (6, 5)})
    manifest = json.loads((tmp_path / "sweep.json").read_text())
    assert manifest["recipe"] == {"widths": [6, 5]}
    retrain(build, subsets, [0], query_losses, **options(tmp_path), recipe={"widths": (6, 5)})  # lists come back


def test_scores_of_a_run_predict_its_retrainings(tmp_path):
    """The whole way on softmax regression: sign, size and order of SOURCE's scores, on the measurement's own scale."""

    def regression(kept, seed):
        module = Classifier(torch.nn.Linear(6, 3), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.3))
        loader = DataLoader(Subset(classes(EXAMPLES), kept), len(kept))
        return module, loader, quiet_trainer(None, max_epochs=30)

    def losses(module):
        return F.cross_entropy(module.net(QUERIES[0]), QUERIES[1], reduction="none")

    subsets = random_subsets(12, EXAMPLES, fraction=0.9, seed=0)
    measured = retrain(regression, subsets, [0], losses, **options(tmp_path / "sweep"))
    module, loader, _ = regression(list(range(EXAMPLES)), 0)
    trainer = fitted(tmp_path, module, loader, max_epochs=30)
    scores = trainer.attribute(QUERIES)
    lds = linear_datamodeling_score(scores, subsets, measured)
    assert lds.lds > 0.8
    assert lds.control_interval[1] < lds.interval[0]
    removal = RemovalCorrelation(subsets)
    removal.update(scores, measured)
    assert float(removal.compute().slope) == pytest.approx(1, abs=0.35)


def test_random_subsets_keep_their_share():
    subsets = random_subsets(50, 20, fraction=0.3, seed=3)
    assert (subsets.sum(1) == 6).all()
    assert len({tuple(row.tolist()) for row in subsets}) == 50
    assert torch.equal(subsets, random_subsets(50, 20, fraction=0.3, seed=3))
    with pytest.raises(ValueError, match="keeps 20"):
        random_subsets(2, 20, fraction=1.0)
