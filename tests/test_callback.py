"""What the callback records, against what an independent observer of the same training saw."""

import itertools
import os
import pickle
import shutil
from contextlib import nullcontext
from datetime import timedelta

import lightning as L
import pytest
import torch
from helpers import QUERY, Classifier, classes, fitted, mlp, quiet_trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import DataLoader

from lightning_source import SourceCallback, SourceScorer
from lightning_source.recording.manifest import Flags
from lightning_source.recording.snapshots import assemble, snapshot_parameters
from lightning_source.recording.store import RunStore


def values(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


class Watched(Classifier):
    """Writes down, step by step, the parameters and the mean gradient; knows nothing of the callback."""

    def __init__(self, scheduler=None, **options):
        super().__init__(mlp(), **options)
        self.scheduler = scheduler
        self.record = Record()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.training:  # the callback's own passes are in eval mode
            if batch_idx % self.trainer.accumulate_grad_batches == 0:
                self.record.begin(values(self))
            self.record.add(torch.autograd.grad(loss, list(self.parameters()), retain_graph=True))
        self.log("loss", loss.detach())
        return loss

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}


class Record:
    def __init__(self):
        self.parameters = []  # at which each step's gradient was taken
        self.gradients = []  # of each micro-batch of each step

    def begin(self, parameters):
        self.parameters.append(parameters)
        self.gradients.append([])

    def add(self, gradients):
        self.gradients[-1].append([g.clone() for g in gradients])

    def mean(self, first, last):
        """Mean of the parameters over steps ``first <= step < last``."""
        rows = self.parameters[first:last]
        return {name: torch.stack([row[name].double() for row in rows]).mean(0).float() for name in rows[0]}


def run_of(tmp_path):
    """The run directory; opening it completes a run that was interrupted."""
    store = RunStore.open(tmp_path / "run")
    if store.manifest.status == "interrupted":
        settings = store.manifest.settings
        assemble(store, settings.segments, settings.snapshots_per_segment)
    return store


def step_log(tmp_path, groups=1):
    """Columns of the step log by name, each ``[steps, groups]`` or ``[steps]``."""
    table = run_of(tmp_path).read("steps.safetensors")["steps"]
    rates, effective, decays, (weight, clip) = *table[:, :-2].split(groups, 1), table[:, -2:].unbind(1)
    return {"lr": rates, "effective": effective, "decay": decays, "weight": weight, "clip": clip}


def stretches(tmp_path, what="segments"):
    return getattr(run_of(tmp_path).manifest, what)


# ---------------------------------------------------------------- the step log


def sgd(**options):
    return lambda parameters: SGD(parameters, **({"lr": 0.1} | options))


def two_groups(parameters):
    first, *others = parameters
    return SGD([{"params": [first], "lr": 0.2, "weight_decay": 0.01}, {"params": others, "momentum": 0.5}], lr=0.1)


def step_lr(optimizer):
    return StepLR(optimizer, 2, 0.5)


def one_cycle(optimizer):
    return OneCycleLR(optimizer, max_lr=[0.3] * len(optimizer.param_groups), total_steps=11)


