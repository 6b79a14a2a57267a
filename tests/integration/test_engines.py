"""Loss scalers, averaged weights, compiled and checkpointed modules, forms of optimizers: what is recorded of them."""

import lightning as L
import pytest
import torch
from checks import measured
from helpers import QUERY, Classifier, classes, fitted, mlp, quiet_trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_source import SourceCallback, SourceScorer
from lightning_source.recording.store import RunStore


def run(path, module, *callbacks, settings=None, **options):
    torch.manual_seed(3)
    source = SourceCallback(str(path), **({"segments": 2, "snapshots_per_segment": 2} | (settings or {})))
    trainer = quiet_trainer(path.parent, *callbacks, source, **options)
    torch.manual_seed(4)
    trainer.fit(module, DataLoader(classes(), 8, shuffle=True))
    return trainer


def seeded(**options):
    torch.manual_seed(2)
    return Classifier(mlp(), **options)


def steps(path):
    return load_file(path / "steps.safetensors")["steps"]


class Overflows(Classifier):
    """The loss is infinite at some batches, so that a loss scaler skips their steps."""

    def __init__(self, at, optimizer):
        torch.manual_seed(2)
        super().__init__(mlp(), optimizer=optimizer)
        self.at, self.batches = at, 0

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.training:
            self.batches += 1
            loss = loss * torch.inf if self.batches - 1 in self.at else loss
        return loss


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1),
    "SGD, fused": lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
}


@pytest.mark.check("engine", "16-mixed with a loss scaler, {name}", "skipped steps do not count")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_the_scaler_skips_counts_for_nothing(tmp_path, name):
    """A fused optimizer is called nevertheless; its hook must not be believed. The first step is skipped, too."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = run(tmp_path / "run", Overflows({0, 3}, OPTIMIZERS[name]), plugins=[precision])
    rate = 0.01 if "Adam" in name else 0.1
    effective = steps(tmp_path / "run")[:, 1]
    assert trainer.global_step == 6
    if "fused" in name:
        assert effective.tolist() == pytest.approx([0, rate, rate, 0, rate, rate])
    else:
        assert effective.tolist() == pytest.approx([rate] * 4)
    segments = RunStore.open(tmp_path / "run").manifest.segments
    assert sum(s.rates[0] for s in segments) == pytest.approx(4 * rate)
    assert sum(s.decays[0] for s in segments) == pytest.approx(4 * rate * 0.1)
    assert trainer.attribute(QUERY).values.isfinite().all()


VARIANTS = {
    "Adam, foreach": (torch.optim.Adam, {"foreach": True}, {"foreach": False}),
    "Adam, fused": (torch.optim.Adam, {"fused": True}, {"foreach": False}),
    "AdamW, tensor rate": (torch.optim.AdamW, {"lr": torch.tensor(0.01), "foreach": False}, {"foreach": False}),
    "AdamW, amsgrad fused": (torch.optim.AdamW, {"amsgrad": True, "fused": True}, {"amsgrad": True, "foreach": False}),
    "SGD, fused": (torch.optim.SGD, {"fused": True, "momentum": 0.5}, {"foreach": False, "momentum": 0.5}),
    "Adagrad, fused": (torch.optim.Adagrad, {"fused": True}, {"foreach": False}),
    "RMSprop, foreach": (torch.optim.RMSprop, {"foreach": True}, {"foreach": False}),
}


@pytest.mark.check("optimizer", "{name}", "scores equal to the plain form's")
@pytest.mark.parametrize("name", VARIANTS)
def test_the_forms_of_an_optimizer_give_the_same_scores(tmp_path, name):
    """To 1e-3: kernels round differently, and Adam's first steps divide by small numbers."""
    kind, form, plain = VARIANTS[name]
    values = [
        run(tmp_path / str(i), seeded(optimizer=lambda p, o=o: kind(p, **({"lr": 0.01} | o)))).attribute(QUERY).values
        for i, o in enumerate((form, plain))
    ]
    error = float((values[0] - values[1]).abs().max() / values[1].abs().max())
    measured(error)
    assert error < 1e-3


class Maximizes(Classifier):
    def training_step(self, batch, batch_idx):
        return -super().training_step(batch, batch_idx)


@pytest.mark.check("optimizer", "maximize, {name}", "scores equal to minimising the negative")
@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "Adagrad"])
def test_going_up_the_loss(tmp_path, name):
    """The log-likelihood is maximised; a query's loss is what the step returns, so it changes sign."""
    kind = getattr(torch.optim, name)
    down = seeded(optimizer=lambda p: kind(p, lr=0.05, weight_decay=0.1))
    up = Maximizes(mlp(), optimizer=lambda p: kind(p, lr=0.05, weight_decay=0.1, maximize=True))
    up.load_state_dict(down.state_dict())
    first, second = run(tmp_path / "a", down), run(tmp_path / "b", up)
    for one, other in zip(down.parameters(), up.parameters(), strict=True):
        assert torch.equal(one, other)
    for method in ("source", "influence", "tracin"):
        expected, found = (t.attribute(QUERY, method=method).values for t in (first, second))
        torch.testing.assert_close(found, -expected, rtol=1e-5, atol=1e-7 * float(expected.abs().max()))
    margins = [t.attribute(QUERY, measurement="margin").values for t in (first, second)]
    torch.testing.assert_close(margins[1], margins[0], rtol=1e-5, atol=1e-7 * float(margins[0].abs().max()))


