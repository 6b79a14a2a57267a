"""Training is bit-identical with and without the callback, and scoring leaves everything as it was."""

import copy
import functools
import random
from collections import deque
from contextlib import nullcontext

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, classes, mlp, quiet_trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_source import SourceCallback
from lightning_source.capture import isolation as _guards


class Diary(Logger):
    """Keeps every value that it is given, in order."""

    name = version = "diary"

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params):
        pass


def same(a, b):
    """Bit-equality of nested containers."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Mean:
    """A user's own running mean: a plain Python object."""

    def __init__(self):
        self.total, self.count = 0.0, 0

    def update(self, value):
        self.total, self.count = self.total + float(value), self.count + 1


class Busy(Classifier):
    """Does something beside the loss in ``training_step``: ``act(module, batch, loss)`` may give another loss back."""

    further = ()  # indices of ACTS that every step does as well

    def __init__(self, begin=lambda module: None, act=lambda module, batch, loss: None, net=None, **options):
        super().__init__(net or mlp(), **options)
        self.act = act
        begin(self)
        for index in self.further:
            list(ACTS.values())[index][0](Part(self, index))

    def training_step(self, batch, batch_idx):
        return self.beside(batch, super().training_step(batch, batch_idx))

    def beside(self, batch, loss):
        for index in self.further:
            changed = list(ACTS.values())[index][1](Part(self, index), batch, loss)
            loss = loss if changed is None else changed
        changed = self.act(self, batch, loss)
        return loss if changed is None else changed

    def watched(self):
        """What ``act`` may have written that is in no state_dict."""
        return [self.contents(name) for name in sorted(vars(self)) if name.startswith("seen")]

    def contents(self, name):
        seen = getattr(self, name)
        if isinstance(seen, torch.Generator):
            return seen.get_state()
        if isinstance(seen, MeanMetric):
            return [seen.metric_state, seen.update_count]
        return vars(seen) if isinstance(seen, Mean) else seen


class Part:
    """A module to one of several acts: what they write lies in the module under names of their own."""

    def __init__(self, module, index):
        self.__dict__.update(module=module, index=index)

    def renamed(self, name):
        return f"{name}_{self.index}" if name in ("seen", "seen_net", "accuracy", "_steps") else name

    def __getattr__(self, name):
        return getattr(self.module, self.renamed(name))

    def __setattr__(self, name, value):
        setattr(self.module, self.renamed(name), value)

    def register_buffer(self, name, value):
        self.module.register_buffer(self.renamed(name), value)


def begin(seen):
    return lambda module: setattr(module, "seen", seen())


def buffer(module):
    module.register_buffer("seen", torch.zeros(3))


def averaged_copy(module):
    module.seen_net = copy.deepcopy(module.net).requires_grad_(False)


def follow(module, batch, loss):
    for mine, other in zip(module.seen_net.parameters(), module.net.parameters(), strict=True):
        mine.lerp_(other.detach(), 0.1)


def bincount(batch):
    return torch.bincount(batch[1], minlength=3).float()


def logs(module, batch, loss):
    module.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
    module.log_dict({"largest": loss.detach() * 2, "size": float(len(batch[1]))}, on_epoch=True)


def updates_metric(module, batch, loss):
    module.seen(loss)
    module.accuracy.update(module.net(batch[0]), batch[1])
    module.log("mean", module.seen, on_step=True, on_epoch=True)
    module.log("accuracy", module.accuracy, on_step=False, on_epoch=True)


def two_metrics(module):
    module.seen, module.accuracy = MeanMetric(), MulticlassAccuracy(3)


def own_noise(module, batch, loss):
    return loss * (1 + torch.rand((), generator=module.seen))


def global_noise(module, batch, loss):
    return loss * (1 + torch.rand(()) + random.random() + np.random.rand())


def logs_to_the_logger(module, batch, loss):
    module.logger.log_metrics({"own": float(loss.detach())}, module.global_step)


def counts(module, batch, loss):
    module.seen += len(batch[0])


def counts_privately(module, batch, loss):
    module._steps += 1
    return loss * (1 + 0.1 * module._steps)


def appends(module, batch, loss):
    (module.seen["train"] if isinstance(module.seen, dict) else module.seen).append(float(loss.detach()))


