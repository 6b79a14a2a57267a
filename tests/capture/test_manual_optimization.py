"""Modules that optimize by hand: recorded and scored as the same training done automatically."""

import pytest
import torch
import torch.nn.functional as F
from helpers import QUERY, Classifier, classes, mlp, quiet_trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_source import SourceCallback, SourceScorer
from lightning_source.capture.manual_optimization import ManualStep
from lightning_source.capture.objective import Objective
from lightning_source.recording.store import RunStore


class ByHand(Classifier):
    """The training of :class:`Classifier`, written by hand in one of the ways that users have."""

    def __init__(self, way="manual_backward", every=1, **options):
        super().__init__(mlp(), **options)
        self.automatic_optimization = False
        self.way, self.every = way, every

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=self.way != "raw optimizer")
        if self.way == "closure":
            optimizer.step(closure=lambda: self.closure(optimizer, batch))
            return
        loss = super().training_step(batch, batch_idx) / self.every
        if self.every == 1:
            optimizer.zero_grad()
        if self.way == "loss.backward":
            loss.backward()
        elif self.way == "autograd.grad":
            parameters = list(self.parameters())
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
        else:
            self.manual_backward(loss)
        if (batch_idx + 1) % self.every == 0:
            if self.way == "clipped":
                self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
            optimizer.step()
            if self.every > 1:
                optimizer.zero_grad()

    def closure(self, optimizer, batch):
        loss = super().training_step(batch, 0)
        optimizer.zero_grad()
        self.manual_backward(loss)
        return loss


def run(tmp_path, module, settings=None, **options):
    torch.manual_seed(3)
    for p in module.parameters():  # the classifier's come first
        nn.init.normal_(p, 0, 0.3)
    torch.manual_seed(4)
    settings = {"segments": 2, "snapshots_per_segment": 1} | (settings or {})
    source = SourceCallback(str(tmp_path / "run"), **settings)
    trainer = quiet_trainer(tmp_path, source, **options)
    trainer.fit(module, DataLoader(classes(), 8, shuffle=True))
    return trainer


@pytest.mark.check("engine", "manual optimization, {way}", "scores equal to automatic optimization")
@pytest.mark.parametrize(
    "way", ["manual_backward", "loss.backward", "autograd.grad", "raw optimizer", "closure", "clipped"]
)
def test_scores_are_those_of_automatic_optimization(tmp_path, way):
    """Bit for bit: the same kernels run in the same order."""
    clipping = {"gradient_clip_val": 0.05} if way == "clipped" else {}
    automatic = run(tmp_path / "a", Classifier(mlp()), **clipping)
    by_hand = run(tmp_path / "b", ByHand(way))
    for one, other in zip(automatic.lightning_module.parameters(), by_hand.lightning_module.parameters(), strict=True):
        assert torch.equal(one, other)
    expected = automatic.attribute(QUERY, per_segment=True)
    found = by_hand.attribute(QUERY, per_segment=True)
    assert torch.equal(found.by_segment, expected.by_segment)
    again = SourceScorer.from_run(tmp_path / "b" / "run", ByHand(way)).score(QUERY, classes())
    assert torch.equal(again.values, found.values)


@pytest.mark.check("engine", "manual optimization, accumulating", "scores equal to automatic optimization")
def test_accumulation_by_hand(tmp_path):
    """Three batches a step, where Lightning divides by three and the user does; the loss asked about is the user's."""
    automatic = run(tmp_path / "a", Classifier(mlp()), accumulate_grad_batches=3)
    by_hand = run(tmp_path / "b", ByHand(every=3))
    expected = automatic.attribute(QUERY).values
    torch.testing.assert_close(
        3 * by_hand.attribute(QUERY).values, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max())
    )


class Adversaries(Classifier):
    """A classifier, and an adversary that reads its hidden layer: two optimizers, two losses that share layers."""

    def __init__(self):
        super().__init__(mlp())
        self.adversary = nn.Linear(5, 2)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        main, other = self.optimizers()
        inputs, targets = batch
        self.toggle_optimizer(other)
        hidden = self.net[:2](inputs)
        other.zero_grad()
        self.manual_backward(F.cross_entropy(self.adversary(hidden), targets % 2))
        other.step()
        self.untoggle_optimizer(other)
        main.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(inputs), targets))
        main.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net.parameters(), 0.1), torch.optim.SGD(self.adversary.parameters(), 0.3)]


