"""What a set-up of a library gives: its training, as the library's own documentation writes it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Callbacks = list[Any]  # of either of Lightning's names


def seeded(seed: int) -> None:
    """Seed every generator that a module's first weights or its data may be drawn from."""
    import lightning.pytorch as L

    L.seed_everything(seed, verbose=False)


@dataclass(frozen=True)
class SetUp:
    """A library's training with a place for callbacks; nothing in it knows of attribution.

    Attributes:
        module: the LightningModule, where the library leaves the Trainer to its user.
        loader: the training loader or DataModule; ``None`` where the module has its own.
        options: arguments of the Trainer.
        fit: where the library makes its Trainer: trains with these callbacks, from the same seed each time.
        own_callbacks: makes the callbacks that belong to the set-up itself, anew for each training.
        examples: for trainings whose loader is a stream: makes a loader of the training examples, which is given as
            ``train=``.
        batch: the batch of these examples of a loader, where that is not what the loader's collate function makes.
        loss: the loss of a batch whose gradient is attributed, where the step does not return it.
        noisy: whether the step draws noise of its own, so that single gradients are known up to that noise only.
    """

    module: Any = None
    loader: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    fit: Callable[[Callbacks], Any] | None = None
    own_callbacks: Callable[[], Callbacks] = list
    examples: Callable[[Any], Any] | None = None
    batch: Callable[[Any, list[int]], Any] | None = None
    loss: Callable[[Any, Any], Any] | None = None
    noisy: bool = False

    def train(self, callbacks: Callbacks) -> Any:
        """Train anew; gives the Trainer."""
        if self.fit is not None:
            return self.fit(callbacks)
        import lightning.pytorch as L

        torch.manual_seed(1)
        quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
        trainer = L.Trainer(
            **({"max_epochs": 2, "accelerator": "cpu", "logger": False} | quiet | dict(self.options)),
            callbacks=[*self.own_callbacks(), *callbacks],
        )
        trainer.fit(copy.deepcopy(self.module), self.loader)
        return trainer
