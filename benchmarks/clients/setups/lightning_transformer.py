"""Lightning's demo of a sequence-to-sequence transformer, smaller, on words of a text of this project."""

from __future__ import annotations

from lightning.pytorch.demos.transformer import LightningTransformer, Transformer, WikiText2
from setup import SetUp, seeded
from texts import words
from torch.utils.data import DataLoader, Subset

NAME = "Lightning demos: Transformer"
REQUIREMENTS = ["scikit-learn", "requests"]


def build(seed: int) -> SetUp:
    """The module, with fewer units than the demo's 200, and blocks of 35 words, one a batch as in the demo."""
    seeded(seed)
    words()
    data = WikiText2(download=False)
    module = LightningTransformer(vocab_size=data.vocab_size)
    module.model = Transformer(vocab_size=data.vocab_size, ninp=16, nhead=2, nhid=16, nlayers=1)
    return SetUp(module, DataLoader(Subset(data, range(24))))
