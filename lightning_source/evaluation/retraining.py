"""Ground truth by retraining: subsets by seeds, in parallel, each finished run on disk at once."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm.auto import tqdm

from lightning_source._files import DirectoryError
from lightning_source._lightning import (
    FABRICS,
    NAMESPACE,
    LightningModule,
    MisconfigurationException,
    Trainer,
    isolate_rng,
    rank_zero_warn,
    seed_everything,
)
from lightning_source.evaluation._inputs import kept_masks
from lightning_source.evaluation._retraining_directory import RetrainingDirectory
from lightning_source.recording.claim import Claim

Build = Callable[[list[int], int], tuple[LightningModule, Any, Trainer]]
Measure = Callable[[LightningModule], Tensor]

_SEED_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
# The random generators, which decide initialisation and order, belong to the process: its threads take turns.
_ONE_RUN_PER_PROCESS = threading.RLock()


def retrain(
    build: Build,
    subsets: ArrayLike,
    seeds: Sequence[int],
    measure: Measure,
    dirpath: str | os.PathLike[str],
    *,
    n_jobs: int | None = None,
    threads: int = 1,
    recipe: Mapping[str, object] | None = None,
    progress: bool = True,
) -> Tensor:
    """Train on every subset with every seed and measure the queries after each training.

    Runs are spread by joblib: over processes by default, elsewhere inside ``joblib.parallel_config(backend=...)``
    (``"dask"``, ``"ray"`` and ``"threading"`` too), where ``dirpath`` must be on a file system that the workers share.
    A run is determined by its subset and seed, whatever runs beside it (on the CPU bit for bit): torch, NumPy and
    Python are seeded before ``build``, and ``threads`` fixes the order of sums. Threads of one process take turns,
    since they share the generators.

    Args:
        build: ``build(kept, seed) -> (module, data, trainer)``. ``kept`` are the positions of the training examples to
            use, ascending, for ``torch.utils.data.Subset``; ``data`` is whatever ``trainer.fit`` takes, a DataLoader or
            a LightningDataModule. Give the Trainer no logger and no checkpoints. The function and what it refers to
            travel to other processes with every run; large data are better loaded inside it.
        subsets: ``[M, N]`` of 0 and 1 (or bool), 1 = keep. A row of ones is a run on everything.
        seeds: ``R`` different integers; run ``[r, m]`` is seeded with ``seeds[r]`` on every subset, which takes what
            the initialisation does to all subsets alike out of their comparison. More seeds may be given later.
        measure: ``measure(module) -> [Q]``, called in evaluation mode without gradients.
        dirpath: the sweep's directory, made if absent. Runs that it already holds are not repeated.
        n_jobs: runs at a time, as in ``joblib.Parallel``; default: one, or what ``parallel_config`` says.
        threads: of torch, in each run.
        recipe: settings that tell this sweep from others, as JSON: two sweeps whose ``recipe`` differs cannot share a
            directory. The code of ``build`` is not compared, only its name.
        progress: show a bar with the time left.

    Returns:
        ``[R, M, Q]``, in the type of the measurements.

    Raises:
        MisconfigurationException: joblib is missing, the directory belongs to another sweep (the message says what
            differs), one of its files is damaged, or a run measured another shape.
        ValueError: subsets or seeds of a wrong form.
    """
    masks = kept_masks(subsets)
    seeds = [int(seed) for seed in seeds]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"`seeds` must be different integers, at least one; got {seeds}.")
    settings = {"build": _name(build), "measure": _name(measure), "recipe": dict(recipe or {})}
    path = Path(dirpath).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MisconfigurationException(f"`{path}` cannot hold the sweep: {error}") from error
    with Claim(path):
        directory = RetrainingDirectory.open(path, masks, settings)
        runs = [(row, seed) for seed in seeds for row in range(len(masks))]
        missing = [run for run in runs if not directory.holds(*run)]
        runner = _Runner(build, measure, directory, threads, os.getpid())
        unsaved: dict[tuple[int, int], Tensor] = {}
        with tqdm(total=len(runs), initial=len(runs) - len(missing), unit="run", disable=not progress) as bar:
            for outcome in _spread(runner, masks, missing, n_jobs):
                bar.update()
                if outcome is not None:
                    if not unsaved:
                        rank_zero_warn(f"{outcome.problem} Its measurements are in the result and not on disk.")
                    unsaved[outcome.row, outcome.seed] = outcome.values
        return _gather(directory, unsaved, seeds, len(masks))


def random_subsets(count: int, examples: int, *, fraction: float = 0.5, seed: int = 0) -> Tensor:
    """Random subsets of equal size: bool ``[count, examples]``, each row true at ``round(fraction * examples)`` places.

    Raises:
        ValueError: a row would keep everything or nothing.

    Example:
        >>> subsets = random_subsets(100, 10, fraction=0.5)
        >>> subsets.shape, subsets.sum(1).unique()
        (torch.Size([100, 10]), tensor([5]))
    """
    size = round(fraction * examples)
    if not 0 < size < examples:
        raise ValueError(f"`fraction` {fraction} of {examples} examples keeps {size}; it must keep some and drop some.")
    ranks = torch.rand(count, examples, generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
    return ranks < size


class _Unsaved(NamedTuple):
    """A finished run that is not on disk."""

    row: int
    seed: int
    values: Tensor
    problem: str


@dataclass(frozen=True)
class _Runner:
    """Makes single runs; it travels to the workers with each of them."""

    build: Build
    measure: Measure
    directory: RetrainingDirectory
    threads: int
    owner: int  # the process that asked for them

    def run(self, kept: list[int], row: int, seed: int) -> _Unsaved | None:
        """Make one; gives back its measurements where the disk does not take them."""
        if multiprocessing.current_process().name.startswith("LokyProcess"):  # a worker on the owner's machine
            _end_with(self.owner)
        with _ONE_RUN_PER_PROCESS, _seeded(seed, self.threads), _quiet():
            module, data, trainer = self.build(kept, seed)
            trainer.fit(module, data)
            module.eval()
            with torch.no_grad():
                values = torch.as_tensor(self.measure(module)).detach().cpu()
        if values.ndim != 1:
            raise MisconfigurationException(
                f"`measure` gave a tensor of shape {tuple(values.shape)} for subset {row}; expected one value for each"
                " query, [queries]."
            )
        try:
            self.directory.save(row, seed, values)
        except (OSError, DirectoryError) as error:
            return _Unsaved(row, seed, values, str(error))
        return None


@cache
def _end_with(parent: int) -> None:
    """A worker whose parent was killed would wait minutes for further work, and finish its present run for nobody."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _spread(
    runner: _Runner, masks: Tensor, runs: Sequence[tuple[int, int]], n_jobs: int | None
) -> Iterator[_Unsaved | None]:
    """Do the runs; an item for each that is finished, as it is where the backend can tell."""
    try:
        from joblib import Parallel, delayed
    except ModuleNotFoundError:
        raise MisconfigurationException(
            "`retrain` spreads its runs by joblib, which is not installed. HINT: `pip install"
            " 'lightning_source[evaluation]'`."
        ) from None
    tasks = [delayed(runner.run)(masks[row].nonzero().flatten().tolist(), row, seed) for row, seed in runs]
    try:
        parallel = Parallel(n_jobs=n_jobs, return_as="generator_unordered")
    except ValueError:  # a backend that only gives everything at once: the bar jumps, files appear as ever
        parallel = Parallel(n_jobs=n_jobs)
    yield from parallel(tasks)