def updates(module, batch, loss):
    module.seen.update(loss)


def rebinds_tensor(module, batch, loss):
    module.seen = 0.9 * module.seen + 0.1 * loss.detach()


def changes_tensor(module, batch, loss):
    module.seen.mul_(0.9).add_(0.1 * loss.detach())


def rebinds_buffer(module, batch, loss):
    module.seen = module.seen + bincount(batch)


def changes_buffer(module, batch, loss):
    module.seen.add_(bincount(batch))


# What a training_step does beside the loss: (before training, in the step).
ACTS = {
    "nothing": (),
    "logs": (lambda module: None, logs),
    "logger called directly": (lambda module: None, logs_to_the_logger),
    "metric": (two_metrics, updates_metric),
    "global noise": (lambda module: None, global_noise),
    "own generator": (begin(lambda: torch.Generator().manual_seed(1)), own_noise),
    "output list": (begin(list), appends),
    "nested lists": (begin(lambda: {"train": []}), appends),
    "deque": (begin(lambda: deque(maxlen=3)), appends),
    "counter": (begin(int), counts),
    "private counter": (lambda module: setattr(module, "_steps", 0), counts_privately),
    "plain object": (begin(Mean), updates),
    "tensor, rebound": (begin(lambda: torch.zeros(())), rebinds_tensor),
    "tensor, in place": (begin(lambda: torch.zeros(())), changes_tensor),
    "buffer, rebound": (buffer, rebinds_buffer),
    "buffer, in place": (buffer, changes_buffer),
    "momentum encoder": (averaged_copy, follow),
}


class FrozenNorm(Busy):
    """Keeps its BatchNorm in eval mode while it trains."""

    def train(self, mode=True):
        super().train(mode)
        self.net[1].eval()
        return self


class Validated(Busy):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self.net(batch[0]), batch[1]) + torch.rand(()))


class Augmented(Dataset):
    """Random noise on every item, from the global generators."""

    def __len__(self):
        return len(classes())

    def __getitem__(self, index):
        inputs, target = classes()[index]
        return inputs + torch.randn(6) + random.random() + np.random.rand(), target


class OwnBatches:
    """A user's batch sampler: says no batch size, and draws when iterated."""

    def __iter__(self):
        return iter(torch.randperm(24).view(6, 4).tolist())

    def __len__(self):
        return 6


def normed():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def dropped():
    return nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 3))


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


class PerStep(Busy):
    def configure_optimizers(self):
        optimizer = momentum(self.parameters())
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def plain_loader():
    return DataLoader(classes(), 8, shuffle=True)


class Checkpointed(nn.Module):
    """Runs its layers again in the backward."""

    def __init__(self, reentrant):
        super().__init__()
        self.layers = dropped()
        self.reentrant = reentrant

    def forward(self, x):
        # Reentrant checkpointing passes gradients on only if an input needs them.
        return checkpoint(self.layers, x.requires_grad_(), use_reentrant=self.reentrant)


class ByHand(Busy):
    """One optimizer; two steps on every batch."""

    def __init__(self):
        super().__init__(net=dropped(), optimizer=momentum)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):
            loss = self.beside(batch, self.loss(self.net(batch[0]), batch[1]))
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            optimizer.step()


class Adversaries(Busy):
    """A generator and a discriminator, each with its optimizer and a scheduler."""

    def __init__(self):
        super().__init__(net=nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)))
        self.generator = nn.Linear(2, 6)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        real = batch[0]
        fake = self.generator(torch.randn(len(real), 2))
        self.toggle_optimizer(first)
        self.judge(fake, 1.0, first)
        self.untoggle_optimizer(first)
        with second.toggle_model():
            labels = torch.arange(2.0).flip(0).repeat_interleave(len(real))
            self.beside(batch, self.judge(torch.cat([real, fake.detach()]), labels, second))
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def judge(self, images, labels, optimizer):
        logits = self.net(images)[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, torch.as_tensor(labels).expand_as(logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    def configure_optimizers(self):
        optimizers = [momentum(self.generator.parameters()), torch.optim.Adam(self.net.parameters(), 0.01)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(one, 2) for one in optimizers]


class Thaws(Busy):
    """Trains its head alone for an epoch, then everything, then the head again with another optimizer."""

    def configure_optimizers(self):
        self.net[0].requires_grad_(False)
        return torch.optim.SGD(self.net[2].parameters(), lr=0.1)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.net[0].requires_grad_(True)
            self.trainer.optimizers[0].add_param_group({"params": self.net[0].parameters(), "lr": 0.01})
        if self.current_epoch == 2:
            self.net[0].requires_grad_(False)
            self.trainer.optimizers = [torch.optim.Adam(self.net[2].parameters(), lr=0.01)]


def overflows(module, batch, loss):
    return loss * torch.inf if module.training and module.trainer.global_step in (1, 4) else loss


def scaled():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))


