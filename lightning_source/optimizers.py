"""From a live optimizer to the numbers SOURCE needs: each group's effective learning rate and weight decay (method §3).

A rule reads one parameter group's hyperparameters after a step. :func:`register_optimizer` adds a rule for a class; an
optimizer without one is refused, never taken for SGD.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_source._lightning import MisconfigurationException

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
    """The rule of :func:`known_class`."""
    return _RULES[known_class(optimizer)]


def has_own_step(optimizer: Optimizer) -> bool:
    """Whether an optimizer derives from the class whose rule stands for it and has another ``step``."""
    return inspect.unwrap(type(optimizer).step) is not inspect.unwrap(known_class(optimizer).step)


def known_class(optimizer: Optimizer) -> type[Optimizer]:
    """The optimizer's class, or the nearest that it derives from, for which a rule is known.

    A derived class may step differently: :class:`lightning_source.recording.step_check.StepCheck` looks at its steps.

    Raises:
        MisconfigurationException: no rule is known; the message names the optimizer and how to add one.
    """
    for kind in type(optimizer).__mro__:
        if kind in _RULES:
            return kind
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


# An entry counts as untrained where ``1/P``, less what that is without any gradient, is round-off beside the others.
#
# The gradient of a bias before batch normalisation, or of attention's key bias, is 0, and what is computed is the
# round-off of a sum that cancels. Adam then divides noise by noise: ``P`` nears ``1/ε``, and what the passes find there
# (they normalise by running statistics, under which such a bias does matter) is blown up by it.
#
# Round-off is small beside two things: the entry's own layer, since in a deep network
# whole layers may have honest gradients far below the others'; and the largest of the biases and their like, since with
# inputs in the millions a weight's gradient dwarfs its honest bias. Measured beside the smaller of these: biases before
# normalisation 2e-8 to 2e-4 (growing with batch and image), honest biases above 3e-3. Only sums over everything cancel
# so: an entry of a matrix may honestly be small, a rare word's say, so for these the bound is a thousand times lower.
ROUND_OFFS = {True: 1e4, False: 10.0}  # in units of the precision, for vectors and for others; and at most:
MOST = {True: 1e-3, False: 1e-6}


@torch.no_grad()
def preconditioners(optimizer: Optimizer, rule: Rule, names: Mapping[int, str]) -> dict[str, Tensor]:
    """The diagonal ``P`` of every parameter that has one, by the name that ``names`` gives its ``id``.

    It is 0 for entries whose training gradient has been nothing but round-off: they carry nothing.
    """
    diagonals = {}
    sizes: dict[str, Tensor] = {}  # √v̂ and its like
    for group in optimizer.param_groups:
        read = rule(group).preconditioner
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            # Without a step yet (the loss scaler skipped it) there is a state, and no moment in it.
            if read is None or not state or not float(state.get("step", 1)) or id(parameter) not in names:
                continue
            name = names[id(parameter)]
            diagonals[name] = read(state)
            untouched = {key: value if key == "step" else torch.zeros_like(value) for key, value in state.items()}
            sizes[name] = 1 / diagonals[name] - 1 / read(untouched)
    layers: dict[str, list[Tensor]] = {}
    for name, size in sizes.items():
        layers.setdefault(name.rpartition(".")[0], []).append(size)
    typical = {layer: _root_mean_square(members) for layer, members in layers.items()}
    vectors = [size for size in sizes.values() if size.dim() == 1]
    largest = max((_root_mean_square([size]) for size in vectors or sizes.values()), default=0.0)
    for name, size in sizes.items():
        vector = size.dim() == 1
        precision = min(ROUND_OFFS[vector] * torch.finfo(size.dtype).eps, MOST[vector])
        least = min(typical[name.rpartition(".")[0]], largest) * precision
        diagonals[name] = torch.where(size <= least, 0.0, diagonals[name])
    return diagonals


def _root_mean_square(values: Sequence[Tensor]) -> float:
    total = sum(float(v.double().square().sum()) for v in values)
    return float((total / max(1, sum(v.numel() for v in values))) ** 0.5)


@register_optimizer(torch.optim.SGD)
def _sgd(group: Settings) -> StepRule:
    """Heavy-ball and Nesterov momentum ``β``: terminal velocity ``η / (1 - β)``, dampening ``d``: times ``1 - d``."""
    momentum = float(group["momentum"])
    if momentum >= 1:
        raise MisconfigurationException(f"SGD with momentum {momentum} has no finite effective learning rate.")
    multiplier = (1 - float(group["dampening"])) / (1 - momentum) if momentum else 1.0
    return StepRule(multiplier, float(group["weight_decay"]), maximize=group["maximize"])


@register_optimizer(torch.optim.Adam)
def _adam(group: Settings) -> StepRule:
    """``P = 1 / (√v̂ + ε)`` with the bias-corrected second moment; the first moment averages and keeps the rate."""
    beta, eps = float(group["betas"][1]), float(group["eps"])

    def preconditioner(state: Settings) -> Tensor:
        moment: Tensor = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        return 1 / ((moment / (1 - beta ** float(state["step"]))).sqrt() + eps)

    decoupled = bool(group.get("decoupled_weight_decay"))
    return StepRule(1.0, float(group["weight_decay"]), preconditioner, decoupled, group["maximize"])


@register_optimizer(torch.optim.AdamW)
def _adamw(group: Settings) -> StepRule:
    """:func:`_adam`, whose decay is decoupled; before torch 2.7 its groups do not say so."""
    return replace(_adam(group), decoupled=True)


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
