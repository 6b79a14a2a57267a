"""From a live optimizer to the numbers SOURCE needs: each group's effective learning rate and weight decay (method §3).

A rule reads one parameter group's hyperparameters after a step. :func:`register_optimizer` adds a rule for a class; an
optimizer without one is refused, never taken for SGD.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer


@dataclass(frozen=True)
class StepRule:
    """How one parameter group moves on one step, ``θ ← θ - rate_multiplier · lr · (gradient + weight_decay · θ)``."""

    rate_multiplier: float  # effective learning rate over ``lr``
    weight_decay: float  # coupled L2 decay


Rule = Callable[[Mapping[str, Any]], StepRule]
_RULES: dict[type[Optimizer], Rule] = {}


def register_optimizer(*kinds: type[Optimizer]) -> Callable[[Rule], Rule]:
    """Decorator: the function reads the parameter groups of these optimizer classes.

    Example::

        @register_optimizer(MySGD)
        def my_sgd(group):
            return StepRule(rate_multiplier=1.0, weight_decay=group["decay"])
    """

    def enter(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(kinds, rule))
        return rule

    return enter


def rule_for(optimizer: Optimizer) -> Rule:
    """The rule of an optimizer's exact class; a subclass may step differently, so it does not inherit one.

    Raises:
        MisconfigurationException: no rule is known; the message names the optimizer and how to add one.
    """
    if type(optimizer) in _RULES:
        return _RULES[type(optimizer)]
    known = ", ".join(sorted(kind.__name__ for kind in _RULES))
    name = type(optimizer).__name__
    raise MisconfigurationException(
        f"SourceCallback does not know how `{name}` turns gradients into steps, and taking it for SGD would give wrong"
        f" scores. Known optimizers: {known}. HINT: train with one of them, or, if `{name}` takes plain gradient steps,"
        " register a rule with `lightning_source.optimizers.register_optimizer`."
    )


@register_optimizer(torch.optim.SGD)
def _sgd(group: Mapping[str, Any]) -> StepRule:
    """Heavy-ball and Nesterov momentum ``β``: terminal velocity ``η / (1 - β)``, dampening ``d``: times ``1 - d``."""
    if group["maximize"]:
        raise MisconfigurationException(
            "SourceCallback does not attribute runs with `maximize=True`: minimise instead."
        )
    momentum = float(group["momentum"])
    if momentum >= 1:
        raise MisconfigurationException(f"SGD with momentum {momentum} has no finite effective learning rate.")
    multiplier = (1 - float(group["dampening"])) / (1 - momentum) if momentum else 1.0
    return StepRule(multiplier, float(group["weight_decay"]))
