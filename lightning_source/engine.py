"""The passes over data: calibration, factors, query gradients and one train pass per set of parameters.

Everything a pass needs is in a :class:`Workspace`; everything it computes is a pure function of
:mod:`lightning_source.factors` on what :mod:`lightning_source.capture` saw.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_source._guards import Rewind, thawed, undisturbed
from lightning_source.capture import Recording
from lightning_source.data import Examples, GivenBatches, to_module
from lightning_source.factors import (
    Basis,
    Captured,
    CovarianceSums,
    Rows,
    accumulator_dtype,
    contract,
    eigenbasis,
    eigenvalue_sums,
    gram,
    join,
    mean_covariances,
    rotated_matrices,
    squared_norms,
)
from lightning_source.layers import Block, clean_name
from lightning_source.objective import CallScale, Kind, Losses, Measurement, Objective, ObjectiveSpec
from lightning_source.ranks import ALONE, Ranks

State = Mapping[str, Tensor]  # parameters and buffers by clean name
# Runs the user's code on a batch, given the ids of its examples, while the recording listens. Gives back what to
# differentiate: one value for each example, or where that is not known a scalar that is their sum.
Target = Callable[[Any, Tensor, Recording], Tensor]


@dataclass
class BlockFactors:
    """EK-FAC of one block: ``H = (Q_G ⊗ Q_A) diag(eigenvalues) (Q_G ⊗ Q_A)ᵀ``."""

    basis: Basis
    eigenvalues: Tensor  # [P, O, I]

    def to_tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors for a file."""
        found = {"activations": self.basis.activations, "gradients": self.basis.gradients, "values": self.eigenvalues}
        return {f"{key}/{name}": value for key, value in found.items() if value is not None}

    @classmethod
    def from_tensors(cls, name: str, tensors: Mapping[str, Tensor]) -> BlockFactors:
        """The inverse of :meth:`to_tensors`."""
        basis = Basis(tensors.get(f"activations/{name}"), tensors.get(f"gradients/{name}"))
        return cls(basis, tensors[f"values/{name}"])


Factors = dict[str, BlockFactors]


