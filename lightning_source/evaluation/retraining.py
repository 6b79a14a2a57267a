"""Ground truth by retraining: subsets by seeds, in parallel, each finished run on disk at once.

A sweep's directory holds ``sweep.json``, which says what was asked for, and one safetensors file a finished run. Files
are written under a temporary name, flushed and moved into place: a sweep killed at any moment goes on where it was.
"""

import hashlib
import json
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from lightning_source.evaluation._inputs import kept_masks

Build = Callable[[list[int], int], tuple[pl.LightningModule, Any, pl.Trainer]]
Measure = Callable[[pl.LightningModule], Tensor]

SCHEMA = 1
MANIFEST = "sweep.json"
_SEED_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
# The random generators, which decide initialisation and order, belong to the process: its threads take turns.
_ONE_RUN_PER_PROCESS = threading.Lock()


def retrain(
    build: Build,
    subsets: Any,
    seeds: Sequence[int],
    measure: Measure,
    dirpath: str | os.PathLike[str],
    *,
    n_jobs: int | None = None,
    threads: int = 1,
    recipe: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Tensor:
    """Train on every subset with every seed and measure the queries after each training.

    Runs are spread by joblib: over processes by default, elsewhere inside ``joblib.parallel_config(backend=...)``
    (``"dask"``, ``"ray"`` and ``"threading"`` too), where ``dirpath`` must be on a file system that the workers share.
    A run is determined by its subset and seed, whatever runs beside it: torch, NumPy and Python are seeded before
    ``build``, and ``threads`` fixes the order of sums. Threads of one process take turns, since they share generators.

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
            differs), one of its files is damaged, or a run ended early or measured another shape.
        ValueError: subsets or seeds of a wrong form.
    """
    masks = kept_masks(subsets)
    seeds = [int(seed) for seed in seeds]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"`seeds` must be different integers, at least one; got {seeds}.")
    path = Path(dirpath).absolute()
    sweep = _open_sweep(path, masks, {"build": _name(build), "measure": _name(measure)}, recipe or {})
    runs = [(row, seed) for seed in seeds for row in range(len(masks))]
    missing = [run for run in runs if not _file(path, *run).exists()]
    with tqdm(total=len(runs), initial=len(runs) - len(missing), unit="run", disable=not progress) as bar:
        for _ in _spread(build, measure, masks, missing, path, sweep, n_jobs, threads):
            bar.update()
    return _gather(path, sweep, seeds, len(masks))


