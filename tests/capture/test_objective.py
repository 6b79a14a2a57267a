"""The loss as the user wrote it, end to end: the same training written in two ways scores the same (method §4)."""

import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers import QUERY, Classifier, classes, close, fitted, mlp
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributions import Categorical, Normal
from torch.utils.data import TensorDataset

from lightning_source import SourceScorer
from lightning_source.capture.objective import Objective

N, B, T, OUTPUTS = 40, 8, 5, 3
DATA = classes(N)


class Step(Classifier):
    """A classifier whose training step is ``step(module, inputs, targets)``."""

    def __init__(self, step, lr=0.1):
        super().__init__(mlp(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr))
        self.step = step

    def training_step(self, batch, batch_idx):
        return self.step(self, *batch)


class WithoutIndex(Step):
    def training_step(self, batch):
        return self.step(self, *batch)


class AsDictionary(Step):
    def training_step(self, batch, batch_idx):
        return {"loss": self.step(self, *batch), "extra": 1}


class NamesDistribution(Step):
    def attribution_distribution(self, batch):
        return Categorical(logits=self.net(batch[0])), batch[1]


class NamesGaussian(Step):
    """Normal of variance ½: minus its log-density is the squared error plus a constant."""

    def attribution_distribution(self, batch):
        return Normal(self.net(batch[0]), 0.5**0.5), one_hot(batch[1])


class NamesLosses(Step):
    def attribution_losses(self, batch):
        return own_losses(self, batch)


def one_hot(y):
    return F.one_hot(y, OUTPUTS).to(torch.get_default_dtype())


def own_losses(module, batch):
    """Cross entropy that no recogniser knows, example by example."""
    return -module.net(batch[0]).log_softmax(-1)[range(len(batch[1])), batch[1]]


def ce(reduction="mean", scale=1.0, **options):
    return lambda m, x, y: scale * F.cross_entropy(m.net(x), y, reduction=reduction, **options)


def mse(reduction="mean", scale=1.0):
    return lambda m, x, y: scale * F.mse_loss(m.net(x), one_hot(y), reduction=reduction)


def by_hand(reduce, scale=1.0):
    return lambda m, x, y: scale * reduce(own_losses(m, (x, y)))


def gaussian_by_hand(reduce):
    return lambda m, x, y: reduce((m.net(x) - one_hot(y)) ** 2)


def unreduced(reduce):
    """The user's own reduction of torch's elements."""
    return lambda m, x, y: reduce(F.cross_entropy(m.net(x), y, reduction="none"), y)


def tokens(reduction="mean"):
    return lambda m, x, y: F.cross_entropy(m.net(x).transpose(1, 2), y, reduction=reduction)


def unreduced_tokens(reduce):
    """The user's own reduction of ``[B, T]`` elements, given where there is a token."""
    return lambda m, x, y: reduce(tokens("none")(m, x, y), (y >= 0).float())


def sentences(lengths):
    """Next-token data with targets padded by -100."""
    generator = torch.Generator().manual_seed(4)
    targets = torch.randint(OUTPUTS, (len(lengths), T), generator=generator)
    targets[torch.arange(T) >= torch.tensor(lengths).unsqueeze(1)] = -100
    return TensorDataset(torch.randn(len(lengths), T, 6, generator=generator), targets)


MIXED = sentences([1 + 3 * i % T for i in range(N)])
# As a dataset sorted by length has it: the first examples do not look like the later ones.
LONG_FIRST = sentences([T] * 16 + [1] * (N - 16))
BY_CLASS = TensorDataset(*(x[DATA.tensors[1].argsort()] for x in DATA.tensors))


def run(path, step, lr=0.1, kind=Step, data=DATA, **options):
    """A fit that differs from another only by what is given here."""
    torch.manual_seed(0)
    defaults = {"batch_size": B, "snapshots_per_segment": 1, "max_epochs": 1}
    return fitted(path, kind(step, lr), data, **(defaults | options))