def fused(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


class PartlyCompiled(Busy):
    def __init__(self):
        super().__init__(net=dropped())
        self.net = torch.compile(self.net, backend="eager")


# How it is trained: (module, Trainer options, loader).
SETTINGS = {
    "dropout": (lambda: Busy(net=dropped()), {}, plain_loader),
    "batch norm": (lambda: Busy(net=normed()), {}, plain_loader),
    "frozen batch norm": (lambda: FrozenNorm(net=normed()), {}, plain_loader),
    "momentum, scheduler per step": (PerStep, {}, plain_loader),
    # 5 batches: the last window of each epoch is short
    "accumulation": (Busy, {"accumulate_grad_batches": 2}, lambda: DataLoader(classes(), 5, shuffle=True)),
    "clipping by norm": (Busy, {"gradient_clip_val": 0.1}, plain_loader),
    "clipping by value": (Busy, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, plain_loader),
    "bf16-mixed": (lambda: Busy(net=dropped()), {"precision": "bf16-mixed"}, plain_loader),
    "validation": (Validated, {"num_sanity_val_steps": 2, "val_check_interval": 2}, plain_loader),
    "compiled": (lambda: torch.compile(Busy(net=dropped()), backend="eager"), {}, plain_loader),
    "compiled submodule": (PartlyCompiled, {}, plain_loader),
    "bf16-true": (lambda: Busy(net=dropped()), {"precision": "bf16-true"}, plain_loader),
    "64-true": (lambda: Busy(net=dropped()), {"precision": "64-true"}, plain_loader),
    "16-mixed, skipped steps": (lambda: Busy(act=overflows), lambda: {"plugins": [scaled()]}, plain_loader),
    "16-mixed, fused optimizer": (
        lambda: Busy(act=overflows, optimizer=fused),
        lambda: {"plugins": [scaled()]},
        plain_loader,
    ),
    "checkpointing": (lambda: Busy(net=Checkpointed(False)), {}, plain_loader),
    "averaged weights": (Validated, lambda: {"also": EMAWeightAveraging(decay=0.5)}, plain_loader),
    "manual optimization": (ByHand, {}, plain_loader),
    "two optimizers": (Adversaries, {}, plain_loader, {"optimizer": 1}),
    "layers thawed and frozen": (Thaws, {}, plain_loader),
    "augmented data": (Busy, {}, lambda: DataLoader(Augmented(), 8, shuffle=True)),
    "own batch sampler": (Busy, {}, lambda: DataLoader(classes(), batch_sampler=OwnBatches())),
}


def rng():
    return [torch.get_rng_state(), np.random.get_state(), random.getstate()]


def snapshot(trainer, module, diary):
    """Everything that a callback might have changed, copied."""
    optimizer = trainer.optimizers[0]
    metrics = {key: value.clone() for key, value in trainer.callback_metrics.items()}
    state = {name: value.clone() for name, value in module.state_dict().items()}
    children = list(module.modules())
    return {
        "state": state,
        "grad": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "optimizer": optimizer.state_dict()["param_groups"],
        "optimizer state": [
            v.clone() for s in optimizer.state_dict()["state"].values() for v in s.values() if v is not None
        ],
        "metrics": metrics,
        "logged": list(diary.rows),
        "watched": getattr(module, "_orig_mod", module).watched(),
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "modes": [child.training for child in children],
        "hooks": [len(hooks) for child in children for hooks in hooks_of(child)],
        "optimizer hooks": len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks),
        "attributes": [sorted(vars(child)) for child in children],
        "rng": rng(),
    }


