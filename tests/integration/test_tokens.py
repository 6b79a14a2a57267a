"""Language models and embeddings from end to end: what no score of them may depend on."""

import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, classes, close, fitted, gradient_rows
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import TensorDataset


class GPT(nn.Module):
    """Two layers, causal; the head is tied to the token embedding."""

    def __init__(self, vocabulary=13, width=8, length=6, encoder=True):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        x = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.layers(x, mask=mask, is_causal=True))


def language_loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def text(examples, seed=0):
    ids = torch.randint(13, (examples, 7), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(ids[:, :-1], ids[:, 1:])


METHODS = ["source", "fast-source", "influence", "tracin", "grad-dot", "grad-cos"]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_small_gpt_from_end_to_end(tmp_path, optimizer):
    module = Classifier(GPT(), language_loss, lambda parameters: optimizer(parameters, lr=0.01))
    trainer = fitted(tmp_path, module, text(12), batch_size=4, segments=2, snapshots_per_segment=1)
    query = [x[:3] for x in text(4, seed=1).tensors]
    with trainer.callbacks[0].scorer(trainer) as scorer:
        assert scorer.run.coverage.share >= 0.99, scorer.run.coverage.summary()
    for method in METHODS:
        one = trainer.attribute(query, method=method, batch_size=1).values
        many = trainer.attribute(query, method=method, batch_size=12).values
        assert one.shape == (3, 12)
        close(one, many, 1e-4)
        assert many.abs().max() > 0


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_embedding_from_end_to_end(tmp_path, optimizer):
    """Columns of unused tokens never matter: the same scores as one query at a time, and as self-influence."""
    net = nn.Sequential(nn.Embedding(40, 6), nn.Flatten(), nn.Tanh(), nn.Linear(30, 3))
    module = Classifier(net, optimizer=lambda parameters: optimizer(parameters, lr=0.05))
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randint(40, (16, 5), generator=generator), torch.randint(3, (16,), generator=generator))
    trainer = fitted(tmp_path, module, data, segments=2, snapshots_per_segment=2)
    for method in METHODS:
        together = trainer.attribute(data, method=method).values
        single = [trainer.attribute([x[i : i + 1] for x in data.tensors], method=method).values for i in (0, 5)]
        close(torch.cat(single), together[[0, 5]])
    with trainer.callbacks[0].scorer(trainer) as scorer:
        own = scorer.self_influence()
    full = trainer.attribute(data, removal="few").values
    close(own, full.diagonal())


def test_an_embedding_is_the_linear_layer_of_its_one_hot_rows(tmp_path):
    """Every method gives the scores of a linear layer without bias that sees one-hot rows."""
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(9, (16, 5), generator=generator), torch.randint(3, (16,), generator=generator)
    start = torch.randn(6, 9, generator=generator)
    scores = []
    for inputs in (ids, F.one_hot(ids, 9).float()):
        torch.manual_seed(3)
        first = nn.Embedding(9, 6) if inputs is ids else nn.Linear(9, 6, bias=False)
        first.weight.data = (start.T if inputs is ids else start).clone()
        torch.manual_seed(3)
        net = nn.Sequential(first, nn.Flatten(), nn.Tanh(), nn.Linear(30, 3))
        torch.manual_seed(3)
        trainer = fitted(
            tmp_path / str(len(scores)), Classifier(net), TensorDataset(inputs, labels), curvature="diagonal"
        )
        scores.append({m: trainer.attribute([inputs[:4], labels[:4]], method=m).values for m in METHODS})
    for method in METHODS:
        one, two = (score[method] for score in scores)
        close(one, two)


@pytest.fixture
def small_gpt(tmp_path):
    module = Classifier(GPT(), language_loss, lambda parameters: torch.optim.AdamW(parameters, lr=0.01))
    return fitted(tmp_path, module, text(12), batch_size=4, segments=2, snapshots_per_segment=2)


@pytest.mark.check("architecture", "a GPT, token by token", "parts sum to the pair's score")
@pytest.mark.parametrize("measurement", ["loss", "log-prob", "margin"])
@pytest.mark.parametrize("method", ["source", "fast-source", "influence", "tracin", "grad-dot"])
def test_tokens_of_a_pair_sum_to_its_score(small_gpt, measurement, method):
    queries = text(4, seed=1)
    with small_gpt.callbacks[0].scorer(small_gpt, measurement) as scorer:
        whole = scorer.score(queries, method=method).values
        parts = scorer.tokens(queries, 7, row=2, method=method)
        assert parts.shape == (6, 6)
        assert (parts.sum() - whole[2, 7]).abs() < 1e-5 * parts.norm()  # in which tokens may cancel
        scorer.memory = 0  # one element after another
        close(scorer.tokens([x[2:3] for x in queries.tensors], 7, method=method), parts, 1e-4)


def test_a_part_is_the_product_of_two_tokens_gradients(small_gpt):
    """By autograd on the loss of each token alone."""
    queries = text(4, seed=1)
    module = small_gpt.lightning_module.eval()
    parameters = [*module.parameters()]

    def rows(data, index):
        x, y = data[index]
        each = (F.cross_entropy(module.net(x[None])[0], y, reduction="none")[t] / len(y) for t in range(len(y)))
        return gradient_rows(each, parameters)

    with small_gpt.callbacks[0].scorer(small_gpt) as scorer:
        parts = scorer.tokens(queries, 7, row=2, method="grad-dot")
    products = rows(queries, 2) @ rows(text(12), 7).T
    close(parts, (parts * products).sum() / products.square().sum() * products, 1e-4)


def test_what_has_no_tokens_is_refused(small_gpt):
    queries = text(4, seed=1)
    with small_gpt.callbacks[0].scorer(small_gpt) as scorer:
        with pytest.raises(MisconfigurationException, match=r'"grad-cos"` are not sums over the elements.*HINT'):
            scorer.tokens(queries, 7, method="grad-cos")
        with pytest.raises(MisconfigurationException, match=r"no example 4 among 4"):
            scorer.tokens(queries, 7, row=4)
        with pytest.raises(MisconfigurationException, match=r"12 training examples"):
            scorer.tokens(queries, 12)
    with small_gpt.callbacks[0].scorer(small_gpt, lambda module, batch: module.net(batch[0])[:, 0, 0]) as scorer:  # noqa: SIM117
        with pytest.raises(MisconfigurationException, match="a callable measurement has no elements"):
            scorer.tokens(queries, 7)


def test_a_loss_that_is_known_as_a_whole_has_no_tokens(tmp_path):
    module = Classifier(loss=lambda outputs, labels: (outputs - F.one_hot(labels, 3)).abs().pow(1.5).mean())
    trainer = fitted(tmp_path, module)
    with trainer.callbacks[0].scorer(trainer) as scorer, pytest.raises(MisconfigurationException, match="as a whole"):
        scorer.tokens(classes(), 0)
