"""Runs one after the other, in the module itself and by its own ``training_step``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_source._lightning import MisconfigurationException
from lightning_source.evaluation.further_runs.losses import GivenLoss, StepLoss
from lightning_source.evaluation.further_runs.recipe import Pair, Recipe, Trace, unchanged


class PlainRuns:
    """One run after the other, in the module itself.

    Args:
        recipe: how training goes on.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.loss = GivenLoss(recipe) if recipe.loss is not None else StepLoss(recipe)
        if isinstance(self.loss, StepLoss) and self.loss.in_part_unknown:  # a batch tells no query's own
            recipe = replace(recipe, queries=recipe.queries.one_at_a_time())
        self._queries = recipe.query_batches()
        with unchanged(recipe.module):
            self.start = self._measure()

    def run(self, pairs: Sequence[Pair]) -> Trace:
        """Measurements and distances of these runs."""
        measurements, distances = zip(*map(self._run, pairs), strict=True)
        return Trace(torch.stack(measurements, 2), torch.stack(distances, 1))

    def _run(self, pair: Pair) -> tuple[Tensor, Tensor]:
        recipe = self.recipe
        point, seed = pair
        measurements, distances = [], []
        with unchanged(recipe.module, seed):
            parameters = recipe.trained()
            start = {name: p.detach().clone() for name, p in parameters.items()}
            optimizer = recipe.new_optimizer({id(p): p for p in parameters.values()})
            for batches in recipe.order(pair):
                if recipe.mode == "train":
                    recipe.module.train()
                for ids in batches:
                    gradients = torch.autograd.grad(
                        self._loss_of(ids, point), list(parameters.values()), allow_unused=True
                    )
                    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                        parameter.grad = gradient
                    optimizer.step()
                measurements.append(self._measure())
                squares = [(p.detach() - start[name]).double().square().sum() for name, p in parameters.items()]
                distances.append(torch.stack(squares).sum().sqrt().cpu())
            optimizer.zero_grad()
        return torch.stack(measurements), torch.stack(distances)

    def _loss_of(self, ids: Tensor, point: int | None) -> Tensor:
        recipe = self.recipe
        masked = recipe.removal == "mask" and point is not None and point in ids
        loss = self.loss.batch(recipe.fetch(ids), len(ids), ids.tolist().index(point) if masked else None)
        if recipe.removal != "downweight" or point is None:
            return loss
        # What this pass draws must not move the draws of the batches.
        with torch.random.fork_rng(devices=[recipe.module.device] if recipe.module.device.type == "cuda" else []):
            own = self.loss.single(recipe.fetch(torch.tensor([point])))
        return loss - own / len(recipe.data)

    @torch.no_grad()
    def _measure(self) -> Tensor:
        for child in self.recipe.module.modules():
            child.training = False
        by_batch = [self.loss.measure(batch, size).detach().cpu() for size, batch in self._queries]
        for values, (size, _) in zip(by_batch, self._queries, strict=True):
            if values.shape != (size,):
                raise MisconfigurationException(
                    f"a batch of {size} queries was measured by a tensor {list(values.shape)}, not one value each."
                    " HINT: a measurement gives `[B]`."
                )
        return torch.cat(by_batch)
