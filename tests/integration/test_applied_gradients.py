"""What happens to gradients between the loss and the step, and optimizers that step in ways of their own."""

import contextlib
import copy
import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, classes, mlp, quiet_trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from lightning_source import SourceCallback, SourceScorer
from lightning_source.recording.store import RunStore

LR = 0.1
ALL = {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}
HEAD = {"net.2.weight", "net.2.bias"}


class Watched(Classifier):
    """Keeps the norm of each gradient after backward, and as it is when the closure ends."""

    def __init__(self, optimizer=None):
        torch.manual_seed(3)
        super().__init__(mlp(), optimizer=optimizer)
        self.before, self.after = [], []

    def norms(self):
        return {name: 0.0 if p.grad is None else float(p.grad.norm()) for name, p in self.named_parameters()}

    def backward(self, loss):
        loss.backward()
        self.before.append(self.norms())

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.after.append(self.norms())

    def expected(self):
        """Λ by parameter."""
        pairs = list(zip(self.before, self.after, strict=True))
        return {n: sum(LR * (after[n] / before[n] if before[n] else 1.0) for before, after in pairs) for n in ALL}


class ClipsInHook(Watched):
    def on_before_optimizer_step(self, optimizer):
        nn.utils.clip_grad_norm_(self.parameters(), 0.05)


class ClipsAfterBackward(Watched):
    def on_after_backward(self):
        nn.utils.clip_grad_norm_(self.parameters(), 0.05)


class ClipsInBackward(Watched):
    def backward(self, loss):
        super().backward(loss)
        nn.utils.clip_grad_norm_(self.parameters(), 0.05)


class ClipsInOptimizerStep(Watched):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        def closure():
            loss = optimizer_closure()
            nn.utils.clip_grad_norm_(self.parameters(), 0.05)
            self.after.append(self.norms())
            return loss

        optimizer.step(closure=closure)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        pass


class ClipsHead(Watched):
    def on_before_optimizer_step(self, optimizer):
        nn.utils.clip_grad_norm_(self.net[2].parameters(), 0.02)


class ClipsHeadLater(Watched):
    def on_before_optimizer_step(self, optimizer):
        if self.global_step >= 4:
            nn.utils.clip_grad_norm_(self.net[2].parameters(), 0.02)


class ClipsEachParameter(Watched):
    def on_before_optimizer_step(self, optimizer):
        for parameter in self.parameters():
            nn.utils.clip_grad_norm_(parameter, 0.03)


class Zeroes(Watched):
    def on_after_backward(self):
        self.net[0].weight.grad.zero_()


class Drops(Watched):
    def on_before_optimizer_step(self, optimizer):
        self.net[0].bias.grad = None


class Hooked(Watched):
    """Hooks on the parameters themselves: before gradients are added to ``.grad`` and after."""

    def __init__(self):
        super().__init__()
        self.net[0].weight.register_hook(lambda gradient: gradient * 0.3)

        def thrice(parameter):
            parameter.grad *= 3

        self.net[2].weight.register_post_accumulate_grad_hook(thrice)

    def expected(self):
        return {name: 9 * LR * {"net.0.weight": 0.3, "net.2.weight": 3.0}.get(name, 1.0) for name in ALL}


class OtherCallback(L.Callback):
    def on_after_backward(self, trainer, pl_module):
        nn.utils.clip_grad_norm_(pl_module.parameters(), 0.05)


def recorded(path, module, *callbacks, batches=8, **options):
    """A run, with its module and what the package warned of."""
    settings = {key: options.pop(key) for key in ("segments", "snapshots_per_segment") if key in options}
    trainer = quiet_trainer(path.parent, *callbacks, SourceCallback(str(path), **settings), max_epochs=3, **options)
    torch.manual_seed(4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(classes(), batches, shuffle=True))
    texts = [str(w.message) for w in said if "Gradients were turned" in str(w.message) or "taken for" in str(w.message)]
    return trainer, texts