def test_groups_that_pull_in_two_directions_are_refused(tmp_path):
    def both(parameters):
        first, *rest = parameters
        return torch.optim.SGD([{"params": [first], "maximize": True}, {"params": rest}], lr=0.1)

    with pytest.raises(MisconfigurationException, match="some parameter groups maximise"):
        fitted(tmp_path, Classifier(mlp(), optimizer=both))


@pytest.mark.check("engine", "averaged weights", "snapshots of the trained, queries of the averaged weights")
@pytest.mark.parametrize("order", ["before", "after"])
def test_averaged_weights(tmp_path, order):
    average = EMAWeightAveraging(decay=0.5)
    trained = []

    class Peek(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            trained.append({name: p.detach().clone() for name, p in module.named_parameters()})

    source = SourceCallback(str(tmp_path / "run"), snapshots_per_segment=1)
    callbacks = [average, source] if order == "before" else [source, average]
    module = seeded()
    trainer = quiet_trainer(tmp_path, *callbacks, Peek())
    trainer.fit(module, DataLoader(classes(), 8))
    ended = {name: p.detach().clone() for name, p in module.named_parameters()}
    assert not torch.equal(ended["net.0.weight"], trained[-1]["net.0.weight"])
    with source.scorer(trainer) as scorer:
        scoring = scorer.run
        final, snapshot = scoring.final(), scoring.state(scoring.snapshots[0], "mean")
    initial = seeded().state_dict()
    for name, value in ended.items():
        assert torch.equal(final[name], value)
        mean = torch.stack([initial[name], *(t[name] for t in trained[:-1])]).mean(0)
        torch.testing.assert_close(snapshot[name], mean, rtol=1e-5, atol=1e-7)
    again = SourceScorer.from_run(tmp_path / "run", seeded()).score(QUERY, classes())
    assert torch.equal(again.values, trainer.attribute(QUERY).values)


def test_stochastic_weight_averaging_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"`StochasticWeightAveraging`.*EMAWeightAveraging"):
        run(tmp_path / "run", seeded(), StochasticWeightAveraging(swa_lrs=0.1))


class Layered(nn.Module):
    """Two layers, run again in the backward or not."""

    def __init__(self, how):
        super().__init__()
        self.net, self.how = mlp(), how

    def forward(self, x):
        return self.net(x) if self.how is None else checkpoint(self.net, x.requires_grad_(), use_reentrant=self.how)


class CompiledNet(Classifier):
    def __init__(self, net):
        super().__init__(torch.compile(net, backend="eager"))


FORMS = {
    "torch.compile of the module": lambda: torch.compile(seeded(), backend="eager"),
    "torch.compile of a submodule": lambda: CompiledNet(seeded().net),
    "activation checkpointing": lambda: Classifier(Layered(False)),
    "torch.compile of the step": lambda: step_compiled(seeded()),
}


def step_compiled(module):
    module.training_step = torch.compile(module.training_step, backend="eager")
    return module


@pytest.mark.check("engine", "{form}", "scores equal to the plain module's")
@pytest.mark.parametrize("form", FORMS)
def test_a_module_in_another_form_has_the_same_scores(tmp_path, form):
    expected = run(tmp_path / "plain", seeded(), settings={"overwrite": True})
    torch.manual_seed(2)
    found = run(tmp_path / "form", FORMS[form]())
    with found.callbacks[-1].scorer(found) as scorer:
        assert scorer.run.coverage.share == 1
    one, other = found.attribute(QUERY).values, expected.attribute(QUERY).values
    assert float((one - other).abs().max() / other.abs().max()) < 1e-5


@pytest.mark.check("engine", "reentrant checkpointing", "named, with its share of parameters")
def test_what_reentrant_checkpointing_hides_is_named(tmp_path):
    class Half(Classifier):
        def training_step(self, batch, batch_idx):
            hidden = checkpoint(self.net[:2], batch[0].requires_grad_(), use_reentrant=True)
            return self.loss(self.net[2](hidden), batch[1])

    torch.manual_seed(2)
    trainer = run(tmp_path / "run", Half(mlp()))
    with trainer.callbacks[-1].scorer(trainer) as scorer:
        coverage = scorer.run.coverage
    assert "net.0.weight, net.0.bias (its output carries no gradient (reentrant" in coverage.summary()
    assert coverage.share == pytest.approx(18 / 53)


