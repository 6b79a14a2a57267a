"""The passes over data: calibration, factors, query gradients and one train pass per set of parameters.

Everything a pass needs is in a :class:`Workspace`; everything it computes is a pure function of
:mod:`lightning_source.curvature.block_gradients` on what :mod:`lightning_source.capture.layer_gradients` saw.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_source._lightning import LightningDataModule, LightningModule, MisconfigurationException
from lightning_source._progress import NoProgress, Progress
from lightning_source.capture.data import Examples, GivenBatches, to_module
from lightning_source.capture.isolation import StateRestorer, thawed, undisturbed
from lightning_source.capture.layer_gradients import GradientCapture
from lightning_source.capture.modes import EVAL, Mode, PassMode, Seen, choose_mode
from lightning_source.capture.objective import Losses, Measurement, NoLoss, Objective, ObjectiveSpec
from lightning_source.capture.trainer_view import Moment, TrainerFacts, training_seen
from lightning_source.curvature.block_gradients import (
    BlockGradients,
    Rows,
    contract,
    join,
    squared_norms,
)
from lightning_source.curvature.ekfac import (
    IDENTITY,
    Basis,
    meeting_place,
    rotated_matrices,
)
from lightning_source.distributed import SINGLE_PROCESS, Ranks
from lightning_source.layers import Block
from lightning_source.names import named_parameters, named_tensors
from lightning_source.passes.elements import Elements
from lightning_source.passes.finite import require_finite, require_finite_gradients, shorten
from lightning_source.passes.query_gradients import QueryGradients
from lightning_source.passes.states import State as State
from lightning_source.passes.states import moment_of, naming
from lightning_source.random_streams import stream_seed

# Batches that are looked at for one with a loss.
TRIED_BATCHES = 16
# Runs the user's code on a batch, given the ids of its examples, while the recording listens. Gives back what to
# differentiate: one value for each example, or where that is not known a scalar that is their sum.
Target = Callable[[object, Tensor, GradientCapture], Tensor]


@dataclass
class Workspace:
    """A model under examination.

    Attributes:
        module: the LightningModule.
        blocks: what is attributed.
        objective: its training step.
        spec: the objective's scale; ``None`` until :func:`~lightning_source.passes.calibration.calibrate`.
        seed: seeds label sampling, the choice of factor examples and the passes' global generators.
        hooks: the LightningDataModule, if one was used.
        ranks: the processes that share the passes over training examples; all of them make the same calls.
        end: what a step that reads the Trainer is shown at parameters of no known moment; ``None`` for what the real
            Trainer shows.
        facts: further numbers of the Trainer; ``None`` for the real one's.
        mode: the mode that passes call the module in.
        progress: shows how far a pass over examples is.
        doing: what passes are made for, as a bar says it.
    """

    module: LightningModule
    blocks: Sequence[Block]
    objective: Objective
    spec: ObjectiveSpec | None = None
    seed: int = 0
    hooks: LightningDataModule | None = None
    ranks: Ranks = SINGLE_PROCESS
    end: Moment | None = None
    facts: TrainerFacts | None = None
    mode: PassMode = EVAL
    progress: Progress = field(default_factory=NoProgress, repr=False, compare=False)
    doing: str = "scores"
    _rewind: StateRestorer | None = field(default=None, init=False, repr=False)  # inside :meth:`at`

    @property
    def layer_of(self) -> dict[str, str]:
        """The layer of each block by the block's name: the name of its module, or of the LightningModule's class.

        Several blocks of one module are one layer; what modules share is the first one's.
        """
        return {block.name: block.module or type(self.module).__name__ for block in self.blocks}

    @property
    def layers(self) -> list[str]:
        """The layers' names, in the order of the model."""
        return list(dict.fromkeys(self.layer_of.values()))

    # ---------------------------------------------------------------- parameters

    @contextmanager
    def at(self, state: State) -> Iterator[None]:
        """Passes inside run with these parameters and buffers; the model's own come back unchanged.

        A step that reads the Trainer sees training at the moment of this state.
        What ``training_step`` itself writes, a momentum encoder or a running centre, is back before its next call.
        """
        own, parameters = named_tensors(self.module), named_parameters(self.module)
        with naming(state):
            for name, value in state.items():
                # A buffer may hold what is not known yet, as NaN, or what never was reached, as infinity.
                if name in parameters and value.is_floating_point():
                    require_finite(value, name, "parameters")
        missing = [name for name in state if name not in own]
        if missing:
            raise MisconfigurationException(_does_not_match(self.module, missing))
        # Without a gradient a layer frozen since training would not be seen, and would silently count for nothing.
        trained = [parameters[n] for block in self.blocks for n in block.parameters]
        with (
            naming(state),
            undisturbed(self.module, self.seed, self.mode),
            thawed(trained),
            training_seen(self.module, moment_of(state) or self.end, self.facts, self.hooks),
        ):
            kept = {n: x.detach().clone() for n, x in own.items() if n in state or isinstance(x, nn.Parameter)}
            # A state may be the module's own tensors, which would follow its writes.
            apart = {n: x for n, x in state.items() if x.data_ptr() != own[n].data_ptr()}
            outer = self._rewind
            try:
                with torch.no_grad():
                    for name, value in state.items():
                        own[name].copy_(value)
                self._rewind = StateRestorer(self.module, {id(own[n]): x for n, x in (kept | apart).items()})
                yield
            finally:
                self._rewind = outer
                with torch.no_grad():
                    for name, value in kept.items():
                        own[name].copy_(value)

    def begin_step(self) -> None:
        """Call before each call of the user's step: what earlier calls wrote is as it was before them."""
        if self._rewind is not None:
            self._rewind()

    def choose_mode(self, state: State, data: Examples) -> Mode:
        """The mode in which the module computes what it was trained on, told on the first batches with a loss.

        Args:
            state: parameters to tell it at.
            data: the training examples.
        """
        error: Exception | None = None
        with self.at(state):
            for index, batch in itertools.islice(data.batches(), TRIED_BATCHES):
                moved = to_module(batch, self.module, self.hooks)

                def evaluate(moved: object = moved, size: int = len(index)) -> Seen:
                    self.begin_step()
                    losses = self.objective.evaluate(moved, size)
                    return Seen(tuple(call.name for call in losses.calls), float(losses.loss.detach()))

                try:
                    return choose_mode(self.module, evaluate, self.mode.evaluating)
                except Exception as failed:  # no loss for this batch; or the user's own, which comes again
                    error = error or failed
        if error is not None and not isinstance(error, NoLoss):  # what that means, preparation tells
            raise error
        return "eval"

    # ---------------------------------------------------------------- one pass

    def captures(
        self,
        data: Examples | GivenBatches,
        target: Target,
        ids: Sequence[int] | Tensor | None = None,
        what: str = "examples",
    ) -> Iterator[tuple[Tensor, dict[str, BlockGradients]]]:
        """Run over data: ``(ids, blocks by name)`` for each batch, gradients being those of ``target``.

        Examples that the collate function drops, or for which the step gives no loss, have no gradient: no block.
        """
        recording = GradientCapture(self.module, self.blocks)
        count = -(-len(data if ids is None else ids) // max(1, data.batch_size)) if isinstance(data, Examples) else 0
        batches = self.progress.over(data.batches(ids), count, self.doing) if count > 1 else data.batches(ids)
        for index, batch in batches:
            if batch is None:  # its collate function dropped every example
                yield index, {}
                continue
            try:
                with torch.enable_grad():
                    values = target(to_module(batch, self.module, self.hooks), index, recording)
            except NoLoss:
                yield index, {}
                continue
            total = float(values.detach().sum())
            if not math.isfinite(total):
                raise FloatingPointError(f"the objective is {total} on {what} {shorten(data.named(index))}")
            yield index, recording.captured(values, len(index))

    def shard(self, data: Examples | Elements, ids: Tensor | None) -> Tensor | None:
        """This rank's part of the examples: whole batches, so that no batch depends on the number of ranks."""
        if self.ranks.world_size == 1:
            return ids
        order = torch.arange(len(data)) if ids is None else ids
        mine = self.ranks.shard(order.split(data.batch_size if isinstance(data, Examples) else 1))
        return torch.cat([*mine]) if mine else order[:0]

    def target(self, values: Callable[[Losses, ObjectiveSpec, Tensor], Tensor]) -> Target:
        """A target made of the training step's losses, which must be those that were calibrated."""
        spec = self.spec
        assert spec is not None

        def run(batch: object, ids: Tensor, recording: GradientCapture) -> Tensor:
            losses = self.losses(batch, len(ids), recording)
            if not torch.isfinite(losses.loss):
                return losses.loss  # no label can be drawn from it; the caller names the examples
            return values(losses, spec, ids)

        return run

    def losses(self, batch: object, size: int, recording: GradientCapture | None = None) -> Losses:
        """The training step's losses on a batch, which must be those that were calibrated where they are finite."""
        spec = self.spec
        assert spec is not None
        self.begin_step()
        losses = self.objective.evaluate(batch, size, recording)
        computed, expected = [call.name for call in losses.calls], [call.name for call in spec.calls]
        if spec.origin != "whole" and computed != expected and torch.isfinite(losses.loss):
            raise MisconfigurationException(
                f"`training_step` computed the losses {computed} where calibration saw {expected}; their scales cannot"
                " be matched."
            )
        return losses

    def trained(self, data: Examples | GivenBatches | None = None) -> Target:
        """Gradients ``g(z)`` as training applied them (method §4), or what elements of one example add to it."""
        if isinstance(data, Elements):
            return self.target(lambda losses, spec, ids: data.pick(losses.data_elements(spec), ids))
        return self.target(lambda losses, spec, ids: losses.data_target(spec))

    def sampled(self, draw: int = 0) -> Target:
        """Gradients whose second moment is ``H``, with labels drawn from the model; ``draw`` numbers the draws.

        A batch's labels depend on its first example, and so not on which rank or pass it comes in.
        """
        generator = torch.Generator(self.module.device)

        def values(losses: Losses, spec: ObjectiveSpec, ids: Tensor) -> Tensor:
            generator.manual_seed(stream_seed(self.seed, draw, int(ids[0])))
            return losses.fisher_target(spec, generator)

        return self.target(values)

    def measured(self, measurement: str | Measurement, queries: Examples | GivenBatches | None = None) -> Target:
        """Gradients of a measurement of queries, or of its parts that are elements of one of them."""
        if isinstance(queries, Elements) and not callable(measurement):
            return self.target(lambda losses, spec, ids: queries.pick(losses.measured_elements(spec, measurement), ids))
        if not callable(measurement):
            return self.target(lambda losses, spec, ids: losses.measurement(spec, measurement))

        def run(batch: object, ids: Tensor, recording: GradientCapture) -> Tensor:
            size = len(ids)
            self.begin_step()
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

    # ---------------------------------------------------------------- scoring

    def query_gradients(
        self,
        state: State,
        queries: Examples | GivenBatches,
        measurement: str | Measurement,
        bases: Mapping[str, Basis] | None = None,
    ) -> QueryGradients:
        """Gradients of the measurement by block, in the given bases or in parameter space."""
        gradients: dict[str, Tensor] = {}
        rows: dict[str, list[Rows]] = {}
        with self.at(state):
            for index, captured in self.captures(queries, self.measured(measurement, queries), what="queries"):
                for name, block_gradients in captured.items():
                    basis = bases[name] if bases else Basis(None, None)
                    if block_gradients.vocabulary is not None:
                        new = basis.rotate(block_gradients).rows()
                        rows.setdefault(name, []).append(new._replace(examples=index.to(new.examples)[new.examples]))
                        continue
                    if name not in gradients:
                        parts, _, _, outputs, inputs = block_gradients.shape
                        shape = (len(queries), parts, outputs, inputs)
                        gradients[name] = block_gradients.activations.new_zeros(shape)
                    gradients[name][index] = rotated_matrices(block_gradients, basis)
        if not gradients and not rows:
            raise MisconfigurationException(
                "the queries' measurement has no gradient at any of the layers that are attributed"
                f" ({', '.join(block.name for block in self.blocks[:5])}), so it has no scores."
            )
        columns = {}
        for name, pieces in rows.items():
            examples, tokens, values = (torch.cat(parts) for parts in zip(*pieces, strict=True))
            columns[name], where = tokens.unique(return_inverse=True)
            gradients[name] = values.new_zeros(len(queries), 1, values.shape[1], len(columns[name]))
            gradients[name][examples, 0, :, where] = values
        for name, vectors in gradients.items():
            try:
                require_finite(vectors, name, "query gradients")
            except FloatingPointError as error:
                bad = ~vectors.isfinite().flatten(1).all(1).cpu()
                with naming(state):
                    raise FloatingPointError(f"{error}, of queries {shorten(queries.positions[bad])}") from None
        return QueryGradients(gradients, columns)

    def inner_products(
        self,
        state: State,
        data: Examples | Elements,
        ids: Tensor | None,
        vectors: QueryGradients,
        receive: Callable[[slice, Tensor, Tensor | None], None],
        bases: Mapping[str, Basis] | None = None,
        normalize: bool = False,
        by_layer: bool = False,
    ) -> None:
        """``⟨vectors[q], g(z_n)⟩`` over all blocks: one pass over the examples, which hands over batch by batch.

        Args:
            state: parameters at which the examples' gradients are taken.
            data: the examples.
            ids: which of them; all by default.
            vectors: the queries' vectors.
            receive: is given where a batch's examples stand among all that are asked for, in their order, its products,
                ``[Q, B]`` on the CPU, and each layer's part of them or ``None``: batches as they come, or where ranks
                share the pass at its end, on every rank.
            bases: the eigenbases that ``vectors`` are written in; parameter space by default.
            normalize: divide by the norm of the example's gradient (cosine similarity).
            by_layer: hand over the parts of :attr:`layers` as well, ``[L, Q, B]``.
        """
        own: list[tuple[Tensor, Tensor | None]] = []  # with several ranks
        start = 0

        def hand_over(found: tuple[Tensor, Tensor | None]) -> None:
            nonlocal start
            products, parts = found
            examples = slice(start, start + products.shape[1])
            start = examples.stop
            receive(examples, products, parts)

        total = len(data) if ids is None else len(ids)
        met: dict[str, tuple[Tensor, Basis]] = {}

        def own_part() -> None:
            keep = hand_over if self.ranks.world_size == 1 else own.append
            with self.at(state):
                for index, captured in self.captures(data, self.trained(data), self.shard(data, ids)):
                    for name in captured.keys() & (vectors.values.keys() - met.keys()):
                        basis = bases[name] if bases else IDENTITY
                        met[name] = meeting_place(vectors.values[name], basis, captured[name].shape[2] * total)
                    keep(self._products(data.named(index), captured, met, vectors, normalize, by_layer))

        self.ranks.on_all_ranks(own_part)
        for found in self.ranks.gather(own):
            hand_over(found)

    def _products(
        self,
        index: Tensor,
        captured: Mapping[str, BlockGradients],
        met: Mapping[str, tuple[Tensor, Basis]],
        vectors: QueryGradients,
        normalize: bool,
        by_layer: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Products ``[Q, B]`` of a batch with ``vectors``, which are ``met`` in other bases than their own.

        With ``by_layer`` also the layers' parts, ``[L, Q, B]``; the products are the same with and without.
        """
        queries = len(next(iter(vectors.values.values())))
        total = torch.zeros(queries, len(index), device=self.module.device)
        parts = {layer: torch.zeros_like(total) for layer in self.layers} if by_layer else {}
        layer_of = self.layer_of
        norms = torch.zeros(len(index), device=self.module.device)
        for name, block_gradients in captured.items():
            if normalize:
                norms += squared_norms(block_gradients)
            if name in met:
                there, basis = met[name]
                products = contract(basis.rotate(block_gradients), there, vectors.columns.get(name))
                total += products
                if by_layer:
                    parts[layer_of[name]] += products
        if not torch.isfinite(total).all():
            for name, one in captured.items():
                require_finite_gradients(one, name, index)
            raise FloatingPointError(f"scores overflow on examples {shorten(index)}")
        length = norms.sqrt().clamp_min(1e-30) if normalize else torch.ones_like(norms)
        return (total / length).cpu(), torch.stack([*parts.values()]).div(length).cpu() if by_layer else None

    def capture_examples(
        self, state: State, data: Examples, ids: Tensor, bases: Mapping[str, Basis] | None, query: bool
    ) -> dict[str, BlockGradients]:
        """Captures of a few examples, batches joined: their own loss as a query (``query``), or their ``g(z)``."""
        target = self.measured("loss") if query else self.trained()
        pieces: dict[str, list[BlockGradients]] = {}
        with self.at(state):
            for index, captured in self.captures(data, target, ids):
                for name, gradients in captured.items():
                    require_finite_gradients(gradients, name, data.named(index))
                    pieces.setdefault(name, []).append(bases[name].rotate(gradients) if bases else gradients)
        return {name: join(parts, dim=1) for name, parts in pieces.items()}


def _does_not_match(module: nn.Module, missing: Sequence[str]) -> str:
    return f"`{type(module).__name__}` does not match the run: it has no {', '.join(missing[:5])}."
