"""Lightning under whichever of its two names the process uses: ``lightning.pytorch`` or ``pytorch_lightning``.

The two are the same code under other names, and a Trainer of one asks whether a callback is an instance of *its* base
class. Everything of Lightning that this package needs is reached through this file, which imports the namespace that is
loaded already and leaves the other alone; :func:`classes` gives a class under every name that is loaded by now.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

C = TypeVar("C")
NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
FABRICS = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}


def _loaded() -> list[str]:
    return [name for name in NAMESPACES if name in sys.modules]


def _installed() -> str:
    for name in NAMESPACES:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            return name
    raise ModuleNotFoundError("lightning_source needs `lightning` (or `pytorch_lightning`), version 2.6.")


NAMESPACE = next(iter(_loaded()), None) or _installed()

if TYPE_CHECKING:
    from lightning.fabric.utilities.apply_func import convert_to_tensors as convert_to_tensors
    from lightning.pytorch import Callback as Callback
    from lightning.pytorch import LightningDataModule as LightningDataModule
    from lightning.pytorch import LightningModule as LightningModule
    from lightning.pytorch import Trainer as Trainer
    from lightning.pytorch import seed_everything as seed_everything
    from lightning.pytorch.cli import LightningArgumentParser as LightningArgumentParser
    from lightning.pytorch.cli import LightningCLI as LightningCLI
    from lightning.pytorch.core.hooks import DataHooks as DataHooks
    from lightning.pytorch.loggers.logger import DummyLogger as DummyLogger
    from lightning.pytorch.utilities.data import extract_batch_size as extract_batch_size
    from lightning.pytorch.utilities.exceptions import MisconfigurationException as MisconfigurationException
    from lightning.pytorch.utilities.rank_zero import rank_zero_info as rank_zero_info
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn as rank_zero_warn
    from lightning.pytorch.utilities.seed import isolate_rng as isolate_rng
else:

    def _of(path: str) -> Any:
        module, _, name = f"{NAMESPACE}.{path}".rpartition(".")
        return getattr(importlib.import_module(module), name)

    Callback, LightningModule, Trainer = (_of(name) for name in ("Callback", "LightningModule", "Trainer"))
    LightningDataModule = _of("LightningDataModule")
    seed_everything = _of("seed_everything")
    DataHooks = _of("core.hooks.DataHooks")
    DummyLogger = _of("loggers.logger.DummyLogger")
    extract_batch_size = _of("utilities.data.extract_batch_size")
    MisconfigurationException = _of("utilities.exceptions.MisconfigurationException")
    rank_zero_info = _of("utilities.rank_zero.rank_zero_info")
    rank_zero_warn = _of("utilities.rank_zero.rank_zero_warn")
    isolate_rng = _of("utilities.seed.isolate_rng")
    convert_to_tensors = importlib.import_module(f"{FABRICS[NAMESPACE]}.utilities.apply_func").convert_to_tensors

    def __getattr__(name: str) -> Any:
        if name in ("LightningCLI", "LightningArgumentParser"):  # only when asked for: they bring jsonargparse
            return _of(f"cli.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def classes(path: str) -> tuple[type, ...]:
    """A class under each name of Lightning that is loaded by now, for ``isinstance``.

    Args:
        path: behind the namespace, ``"strategies.DDPStrategy"``; behind ``"fabric."``, of Fabric.
    """
    module, _, name = path.rpartition(".")
    kinds = []
    for namespace in _loaded():
        root = namespace
        if module == "fabric" or module.startswith("fabric."):
            root, inner = FABRICS[namespace], module.removeprefix("fabric").removeprefix(".")
        else:
            inner = module
        kinds.append(getattr(importlib.import_module(f"{root}.{inner}" if inner else root), name))
    return tuple(dict.fromkeys(kinds))


def is_overridden(method: str, module: LightningModule) -> bool:
    """Whether a module has a method of its own in place of LightningModule's, under whichever name it was written."""
    return all(getattr(type(module), method) is not getattr(kind, method) for kind in classes("LightningModule"))


def is_lightning_module(module: object) -> TypeGuard[LightningModule]:
    """Whether it is a LightningModule, under whichever name it was written."""
    return isinstance(module, classes("LightningModule"))


def in_all_namespaces(kind: type[C]) -> type[C]:
    """The callback class itself, or a subclass of it that is a callback under every name that is loaded by now.

    A Trainer asks whether its callbacks are instances of its own namespace's class.
    """
    missing = tuple(base for base in classes("Callback") if not issubclass(kind, base))
    if not missing:
        return kind
    bases = (kind, *missing)
    if bases not in _JOINED:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        _JOINED[bases] = type(kind.__name__, bases, names)
    return cast("type[C]", _JOINED[bases])


_JOINED: dict[tuple[type, ...], type] = {}  # one class for the same bases, so that its instances are of one class


def training_state() -> Any:
    """The ``TrainerState`` of a fit that is running its training steps."""
    states = importlib.import_module(f"{NAMESPACE}.trainer.states")
    return states.TrainerState(states.TrainerStatus.RUNNING, states.TrainerFn.FITTING, states.RunningStage.TRAINING)


def version() -> str:
    """The version of Lightning that is used."""
    return str(importlib.import_module(NAMESPACE.partition(".")[0]).__version__)
