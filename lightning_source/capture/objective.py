"""The user's own ``training_step`` as an objective: its elements, their scale, sampled labels and measurements.

A torch function mode sees every call of a loss that :mod:`lightning_source.capture.losses` can read. The call is
replaced by its elements under the user's reduction, so ``s_j = ∂loss/∂ℓ_j`` is plain autograd whatever the user does
afterwards (method §4). Where no loss is recognised, the module may say what it minimises by one of

    ``attribution_distribution(batch) -> (torch.distributions.Distribution, targets)``  losses: ``-log_prob``
    ``attribution_losses(batch) -> Tensor``  per-element losses, ``[B]`` or ``[B, ...]`` (empirical Fisher)

of which training takes the mean or the sum up to a constant; else the loss is taken as a mean or sum over examples as a
whole, with the empirical Fisher.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal
from torch.overrides import TorchFunctionMode

from lightning_source._lightning import LightningModule, MisconfigurationException
from lightning_source.capture.batch_copies import copied
from lightning_source.capture.data import Batch
from lightning_source.capture.layer_gradients import GradientCapture
from lightning_source.capture.losses import Information, LossCall, read_call
from lightning_source.capture.manual_optimization import ManualStep
from lightning_source.capture.masked_rows import by_owner, owners_of
from lightning_source.capture.pieces import of_whole_batches
from lightning_source.capture.trainer_view import in_trained_precision

Measurement = Callable[[Any, Any], Tensor]
# What the user divides elements by: their weights in the batch, nothing, or the number of examples.
Kind = Literal["mean", "sum", "examples"]


class _LossTap(TorchFunctionMode):
    """Keeps the calls of known losses, and gives ``manual`` the losses whose gradients are asked for."""

    def __init__(self, manual: ManualStep | None = None) -> None:
        super().__init__()
        self.calls: list[LossCall] = []
        self.manual = manual

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if function is Tensor.backward and self.manual is not None and isinstance(args[0], Tensor):
            self.manual.backward(args[0])
            return None
        if function is torch.autograd.grad and self.manual is not None:
            return self.manual.differentiate(*args, **(kwargs or {}))
        call = read_call(function, args, kwargs or {})
        if call is None:
            return function(*args, **(kwargs or {}))
        if call.elements.requires_grad:
            self.calls.append(call)
        return call.value


class NoLoss(ValueError):
    """The step gave no loss for a batch; in training such a batch moves nothing."""


@dataclass(frozen=True)
class CallScale:
    """How the training batches weighted the elements of one loss call."""

    name: str
    kind: Kind
    factor: float  # B · s_j = factor · s_j · normaliser on a batch of any size
    alone: float = 1.0  # the step's loss for one example over that of the module's hook


@dataclass(frozen=True)
class ObjectiveSpec:
    """What was learnt of the objective, stored with the run. JSON primitives only."""

    origin: Literal["recognised", "hook", "whole"]
    fisher: Literal["true", "empirical"]
    calls: tuple[CallScale, ...]
    # Why examples are run one at a time; None where a batch's rows are its examples.
    one_at_a_time: str | None = None
    # What multiplies the part of an example's own loss that no call holds; None where none is counted.
    rest: float | None = None
    # Whether a batch's loss has the mean or the sum of its examples' parts that no call holds.
    rest_kind: Kind = "sum"


@dataclass
class Losses:
    """One evaluated batch: the graph is alive until the last ``target`` taken from it has been used."""

    loss: Tensor  # the user's scalar
    calls: list[LossCall]
    scales: list[Tensor]  # s_j of each call, shaped like its elements
    size: int  # number of examples
    _picked: dict[int, Tensor | None] = field(default_factory=dict)  # by call, see `_owners`

    def weights(self, index: int, kind: str) -> tuple[Tensor, Tensor]:
        """``(h, weights)`` of a call's elements: ``h = s · normaliser``, and the weights that the normaliser sums."""
        call, scale = self.calls[index], self.scales[index]
        if kind == "sum":
            return scale, torch.ones_like(scale)
        if kind == "examples":
            return scale * self.size, torch.full_like(scale, self.size / scale.numel())
        valid = (scale != 0) & (call.weights != 0)
        weights = call.weights if call.reduction == "mean" else valid.to(scale.dtype)
        return scale * weights.sum(), weights

    @property
    def recognised(self) -> Tensor:
        """The part of the loss that is made of known elements, ``Σ_j s_j ℓ_j``; all of it where none is known."""
        if not self.calls:
            return self.loss
        return _sum((s * call.elements).sum() for call, s in zip(self.calls, self.scales, strict=True))

    @property
    def rest(self) -> Tensor:
        """The part of the loss that is made of no known element, a penalty of the outputs, say."""
        return self.loss - self.recognised

    def by_example(self, index: int, elements: Tensor) -> Tensor:
        """Values of a call's elements as ``[B, elements of an example]``; zeros fill up what a mask left shorter."""
        owners = self._owners(index)
        if owners is not None:
            return by_owner(elements, owners, self.size).flatten(1)
        if not self._divisible(elements):
            raise ValueError(
                f"a loss has elements of shape {tuple(elements.shape)}, which do not begin with the batch's"
                f" {self.size} examples"
            )
        return elements.reshape(self.size, -1)

    def _divisible(self, elements: Tensor) -> bool:
        return elements.dim() > 0 and elements.shape[0] % self.size == 0

    def _owners(self, index: int) -> Tensor | None:
        """The example of each element, where a mask picked them."""
        if index not in self._picked:
            self._picked[index] = owners_of(self.calls[index].elements, self.size)
        return self._picked[index]

    def of_examples(self, terms: Sequence[Tensor]) -> Tensor:
        """Sums over the elements of each example, ``[B]``; over all, a scalar, if elements are not laid out so.

        Args:
            terms: values of the elements of each call.
        """
        if all(
            self._owners(i) is not None or (term.dim() and not term.shape[0] % self.size)
            for i, term in enumerate(terms)
        ):
            return _sum(self.by_example(i, term).sum(1) for i, term in enumerate(terms))
        return _sum(term.sum() for term in terms)

    def each(self) -> Tensor:
        """``Σ_j s_j ℓ_j`` of each example, ``[B]``; the loss as a whole where that is not known."""
        if not self.calls:
            return self.loss
        return self.of_examples([s * call.elements for s, call in zip(self.scales, self.calls, strict=True)])

    def data_target(self, spec: ObjectiveSpec) -> Tensor:
        """``[B]`` (or their sum) whose gradient at example ``m`` is ``g(z_m) = B Σ_j s_j ∇ℓ_j`` of training batches."""
        if spec.origin == "whole":
            scale = spec.calls[0]
            return self.loss * scale.factor * (self.size if scale.kind == "mean" else 1)
        known = self.of_examples(self._trained(spec))
        return known if spec.rest is None else self._with_rest(known, spec, spec.rest)

    def _trained(self, spec: ObjectiveSpec) -> list[Tensor]:
        """``B s_j ℓ_j`` of training batches, by call."""
        return [
            self.weights(i, scale.kind)[0] * scale.factor * self.calls[i].elements for i, scale in enumerate(spec.calls)
        ]

    def data_elements(self, spec: ObjectiveSpec) -> Tensor:
        """``[B, E]``: the parts of :meth:`data_target` that are each element's, those of a text's tokens say."""
        return torch.cat([self.by_example(i, values) for i, values in enumerate(self._trained(spec))], 1)

    def _with_rest(self, known: Tensor, spec: ObjectiveSpec, factor: float) -> Tensor:
        """Values of the recognised part, and the sum over examples of the rest at a multiple: one number, ``[1]``."""
        return (known.sum() + factor * (self.size if spec.rest_kind == "mean" else 1) * self.rest).reshape(1)

    def fisher_target(self, spec: ObjectiveSpec, generator: torch.Generator) -> Tensor:
        """``[B]`` (or their sum) whose gradients have ``H`` as second moment, labels sampled from the model."""
        if spec.origin == "whole":
            scale = spec.calls[0]
            # g gᵀ / (B s) with B s = 1 for a mean and B for a sum: the empirical Fisher.
            return self.data_target(spec) / (1 if scale.kind == "mean" else abs(scale.factor)) ** 0.5
        terms = []
        for call, h in zip(self.calls, self.curvatures(spec), strict=True):
            elements = call.sample(generator) if spec.fisher == "true" else call.elements
            terms.append(h.sqrt() * elements)
        known = self.of_examples(terms)
        # Drawn labels have a mean gradient of 0, so that the second moment of the sum is the sum of second moments.
        return known if spec.rest is None else self._with_rest(known, spec, abs(spec.rest) ** 0.5)

    def curvatures(self, spec: ObjectiveSpec) -> list[Tensor]:
        """What multiplies each element's Fisher information in ``H``, by call, shaped like its elements.

        ``H = (1/N) Σ_m Σ_{j∈m} curvature_j E[∇ℓ_j ∇ℓ_jᵀ]`` over examples ``m``.
        """
        curvatures = []
        for i, scale in enumerate(spec.calls):
            h = self.weights(i, scale.kind)[0] * scale.factor * self.calls[i].curvature
            if (h < 0).any():
                raise ValueError(
                    f"`{scale.name}` enters the training loss with a negative weight: a loss that is maximised has no"
                    " positive curvature to unroll"
                )
            curvatures.append(h)
        return curvatures

    def multiplier(self, spec: ObjectiveSpec) -> float:
        """``c`` in ``g(z) = c · ∇L(z)`` for an example's own loss ``L``: 1 under a mean, the batch size under a sum."""
        trained, own = self.data_target(spec).detach(), self.measurement(spec, "loss").detach()
        size = float(own.norm())
        return float(trained.norm()) / size if size else 1.0

    def measurement(self, spec: ObjectiveSpec, measurement: str) -> Tensor:
        """``[B]``: the scalar that a query asks about, example by example.

        ``"loss"`` is what ``training_step`` would return for a batch of that example alone; where the loss is only
        known as a whole, one value stands for the sum over the batch. ``"margin"`` is the mean over the example's
        elements of ``log(p / (1 - p))`` of the target class, ``"log-prob"`` the summed log-probability of its targets.
        """
        if measurement != "loss":
            return self.target_elements(measurement).sum(1)
        if spec.origin == "whole":
            return (self.loss * (self.size if spec.calls[0].kind == "mean" else 1)).reshape(1)
        if spec.rest is not None and self.size == 1:
            return self.loss.reshape(1)
        known = self.measured_elements(spec, measurement).sum(1)
        return known if spec.rest is None else self._with_rest(known, spec, 1.0)

    def measured_elements(self, spec: ObjectiveSpec, measurement: str) -> Tensor:
        """``[B, E]``: the parts of :meth:`measurement` that are each element's, as far as elements are known."""
        if measurement != "loss":
            return self.target_elements(measurement)
        parts = []
        for i, scale in enumerate(spec.calls):
            h, weights = self.weights(i, scale.kind)
            values = self.by_example(i, h * self.calls[i].elements)
            if scale.kind != "sum":
                values = values / self.by_example(i, weights).sum(1, keepdim=True).clamp_min(1e-12)
            parts.append(scale.alone * values)
        return torch.cat(parts, 1)

    def target_elements(self, measurement: str) -> Tensor:
        """``"margin"`` or ``"log-prob"`` of the one loss that has such targets, ``[B, E]``."""
        readers = [
            (i, call, r)
            for i, call in enumerate(self.calls)
            if (r := call.margin if measurement == "margin" else call.log_prob)
        ]
        if len(readers) != 1:
            recognised = ", ".join(f"`{call.name}`" for call in self.calls) or "none"
            raise MisconfigurationException(
                f'`measurement="{measurement}"` needs exactly one loss with such targets in `training_step`'
                f" (recognised: {recognised}). HINT: pass a callable `measurement(module, batch) -> Tensor[B]`."
            )
        i, call, reader = readers[0]
        valid = call.weights != 0
        values = self.by_example(i, torch.where(valid, reader(), 0.0))
        return values if measurement == "log-prob" else values / self.by_example(i, valid).sum(1, True).clamp_min(1)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    total = None
    for term in terms:
        total = term if total is None else total + term
    assert total is not None
    return total


