"""Checks one set-up in the environment that it is called from, and prints what was found as one line of JSON.

    python benchmarks/clients/check.py setups/darts_nbeats.py

The training is run with and without the callback and its weights compared. ``trainer.attribute`` is asked about a few
training examples; products of gradients are compared with those of the library's own ``training_step`` on batches of
one example, by autograd, up to one common factor; scores are compared with those of another scorer of the run.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from lightning_source import SourceCallback, SourceScorer

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


def alone(module: Any, loader: Any, covered: list[str], count: int) -> torch.Tensor:
    """Gradients of single examples by the library's own step, ``[count, D]``, over the attributed parameters."""
    own = dict(module.named_parameters())
    vars(module).update(log=lambda *args, **kwargs: None, log_dict=lambda *args, **kwargs: None)
    rows = []
    for index in range(count):
        loss = None
        for copies in (1, 2):  # a step that does not run on a batch of one is given the example twice
            batch = loader.collate_fn([loader.dataset[index]] * copies)
            batch = module._apply_batch_transfer_handler(batch, module.device) if module._trainer else batch
            torch.manual_seed(0)
            try:
                loss = module.training_step(batch, 0)
                break
            except Exception:
                if copies == 2:
                    raise
        loss = loss["loss"] if isinstance(loss, dict) else loss
        gradients = torch.autograd.grad(loss, [own[name] for name in covered], allow_unused=True)
        pairs = zip(gradients, covered, strict=True)
        rows.append(torch.cat([(torch.zeros_like(own[n]) if g is None else g).flatten() for g, n in pairs]))
    return torch.stack(rows).double()


def check(path: Path) -> dict[str, Any]:
    sys.path[:0] = [str(path.parent.parent)]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    setup = library.build(0)
    found: dict[str, Any] = {"name": library.NAME, "requirements": library.REQUIREMENTS}
    keeper = Keeper()
    setup.train([keeper])
    plain = weights(keeper.trainer)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        source = SourceCallback(f"{folder}/run")
        start = time.perf_counter()
        keeper = Keeper()
        setup.train([keeper, source])
        trainer = keeper.trainer
        found["seconds"] = round(time.perf_counter() - start, 1)
        recorded = weights(trainer)
        found["bit_identical"] = all(torch.equal(plain[name], recorded[name]) for name in plain)
        try:
            loader = trainer.train_dataloader
            query = Subset(loader.dataset, range(FEW))
            scores = trainer.attribute(query)
            found["coverage"] = round(scores.metadata["coverage"], 4)
            products = trainer.attribute(query, method="grad-dot").values[:, :FEW].double()
            module = trainer.lightning_module
            try:
                elsewhere = copy.deepcopy(module)
            except Exception:  # it holds tensors of a graph
                elsewhere = module
            other = SourceScorer.from_run(f"{folder}/run", elsewhere)
            again = other.score(query, loader)
            scale = float(scores.values.abs().max())
            found["from_run"] = float((again.values - scores.values).abs().max()) / scale
            with source.scorer(trainer) as scorer:
                blocks = scorer.run.coverage.blocks
                mode = scorer.run.stage.record.mode
            module.train(mode == "train")
            gradients = alone(module, loader, [name for block in blocks for name in block.parameters], FEW)
            expected = gradients @ gradients.T
            factor = float((products * expected).sum() / expected.square().sum())
            found["products"] = float((products - factor * expected).norm() / products.norm())
            found["noisy"] = setup.noisy
        except Exception as error:
            found["refused"] = f"{type(error).__name__}: {error}"[:400]
        found["warnings"] = [str(w.message)[:200] for w in said if "lightning_source" in str(w.filename)][:4]
    return found


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print(json.dumps(check(Path(sys.argv[1]).resolve())))
