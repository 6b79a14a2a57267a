"""Steps that real code has: weights of losses that are learnt, targets that are synchronised late, lazy layers."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers import QUERY, Classifier, classes, close, gradient_rows, mlp, quiet_trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.data import DataLoader, Subset

from lightning_source import SourceCallback
from lightning_source.recording.gradient_watch import GradientWatch


def fit(tmp_path, module, **options):
    trainer = quiet_trainer(tmp_path, SourceCallback(str(tmp_path / "run"), **options), max_epochs=3)
    trainer.fit(module, DataLoader(classes(), 8))
    return trainer


def products(module, parameters=None) -> Tensor:
    """Products of the gradients of single examples' own losses at the module's present parameters, by autograd."""
    parameters = parameters or [p for p in module.parameters() if p.requires_grad]
    rows = gradient_rows((module.training_step([x[None], y[None]], 0) for x, y in classes()), parameters)
    return rows @ rows.T


class Weighed(Classifier):
    """Two losses whose weights are parameters."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))
        self.weights = nn.Parameter(torch.zeros(2))

    def training_step(self, batch, batch_idx):
        x, y = batch
        outputs = self.net(x)
        losses = torch.stack([F.cross_entropy(outputs[:, :3], y), F.mse_loss(outputs[:, 3], x.sum(1))])
        return (self.weights.neg().exp() * losses + 0.5 * self.weights).sum()


def test_learnt_weights_of_losses_are_named_as_left_out(tmp_path):
    trainer = fit(tmp_path, Weighed())
    trainer.attribute([tensor[:2] for tensor in classes().tensors])
    (stage,) = trainer.callbacks[0]._session.store.manifest.stages
    assert [(name, size) for name, size, _ in stage.coverage.left_out] == [("weights", 2)]
    assert "weighs the losses" in stage.coverage.left_out[0][2]


class Squeezes(Classifier):
    """What it computes beside the loss fails on a batch of one."""

    def training_step(self, batch, batch_idx):
        outputs = self.net(batch[0])
        self.correct = (outputs.squeeze().argmax(1) == batch[1]).float().mean()
        return F.cross_entropy(outputs, batch[1])


def test_a_step_that_cannot_run_on_a_batch_of_one(tmp_path, recwarn):
    module = Squeezes(mlp())
    trainer = fit(tmp_path, module)
    scores = trainer.attribute(list(classes().tensors), method="grad-dot").values
    torch.testing.assert_close(scores, 0.9 / 24 * plain_products(module), rtol=1e-4, atol=1e-6)
    assert not [w for w in recwarn if "one at a time" in str(w.message)]


def plain_products(module) -> Tensor:
    return products(Classifier(module.net))


def test_a_scripted_network_is_scored_from_the_losses_of_examples(tmp_path):
    """It takes no hooks, and its buffers cannot be rebound."""
    module = Classifier(torch.jit.script(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))))
    trainer = fit(tmp_path, module)
    scores = trainer.attribute(list(classes().tensors), method="grad-dot")
    assert scores.metadata["coverage"] == 1.0
    module.eval()
    torch.testing.assert_close(scores.values, 0.9 / 24 * products(module), rtol=1e-4, atol=1e-6)


class ByPlace(Classifier):
    """The second batch of an epoch counts double, or nothing."""

    def __init__(self, weight):
        super().__init__(mlp())
        self.weight = weight

    def training_step(self, batch, batch_idx):
        if batch_idx == 1 and self.weight is None:
            return None
        return super().training_step(batch, batch_idx) * (self.weight or 1.0 if batch_idx == 1 else 1.0)


@pytest.mark.parametrize(("weight", "warns"), [(2.0, True), (1.0, False), (None, False)])
def test_a_loss_that_depends_on_the_place_of_its_batch_is_named(tmp_path, recwarn, weight, warns):
    trainer = fit(tmp_path, ByPlace(weight))
    said = [str(w.message) for w in recwarn if "depends on `batch_idx`" in str(w.message)]
    assert len(said) == warns
    assert trainer.attribute([tensor[:2] for tensor in classes().tensors]).values.isfinite().all()


