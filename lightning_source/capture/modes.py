"""The mode that passes call a network in: eval mode, or training mode without its noise where eval is another function.

A network may compute something else in eval mode: detections in place of losses, no auxiliary outputs, no margin. Its
gradients there are not those that it was trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lightning_source.capture.quiet import quiet_functions, quiet_training
from lightning_source.names import named_modules

Mode = Literal["eval", "train"]

# Losses that differ by less are the same: float32 sums in another order differ by about 1e-6.
TOLERANCE = 1e-3
# Training mode is noisy where further draws differ from the first; layers that are skipped at random are so rarely.
DRAWS = 4


@dataclass(frozen=True)
class PassMode:
    """How passes call a network.

    Attributes:
        kind: eval mode, or training mode without dropout and statistics of the batch.
        evaluating: names of the modules that training itself keeps in eval mode.
    """

    kind: Mode = "eval"
    evaluating: tuple[str, ...] = ()


EVAL = PassMode()


@dataclass(frozen=True)
class Seen:
    """What a step computed: the names of its losses, and their sum."""

    calls: tuple[str, ...]
    loss: float


@contextmanager
def in_mode(module: nn.Module, mode: PassMode) -> Iterator[None]:
    """Inside, every module in ``module`` has this mode; set one by one, since a user's ``train()`` may freeze parts."""
    modes = [(child, child.training) for child in module.modules()]
    own = named_modules(module)
    evaluating = {id(own[name]) for name in mode.evaluating if name in own}
    with ExitStack() as stack:
        try:
            for child, _ in modes:
                child.training = mode.kind == "train" and id(child) not in evaluating
            if mode.kind == "train":
                stack.enter_context(quiet_training(module))
            yield
        finally:
            stack.close()
            for child, training in modes:
                child.training = training


def choose_mode(module: nn.Module, evaluate: Callable[[], Seen], evaluating: tuple[str, ...] = ()) -> Mode:
    """``"eval"`` where the step computes the same there as in training without noise, ``"train"`` where it does not.

    Args:
        module: the module.
        evaluate: runs the step on a batch of training examples.
        evaluating: names of the modules that training itself keeps in eval mode.

    Raises:
        Exception: what the step raises, where it raises in training mode, too.
    """
    if any(isinstance(child, torch.jit.ScriptModule) for child in module.modules()):
        return "eval"  # no function of theirs can be kept quiet in training mode

    def seen(kind: Mode, seed: int = 0) -> Seen:
        devices = [parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"][:1]
        # Functions that drop units in eval mode, too, must not make a difference.
        with torch.random.fork_rng(devices), in_mode(module, PassMode(kind, evaluating)), quiet_functions():
            torch.manual_seed(seed)
            return evaluate()

    try:
        trained = seen("train")
    except Exception as error:
        with suppress(Exception):
            seen("eval")
            return "eval"
        raise error
    try:
        evaluated = seen("eval")
    except Exception:  # no loss, or an error of code that was written for training mode
        return "train"
    if trained.calls != evaluated.calls:
        return "train"
    if _alike(trained, evaluated):
        return "eval"
    noisy = not all(_alike(trained, seen("train", seed)) for seed in range(1, DRAWS))
    return "eval" if noisy else "train"


def _alike(first: Seen, second: Seen) -> bool:
    return abs(first.loss - second.loss) <= TOLERANCE * max(abs(first.loss), abs(second.loss))