def rates(path):
    """Λ over all segments by parameter, as recorded."""
    manifest = RunStore.open(path).manifest
    columns = manifest.stages[-1].phases[-1].columns
    totals = [sum(segment.rates[i] for segment in manifest.segments) for i in range(len(columns))]
    return {name: total for column, total in zip(columns, totals, strict=True) for name in column}


def products(module, rate_of):
    """``(1/N) Σ_p Λ_p ∇f_pᵀ g_p`` by one backward an example."""
    inputs, targets = classes().tensors
    module = Classifier(copy.deepcopy(module.net))  # copies of parameters have no hooks
    rows = []
    for x, y in zip(inputs, targets, strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(module.net(x[None]), y[None]), list(module.parameters()))
        rows.append(dict(zip(dict(module.named_parameters()), gradients, strict=True)))
    stacked = {name: torch.stack([row[name].flatten() for row in rows]) for name in rows[0]}
    return sum(rate_of[name] * values @ values.T for name, values in stacked.items()) / len(rows)


@pytest.mark.parametrize(
    "kind",
    [
        ClipsInHook,
        ClipsAfterBackward,
        ClipsInBackward,
        ClipsInOptimizerStep,
        ClipsHead,
        ClipsHeadLater,
        ClipsEachParameter,
        Zeroes,
        Drops,
        Hooked,
        Watched,
    ],
)
def test_each_parameter_has_the_rate_at_which_its_gradient_was_applied(tmp_path, kind):
    module = kind()
    trainer, said = recorded(tmp_path / "run", module)
    assert rates(tmp_path / "run") == pytest.approx(module.expected(), rel=1e-4)
    scores = trainer.attribute(list(classes().tensors), method="grad-dot").values
    torch.testing.assert_close(scores, products(module, module.expected()), rtol=1e-3, atol=1e-6)
    assert not said


def test_hooks_on_parameters_stay_as_they_were(tmp_path):
    """In number and order, in passes too, where what they do is not wanted; over windows of several batches."""
    module = Hooked()
    module.net[0].weight.register_hook(lambda gradient: None)
    hooks = list(module.net[0].weight._backward_hooks.items())
    trainer, _ = recorded(tmp_path / "run", module, accumulate_grad_batches=3)
    assert rates(tmp_path / "run")["net.0.weight"] == pytest.approx(3 * LR * 0.3, rel=1e-4)
    trainer.attribute([x[:2] for x in classes().tensors])
    assert list(module.net[0].weight._backward_hooks.items()) == hooks


def test_another_callback_may_clip_before_this_one_is_called(tmp_path):
    module = Watched()
    recorded(tmp_path / "run", module, OtherCallback())
    assert rates(tmp_path / "run") == pytest.approx(module.expected(), rel=1e-4)
    assert max(rates(tmp_path / "run").values()) < 0.5 * 9 * LR


def test_nesterov_writes_into_gradients_of_which_nothing_is_seen(tmp_path):
    module = ClipsInHook(lambda p: torch.optim.SGD(p, LR, momentum=0.5, nesterov=True, foreach=True))
    recorded(tmp_path / "run", module)
    assert rates(tmp_path / "run") == pytest.approx({n: 2 * rate for n, rate in module.expected().items()}, rel=1e-4)