class Target(Classifier):
    """Learns from a frozen copy of itself that is synchronised at the end of each epoch."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.target = copy.deepcopy(self.net).requires_grad_(False)

    def on_train_epoch_end(self) -> None:
        if self.current_epoch < 2:
            self.target.load_state_dict(self.net.state_dict())

    def training_step(self, batch, batch_idx):
        x, y = batch
        outputs = self.net(x)
        return F.cross_entropy(outputs, y) + F.mse_loss(outputs, self.target(x.flip(1)).detach())


class Recurrent(Classifier):
    """Truncated backpropagation: the hidden state goes from batch to batch of an epoch, or is kept and not read."""

    def __init__(self, carries: str) -> None:
        super().__init__(nn.RNN(6, 40, batch_first=True))  # too large a state for the record
        self.carries = carries
        self.hidden = torch.zeros(1, 8, 40)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        start = torch.zeros(1, len(inputs), 40) if self.carries == "unread" else self.hidden[:, : len(inputs)].clone()
        outputs, hidden = self.net(inputs[:, None], start)
        if self.carries == "in place":
            self.hidden[:, : len(inputs)] = hidden.detach()
        else:
            self.hidden = hidden.detach()
        return self.loss(outputs[:, -1], targets)

    def on_train_epoch_end(self):
        self.hidden = torch.zeros(1, 8, 40)


@pytest.mark.parametrize("carries", ["in place", "anew", "unread"])
def test_a_state_that_goes_from_batch_to_batch_is_named(tmp_path, recwarn, carries):
    module = Recurrent(carries)
    trainer = fit(tmp_path, module)
    said = [str(w.message) for w in recwarn if "earlier calls left in `hidden`" in str(w.message)]
    assert len(said) == (carries != "unread")
    scores = trainer.attribute(list(classes().tensors), method="grad-dot").values

    def begun_anew(example):  # as every batch of a pass is
        module.on_train_epoch_end()
        return module.training_step([x[None] for x in example], 0)

    rows = gradient_rows(map(begun_anew, classes()), [*module.parameters()])
    found = rows @ rows.T
    close(scores, (scores * found).sum() / found.square().sum() * found)


def test_a_target_that_is_synchronised_late_is_recorded(tmp_path):
    module = Target()
    scores = fit(tmp_path, module).attribute(list(classes().tensors), method="grad-dot").values
    expected = products(module)
    close(scores / scores.norm(), expected / expected.norm(), 1e-4)


def test_lazy_layers_train_as_without_the_callback_and_are_scored(tmp_path):
    weights = []
    for callbacks in ([], [SourceCallback(str(tmp_path / "run"))]):
        torch.manual_seed(0)
        module = Classifier(nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(3)))
        trainer = quiet_trainer(tmp_path, *callbacks, max_epochs=3)
        if callbacks:
            with pytest.warns(UserWarning, match="keeps no record to go on from"):
                trainer.fit(module, DataLoader(classes(), 8))
        else:
            trainer.fit(module, DataLoader(classes(), 8))
        weights.append([p.detach().clone() for p in module.parameters()])
    assert all(map(torch.equal, *weights))
    scores = trainer.attribute(list(classes().tensors), method="grad-dot").values
    expected = products(module)
    close(scores / scores.norm(), expected / expected.norm(), 1e-4)


def test_what_fails_when_the_hooks_have_gone_does_not_end_training(tmp_path, monkeypatch):
    def fails(watch):
        raise RuntimeError("of ours")

    monkeypatch.setattr(GradientWatch, "changes", fails)
    trainer = fit(tmp_path, Classifier(mlp()), mode="deferred")
    assert trainer.state.finished
    assert trainer.attribute([tensor[:2] for tensor in classes().tensors], method="grad-dot").values.shape == (2, 24)


class Bags(Classifier):
    """Classifies bags of instances: the first layer's rows are the batch's instances, the losses are by bag."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(mlp(4))
        self.instance = nn.Linear(3, 4)
        self.of_bag = nn.Linear(4, 4)

    def training_step(self, batch, batch_idx):
        instances, bag, label = batch
        rows = self.instance(instances)
        pooled = torch.zeros(len(label), rows.shape[1]).index_add(0, bag, torch.tanh(rows))
        pooled = pooled + self.of_bag(pooled.squeeze())  # a vector where the bag is alone, as graph libraries have
        return F.cross_entropy(self.net(pooled), label)


def collate_bags(bags):
    sizes = torch.tensor([len(instances) for instances, _ in bags])
    bag = torch.arange(len(bags)).repeat_interleave(sizes)
    return torch.cat([instances for instances, _ in bags]), bag, torch.tensor([label for _, label in bags])