def hooks_of(child):
    return child._forward_hooks, child._forward_pre_hooks, child._backward_hooks, child._forward_hooks_with_kwargs


def train(tmp_path, make, options, loader, *callbacks):
    options = dict(options() if callable(options) else options)
    callbacks = (options.pop("also"), *callbacks) if "also" in options else callbacks
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    module, diary = make(), Diary()
    trainer = quiet_trainer(tmp_path, *callbacks, logger=diary, log_every_n_steps=1, max_epochs=3, **options)
    trainer.fit(module, loader(), DataLoader(classes(), 8) if isinstance(module, Validated) else None)
    return trainer, module, diary


def differing(tmp_path, make, options=(), loader=plain_loader, settings=None):
    """Names of what differs between a training without the callback and one with it."""
    without = snapshot(*train(tmp_path, make, options, loader))
    source = SourceCallback(dirpath=str(tmp_path / "run"), segments=2, snapshots_per_segment=1, **(settings or {}))
    outcome = snapshot(*train(tmp_path, make, options, loader, source))
    assert (tmp_path / "run" / "segments" / "1.safetensors").exists()  # factors were computed inside `fit`
    return [name for name in without if not same(outcome[name], without[name])]


@pytest.mark.parametrize("act", ACTS)
def test_training_is_bit_identical_whatever_the_step_does(tmp_path, act):
    assert differing(tmp_path, lambda: Busy(*ACTS[act])) == []


@pytest.mark.check("engine", "{setting}", "training bit-identical")
@pytest.mark.parametrize("setting", SETTINGS)
def test_training_is_bit_identical_however_it_is_done(tmp_path, setting):
    assert differing(tmp_path, *SETTINGS[setting]) == []


@pytest.mark.check("engine", "{setting}", "training bit-identical, the step busy in every way")
@pytest.mark.parametrize("setting", [s for s in SETTINGS if s != "compiled"])  # no compiled step can log
def test_training_is_bit_identical_however_it_is_done_and_whatever_the_step_does(tmp_path, monkeypatch, setting):
    monkeypatch.setattr(Busy, "further", range(1, len(ACTS)))
    assert differing(tmp_path, *SETTINGS[setting]) == []


@pytest.mark.parametrize(
    ("guard", "make", "changed"),
    [
        ("isolated_rng", lambda: Busy(*ACTS["global noise"]), {"rng"}),
        ("_attributes_kept", lambda: Busy(*ACTS["nested lists"]), {"watched"}),
    ],
    ids=["rng", "attributes"],
)
def test_a_guard_taken_away_leaves_a_trace_of_the_passes_after_training(tmp_path, monkeypatch, guard, make, changed):
    monkeypatch.setattr(_guards, guard, lambda *args: nullcontext())
    assert set(differing(tmp_path, make)) == changed  # of what a training leaves, not of its weights


class CountsCalls(L.Callback):
    """How often the step was called when training ended, before anybody else looked."""

    def __init__(self) -> None:
        self.calls = 0
        self.training = True

    def on_fit_start(self, trainer, pl_module) -> None:
        step = pl_module.training_step

        @functools.wraps(step)
        def counted(*args, **kwargs):
            self.calls += self.training
            return step(*args, **kwargs)

        pl_module.training_step = counted

    def on_train_end(self, trainer, pl_module) -> None:
        self.training = False


WINDOWS = {
    "accumulated gradients": (Busy, {"accumulate_grad_batches": 2}, plain_loader),
    "clipped gradients": (Busy, {"gradient_clip_val": 0.1}, plain_loader),
}


@pytest.mark.check("engine", "{setting}", "the step called as often as without the callback")
@pytest.mark.parametrize("setting", [*SETTINGS, *WINDOWS])
def test_the_step_is_called_as_often_as_without_the_callback(tmp_path, setting):
    make, options, loader, *settings = (SETTINGS | WINDOWS)[setting]
    calls = []
    for callbacks in ([], [SourceCallback(str(tmp_path / "run"), **(settings[0] if settings else {}))]):
        counting = CountsCalls()  # in front of the callback, which makes passes when training has ended
        given = dict(options() if callable(options) else options)
        also = (counting, given.pop("also")) if "also" in given else (counting,)
        train(tmp_path, make, given, loader, *also, *callbacks)
        calls.append(counting.calls)
    assert calls[0] == calls[1] > 0


