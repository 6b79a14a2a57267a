"""Factors of gradients, and columns that are split where factors differ."""

import pytest
import torch

from lightning_source.capture.coverage import Coverage
from lightning_source.layers import Block
from lightning_source.recording.gradient_factors import BinLog, FinerColumns, factors_of, parts_of
from lightning_source.recording.intervals import StepInterval
from lightning_source.recording.parameter_groups import Phase
from lightning_source.recording.step_log import StepLog, StepRecord

PHASE = Phase.after(None, 0, "SGD", [["a.weight", "a.bias"], ["b.weight"]], [False, False])
STEPS = [StepRecord((0.1, 0.2), (1.0, 1.0), (0.5, 0.0), 1.0)] * 2


def test_a_factor_is_the_norm_after_over_the_norm_before():
    nan, inf = float("nan"), float("inf")
    norms = torch.tensor([[[3.0, 4.0], [1.5, 2.0]], [[0.0, 2.0], [0.0, 0.0]], [[inf, nan], [0.0, 0.0]]])
    assert factors_of(norms, [[0, 1], [0]]).tolist() == [[0.5, 0.5], [0.0, 1.0], [0.0, 0.0]]


def test_parameters_part_only_where_their_factors_do():
    ones = torch.ones(2, 3)
    alike = torch.stack([ones, 0.5 * ones], 1)
    assert parts_of(alike, [0, 0, 1], factors_of(alike, [[0, 1], [2]])) is None
    silent = alike.clone()
    silent[:, :, 1] = 0.0  # a parameter without a gradient tells nothing
    assert parts_of(silent, [0, 0, 1], factors_of(silent, [[0, 1], [2]])) is None
    apart = alike.clone()
    apart[1, 1, 1] = 0.1
    assert parts_of(apart, [0, 0, 1], factors_of(apart, [[0, 1], [2]])) == [0, 1, 2]


def test_a_stage_is_told_by_columns_that_any_of_its_bins_asks_for():
    plain = BinLog(StepLog.of(STEPS, [1.0, 1.0]))
    split = BinLog(plain.log, (0, 1, 2), torch.tensor([[0.1, 0.01, 0.2]] * 2, dtype=torch.float64))
    bins = [StepInterval(0, 2, (0.2, 0.4), (0.1, 0.0)), StepInterval(2, 4, (0.2, 0.4), (0.1, 0.0))]
    block = Block("a", "a", "a.weight", "a.bias", 0, (1, 2, 4), "LinearForm", (6, 2))
    other = Block("b.weight", "b", "b.weight", None, 1, (1, 2, 3), "LinearForm", (6,))
    finer = FinerColumns.of((PHASE,), bins, [plain, split], Coverage((block, other), (), 14))
    assert finer.phases[0].columns == (("a.weight",), ("a.bias",), ("b.weight",))
    assert finer.phases[0].groups == (0, 0, 1)
    assert finer.bins[0].rates == (0.2, 0.2, 0.4)
    assert finer.bins[1].rates == pytest.approx((0.2, 0.02, 0.4))
    assert finer.bins[1].decays == (0.1, 0.1, 0.0)  # the decay is scaled by nothing
    assert finer.logs[1].effective_rate[0].tolist() == [0.1, 0.01, 0.2]
    assert [(b.name, b.group, b.shape, b.sizes) for b in finer.coverage.blocks] == [
        ("a.weight", 0, (1, 2, 3), (6,)),
        ("a.bias", 1, (1, 2, 1), (2,)),
        ("b.weight", 2, (1, 2, 3), (6,)),
    ]


def test_bins_that_merge_keep_what_any_of_them_tells_apart():
    plain = BinLog(StepLog.of(STEPS, [1.0, 1.0]))
    split = BinLog(plain.log, (0, 1, 2), torch.tensor([[0.1, 0.01, 0.2]] * 2, dtype=torch.float64))
    assert BinLog.concatenated([plain, plain], PHASE.columns).parts is None
    merged = BinLog.read(BinLog.concatenated([plain, split], PHASE.columns).tensors())
    assert merged.parts == (0, 1, 2)
    assert merged.rates.tolist() == [[0.1, 0.1, 0.2]] * 2 + [[0.1, 0.01, 0.2]] * 2
