"""Checks one set-up in the environment that it is called from, and prints what was found as one line of JSON.

    python benchmarks/clients/check.py setups/darts_nbeats.py

The training is run with and without the callback and its weights compared. ``trainer.attribute`` is asked about a few
training examples; products of gradients are compared with those of the library's own ``training_step`` on batches of
one example, by autograd, up to a factor for each parameter group; scores are compared with those of another scorer of
the run.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from lightning_source import SourceCallback, SourceScorer
from lightning_source.capture.trainer_view import training_seen

FEW = 6  # examples that products are compared on


def names() -> tuple[type, ...]:
    """The callback classes of Lightning's names that are installed."""
    found = []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        if importlib.util.find_spec(name.split(".")[0]):
            found.append(importlib.import_module(name).Callback)
    return tuple(found)


class Keeper(*names()):  # type: ignore[misc]
    """Keeps the Trainer, which some libraries do not give back."""

    trainer: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.trainer = trainer


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.lightning_module.named_parameters()}


def as_in_passes(module: Any, mode: str) -> None:
    """Put the module in the mode of the passes: training, perhaps, with its randomness and batch statistics off."""
    module.train(mode == "train")
    for part in module.modules():
        if isinstance(part, (torch.nn.modules.batchnorm._BatchNorm, torch.nn.modules.dropout._DropoutNd)):
            part.eval()
    vars(module).update(log=lambda *args, **kwargs: None, log_dict=lambda *args, **kwargs: None)


def alone(
    module: Any, covered: list[str], count: int, batch_of: Callable[[list[int]], Any], loss_of: Callable[..., Any]
) -> torch.Tensor:
    """Gradients of single examples by the library's own step, ``[count, D]``, over the attributed parameters."""
    own = dict(module.named_parameters())
    state = {name: value.clone() for name, value in module.state_dict().items()}
    rows = []
    for index in range(count):
        loss = None
        for copies in (1, 2):  # a step that does not run on a batch of one is given the example twice
            batch = batch_of([index] * copies)
            if vars(module).get("_trainer"):
                batch = module._apply_batch_transfer_handler(batch, module.device)
            torch.manual_seed(0)
            before = dict(vars(module))  # what a step keeps for the next one
            try:
                with training_seen(module):  # the Trainer as it is while it trains
                    loss = loss_of(module, batch)
                break
            except Exception:
                if copies == 2:
                    raise
            finally:
                vars(module).update(before)
        loss = loss["loss"] if isinstance(loss, Mapping) else loss
        loss = getattr(loss, "loss", loss)
        gradients = torch.autograd.grad(loss, [own[name] for name in covered], allow_unused=True)
        pairs = zip(gradients, covered, strict=True)
        module.load_state_dict(state)  # steps may move a second network
        rows.append(torch.cat([(torch.zeros_like(own[n]) if g is None else g).flatten() for g, n in pairs]))
    return torch.stack(rows).double()


def compared(setup: Any, trainer: Any, folder: str) -> Iterator[tuple[str, Any]]:
    """What is asked after a training, each answer as a name and a value, in the order in which one may fail."""
    source = next(c for c in trainer.callbacks if isinstance(c, SourceCallback))  # a library may have copied it
    module = trainer.lightning_module
    loader = setup.examples(trainer) if setup.examples else trainer.train_dataloader
    train = {"train": loader} if setup.examples else {}
    few = min(FEW, len(loader.dataset))
    query = Subset(loader.dataset, range(few))
    if setup.examples:
        query = DataLoader(query, batch_size=few, collate_fn=loader.collate_fn)
    start = time.perf_counter()
    scores = trainer.attribute(query, **train)
    yield "scoring_seconds", round(time.perf_counter() - start, 1)
    yield "coverage", round(scores.metadata["coverage"], 4)
    with source.scorer(trainer) as scorer:
        record = scorer.run.stage.record
        names = [name for block in scorer.run.coverage.blocks for name in block.parameters]
        yield "one_at_a_time", record.objective.one_at_a_time
    # Asked of the module's weights, which the oracle has: a library may have put its best checkpoint back.
    asked = {"method": "grad-dot", "weights": "module"}
    products = trainer.attribute(query, **asked, **train).values[:, :few].double()
    again = SourceScorer.from_run(f"{folder}/run", module).score(query, loader)
    yield "from_run", float((again.values - scores.values).abs().max()) / float(scores.values.abs().max())
    as_in_passes(module, record.mode)
    # Products carry the rates of their parameter groups: each group's own part is known up to a factor.
    collated = setup.batch or (lambda loader, ids: loader.collate_fn([loader.dataset[i] for i in ids]))
    gradients = alone(module, names, few, lambda ids: collated(loader, ids), setup.loss or step)
    sizes = [dict(module.named_parameters())[name].numel() for name in names]
    parts = dict(zip(names, gradients.split(sizes, 1), strict=True))
    terms = []
    for columns in groups(trainer, module, names):
        own = torch.cat([parts[name] for name in columns], 1)
        terms.append((own @ own.T).flatten())
    design = torch.stack(terms, 1)
    design = design / design.norm(dim=0).clamp_min(1e-300)
    fitted = design @ torch.linalg.lstsq(design, products.flatten()[:, None]).solution
    yield "products", float((products.flatten() - fitted[:, 0]).norm() / products.norm())


def groups(trainer: Any, module: Any, names: list[str]) -> list[list[str]]:
    """The attributed parameters of each of the optimizers' groups that has any."""
    name_of = {id(p): name for name, p in module.named_parameters()}
    held = [group["params"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    found = [[name_of[id(p)] for p in own if name_of.get(id(p)) in names] for own in held]
    return [own for own in found if own] or [names]


def step(module: Any, batch: Any) -> Any:
    """The library's step on a batch, with as many arguments as it takes."""
    takes = inspect.signature(module.training_step).parameters
    return module.training_step(batch, 0) if len(takes) > 1 else module.training_step(batch)


def check(path: Path) -> dict[str, Any]:
    sys.path[:0] = [str(path.parent.parent)]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    setup = library.build(0)
    found: dict[str, Any] = {"noisy": setup.noisy, "streamed": setup.examples is not None}
    keeper = Keeper()
    start = time.perf_counter()
    trainer = setup.train([keeper]) or keeper.trainer
    found["plain_seconds"] = round(time.perf_counter() - start, 1)
    plain = weights(trainer)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        source = SourceCallback(f"{folder}/run", **getattr(library, "ARGUMENTS", {}))
        start = time.perf_counter()
        trainer = setup.train([source]) or source.trainer
        found["seconds"] = round(time.perf_counter() - start, 1)
        recorded = weights(trainer)
        found["bit_identical"] = all(torch.equal(plain[name], recorded[name]) for name in plain)
        try:
            found.update(compared(setup, trainer, folder))
        except Exception as error:
            found["stopped"] = f"{type(error).__name__}: {error}"[:600]
            if os.environ.get("TRACEBACK"):
                traceback.print_exc()
        found["warnings"] = [str(w.message)[:300] for w in said if "lightning_source" in str(w.filename)][:4]
    return found


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print(json.dumps(check(Path(sys.argv[1]).resolve())))
