"""What a run costs, counted and not timed: calls of the user's step, passes, floating point operations, bytes, flushes.

A change that makes one of these grow is seen here before a benchmark sees it.
"""

import os

import pytest
import torch
from helpers import Classifier, classes, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lightning_source import SourceCallback, SourceScorer

EXAMPLES, BATCH, EPOCHS, SNAPSHOTS, QUERIES = 128, 16, 4, 3, 4
BATCHES = EXAMPLES // BATCH
# Calls that find out how the step treats its examples, whatever the size of the run: about 25 by batches and alone.
CHECKS = 60


class Counting(Classifier):
    """Notes each call of its step."""

    def __init__(self, width=24) -> None:
        super().__init__(
            nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))
        )
        self.sizes: list[int] = []

    def training_step(self, batch, batch_idx):
        counted.append(len(batch[0]))
        return super().training_step(batch, batch_idx)


counted: list[int] = []


def calls() -> list[int]:
    """The sizes of the batches since the last time."""
    taken = counted.copy()
    counted.clear()
    return taken


def fit(tmp_path, *callbacks):
    torch.manual_seed(0)
    module, trainer = Counting(), quiet_trainer(tmp_path, *callbacks, max_epochs=EPOCHS)
    calls()
    trainer.fit(module, DataLoader(classes(EXAMPLES), BATCH))
    return trainer


def recorder(tmp_path, **options):
    return SourceCallback(str(tmp_path / "run"), snapshots_per_segment=SNAPSHOTS, **options)


@pytest.fixture
def scorer(tmp_path):
    """Of a run whose factors are there, with nothing left to find out."""
    fit(tmp_path, recorder(tmp_path, factor_examples=None))
    scorer = SourceScorer.from_run(tmp_path / "run", Counting())
    scorer.score([x[:1] for x in classes(EXAMPLES).tensors], classes(EXAMPLES))
    calls()
    return scorer


def test_training_calls_the_step_as_often_as_without_the_callback(tmp_path):
    fit(tmp_path)
    alone = calls()
    fit(tmp_path, recorder(tmp_path, mode="deferred"))
    assert calls() == alone == [BATCH] * BATCHES * EPOCHS


@pytest.mark.parametrize(("budget", "visited"), [(None, EXAMPLES), (64, 64)])
def test_factors_are_two_passes_over_the_factor_examples_at_each_snapshot(tmp_path, budget, visited):
    """A budget is dealt over the snapshots, each of which visits 64 at least."""
    trainer = fit(tmp_path, recorder(tmp_path, factor_examples=budget, mode="deferred"))
    calls()
    with trainer.callbacks[0].scorer(trainer) as scorer:
        scorer.run.calibrate()
        checks = calls()
        (segment,) = scorer.run.segments()
        scorer.run.cross_layer_factors(segment, "mean")
    passes = calls()
    assert len(checks) <= CHECKS
    assert len(passes) - 2 * SNAPSHOTS * visited // BATCH in (0, 1)  # one may ask how many labels an example has
    assert set(passes) == {BATCH}


def test_scoring_is_one_train_pass_a_snapshot_however_many_queries(scorer):
    for queries in (1, QUERIES, 5 * QUERIES):
        scorer.score([x[:queries] for x in classes(5 * QUERIES, seed=2).tensors])
        sizes = calls()
        # The queries are asked along the trajectory, in one batch at each snapshot.
        assert sizes.count(BATCH) == SNAPSHOTS * BATCHES
        assert sum(sizes) == SNAPSHOTS * (EXAMPLES + queries)
    scorer.score([x[:QUERIES] for x in classes(EXAMPLES).tensors], method="grad-dot")
    assert sum(calls()) == EXAMPLES + QUERIES


def test_a_train_pass_computes_little_more_than_forward_and_backward(scorer):
    """Beside the network's own products a pass contracts each example's gradients with the queries', once a query."""

    def operations(queries):
        with FlopCounterMode(display=False) as counter:
            scorer.score([x[:queries] for x in classes(QUERIES, seed=2).tensors], method="grad-dot")
        return counter.get_total_flops()

    module = Counting()
    inputs, labels = classes(EXAMPLES).tensors
    with FlopCounterMode(display=False) as counter:
        module.loss(module.net(inputs), labels).backward()
    own = counter.get_total_flops()
    weights = sum(layer.in_features * layer.out_features + layer.out_features for layer in module.net[::2])
    one, several = operations(1), operations(QUERIES)
    # A product with a query is one multiplication and addition for each weight and example, at most two of them.
    assert several - one <= (QUERIES - 1) * EXAMPLES * 2 * 2 * weights
    assert one <= 1.3 * own + EXAMPLES * 2 * 2 * weights


def test_bytes_and_flushes_do_not_grow_with_the_steps(tmp_path, monkeypatch):
    flushes: list[int] = []
    flush = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushes.append(descriptor) or flush(descriptor))
    sizes, numbers = [], []
    for epochs in (EPOCHS, 4 * EPOCHS):
        flushes.clear()
        source = SourceCallback(str(tmp_path / str(epochs)), mode="deferred")
        quiet_trainer(tmp_path, source, max_epochs=epochs).fit(Counting(), DataLoader(classes(EXAMPLES), BATCH))
        sizes.append(sum(path.stat().st_size for path in (tmp_path / str(epochs)).rglob("*") if path.is_file()))
        numbers.append(len(flushes))
    assert max(numbers) <= 6 * 6  # six for each of six snapshots, of whatever length
    steps = 3 * EPOCHS * BATCHES
    assert sizes[1] - sizes[0] < 200 * steps  # a row of the step log
    parameters = 4 * sum(p.numel() for p in Counting().parameters())
    log, manifest = 200 * 4 * EPOCHS * BATCHES, 40_000
    assert sizes[1] < (6 + 2) * parameters + log + manifest + 6 * 2_000
