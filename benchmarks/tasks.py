"""The tasks of the studies: data, network, recipe and measurement of each, as close to SOURCE's as two cores allow.

A task is a row of ``TASKS`` over the pieces of :mod:`task_data` and :mod:`task_networks`; ``note`` says where its
recipe is smaller than the paper's. Here is also how it is trained under the callback and retrained for ground truth.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file, save_file
from task_data import SENTENCE_WORDS, Data, cifar, digits, fashion, sentences, two_stage_digits, uci, wikitext
from task_networks import (
    TextEncoder,
    absolute_error,
    classification,
    gpt,
    language_model,
    margin,
    mlp,
    regression,
    resnet,
    sequence_loss,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, TensorDataset

from lightning_source.evaluation.batched import State, measure_copies, train_batched


@dataclass(frozen=True)
class Task:
    """A training recipe and how it is retrained for ground truth (method §7)."""

    note: str
    load: Callable[[Path], Data]
    build: Callable[[], nn.Module]
    loss: Callable[..., Tensor]  # (network, *batch) -> scalar
    measurement: Callable[..., Tensor]  # (network, *query) -> [Q]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    epochs: int
    batch_size: int
    later_epochs: int = 0  # of the second stage, where the data have one; an optimizer of its own begins it
    schedule: Callable[[torch.optim.Optimizer, int], LRScheduler] | None = None  # given the number of steps
    subsets: int = 100
    retrainings: int = 5
    steps_at_most: int = -1  # of the full model, where it shall stop early; -1: all
    tags: frozenset[str] = field(default_factory=frozenset)  # what a study may ask for: "mlp", "lm"

    def steps(self, examples: int) -> int:
        """Optimizer steps of a training on so many examples; each epoch's short last batch is left out."""
        return self.epochs * (examples // self.batch_size)

    @property
    def adaptive(self) -> bool:
        """Whether its steps are preconditioned."""
        return not isinstance(self.optimizer(nn.Linear(1, 1).parameters()), torch.optim.SGD)

    def stages(self, data: Data) -> list[tuple[list[Tensor], int]]:
        """Examples and epochs of each stage of training."""
        return [(data.train, self.epochs), *([(data.later, self.later_epochs)] if data.later else [])]


class Trained(L.LightningModule):
    """A task as any user would write it."""

    def __init__(self, task: Task, examples: int) -> None:
        super().__init__()
        self.net = task.build()
        self.task = task
        self.steps = task.steps(examples)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.task.loss(self.net, *batch)

    def configure_optimizers(self) -> Any:
        optimizer = self.task.optimizer(self.parameters())
        if self.task.schedule is None:
            return optimizer
        scheduler = self.task.schedule(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def measurement_of(task: Task, by_name: bool = True) -> str | Callable[[Trained, Sequence[Tensor]], Tensor]:
    """The task's measurement as ``attribute`` takes it: by name where the package has it."""
    named = {margin: "margin", sequence_loss: "loss"}
    if by_name and task.measurement in named:
        return named[task.measurement]
    return lambda module, batch: task.measurement(module.net, *batch)


def fit(task: Task, data: Data, seed: int, callback: L.Callback, kind: type[Trained] = Trained) -> None:
    """Train one model on all examples."""
    L.seed_everything(seed, verbose=False)
    module = kind(task, len(data.train[0]))
    for examples, epochs in task.stages(data):
        loader = DataLoader(TensorDataset(*examples), task.batch_size, shuffle=True, drop_last=True)
        quiet_trainer(epochs, callback, max_steps=task.steps_at_most).fit(module, loader)


def quiet_trainer(epochs: int, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    """A Trainer on the CPU that prints and keeps nothing."""
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def retrain(task: Task, data: Data, kept: Tensor, seeds: Sequence[int], progress: bool = False) -> Tensor:
    """``[C, Q]``: the measurement after training on each row of ``kept``, by the task's own recipe."""
    steps = task.steps(int(kept[0].sum()))
    state: State | None = None
    for examples, epochs in task.stages(data):
        state = train_batched(
            task.build,
            task.loss,
            examples,
            kept if state is None else torch.ones(len(kept), len(examples[0])),
            seeds,
            optimizer=task.optimizer,
            epochs=epochs,
            batch_size=task.batch_size,
            drop_last=True,
            schedule=None if task.schedule is None else lambda optimizer: task.schedule(optimizer, steps),
            start=state,
            progress=progress,
        )
    assert state is not None
    return measure_copies(task.build(), state, task.measurement, data.query)


def subsets(count: int, examples: int, share: float, seed: int = 0) -> Tensor:
    """``[count, examples]`` of 0 and 1, a share of them 1."""
    ranks = torch.rand(count, examples, generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
    return (ranks < round(share * examples)).to(torch.uint8)


def ground_truth(
    name: str, task: Task, data: Data, share: float = 0.5, cache: Path | None = None
) -> tuple[Tensor, Tensor]:
    """Subsets ``[S, N]`` and the measurement after every retraining on each, ``[R, S, Q]``; kept in ``cache``."""
    file = None if cache is None else cache / f"truth-{name}-{share:g}.safetensors"
    kept = subsets(task.subsets, len(data.train[0]), share)
    done = load_file(file)["measurement"] if file is not None and file.exists() else None
    rounds = [] if done is None else list(done[: task.retrainings])
    while len(rounds) < task.retrainings:
        first = 1000 + len(rounds) * task.subsets
        rounds.append(retrain(task, data, kept, range(first, first + task.subsets)))
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"kept": kept, "measurement": torch.stack(rounds)}, file)
        print(f"{name}: retraining {len(rounds)} of {task.retrainings}", file=sys.stderr, flush=True)
    return kept, torch.stack(rounds)


def sgd(rate: float, decay: float = 0.0) -> Callable[[Any], torch.optim.Optimizer]:
    return partial(torch.optim.SGD, lr=rate, momentum=0.9, weight_decay=decay)


def triangular(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Up to the optimizer's rate in the first fifth of training and down to 0 by its end."""
    peak = max(1, steps // 5)
    return LambdaLR(optimizer, lambda step: min((step + 1) / peak, max(0.0, (steps - step) / max(1, steps - peak))))


DIGITS = partial(mlp, 64, 64, 32, 10)
FASHION = partial(mlp, 196, 128, 64, 10)
_MLP = frozenset({"mlp"})

TASKS: dict[str, Task] = {
    "digits-20": Task(
        "1,000 digits (8 x 8), MLP 64-32, SGD 0.03, momentum 0.9, batch 32, 20 epochs",
        partial(digits, queries=100),
        *(DIGITS, classification, margin, sgd(0.03), 20, 32),
        retrainings=10,
        tags=_MLP,
    ),
    "digits-3": Task(
        "digits-20 after 3 epochs",
        *(digits, DIGITS, classification, margin, sgd(0.03), 3, 32),
        retrainings=20,
        tags=_MLP,
    ),
    "digits-adam": Task(
        "digits-20 with Adam 0.001",
        partial(digits, queries=100),
        *(DIGITS, classification, margin, partial(torch.optim.Adam, lr=1e-3), 20, 32),
        tags=_MLP,
    ),
    "digits-adamw": Task(
        "digits-20 with AdamW 0.003, weight decay 0.01",
        partial(digits, queries=100),
        *(DIGITS, classification, margin, partial(torch.optim.AdamW, lr=3e-3, weight_decay=1e-2), 20, 32),
        tags=_MLP,
    ),
    "two-stage-upright": Task(
        "640 digits, then 640 others turned by 45 degrees: the first 640 are attributed from the end of the second"
        " stage, for upright queries. MLP 64-32, SGD 0.03, momentum 0.9, batch 32, 20 epochs and 10",
        partial(two_stage_digits, 0.0),
        *(DIGITS, classification, margin, sgd(0.03), 20, 32),
        later_epochs=10,
        retrainings=40,
    ),
    "two-stage-rotated": Task(
        "two-stage-upright with queries turned by 45 degrees",
        partial(two_stage_digits, 45.0),
        *(DIGITS, classification, margin, sgd(0.03), 20, 32),
        later_epochs=10,
        retrainings=40,
    ),
    "concrete": Task(
        "Concrete as in the paper: 896 examples, MLP 3 x 128, SGD 0.03, momentum 0.9, decay 1e-5, batch 32, 20 epochs",
        partial(uci, "concrete", 896, 100),
        partial(mlp, 8, 128, 128, 128, 1),
        *(regression, absolute_error, sgd(3e-2, 1e-5), 20, 32),
        tags=_MLP,
    ),
    "parkinsons": Task(
        "Parkinsons, shrunk from 5,280 to 1,320 examples: MLP 3 x 128, SGD 0.01, momentum 0.9, decay 3e-5, batch 32,"
        " 20 epochs",
        partial(uci, "parkinsons", 1320, 100),
        partial(mlp, 20, 128, 128, 128, 1),
        *(regression, absolute_error, sgd(1e-2, 3e-5), 20, 32),
        retrainings=3,
        tags=_MLP,
    ),
    "fashion": Task(
        "Fashion-MNIST, shrunk from 6,144 images of 28 x 28 to 1,024 of 14 x 14 and from MLP 512-256-128 to 128-64: SGD"
        " 0.03, momentum 0.9, decay 1e-3, batch 64, 20 epochs",
        partial(fashion, 1024, 100),
        *(FASHION, classification, margin, sgd(3e-2, 1e-3), 20, 64),
        retrainings=5,
        tags=_MLP,
    ),
    "fashion-small": Task(
        "512 images of Fashion-MNIST at 14 x 14, MLP 64: SGD 0.03, momentum 0.9, decay 1e-3, batch 64, 15 epochs",
        partial(fashion, 512, 100),
        partial(mlp, 196, 64, 10),
        *(classification, margin, sgd(3e-2, 1e-3), 15, 64),
        tags=_MLP,
    ),
    "fashion-noisy": Task(
        "Fashion-MNIST with 30 % random labels, shrunk from 6,144 images of 28 x 28 to 2,048 of 14 x 14 and from MLP"
        " 512-256-128 to 128-64: SGD 0.01, momentum 0.9, decay 3e-5, batch 32, 3 epochs",
        partial(fashion, 2048, 100, noise=0.3),
        *(FASHION, classification, margin, sgd(1e-2, 3e-5), 3, 32),
        retrainings=10,
        tags=_MLP,
    ),
    "sst2": Task(
        "2,048 sentences of SST-2, a transformer encoder of one layer (width 32) trained from scratch in place of"
        " BERT: AdamW 0.003, decay 0.01, batch 32, 3 epochs",
        partial(sentences, 2048, 100),
        partial(TextEncoder, SENTENCE_WORDS),
        *(classification, margin, partial(torch.optim.AdamW, lr=3e-3, weight_decay=1e-2), 3, 32),
        subsets=60,
        retrainings=3,
    ),
    "wikitext": Task(
        "256 stretches of 16 words of WikiText-2, GPT-2 with 2 layers of width 32 trained from scratch in place of"
        " fine-tuning: AdamW 0.003, decay 0.01, batch 8, 6 epochs",
        partial(wikitext, 256, 60),
        gpt,
        *(language_model, sequence_loss, partial(torch.optim.AdamW, lr=3e-3, weight_decay=1e-2), 6, 8),
        subsets=60,
        retrainings=2,
        tags=frozenset({"lm"}),
    ),
    "cifar": Task(
        "512 images of CIFAR-10 at 16 x 16 and a ResNet of 8 and 16 channels with batch normalisation in place of"
        " 3,072 and ResNet-9: SGD up to 0.1 and down to 0, momentum 0.9, decay 1e-3, batch 64, 15 epochs",
        partial(cifar, 512, 60),
        *(resnet, classification, margin, sgd(0.1, 1e-3), 15, 64),
        schedule=triangular,
        subsets=60,
        retrainings=2,
    ),
    "quick": Task(
        "300 digits, MLP 32, SGD 0.03, momentum 0.9, batch 32, 8 epochs: only a check that the studies run",
        partial(digits, train=300, queries=40),
        partial(mlp, 64, 32, 10),
        *(classification, margin, sgd(0.03), 8, 32),
        subsets=60,
        retrainings=2,
        tags=_MLP,
    ),
}
