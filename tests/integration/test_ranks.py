"""Training on two ranks against training on one, on the union of their batches."""

import shutil
from pathlib import Path

import pytest
import torch
from checks import measured
from helpers import Classifier, classes, mlp, quiet_trainer, run_python
from integration.ranks_script import QUERY, Net, train_all
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from lightning_source import SourceCallback, SourceScorer, attribute
from lightning_source.distributed import Ranks
from lightning_source.recording.store import RunStore

# float64 trainings whose sums run in another order, read back from scores kept in float32.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same trainings on one process, which is this one, and on two."""
    made = {devices: tmp_path_factory.mktemp(f"ranks-{devices}") for devices in (1, 2)}
    run_python(Path(__file__).with_name("ranks_script.py"), made[2])
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(made[1])
        train_all(made[1], 1)
    return made


def results(folders, form, devices=2, rank=0):
    return load_file(folders[devices] / f"{form}-{rank}.safetensors")


def difference(one, other):
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.check("engine", "DDP, {form}", "factors and scores equal to one rank")
@pytest.mark.parametrize("form", ["mean", "sum", "adam"])
def test_two_ranks_give_what_one_gives_on_the_union(folders, form):
    single, double = results(folders, form, 1), results(folders, form)
    errors = [difference(double[key].double(), single[key].double()) for key in single]
    measured(max(errors))
    assert max(errors) < TOLERANCE, dict(zip(single, errors, strict=True))
    one, two = (RunStore.open(folders[devices] / form) for devices in (1, 2))
    assert one.manifest.files.keys() == two.manifest.files.keys()
    compared = 0
    for name in one.manifest.files:
        if "covariances" in name:
            expected, found = one.read(name), two.read(name)
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-9 * float(value.abs().max() + 1))
                compared += key.startswith("activations")
    assert compared == 2 * 4  # blocks, snapshots
    assert two.manifest.segments[0].rates == pytest.approx(one.manifest.segments[0].rates)


@pytest.mark.check("engine", "DDP, BatchNorm on each rank", "all ranks have the scores; from_run equal")
@pytest.mark.parametrize("form", ["mean", "norm"])
def test_all_ranks_have_the_scores_and_so_has_a_later_process(folders, form):
    first, second = results(folders, form, rank=0), results(folders, form, rank=1)
    for key in ("source", "influence", "tracin", "grad-cos", "layers", "earlier", "self"):
        assert torch.equal(first[key], second[key])
    scorer = SourceScorer.from_run(folders[2] / form, Net(form))
    for method in ("source", "influence"):  # factors are on disk; products of one rank or two are the same batches
        assert torch.equal(scorer.score(QUERY, classes(), method=method, batch_size=4).values, first[method])


@pytest.mark.check("engine", "DDP, mean", "training bit-identical")
def test_training_on_two_ranks_is_bit_identical(folders):
    recorded, without = results(folders, "mean"), results(folders, "without")
    for key in without:
        assert torch.equal(recorded[key], without[key])


@pytest.mark.check("stage", "killed, and resumed on another number of ranks", "equal to the uninterrupted run")
@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_is_resumed_on_one_rank(folders, tmp_path, monkeypatch, devices):
    """On one rank two batches are accumulated for what one batch of each of two ranks was."""
    folder = shutil.copytree(folders[devices] / "killed", tmp_path / "mean")
    monkeypatch.chdir(tmp_path)
    source = SourceCallback("mean", segments=2, snapshots_per_segment=2, factor_examples=20)
    trainer = quiet_trainer(tmp_path, source, gradient_clip_val=0.3, max_epochs=3, accumulate_grad_batches=2)
    trainer.fit(Net(), DataLoader(classes(), 4), ckpt_path=folders[devices] / "ckpt" / "epoch=1.ckpt")
    manifest = RunStore.open(folder).manifest
    assert len(manifest.stages) == 1
    whole = RunStore.open(folders[devices] / "mean").manifest
    assert [(s.first, s.last) for s in manifest.segments] == [(s.first, s.last) for s in whole.segments]
    assert difference(trainer.attribute(QUERY).values, results(folders, "mean", devices)["source"]) < TOLERANCE


def test_two_ranks_neither_wait_in_a_pass_nor_for_one_that_fails(folders):
    """Rank 1 has fewer batches, and its eigendecompositions fail at last."""
    scores = []
    for rank in range(2):
        with safe_open(folders[2] / f"gathers-{rank}.safetensors", "pt") as file:
            scores.append(file.get_tensor("scores"))
            assert file.metadata() == {"error": "the algorithm failed to converge"}
    assert scores[0].isfinite().all()
    assert torch.equal(*scores)


def test_one_process_works_alone():
    ranks = Ranks()
    assert Ranks.current() == ranks
    assert ranks.is_global_zero
    assert ranks.on_rank_zero(lambda: 3) == ranks.on_all_ranks(lambda: 3) == 3
    assert ranks.gather(ranks.shard([1, 2, 3])) == [1, 2, 3]
    assert Ranks(1, 3).shard([0, 1, 2, 3, 4]) == [1, 4]
    tensor = torch.ones(2)
    ranks.all_reduce_([tensor])
    assert torch.equal(tensor, torch.ones(2))


def test_a_trainer_whose_children_trained_still_finds_the_run(folders):
    """As after ``ddp_spawn``: this process knows the directory and nothing else."""
    trainer = quiet_trainer(folders[2], SourceCallback(str(folders[2] / "mean")))
    trainer.strategy.connect(Net())
    scores = attribute(trainer, QUERY, train=classes())
    assert torch.equal(scores.values, results(folders, "mean")["source"])
    with pytest.raises(MisconfigurationException, match="pass `train=`"):
        attribute(trainer, QUERY)
    other = quiet_trainer(folders[2], SourceCallback(str(folders[2] / "nowhere")))
    other.strategy.connect(Classifier(mlp()))
    with pytest.raises(MisconfigurationException, match="call `fit` first"):
        attribute(other, QUERY, train=classes())
