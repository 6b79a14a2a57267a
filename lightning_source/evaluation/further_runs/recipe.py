"""How training goes on, and what is measured of it: what plain and stacked runs share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_source.capture.data import Examples, GivenBatches, to_module
from lightning_source.capture.isolation import undisturbed
from lightning_source.capture.objective import Measurement

Removal = Literal["downweight", "mask", "shift"]
Mode = Literal["eval", "train"]
ExampleLoss = Measurement  # (module, batch) -> [B], of which a training step takes the mean
Pair = tuple[int | None, int]  # the left-out example (None: all are there) and the seed of a run


@dataclass(frozen=True)
class Recipe:
    """How training goes on.

    Attributes:
        module: the LightningModule, with the parameters to start from; they come back unchanged.
        data: its training examples, in batches of further training's size; an epoch's last, short batch is kept.
        queries: what is measured after every epoch.
        optimizer: over the module's parameters; each run takes a new one like it.
        epochs: of further training.
        removal: how an example is left out.
        mode: of the module while it trains.
        measurement: name or callable, what a query is measured by.
        loss: per-example losses of which a step takes the mean; ``None`` for the module's ``training_step``.
        hooks: the LightningDataModule, if it transforms batches.
    """

    module: LightningModule
    data: Examples
    queries: Examples | GivenBatches
    optimizer: Optimizer
    epochs: int
    removal: Removal
    mode: Mode
    measurement: str | Measurement
    loss: ExampleLoss | None = None
    hooks: LightningDataModule | None = None

    @property
    def batch_size(self) -> int:
        """Examples of a step."""
        return self.data.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch on all examples."""
        return -(-len(self.data) // self.batch_size)

    def order(self, pair: Pair) -> Iterator[list[Tensor]]:
        """The batches of each epoch, as ids. The seed alone draws the order; ``"shift"`` then deletes the example."""
        point, seed = pair
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.epochs):
            ids = torch.randperm(len(self.data), generator=generator)
            if self.removal == "shift" and point is not None:
                ids = ids[ids != point]
            yield list(ids.split(self.batch_size))

    def new_optimizer(self, like: dict[int, Tensor]) -> Optimizer:
        """A fresh optimizer of the same kind and groups over other tensors, given by ``id`` of the module's own."""
        groups = [
            {**group, "params": [like[id(p)] for p in group["params"] if id(p) in like]}
            for group in self.optimizer.param_groups
        ]
        kind: Any = type(self.optimizer)  # Optimizer itself would also ask for defaults
        optimizer: Optimizer = kind(groups)
        return optimizer

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer moves, by name."""
        moved = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad and id(p) in moved}

    def fetch(self, ids: Tensor) -> object:
        """These training examples as one batch on the module's device."""
        batches = self.data.in_batches_of(len(ids)).batches(ids)
        return to_module(next(batches)[1], self.module, self.hooks)

    def query_batches(self) -> list[tuple[int, object]]:
        """Number of queries and batch, on the module's device."""
        return [(len(ids), to_module(batch, self.module, self.hooks)) for ids, batch in self.queries.batches()]


@dataclass(frozen=True)
class Trace:
    """What was measured along runs.

    Attributes:
        measurements: ``[E, Q, C]``, after every epoch.
        distances: ``[E, C]``, Euclidean distance of the trained parameters from where they started.
    """

    measurements: Tensor
    distances: Tensor


@contextmanager
def unchanged(module: nn.Module, seed: int = 0) -> Iterator[None]:
    """Training inside leaves the module, its modes, buffers and gradients and the process's generators as they were."""
    with undisturbed(module, seed):
        saved = [(p, p.detach().clone()) for p in module.parameters()]
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, values in saved:
                    parameter.copy_(values)