def test_without_silence_a_step_that_logs_could_not_be_run(tmp_path, monkeypatch):
    monkeypatch.setattr(_guards, "_silent_log", lambda module: nullcontext())
    source = SourceCallback(dirpath=str(tmp_path / "run"))
    with pytest.warns(UserWarning, match=r"can't `self.log\(\)`"):
        train(tmp_path, lambda: Busy(*ACTS["logs"]), {}, plain_loader, source)


class Endless(IterableDataset):
    def __iter__(self):
        return iter([classes()[i] for i in range(5)])


def failing(module, batch):
    module.net(batch[0] + torch.rand(()))
    raise RuntimeError("the user's measurement")


QUERIES = {
    "batch": ([x[:4] for x in classes().tensors], {"per_segment": True}),
    "dataset": (Augmented(), {"measurement": "margin"}),
    "loader": (DataLoader(classes(), 4, shuffle=True), {"method": "influence"}),
    "iterable loader": (DataLoader(Endless(), 2), {"method": "grad-cos"}),
    "error": ([x[:4] for x in classes().tensors], {"measurement": failing}),
}


@pytest.mark.parametrize("query", QUERIES)
def test_attribute_leaves_everything_as_it_was(tmp_path, query):
    source = SourceCallback(dirpath=str(tmp_path / "run"), snapshots_per_segment=2)
    trainer, module, diary = train(tmp_path, lambda: Busy(*ACTS["metric"], net=normed()), {}, plain_loader, source)
    module.train()
    module.net[1].eval()
    module.net[3].weight.requires_grad_(False)  # frozen since training
    module.net[0].weight.grad = torch.ones(5, 6)
    seen = []
    module.net[0].register_forward_hook(lambda *args: seen.append(any(m.training for m in module.modules())))
    before = snapshot(trainer, module, diary)
    data, options = QUERIES[query]
    with pytest.raises(RuntimeError, match="the user's") if query == "error" else nullcontext():
        assert trainer.attribute(data, **options).values.isfinite().all()
    after = snapshot(trainer, module, diary)
    assert set(seen) == {False}  # the passes ran the module in eval mode
    assert [name for name in before if not same(before[name], after[name])] == []


class Stop(L.Callback):
    def __init__(self, error):
        self.error = error

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if self.error and trainer.global_step == 3:
            raise self.error


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.parametrize(
    ("error", "raised"), [(None, None), (ValueError("user"), ValueError), (KeyboardInterrupt(), SystemExit)], ids=repr
)
def test_no_hook_remains(tmp_path, error, raised):
    module, recording = Classifier(mlp()), []

    class Peek(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            recording.append(len(trainer.optimizers[0]._optimizer_step_post_hooks))

    source = SourceCallback(dirpath=str(tmp_path / "run"))
    trainer = quiet_trainer(tmp_path, source, Peek(), Stop(error))
    with pytest.raises(raised) if raised else nullcontext():
        trainer.fit(module, plain_loader())
    optimizer = trainer.optimizers[0]
    assert set(recording) == {1}  # the step log hangs on the optimizer while training runs
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not any(hooks for child in module.modules() for hooks in hooks_of(child))
    assert "log" not in vars(module)


def test_a_csv_log_is_the_same_file(tmp_path):
    """By default the run lies beside the logger's files."""
    files = []
    for name, callbacks in (("without", []), ("with", [SourceCallback(segments=2)])):
        torch.manual_seed(5)
        logger = CSVLogger(tmp_path / name)
        options = {"logger": logger, "log_every_n_steps": 1}
        quiet_trainer(tmp_path, *callbacks, **options).fit(Busy(*ACTS["metric"]), plain_loader())
        files.append((tmp_path / name / "lightning_logs" / "version_0" / "metrics.csv").read_text())
    assert (tmp_path / "with" / "lightning_logs" / "version_0" / "source-run" / "manifest.json").exists()
    assert files[0] == files[1]
    assert len(files[0].splitlines()) > 6