# name: (optimizer, scheduler, effective rate over the learning rate for each group's options)
RULES = {
    "constant": (sgd(), None),
    "step": (sgd(), step_lr),
    "one cycle": (sgd(momentum=0.9), one_cycle),  # cycles the momentum too
    "momentum": (sgd(momentum=0.9), None),
    "nesterov": (sgd(momentum=0.8, nesterov=True), step_lr),
    "dampening": (sgd(momentum=0.9, dampening=0.5), None),
    "decay": (sgd(weight_decay=0.1, momentum=0.5), step_lr),
    "two groups": (two_groups, one_cycle),
    "two groups, constant": (two_groups, None),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_step_log_says_what_the_optimizer_did(tmp_path, rule):
    optimizer, scheduler = RULES[rule]
    # The same optimizer and schedule on their own, stepped as often.
    other = optimizer(list(mlp().parameters()))
    schedule = scheduler(other) if scheduler else None
    expected = []
    for _ in range(9):
        expected.append([(g["lr"], g["momentum"], g["dampening"], g["weight_decay"]) for g in other.param_groups])
        other.step()
        if schedule:
            schedule.step()
    lr, momentum, dampening, decay = torch.tensor(expected, dtype=torch.float64).unbind(2)

    fitted(tmp_path, Watched(scheduler, optimizer=optimizer), max_epochs=3, segments=2)
    log = step_log(tmp_path, lr.shape[1])
    torch.testing.assert_close(log["lr"], lr)
    damping = torch.where(momentum > 0, 1 - dampening, 1.0)
    torch.testing.assert_close(log["effective"], lr * damping / (1 - momentum))
    torch.testing.assert_close(log["decay"], decay)
    assert log["weight"].tolist() == [1.0] * 9
    assert log["clip"].tolist() == [1.0] * 9
    for segment in stretches(tmp_path):
        rows = slice(segment.first, segment.last)
        torch.testing.assert_close(list(segment.rates), log["effective"][rows].sum(0).tolist())
        torch.testing.assert_close(list(segment.decays), (log["effective"] * log["decay"])[rows].sum(0).tolist())
    assert [s.steps for s in stretches(tmp_path)] in ([4, 5], [5, 4])


class OwnClipping(Watched):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        for p in self.parameters():
            p.grad.mul_(0.25)


class SkipsSteps(Watched):
    """Gives no loss for the second batch of an epoch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else loss


class SkipsEpochs(Watched):
    """Leaves each epoch at its third batch."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 2 else None


class Overflows(Watched):
    """The loss of one batch overflows, so that the gradient scaler skips its step."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            return Classifier.training_step(self, batch, batch_idx) * float("inf")
        return super().training_step(batch, batch_idx)


def decaying():
    return Watched(optimizer=sgd(weight_decay=0.3))


def scaled():
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))]}


# name: (module, Trainer options, batch size, steps)
UPDATES = {
    "plain": (Watched, dict, 8, 6),
    "decay": (decaying, dict, 8, 6),
    "accumulation": (decaying, lambda: {"accumulate_grad_batches": 2}, 5, 6),  # 5 batches: a short last window
    "clipping by norm": (decaying, lambda: {"gradient_clip_val": 0.1}, 8, 6),
    "clipping that never happens": (Watched, lambda: {"gradient_clip_val": 1e6}, 8, 6),
    "own clipping": (OwnClipping, dict, 8, 6),
    "accumulation and clipping": (Watched, lambda: {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2}, 5, 6),
    "a step without loss": (lambda: SkipsSteps(optimizer=sgd(weight_decay=0.3)), dict, 8, 6),
    "an epoch left early": (SkipsEpochs, dict, 8, 4),
    "a step that the scaler skips": (Overflows, scaled, 8, 4),
}


@pytest.mark.parametrize("update", UPDATES)
def test_every_update_is_rate_times_mean_gradient_plus_decay(tmp_path, update):
    """θ moves by ``rate · g + decay · θ``; one snapshot per step, ``g`` the mean over the step's micro-batches."""
    make, options, batch_size, count = UPDATES[update]
    module = make()
    fitted(tmp_path, module, batch_size=batch_size, snapshots_per_segment=50, **options())
    record, steps = module.record, stretches(tmp_path, "snapshots")
    assert [(s.first, s.last) for s in steps] == [(i, i + 1) for i in range(count)]
    for step, start, end, parts in zip(
        steps, record.parameters, [*record.parameters[1:], values(module)], record.gradients, strict=True
    ):
        for (name, value), *gradients in zip(start.items(), *parts, strict=True):
            change = step.rates[0] * torch.stack(gradients).mean(0) + step.decays[0] * value
            torch.testing.assert_close(value - end[name], change, rtol=1e-4, atol=1e-6)


def test_the_coefficient_of_clipping_is_logged(tmp_path):
    module = Watched()
    fitted(tmp_path, module, gradient_clip_val=0.5, max_epochs=4)
    norms = [sum(float(g.square().sum()) for g in parts[0]) ** 0.5 for parts in module.record.gradients]
    expected = torch.tensor([min(1.0, 0.5 / (norm + 1e-6)) for norm in norms], dtype=torch.float64)
    assert expected.min() < 1
    torch.testing.assert_close(step_log(tmp_path)["clip"], expected, rtol=1e-5, atol=0)


def test_short_last_windows_are_logged(tmp_path):
    fitted(tmp_path, batch_size=5, accumulate_grad_batches=3)  # windows of 3 and 2 micro-batches
    assert step_log(tmp_path)["weight"].tolist() == pytest.approx([1, 2 / 3, 1, 2 / 3])


# ---------------------------------------------------------------- snapshots


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 4},
        {"max_epochs": 7, "segments": 3, "snapshots_per_segment": 1},
        {"max_epochs": 6, "segments": [3, 4, 11]},
        {"max_epochs": 4, "accumulate_grad_batches": 2},
        {"max_epochs": 20, "max_steps": 60, "segments": 1, "snapshots_per_segment": 2},
        {"max_epochs": 4, "snapshots": "point"},
        {"max_epochs": 7, "segments": 3, "snapshots_per_segment": 1, "snapshots": "point"},
        {"max_epochs": -1, "max_time": timedelta(seconds=0.5), "snapshots": "point"},
    ],
    ids=str,
)
def test_snapshots_hold_the_mean_of_the_parameters_that_gradients_were_taken_at(tmp_path, options):
    module = Watched()
    fitted(tmp_path, module, **options)
    check_snapshots(tmp_path, module)


