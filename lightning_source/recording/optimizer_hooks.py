"""Hangs on the optimizer that is attributed and tells the recorder of every step: its rates, window and clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_source.names import parameter_names
from lightning_source.optimizers import StepRule, preconditioners, rule_for
from lightning_source.recording.parameter_groups import Phase
from lightning_source.recording.recorder import Recorder


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
    def clips_gradients(self) -> bool:
        """Whether the gradient may be scaled between backward and step."""
        ...

    @property
    def scales_loss(self) -> bool:
        """Whether a loss scaler multiplies the loss, so that gradients after backward are not the loss's own."""
        ...

    @property
    def steps(self) -> int:
        """Optimizer steps done so far, those that were not recorded included."""
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

    @property
    def more_in_first_epoch(self) -> bool:
        """Whether it is in its first epoch, and another batch of it follows the present one."""
        ...


@dataclass
class PlainLoop:
    """A :class:`TrainingLoop` of one's own: ``loss.backward()`` and ``optimizer.step()``, from the first step on."""

    optimizers: Sequence[Optimizer]
    accumulate_grad_batches: int = 1
    clips_gradients: bool = False
    schedulers: int = 0
    by_hand: bool = False
    scales_loss: bool = False
    steps: int = 0
    epoch: int = 0
    facts: Mapping[str, Any] | None = None
    within_epoch: bool = False
    more_in_first_epoch: bool = False


class OptimizerObserver:
    """Watches one of a training's optimizers.

    Args:
        loop: what trains.
        module: the model.
        index: which optimizer.
        timed: a context that the observer's own work runs in.

    Raises:
        MisconfigurationException: no rule is known for the optimizer.
    """

    def __init__(
        self, loop: TrainingLoop, module: nn.Module, index: int, timed: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.loop = loop
        self.index = index
        self.by_hand = loop.by_hand
        self.names = parameter_names(module)
        self._timed = timed
        self._clips = not self.by_hand and loop.clips_gradients
        self.trained: tuple[tuple[int, ...], ...] = ()  # ids of parameters by group
        self._handles: list[RemovableHandle] = []
        self._recorder: Recorder | None = None
        self._columns: Phase | None = None
        self._window = 0
        self._batch = self._counted = 0
        self._witness: nn.Parameter | None = None
        self._paused = False
        self._weight: float | None = None
        self._norm: Tensor | None = None
        self.refresh()

    def refresh(self) -> None:
        """The optimizer as the loop has it now, and how it steps."""
        self.optimizer: Optimizer = self.loop.optimizers[self.index]
        self.rule = rule_for(self.optimizer)
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
        if self.by_hand:
            self._witness = None
            parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
            self._handles += [p.register_hook(partial(self._on_gradient, p)) for p in parameters]

    def detach(self) -> None:
        """Leave the optimizer as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def on_batch_start(self) -> None:
        """By hand, where the other hooks are silent, batches that reach the optimizer's gradients count."""
        self._batch += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Gradients inside are not training's."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _on_gradient(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        if self._witness is None:  # one parameter that training reaches speaks for all
            self._witness = parameter
        if parameter is not self._witness or self._paused:
            return
        if parameter.grad is None:  # zeroed since
            self._window = self._counted = 0
        if self._counted != self._batch:
            self._counted = self._batch
            self._window += 1

    def on_zero_grad(self) -> None:
        """A window of micro-batches begins."""
        self._window = 0

    def on_after_backward(self) -> None:
        """One more micro-batch; by hand, the gradient before the user clips it, by whatever means."""
        if not self.by_hand:
            self._window += 1
        elif not self.loop.scales_loss:
            self._norm = self._gradient_norm()

    def on_before_step(self, optimizer: Optimizer) -> None:
        """The gradient before it is clipped."""
        if optimizer is not self.optimizer:
            return
        if self._clips:
            self._norm = self._gradient_norm()
        if self.by_hand:
            self._weight = self._close_window()  # here, since the loss scaler may skip the step itself

    def _before_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        assert self._recorder is not None
        with self._timed():
            self._recorder.before_step()

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        assert self._recorder is not None
        assert self._columns is not None
        with self._timed():
            rules = self.rules
            self._recorder.after_step(
                self._columns.per_column([group["lr"] for group in optimizer.param_groups]),
                self._columns.per_column([rule.rate_multiplier for rule in rules]),
                self._columns.per_column([rule.weight_decay for rule in rules]),
                self._loss_weight(),
                self._coefficient(),
            )
            self._weight = self._norm = None

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

    def _coefficient(self) -> Tensor | None:
        """What multiplied the step's gradient: clipping, and 0 where a fused optimizer was told to skip."""
        coefficient: Tensor | None = None
        # A fused optimizer that was given the loss scale has taken it out of the gradients meanwhile.
        if self._norm is not None and getattr(self.optimizer, "grad_scale", None) is None:
            after = self._gradient_norm()
            dropped = (after == 0) & (self._norm != 0)  # what was not finite, or clipped to nothing
            coefficient = torch.where(self._norm > 0, after / self._norm, torch.where(dropped, 0.0, 1.0))
        overflow = getattr(self.optimizer, "found_inf", None)
        if overflow is not None:
            taken: Tensor = 1 - overflow.reshape(())
            coefficient = taken if coefficient is None else coefficient * taken
        return coefficient

    def _gradient_norm(self) -> Tensor:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)
