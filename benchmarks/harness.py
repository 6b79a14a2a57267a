"""What the studies share: a recorded training and its scores, options, and the form of the results."""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from safetensors.torch import load_file, save_file
from task_data import Data
from tasks import TASKS, Task, Trained, fit, measurement_of
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_source import InfluenceScores, SourceCallback, SourceScorer
from lightning_source.capture.data import Examples
from lightning_source.recording.snapshots import mean_preconditioner

RESULTS = Path(__file__).parent / "results"
QUICK = "quick"
PEERS = ("kronfluence", "bergson")  # which rows begin with


@dataclass
class Trial:
    """One training of a task's full model, recorded in the cache, and what may be asked of it."""

    name: str
    task: Task
    data: Data
    seed: int
    cache: Path
    share: float = 0.5  # of the examples, in each subset of the ground truth
    opened: dict[str, SourceScorer] = field(default_factory=dict)
    peer_seconds: float | None = None  # as a peer measured itself, without the start of its interpreter

    def scorer(self, kind: type[Trained] = Trained, **settings: Any) -> SourceScorer:
        """The run of a module recorded with these settings of :class:`SourceCallback`; trained the first time."""
        key = "-".join([kind.__name__, *(f"{k}={v}" for k, v in sorted(settings.items()))])
        if key not in self.opened:
            path = self.cache / "runs" / self.name / f"{self.seed}-{key}"
            module = kind(self.task, len(self.data.train[0]))
            if not (path / "manifest.json").exists():
                callback = SourceCallback(str(path), mode="deferred", **settings)
                fit(self.task, self.data, self.seed, callback, kind)
            measurement = measurement_of(self.task, kind is Trained)
            self.opened[key] = scorer = SourceScorer.from_run(path, module, measurement=measurement, stage=0)
            for stage, (examples, _) in zip(scorer.run.stages, self.task.stages(self.data), strict=True):
                stage.use(Examples(TensorDataset(*examples), self.task.batch_size))
        return self.opened[key]

    def score(self, method: str, settings: dict[str, Any] | None = None, **options: Any) -> InfluenceScores:
        """Scores of one of the package's estimators."""
        return self.scorer(**(settings or {})).score(self.data.query, method=method, batch_size=512, **options)

    def network(self) -> dict[str, Tensor]:
        """The trained network's parameters and buffers, by their names in the network."""
        return {name.removeprefix("net."): value for name, value in self.scorer().run.final().items()}

    def learning(self) -> float:
        """``Λ`` of the whole training."""
        run = self.scorer().run
        return sum(segment.stretch.weight for segment in [*run.segments(), *run.later_segments()])

    def checkpoints(self, count: int) -> dict[str, Tensor]:
        """Each snapshot's parameters and second moments, the segments' mean learning rates and steps.

        The parameters are those in its middle, but the last one's are the trained network's: the query is taken there.
        """
        run = self.scorer(snapshots="point").run
        segments, found = run.segments(count), {}
        for segment in segments:
            for snapshot in segment.snapshots:
                last = snapshot.last == segments[-1].stretch.last
                for name, value in (run.final() if last else run.state(snapshot, "point")).items():
                    found[f"checkpoint.{snapshot.last}.{name.removeprefix('net.')}"] = value
                for name, value in mean_preconditioner(run.store, [snapshot]).items():
                    found[f"square.{snapshot.last}.{name.removeprefix('net.')}"] = value**-2
        stretches = [segment.stretch for segment in segments]
        found["rates"] = torch.tensor([s.weight / s.steps for s in stretches], dtype=torch.float64)
        found["steps"] = torch.tensor([s.steps for s in stretches])
        return found

    def peer(self, script: str, python: str, *options: str, further: dict[str, Tensor] | None = None) -> Tensor:
        """Scores that a script in another environment computes from the trained network, the data and ``further``."""
        with tempfile.TemporaryDirectory() as folder:
            given, found = Path(folder) / "given.safetensors", Path(folder) / "found.safetensors"
            tensors = {f"network.{name}": value for name, value in self.network().items()} | (further or {})
            for part in ("train", "query"):
                tensors |= {f"{part}.{i}": t for i, t in enumerate(getattr(self.data, part))}
            save_file({k: v.contiguous() for k, v in tensors.items()}, given)
            subprocess.run(
                [python, str(Path(__file__).parent / script), str(given), str(found), *options],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            result = load_file(found)
        self.peer_seconds = float(result["seconds"])
        return result["scores"]


Scores = Callable[[Trial], Tensor | InfluenceScores]  # [Q, N], positive = removing raises the measurement


def by(method: str, settings: dict[str, Any] | None = None, **options: Any) -> Scores:
    return lambda trial: trial.score(method, settings, **options)


def parser(description: str | None, trainings: int = 5) -> argparse.ArgumentParser:
    """The options that the studies share."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--task", nargs="*", default=[], choices=list(TASKS), help="tasks, in this order")
    options.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    options.add_argument("--cache", type=Path, help="folder for ground truths, runs and scores")
    options.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options.add_argument("--seeds", type=int, default=trainings, help="trainings of the full model")
    options.add_argument("--share", type=float, default=0.5, help="share of the examples in a subset")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--quick", action="store_true", help="a tiny digits task; writes no results")
    options.set_defaults(usual_seeds=trainings)
    return options


def prepare(arguments: argparse.Namespace) -> None:
    """Quiet, and what ``--quick`` stands for."""
    quiet(arguments.threads)
    if arguments.quick:
        arguments.task, arguments.seeds, arguments.out = [QUICK], min(arguments.seeds, 2), None


def quiet(threads: int = 1) -> None:
    """As many threads, and neither warnings nor Lightning's own lines."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def command(task: str, arguments: argparse.Namespace, rows: Iterable[str] = ()) -> str:
    """What makes these figures; ``rows`` may need the interpreters of peers."""
    words = [f"python benchmarks/{Path(sys.argv[0]).name} --task {task}"]
    words += [f"--share {arguments.share:g}"] if arguments.share != 0.5 else []
    words += [f"--seeds {arguments.seeds}"] if arguments.seeds != arguments.usual_seeds else []
    words += [f"--{peer} PYTHON" for peer in PEERS if any(row.startswith(peer) for row in rows)]
    return " ".join([*words, "--data DATA --cache CACHE"])


def result_file(arguments: argparse.Namespace, stem: str) -> Path | None:
    return None if arguments.out is None else arguments.out / f"{stem}.json"


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "lightning": lightning.__version__}


def rounded(values: Any) -> Any:
    """A number, or a list of numbers, with four digits."""
    return [round(float(v), 4) for v in values] if isinstance(values, list) or values.dim() else round(float(values), 4)


def write(report: dict[str, Any], file: Path | None) -> None:
    """A study's figures as JSON, lists of numbers on one line each; nothing without a file."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda match: "[" + re.sub(r"\s+", " ", match[1]) + "]", text)
    file.write_text(text + "\n")
