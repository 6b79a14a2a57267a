"""Training steps that people reported against other libraries: each trains as it did, and is scored as it is.

The oracle is autograd on one example's loss at a time, in train mode. Scores of ``"grad-dot"`` equal its products times
the sum of learning rates over the number of examples, to 1e-3 of their norm: float32 products summed in another order.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import AuxiliaryHead, Classifier, classes, gradient_rows, mlp, quiet_trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from torch import Tensor, nn
from torch.nn.utils import parametrizations, rnn
from torch.utils.data import DataLoader, TensorDataset

from lightning_source import SourceCallback, SourceScorer
from lightning_source._lightning import MisconfigurationException

DATA = classes()
SINGLES = [(x[None], y[None]) for x, y in DATA]


def named(examples):
    return {"x": torch.stack([x for x, _ in examples]), "labels": torch.stack([y for _, y in examples])}


class Auxiliary(Classifier):
    def __init__(self):
        super().__init__(AuxiliaryHead())

    def training_step(self, batch, batch_idx):
        x, y = batch
        return sum(w * F.cross_entropy(o, y) for w, o in zip((1.0, 0.5), self.net(x), strict=False))


class DictionaryOfLosses(Classifier):
    """A detection network's form: losses in train mode, predictions in eval mode."""

    def forward(self, x, y):
        return {"loss": F.cross_entropy(self.net(x), y)} if self.training else self.net(x)

    def training_step(self, batch, batch_idx):
        return sum(self(*batch).values())


class PackedRows(Classifier):
    """Logits and targets are the rows of a packed sequence, time before examples."""

    def __init__(self):
        super().__init__(mlp(inputs=4))

    def training_step(self, batch, batch_idx):
        lengths = [4] * len(batch[0])
        x, y = (rnn.pack_padded_sequence(part, lengths, batch_first=True) for part in batch)
        return F.cross_entropy(self.net(x.data), y.data)


class TakesItsLabels(Classifier):
    def training_step(self, batch, batch_idx):
        labels = batch.pop("labels")
        return F.cross_entropy(self.net(batch["x"]), labels)


class WritesIntoItsBatch(TakesItsLabels):
    def training_step(self, batch, batch_idx):
        batch["x"].mul_(0.5)
        batch["labels"] = 2 - batch["labels"]
        return F.cross_entropy(self.net(batch["x"]), batch["labels"])


class PerturbsItsInput(Classifier):
    """Adversarial training: a backward of the step's own, whose gradients stay in ``.grad``."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x.clone().requires_grad_()
        F.cross_entropy(self.net(x), y).backward()
        return F.cross_entropy(self.net((x + 0.1 * x.grad.sign()).detach()), y)


class Permutes(Classifier):
    def training_step(self, batch, batch_idx):
        x, y = batch
        order = x.norm(dim=1).argsort(descending=True)
        return F.cross_entropy(self.net(x[order]), y[order])


class Vmapped(Classifier):
    def training_step(self, batch, batch_idx):
        return torch.func.vmap(lambda x, y: F.cross_entropy(self.net(x), y))(*batch).mean()


class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x > 0).float()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class StraightThrough(nn.Module):
    def forward(self, x):
        return Through.apply(x)


class HooksThatReturn(Classifier):
    """Gradient reversal by a backward hook, a forward hook that scales, a straight-through estimator."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(6, 5), StraightThrough(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)))
        self.net[2].register_full_backward_hook(lambda layer, inputs, outputs: (-inputs[0],))
        self.net[4].register_forward_hook(lambda layer, inputs, output: 2 * output)


class SpectralLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.w = nn.Parameter(torch.randn(5, dtype=torch.cfloat) * 0.3)

    def forward(self, x):
        return self.out(torch.fft.irfft(torch.fft.rfft(torch.tanh(self.inp(x))) * self.w, n=8))


def parametrized():
    layers = [parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Tanh(), parametrizations.weight_norm(nn.Linear(5, 5))]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(5, 3))


def normalised_by_hook():
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3))


