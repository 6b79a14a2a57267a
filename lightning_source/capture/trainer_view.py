"""What a step sees as ``self.trainer`` while a pass calls it: a fit that stands at the parameters under examination.

Steps read the Trainer: an annealed weight takes ``self.current_epoch``, a library asks ``self.trainer.training``
whether to give a loss at all. After ``fit`` the real Trainer says that training is over, and in another process there
is none. Both see this stand-in, so both compute the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lightning_source._lightning import training_state


@dataclass(frozen=True)
class TrainerFacts:
    """Numbers of a fit that a step may read off its Trainer, as they were when the fit began."""

    max_epochs: int | None = None
    max_steps: int = -1
    num_training_batches: int | float = 0
    accumulate_grad_batches: int = 1
    log_every_n_steps: int = 50
    world_size: int = 1
    num_devices: int = 1

    def to_json(self) -> dict[str, Any]:
        """As a dictionary for the manifest; a number of batches that is infinite is left out."""
        values = asdict(self)
        if values["num_training_batches"] == float("inf"):
            del values["num_training_batches"]
        return values


@dataclass(frozen=True)
class Moment:
    """A point of training."""

    global_step: int = 0
    current_epoch: int = 0


# What a Trainer has besides, where none is at hand.
_PLAIN: dict[str, Any] = {
    "validating": False,
    "testing": False,
    "predicting": False,
    "evaluating": False,
    "sanity_checking": False,
    "training": True,
    "fast_dev_run": False,
    "barebones": False,
    "is_global_zero": True,
    "is_last_batch": False,
    "should_stop": False,
    "global_rank": 0,
    "local_rank": 0,
    "node_rank": 0,
    "num_nodes": 1,
    "gradient_clip_val": None,
    "gradient_clip_algorithm": None,
    "logger": None,
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
_EMPTY = ("callbacks", "loggers", "optimizers", "lr_scheduler_configs", "checkpoint_callbacks")
_NO_METRICS = ("callback_metrics", "logged_metrics", "progress_bar_metrics")


class TrainerView:
    """Stands for the Trainer of a fit at one moment; what it does not know itself, the real Trainer answers.

    Args:
        moment: the step and epoch that it shows.
        facts: the fit's numbers.
        real: the Trainer that ``fit``, where this process has it.

    Raises:
        AttributeError: on reading what neither knows, with the attribute's name and the way out.
    """

    def __init__(self, moment: Moment, facts: TrainerFacts, real: object | None = None) -> None:
        self._real = real
        self.global_step = moment.global_step
        self.current_epoch = moment.current_epoch
        self.state = training_state()
        self.training = True
        self.validating = self.testing = self.predicting = self.evaluating = self.sanity_checking = False
        self.max_epochs = facts.max_epochs
        self.max_steps = facts.max_steps
        self.num_training_batches = facts.num_training_batches
        self.accumulate_grad_batches = facts.accumulate_grad_batches
        self.log_every_n_steps = facts.log_every_n_steps

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        real = vars(self).get("_real")
        if real is not None:
            return getattr(real, name)
        if name in _PLAIN:
            return _PLAIN[name]
        if name in _EMPTY:
            return []
        if name in _NO_METRICS:
            return {}
        if name in ("world_size", "num_devices"):
            return 1
        if name == "estimated_stepping_batches":
            return self._estimated_steps()
        raise AttributeError(
            f"`training_step` reads `trainer.{name}`, which a recorded run does not know. HINT: score in the process"
            " that trained, by `trainer.attribute`."
        )

    def _estimated_steps(self) -> int | float:
        if self.max_steps != -1:
            return self.max_steps
        if self.max_epochs in (None, -1):
            return float("inf")
        assert self.max_epochs is not None
        per_epoch = -(-self.num_training_batches // max(1, self.accumulate_grad_batches))
        return per_epoch * self.max_epochs


@contextmanager
def seen_by(module: nn.Module, view: TrainerView) -> Iterator[None]:
    """Inside, the module and the LightningModules in it have this view for their Trainer."""
    owners = [child for child in module.modules() if isinstance(vars(child), dict) and "_trainer" in vars(child)]
    previous = [(owner, vars(owner)["_trainer"]) for owner in owners]
    try:
        for owner in owners:
            vars(owner)["_trainer"] = view
        yield
    finally:
        for owner, real in previous:
            vars(owner)["_trainer"] = real