def test_layers_whose_rows_are_parts_of_examples_are_followed_one_example_at_a_time(tmp_path, recwarn):
    torch.manual_seed(1)
    bags = [(torch.randn(2 + i % 3, 3), i % 3) for i in range(12)]
    module = Bags()
    trainer = quiet_trainer(tmp_path, SourceCallback(str(tmp_path / "run")), max_epochs=2)
    trainer.fit(module, DataLoader(bags, batch_size=4, collate_fn=collate_bags))
    scores = trainer.attribute(Subset(bags, range(5)), method="grad-dot")
    assert scores.metadata["coverage"] == 1.0
    assert any("one at a time" in str(w.message) and "instance.weight" in str(w.message) for w in recwarn)
    gradients = []
    for bag in bags:
        loss = module.training_step(collate_bags([bag]), 0)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]))
    expected = torch.stack(gradients[:5]) @ torch.stack(gradients).T
    close(scores.values / scores.values.norm(), expected / expected.norm(), 1e-5)


class Counts(Classifier):
    """Reads its Trainer in the step, as libraries that log by hand do."""

    def training_step(self, batch, batch_idx):
        assert self.global_step >= 0
        return super().training_step(batch, batch_idx)


def test_a_module_whose_trainer_was_taken_off_is_scored_as_before(tmp_path):
    trainer = fit(tmp_path, Counts(mlp()))
    module = trainer.lightning_module
    query = [x[:4] for x in classes().tensors]
    before = trainer.attribute(query).values
    trainer_of_module = vars(module).pop("_trainer")
    assert torch.equal(trainer.attribute(query).values, before)
    assert "_trainer" not in vars(module)
    assert trainer_of_module is trainer


class Prunes(L.Callback):
    """Takes weights of the first layer away after the first epoch, and makes that permanent in the end."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            prune.random_unstructured(pl_module.net[0], "weight", amount=0.5)

    def on_train_end(self, trainer, pl_module):
        prune.remove(pl_module.net[0], "weight")


@pytest.mark.check("engine", "pruning in mid-fit", "bit-identical; the pruned layer is left out by name")
@pytest.mark.parametrize("thaws", [False, True], ids=["plain", "and a layer thaws later"])
def test_a_layer_that_is_pruned_is_named_and_the_others_are_scored_in_the_pruned_network(tmp_path, thaws):
    class Thaws(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.net[2].bias.requires_grad_(not thaws or trainer.current_epoch > 1)

    def trained(*callbacks):
        torch.manual_seed(0)
        module, trainer = Classifier(mlp()), quiet_trainer(tmp_path, *callbacks, max_epochs=4)
        trainer.fit(module, DataLoader(classes(), 8))
        return module, trainer

    alone, _ = trained(Thaws(), Prunes())
    with pytest.warns(UserWarning, match=r"from step 4 on, net\.0 cannot be attributed"):
        module, trainer = trained(Thaws(), Prunes(), SourceCallback(str(tmp_path / "run")))
    assert all(torch.equal(p, q) for p, q in zip(alone.parameters(), module.parameters(), strict=True))
    with trainer.callbacks[-1].scorer(trainer) as scorer:
        last = scorer.run.state(scorer.run.snapshots[-1], "mean")["net.0.weight"]
        assert torch.equal(last == 0, module.net[0].weight == 0)
        left = {name for name, _, _ in scorer.run.coverage.left_out}
    assert left == ({"net.0.weight"} if thaws else {"net.0.weight", "net.0.bias"})
    # Each parameter by the rates of the steps that trained it: 12 of 0.1, or 6 for what thaws.
    found = trainer.attribute(classes(), method="grad-dot").values * 24
    first, last = module.net[0], module.net[2]
    steady = [last.weight, first.bias] if thaws else [last.weight, last.bias]
    expected = 1.2 * products(module, steady) + (0.6 * products(module, [last.bias]) if thaws else 0)
    close(found, expected)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


def test_a_parametrization_that_comes_in_mid_fit_is_named(tmp_path):
    class Parametrizes(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                parametrize.register_parametrization(pl_module.net[0], "weight", Doubled())

    torch.manual_seed(0)
    module = Classifier(mlp())
    trainer = quiet_trainer(tmp_path, Parametrizes(), SourceCallback(str(tmp_path / "run")), max_epochs=3)
    with pytest.warns(UserWarning, match="computes what it uses of it, and that is not recorded"):
        trainer.fit(module, DataLoader(classes(), 8))
    with pytest.raises(MisconfigurationException, match=r"missing net\.0\.weight"):
        trainer.attribute(QUERY)