@pytest.mark.check("engine", "{precision}", "scores equal to 32-bit training's")
@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-3), ("bf16-mixed", 0.1), ("bf16-true", 0.3)])
def test_precisions(tmp_path, precision, tolerance):
    """Tolerances: float32 rounding along a training; 8 bits of a bfloat16 step; the same for weights."""
    expected = run(tmp_path / "32", seeded()).attribute(QUERY).values
    found = run(tmp_path / "other", seeded(), precision=precision).attribute(
        [QUERY[0].double() if precision == "64-true" else QUERY[0], QUERY[1]]
    )
    error = float((found.values - expected).abs().max() / expected.abs().max())
    measured(error)
    assert error < tolerance


@pytest.mark.check("stage", "learning rate finder", "leaves the recording alone")
def test_the_learning_rate_finder_leaves_the_recording_alone(tmp_path):
    class Tuned(Classifier):
        def __init__(self):
            torch.manual_seed(2)
            super().__init__(mlp())
            self.lr = 0.1
            self.optimizer = lambda p: torch.optim.SGD(p, self.lr)

    finder = LearningRateFinder(min_lr=1e-4, max_lr=1e-1, num_training_steps=5, update_attr=False)
    trainer = run(tmp_path / "run", Tuned(), finder, enable_checkpointing=True)
    assert trainer.global_step == 6
    manifest = RunStore.open(tmp_path / "run").manifest
    assert [stage.name for stage in manifest.stages] == ["fit"]
    assert manifest.steps == 6
    assert steps(tmp_path / "run")[:, 0].tolist() == pytest.approx([0.1] * 6)
    run(tmp_path / "plain", Tuned())
    assert RunStore.open(tmp_path / "plain").manifest.snapshots == manifest.snapshots


def test_the_finder_and_a_second_fit_of_the_same_trainer(tmp_path):
    finder = LearningRateFinder(min_lr=1e-4, max_lr=1e-1, num_training_steps=3, update_attr=False)
    source = SourceCallback(str(tmp_path / "run"))
    trainer = quiet_trainer(tmp_path, finder, source, enable_checkpointing=True)

    class Tuned(Classifier):
        def __init__(self):
            super().__init__(mlp())
            self.lr = 0.1

    module = Tuned()
    for epochs in (2, 4):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module, DataLoader(classes(), 8))
    stages = RunStore.open(tmp_path / "run").manifest.stages
    assert [stage.name for stage in stages] == ["fit", "fit-1"]


def test_gradients_that_the_user_drops_count_for_nothing(tmp_path):
    class Drops(Classifier):
        def on_after_backward(self):
            if self.global_step == 1:
                self.zero_grad()

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            if self.global_step == 2:
                for p in self.parameters():
                    p.grad.zero_()

    torch.manual_seed(2)
    run(tmp_path / "run", Drops(mlp()))
    assert steps(tmp_path / "run")[:, 1].tolist() == pytest.approx([0.1, 0, 0, 0.1, 0.1, 0.1])


def test_a_scaled_fused_step_with_the_users_own_clipping(tmp_path):
    class Clips(Classifier):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            pass

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    module = Clips(mlp(), optimizer=lambda p: torch.optim.SGD(p, 0.1, fused=True))
    run(tmp_path / "run", module, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert steps(tmp_path / "run")[:, 1].tolist() == pytest.approx([0.1] * 6)


def test_a_buffer_that_is_put_in_place_of_another_is_recorded(tmp_path):
    class Centred(Classifier):
        def __init__(self):
            super().__init__(mlp())
            self.register_buffer("center", torch.zeros(3))

        def training_step(self, batch, batch_idx):
            logits = self.net(batch[0])
            self.center = 0.9 * self.center + 0.1 * logits.detach().mean(0)
            return self.loss(logits, batch[1])

    trainer = run(tmp_path / "run", Centred())
    with trainer.callbacks[-1].scorer(trainer) as scorer:
        final = scorer.run.final()
        assert torch.equal(final["center"], trainer.lightning_module.center)
        assert scorer.run.state(scorer.run.snapshots[-1], "mean")["center"].any()


def test_a_teacher_that_the_step_moves_is_recorded(tmp_path):
    class Taught(Classifier):
        def __init__(self):
            super().__init__(mlp())
            self.teacher = mlp().requires_grad_(False)
            self.still = nn.Linear(2, 2).requires_grad_(False)

        def training_step(self, batch, batch_idx):
            for mine, other in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                mine.data.lerp_(other.detach(), 0.2)
            return self.loss(self.net(batch[0]) + self.teacher(batch[0]), batch[1])

    trainer = run(tmp_path / "run", Taught())
    module = trainer.lightning_module
    with trainer.callbacks[-1].scorer(trainer) as scorer:
        final, first = scorer.run.final(), scorer.run.state(scorer.run.snapshots[0], "mean")
        names = set(load_file(tmp_path / "run" / "final.safetensors"))
    assert torch.equal(final["teacher.0.weight"], module.teacher[0].weight)
    assert not torch.equal(first["teacher.0.weight"], final["teacher.0.weight"])
    assert "teacher.0.weight" in names
    assert not any(name.startswith("still") for name in names)