class Objective:
    """Evaluates a module's ``training_step`` on a batch and reads its losses.

    Args:
        module: the LightningModule.
        optimizers: how many optimizers the module has; ``training_step`` sees inert ones.
        schedulers: how many learning rate schedulers.
        attributed: index of the optimizer whose loss is meant.
        groups: the numbers in the optimizers' parameter groups.
        kinds: the optimizers' classes, by :func:`~lightning_source.capture.inert_optimizers.kind_of`.
        batch_idx: what ``training_step`` is told; optimizers that take turns step at some indices only.
    """

    def __init__(
        self,
        module: LightningModule,
        optimizers: int = 1,
        schedulers: int = 0,
        attributed: int = 0,
        groups: Sequence[Sequence[Mapping[str, object]]] = (),
        kinds: Sequence[str] = (),
        batch_idx: int = 0,
    ) -> None:
        self.module = module
        self.batch_idx = batch_idx
        self.stepped = True  # whether the attributed optimizer made a step when the module was last evaluated
        self._manual = partial(ManualStep, optimizers, schedulers, attributed, groups, kinds)
        parameters = inspect.signature(module.training_step).parameters
        if "dataloader_iter" in parameters:
            raise ValueError("`training_step(dataloader_iter)` hides the batches, so examples cannot be attributed")
        self._takes_index = "batch_idx" in parameters or len(parameters) >= 2

    @property
    def hook(self) -> str | None:
        """Name of the method by which the module says itself what it minimises."""
        names = ("attribution_distribution", "attribution_losses")
        return next((name for name in names if callable(getattr(self.module, name, None))), None)

    def evaluate(
        self, batch: Batch, size: int, recording: GradientCapture | None = None, hooked: bool = True
    ) -> Losses:
        """Run the user's step, or the module's hook if it has one; ``recording`` listens to the layers meanwhile.

        Args:
            batch: what ``training_step`` takes, on the module's device.
            size: number of examples in it.
            recording: where to keep layer inputs.
            hooked: ``False`` runs ``training_step`` although there is a hook.

        Raises:
            NoLoss: no loss came back, or it is not a scalar.
        """
        manual = None if getattr(self.module, "automatic_optimization", True) else self._manual()
        listening = recording.listening(size) if recording else nullcontext()
        with torch.enable_grad(), listening, _LossTap(manual) as tap:
            hook = self.hook if hooked else None
            loss = self.step(batch, manual) if hook is None else self._hooked(hook, batch, tap)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise NoLoss("`training_step` returned no scalar loss for this batch")
        calls: list[LossCall] = tap.calls
        scales: list[Tensor] = []
        if calls and loss.requires_grad:
            elements = [call.elements for call in calls]
            factors = torch.autograd.grad(loss, elements, retain_graph=True, allow_unused=True)
            used = [(call, scale) for call, scale in zip(calls, factors, strict=True) if scale is not None]
            calls, scales = of_whole_batches([(call, scale) for call, scale in used if len(scale.flatten())], size)
        return Losses(loss, calls, scales, size)

    def step(self, batch: Batch, manual: ManualStep | None = None) -> Any:
        """The loss that the user's ``training_step`` returns for a batch, or gives to ``manual`` where it optimizes.

        The step gets a copy: it may take its batch apart, and the next call finds it whole.
        """
        batch = copied(batch)
        module = self.module
        with self._manual().shown_to(module) if manual is None else manual.in_place_of(module):
            arguments = (batch, self.batch_idx) if self._takes_index else (batch,)
            with in_trained_precision(module):
                output = module.training_step(*arguments)
        if manual is not None:
            self.stepped = manual.stepped
            return manual.loss
        return output.get("loss") if isinstance(output, dict) else output

    def _hooked(self, hook: str, batch: Batch, tap: _LossTap) -> Tensor:
        """The mean of what the module's hook says it minimises, which stands in ``tap`` as its only call."""
        output = getattr(self.module, hook)(copied(batch))
        tap.calls.clear()
        if hook == "attribution_losses":
            call = _plain_call(hook, output, lambda generator: output)
        else:
            distribution, targets = output

            def sample(generator: torch.Generator) -> Tensor:
                torch.manual_seed(generator.initial_seed())  # of the global one, which the passes isolate
                return -distribution.log_prob(distribution.sample())

            call = _plain_call(
                hook,
                -distribution.log_prob(targets),
                sample,
                lambda: distribution.log_prob(targets),
                *_information_of(distribution),
            )
        tap.calls.append(call)
        return call.value


