"""Losses over rows that a mask picks out of the batch: each row is its own example's."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from checks import measured
from helpers import fitted
from torch import nn
from torch.utils.data import TensorDataset

from lightning_source.capture.coverage import find_blocks
from lightning_source.capture.layer_gradients import GradientCapture
from lightning_source.capture.masked_rows import by_owner, owners_of
from lightning_source.capture.objective import Objective
from lightning_source.capture.probe import probe

EXAMPLES, LENGTH, CLASSES = 4, 5, 7
# Rows are fewer than examples times length, not sorted by how many there are, and as many as twice the examples: their
# number does not tell whose they are.
MASK = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 1]]).bool()


class Tagger(L.LightningModule):
    """A label for each unmasked token, by one of the ways to write that."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.tokens, self.body = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.head = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, CLASSES))

    def training_step(self, batch, batch_idx):
        ids, labels, mask = batch
        return self.way(self, self.body(self.tokens(ids)).tanh(), labels, mask)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def ignored(m, h, labels, mask):
    return F.cross_entropy(m.head(h).transpose(1, 2), labels.masked_fill(~mask, -100))


def logits_by_mask(m, h, labels, mask):
    return F.cross_entropy(m.head(h)[mask], labels[mask])


def hidden_by_mask(m, h, labels, mask):
    return F.cross_entropy(m.head(h[mask]), labels[mask])


def flat_by_mask(m, h, labels, mask):
    return F.cross_entropy(m.head(h.flatten(0, 1)[mask.flatten()]), labels[mask])


def by_indices(m, h, labels, mask):
    rows, places = mask.nonzero(as_tuple=True)
    return F.cross_entropy(m.head(h[rows, places]), labels[rows, places])


def shuffled(m, h, labels, mask):
    rows, places = mask.nonzero().flip(0).unbind(1)
    return F.cross_entropy(m.head(h[rows - len(mask), places]), labels[rows, places])


def summed(m, h, labels, mask):
    return F.cross_entropy(m.head(h[mask]), labels[mask], reduction="none").sum() / mask.sum()


def tied_by_mask(m, h, labels, mask):
    """The table of tokens again as the head, as in masked language models."""
    return F.cross_entropy(F.linear(h[mask], m.tokens.weight), labels[mask])


WAYS = [logits_by_mask, hidden_by_mask, flat_by_mask, by_indices, shuffled, summed, tied_by_mask]


def batch_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(11, (EXAMPLES, LENGTH), generator=generator),
        torch.randint(CLASSES, (EXAMPLES, LENGTH), generator=generator),
        MASK,
    )


@pytest.mark.check("loss", "rows picked by a mask, {way}", "gradients")
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_single_examples(way):
    module, batch = Tagger(way).eval(), batch_of()
    objective = Objective(module)
    coverage = probe(module, objective, find_blocks(module, [list(module.parameters())]), batch, EXAMPLES)
    assert coverage.left_out == ()
    assert not any(block.free for block in coverage.blocks)
    recording = GradientCapture(module, coverage.blocks)
    losses = objective.evaluate(batch, EXAMPLES, recording)
    captured = recording.captured(losses.each(), EXAMPLES)
    named = dict(module.named_parameters())
    for index in range(EXAMPLES):
        share = MASK[index].sum() / MASK.sum()
        loss = share * module.training_step(tuple(x[index : index + 1] for x in batch), 0)
        found = dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))
        for block in coverage.blocks:
            if found[block.parameters[0]] is None:
                assert way is tied_by_mask
                assert block.name not in captured
                continue
            expected = block.matrix(found)
            error = (captured[block.name].per_example()[:, index] - expected).norm() / expected.norm()
            assert error <= 1e-4, block.name
            measured(error)


@pytest.mark.check("loss", "rows picked by a mask, {way}", "scores of the loss with ignore_index")
@pytest.mark.parametrize("way", [logits_by_mask, hidden_by_mask, summed])
def test_scores_are_those_of_ignored_labels(way, tmp_path):
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(size, (16, LENGTH), generator=generator) for size in (11, CLASSES))
    masks = torch.rand(16, LENGTH, generator=generator) < 0.5
    masks[:, 0] = True
    data = TensorDataset(ids, labels, masks)
    query = [x[:3] for x in data.tensors]
    found, sampled = [], []
    for name, one in (("ignored", ignored), ("picked", way)):
        torch.manual_seed(0)
        trainer = fitted(tmp_path / name, Tagger(one), data, batch_size=4)
        scores = [trainer.attribute(query, method="tracin", measurement=m) for m in ("loss", "margin", "log-prob")]
        found.append([one.values for one in scores])
        sampled.append(trainer.attribute(query, removal="few").values)
    for expected, scores in zip(*found, strict=True):
        error = (scores - expected).abs().max() / expected.abs().max()
        assert error <= 1e-4
        measured(error)
    # Curvature knows both by labels drawn from the model, of which ignored tokens use some.
    correlation = torch.corrcoef(torch.stack([scores.flatten() for scores in sampled]))[0, 1]
    assert correlation > 0.99


def test_rows_of_no_mask_have_no_owners():
    h = torch.randn(EXAMPLES, LENGTH, 3, requires_grad=True)
    table = torch.randn(EXAMPLES, 3, requires_grad=True)
    assert owners_of(h.flatten(0, 1) * 2, EXAMPLES) is None
    assert owners_of(h.sum(), EXAMPLES) is None
    assert owners_of(table[torch.tensor([0, 0, 3])], EXAMPLES) is None  # a lookup, not a choice of examples
    assert owners_of(h.detach()[MASK], EXAMPLES) is None


def test_rows_of_owners_are_filled_up():
    values, owners = torch.arange(1.0, 6.0), torch.tensor([2, 0, 2, 2, 0])
    assert torch.equal(by_owner(values, owners, 3), torch.tensor([[2.0, 5.0, 0.0], [0.0] * 3, [1.0, 3.0, 4.0]]))
    assert by_owner(values[:0], owners[:0], 3).shape == (3, 0)