def test_every_snapshot_of_a_run_of_several_segments_has_its_own_rates(tmp_path):
    module = ClipsHeadLater()
    recorded(tmp_path / "run", module, segments=3, snapshots_per_segment=1)
    manifest = RunStore.open(tmp_path / "run").manifest
    columns = manifest.stages[-1].phases[-1].columns
    body, head = ([i for i, column in enumerate(columns) if set(column) == names] for names in (ALL - HEAD, HEAD))
    assert [segment.rates[body[0]] for segment in manifest.segments] == pytest.approx([0.3] * 3)
    assert manifest.segments[0].rates[head[0]] == pytest.approx(0.3)
    assert manifest.segments[2].rates[head[0]] < 0.1
    log = RunStore.open(tmp_path / "run").read("steps.safetensors")["steps"]
    assert log[:, len(columns) + head[0]].tolist()[:4] == pytest.approx([LR] * 4)
    assert max(log[4:, len(columns) + head[0]].tolist()) < LR / 2


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_goes_on_with_the_rates_of_a_layer_that_is_clipped(tmp_path, interrupted):
    checkpoint = str(tmp_path / "middle.ckpt")

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 5 and interrupted:
                trainer.save_checkpoint(checkpoint)
                raise KeyboardInterrupt

    def fit(epochs, callback, ckpt_path=None):
        torch.manual_seed(4)
        module = ClipsHead()
        trainer = quiet_trainer(tmp_path, SourceCallback(str(tmp_path / "run")), callback, max_epochs=epochs)
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            trainer.fit(module, DataLoader(classes(), 8), ckpt_path=ckpt_path)
        return module, trainer

    first, trainer = fit(2, Saves())
    if not interrupted:
        trainer.save_checkpoint(checkpoint)
    second, trainer = fit(3, L.Callback(), checkpoint)
    total = {name: first.expected()[name] + second.expected()[name] for name in ALL}
    assert rates(tmp_path / "run") == pytest.approx(total, rel=1e-4)
    assert trainer.attribute([x[:2] for x in classes().tensors]).values.isfinite().all()


def test_scores_of_a_layer_zeroed_by_a_hook_are_those_of_the_frozen_one(tmp_path):
    class Frozen(Watched):
        def __init__(self):
            super().__init__()
            self.net[0].weight.requires_grad_(False)

    query = [x[:3] for x in classes(8, seed=2).tensors]
    zeroed, _ = recorded(tmp_path / "zeroed", Zeroes())
    frozen, _ = recorded(tmp_path / "frozen", Frozen())
    for method in ("source", "tracin"):
        expected = frozen.attribute(query, method=method).values
        torch.testing.assert_close(zeroed.attribute(query, method=method).values, expected, rtol=1e-4, atol=1e-7)


