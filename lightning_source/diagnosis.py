"""Whether the scores of a run can be trusted: what its record, its loss, its curvature and its batches say of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_source.runs.run import Run

Severity = Literal["bad", "doubtful", "note"]
COMPARED = 16  # examples whose scores are compared in batches of another size and order
SAME = 1e-3  # of the largest score: sums of another order differ by less, examples that see each other by more
ZERO = 1e-7  # of a block's largest eigenvalue: below float32's resolution of the sums that it comes from


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        severity: ``"bad"``: scores are not to be trusted; ``"doubtful"``: some of them, or for some questions;
            ``"note"``: what one should know.
        message: what it is, and what can be done.
    """

    severity: Severity
    message: str


@dataclass(frozen=True)
class BlockHealth:
    """A block's curvature in one segment.

    Attributes:
        name: of the block.
        parameters: their number.
        largest: the largest eigenvalue ``σ``.
        zero_share: share of the directions without curvature, below 1e-7 of the largest.
        saturated_share: share of the directions with ``Λσ > 1``, along which the segment forgets what was before it.
    """

    name: str
    parameters: int
    largest: float
    zero_share: float
    saturated_share: float


@dataclass(frozen=True)
class Diagnosis:
    """What :meth:`SourceScorer.diagnose` found; ``print`` shows it.

    Attributes:
        findings: the worst first.
        segments: the health of each block, by segment of the asked stage.
    """

    findings: tuple[Finding, ...]
    segments: tuple[tuple[BlockHealth, ...], ...]

    @property
    def trustworthy(self) -> bool:
        """Whether nothing bad was found."""
        return all(finding.severity != "bad" for finding in self.findings)

    def __str__(self) -> str:
        verdict = "Nothing speaks against these scores." if self.trustworthy else "These scores are not to be trusted."
        lines = [verdict, *(f"{finding.severity:>8}: {finding.message}" for finding in self.findings)]
        for index, blocks in enumerate(self.segments):
            lines.append(
                f"segment {index}: block, parameters, largest eigenvalue, share without curvature, with Λσ > 1"
            )
            lines += [
                f"  {b.name:<32} {b.parameters:>10,} {b.largest:>10.2e} {b.zero_share:>7.1%} {b.saturated_share:>7.1%}"
                for b in blocks
            ]
        return "\n".join(lines)


def diagnose(run: Run, compare: Callable[[Tensor, int | None], Tensor]) -> Diagnosis:
    """See :meth:`SourceScorer.diagnose`.

    Args:
        run: the run, calibrated.
        compare: scores ``[Q, len(ids)]`` of some training examples, in batches of a size or of the run's own.
    """
    findings = [*_of_record(run), *_of_loss(run), *_of_objective(run)]
    segments: list[tuple[BlockHealth, ...]] = []
    try:
        segments = [tuple(_blocks(run, index)) for index in range(len(run.segments()))]
        findings += _of_curvature(run, segments)
        if not run.store.manifest.flags.diverged:
            findings += _of_batches(run, compare)
    except FloatingPointError as error:
        findings.append(Finding("bad", f"{error}: a pass overflowed or met NaN, in half precision perhaps."))
    order: dict[Severity, int] = {"bad": 0, "doubtful": 1, "note": 2}
    return Diagnosis(tuple(sorted(findings, key=lambda finding: order[finding.severity])), tuple(segments))


def _of_record(run: Run) -> list[Finding]:
    manifest, findings = run.store.manifest, []
    if manifest.status != "finished":
        findings.append(Finding("doubtful", f"the run has not ended: these are its first {manifest.steps} steps."))
    if manifest.flags.history_incomplete and not manifest.flags.final_model_only:
        findings.append(
            Finding("doubtful", "training went on before it was recorded: earlier steps are not attributed.")
        )
    if manifest.flags.resumed_mid_epoch:
        findings.append(Finding("note", "training was resumed within an epoch, whose loader began again."))
    share = run.coverage.share
    if share < 0.95:
        names = ", ".join(name for name, _, _ in run.coverage.left_out[:5])
        severity: Severity = "bad" if share < 0.5 else "doubtful"
        findings.append(Finding(severity, f"{share:.1%} of the trained parameters are attributed; not: {names}."))
    return findings