@dataclass
class Workspace:
    """A model under examination.

    Attributes:
        module: the LightningModule.
        blocks: what is attributed.
        objective: its training step.
        spec: the objective's scale; ``None`` until :meth:`calibrate`.
        seed: seeds label sampling, the choice of factor examples and the passes' global generators.
        hooks: the LightningDataModule, if one was used.
        ranks: the processes that share the passes over training examples; all of them make the same calls.
    """

    module: Any
    blocks: Sequence[Block]
    objective: Objective
    spec: ObjectiveSpec | None = None
    seed: int = 0
    hooks: Any = None
    ranks: Ranks = ALONE
    _rewind: Rewind | None = field(default=None, init=False, repr=False)  # inside :meth:`at`

    # ---------------------------------------------------------------- parameters

    @contextmanager
    def at(self, state: State) -> Iterator[None]:
        """Passes inside run with these parameters and buffers, in eval mode; the model's own come back unchanged.

        What ``training_step`` itself writes, a momentum encoder or a running centre, is back before its next call.
        """
        own = _tensors_of(self.module)
        for name, value in state.items():
            if value.is_floating_point():
                _require_finite(value, name, "parameters")
        missing = [name for name in state if name not in own]
        if missing:
            raise MisconfigurationException(_does_not_match(self.module, missing))
        # Without a gradient a layer frozen since training would not be seen, and would silently count for nothing.
        trained: Any = [own[n] for block in self.blocks for n in block.parameters]
        with undisturbed(self.module, self.seed), thawed(trained):
            kept = {n: x.detach().clone() for n, x in own.items() if n in state or isinstance(x, nn.Parameter)}
            # A state may be the module's own tensors, which would follow its writes.
            apart = {n: x for n, x in state.items() if x.data_ptr() != own[n].data_ptr()}
            outer = self._rewind
            try:
                with torch.no_grad():
                    for name, value in state.items():
                        own[name].copy_(value)
                self._rewind = Rewind(self.module, {id(own[n]): x for n, x in (kept | apart).items()})
                yield
            finally:
                self._rewind = outer
                with torch.no_grad():
                    for name, value in kept.items():
                        own[name].copy_(value)

    def _begin_step(self) -> None:
        if self._rewind is not None:
            self._rewind()

    # ---------------------------------------------------------------- one pass

    def captures(
        self, data: Examples | GivenBatches, target: Target, ids: Any = None, what: str = "examples"
    ) -> Iterator[tuple[Tensor, dict[str, Captured]]]:
        """Run over data: ``(ids, blocks by name)`` for each batch, gradients being those of ``target``."""
        recording = Recording(self.module, self.blocks)
        for index, batch in data.batches(ids):
            with torch.enable_grad():
                values = target(to_module(batch, self.module, self.hooks), index, recording)
            total = float(values.detach().sum())
            if not math.isfinite(total):
                raise FloatingPointError(f"the objective is {total} on {what} {_shorten(index)}")
            yield index, recording.captured(values, len(index))

    def _share(self, data: Examples, ids: Tensor | None) -> Tensor | None:
        """This rank's part of the examples: whole batches, so that no batch depends on the number of ranks."""
        if self.ranks.world == 1:
            return ids
        order = torch.arange(len(data)) if ids is None else ids
        mine = self.ranks.share(order.split(data.batch_size))
        return torch.cat([*mine]) if mine else order[:0]

    def target(self, values: Callable[[Losses, ObjectiveSpec, Tensor], Tensor]) -> Target:
        """A target made of the training step's losses, which must be those that were calibrated."""
        spec = self.spec
        assert spec is not None

        def run(batch: Any, ids: Tensor, recording: Recording) -> Tensor:
            losses = self.losses(batch, len(ids), recording)
            if not torch.isfinite(losses.loss):
                return losses.loss  # no label can be drawn from it; the caller names the examples
            return values(losses, spec, ids)

        return run

    def losses(self, batch: Any, size: int, recording: Recording | None = None) -> Losses:
        """The training step's losses on a batch, which must be those that were calibrated where they are finite."""
        spec = self.spec
        assert spec is not None
        self._begin_step()
        losses = self.objective.evaluate(batch, size, recording)
        found, expected = [call.name for call in losses.calls], [call.name for call in spec.calls]
        if spec.origin != "whole" and found != expected and torch.isfinite(losses.loss):
            raise MisconfigurationException(
                f"`training_step` computed the losses {found} where calibration saw {expected}; their scales cannot"
                " be matched."
            )
        return losses

    def trained(self) -> Target:
        """Gradients ``g(z)`` as training applied them (method §4)."""
        return self.target(lambda losses, spec, ids: losses.data_target(spec))

    def sampled(self, draw: int = 0) -> Target:
        """Gradients whose second moment is ``H``, with labels drawn from the model; ``draw`` numbers the draws.

        A batch's labels depend on its first example, and so not on which rank or pass it comes in.
        """
        generator = torch.Generator(self.module.device)

        def values(losses: Losses, spec: ObjectiveSpec, ids: Tensor) -> Tensor:
            generator.manual_seed(hash((self.seed, draw, int(ids[0]))) % 2**63)
            return losses.fisher_target(spec, generator)

        return self.target(values)

    def measured(self, measurement: str | Measurement) -> Target:
        """Gradients of a measurement of queries."""
        if not callable(measurement):
            return self.target(lambda losses, spec, ids: losses.measurement(spec, measurement))

        def run(batch: Any, ids: Tensor, recording: Recording) -> Tensor:
            size = len(ids)
            self._begin_step()
            with recording.listening(size):
                values = measurement(self.module, batch)
            if not isinstance(values, Tensor) or values.shape != (size,):
                shape = list(values.shape) if isinstance(values, Tensor) else f"a {type(values).__name__}"
                raise MisconfigurationException(
                    f"the measurement must return one value per query, a tensor [{size}]; it returned {shape}."
                )
            if not values.requires_grad:
                raise MisconfigurationException(
                    "the measurement has no gradient with respect to the model. HINT: compute it without"
                    " `torch.no_grad()` or `.detach()`."
                )
            return values

        return run

    # ---------------------------------------------------------------- calibration

    def calibrate(self, data: Examples, examples_per_batch: float, maximize: bool = False) -> ObjectiveSpec:
        """Learn how training batches weight elements (method §4), from two batches of different size.

        Args:
            data: training examples.
            examples_per_batch: mean number of examples in a micro-batch of training.
            maximize: training went up the loss, so what it minimised is the negative.
        """
        spec = self._calibrate(data, examples_per_batch)
        if maximize:
            spec = replace(spec, calls=tuple(replace(call, factor=-call.factor) for call in spec.calls))
        self.spec = spec
        return spec

    def _calibrate(self, data: Examples, examples_per_batch: float) -> ObjectiveSpec:
        size = max(1, min(16, data.batch_size, len(data) // 2))
        ids = list(range(min(len(data), 2 * size)))
        whole = self._evaluate(data, ids)
        if not whole.calls:
            return self._calibrate_whole(data, ids, size, examples_per_batch)
        # The half with the fewest elements: normalisers are told apart where its examples differ from the rest.
        counts = torch.stack([whole.by_example(i, whole.weights(i, "mean")[1]).sum(1) for i in range(len(whole.calls))])
        counts = (counts / counts.sum(1, keepdim=True)).sum(0)
        chosen = counts.masked_fill(counts == 0, torch.inf).argsort(stable=True)[:size].tolist()
        ratio, alone = self._hook_ratio(data, ids, size, examples_per_batch)
        scales = []
        for index, call in enumerate(whole.calls):
            kind: Kind = "sum" if call.reduction == "sum" else "mean"  # all that one example can tell
            if len(ids) > size:
                kind = self._kind_of(data, whole, index, chosen)
            factor = examples_per_batch if kind == "sum" else 1 / self._weight_per_example(data, whole, index, kind)
            scales.append(CallScale(call.name, kind, factor * ratio, alone))
        hook = self.objective.hook
        return ObjectiveSpec(
            "hook" if hook else "recognised",
            "empirical" if hook == "attribution_losses" else "true",
            tuple(scales),
        )

    def _evaluate(self, data: Examples, ids: Sequence[int], hooked: bool = True, recording: Any = None) -> Losses:
        batches = Examples(data.dataset, len(ids), data.collate)
        (_, batch), *_ = batches.batches(ids)
        self._begin_step()
        losses = self.objective.evaluate(to_module(batch, self.module, self.hooks), len(ids), recording, hooked)
        if not torch.isfinite(losses.loss):
            raise FloatingPointError(f"the objective is {losses.loss.item()} on examples {_shorten(torch.tensor(ids))}")
        return losses

    def _kind_of(self, data: Examples, whole: Losses, index: int, chosen: Sequence[int]) -> Kind:
        """What a call's elements are divided by: that under which they weigh the same in another batch."""
        half, again = (self._evaluate(data, chosen) for _ in range(2))
        if [call.name for call in half.calls] != [call.name for call in whole.calls]:
            raise MisconfigurationException("`training_step` computes other losses on another batch.")
        call = whole.calls[index]
        random = not torch.equal(half.scales[index], again.scales[index])  # drawn weights agree only in sum

        def mismatch(kind: Kind) -> float:
            # An ignored element is 0 whatever it is multiplied by.
            one, other = (
                x.by_example(index, x.weights(index, kind)[0] * (x.calls[index].weights != 0)) for x in (whole, half)
            )
            one, other = _of_equal_width(one[list(chosen)], other)
            if random:
                one, other = one.sum(), other.sum()
            return round(float((one - other).norm() / other.norm()), 4)

        kinds: list[Kind] = ["mean", "sum", "examples"]
        best = min(sorted(kinds, key=lambda kind: kind != call.reduction), key=mismatch)
        if not random and mismatch(best) > 1e-2:
            raise MisconfigurationException(
                f"`training_step` weights the elements of `{call.name}` neither as a mean nor as a sum over the"
                " batch, so they cannot be told for others. HINT: pass weights to the loss itself (`weight=`), or"
                " divide by the number of examples or elements."
            )
        return best

    def _weight_per_example(self, data: Examples, losses: Losses, index: int, kind: Kind) -> float:
        """Mean normaliser an example adds to a training batch; a pass over data only where examples differ."""
        weights = losses.by_example(index, losses.weights(index, kind)[1]).sum(1)
        if kind == "examples":
            return 1.0
        if bool((weights == weights[0]).all()):
            return float(weights[0])
        total, ids = 0.0, factor_ids(len(data), 4096, self.seed)
        for chosen, batch in data.batches(ids):
            self._begin_step()
            other = self.objective.evaluate(to_module(batch, self.module, self.hooks), len(chosen))
            total += float(other.weights(index, kind)[1].sum())
        return total / len(ids)

    def _hook_ratio(
        self, data: Examples, ids: Sequence[int], size: int, examples_per_batch: float
    ) -> tuple[float, float]:
        """Where the module names its own losses: the trained loss over their mean, in training batches and alone.

        Gradients are compared, since the two may differ by a constant term.
        """
        if self.objective.hook is None:
            return 1.0, 1.0
        large, small = (self._gradient_ratio(data, ids[:count]) for count in (len(ids), size))
        # Where the ratio does not grow with the batch, training takes a mean; one example tells no difference.
        if len(ids) == size or large / small < (len(ids) / size) ** 0.5:
            return large, large
        return large / len(ids) * examples_per_batch, large / len(ids)

    def _gradient_ratio(self, data: Examples, ids: Sequence[int]) -> float:
        own = {clean_name(name): p for name, p in self.module.named_parameters()}
        parameters = [own[name] for block in self.blocks for name in block.parameters]
        trained, hooked = (
            torch.autograd.grad(self._evaluate(data, ids, hooked=h).loss, parameters, allow_unused=True)
            for h in (False, True)
        )
        pairs = [(t, h) for t, h in zip(trained, hooked, strict=True) if t is not None and h is not None]
        return float(sum((t * h).sum() for t, h in pairs)) / float(sum(h.square().sum() for _, h in pairs))

    def _calibrate_whole(
        self, data: Examples, ids: Sequence[int], size: int, examples_per_batch: float
    ) -> ObjectiveSpec:
        rows = []
        for count in (len(ids), size):
            recording = Recording(self.module, self.blocks)
            losses = self._evaluate(data, ids[:count], recording=recording)
            captured = recording.captured(losses.loss, count)
            rows.append(
                torch.stack([squared_norms(c.select(slice(size))).sum() for c in captured.values()]).sum().sqrt()
            )
        kind = _kind(float(rows[1] / rows[0]), len(ids) / size) if len(ids) > size else "mean"
        scale = CallScale("whole", kind, examples_per_batch if kind == "sum" else 1.0)
        return ObjectiveSpec("whole", "empirical", (scale,))

    # ---------------------------------------------------------------- factors

    def covariances(self, state: State, data: Examples, ids: Tensor) -> dict[str, CovarianceSums]:
        """Covariance sums of every block at one set of parameters, labels sampled (method §5.1)."""
        sums: dict[str, CovarianceSums] = {}

        def own_part() -> None:
            with self.at(state):
                for _, captured in self.captures(data, self.sampled(), self._share(data, ids)):
                    for name, one in captured.items():
                        new = CovarianceSums.of(one)
                        sums[name] = sums[name].merge(new) if name in sums else new

        self.ranks.together(own_part)
        for block in self.blocks:
            if block.name not in sums:  # control flow skipped it on every factor example: no curvature
                like = next(self.module.parameters()).detach()
                sums[block.name] = CovarianceSums.zeros(block.shape, block.indexed, like)
            one = sums[block.name]
            self.ranks.sum_([one.activations, one.gradients])
            _require_finite(one.activations, block.name, "activations")
            _require_finite(one.gradients, block.name, "gradients")
            one.examples = len(ids)  # a batch that skips the block has gradient 0 there
        return sums

    def eigenvalues(
        self, state: State, data: Examples, ids: Tensor, bases: Mapping[str, Basis], samples: int
    ) -> dict[str, Tensor]:
        """Mean squared gradients of every block in the given bases, ``[P, O, I]`` (method §5.2)."""
        sums: dict[str, Tensor] = {}

        def own_part() -> None:
            with self.at(state):
                for draw in range(samples):
                    for _, captured in self.captures(data, self.sampled(draw + 1), self._share(data, ids)):
                        for name, one in captured.items():
                            new = eigenvalue_sums(one, bases[name])
                            sums[name] = sums[name].add_(new) if name in sums else new

        self.ranks.together(own_part)
        for block in self.blocks:
            if block.name not in sums:  # control flow skipped it on every factor example: no curvature
                like = next(self.module.parameters()).detach()
                sums[block.name] = like.new_zeros(block.shape, dtype=accumulator_dtype(like))
            self.ranks.sum_([sums[block.name]])
            _require_finite(sums[block.name], block.name, "eigenvalues")
        return {name: total / (len(ids) * samples) for name, total in sums.items()}

    def squared_traces(
        self, state: State, data: Examples, ids: Tensor, bases: Mapping[str, Basis]
    ) -> tuple[float, float]:
        """``tr H²`` and ``Σ λ²``, what EK-FAC sees of it; their traces are the same.

        ``tr H² = E[⟨g_m, g_n⟩²]`` over pairs of examples with labels sampled, their gradients over all blocks together;
        the pairs are those of one batch, and batches are drawn at random. Both are estimated without bias.

        Args:
            state: the parameters.
            data: training examples.
            ids: those that are visited.
            bases: the eigenbases in which the blocks' eigenvalues are taken.
        """
        order = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(self.seed))]
        like = next(self.module.parameters()).detach()
        empty = {b.name: like.new_zeros(b.shape, dtype=accumulator_dtype(like)) for b in self.blocks}
        # Two halves of the batches: the product of two means of squares has no share of their noise.
        halves = [empty, {name: total.clone() for name, total in empty.items()}]
        sizes = torch.zeros(2, dtype=torch.float64, device=self.module.device)
        pairs = torch.zeros(2, dtype=torch.float64, device=self.module.device)  # Σ ⟨g_m, g_n⟩², and how many

        def own_part() -> None:
            with self.at(state):
                passes = self.captures(data, self.sampled(), self._share(data, order))
                for half, (index, captured) in zip(itertools.cycle((0, 1)), passes, strict=False):
                    sizes[half] += len(index)
                    for name, one in captured.items():
                        halves[half][name] += eigenvalue_sums(one, bases[name])
                    products = sum((gram(one).double() for one in captured.values()), pairs.new_zeros(()))
                    if products.dim():
                        pairs[0] += products.square().sum() - products.diagonal().square().sum()
                        pairs[1] += len(products) * (len(products) - 1)

        self.ranks.together(own_part)
        self.ranks.sum_([pairs, sizes, *(half[block.name] for half in halves for block in self.blocks)])
        blocks = sum(float((halves[0][b.name].double() * halves[1][b.name]).sum()) for b in self.blocks)
        return float(pairs[0] / pairs[1].clamp_min(1)), blocks / float(sizes.prod().clamp_min(1))

    # ---------------------------------------------------------------- scoring

    def query_gradients(
        self,
        state: State,
        queries: Examples | GivenBatches,
        measurement: str | Measurement,
        bases: Mapping[str, Basis] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of the measurement by block, in the given bases or in parameter space.

        Returns:
            ``[Q, P, O, I]`` by block, and for an embedding the tokens that its ``I`` columns stand for: those that the
            queries use, in ascending order.
        """
        found: dict[str, Tensor] = {}
        rows: dict[str, list[Rows]] = {}
        with self.at(state):
            for index, captured in self.captures(queries, self.measured(measurement), what="queries"):
                for name, one in captured.items():
                    basis = bases[name] if bases else Basis(None, None)
                    if one.vocabulary is not None:
                        new = basis.rotate(one).rows()
                        rows.setdefault(name, []).append(new._replace(examples=index.to(new.examples)[new.examples]))
                        continue
                    if name not in found:
                        parts, _, _, outputs, inputs = one.shape
                        found[name] = one.activations.new_zeros(len(queries), parts, outputs, inputs)
                    found[name][index] = rotated_matrices(one, basis)
        columns = {}
        for name, pieces in rows.items():
            examples, tokens, values = (torch.cat(x) for x in zip(*pieces, strict=True))
            columns[name], where = tokens.unique(return_inverse=True)
            found[name] = values.new_zeros(len(queries), 1, values.shape[1], len(columns[name]))
            found[name][examples, 0, :, where] = values
        for name, vectors in found.items():
            _require_finite(vectors, name, "query gradients")
        return found, columns

    def inner_products(
        self,
        state: State,
        data: Examples,
        ids: Tensor | None,
        vectors: Mapping[str, Tensor],
        bases: Mapping[str, Basis] | None = None,
        normalize: bool = False,
        tokens: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """``⟨vectors[q], g(z_n)⟩`` over all blocks, ``[Q, N]`` on the CPU: one pass over the examples.

        Args:
            state: parameters at which the examples' gradients are taken.
            data: the examples.
            ids: which of them; all by default.
            vectors: ``[Q, P, O, I]`` by block.
            bases: the eigenbases that ``vectors`` are written in; parameter space by default.
            normalize: divide by the norm of the example's gradient (cosine similarity).
            tokens: what the columns of an embedding's ``vectors`` stand for (:meth:`query_gradients`).
        """
        columns: list[Tensor] = []
        queries = len(next(iter(vectors.values())))

        def own_part() -> None:
            with self.at(state):
                for index, captured in self.captures(data, self.trained(), self._share(data, ids)):
                    columns.append(self._products(index, captured, queries, vectors, bases, normalize, tokens or {}))

        self.ranks.together(own_part)
        return torch.cat(self.ranks.collect(columns), dim=1)

    def _products(
        self,
        index: Tensor,
        captured: Mapping[str, Captured],
        queries: int,
        vectors: Mapping[str, Tensor],
        bases: Mapping[str, Basis] | None,
        normalize: bool,
        tokens: Mapping[str, Tensor],
    ) -> Tensor:
        total = torch.zeros(queries, len(index), device=self.module.device)
        norms = torch.zeros(len(index), device=self.module.device)
        for name, one in captured.items():
            if normalize:
                norms += squared_norms(one)
            if name in vectors:
                rotated = bases[name].rotate(one) if bases else one
                total += contract(rotated, vectors[name], tokens.get(name))
        if not torch.isfinite(total).all():
            for name, one in captured.items():
                seen = one.gradients if one.vocabulary else torch.stack([x.sum() for x in one[:2]])
                _require_finite(seen, name, f"gradients of examples {_shorten(index)}")
            raise FloatingPointError(f"scores overflow on examples {_shorten(index)}")
        return (total / norms.sqrt().clamp_min(1e-30) if normalize else total).cpu()

    def collected(
        self, state: State, data: Examples, ids: Tensor, bases: Mapping[str, Basis] | None, query: bool
    ) -> dict[str, Captured]:
        """Captures of a few examples, batches joined: their own loss as a query (``query``), or their ``g(z)``."""
        target = self.measured("loss") if query else self.trained()
        pieces: dict[str, list[Captured]] = {}
        with self.at(state):
            for _, captured in self.captures(data, target, ids):
                for name, one in captured.items():
                    pieces.setdefault(name, []).append(bases[name].rotate(one) if bases else one)
        return {name: join(p, dim=1) for name, p in pieces.items()}


def factor_ids(total: int, limit: int | None, seed: int) -> Tensor:
    """The examples that factor passes visit: all, or ``limit`` drawn without replacement, in ascending order."""
    if limit is None or limit >= total:
        return torch.arange(total)
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:limit].sort().values


def fit_factors(
    workspace: Workspace,
    data: Examples,
    ids: Tensor,
    states: Sequence[Callable[[], State]],
    weights: Sequence[float],
    covariances: Sequence[dict[str, CovarianceSums] | None],
    curvature: str,
    samples: int,
) -> tuple[Factors, list[dict[str, CovarianceSums]]]:
    """EK-FAC of one segment: covariances averaged over its snapshots, eigenvalues in that averaged basis, averaged too.

    Args:
        workspace: the model.
        data: training examples.
        ids: the factor examples.
        states: loads the parameters of each snapshot.
        weights: the snapshots' weights, which sum to 1.
        covariances: sums already known for a snapshot, else ``None``.
        curvature: ``"ekfac"``, ``"kfac"`` (Kronecker eigenvalues, one pass fewer) or ``"diagonal"`` (no eigenbasis).
        samples: label draws per example for the eigenvalues.

    Returns:
        The factors by block, and the covariance sums of each snapshot (empty for ``"diagonal"``).
    """
    names = [block.name for block in workspace.blocks]
    known: list[dict[str, CovarianceSums]] = []
    bases: dict[str, Basis] = dict.fromkeys(names, Basis(None, None))
    values: dict[str, Tensor] = {}
    if curvature != "diagonal":
        known = [
            one if one is not None else workspace.covariances(load(), data, ids)
            for load, one in zip(states, covariances, strict=True)
        ]
        decomposed, device = [], workspace.module.device
        exchange = device if workspace.ranks.world == 1 else torch.device("cpu")

        def own_part() -> None:
            for name in workspace.ranks.share(names):
                mean = mean_covariances([sums[name] for sums in known], weights)
                basis, kronecker = eigenbasis(*mean, dtype=known[0][name].activations.dtype)
                decomposed.append((basis.to(exchange), kronecker.to(exchange)))

        workspace.ranks.together(own_part)
        for name, (basis, kronecker) in zip(names, workspace.ranks.collect(decomposed), strict=True):
            bases[name], values[name] = basis.to(device), kronecker.to(device)
    if curvature != "kfac":
        values = {}
        for load, weight in zip(states, weights, strict=True):
            for name, new in workspace.eigenvalues(load(), data, ids, bases, samples).items():
                values[name] = values[name] + weight * new if name in values else weight * new
    return {name: BlockFactors(bases[name], values[name]) for name in names}, known


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    found = {clean_name(name): p for name, p in module.named_parameters()}
    return found | {clean_name(name): b for name, b in module.named_buffers()}


def _does_not_match(module: nn.Module, missing: Sequence[str]) -> str:
    return f"`{type(module).__name__}` does not match the run: it has no {', '.join(missing[:5])}."


def _kind(ratio: float, sizes: float) -> Kind:
    """``"mean"`` if a smaller batch gave its examples ``sizes`` times the weight, ``"sum"`` if the same weight."""
    return "mean" if ratio > sizes**0.5 else "sum"


def _of_equal_width(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of elements that can be compared: batches may be padded to different lengths, on either side."""
    if one.shape == other.shape:
        return one, other
    width = max(one.shape[1], other.shape[1])
    one, other = (F.pad(x, (0, width - x.shape[1])).sort(1).values for x in (one, other))
    return one, other


def _require_finite(values: Tensor, name: str, what: str) -> None:
    lowest, highest = values.aminmax()  # NaN comes through, and one pass is enough
    if not (torch.isfinite(lowest) and torch.isfinite(highest)):
        raise FloatingPointError(f"non-finite {what} at `{name}`")


def _shorten(ids: Tensor) -> str:
    listed = ", ".join(map(str, ids[:5].tolist()))
    return listed + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
