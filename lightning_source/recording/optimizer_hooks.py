"""Hangs on the optimizer that is attributed and tells the recorder of every step: its rates, window and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_source._lightning import MisconfigurationException
from lightning_source.names import parameter_names
from lightning_source.optimizers import StepRule, known_class, preconditioners, rule_for
from lightning_source.recording.gradient_watch import GradientWatch, warn_of_directions
from lightning_source.recording.parameter_groups import Phase
from lightning_source.recording.recorder import Recorder
from lightning_source.recording.step_check import StepCheck


class TrainingLoop(Protocol):
    """What the recording asks of whatever trains the model: a Trainer, Fabric, a loop of one's own."""

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """The optimizers as they are now; they may be replaced while training goes on."""
        ...

    @property
    def schedulers(self) -> int:
        """Number of learning rate schedulers."""
        ...

    @property
    def by_hand(self) -> bool:
        """Whether ``training_step`` goes backward and steps itself, so that no call tells of its micro-batches."""
        ...

    @property
    def accumulate_grad_batches(self) -> int:
        """What each micro-batch's loss is divided by before it goes backward."""
        ...

    @property
    def zeroes_gradients(self) -> bool:
        """Whether gradients are surely zeroed where it is said that they are about to be."""
        ...

    @property
    def loss_scale(self) -> Tensor | None:
        """What a loss scaler multiplies the loss by before backward, 0-dim; ``None`` without one."""
        ...

    @property
    def steps(self) -> int:
        """Optimizer steps done so far, those that were not recorded included."""
        ...

    @property
    def remaining_steps(self) -> int | None:
        """Optimizer steps still to be done, as far as that is known; ``None`` where training ends when it likes."""
        ...

    @property
    def epoch(self) -> int:
        """The epoch that training is in."""
        ...

    @property
    def facts(self) -> Mapping[str, Any] | None:
        """What a step may read off the Trainer, by :class:`~lightning_source.capture.trainer_view.TrainerFacts`."""
        ...

    @property
    def within_epoch(self) -> bool:
        """Whether training, about to start, goes on within an epoch, whose data come in another order."""
        ...


@dataclass
class PlainLoop:
    """A :class:`TrainingLoop` of one's own: ``loss.backward()`` and ``optimizer.step()``, from the first step on."""

    optimizers: Sequence[Optimizer]
    accumulate_grad_batches: int = 1
    schedulers: int = 0
    by_hand: bool = False
    zeroes_gradients: bool = True
    loss_scale: Tensor | None = None
    steps: int = 0
    remaining_steps: int | None = None
    epoch: int = 0
    facts: Mapping[str, Any] | None = None
    within_epoch: bool = False