def _of_loss(run: Run) -> list[Finding]:
    first = run.stage.loss_at(run.state(run.segments()[0].snapshots[0], run.settings.snapshots))
    last = run.stage.loss_at(run.final_of_stage())
    if run.store.manifest.flags.diverged:
        return [Finding("bad", f"training diverged: its loss went from {first} to {last}.")]
    if first is not None and last is not None and last > first and not run.store.manifest.flags.final_model_only:
        message = f"the loss on the first examples rose in training, from {first:.4g} to {last:.4g}."
        return [Finding("doubtful" if last > 2 * abs(first) else "note", message)]
    return []


def _of_objective(run: Run) -> list[Finding]:
    spec, findings = run.workspace.spec, []
    if spec is not None and spec.one_at_a_time is not None:
        findings.append(Finding("note", f"examples are run one at a time ({spec.one_at_a_time})."))
    if spec is not None and spec.rest is not None:
        findings.append(Finding("note", "a part of the loss is none of torch's: its Fisher is the empirical one."))
    if spec is not None and spec.fisher == "empirical":
        findings.append(Finding("note", "the empirical Fisher stands in for the true one: no distribution is known."))
    return findings


def _blocks(run: Run, index: int) -> list[BlockHealth]:
    segment = run.segments()[index]
    factors = run.snapshot_factors(segment, run.settings.snapshots)
    scales = run.preconditioner(segment.snapshots)
    health = []
    for block in run.stages[segment.stage].coverage.blocks:
        values = factors[block.name].eigenvalues.clamp_min(0)
        largest = float(values.max())
        # Of adaptive steps the mean step size stands for all: what is asked is an order of magnitude.
        rate = segment.stretch.rates[block.group] * float(scales[block.name].mean() if block.name in scales else 1.0)
        health.append(
            BlockHealth(
                block.name,
                block.numel,
                largest,
                float((values <= ZERO * largest).double().mean()),
                float((rate * values > 1).double().mean()),
            )
        )
    return health


def _of_curvature(run: Run, segments: Sequence[Sequence[BlockHealth]]) -> list[Finding]:
    findings = []
    flat = list(dict.fromkeys(block.name for blocks in segments for block in blocks if block.largest == 0))
    if flat:
        names = ", ".join(f"`{name}`" for name in flat[:5])
        findings.append(Finding("doubtful", f"no factor example has a gradient at {names}: they carry nothing."))
    sizes = torch.tensor([float(block.parameters) for blocks in segments for block in blocks])
    for share, what in (
        (torch.tensor([b.zero_share for blocks in segments for b in blocks]), "have no curvature"),
        (torch.tensor([b.saturated_share for blocks in segments for b in blocks]), "are saturated (Λσ > 1)"),
    ):
        mean = float((share * sizes).sum() / sizes.sum())
        findings.append(Finding("note", f"{mean:.1%} of the directions {what}."))
    examples = min(run.settings.factor_examples or run.examples, run.examples)
    if examples < 50:
        findings.append(Finding("doubtful", f"curvature is an average over {examples} examples only."))
    return findings


def _of_batches(run: Run, compare: Callable[[Tensor, int | None], Tensor]) -> list[Finding]:
    ids = run.data.positions[:COMPARED]
    whole = compare(ids, None)
    largest = float(whole.abs().max())
    findings = []
    for other, what in (
        (compare(ids, 1), "in batches of one"),
        (compare(ids.flip(0), None).flip(1), "in the reverse order"),
    ):
        difference = float((whole - other).abs().max()) / max(largest, 1e-30)
        if difference > SAME:
            message = f"scores {what} differ by {difference:.1%} of the largest: examples see each other in a batch."
            findings.append(Finding("bad", message))
    return findings
