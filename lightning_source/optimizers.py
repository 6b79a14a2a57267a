"""From a live optimizer to the numbers SOURCE needs: each group's effective learning rate and weight decay (method §3).

A rule reads one parameter group's hyperparameters after a step. :func:`register_optimizer` adds a rule for a class; an
optimizer without one is refused, never taken for SGD.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

Settings = Mapping[str, Any]  # a parameter group, or a parameter's entry in ``optimizer.state``


@dataclass(frozen=True)
class StepRule:
    """How one parameter group moves on one step.

    ``θ ← θ - rate_multiplier · lr · P (gradient + weight_decay · θ)``, the decay outside ``P`` if it is decoupled.
    """

    rate_multiplier: float  # effective learning rate over ``lr``
    weight_decay: float = 0.0
    # P > 0, a diagonal, from a parameter's entry in ``optimizer.state``, shaped like the parameter. None: the identity.
    preconditioner: Callable[[Settings], Tensor] | None = None
    decoupled: bool = False  # the decay is not preconditioned (AdamW)
    maximize: bool = False  # steps go up the loss


Rule = Callable[[Settings], StepRule]
_RULES: dict[type[Optimizer], Rule] = {}


def register_optimizer(*kinds: type[Optimizer]) -> Callable[[Rule], Rule]:
    """Decorator: the function reads the parameter groups of these optimizer classes.

    Example:
        >>> class DecayingSGD(torch.optim.SGD): ...
        >>> @register_optimizer(DecayingSGD)
        ... def decaying_sgd(group):
        ...     return StepRule(rate_multiplier=1 / (1 - group["momentum"]), weight_decay=group["weight_decay"])
        >>> optimizer = DecayingSGD([torch.zeros(1)], lr=0.1, momentum=0.75, weight_decay=0.01)
        >>> rule_for(optimizer)(optimizer.param_groups[0]).rate_multiplier
        4.0
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
        f" scores. Known optimizers: {known}. HINT: train with one of them, or say how it steps, for one that takes"
        f" plain gradient steps:\n\n"
        "    from lightning_source.optimizers import StepRule, register_optimizer\n\n"
        f"    @register_optimizer({name})\n"
        f"    def {name.lower()}(group):\n"
        '        return StepRule(rate_multiplier=1.0, weight_decay=group["weight_decay"])\n'
    )


@torch.no_grad()
def preconditioners(optimizer: Optimizer, rule: Rule, names: Mapping[int, str]) -> dict[str, Tensor]:
    """The diagonal ``P`` of every parameter that has one, by the name that ``names`` gives its ``id``."""
    diagonals = {}
    for group in optimizer.param_groups:
        read = rule(group).preconditioner
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            # Without a step yet (the loss scaler skipped it) there is a state, and no moment in it.
            if read is None or not state or not float(state.get("step", 1)) or id(parameter) not in names:
                continue
            diagonals[names[id(parameter)]] = read(state)
    return diagonals


@register_optimizer(torch.optim.SGD)
def _sgd(group: Settings) -> StepRule:
    """Heavy-ball and Nesterov momentum ``β``: terminal velocity ``η / (1 - β)``, dampening ``d``: times ``1 - d``."""
    momentum = float(group["momentum"])
    if momentum >= 1:
        raise MisconfigurationException(f"SGD with momentum {momentum} has no finite effective learning rate.")
    multiplier = (1 - float(group["dampening"])) / (1 - momentum) if momentum else 1.0
    return StepRule(multiplier, float(group["weight_decay"]), maximize=group["maximize"])


@register_optimizer(torch.optim.Adam, torch.optim.AdamW)
def _adam(group: Settings) -> StepRule:
    """``P = 1 / (√v̂ + ε)`` with the bias-corrected second moment; the first moment averages and keeps the rate."""
    beta, eps = float(group["betas"][1]), float(group["eps"])

    def preconditioner(state: Settings) -> Tensor:
        moment: Tensor = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        return 1 / ((moment / (1 - beta ** float(state["step"]))).sqrt() + eps)

    decoupled = bool(group.get("decoupled_weight_decay"))
    return StepRule(1.0, float(group["weight_decay"]), preconditioner, decoupled, group["maximize"])


@register_optimizer(torch.optim.Adagrad)
def _adagrad(group: Settings) -> StepRule:
    """``P = 1 / (√Σg² + ε)``, over ``1 + (t - 1) · lr_decay`` as the rate falls with the parameter's own steps."""
    eps, decay = float(group["eps"]), float(group["lr_decay"])

    def preconditioner(state: Settings) -> Tensor:
        squares: Tensor = state["sum"]
        return 1 / ((squares.sqrt() + eps) * (1 + (float(state["step"]) - 1) * decay))

    return StepRule(1.0, float(group["weight_decay"]), preconditioner, maximize=group["maximize"])


@register_optimizer(torch.optim.RMSprop)
def _rmsprop(group: Settings) -> StepRule:
    """``P = 1 / (√v + ε)``, centred or not; momentum ``β`` as in SGD, ``η / (1 - β)``."""
    eps = float(group["eps"])

    def preconditioner(state: Settings) -> Tensor:
        moment: Tensor = state["square_avg"]
        if group["centered"]:
            moment = moment - state["grad_avg"].square()
        return 1 / (moment.clamp_min(0).sqrt() + eps)

    multiplier = 1 / (1 - float(group["momentum"]))
    return StepRule(multiplier, float(group["weight_decay"]), preconditioner, maximize=group["maximize"])
