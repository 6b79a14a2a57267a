import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, fitted
from layers.singles import EXAMPLES, Apply, Net, compare, floats, tokens
from torch import nn
from torch.utils.data import TensorDataset

from lightning_source.capture import layer_gradients as capture
from lightning_source.capture.coverage import find_blocks
from lightning_source.capture.objective import Objective
from lightning_source.capture.probe import probe
from lightning_source.layers import free


def blocks(coverage):
    return {block.name: block.form for block in coverage.blocks}


class Patches(nn.Module):
    """A class token, positions and a learned scale, as in a vision transformer."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.positions = nn.Parameter(torch.randn(4, 6))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.one, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head((self.one(x).tanh() * self.scale.exp()).mean(1))


@pytest.mark.check("layer", "free parameters: class token, positions, scale", "gradients")
@pytest.mark.parametrize("at_once", [1, 3, 16])
def test_parameters_used_in_forward(monkeypatch, at_once):
    monkeypatch.setattr(capture, "EXAMPLES_AT_ONCE", at_once)
    coverage = compare(Patches(), floats(3, 6))
    assert {b.name: b.shape for b in coverage.blocks if b.free} == {
        "net.token": (1, 6, 1),
        "net.positions": (1, 24, 1),
        "net.scale": (1, 1, 1),
    }
    assert "a backward for each example, as they have no layer form: net.token, net.positions" in coverage.summary()


@pytest.mark.check("layer", "free parameter of a subclass of Linear", "gradients")
def test_a_parameter_beside_a_layers_own():
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(5, 3)
            self.gain = nn.Parameter(torch.rand(3))

        def forward(self, x):
            return super().forward(x) * self.gain

    coverage = compare(Apply(lambda m, x: m.one(x), one=Scaled()), floats(5))
    assert blocks(coverage) == {"net.one": "FunctionalLinearForm", "net.one.gain": "FreeForm"}


@pytest.mark.check("layer", "{kind}", "gradients")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_layers(kind, batch_first):
    def run(m, x):
        return m.head(m.one(x)[0][:, -1] if batch_first else m.one(x.transpose(0, 1))[0][-1])

    coverage = compare(Apply(run, one=kind(3, 4, batch_first=batch_first), head=nn.Linear(4, 2)), floats(5, 3))
    assert sum(block.free for block in coverage.blocks) == 4


class NoRule(torch.autograd.Function):
    """An operation whose backward cannot run for several examples at once."""

    @staticmethod
    def forward(context, x):
        return x * 2

    @staticmethod
    def backward(context, gradient):
        return gradient * (2 if float(gradient.sum()) < 1e30 else 0)


def test_an_operation_without_a_batching_rule():
    net = Apply(lambda m, x: m.head(NoRule.apply(x * m.scale)), scale=nn.Parameter(torch.rand(5)), head=nn.Linear(5, 2))
    compare(net, floats(5))


@pytest.mark.check("layer", "Embedding of positions", "gradients")
@pytest.mark.parametrize("length", [3, EXAMPLES])
@pytest.mark.parametrize("batched", [True, False])
def test_an_embedding_of_positions(length, batched):
    """One row for all examples, or none."""

    def run(m, x):
        places = torch.arange(length)
        return m.head((m.one(x) + m.two(places.unsqueeze(0) if batched else places)).tanh())

    net = Apply(run, one=nn.Embedding(11, 6), two=nn.Embedding(length, 6), head=nn.Linear(6, 2))
    assert blocks(compare(net, tokens(length))) == {
        "net.one": "EmbeddingForm",
        "net.two": "PositionsForm",
        "net.head": "LinearForm",
    }


@pytest.mark.check("layer", "free parameter beyond the size limit", "left out by name")
def test_what_is_too_large_is_left_out_by_name(monkeypatch):
    monkeypatch.setattr(free, "MAX_FREE", 10)
    coverage = compare(Patches(), floats(3, 6), share=0.7)
    assert coverage.left_out == (("net.positions", 24, "no layer form for Patches"),)


class Whole(Net):
    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return (self.net(inputs) - targets).square().sum()


def test_a_loss_known_only_as_a_whole_has_no_gradients_of_single_examples():
    module = Whole(Patches()).eval()
    found = find_blocks(module, [list(module.parameters())])
    coverage = probe(module, Objective(module), found, (floats(3, 6), floats(1)), EXAMPLES)
    assert blocks(coverage) == {"net.one": "LinearForm", "net.head": "LinearForm"}
    reason = "no layer form, and the losses of single examples are not known"
    assert [(name, why) for name, _, why in coverage.left_out] == [
        (f"net.{name}", reason) for name in ("token", "positions", "scale")
    ]


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
        torch.testing.assert_close(one, many, rtol=0, atol=1e-4 * float(many.abs().max()))
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
        torch.testing.assert_close(torch.cat(single), together[[0, 5]], rtol=0, atol=1e-5 * float(together.abs().max()))
    with trainer.callbacks[0].scorer(trainer) as scorer:
        own = scorer.self_influence()
    full = trainer.attribute(data).values
    torch.testing.assert_close(own, full.diagonal(), rtol=0, atol=1e-5 * float(full.abs().max()))


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
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5 * float(two.abs().max()))