def random_subsets(count: int, examples: int, *, fraction: float = 0.5, seed: int = 0) -> Tensor:
    """Random subsets of equal size: bool ``[count, examples]``, each row true at ``round(fraction * examples)`` places.

    Raises:
        ValueError: a row would keep everything or nothing.
    """
    size = round(fraction * examples)
    if not 0 < size < examples:
        raise ValueError(f"`fraction` {fraction} of {examples} examples keeps {size}; it must keep some and drop some.")
    ranks = torch.rand(count, examples, generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
    return ranks < size


def _spread(
    build: Build,
    measure: Measure,
    masks: Tensor,
    runs: Sequence[tuple[int, int]],
    path: Path,
    sweep: str,
    n_jobs: int | None,
    threads: int,
) -> Iterator[None]:
    """Do the runs; an item for each that is finished, as it is where the backend can tell."""
    try:
        from joblib import Parallel, delayed
    except ModuleNotFoundError:
        raise MisconfigurationException(
            "`retrain` spreads its runs by joblib, which is not installed. HINT: `pip install"
            " 'lightning_source[evaluation]'`."
        ) from None
    tasks = [
        delayed(_run)(build, measure, masks[row].nonzero().flatten().tolist(), row, seed, path, sweep, threads)
        for row, seed in runs
    ]
    try:
        parallel = Parallel(n_jobs=n_jobs, return_as="generator_unordered")
    except ValueError:  # a backend that only gives everything at once: the bar jumps, files appear as ever
        parallel = Parallel(n_jobs=n_jobs)
    yield from parallel(tasks)


def _run(
    build: Build, measure: Measure, kept: list[int], row: int, seed: int, path: Path, sweep: str, threads: int
) -> None:
    with _ONE_RUN_PER_PROCESS, _seeded(seed, threads), _quiet():
        module, data, trainer = build(kept, seed)
        trainer.fit(module, data)
        if not trainer.state.finished or trainer.interrupted:
            raise MisconfigurationException(f"the training of subset {row} with seed {seed} did not finish.")
        module.eval()
        with torch.no_grad():
            values = torch.as_tensor(measure(module)).detach().cpu()
    if values.ndim != 1:
        raise MisconfigurationException(
            f"`measure` gave a tensor of shape {tuple(values.shape)} for subset {row}; expected one value for each"
            " query, [queries]."
        )
    _save(_file(path, row, seed), values, sweep)


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
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _open_sweep(path: Path, masks: Tensor, names: Mapping[str, str], recipe: Mapping[str, Any]) -> str:
    """The id of the sweep in the directory, a new one if it is empty."""
    asked = {
        "schema": SCHEMA,
        "subsets": f"{tuple(masks.shape)}, sha256 {hashlib.sha256(masks.numpy().tobytes()).hexdigest()}",
        **names,
        "recipe": json.loads(json.dumps(recipe)),  # as it comes back from the file
    }
    manifest = path / MANIFEST
    if manifest.exists():
        found = json.loads(manifest.read_text())
        for key, value in asked.items():
            if found.get(key) != value:
                raise MisconfigurationException(
                    f"`{path}` holds another sweep: its {key} is {found.get(key)!r}, not {value!r}. HINT: give another"
                    " `dirpath`, or delete the directory."
                )
        return str(found["sweep"])
    if path.exists() and any(path.glob("*.safetensors")):
        raise MisconfigurationException(
            f"`{path}` holds safetensors files but no `{MANIFEST}`: not a sweep's directory."
        )
    path.mkdir(parents=True, exist_ok=True)
    sweep = uuid.uuid4().hex
    temporary = _temporary(manifest)
    temporary.write_text(json.dumps({"sweep": sweep} | asked, indent=1) + "\n")
    _into_place(temporary, manifest)
    return sweep


def _gather(path: Path, sweep: str, seeds: Sequence[int], rows: int) -> Tensor:
    runs = [[_load(_file(path, row, seed), sweep) for row in range(rows)] for seed in seeds]
    lengths = {len(values) for row in runs for values in row}
    if len(lengths) > 1:
        raise MisconfigurationException(f"`measure` gave different numbers of queries in `{path}`: {sorted(lengths)}.")
    measurements = torch.stack([torch.stack(row) for row in runs])
    if bad := int((~measurements.isfinite()).flatten(2).any(2).sum()):
        rank_zero_warn(f"{bad} of {len(seeds) * rows} runs in `{path}` measured NaN or infinity: did they diverge?")
    return measurements


def _file(path: Path, row: int, seed: int) -> Path:
    return path / f"subset={row:05d}-seed={seed}.safetensors"


def _save(target: Path, values: Tensor, sweep: str) -> None:
    temporary = _temporary(target)
    try:
        save_file({"measurements": values.contiguous()}, temporary, {"sweep": sweep})
        _into_place(temporary, target)
    except FileNotFoundError:
        raise MisconfigurationException(
            f"`{target.parent}` does not exist where a run finished. HINT: on a cluster `dirpath` must be on a file"
            " system that all workers share."
        ) from None


def _load(path: Path, sweep: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            owner, values = (file.metadata() or {}).get("sweep"), file.get_tensor("measurements")
    except Exception as error:  # safetensors has no one class for what can be wrong with a file
        raise MisconfigurationException(
            f"`{path}` is not a finished run: {error}. HINT: delete it to have the run repeated."
        ) from error
    if owner != sweep:
        raise MisconfigurationException(f"`{path}` belongs to another sweep. HINT: delete it to have the run repeated.")
    return values


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}")


def _into_place(temporary: Path, target: Path) -> None:
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)


def _name(function: Callable[..., Any]) -> str:
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{kind.__module__}.{kind.__qualname__}"