CE = ce()
# (one way, its learning rate), (another way, its learning rate)
SAME = {
    "mean at ηB, sum at η": ((CE, 0.1), (ce("sum"), 0.1 / B)),
    "MSE at η, half of it at 2η": ((mse(), 0.1), (mse(scale=0.5), 0.2)),
    "three times the loss at a third of the rate": ((CE, 0.1), (ce(scale=3.0), 0.1 / 3)),
    "unreduced, then mean": ((CE, 0.1), (unreduced(lambda e, y: e.mean()), 0.1)),
    "unreduced, then sum": ((ce("sum"), 0.01), (unreduced(lambda e, y: e.sum()), 0.01)),
    "unreduced, then masked mean": (
        (ce(ignore_index=0), 0.1),
        (unreduced(lambda e, y: (e * (y != 0)).sum() / (y != 0).sum()), 0.1),
    ),
    "mean over examples of a sum over outputs": (
        (mse(scale=OUTPUTS), 0.1),
        (lambda m, x, y: mse("none")(m, x, y).sum(1).mean(), 0.1),
    ),
    "mean times the batch's size": ((ce("sum"), 0.01), (lambda m, x, y: CE(m, x, y) * len(x), 0.01)),
    "nll of a log-softmax": ((CE, 0.1), (lambda m, x, y: F.nll_loss(m.net(x).log_softmax(1), y), 0.1)),
    "legacy arguments": ((ce("sum"), 0.01), (ce(size_average=False), 0.01)),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.filterwarnings("ignore:size_average")
def test_one_training_written_in_two_ways_gives_the_same_scores(tmp_path, name):
    """Seeds are the same, so both draw the same labels; float32 rounding in two trainings costs about 1e-6."""
    runs = [run(tmp_path / str(i), step, lr) for i, (step, lr) in enumerate(SAME[name])]
    for method in ("source", "influence"):
        one, other = (trainer.attribute(QUERY, method=method, measurement=own_losses).values for trainer in runs)
        assert one.abs().max() > 0
        close(other, one, 1e-4)


@pytest.mark.parametrize("kind", [WithoutIndex, AsDictionary])
def test_the_signature_and_the_return_type_of_the_step_do_not_matter(tmp_path, kind):
    plain = run(tmp_path / "plain", CE).attribute(QUERY).values
    assert torch.equal(run(tmp_path / "other", CE, kind=kind).attribute(QUERY).values, plain)


# name: (kind of module, step, data).
STEPS = {
    "mean": (Step, CE, DATA),
    "sum": (Step, ce("sum"), DATA),
    "mean times 3": (Step, ce(scale=3.0), DATA),
    "class weight, smoothed": (Step, ce(weight=torch.tensor([0.2, 1.0, 5.0]), label_smoothing=0.2), DATA),
    "class weight, heavy class first": (Step, ce(weight=torch.tensor([9.0, 0.1, 0.1])), BY_CLASS),
    "two losses": (Step, lambda m, x, y: CE(m, x, y) + 0.3 * mse()(m, x, y), DATA),
    "mean and sum": (Step, lambda m, x, y: CE(m, x, y) + 0.1 * mse("sum")(m, x, y), DATA),
    "tokens": (Step, tokens(), MIXED),
    "tokens, long examples first": (Step, tokens(), LONG_FIRST),
    "tokens in rows": (Step, lambda m, x, y: F.cross_entropy(m.net(x.flatten(0, 1)), y.flatten()), MIXED),
    "tokens, sum": (Step, tokens("sum"), MIXED),
    "tokens, sum over the number of examples": (Step, lambda m, x, y: tokens("sum")(m, x, y) / len(x), MIXED),
    "tokens, masked mean": (Step, unreduced_tokens(lambda e, mask: (e * mask).sum() / mask.sum()), MIXED),
    "tokens, sum over their number": (Step, unreduced_tokens(lambda e, mask: e.sum() / mask.sum()), MIXED),
    "tokens, mean of examples' means": (
        Step,
        unreduced_tokens(lambda e, mask: (e.sum(1) / mask.sum(1)).mean()),
        MIXED,
    ),
    "tokens, mean of examples' masked means": (
        Step,
        unreduced_tokens(lambda e, mask: ((e * mask).sum(1) / mask.sum(1)).mean()),
        MIXED,
    ),
    "tokens, sum of examples' masked means": (
        Step,
        unreduced_tokens(lambda e, mask: ((e * mask).sum(1) / mask.sum(1)).sum()),
        MIXED,
    ),
    "by hand, mean": (Step, by_hand(torch.mean), DATA),
    "by hand, sum": (Step, by_hand(torch.sum), DATA),
    "by hand, mean times 3": (Step, by_hand(torch.mean, 3.0), DATA),
    "distribution named, mean": (NamesDistribution, by_hand(torch.mean), DATA),
    "distribution named, sum": (NamesDistribution, by_hand(torch.sum), DATA),
    "distribution named, mean times 3": (NamesDistribution, by_hand(torch.mean, 3.0), DATA),
    "distribution named, its density with a constant": (NamesGaussian, gaussian_by_hand(torch.mean), DATA),
    "distribution named, sum over outputs": (NamesGaussian, gaussian_by_hand(lambda e: e.sum(1).mean()), DATA),
    "losses named, mean": (NamesLosses, by_hand(torch.mean), DATA),
    "losses named, sum": (NamesLosses, by_hand(torch.sum), DATA),
}


def check_scale(tmp_path, step, data_part, kind=Step, data=DATA, lr=0.1):
    """In a run on full batches, gradients of the examples add up to that of the loss over the data.

    The scores of ``grad-dot`` then add up to ``Λ ⟨∇f, ∇J⟩``, here with one step, ``f`` the step's loss for a batch of
    the query alone, and for every batch size of the scoring passes.
    """
    trainer = run(tmp_path, step, lr, kind, data, batch_size=len(data), mode="deferred")
    module = trainer.lightning_module

    def gradient(examples):
        loss = data_part(module, *(x[examples] for x in data.tensors))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])

    expected = torch.stack([lr * gradient(slice(i, i + 1)) @ gradient(slice(None)) for i in range(3)])
    query = [x[:3] for x in data.tensors]
    for size in (1, 7, 64):
        close(trainer.attribute(query, method="grad-dot", batch_size=size).values.sum(1), expected, 1e-5)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.filterwarnings("ignore:No loss in")
