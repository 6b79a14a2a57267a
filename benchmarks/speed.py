"""What attribution costs beside training and beside kronfluence, on four kinds of network.

    python benchmarks/speed.py --peer kronfluence            # all rows, medians of 3
    python benchmarks/speed.py gpt resnet --device cuda      # some of them, elsewhere

The peer needs an environment that has it:

    pip install torch==2.13.0 accelerate einops pandas psutil safetensors
    pip install --no-deps kronfluence==1.0.1 einconv opt_einsum

Both sides run in one process on one model, one data set and one precision. "Influence" is EK-FAC influence end to end:
factors at the final model, and all pairs of training examples and queries. "SOURCE" is everything that SOURCE with
three snapshots costs beyond training without the callback: recording, factors and scores. "Checks" is the part of
either that finds out what the training step does (:mod:`lightning_source.passes.preparation`), paid once a run.
Prints JSON; ``--out`` writes it, and ``benchmarks/make_results.py`` makes ``docs/speed.md`` of it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from harness import quiet
from speed_networks import ROWS, Row
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_source.runs.stage as stage_module
from lightning_source import SourceCallback, SourceScorer

SNAPSHOTS = 3
BATCH = 64  # of training; passes use the row's own
Times = dict[str, float]


class Module(L.LightningModule):
    """A plain user's module."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.net = row.network()
        self.row = row

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.row.loss(self.net, *batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.row.optimizer(self.parameters())


class Empirical(Module):
    """The same with curvature from the data's own labels, which no draw of labels blurs."""

    def attribution_losses(self, batch: list[Tensor]) -> Tensor:
        return self.row.each_loss(self.net, *batch)


@dataclass(frozen=True)
class Side:
    """What is timed.

    Attributes:
        row: the network and its data.
        device: ``"cpu"`` or ``"cuda"``.
        folder: for runs and files.
    """

    row: Row
    device: str
    folder: Path

    def trainer(self, *callbacks: L.Callback) -> L.Trainer:
        return L.Trainer(
            max_epochs=self.row.epochs,
            accelerator=self.device if self.device == "cpu" else "gpu",
            devices=1,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def trained(self, *callbacks: L.Callback, kind: type[Module] = Module) -> tuple[Module, Times]:
        """A module after training, and the seconds of it."""
        L.seed_everything(0, verbose=False)
        module = kind(self.row)
        trainer = self.trainer(*callbacks)
        loader = DataLoader(self.row.train, BATCH, shuffle=True, generator=torch.Generator().manual_seed(0))
        with timed(self.device) as seconds:
            trainer.fit(module, loader)
        return module, seconds


@contextmanager
def timed(device: str) -> Iterator[Times]:
    """Wall-clock seconds under ``"all"``, of which those of the checks under ``"checks"``."""
    seconds: Times = {"all": 0.0, "checks": 0.0}
    own = stage_module.prepare

    def prepare(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return own(*args, **kwargs)
        finally:
            synchronize(device)
            seconds["checks"] += time.perf_counter() - start

    stage_module.prepare = prepare
    start = time.perf_counter()
    try:
        yield seconds
    finally:
        synchronize(device)
        seconds["all"] = time.perf_counter() - start
        stage_module.prepare = own


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def one_round(side: Side, number: int, peer: bool) -> Times:
    """Every figure of a row once."""
    row = side.row
    _, plain = side.trained()
    run = side.folder / f"run{number}"
    callback = SourceCallback(str(run), snapshots_per_segment=SNAPSHOTS, **row.settings)
    module, recorded = side.trained(callback)
    factors = callback.seconds["factors"]
    module.to(side.device)
    with timed(side.device) as scoring:
        scorer = SourceScorer.from_run(run, module)
        scorer.score(row.query, row.train, method="source", batch_size=row.batch)
    scorer = SourceScorer.from_run(run, module)
    scorer.run.store.commit(remove=tuple(n for n in scorer.run.store.manifest.files if n.startswith("segments/")))
    with timed(side.device) as influence:
        scorer = SourceScorer.from_run(run, module)
        scorer.score(row.query, row.train, method="influence", batch_size=row.batch)
    figures = {
        "training": plain["all"],
        "recording": callback.seconds["recording"],
        "recorded_training": recorded["all"] - factors,
        "factors": factors,
        "scoring": scoring["all"],
        "source": recorded["all"] - plain["all"] + scoring["all"],
        "influence": influence["all"] + recorded["checks"],
        "checks": recorded["checks"],
        "run_bytes": float(sum(f.stat().st_size for f in run.rglob("*") if f.is_file())),
        "model_bytes": float(sum(p.numel() * p.element_size() for p in module.net.parameters())),
    }
    if peer:
        from speed_peer import kronfluence_seconds

        figures["kronfluence"] = kronfluence_seconds(row, module.net, side.folder, f"round{number}", side.device)
    return figures


def agreement(side: Side) -> float:
    """Correlation with kronfluence's scores over layers that both follow: empirical Fisher, the same damping."""
    from speed_peer import kronfluence_scores

    run = side.folder / "empirical"
    names = [
        f"net.{name}" for name, child in Module(side.row).net.named_modules() if type(child) in (nn.Linear, nn.Conv2d)
    ]
    callback = SourceCallback(str(run), snapshots_per_segment=1, mode="deferred", include=names, factor_examples=None)
    module, _ = side.trained(callback, kind=Empirical)
    module.to(side.device)
    scorer = SourceScorer.from_run(run, module)
    ours = scorer.score(side.row.query, side.row.train, method="influence", batch_size=side.row.batch).values
    theirs = kronfluence_scores(side.row, module.net, side.folder, "empirical", side.device, empirical=True)
    return float(torch.corrcoef(torch.stack([ours.flatten().double(), theirs.cpu().flatten().double()]))[0, 1])


def measure(name: str, device: str, repeats: int, peer: bool) -> dict[str, Any]:
    """Medians of a row, and ratios of medians."""
    with tempfile.TemporaryDirectory() as folder:
        side = Side(ROWS[name](), device, Path(folder))
        peer = peer and side.row.peer
        rounds = [one_round(side, number, peer) for number in range(repeats + (device == "cuda"))]
        rounds = rounds[-repeats:]  # the first on a GPU also loads its kernels
        figures: dict[str, Any] = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        if peer:
            for method in ("influence", "source"):
                figures[f"kronfluence_over_{method}"] = figures["kronfluence"] / figures[method]
            figures["correlation_with_kronfluence"] = agreement(side)
    return {"row": name, "title": side.row.title} | {
        key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", default=[], help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--peer", choices=["kronfluence"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    quiet(arguments.threads)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {arguments.threads} threads"
    result = {
        "device": device,
        "repeats": arguments.repeats,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rows": [],
    }
    for name in arguments.rows or ROWS:
        result["rows"].append(measure(name, arguments.device, arguments.repeats, arguments.peer is not None))
        print(json.dumps(result["rows"][-1]), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
