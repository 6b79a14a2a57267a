"""What a step sees as ``self.trainer`` while a pass calls it: a fit that stands at the parameters under examination.

Steps read the Trainer: an annealed weight takes ``self.current_epoch``, a library asks ``self.trainer.training``
whether to give a loss at all. After ``fit`` the real Trainer says that training is over, and in another process there
is none. Both see this stand-in, so both compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import nn

from lightning_source._lightning import DummyLogger, classes, is_lightning_module, training_state
from lightning_source._trainer import facts_of, trainer_of
from lightning_source.capture.attributes import attributes_seen

_MISSING = object()  # in place of an attribute that was not there


@dataclass(frozen=True, kw_only=True)
class TrainerFacts:
    """Numbers of a fit that a step may read off its Trainer, as they were when the fit began."""

    max_epochs: int | None = None
    max_steps: int = -1
    num_training_batches: int | None = 0  # of an epoch; None: infinitely many
    accumulate_grad_batches: int = 1
    log_every_n_steps: int = 50
    world_size: int = 1
    num_devices: int = 1
    precision: str = "32-true"


@dataclass(frozen=True)
class Moment:
    """A point of training, as a step that begins there reads it off the Trainer and its module."""

    global_step: int = 0
    current_epoch: int = 0
    attributes: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)  # of the module, by place


class Optimizes(Protocol):
    """What stands for the module's optimizers and schedulers."""

    @property
    def optimizers(self) -> list[Any]:
        """Lightning's wrappers of the optimizers."""
        ...

    @property
    def schedulers(self) -> list[object]:
        """The learning rate schedulers."""
        ...


# What a Trainer has besides, where none is at hand.
_PLAIN: dict[str, object] = {
    "fast_dev_run": False,
    "barebones": False,
    "is_global_zero": True,
    "global_rank": 0,
    "local_rank": 0,
    "node_rank": 0,
    "num_nodes": 1,
    "gradient_clip_val": None,
    "gradient_clip_algorithm": None,
    "log_dir": None,
    "datamodule": None,
    "scaler": None,
    "progress_bar_callback": None,
    "checkpoint_callback": None,
    "early_stopping_callback": None,
    "train_dataloader": None,
    "val_dataloaders": None,
    "ckpt_path": None,
}
_MADE_IN = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
_EMPTY = ("callbacks", "checkpoint_callbacks")
_NO_METRICS = ("callback_metrics", "logged_metrics", "progress_bar_metrics")