def test_scores_are_at_the_scale_of_the_training_loss(tmp_path, name):
    kind, step, data = STEPS[name]
    check_scale(tmp_path, step, step, kind, data)


@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-5), ("bf16-true", 0.1)])
def test_scores_in_the_precision_of_training(tmp_path, precision, tolerance):
    """bfloat16 keeps 8 bits of parameters, activations and gradients; labels drawn otherwise add about 10 %."""
    single, other = (run(tmp_path / p, mse(), precision=p) for p in ("32-true", precision))
    for method, allowed in (("grad-dot", tolerance), ("source", 0.25)):
        close(other.attribute(QUERY, method=method).values, single.attribute(QUERY, method=method).values, allowed)


def test_a_penalty_on_the_weights_is_not_data(tmp_path):
    check_scale(tmp_path, lambda m, x, y: CE(m, x, y) + 0.1 * sum(p.square().sum() for p in m.parameters()), CE)


def test_scores_of_batches_of_different_lengths_do_not_depend_on_the_batch_size(tmp_path):
    trainer = run(tmp_path, tokens(), data=MIXED, max_epochs=2, snapshots_per_segment=2)
    for method in ("source", "influence"):
        one, many = (trainer.attribute(MIXED, method=method, batch_size=size).values for size in (1, 64))
        close(one, many, 1e-5)


def test_weights_that_a_batch_does_not_show_are_refused(tmp_path):
    """In ``Σ w ℓ / Σ w`` written by hand a batch of one hides its weight; ``weight=`` of torch's losses does not."""

    def step(m, x, y):
        weights = 1 + x[:, 0].square()
        return (weights * F.cross_entropy(m.net(x), y, reduction="none")).sum() / weights.sum()

    trainer = run(tmp_path, step, mode="deferred")
    with pytest.raises(MisconfigurationException, match="HINT"):
        trainer.attribute(QUERY)