class OptimizerObserver:
    """Watches one of a training's optimizers.

    Args:
        loop: what trains.
        module: the model.
        index: which optimizer.
        guarded: a context that the observer's own work runs in; what fails in it must not end training.

    Raises:
        MisconfigurationException: no rule is known for the optimizer.
    """

    def __init__(
        self, loop: TrainingLoop, module: nn.Module, index: int, guarded: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.loop = loop
        self.index = index
        self.by_hand = loop.by_hand
        self.names = parameter_names(module)
        self._guarded = guarded
        self.trained: tuple[tuple[int, ...], ...] = ()  # ids of parameters by group
        self._handles: list[RemovableHandle] = []
        self._recorder: Recorder | None = None
        self._columns: Phase | None = None
        self._window = 0
        self._batch = self._counted = 0
        self._witness: nn.Parameter | None = None
        self._may_be_zero = False
        self._weight: float | None = None
        self._depth = 0  # of steps within steps: a derived optimizer's own, and its parent's inside
        self._learning_rates: list[float] = []  # of the groups, as the innermost step began
        self._watch: GradientWatch | None = None
        self._turned: list[dict[str, Tensor]] = []  # cosines of earlier phases
        self._check: StepCheck | None = None
        self.refresh()

    def refresh(self) -> None:
        """The optimizer as the loop has it now, and how it steps."""
        self.optimizer: Optimizer = self.loop.optimizers[self.index]
        self.rule = rule_for(self.optimizer)
        known = known_class(self.optimizer)
        if known is type(self.optimizer):
            self._check = None
        elif self._check is None or self._check.optimizer is not self.optimizer:
            self._check = StepCheck(self.optimizer, known)
        if len({rule.maximize for rule in self.rules}) > 1:
            raise MisconfigurationException("some parameter groups maximise and others minimise; HINT: do one of them.")
        self.trained = self._trained_by(self.optimizer)

    def _trained_by(self, optimizer: Optimizer) -> tuple[tuple[int, ...], ...]:
        # Optimizing by hand, users toggle gradients as they go: what once had them is trained.
        once = {key for group in self.trained for key in group} if self.by_hand else set()
        return tuple(
            tuple(id(p) for p in group["params"] if p.requires_grad or id(p) in once)
            for group in optimizer.param_groups
        )

    @property
    def rules(self) -> Sequence[StepRule]:
        """How each parameter group steps."""
        return [self.rule(group) for group in self.optimizer.param_groups]

    def preconditioners(self) -> dict[str, Tensor]:
        """The optimizer's diagonal preconditioners by parameter name."""
        return preconditioners(self.optimizer, self.rule, self.names)

    def phase(self, previous: Phase | None, first: int) -> Phase:
        """The phase that begins at a step under the groups that there are now."""
        groups = [[self.names[key] for key in group if key in self.names] for group in self.trained]
        decoupled = [rule.decoupled for rule in self.rules]
        return Phase.after(previous, first, type(self.optimizer).__name__, groups, decoupled)

    def changed(self) -> bool:
        """Whether the optimizer was replaced, or what its groups train, since the last :meth:`refresh`."""
        optimizer = self.loop.optimizers[self.index]
        return optimizer is not self.optimizer or self._trained_by(optimizer) != self.trained

    # ---------------------------------------------------------------- steps

    def attach(self, recorder: Recorder, columns: Phase) -> None:
        """Tell the recorder of each step from now on, by these columns."""
        self.detach()
        self._recorder, self._columns = recorder, columns
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]
        own = {self.names[id(p)]: p for g in self.optimizer.param_groups for p in g["params"] if id(p) in self.names}
        watched = {name: own.get(name) for column in columns.columns for name in column}
        self._watch = GradientWatch(watched, self._guarded, lambda: self.loop.loss_scale)
        if self.by_hand or not self.loop.zeroes_gradients:
            self._witness = None
            parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
            self._handles += [p.register_hook(partial(self._on_gradient, p)) for p in parameters]

    def detach(self) -> None:
        """Leave the optimizer as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._watch is not None:
            self._watch.detach()
            self._turned.append(self._watch.changes())
            self._watch = None

    def report(self) -> None:
        """Training has ended: say once what the step log cannot hold."""
        self.detach()
        warn_of_directions(self._turned)
        self._turned = []

    def on_batch_start(self) -> None:
        """By hand, where the other hooks are silent, batches that reach the optimizer's gradients count."""
        self._batch += 1
        self._depth = 0  # a step that broke off did not end
        if self._watch is not None:
            self._watch.on_batch_start()

    def _on_gradient(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        if self._witness is None:  # one parameter that training reaches speaks for all
            self._witness = parameter
        if parameter is not self._witness:
            return
        if parameter.grad is None or (self._may_be_zero and not parameter.grad.any()):  # zeroed since
            self._window = self._counted = 0
        self._may_be_zero = False
        if self.by_hand and self._counted != self._batch:
            self._counted = self._batch
            self._window += 1

    def on_zero_grad(self) -> None:
        """A window of micro-batches begins, unless the user's own method leaves the gradients as they are."""
        if self.loop.zeroes_gradients:
            self._window = 0
        else:
            self._may_be_zero = True

    def on_after_backward(self) -> None:
        """One more micro-batch."""
        if not self.by_hand:
            self._window += 1

    def on_before_step(self, optimizer: Optimizer) -> None:
        """A step comes, unless the loss scaler skips it."""
        if self.by_hand and optimizer is self.optimizer:
            self._weight = self._close_window()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the step, or before the closure that it calls to get gradients; these are looked at when it ends."""
        assert self._recorder is not None
        self._depth += 1
        # Before it moves: a derived optimizer may set its rates on the way to its parent's step, or once that is done.
        self._learning_rates = [float(group["lr"]) for group in optimizer.param_groups]
        if self._depth > 1:
            if self._check is not None:
                with self._guarded():
                    self._check.before_step()
            return None
        with self._guarded():
            self._recorder.before_step()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._on_given_gradients()
            return None

        def and_look() -> Any:
            loss = closure()
            self._on_given_gradients()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": and_look}
        return (args[0], and_look, *args[2:]), kwargs

    def _on_given_gradients(self) -> None:
        """Not after the step, since some optimizers write into the gradients."""
        with self._guarded():
            if self._watch is not None:
                # A fused optimizer that is given the loss scale takes it out of the gradients itself.
                unscaled = getattr(self.optimizer, "grad_scale", None) is None
                self._watch.on_step(unscaled, getattr(self.optimizer, "found_inf", None))
            if self._check is not None:
                self._check.before_step()

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        assert self._recorder is not None
        assert self._columns is not None
        self._depth -= 1
        if self._depth:
            return
        with self._guarded():
            rules = self.rules
            self._recorder.after_step(
                self._columns.per_column(self._learning_rates),
                self._columns.per_column([rule.rate_multiplier for rule in rules]),
                self._columns.per_column([rule.weight_decay for rule in rules]),
                self._loss_weight(),
                None if self._watch is None else self._watch.take(),
            )
            self._weight = None
            if self._check is not None:
                self._check.after_step()

    def _loss_weight(self) -> float:
        weight = self._close_window() if self._weight is None else self._weight
        reached = any(p.grad is not None for group in self.optimizer.param_groups for p in group["params"])
        return weight if reached else 0.0  # gradients were dropped, so the step follows none

    def _close_window(self) -> float:
        """What multiplies the mean loss of the micro-batches that a step saw."""
        window, self._window, self._counted = self._window, 0, 0
        if self.by_hand:
            return max(1, window)  # several steps on one batch each see its mean
        return window / max(1, self.loop.accumulate_grad_batches)  # also where a last window is shorter
