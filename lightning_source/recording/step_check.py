"""Whether an optimizer that derives from a known one steps as that one does, tried out on copies of the numbers."""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_source.recording.gradient_watch import is_sampled, sample_of

TOLERANCE = 0.01  # share of a step by which it may differ
ROUND_OFF = 1e-6  # of the parameters, which a step of that size disappears in


class StepCheck:
    """Compares steps of a derived optimizer with those of the class whose rule stands for it, and warns once.

    Known optimizers treat each entry by itself, so a sample of the entries is enough. Nothing of the user's is called,
    and only copies are written.

    Args:
        optimizer: the optimizer.
        parent: the known class.
    """

    def __init__(self, optimizer: Optimizer, parent: type[Optimizer]) -> None:
        self.optimizer = optimizer
        self.parent = parent
        self._steps = 0
        self._warned = False
        self._copies: list[tuple[nn.Parameter, nn.Parameter]] = []  # each parameter, and its sample
        self._before: list[Tensor] = []
        self._failure: Exception | None = None

    @torch.no_grad()
    def before_step(self) -> None:
        """Gradients are as the optimizer is given them: let the parent's step move copies."""
        self._copies = []
        if self._warned or not is_sampled(self._steps):
            return
        reference: Any = object.__new__(self.parent)
        groups = [self._copied(group) for group in self.optimizer.param_groups]
        state = defaultdict(dict, {copy: self._state(parameter) for parameter, copy in self._copies})
        vars(reference).update(defaults=dict(self.optimizer.defaults), state=state, param_groups=groups)
        self._before = [copy.detach().clone() for _, copy in self._copies]
        try:
            inspect.unwrap(self.parent.step)(reference)  # without the hooks that users put on all optimizers
        except Exception as error:
            self._failure = error

    def _copied(self, group: dict[str, Any]) -> dict[str, Any]:
        copies = []
        for parameter in group["params"]:
            if parameter.grad is not None and not parameter.grad.is_sparse:
                copy = nn.Parameter(sample_of(parameter))
                copy.grad = sample_of(parameter.grad)
                copies.append(copy)
                self._copies.append((parameter, copy))
        plain = {"foreach": False, "fused": False}
        return {**group, **{key: value for key, value in plain.items() if key in group}, "params": copies}

    def _state(self, parameter: nn.Parameter) -> dict[str, Any]:
        kept = {}
        for key, value in self.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                value = sample_of(value) if value.shape == parameter.shape else value.clone()
            kept[key] = value
        return kept

    @torch.no_grad()
    def after_step(self) -> None:
        """Compare what the parameters did with what the copies did."""
        step, self._steps = self._steps, self._steps + 1
        if not self._copies:
            return
        if self._failure is not None:
            return self._warn(f"how `{self.parent.__name__}` would step cannot be found out ({self._failure})")
        real, expected, size = [], [], 0.0
        for (parameter, copy), before in zip(self._copies, self._before, strict=True):
            real.append((sample_of(parameter) - before).double().cpu())
            expected.append((copy - before).double().cpu())
            size += float(before.double().square().sum())
        self._copies, self._before = [], []
        moved, wanted = torch.cat(real), torch.cat(expected)
        error = float((moved - wanted).norm())
        if error > TOLERANCE * float(wanted.norm()) + ROUND_OFF * size**0.5:
            length = float(moved.norm() / wanted.norm())
            cosine = float(moved @ wanted / (moved.norm() * wanted.norm()))
            self._warn(
                f"step {step} moved the parameters {length:.3g} times as far as `{self.parent.__name__}` would (cosine"
                f" {cosine:.3f})"
            )

    def _warn(self, finding: str) -> None:
        self._warned = True
        name = type(self.optimizer).__name__
        rank_zero_warn(
            f"`{name}` is taken for the `{self.parent.__name__}` that it derives from, but {finding}. Scores follow"
            f" `{self.parent.__name__}`'s rule and are off by as much. HINT: say how it steps, by"
            f" `lightning_source.optimizers.register_optimizer({name})`."
        )