WEIGHT = torch.tensor([0.2, 1.0, 5.0])
REPEATS, LARGE = 25, 100  # the data 25 times over in batches of 100: many draws in few passes
# name: (kind of module, step, the training risk of one example, B Σ_j s_j ℓ_j, as a function of its output and label).
CURVATURE = {
    "mean": (Step, CE, F.cross_entropy),
    "sum": (Step, ce("sum"), lambda z, y: LARGE * F.cross_entropy(z, y)),
    "mean times 3": (Step, ce(scale=3.0), lambda z, y: 3 * F.cross_entropy(z, y)),
    "half MSE": (Step, mse(scale=0.5), lambda z, y: 0.5 * F.mse_loss(z, one_hot(y))),
    "two losses": (
        Step,
        lambda m, x, y: CE(m, x, y) + 0.3 * mse()(m, x, y),
        lambda z, y: F.cross_entropy(z, y) + 0.3 * F.mse_loss(z, one_hot(y)),
    ),
    "class weight": (
        Step,
        ce(weight=WEIGHT),
        lambda z, y: WEIGHT[y] * F.cross_entropy(z, y) / WEIGHT[DATA.tensors[1]].mean(),
    ),
    "distribution named": (NamesDistribution, by_hand(torch.mean), F.cross_entropy),
    "distribution named, sum": (NamesDistribution, by_hand(torch.sum), lambda z, y: LARGE * F.cross_entropy(z, y)),
    "distribution named, its density with a constant": (
        NamesGaussian,
        gaussian_by_hand(torch.mean),
        lambda z, y: F.mse_loss(z, one_hot(y)),
    ),
}


def block_rows(gradients):
    """Gradients of weight, bias, weight, bias as the blocks hold them: ``[O, I + 1]`` each."""
    pairs = zip(gradients[::2], gradients[1::2], strict=True)
    return torch.cat([torch.cat([weight, bias.unsqueeze(1)], 1).flatten() for weight, bias in pairs])


@pytest.mark.parametrize("name", CURVATURE)
def test_curvature_is_the_gauss_newton_matrix_of_the_training_loss(tmp_path, name):
    """Its diagonal, from 100 draws for each of 40 examples: 1 to 3 % of statistical error in norm, 6 % allowed."""
    kind, step, risk = CURVATURE[name]
    data = TensorDataset(*(x.repeat(REPEATS, *[1] * (x.dim() - 1)) for x in DATA.tensors))
    trainer = run(
        tmp_path, step, 1e-3, kind, data, batch_size=LARGE, curvature="diagonal", label_samples=4, mode="deferred"
    )
    module = trainer.lightning_module
    opened = trainer.callbacks[0]._open(trainer, module)
    found = torch.cat([one.eigenvalues.flatten() for one in opened.final_factors().values()])
    expected = torch.zeros_like(found)
    for x, y in DATA:
        z = module.net(x)
        hessian = torch.autograd.functional.hessian(lambda z, y=y: risk(z, y), z.detach())
        gradients = [torch.autograd.grad(one, list(module.parameters()), retain_graph=True) for one in z]
        jacobian = torch.stack([block_rows(g) for g in gradients])  # [outputs, parameters]
        expected += (jacobian * (hessian @ jacobian)).sum(0) / N
    assert (found - expected).norm() < 0.06 * expected.norm()


def test_an_unknown_loss_warns_once_and_keeps_its_data_gradients(tmp_path):
    known = run(tmp_path / "known", CE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        unknown = run(tmp_path / "unknown", by_hand(torch.mean))
        scores = unknown.attribute(QUERY, measurement=own_losses)
        gradients = unknown.attribute(QUERY, method="grad-dot", measurement=own_losses).values
    assert len([w for w in caught if "No loss in `Step.training_step` was recognised" in str(w.message)]) == 1
    assert scores.metadata["fisher"] == "empirical"
    assert known.attribute(QUERY).metadata["fisher"] == "true"
    close(gradients, known.attribute(QUERY, method="grad-dot", measurement=own_losses).values, 1e-5)


@pytest.mark.parametrize(("kind", "fisher"), [(NamesDistribution, "true"), (NamesLosses, "empirical")])
def test_a_module_may_name_its_losses(tmp_path, kind, fisher):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="No loss in")
        trainer = run(tmp_path, by_hand(torch.mean), kind=kind)
    scores = trainer.attribute(QUERY)
    assert scores.metadata["fisher"] == fisher
    close(trainer.attribute(QUERY, measurement=own_losses).values, scores.values, 1e-5)
    if kind is NamesDistribution:
        close(trainer.attribute(QUERY, measurement="log-prob").values, -scores.values, 1e-5)