def _plain_call(
    name: str,
    elements: Tensor,
    sample: Callable[[torch.Generator], Tensor],
    log_prob: Callable[[], Tensor] | None = None,
    outputs: tuple[Tensor, ...] = (),
    information: Information | None = None,
) -> LossCall:
    """Elements that the module gave by a hook: an unweighted mean."""
    ones = torch.ones_like(elements).detach()
    return LossCall(
        name=name,
        reduction="mean",
        elements=elements,
        weights=ones,
        curvature=ones,
        sample=sample,
        log_prob=log_prob,
        outputs=outputs,
        information=information,
    )


def _information_of(distribution: Distribution) -> tuple[tuple[Tensor, ...], Information | None]:
    """What a distribution's log-probabilities depend on and their Fisher information; ``None`` if only by sampling."""
    if distribution.has_enumerate_support:
        rows = distribution.log_prob(distribution.enumerate_support())
        return (rows,), lambda weights, tangents: [weights * rows.detach().exp() * tangents[0]]
    base, events = distribution, 0
    while isinstance(base, Independent):
        base, events = base.base_dist, events + base.reinterpreted_batch_ndims
    if not isinstance(base, Normal):
        return (), None
    variance = base.scale.detach().square()

    def information(weights: Tensor, tangents: Sequence[Tensor]) -> list[Tensor]:
        each = weights.reshape(*weights.shape, *[1] * events) / variance
        return [each * tangents[0], 2 * each * tangents[1]]

    return (base.loc, base.scale), information