@pytest.mark.check("engine", "two optimizers", "scores equal to the one training alone")
def test_the_loss_of_the_optimizer_that_is_asked_about(tmp_path):
    """The classifier's training knows nothing of its adversary, so neither do its scores."""
    one = run(tmp_path / "a", ByHand(), {"segments": 1})
    both = run(tmp_path / "b", Adversaries(), {"optimizer": 0, "segments": 1})
    for mine, theirs in zip(both.lightning_module.net.parameters(), one.lightning_module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    # Of two optimizers it is not known how often one steps, so bins merge, and their means are rounded twice.
    torch.testing.assert_close(both.attribute(QUERY).values, one.attribute(QUERY).values, rtol=1e-3, atol=1e-5)
    manifest = RunStore.open(tmp_path / "b" / "run").manifest
    assert {name for p in manifest.stages[0].phases for c in p.columns for name in c} == {
        "net.0.weight",
        "net.0.bias",
        "net.2.weight",
        "net.2.bias",
    }


def test_the_adversary_itself(tmp_path):
    trainer = run(tmp_path, Adversaries(), {"optimizer": 1})
    with trainer.callbacks[0].scorer(trainer) as scorer:
        assert [block.name for block in scorer.run.coverage.blocks] == ["adversary"]
    hidden = trainer.lightning_module
    values = trainer.attribute(
        QUERY, measurement=lambda m, b: F.cross_entropy(m.adversary(m.net[:2](b[0])), b[1] % 2, reduction="none")
    )
    assert torch.equal(trainer.attribute(QUERY).values, values.values)
    assert hidden.adversary.weight.grad is not None  # what training left there


def test_several_optimizers_must_be_told_apart(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"has 2 optimizers \(0 `SGD`, 1 `SGD`\).*optimizer=0"):
        run(tmp_path, Adversaries())
    with pytest.raises(MisconfigurationException, match=r"optimizer=2.*gave 2 optimizers"):
        run(tmp_path, Adversaries(), {"optimizer": 2})


def test_gradients_add_up_until_they_are_zeroed():
    """As in torch: without a toggle a backward reaches every optimizer; zeroing forgets it for one of them."""
    a, b, c = (torch.tensor(float(2**i), requires_grad=True) for i in range(3))
    step = ManualStep(2, attributed=1)
    first, second = step.optimizers
    step.backward(a)
    first.step()
    step.backward(b)
    second.step()
    assert step.loss == 3
    second.zero_grad()
    with first.toggle_model():
        step.backward(a)
    step.backward(c)
    second.step()
    assert step.loss == (3 + 4) / 2  # the mean of its two steps


def test_a_step_without_a_backward_has_no_loss():
    class Silent(ByHand):
        def training_step(self, batch, batch_idx):
            self.optimizers().step()

    with pytest.raises(ValueError, match="no scalar loss"):
        Objective(Silent()).evaluate([x[:4] for x in classes().tensors], 4)
    module = ByHand()
    Objective(module).evaluate([x[:4] for x in classes().tensors], 4)
    assert not {"optimizers", "manual_backward"} & vars(module).keys()


class TakingTurns(Adversaries):
    """The adversary's optimizer moves on even batches, the classifier's on odd ones."""

    def __init__(self, every=2, keep=False):
        super().__init__()
        self.every, self.keep = every, keep

    def on_train_start(self):
        self.kept = (self.optimizers(), self.trainer.optimizers)

    def training_step(self, batch, batch_idx):
        optimizers = self.kept[batch_idx % 2] if self.keep else self.optimizers()
        main, other = optimizers
        inputs, targets = batch
        if batch_idx % self.every != self.every - 1:
            hidden = self.net[:2](inputs).detach()
            loss, optimizer = F.cross_entropy(self.adversary(hidden), targets % 2), other
        else:
            loss, optimizer = F.cross_entropy(self.net(inputs), targets), main
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


@pytest.mark.check("engine", "optimizers that take turns", "the attributed one's loss and steps")
@pytest.mark.parametrize("keep", [False, True], ids=["asked anew", "kept by the module"])
@pytest.mark.parametrize("every", [2, 3])
def test_optimizers_that_take_turns(tmp_path, every, keep):
    """Batches of the other optimizer count for nothing, and no pass moves an optimizer that the module holds on to."""
    trainer = run(tmp_path, TakingTurns(every, keep), {"optimizer": 0}, max_epochs=4)
    module = trainer.lightning_module
    stages = RunStore.open(tmp_path / "run").manifest.stages
    assert stages[0].manual.batch_idx == every - 1
    steps = 4 * len([i for i in range(3) if i % every == every - 1])
    segments = RunStore.open(tmp_path / "run").manifest.segments
    assert sum(s.rates[0] for s in segments) == pytest.approx(0.1 * steps)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    scores = trainer.attribute(QUERY).values
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with trainer.callbacks[0].scorer(trainer) as scorer:
        assert {block.name for block in scorer.run.coverage.blocks} == {"net.0", "net.2"}
        losses = scorer.run.workspace.objective.evaluate(QUERY, 4)
    assert float(losses.loss) == pytest.approx(float(F.cross_entropy(module.net(QUERY[0]), QUERY[1])), rel=1e-5)
    assert scores.any()


class AccumulatesAndLogs(Adversaries):
    """The classifier's gradients gather over batches that its optimizer does not step on; both log what they like."""

    def training_step(self, batch, batch_idx):
        main, other = self.optimizers()
        inputs, targets = batch
        self.manual_backward(F.cross_entropy(self.net(inputs), targets) / 3)
        self.manual_backward(F.cross_entropy(self.adversary(self.net[:2](inputs).detach()), targets % 2))
        other.step()
        other.zero_grad()
        self.log("momentum", other.param_groups[0]["momentum"])
        if batch_idx == 2:
            main.step()
            main.zero_grad()


def test_batches_that_reach_the_gradient_count(tmp_path):
    run(tmp_path, AccumulatesAndLogs(), {"optimizer": 0}, max_epochs=4)
    (_, segment) = RunStore.open(tmp_path / "run").manifest.segments
    assert segment.rates == pytest.approx([0.1 * 3 * 2])  # two steps in the second half, of three batches each
