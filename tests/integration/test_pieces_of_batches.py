"""Steps that cut their batch into pieces and add up the pieces' losses: accumulation within one ``training_step``.

The oracle is autograd on one example's loss at a time; an example weighs what it did in a training batch, whatever the
step makes of a batch of one.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, classes, gradient_rows, quiet_trainer
from torch.utils.data import DataLoader

from lightning_source import SourceCallback

BATCH, EPOCHS = 8, 3


def cross_entropy(outputs, labels):
    return F.cross_entropy(outputs, labels, label_smoothing=0.1)


def by_hand(outputs, labels):
    """No loss of torch's."""
    return ((outputs - F.one_hot(labels, 3)).abs() ** 1.5).mean()


def halves(x):
    return x[: len(x) // 2], x[len(x) // 2 :]


class InPieces(Classifier):
    """Each piece counts as one of the number of pieces that a batch should have, also where there are fewer."""

    def __init__(self, cut, expected, loss, manual):
        super().__init__(loss=loss)
        self.cut, self.expected = cut, expected
        self.automatic_optimization = not manual

    def training_step(self, batch, batch_idx):
        losses = [self.loss(self.net(x), y) / self.expected for x, y in zip(*map(self.cut, batch), strict=True)]
        if self.automatic_optimization:
            return sum(losses)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for loss in losses:
            self.manual_backward(loss)
        optimizer.step()
        return None


@pytest.mark.check("loss", "pieces of a batch, one loss each", "scores of single examples, at their weight in training")
@pytest.mark.parametrize(
    ("cut", "expected", "loss", "manual"),
    [
        (lambda x: x.chunk(4), 4, cross_entropy, True),
        (lambda x: x.chunk(4), 4, cross_entropy, False),
        (halves, 2, cross_entropy, True),  # an example alone leaves the first half empty
        (lambda x: x.chunk(4), 4, by_hand, False),
    ],
    ids=["chunks by hand", "chunks", "halves by hand", "an unknown loss"],
)
def test_an_example_weighs_what_it_did_in_its_training_batch(tmp_path, cut, expected, loss, manual):
    torch.manual_seed(0)
    module = InPieces(cut, expected, loss, manual)
    trainer = quiet_trainer(tmp_path, SourceCallback(str(tmp_path / "run")), max_epochs=EPOCHS)
    with pytest.warns(UserWarning, match="one at a time"):
        trainer.fit(module, DataLoader(classes(), BATCH))
    rows = gradient_rows((loss(module.net(x[None]), y[None]) for x, y in classes()), [*module.parameters()])
    lr = module.configure_optimizers().param_groups[0]["lr"]
    factor = lr * EPOCHS * len(classes()) / BATCH / len(classes())
    scores = trainer.attribute(list(classes().tensors), method="grad-dot").values
    # A query is a batch of one, whose only piece is one of those that there should have been.
    torch.testing.assert_close(scores, factor * rows @ rows.T / expected, rtol=1e-4, atol=1e-7)
    if loss is cross_entropy:  # one loss call on all of the batch, not one for each piece
        assert trainer.attribute(list(classes().tensors), measurement="log-prob").values.isfinite().all()