def test_empirical_curvature_of_named_losses_is_that_of_the_whole(tmp_path):
    """Both square the data's own gradients, so they agree exactly."""
    with pytest.warns(UserWarning, match="No loss in"):
        whole = run(tmp_path / "whole", by_hand(torch.sum)).attribute(QUERY, measurement=own_losses).values
    named = run(tmp_path / "named", by_hand(torch.sum), kind=NamesLosses)
    close(named.attribute(QUERY, measurement=own_losses).values, whole, 1e-5)


@pytest.mark.parametrize("batch_size", [8, OUTPUTS])
def test_a_loss_that_is_not_laid_out_by_example_is_scored_one_at_a_time(tmp_path, batch_size):
    """Elements ``[outputs, B]``: known by their shape, or, where that divides, because they mix examples."""
    with pytest.warns(UserWarning, match="rows are not its examples"):
        turned = run(tmp_path / "a", lambda m, x, y: F.mse_loss(m.net(x).T, one_hot(y).T), batch_size=batch_size)
    plain = run(tmp_path / "b", lambda m, x, y: F.mse_loss(m.net(x), one_hot(y)), batch_size=batch_size)
    close(turned.attribute(QUERY, method="tracin").values, plain.attribute(QUERY, method="tracin").values)


def test_a_step_that_hides_its_batches_is_refused():
    class Hidden(Classifier):
        def training_step(self, dataloader_iter):
            return None

    with pytest.raises(ValueError, match="hides the batches"):
        Objective(Hidden(mlp()))


def under_no_grad(module, batch):
    with torch.no_grad():
        return own_losses(module, batch)


# name: (step, measurement, what the error says).
WRONG = {
    "margin of a regression": (mse(), "margin", r"needs exactly one loss.*`mse_loss`"),
    "margin of an unknown loss": (by_hand(torch.mean), "margin", r"recognised: none"),
    "log-prob of two losses": (lambda m, x, y: CE(m, x, y) + mse()(m, x, y), "log-prob", r"exactly one loss"),
    "no such name": (CE, "accuracy", r"'accuracy'.*is not known"),
    "one value for all": (CE, lambda m, b: own_losses(m, b).mean(), r"a tensor \[4\]; it returned \[\]"),
    "a value per class": (CE, lambda m, b: m.net(b[0]), r"a tensor \[4\]; it returned \[4, 3\]"),
    "a number": (CE, lambda m, b: 1.0, r"it returned a float"),
    "under no_grad": (CE, under_no_grad, r"no gradient with respect to the model"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.filterwarnings("ignore:No loss in")
def test_wrong_measurements_are_named(tmp_path, name):
    step, measurement, message = WRONG[name]
    trainer = run(tmp_path, step, mode="deferred")
    with pytest.raises(MisconfigurationException, match=message):
        trainer.attribute(QUERY, measurement=measurement, method="grad-dot")


MADE = []  # no attribute, which passes would turn back


class MakesTensors(L.LightningModule):
    """A step that makes tensors of its own, in the dtype of the moment."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 3)

    def training_step(self, batch, batch_idx):
        weights = torch.ones(len(batch[0]))
        MADE.append(weights.dtype)
        return (weights * F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_passes_make_tensors_as_training_did(tmp_path, precision):
    MADE.clear()
    trainer = fitted(tmp_path, MakesTensors(), precision=precision)
    values = trainer.attribute(QUERY, method="grad-dot").values
    assert torch.get_default_dtype() == torch.float32
    other = MakesTensors().to(trainer.lightning_module.dtype)
    scorer = SourceScorer.from_run(tmp_path / "run", other)
    assert torch.equal(scorer.score(QUERY, classes(), method="grad-dot").values, values)
    assert set(MADE) == {trainer.lightning_module.dtype}