class TrainerView:
    """Stands for the Trainer of a fit at one moment; what it does not know itself, the real Trainer answers.

    Args:
        moment: the step and epoch that it shows.
        facts: the fit's numbers.
        real: the Trainer that ``fit``, where this process has it.
        module: the module that is trained.

    Raises:
        AttributeError: on reading what neither knows, with the attribute's name and the way out.
    """

    def __init__(
        self, moment: Moment, facts: TrainerFacts, real: object | None = None, module: nn.Module | None = None
    ) -> None:
        self.real_trainer = real
        self.stand_ins: Optimizes | None = None  # while a step runs
        self._module = module
        self.global_step = moment.global_step
        self.current_epoch = moment.current_epoch
        self.state = training_state()
        self.training = True
        self.validating = self.testing = self.predicting = self.evaluating = self.sanity_checking = False
        self.is_last_batch = self.should_stop = False
        self.max_epochs = facts.max_epochs
        self.max_steps = facts.max_steps
        self.num_training_batches = math.inf if facts.num_training_batches is None else facts.num_training_batches
        self.accumulate_grad_batches = facts.accumulate_grad_batches
        self.log_every_n_steps = facts.log_every_n_steps
        self.world_size = facts.world_size
        self.num_devices = facts.num_devices
        self.precision = facts.precision

    @property  # type: ignore[misc]  # as mocks do: nothing else answers isinstance
    def __class__(self) -> type:
        """A Trainer's, of the module's own Lightning, so that ``isinstance(self.trainer, Trainer)`` holds as in fit."""
        if self.real_trainer is not None:
            return type(self.real_trainer)
        pairs = zip(classes("LightningModule"), classes("Trainer"), strict=True)
        return next((trainer for kind, trainer in pairs if isinstance(self._module, kind)), TrainerView)

    @property
    def optimizers(self) -> list[Any]:
        """What stands for torch's optimizers."""
        return [] if self.stand_ins is None else [wrapper.optimizer for wrapper in self.stand_ins.optimizers]

    @property
    def lr_scheduler_configs(self) -> list[object]:
        """What stands for the schedulers, by the one entry that a step may read."""
        schedulers = [] if self.stand_ins is None else self.stand_ins.schedulers
        return [SimpleNamespace(scheduler=scheduler) for scheduler in schedulers]

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps of the whole fit, as the Trainer estimates them."""
        if self.max_epochs in (None, -1) or self.num_training_batches == math.inf:
            return math.inf if self.max_steps == -1 else self.max_steps
        assert self.max_epochs is not None
        steps = math.ceil(self.num_training_batches / max(1, self.accumulate_grad_batches)) * max(self.max_epochs, 1)
        return steps if self.max_steps == -1 else min(steps, self.max_steps)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        real = vars(self).get("real_trainer")
        if real is not None:
            return getattr(real, name)
        if name in _PLAIN:
            return _PLAIN[name]
        if name in _EMPTY:
            return []
        if name in _NO_METRICS:
            return {}
        if name in ("lightning_module", "model"):
            return self._module
        if name in ("logger", "loggers"):
            return DummyLogger() if name == "logger" else [DummyLogger()]
        raise AttributeError(
            f"`training_step` reads `trainer.{name}`, which a recorded run does not know. HINT: score in the process"
            " that trained, by `trainer.attribute`."
        )


@contextmanager
def in_trained_precision(module: nn.Module) -> Iterator[None]:
    """Inside, tensors are made in the dtype in which the Trainer's precision let the step make them."""
    dtype = _MADE_IN.get(str(getattr(vars(module).get("_trainer"), "precision", "")))
    before = torch.get_default_dtype()
    try:
        if dtype is not None:
            torch.set_default_dtype(dtype)
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def training_seen(
    module: nn.Module, moment: Moment | None = None, facts: TrainerFacts | None = None, datamodule: object | None = None
) -> Iterator[TrainerView]:
    """Inside, the module, the LightningModules in it and the datamodule have a :class:`TrainerView` for their Trainer.

    Attributes that the module changed while it trained hold what they held at that moment.

    Args:
        module: the module that passes call.
        moment: what the view shows; by default what the real Trainer shows now, or the start where there is none.
        facts: the fit's numbers; by default the real Trainer's.
        datamodule: a LightningDataModule whose hooks may read the Trainer.
    """
    real = trainer_of(module)
    if moment is None:
        moment = Moment() if real is None else Moment(real.global_step, real.current_epoch)
    if facts is None:
        facts = TrainerFacts() if real is None else TrainerFacts(**facts_of(real))
    view = TrainerView(moment, facts, real, module)
    # A library may have taken the Trainer off its module, attribute and all, when training had ended.
    owners: list[tuple[object, str]] = [
        (child, "_trainer") for child in module.modules() if "_trainer" in vars(child) or is_lightning_module(child)
    ]
    if datamodule is not None:
        owners.append((datamodule, "trainer"))
    previous = [vars(owner).get(name, _MISSING) for owner, name in owners]
    try:
        for owner, name in owners:
            vars(owner)[name] = view
        with attributes_seen(module, moment.attributes):
            yield view
    finally:
        for (owner, name), trainer in zip(owners, previous, strict=True):
            if trainer is _MISSING:
                del vars(owner)[name]
            else:
                vars(owner)[name] = trainer
