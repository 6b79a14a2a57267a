"""What is trained changes in mid-fit: layers thaw or freeze, optimizers are replaced."""

import warnings

import lightning as L
import pytest
import torch
from helpers import QUERY, Classifier, classes, mlp, quiet_trainer
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_source import SourceCallback, SourceScorer
from lightning_source.recording.intervals import StepInterval, cut
from lightning_source.recording.parameter_groups import Phase, phase_at
from lightning_source.recording.store import RunStore
from lightning_source.recording.typed_json import from_json, to_json


def test_columns_split_where_their_parameters_part():
    first = Phase.after(None, 0, "SGD", [["a", "b"], ["c"]], [False, True])
    assert (first.columns, first.groups, first.decoupled) == ((("a", "b"), ("c",)), (0, 1), (False, True))
    second = Phase.after(first, 5, "Adam", [["b", "d"], ["c"]], [False, False])
    assert second.columns == (("a",), ("b",), ("c",), ("d",))
    assert second.groups == (None, 0, 1, 0)  # a is frozen
    assert first.parents(second.columns) == [0, 0, 1, None]
    assert second.per_column([0.1, 0.2]) == [0.0, 0.1, 0.2, 0.1]
    assert from_json(Phase, to_json(second)) == second
    assert phase_at([first, second], 4) == first
    assert phase_at([first, second], 5) == second


def test_a_stretch_counts_for_every_part_of_a_column():
    stretch = StepInterval(0, 3, (0.3, 0.6), (0.0, 0.1))
    found = stretch.regrouped([0, 0, 1, None])
    assert (found.rates, found.decays) == ((0.3, 0.3, 0.6, 0.0), (0.0, 0.0, 0.1, 0.0))


def test_a_segment_ends_where_a_phase_does():
    stretches = [StepInterval(i, i + 1, (1.0,), (0.0,)) for i in range(6)]
    assert cut(stretches, 1, [4]) == [[0, 1, 2, 3], [4, 5]]
    assert cut(stretches, 2, [3]) == [[0, 1, 2], [3, 4, 5]]
    assert cut(stretches, [2], [0, 4]) == [[0, 1], [2, 3], [4, 5]]


class Changes(Classifier):
    """``change(module)`` runs before the second of three epochs."""

    def __init__(self, change, groups):
        super().__init__(mlp())
        self.change, self.groups = change, groups

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.change(self)

    def configure_optimizers(self):
        return self.groups(self)


def fit(path, module, *callbacks, epochs=3, ckpt=None, seed=3, **settings):
    torch.manual_seed(seed)
    for p in module.parameters():
        nn.init.normal_(p, 0, 0.3)
    source = SourceCallback(str(path), **({"snapshots_per_segment": 2} | settings))
    trainer = quiet_trainer(path.parent, source, *callbacks, max_epochs=epochs, enable_checkpointing=bool(callbacks))
    trainer.fit(module, DataLoader(classes(), 12), ckpt_path=ckpt)
    return trainer


def sgd(*rates):
    """The two layers as groups; a layer with rate ``None`` is left to itself."""

    def make(module):
        layers = [module.net[0], module.net[2]]
        groups = [
            {"params": layer.parameters(), "lr": r} for layer, r in zip(layers, rates, strict=True) if r is not None
        ]
        return torch.optim.SGD(groups, lr=0.1, weight_decay=0.05)

    return make


def set_rates(*rates):
    def change(module):
        for group, rate in zip(module.trainer.optimizers[0].param_groups, rates, strict=True):
            group["lr"] = rate

    return change


def thaw(module):
    """As ``BackboneFinetuning`` does it."""
    module.net[0].requires_grad_(True)
    module.trainer.optimizers[0].add_param_group({"params": module.net[0].parameters(), "lr": 0.05})


def frozen_first(module):
    module.net[0].requires_grad_(False)
    return sgd(None, 0.1)(module)


def thaw_in_place(module):
    module.net[0].requires_grad_(True)


def replace_by(make):
    def change(module):
        module.trainer.optimizers = [make(module)]

    return change


def freeze(module):
    module.net[0].requires_grad_(False)


def flags_only(module):
    module.net[0].requires_grad_(False)
    return sgd(0.05, 0.1)(module)


# What happens, and a training of one phase that makes the same steps by learning rates of 0.
SAME_STEPS = {
    "a layer thawed, added to the optimizer": (thaw, frozen_first, (0.0, 0.1), (0.05, 0.1), 2),
    "a layer thawed in its group": (thaw_in_place, flags_only, (0.0, 0.1), (0.05, 0.1), 2),
    "a layer frozen": (freeze, sgd(0.05, 0.1), (0.05, 0.1), (0.0, 0.1), 2),
    "an optimizer replaced": (replace_by(sgd(0.03, 0.2)), sgd(0.05, 0.1), (0.05, 0.1), (0.03, 0.2), 1),
    "groups joined in a new optimizer": (
        replace_by(lambda m: torch.optim.SGD(m.parameters(), lr=0.02, weight_decay=0.05)),
        sgd(0.05, 0.1),
        (0.05, 0.1),
        (0.02, 0.02),
        2,
    ),
}


