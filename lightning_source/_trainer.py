"""The only file that knows the Trainer from inside: what it supports, where it writes, what it trains with and on.

It gives plain facts, and knows nothing of what the package makes of them.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from lightning_source._lightning import (
    Callback,
    DummyLogger,
    LightningModule,
    MisconfigurationException,
    Trainer,
    classes,
    is_overridden,
    rank_zero_warn,
)
from lightning_source._progress import NoProgress, Progress, RichProgress, TqdmProgress
from lightning_source.distributed import SINGLE_PROCESS, Ranks

C = TypeVar("C")
# How Lightning's learning rate and batch size finders name their checkpoints.
TUNERS = (".lr_find_", ".scale_batch_size_")


# ---------------------------------------------------------------- what trains


class TrainerLoop:
    """A Trainer as the :class:`~lightning_source.recording.optimizer_hooks.TrainingLoop` that a recording asks.

    Args:
        trainer: the Trainer.
        module: the module that it trains.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer = trainer
        self._module = module
        self._zeroes_gradients = not is_overridden("optimizer_zero_grad", module)

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """The optimizers as they are now."""
        return self._trainer.optimizers

    @property
    def schedulers(self) -> int:
        """Number of learning rate schedulers."""
        return len(self._trainer.lr_scheduler_configs)

    @property
    def by_hand(self) -> bool:
        """Whether the module optimizes by hand."""
        return not self._module.automatic_optimization

    @property
    def accumulate_grad_batches(self) -> int:
        """What each micro-batch's loss is divided by; a callback may change it from epoch to epoch."""
        return self._trainer.accumulate_grad_batches

    @property
    def zeroes_gradients(self) -> bool:
        """Whether ``on_before_zero_grad`` means it: an ``optimizer_zero_grad`` of the module's own need not."""
        return self._zeroes_gradients

    @property
    def loss_scale(self) -> Tensor | None:
        """What the loss scaler multiplies the loss by, on the module's device."""
        scaler = self._trainer.scaler
        if scaler is None:
            return None
        scale: Tensor = scaler.scale(torch.ones((), device=self._module.device))
        return scale

    @property
    def steps(self) -> int:
        """Optimizer steps done, those of the checkpoint included."""
        return self._trainer.global_step

    @property
    def remaining_steps(self) -> int | None:
        """Optimizer steps until ``max_epochs`` or ``max_steps``, where nothing else can end training."""
        trainer, loop = self._trainer, self._trainer.fit_loop
        kinds = {kind.__name__ for callback in _callbacks(trainer) for kind in type(callback).__mro__}
        if kinds & {"EarlyStopping", "Timer", "GradientAccumulationScheduler"}:
            return None
        if (
            self.by_hand and len(trainer.optimizers) > 1
        ):  # who may take turns; one alone steps at each batch, presumably
            return None
        limits = []
        if trainer.max_steps != -1:
            limits.append(trainer.max_steps - trainer.global_step)
        if trainer.max_epochs not in (None, -1) and math.isfinite(trainer.num_training_batches):
            every = trainer.accumulate_grad_batches
            done = loop.epoch_loop.batch_progress.current.completed // every  # where a run is resumed within an epoch
            epochs = trainer.max_epochs - trainer.current_epoch
            limits.append(-(-int(trainer.num_training_batches) // every) * epochs - done)
        return max(0, min(limits)) if limits else None

    @property
    def epoch(self) -> int:
        """The epoch that it is in."""
        return self._trainer.current_epoch

    @property
    def facts(self) -> dict[str, Any]:
        """What a step may read off the Trainer; see :func:`facts_of`."""
        return facts_of(self._trainer)

    @property
    def within_epoch(self) -> bool:
        """Whether training resumes within an epoch; its loader starts again, in another order."""
        return 0 < self._trainer.fit_loop.epoch_loop.batch_progress.current.ready < self._trainer.num_training_batches


def check_trainer(trainer: Trainer, module: LightningModule, optimizer: int | None) -> None:
    """Refuse what would be recorded wrongly.

    Args:
        trainer: the Trainer.
        module: the LightningModule.
        optimizer: index of the optimizer whose parameters are attributed; ``None`` if the user did not say.

    Raises:
        MisconfigurationException: names the setting and the way out.
    """
    strategy, count = trainer.strategy, len(trainer.optimizers)
    deep_speed = classes("strategies.DeepSpeedStrategy")
    known = (*classes("strategies.SingleDeviceStrategy"), *classes("strategies.DDPStrategy"))
    if isinstance(strategy, deep_speed) or not isinstance(strategy, known):
        raise MisconfigurationException(
            f"SourceCallback does not support the strategy `{type(strategy).__name__}`: parameters are not whole on"
            ' every rank. HINT: train on one device, or with `strategy="ddp"`.'
        )
    for callback in _callbacks(trainer):
        if isinstance(callback, classes("callbacks.StochasticWeightAveraging")):
            raise MisconfigurationException(
                "SourceCallback does not support `StochasticWeightAveraging`, which replaces the weights while training"
                " goes on. HINT: use `lightning.pytorch.callbacks.WeightAveraging` or `EMAWeightAveraging`, which leave"
                " the trained weights alone."
            )
    if count > 1 and optimizer is None:
        names = ", ".join(f"{i} `{type(o).__name__}`" for i, o in enumerate(trainer.optimizers))
        raise MisconfigurationException(
            f"`{type(module).__name__}` has {count} optimizers ({names}), each with a loss of its own. HINT: say whose"
            " parameters are attributed, `SourceCallback(optimizer=0)`."
        )
    if optimizer is not None and not 0 <= optimizer < count:
        raise MisconfigurationException(
            f"`SourceCallback(optimizer={optimizer})`: `configure_optimizers` gave {count} optimizers, numbered from 0."
        )


# ---------------------------------------------------------------- where it writes


def run_directory(trainer: Trainer, dirpath: str | None, taken: Callable[[Path], bool]) -> Path:
    """Where the run goes: the argument, else beside the logger's files, else a fresh ``source-run`` directory.

    A collective call under distributed strategies, as ``trainer.log_dir`` is; rank 0 decides. ``fast_dev_run`` writes
    to a temporary directory, since it must leave nothing behind that looks like a run.

    Args:
        trainer: the Trainer.
        dirpath: what the user named.
        taken: whether a directory holds a run already.
    """
    log_dir = trainer.log_dir
    chosen = _run_directory(trainer, log_dir, dirpath, taken) if trainer.is_global_zero else None
    path: Path | None = trainer.strategy.broadcast(chosen)
    assert path is not None
    return path


def _run_directory(trainer: Any, log_dir: str | None, dirpath: str | None, taken: Callable[[Path], bool]) -> Path:
    if trainer.fast_dev_run:
        return Path(tempfile.mkdtemp(prefix="source-run-"))
    if dirpath is not None:
        return Path(dirpath).resolve()
    base = Path(log_dir or trainer.default_root_dir).absolute() / "source-run"
    path, version = base, 1
    while taken(path):
        path, version = base.with_name(f"source-run-v{version}"), version + 1
    return path


# ---------------------------------------------------------------- what it trains on


def training_loader(trainer: Trainer) -> DataLoader[object] | None:
    """The fit's training loader, with a word where it is cut short; ``None``, with another, where there is not one."""
    loader = present_loader(trainer)
    if loader is None:
        rank_zero_warn(
            f"SourceCallback knows the examples of one training DataLoader, not those of"
            f" `{type(trainer.train_dataloader).__name__}`: parameters are recorded, and factors and scores wait until"
            " `attribute(..., train=a map-style dataset whose batches are like those of training)`. HINT: concatenate"
            " the datasets (`torch.utils.data.ConcatDataset`)."
        )
        return None
    count = trainer.num_training_batches
    if not isinstance(loader.dataset, IterableDataset) and count < len(loader):
        rank_zero_warn(
            f"Training does not visit all examples alike (`limit_train_batches` leaves {count} of {len(loader)}"
            " batches): scores assume that it does."
        )
    return loader


def present_loader(trainer: Trainer) -> DataLoader[object] | None:
    """The training loader as it is now, which may be another in each epoch; ``None`` where there is not one."""
    loader = trainer.train_dataloader
    return loader if isinstance(loader, DataLoader) else None


# ---------------------------------------------------------------- where it runs, and beside whom


def ranks_of(trainer: Trainer) -> Ranks:
    """The processes that train together; an earlier fit's process group may outlive it."""
    return Ranks.current() if trainer.world_size > 1 else SINGLE_PROCESS


def _callbacks(trainer: Any) -> list[Callback]:
    """The Trainer's callbacks, which it sets from elsewhere, so that type checkers do not see them."""
    return list(trainer.callbacks)


def averages_weights(trainer: Trainer) -> bool:
    """Whether some callback puts an average of the trained weights into the module when training ends."""
    return any(isinstance(callback, classes("callbacks.WeightAveraging")) for callback in _callbacks(trainer))


def other_callbacks(trainer: Trainer, callback: C) -> list[C]:
    """The Trainer's other callbacks of the same class."""
    return [other for other in _callbacks(trainer) if other is not callback and isinstance(other, type(callback))]


def scoring_device(trainer: Trainer) -> torch.device:
    """The device that training ran on."""
    return trainer.strategy.root_device


def progress_of(trainer: Trainer) -> Progress:
    """Bars of the Trainer's own kind; none where the user turned them off, or on other ranks than the first."""
    bar = getattr(trainer, "progress_bar_callback", None)
    if bar is None or not getattr(bar, "is_enabled", True) or not ranks_of(trainer).is_global_zero:
        return NoProgress()
    return RichProgress(bar) if hasattr(bar, "progress") and hasattr(bar, "theme") else TqdmProgress()


def loads_tuner_checkpoint(trainer: Trainer) -> bool:
    """Whether the checkpoint that a fit begins with is the tuner's own, which it has put back."""
    return Path(str(trainer.ckpt_path)).name.startswith(TUNERS)


# ---------------------------------------------------------------- what a module knows of it


def trainer_of(module: nn.Module) -> Any:
    """The Trainer that a module is attached to, itself where the module sees a stand-in; ``None`` if there is none."""
    trainer = getattr(module, "_trainer", None)
    return getattr(trainer, "real_trainer", trainer)


def facts_of(trainer: Any) -> dict[str, Any]:
    """Numbers of a fit that a ``training_step`` may read off its Trainer; ``None`` for infinitely many batches."""
    batches = trainer.num_training_batches
    names = ("max_epochs", "max_steps", "accumulate_grad_batches", "log_every_n_steps", "world_size", "num_devices")
    numbers = {name: getattr(trainer, name) for name in (*names, "precision")}
    return numbers | {"num_training_batches": None if batches == float("inf") else int(batches)}


def optimizer_lists(module: nn.Module) -> list[Sequence[object]]:
    """The optimizers that a ``training_step`` may hold on to: torch's own, and Lightning's wrappers of them."""
    trainer = trainer_of(module)
    return [] if trainer is None else [trainer.optimizers, list(trainer.strategy._lightning_optimizers)]


@contextmanager
def silent_loggers(module: nn.Module) -> Iterator[None]:
    """Inside, the loggers that the module writes to take nothing."""
    trainer = trainer_of(module)
    loggers = trainer.loggers if trainer is not None else []
    try:
        if loggers:
            trainer.loggers = [DummyLogger() for _ in loggers]
        yield
    finally:
        if loggers:
            trainer.loggers = loggers


def gathers(module: LightningModule) -> bool:
    """Whether Lightning would gather from processes, even if there is only one, and so add a dimension."""
    owner: Any = module.fabric if module.fabric is not None else trainer_of(module)
    kinds = (*classes("strategies.ParallelStrategy"), *classes("fabric.strategies.ParallelStrategy"))
    parallel = isinstance(getattr(owner, "strategy", None), kinds)
    return parallel and dist.is_available() and dist.is_initialized()