def check_snapshots(tmp_path, module):
    """Each snapshot's mean and point against the observer's record."""
    store, record = run_of(tmp_path), module.record
    snapshots = stretches(tmp_path, "snapshots")
    assert [s.first for s in snapshots] == [0, *(s.last for s in snapshots[:-1])]
    ends = [*record.parameters[1 : snapshots[-1].last], values(module)]
    for one in snapshots:
        mean = snapshot_parameters(store, one, "mean")
        exact = max(s.steps for s in snapshots) < 64  # of longer bins some steps stand for all
        torch.testing.assert_close(
            mean, record.mean(one.first, one.last), rtol=1e-6 if exact else 0.1, atol=1e-7 if exact else 0.02
        )
        if store.manifest.settings.snapshots == "point":
            point = snapshot_parameters(store, one, "point")
            assert any(same_parameters(point, ends[i]) for i in range(one.first, one.last))
        else:
            with pytest.raises(
                MisconfigurationException, match=r'keeps the means .* HINT: record with `snapshots="point"`'
            ):
                snapshot_parameters(store, one, "point")
    assert same_parameters(store.read("final.safetensors"), values(module))


def same_parameters(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Act(L.Callback):
    """Calls ``act(trainer)`` when that many batches are done."""

    def __init__(self, batches, act):
        self.batches = batches
        self.act = act

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches -= 1
        if self.batches == 0:
            self.act(trainer)


def stop(trainer):
    trainer.should_stop = True


def raising(error):
    def act(trainer):
        raise error

    return act


def test_bins_of_a_run_of_unknown_length_merge(tmp_path):
    module, sizes = Watched(), []

    class Peek(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            bins = stretches(tmp_path, "bins")
            on_disk = {f"bins/{path.name}" for path in (tmp_path / "run" / "bins").iterdir()}
            assert on_disk == {*(b.file for b in bins), f"bins/end={bins[-1].last:06d}.safetensors"}
            sizes.append(len(bins))

    source = SourceCallback(dirpath=str(tmp_path / "run"), segments=3, snapshots_per_segment=2)
    trainer = quiet_trainer(tmp_path, source, Peek(), Act(110, stop), max_epochs=-1)
    trainer.fit(module, DataLoader(classes(), 8, shuffle=True))
    assert max(sizes) == 12  # two bins per snapshot
    assert sum(b < a for a, b in itertools.pairwise(sizes)) == 4  # at 13, 26, 52 and 104 steps
    check_snapshots(tmp_path, module)
    segments = stretches(tmp_path)
    assert [s.first for s in segments] == [0, segments[0].last, segments[1].last]
    assert segments[-1].last == 110
    assert all(abs(s.steps - 110 / 3) <= 16 for s in segments)  # whole bins of 16
    assert trainer.attribute(QUERY, per_segment=True).by_segment.shape == (3, 4, 24)


# ---------------------------------------------------------------- how a run may end


def early_stopping():
    return EarlyStopping("loss", patience=1, min_delta=10.0, check_on_train_epoch_end=True)  # after two epochs


def ctrl_c():
    return Act(5, raising(KeyboardInterrupt()))


def failure():
    return Act(5, raising(ValueError("user")))


# name: (Trainer options, callbacks, what `fit` raises)
ENDS = {
    "max_steps": ({"max_steps": 7, "max_epochs": -1}, [], None),
    "max_time": ({"max_time": timedelta(seconds=1), "max_epochs": None}, [], None),
    "early stopping": ({"max_epochs": 6}, [early_stopping], None),
    "early stopping, long before the end": ({"max_epochs": 1000}, [early_stopping], None),
    "should_stop": ({"max_epochs": -1}, [lambda: Act(31, stop)], None),
    "ctrl-c": ({"max_epochs": 9}, [ctrl_c], SystemExit),
    "ctrl-c, long before the end": ({"max_epochs": 1000}, [ctrl_c], SystemExit),
    "exception": ({"max_epochs": 9}, [failure], ValueError),
}


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.parametrize("end", ENDS)
def test_however_a_run_ends_it_can_be_scored(tmp_path, end):
    options, callbacks, raised = ENDS[end]
    module = Watched()
    source = SourceCallback(dirpath=str(tmp_path / "run"), segments=3, snapshots_per_segment=1)
    trainer = quiet_trainer(tmp_path, source, *(make() for make in callbacks), **options)
    with pytest.raises(raised) if raised else nullcontext():
        trainer.fit(module, DataLoader(classes(), 8, shuffle=True))
    assert run_of(tmp_path).manifest.status == ("interrupted" if raised else "finished")
    check_snapshots(tmp_path, module)
    segments = stretches(tmp_path)
    assert segments[-1].last == len(module.record.parameters) == len(step_log(tmp_path)["weight"])
    here = trainer.attribute(QUERY).values
    there = SourceScorer.from_run(tmp_path / "run", Classifier(mlp())).score(QUERY, classes()).values
    assert here.abs().max() > 0
    assert torch.equal(here, there)
    assert len(segments) == 3


class BreaksOff(Watched):
    def training_step(self, batch, batch_idx):
        if self.global_step == 5:
            raise ValueError("user")
        return super().training_step(batch, batch_idx)


def test_a_step_that_broke_off_is_not_part_of_the_mean(tmp_path):
    module = BreaksOff()
    with pytest.raises(ValueError, match="user"):
        fitted(tmp_path, module, max_epochs=30, snapshots_per_segment=1)
    assert stretches(tmp_path)[-1].last == 5
    check_snapshots(tmp_path, module)


def check_opens(path):
    """The directory opens as the run up to some step: every file whole, segments without gaps, scores finite."""
    store = RunStore.open(path)
    for name in store.manifest.files:
        store.read(name)
    scorer = SourceScorer.from_run(path, Classifier(mlp()))
    found = [s.stretch for s in scorer.run.segments()]
    assert [s.first for s in found] == [0, *(s.last for s in found[:-1])]
    assert scorer.score(QUERY, classes(), train_ids=[0, 1]).values.isfinite().all()
    return found[-1].last


class Copies(L.Callback):
    """Copies the run directory after every batch, as a kill would leave it."""

    def __init__(self, run, target):
        self.run = run
        self.target = target

    def on_train_batch_end(self, trainer, *_):
        if (self.run / "manifest.json").exists():
            shutil.copytree(self.run, f"{self.target}-{trainer.global_step}")


def test_a_run_killed_between_batches_opens_as_the_run_so_far(tmp_path):
    run = tmp_path / "run"
    callbacks = Copies(run, tmp_path / "before"), SourceCallback(str(run), segments=2), Copies(run, tmp_path / "after")
    trainer = quiet_trainer(tmp_path, *callbacks, max_epochs=-1, max_steps=6)
    trainer.fit(Classifier(mlp()), DataLoader(classes(), 8, shuffle=True))
    assert [check_opens(tmp_path / f"before-{step}") for step in range(2, 7)] == [1, 2, 3, 4, 5]
    assert [check_opens(tmp_path / f"after-{step}") for step in range(1, 7)] == [1, 2, 3, 4, 5, 6]


def test_a_run_of_known_length_has_a_bin_for_each_snapshot_and_more_before_the_first(tmp_path):
    """So that a run that is stopped early can be cut as well; these merge once there are enough others."""
    found = []

    class Peek(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            found.append([b.last for b in stretches(tmp_path, "bins")] if (tmp_path / "run" / "bins").exists() else [])

    source = SourceCallback(dirpath=str(tmp_path / "run"), segments=1, snapshots_per_segment=4)
    trainer = quiet_trainer(tmp_path, source, Peek(), max_epochs=16)
    trainer.fit(Classifier(mlp()), DataLoader(classes(), 8))  # 48 steps
    assert found[3] == [1, 3]
    assert found[11] == [1, 3, 6, 12]
    assert found[23] == [1, 3, 6, 12, 24]
    assert found[35] == [12, 24, 36]
    assert [s.last for s in stretches(tmp_path, "snapshots")] == [12, 24, 36, 48]


def test_a_run_killed_while_it_writes_opens_as_the_run_so_far(tmp_path, monkeypatch):
    replace, copies = os.replace, []

    def killed_here(source, target):
        if (tmp_path / "run" / "manifest.json").exists():
            copies.append(shutil.copytree(tmp_path / "run", tmp_path / f"killed-{len(copies)}"))
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed_here)
    source = SourceCallback(str(tmp_path / "run"), segments=1, snapshots_per_segment=1)  # 2 bins, which merge twice
    trainer = quiet_trainer(tmp_path, source, Act(6, stop), max_epochs=-1)
    trainer.fit(Classifier(mlp()), DataLoader(classes(), 8, shuffle=True))
    monkeypatch.undo()
    steps = [check_opens(path) for path in copies]
    assert steps == sorted(steps)
    assert set(steps) == {1, 2, 3, 5, 6}  # bins of two steps from the third on


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("segments", "steps", "expected"),
    [
        ("auto", 12, [12]),
        (3, 12, [4, 8, 12]),
        ([4, 7], 12, [4, 7, 12]),
        ([7, 4], 12, [4, 7, 12]),
        ([1, 7, 75], 100, [1, 7, 75, 100]),
        ([4, 50], 12, [4, 12]),  # a boundary that training did not reach
        (3, 2, [1, 2]),
    ],
    ids=str,
)
def test_segments_begin_where_they_should(tmp_path, segments, steps, expected):
    options = {"mode": "deferred", "snapshots_per_segment": 1, "max_steps": steps, "max_epochs": -1}
    fitted(tmp_path, segments=segments, **options)
    assert [s.last for s in stretches(tmp_path)] == expected


@pytest.mark.parametrize(
    ("options", "tracked", "why"),
    [
        ({}, ["net.0", "net.2"], []),
        ({"include": ["net.2"]}, ["net.2"], ["not included"]),
        ({"include": ["*"], "exclude": ["*.2", "nothing"]}, ["net.0"], ["excluded"]),
    ],
    ids=str,
)
def test_include_and_exclude(tmp_path, options, tracked, why):
    trainer = fitted(tmp_path, **options)
    coverage = run_of(tmp_path).manifest.stages[0].coverage
    assert [block.module for block in coverage.blocks] == tracked
    assert {reason for _, _, reason in coverage.left_out} == set(why)
    sizes = {"net.0": 35, "net.2": 18}
    assert coverage.share == pytest.approx(sum(sizes[name] for name in tracked) / 53)
    assert trainer.attribute(QUERY).metadata["coverage"] == coverage.share


def test_curvatures_differ_in_what_they_keep(tmp_path):
    scores, files = {}, {}
    for curvature in ("ekfac", "kfac", "diagonal"):
        torch.manual_seed(3)
        trainer = fitted(tmp_path / curvature, curvature=curvature, max_epochs=30, snapshots_per_segment=1)
        scores[curvature] = trainer.attribute(QUERY).values
        files[curvature] = run_of(tmp_path / curvature).read("segments/0.safetensors")
    for block in ("net.0", "net.2"):
        assert f"activations/{block}" not in files["diagonal"]
        assert torch.equal(files["kfac"][f"activations/{block}"], files["ekfac"][f"activations/{block}"])
        ranks = {name: torch.linalg.matrix_rank(file[f"values/{block}"][0], rtol=1e-3) for name, file in files.items()}
        assert ranks["kfac"] == 1 < ranks["ekfac"]  # Kronecker eigenvalues are products
    for a, b in itertools.combinations(scores.values(), 2):
        assert a.isfinite().all()
        assert not torch.allclose(a, b)


def test_a_deferred_run_computes_its_factors_when_asked(tmp_path):
    trainer = fitted(tmp_path, mode="deferred")
    assert not list((tmp_path / "run").glob("segments/*"))
    trainer.attribute(QUERY)
    assert list((tmp_path / "run").glob("segments/*"))


@pytest.mark.parametrize(("limit", "expected"), [(5000, 24), (None, 24), (7, 7)])
def test_factor_examples_limits_the_factor_passes(tmp_path, limit, expected):
    fitted(tmp_path, snapshots_per_segment=1, factor_examples=limit, keep="covariances")
    tensors = run_of(tmp_path).read("snapshots/step=000006-mean-covariances.safetensors")
    assert {int(value) for key, value in tensors.items() if key.startswith("examples/")} == {expected}


def test_the_coverage_is_said_once(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("lightning_source.recording.session.rank_zero_info", lines.append)
    fitted(tmp_path, exclude=["net.2"])
    assert len(lines) == 2
    assert "1 blocks, 66.04% of 53" in lines[0]
    assert "33.96%: net.2.weight, net.2.bias (excluded)" in lines[0]


# ---------------------------------------------------------------- checkpoints


def test_a_finished_run_opens_without_computing_its_factors_again(tmp_path):
    fitted(tmp_path, segments=2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    SourceScorer.from_run(tmp_path / "run", Classifier(mlp())).score(QUERY, classes())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def primitive(value):
    if isinstance(value, dict):
        return all(map(primitive, [*value, *value.values()]))
    return isinstance(value, (int, float, str, bool, type(None)))


def test_the_state_in_a_checkpoint_is_small_and_plain(tmp_path):
    assert SourceCallback().state_dict() == {}
    state = fitted(tmp_path, segments=3).callbacks[0].state_dict()
    assert state["steps"] == 6
    assert state["run_id"] == run_of(tmp_path).manifest.run_id
    assert primitive(state)
    assert len(pickle.dumps(state)) < 4096
    SourceCallback().load_state_dict(state)


def test_a_resumed_run_records_what_follows(tmp_path):
    fitted(tmp_path).save_checkpoint(tmp_path / "old.ckpt")
    source = SourceCallback(dirpath=str(tmp_path / "new" / "run"))
    trainer = quiet_trainer(tmp_path, source, max_epochs=4)
    with pytest.warns(UserWarning, match="resumes at step 6"):
        trainer.fit(Classifier(mlp()), DataLoader(classes(), 8, shuffle=True), ckpt_path=tmp_path / "old.ckpt")
    assert run_of(tmp_path / "new").manifest.flags == Flags(history_incomplete=True)
    assert stretches(tmp_path / "new")[-1].last == 6
    assert trainer.attribute(QUERY).values.abs().max() > 0


class WithTest(Classifier):
    def test_step(self, batch, batch_idx):
        return self.training_step(batch, batch_idx)


def test_testing_an_older_checkpoint_leaves_the_run_alone(tmp_path):
    module, early = WithTest(mlp()), tmp_path / "early.ckpt"
    source = SourceCallback(dirpath=str(tmp_path / "run"))
    trainer = quiet_trainer(tmp_path, source, Act(3, lambda trainer: trainer.save_checkpoint(early)))
    trainer.fit(module, DataLoader(classes(), 8))
    before = trainer.attribute(QUERY).values
    trainer.test(module, DataLoader(classes(), 8), ckpt_path=early, verbose=False)
    assert source.state_dict()["steps"] == 6
    assert torch.equal(trainer.attribute(QUERY).values, before)