class HoldsNothing(nn.Module):
    """Has tensors of no entries, as a graph network has for what its data does not give."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.states, self.offsets = nn.Parameter(torch.zeros(0, 4)), nn.Linear(6, 0)
        self.register_buffer("mean", torch.zeros(0))

    def forward(self, x):
        return self.net(x) + self.states.sum() + self.mean.sum() + self.offsets(x).sum()


class Unknown(Classifier):
    """Buffers that hold nothing finite: a threshold that is not known yet, extremes before the first value, a mask."""

    def __init__(self):
        super().__init__()
        self.register_buffer("threshold", torch.tensor(float("nan")))
        self.register_buffer("lowest", torch.tensor(float("inf")))
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))

    def on_train_epoch_end(self):
        self.lowest = torch.tensor(float("-inf")) if self.current_epoch else torch.tensor(float("nan"))


class Empty(Classifier):
    def __init__(self):
        super().__init__(HoldsNothing())


def trained(tmp_path, make, loader, *callbacks, **options):
    torch.manual_seed(0)
    module, trainer = make(), quiet_trainer(tmp_path, *callbacks, max_epochs=3, **options)
    torch.manual_seed(1)
    trainer.fit(module, loader)
    return module, trainer


def twice(tmp_path, make, data=DATA, collate=None, **options):
    """The module and Trainer of a run that is recorded, whose state is that of the same run without the callback."""
    with_it, without = (DataLoader(data, 8, shuffle=True, collate_fn=collate) for _ in range(2))
    alone, _ = trained(tmp_path, make, without, **options)
    module, trainer = trained(tmp_path, make, with_it, SourceCallback(str(tmp_path / "run")), **options)
    pairs = zip(alone.state_dict().values(), module.state_dict().values(), strict=True)
    assert all(torch.allclose(p, q, rtol=0, atol=0, equal_nan=True) for p, q in pairs)
    return module, trainer


def products(module, examples) -> Tensor:
    """Of single examples' gradients, ``[N, N]``."""
    module.train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    rows = gradient_rows((module.training_step(example, 0) for example in examples), parameters)
    return rows @ rows.T


def check(scores, expected, rates) -> None:
    assert float((scores - rates * expected).norm() / (rates * expected).norm()) < 1e-3


@pytest.mark.filterwarnings("ignore:A batch's rows are not its examples", "ignore:No loss in", "ignore:No batch tells")
@pytest.mark.parametrize(
    ("make", "collate"),
    [
        (Auxiliary, None),
        (DictionaryOfLosses, None),
        (TakesItsLabels, named),
        (WritesIntoItsBatch, named),
        (PerturbsItsInput, None),
        (Permutes, None),
        (Vmapped, None),
        (HooksThatReturn, None),
        (Empty, None),
        (Unknown, None),
    ],
)
def test_scores_are_those_of_the_step_as_it_is(tmp_path, make, collate):
    module, trainer = twice(tmp_path, make, collate=collate)
    module.zero_grad()
    query = DataLoader(DATA, 8, collate_fn=collate)
    scores = trainer.attribute(query, method="grad-dot").values
    assert all(p.grad is None for p in module.parameters())
    singles = [(collate or torch.utils.data.default_collate)([example]) for example in DATA]
    check(scores, products(module, singles), 0.1 * trainer.global_step / len(DATA))
    assert torch.equal(trainer.attribute(query, method="grad-dot").values, scores)


@pytest.mark.filterwarnings("ignore:A batch's rows are not its examples")
def test_rows_of_packed_sequences_belong_to_their_examples(tmp_path):
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(24, 4, 4, generator=generator), torch.randint(3, (24, 4), generator=generator))
    module, trainer = twice(tmp_path, PackedRows, data)
    scores = trainer.attribute(DataLoader(data, 8), method="grad-dot").values
    check(scores, products(module, [(x[None], y[None]) for x, y in data]), 0.1 * trainer.global_step / 24)


@pytest.mark.filterwarnings("ignore:A batch's rows are not its examples")
@pytest.mark.parametrize("net", [parametrized, normalised_by_hook, SpectralLayer])
def test_weights_that_are_made_of_others_are_scored_or_named(tmp_path, net):
    """Spectral and weight normalisation, as parametrizations and as the older hook; complex weights."""
    module, trainer = twice(tmp_path, lambda: Classifier(net()))
    scores = trainer.attribute(DataLoader(DATA, 24), method="grad-dot")
    with trainer.callbacks[0].scorer(trainer) as scorer:
        coverage = scorer.run.coverage
    assert coverage.left_out or coverage.share == 1
    if not coverage.left_out:
        check(scores.values, products(module, SINGLES), 0.1 * trainer.global_step / 24)
    assert trainer.attribute(DataLoader(DATA, 24)).values.isfinite().all()


class FreezesInItsStep(Classifier):
    """Its first layer stands still for one epoch of three, and the optimizer holds everything."""

    def training_step(self, batch, batch_idx):
        self.net[0].requires_grad_(self.current_epoch > 0)
        return super().training_step(batch, batch_idx)


