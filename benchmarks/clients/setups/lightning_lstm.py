"""Lightning's demo of a recurrent language model, which carries its hidden state from batch to batch."""

from __future__ import annotations

from lightning.pytorch.demos.lstm import LightningLSTM, SequenceSampler, SimpleLSTM
from lightning.pytorch.demos.transformer import WikiText2
from setup import SetUp, seeded
from texts import words
from torch.utils.data import DataLoader, Subset

NAME = "Lightning demos: LSTM"
REQUIREMENTS = ["scikit-learn", "requests"]


def build(seed: int) -> SetUp:
    """The module, with fewer units than the demo's 512, and the demo's sampler of sequences that go on."""
    seeded(seed)
    words()
    data = WikiText2(download=False)
    module = LightningLSTM(vocab_size=data.vocab_size)
    module.model = SimpleLSTM(vocab_size=data.vocab_size, ninp=8, nhid=8, nlayers=1, dropout=0.0)
    few = Subset(data, range(40))
    return SetUp(module, DataLoader(few, batch_sampler=SequenceSampler(few, batch_size=8)), {"gradient_clip_val": 0.25})