def test_a_loss_scale_is_taken_out_of_the_comparison(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    module = ClipsHead()
    recorded(tmp_path / "run", module, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    scale = [8.0 * 2 ** (step // 2) for step in range(9)]
    pairs = list(zip(module.before, module.after, scale, strict=True))
    expected = {n: sum(LR * after[n] * s / before[n] for before, after, s in pairs) for n in ALL}
    assert rates(tmp_path / "run") == pytest.approx(expected, rel=1e-2)  # half precision
    assert expected["net.0.weight"] == pytest.approx(9 * LR, rel=1e-2)


# ---------------------------------------------------------------- what turns the gradient


def test_a_turned_gradient_is_named_with_its_size(tmp_path):
    class ByValue(Watched):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            nn.utils.clip_grad_value_(self.net[2].parameters(), 0.01)

    _, said = recorded(tmp_path / "run", ByValue())
    assert len(said) == 1
    assert "at 9 of the 9 steps looked at, most that of `net.2." in said[0]


# ---------------------------------------------------------------- derived optimizers


class OtherDefaults(torch.optim.SGD):
    def __init__(self, parameters):
        super().__init__(parameters, lr=LR, momentum=0.5)


class CallsItsParent(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


class Centralised(torch.optim.SGD):
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(p.grad - p.grad.mean(), alpha=-group["lr"])
        return loss


class LooksAhead(torch.optim.SGD):
    def step(self, closure=None):
        loss = super().step(closure)
        self.count = getattr(self, "count", 0) + 1
        if self.count == 5:
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.mul_(0.5)
        return loss


@pytest.mark.parametrize(
    "make", [OtherDefaults, lambda p: CallsItsParent(p, lr=0.01, weight_decay=0.1)], ids=["defaults", "super"]
)
def test_an_optimizer_that_steps_as_the_known_one_that_it_derives_from_is_taken_for_it(tmp_path, make):
    torch.optim.AdamW([torch.zeros(1)])  # from its first instance on, the parent's own step calls hooks too
    _, said = recorded(tmp_path / "run", Classifier(mlp(), optimizer=make))
    assert not said
    assert RunStore.open(tmp_path / "run").manifest.steps == 9


@pytest.mark.parametrize(
    ("kind", "finding"), [(Centralised, "step 0 moved the parameters"), (LooksAhead, "step 4 moved the parameters")]
)
def test_an_optimizer_that_steps_otherwise_than_the_one_it_derives_from_is_named(tmp_path, kind, finding):
    _, said = recorded(tmp_path / "run", Classifier(mlp(), optimizer=lambda p: kind(p, lr=LR)))
    assert len(said) == 1
    assert f"`{kind.__name__}` is taken for the `SGD`" in said[0]
    assert finding in said[0]


class Decays(torch.optim.SGD):
    def step(self, closure=None):
        loss = super().step(closure)
        self.param_groups[0]["lr"] *= 0.9
        return loss


class WarmsUp(torch.optim.SGD):
    count = 0

    def step(self, closure=None):
        self.count += 1
        self.param_groups[0]["lr"] = LR * min(1.0, self.count / 6)
        return super().step(closure)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(Decays, [LR * 0.9**k for k in range(9)]), (WarmsUp, [LR * min(1, (k + 1) / 6) for k in range(9)])],
)
def test_an_optimizer_that_sets_its_own_rate_is_logged_at_the_rate_of_its_step(tmp_path, kind, expected):
    torch.optim.SGD([torch.zeros(1)])  # from its first instance on, the parent's own step calls hooks too
    _, said = recorded(tmp_path / "run", Classifier(mlp(), optimizer=lambda p: kind(p, lr=LR)))
    assert not said
    log = load_file(tmp_path / "run" / "steps.safetensors")["steps"]
    assert log[:, 0].tolist() == pytest.approx(expected)


def test_a_final_model_of_a_derived_optimizer_is_warned_of():
    module = Classifier(mlp())
    with pytest.warns(UserWarning, match="`Centralised` has a `step` of its own"):
        SourceScorer.from_model(module, classes(), optimizer=Centralised(module.parameters(), lr=LR), batch_size=8)


# ---------------------------------------------------------------- steps that are left out


class Skips(Classifier):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class SkipsAndAccumulates(Skips):
    set_to_none = True

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        if batch_idx % 2 == 0:
            optimizer.zero_grad(set_to_none=self.set_to_none)


class SkipsAndZeroes(SkipsAndAccumulates):
    set_to_none = False


@pytest.mark.parametrize(("kind", "weight"), [(Skips, 1.0), (SkipsAndAccumulates, 2.0), (SkipsAndZeroes, 2.0)])
def test_an_optimizer_step_that_skips_batches(tmp_path, kind, weight):
    recorded(tmp_path / "run", kind(mlp()), batches=6)
    log = RunStore.open(tmp_path / "run").read("steps.safetensors")["steps"]
    assert log[:, -2].tolist() == [weight] * 6
    assert log[:, 1].tolist() == pytest.approx([LR * weight] * 6)


# ---------------------------------------------------------------- entries that training gives no gradient


class Normalised(Classifier):
    """A bias that the normalisation after it takes out again, so that its gradient is round-off."""

    def __init__(self, bias):
        torch.manual_seed(5)
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        if not bias:
            net[0].bias = None
        else:
            nn.init.zeros_(net[0].bias)
        super().__init__(net, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))


@pytest.mark.parametrize("options", [{}, {"adaptive": "symmetric"}, {"method": "tracin"}, {"method": "astra-source"}])
def test_a_bias_before_normalisation_carries_nothing_under_adam(tmp_path, options):
    query = [x[:3] for x in classes(8, seed=2).tensors]
    scores = []
    for bias in (True, False):
        trainer, _ = recorded(tmp_path / str(bias), Normalised(bias), segments=2, snapshots_per_segment=2)
        scores.append(trainer.attribute(query, **options).values)
    assert scores[0].norm() < 1.5 * scores[1].norm()  # without the rule: 4 to 1e5 times
    assert torch.corrcoef(torch.stack([s.flatten() for s in scores]))[0, 1] > 0.9
