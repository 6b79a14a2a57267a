"""The batched retrainer against a plain loop over copies, written out here step by step."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import mlp
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_source.evaluation.batched import PerCopy, measure_copies, retrain_batched, train_batched

N, Q, CLASSES = 22, 5, 3


@pytest.fixture(autouse=True)
def _double():
    """In double precision, batched and plain arithmetic differ by round-off alone."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class TextEncoder(nn.Module):
    """Embedding, attention and normalisation."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens):
        return self.head(self.block(self.words(tokens)).mean(1))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, CLASSES)
    )


def loss(network, inputs, labels):
    return F.cross_entropy(network(inputs), labels)


def losses(network, inputs, labels):
    return F.cross_entropy(network(inputs), labels, reduction="none")


def data(kind):
    generator = torch.Generator().manual_seed(1)
    shape = {"mlp": (6,), "convolution": (1, 6, 6)}.get(kind)
    count = N + Q
    inputs = (
        torch.randn(count, *shape, generator=generator) if shape else torch.randint(11, (count, 7), generator=generator)
    )
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return [inputs[:N], labels[:N]], [inputs[N:], labels[N:]]


BUILD = {"mlp": mlp, "convolution": convolutional, "attention": TextEncoder}
SGD = partial(torch.optim.SGD, lr=0.2, momentum=0.9, weight_decay=0.01, nesterov=True)
RECIPES = {
    "mlp, SGD": ("mlp", SGD, {}),
    "mlp, Adam, schedule": (
        "mlp",
        partial(torch.optim.Adam, lr=0.05, amsgrad=True),
        {"schedule": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=12)},
    ),
    "mlp, last batch left out": ("mlp", SGD, {"drop_last": True}),
    "batch normalisation": ("convolution", SGD, {}),
    "attention, AdamW": ("attention", partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1), {}),
}


def one_by_one(build, train, query, kept, seeds, optimizer, epochs, batch_size, drop_last=False, schedule=None):
    """Each copy alone, as anyone would train it."""
    rows = []
    for row, seed in zip(kept, seeds, strict=True):
        torch.manual_seed(seed)
        network = build()
        stepper = optimizer(list(network.parameters()))
        scheduler = schedule(stepper) if schedule else None
        ids, generator = row.nonzero().flatten(), torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order = ids[torch.randperm(len(ids), generator=generator)]
            for batch in order.split(batch_size):
                if drop_last and len(batch) < batch_size:
                    continue
                stepper.zero_grad()
                loss(network, *(t[batch] for t in train)).backward()
                stepper.step()
                if scheduler is not None:
                    scheduler.step()
        network.eval()
        rows.append(losses(network, *query).detach())
    return torch.stack(rows)


def subsets(copies, share=0.5, seed=0):
    ranks = torch.rand(copies, N, generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
    return ranks < int(share * N)


@pytest.mark.parametrize("recipe", RECIPES)
def test_equals_the_plain_loop(recipe):
    kind, optimizer, options = RECIPES[recipe]
    train, query = data(kind)
    settings = {"optimizer": optimizer, "epochs": 3, "batch_size": 4} | options
    kept, seeds = subsets(4), [3, 1, 4, 1]
    found = retrain_batched(BUILD[kind], loss, losses, train, query, kept, seeds, **settings)
    expected = one_by_one(BUILD[kind], train, query, kept, seeds, **settings)
    assert found.std(0).min() > 1e-3  # the copies did become different
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_chunks_and_subsets_of_other_sizes():
    """A copy's result is its own: neither its neighbours nor the memory change it."""
    train, query = data("mlp")
    kept = torch.cat([subsets(3), subsets(3, 0.8)])[torch.tensor([0, 3, 1, 4, 5, 2])]
    settings = {"optimizer": SGD, "epochs": 3, "batch_size": 4}
    found = retrain_batched(mlp, loss, losses, train, query, kept, range(6), **settings, memory=1)
    together = retrain_batched(mlp, loss, losses, train, query, kept, range(6), **settings)
    torch.testing.assert_close(found, together, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        together, one_by_one(mlp, train, query, kept, range(6), **settings), rtol=1e-8, atol=1e-8
    )


def test_labels_of_each_copy():
    train, query = data("mlp")
    own = torch.randint(CLASSES, (3, N), generator=torch.Generator().manual_seed(5))
    kept = subsets(3)
    settings = {"optimizer": SGD, "epochs": 2, "batch_size": 4}
    found = retrain_batched(mlp, loss, losses, [train[0], PerCopy(own)], query, kept, range(3), **settings)
    for copy in range(3):
        alone = one_by_one(mlp, [train[0], own[copy]], query, kept[[copy]], [copy], **settings)
        torch.testing.assert_close(found[[copy]], alone, rtol=1e-8, atol=1e-8)


def test_stages():
    """A second training goes on from where the first ended, each copy from its own place."""
    train, query = data("convolution")
    kept, seeds = subsets(3), [5, 6, 7]
    settings = {"optimizer": SGD, "epochs": 2, "batch_size": 4}
    first = train_batched(convolutional, loss, train, kept, seeds, **settings)
    before = {name: value.clone() for name, value in first.items()}
    second = train_batched(convolutional, loss, train, kept, seeds, **settings, start=first, memory=1)
    found = measure_copies(convolutional(), second, losses, query)
    assert all(torch.equal(first[name], before[name]) for name in first)
    for copy, seed in enumerate(seeds):
        torch.manual_seed(seed)
        network = convolutional()
        ids = kept[copy].nonzero().flatten()
        for _ in range(2):  # each stage with a new optimizer and the seed's order again
            stepper, generator = SGD(list(network.parameters())), torch.Generator().manual_seed(seed)
            for _ in range(2):
                for batch in ids[torch.randperm(len(ids), generator=generator)].split(4):
                    stepper.zero_grad()
                    loss(network, *(t[batch] for t in train)).backward()
                    stepper.step()
        torch.testing.assert_close(found[copy], losses(network.eval(), *query).detach(), rtol=1e-8, atol=1e-8)


def test_dropout_differs_between_copies():
    """With the same seed, subset and order, only the masks can tell two copies apart."""

    def build():
        return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES))

    train, query = data("mlp")
    found = retrain_batched(
        build, loss, losses, train, query, torch.ones(2, N), [0, 0], optimizer=SGD, epochs=1, batch_size=4
    )
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_leaves_the_global_generator_alone():
    train, query = data("mlp")
    before = torch.get_rng_state()
    retrain_batched(mlp, loss, losses, train, query, subsets(2), [0, 1], optimizer=SGD, epochs=1, batch_size=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_refusals():
    train, query = data("mlp")
    run = partial(retrain_batched, mlp, loss, losses, train, query, epochs=1, batch_size=4)
    with pytest.raises(MisconfigurationException, match=r"must be \[copies, examples\]"):
        run(subsets(2)[:, :-1], [0, 1], optimizer=SGD)
    with pytest.raises(MisconfigurationException, match="for 3 seeds"):
        run(subsets(2), [0, 1, 2], optimizer=SGD)
    with pytest.raises(MisconfigurationException, match="leaves it no batch"):
        run(torch.zeros(2, N), [0, 1], optimizer=SGD)
    with pytest.raises(MisconfigurationException, match="`LBFGS` does not work element by element"):
        run(subsets(2), [0, 1], optimizer=torch.optim.LBFGS)
    with pytest.raises(FloatingPointError, match="2 of 2 copies"):
        run(subsets(2), [0, 1], optimizer=partial(torch.optim.SGD, lr=1e300))