def test_a_layer_that_the_step_freezes_counts_for_the_steps_that_moved_it(tmp_path):
    module, trainer = twice(tmp_path, FreezesInItsStep)
    scores = trainer.attribute(DataLoader(DATA, 24), method="grad-dot").values
    module.requires_grad_(True)
    plain = Classifier(module.net)
    parts = []
    for layer in (0, 2):
        module.requires_grad_(False)
        module.net[layer].requires_grad_(True)
        parts.append(products(plain, SINGLES))
    check(scores, 6 * parts[0] + 9 * parts[1], 0.1 / len(DATA))


class ClimbsFirst(Classifier):
    """Sharpness-aware minimisation by hand: climb, a second backward there, back, step."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        parameters = [p for p in self.parameters() if p.grad is not None]
        with torch.no_grad():
            climbs = [0.05 * p.grad / p.grad.norm() for p in parameters]
            for p, climb in zip(parameters, climbs, strict=True):
                p.add_(climb)
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        with torch.no_grad():
            for p, climb in zip(parameters, climbs, strict=True):
                p.sub_(climb)
        optimizer.step()
        return loss


def test_sharpness_aware_steps_by_hand(tmp_path):
    """To 20 %: the applied gradient is that of the place climbed to, the scores' that of the recorded parameters."""
    module, trainer = twice(tmp_path, ClimbsFirst)
    scores = trainer.attribute(DataLoader(DATA, 24), method="grad-dot").values
    expected = 0.1 * trainer.global_step / 24 * products(Classifier(module.net), SINGLES)
    assert float((scores - expected).norm() / expected.norm()) < 0.2


class TakesAnyBatchSize(Classifier):
    batch_size = 2

    def train_dataloader(self):
        return DataLoader(classes(48), self.batch_size, shuffle=True)


def test_trial_fits_of_a_search_for_the_batch_size_are_not_recorded(tmp_path):
    def run(*callbacks):
        find = BatchSizeFinder(max_trials=3, steps_per_trial=2, init_val=2)
        return trained(tmp_path, TakesAnyBatchSize, None, find, *callbacks)

    (alone, plain), (module, trainer) = run(), run(SourceCallback(str(tmp_path / "run")))
    assert all(torch.equal(p, q) for p, q in zip(alone.parameters(), module.parameters(), strict=True))
    scores = trainer.attribute(DataLoader(classes(48), 24), method="grad-dot").values
    check(scores, products(module, [(x[None], y[None]) for x, y in classes(48)]), 0.1 * plain.global_step / 48)


class Centralised(torch.optim.SGD):
    """Passes for its parent by ``isinstance`` and takes other steps."""

    def step(self, closure=None):
        loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad - p.grad.mean(), alpha=-0.01 * group["lr"])
        return loss


def test_a_subclass_of_a_known_optimizer_with_a_step_of_its_own_does_not_pass_for_it(tmp_path):
    with pytest.warns(UserWarning, match="Centralised"):
        twice(tmp_path, lambda: Classifier(optimizer=lambda ps: Centralised(ps, lr=0.1)))


class HardExamples(Classifier):
    """The mean of the larger half of a batch's losses: an example counts by those beside it."""

    def training_step(self, batch, batch_idx):
        each = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        return each.topk(max(1, len(each) // 2)).values.mean()


def test_losses_of_the_hardest_examples_are_refused(tmp_path):
    _, trainer = twice(tmp_path, HardExamples)
    with pytest.raises(MisconfigurationException, match="neither as a mean nor as a sum over the batch"):
        trainer.attribute(DataLoader(DATA, 8))


class Tasks(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(6, 5), nn.ModuleDict({"a/b ü": nn.Linear(5, 3), "mean": nn.Linear(5, 3)})

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        return self.heads["a/b ü"](hidden) + self.heads["mean"](hidden)


def test_names_of_layers_and_paths_may_hold_anything(tmp_path):
    path = tmp_path / "my run (ü) 100%" / "a b"
    module, trainer = trained(tmp_path, lambda: Classifier(Tasks()), DataLoader(DATA, 8), SourceCallback(str(path)))
    scores = trainer.attribute(DataLoader(DATA, 24), method="grad-dot").values
    check(scores, products(module, SINGLES), 0.1 * trainer.global_step / 24)
    here = trainer.attribute(DataLoader(DATA, 24)).values
    assert torch.equal(SourceScorer.from_run(path, Classifier(Tasks())).score(DataLoader(DATA, 24), DATA).values, here)