@contextmanager
def _seeded(seed: int, threads: int) -> Iterator[None]:
    """Everything random starts at ``seed``; what the process had is put back."""
    variables = {name: os.environ.get(name) for name in _SEED_VARIABLES}
    before = torch.get_num_threads()
    try:
        with isolate_rng():
            seed_everything(seed, workers=True, verbose=False)
            torch.set_num_threads(threads)
            yield
    finally:
        torch.set_num_threads(before)
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the Trainer's account of devices, once for each of hundreds of runs."""
    loggers = [logging.getLogger(name) for name in (NAMESPACE, FABRICS[NAMESPACE])]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _gather(
    directory: RetrainingDirectory, unsaved: Mapping[tuple[int, int], Tensor], seeds: Sequence[int], rows: int
) -> Tensor:
    runs = [
        [unsaved[row, seed] if (row, seed) in unsaved else directory.load(row, seed) for row in range(rows)]
        for seed in seeds
    ]
    lengths = {len(values) for row in runs for values in row}
    if len(lengths) > 1:
        raise MisconfigurationException(
            f"`measure` gave different numbers of queries in `{directory.path}`: {sorted(lengths)}."
        )
    measurements = torch.stack([torch.stack(row) for row in runs])
    if bad := int((~measurements.isfinite()).any(2).sum()):
        rank_zero_warn(
            f"{bad} of {len(seeds) * rows} runs in `{directory.path}` measured NaN or infinity: did they diverge?"
        )
    return measurements


def _name(function: Callable[..., object]) -> str:
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{kind.__module__}.{kind.__qualname__}"