@pytest.mark.check("optimizer", "{name}", "scores equal to the same steps in one phase")
@pytest.mark.parametrize("name", SAME_STEPS)
def test_scores_are_those_of_the_same_steps(tmp_path, name):
    """Bit-equal training, and scores to 1e-4: where flags alone change, the two runs differ in nothing else."""
    change, groups, before, after, phases = SAME_STEPS[name]
    found = fit(tmp_path / "a", Changes(change, groups), snapshots_per_segment=1)
    boundary = [2] if phases > 1 else 1  # numbers in the groups make no phase
    expected = fit(tmp_path / "b", Changes(set_rates(*after), sgd(*before)), segments=boundary, snapshots_per_segment=1)
    for mine, other in zip(found.lightning_module.parameters(), expected.lightning_module.parameters(), strict=True):
        assert torch.equal(mine, other)
    one, other = (RunStore.open(tmp_path / run).manifest for run in "ab")
    assert len(one.stages[0].phases) == phases
    assert [(s.first, s.last) for s in one.segments] == [(s.first, s.last) for s in other.segments]
    reference = expected.attribute(QUERY, per_segment=True).by_segment
    scores = found.attribute(QUERY, per_segment=True)
    torch.testing.assert_close(scores.by_segment, reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()))
    module = Changes(change, groups)
    assert torch.equal(SourceScorer.from_run(tmp_path / "a", module).score(QUERY, classes()).values, scores.values)


@pytest.mark.check("optimizer", "SGD replaced by AdamW", "steps and preconditioners by phase")
def test_another_kind_of_optimizer(tmp_path):
    adam = replace_by(lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1))
    trainer = fit(tmp_path / "run", Changes(adam, sgd(0.05, 0.1)))
    with trainer.callbacks[0].scorer(trainer) as scorer:
        run = scorer.run
        first, second = run.segments()
        assert not run.preconditioner(first.snapshots)
        assert run.preconditioner(second.snapshots).keys() == {"net.0", "net.2"}
        assert [run.stage.decoupled(s.stretch.first, 0) for s in (first, second)] == [False, True]
        assert [s.stretch.weight_decay(0) for s in (first, second)] == pytest.approx([0.05, 0.1])
    values = trainer.attribute(QUERY, per_segment=True).by_segment
    assert values.isfinite().all()
    assert all(part.any() for part in values)


def test_an_optimizer_that_is_not_understood_ends_the_record_when_it_comes(tmp_path):
    change = replace_by(lambda m: torch.optim.Adamax(m.parameters()))
    with pytest.warns(UserWarning, match="(?s)stops recording.*does not know how `Adamax`"):
        fit(tmp_path / "run", Changes(change, sgd(0.05, 0.1)))
    run = SourceScorer.from_run(tmp_path / "run", Changes(change, sgd(0.05, 0.1)))
    assert run.score(QUERY, classes()).metadata["segments"][-1]["last"] == 2  # nothing computed is lost


class Backbone(Classifier):
    def __init__(self):
        super().__init__(nn.Identity())
        self.backbone = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5))
        self.head = nn.Linear(5, 3)

    def training_step(self, batch, batch_idx):
        return self.loss(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.5)


class Dies(L.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 9:
            raise RuntimeError("power cut")


@pytest.mark.check(
    "stage", "a layer thawed by BackboneFinetuning, killed and resumed", "equal to the uninterrupted run"
)
def test_resumed_before_a_layer_thaws(tmp_path):
    """Lightning itself does not resume after the thaw: the layers stay frozen."""

    def finetuning():
        return BackboneFinetuning(unfreeze_backbone_at_epoch=3, backbone_initial_lr=0.01, lambda_func=lambda epoch: 1.0)

    saves = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    whole = fit(tmp_path / "whole", Backbone(), finetuning(), epochs=6)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path / "cut", Backbone(), finetuning(), saves, Dies(), epochs=6)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*checkpoint directory.*")
        resumed = fit(
            tmp_path / "cut", Backbone(), finetuning(), epochs=6, ckpt=tmp_path / "ckpt" / "step=4.ckpt", seed=8
        )
    one, other = (RunStore.open(tmp_path / name).manifest for name in ("whole", "cut"))
    assert one.stages[0].phases == other.stages[0].phases
    assert len(one.segments) == 2
    for key in ("snapshots", "segments", "steps"):
        assert getattr(one, key) == getattr(other, key)
    assert torch.equal(whole.attribute(QUERY).values, resumed.attribute(QUERY).values)
    coverage = whole.callbacks[0].scorer(whole)
    with coverage as scorer:
        assert {b.module for b in scorer.run.coverage.blocks} == {"backbone.0", "backbone.1", "backbone.3", "head"}
