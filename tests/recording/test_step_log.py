"""The step log: rows, columns by name, and other columns for the same steps."""

import torch

from lightning_source.recording.step_log import StepLog, StepRecord

STEPS = [
    StepRecord((0.1, 0.2), (1.0, 10.0), (0.0, 0.01), 1.0),
    StepRecord((0.1, 0.2), (1.0, 10.0), (0.0, 0.01), 0.5),  # a short window
    StepRecord((0.05, 0.1), (1.0, 10.0), (0.0, 0.01), 1.0),  # skipped by the loss scaler
]
COEFFICIENTS = [0.25, 1.0, 0.0]


def test_columns_by_name():
    log = StepLog.of(STEPS, COEFFICIENTS)
    assert (len(log), log.columns, log.table.dtype) == (3, 2, torch.float64)
    assert log.learning_rate.tolist() == [[0.1, 0.2], [0.1, 0.2], [0.05, 0.1]]
    assert log.effective_rate.tolist() == [[0.1 * 0.25, 2.0 * 0.25], [0.1 * 0.5, 2.0 * 0.5], [0.0, 0.0]]
    assert log.decay.tolist() == [[0.0, 0.01]] * 3
    assert log.weight.tolist() == [1.0, 0.5, 1.0]
    assert log.coefficient.tolist() == COEFFICIENTS


def test_decay_is_not_scaled_but_a_step_that_was_not_taken_has_none():
    decays = [step.effective_decays(c) for step, c in zip(STEPS, COEFFICIENTS, strict=True)]
    assert decays == [[0.0, 2.0 * 0.01], [0.0, 2.0 * 0.01], [0.0, 0.0]]


def test_other_columns_for_the_same_steps():
    log = StepLog.of(STEPS, COEFFICIENTS)
    split = log.with_columns([1, 0, None, 1])
    assert split.effective_rate.tolist() == [[b, a, 0.0, b] for a, b in log.effective_rate.tolist()]
    assert split.decay.tolist() == [[0.01, 0.0, 0.0, 0.01]] * 3
    assert torch.equal(split.table[:, -2:], log.table[:, -2:])
    assert torch.equal(split.with_columns([1, 0]).table, log.table)


def test_rows_are_cut_and_joined():
    log = StepLog.of(STEPS, COEFFICIENTS)
    assert torch.equal(StepLog.concatenated([log.between(0, 1), log.between(1, 3)]).table, log.table)
