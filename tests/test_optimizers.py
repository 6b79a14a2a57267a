"""The rules against the updates that the optimizers really make."""

import pytest
import torch
from helpers import QUERY, Classifier, classes, close, fitted, mlp
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_source.optimizers import StepRule, register_optimizer, rule_for

# Without a first moment or momentum one step is exactly lr · P · (gradient + decay · θ).
MEMORYLESS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.3),
    "Adam": lambda p: torch.optim.Adam(p, 0.1, betas=(0.0, 0.9), weight_decay=0.3),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, 0.1, betas=(0.0, 0.9), amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.1, betas=(0.0, 0.9), weight_decay=0.3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1, weight_decay=0.3),
    "Adagrad, rate decay": lambda p: torch.optim.Adagrad(p, 0.1, lr_decay=0.5, weight_decay=0.3),
    "Adam, maximize": lambda p: torch.optim.Adam(p, 0.1, betas=(0.0, 0.9), maximize=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.1, weight_decay=0.3),
    "RMSprop, centred": lambda p: torch.optim.RMSprop(p, 0.1, centered=True),
}


@pytest.mark.check("optimizer", "{name}", "step as the rule says")
@pytest.mark.parametrize("name", MEMORYLESS)
def test_a_step_is_what_the_rule_says(name):
    """To 1e-5: float32, in another order of operations."""
    torch.manual_seed(1)
    parameter = torch.nn.Parameter(torch.randn(7))
    optimizer = MEMORYLESS[name]([parameter])
    for _ in range(4):
        before, gradient = parameter.detach().clone(), torch.randn(7)
        parameter.grad = gradient.clone()
        optimizer.step()
        rule = rule_for(optimizer)(optimizer.param_groups[0])
        gradient = -gradient if rule.maximize else gradient
        scale = rule.preconditioner(optimizer.state[parameter]) if rule.preconditioner else torch.ones(7)
        decay = rule.weight_decay * before
        moved = scale * gradient + decay if rule.decoupled else scale * (gradient + decay)
        rate = rule.rate_multiplier * optimizer.param_groups[0]["lr"]
        torch.testing.assert_close(before - parameter.detach(), rate * moved, rtol=1e-5, atol=1e-6)


@pytest.mark.check("optimizer", "{make}", "self-influence is the scores' diagonal")
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop])
def test_a_preconditioned_run_is_scored_with_its_own_scale(tmp_path, make):
    trainer = fitted(tmp_path, Classifier(mlp(), optimizer=lambda p: make(p, 0.01)), segments=2)
    with trainer.callbacks[0].scorer(trainer) as scorer:
        scale = scorer.run.preconditioner(scorer.run.segments()[0].snapshots)
        self_scores = scorer.self_influence()
    assert {name: value.shape for name, value in scale.items()} == {"net.0": (1, 5, 7), "net.2": (1, 3, 6)}
    assert all((value > 0).all() for value in scale.values())
    full = trainer.attribute(classes(), removal="few").values
    close(self_scores, full.diagonal())


def test_a_rule_of_the_users_own(tmp_path):
    class Plain(torch.optim.Optimizer):
        """Steps as SGD does, which no rule knows until it is given one."""

        def __init__(self, parameters, lr):
            super().__init__(parameters, {"lr": lr, "weight_decay": 0.0})

        @torch.no_grad()
        def step(self, closure=None):
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(parameter.grad, alpha=-group["lr"])
            return loss

    with pytest.raises(MisconfigurationException, match=r"(?s)`Plain`.*@register_optimizer\(Plain\)"):
        fitted(tmp_path / "a", Classifier(mlp(), optimizer=lambda p: Plain(p, 0.1)))
    register_optimizer(Plain)(lambda group: StepRule(1.0, group["weight_decay"]))
    torch.manual_seed(3)
    own = fitted(tmp_path / "b", Classifier(mlp(), optimizer=lambda p: Plain(p, 0.1))).attribute(QUERY).values
    torch.manual_seed(3)
    plain = (
        fitted(tmp_path / "c", Classifier(mlp(), optimizer=lambda p: torch.optim.SGD(p, 0.1))).attribute(QUERY).values
    )
    assert torch.equal(own, plain)
