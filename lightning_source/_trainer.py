"""The only file that knows the Trainer from inside: what it supports, where it writes, which data it trains on."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from lightning_source.capture.data import Examples, examples_of
from lightning_source.distributed import SINGLE_PROCESS, Ranks
from lightning_source.recording.store import MANIFEST


def check_trainer(trainer: Any, module: Any, optimizer: int | None) -> None:
    """Refuse what would be recorded wrongly.

    Args:
        trainer: the Trainer.
        module: the LightningModule.
        optimizer: index of the optimizer whose parameters are attributed; ``None`` if the user did not say.

    Raises:
        MisconfigurationException: names the setting and the way out.
    """
    strategy, count = trainer.strategy, len(trainer.optimizers)
    if isinstance(strategy, DeepSpeedStrategy) or not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise MisconfigurationException(
            f"SourceCallback does not support the strategy `{type(strategy).__name__}`: parameters are not whole on"
            ' every rank. HINT: train on one device, or with `strategy="ddp"`.'
        )
    for callback in trainer.callbacks:
        if isinstance(callback, StochasticWeightAveraging):
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


def run_directory(trainer: Any, dirpath: str | None) -> Path:
    """Where the run goes: the argument, else beside the logger's files, else a fresh ``source-run`` directory.

    A collective call under distributed strategies, as ``trainer.log_dir`` is; rank 0 decides. ``fast_dev_run`` writes
    to a temporary directory, since it must leave nothing behind that looks like a run.
    """
    log_dir = trainer.log_dir
    return trainer.strategy.broadcast(_run_directory(trainer, log_dir, dirpath) if trainer.is_global_zero else None)


def _run_directory(trainer: Any, log_dir: str | None, dirpath: str | None) -> Path:
    if trainer.fast_dev_run:
        return Path(tempfile.mkdtemp(prefix="source-run-"))
    if dirpath is not None:
        return Path(dirpath).resolve()
    base = Path(log_dir or trainer.default_root_dir).absolute() / "source-run"
    path, version = base, 1
    while (path / MANIFEST).exists():
        path, version = base.with_name(f"source-run-v{version}"), version + 1
    return path


def clips_gradients(trainer: Any, module: Any) -> bool:
    """Whether a step's gradient may be scaled before the optimizer sees it."""
    return bool(trainer.gradient_clip_val) or is_overridden("configure_gradient_clipping", module)


def training_examples(trainer: Any) -> Examples | None:
    """The fit's training set in its own order; ``None`` where it has none (iterable), with a word on what follows."""
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise MisconfigurationException(
            f"SourceCallback needs one training DataLoader, got `{type(loader).__name__}`. HINT: concatenate the"
            " datasets (`torch.utils.data.ConcatDataset`)."
        )
    if isinstance(loader.dataset, IterableDataset):
        rank_zero_warn(
            "The training data are iterable, so examples have no stable ids: parameters are recorded, and factors and"
            " scores wait until `attribute(..., train=a map-style dataset of the same examples)`."
        )
        return None
    unseen = _left_out(trainer, loader)
    if unseen:
        rank_zero_warn(f"Training does not visit all examples alike ({'; '.join(unseen)}): scores assume that it does.")
    return examples_of(loader)


def _left_out(trainer: Any, loader: DataLoader) -> Sequence[str]:
    reasons = []
    if trainer.num_training_batches < len(loader):
        reasons.append(f"`limit_train_batches` leaves {trainer.num_training_batches} of {len(loader)} batches")
    sampler = loader.sampler
    alike = (RandomSampler, SequentialSampler, DistributedSampler)
    if not isinstance(sampler, alike) and loader.batch_size is not None:
        reasons.append(f"the sampler is `{type(sampler).__name__}`")
    if loader.drop_last and isinstance(sampler, SequentialSampler) and len(loader.dataset) % (loader.batch_size or 1):  # type: ignore[arg-type]
        reasons.append("`drop_last` without shuffling never reaches the last examples")
    return reasons


def ranks_of(trainer: Any) -> Ranks:
    """The processes that train together; an earlier fit's process group may outlive it."""
    return Ranks.current() if trainer.world_size > 1 else SINGLE_PROCESS


def averages_weights(trainer: Any) -> bool:
    """Whether some callback puts an average of the trained weights into the module when training ends."""
    return any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)


def other_callbacks(trainer: Any, callback: Any) -> list[Any]:
    """The Trainer's other callbacks of the same class."""
    return [other for other in trainer.callbacks if other is not callback and isinstance(other, type(callback))]


def scoring_device(trainer: Any) -> torch.device:
    """The device that training ran on."""
    return trainer.strategy.root_device
