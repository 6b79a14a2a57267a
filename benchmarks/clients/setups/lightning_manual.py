"""Lightning's demo of manual optimization; on single examples, as in the demo, its training would diverge."""

from __future__ import annotations

from lightning.pytorch.demos.boring_classes import ManualOptimBoringModel, RandomDataset
from setup import SetUp, seeded
from torch.utils.data import DataLoader

NAME = "Lightning demos: ManualOptim"
REQUIREMENTS = ["scikit-learn", "requests"]


def build(seed: int) -> SetUp:
    """The module and its random data."""
    seeded(seed)
    return SetUp(
        ManualOptimBoringModel(),
        DataLoader(RandomDataset(32, 64), batch_size=16),
        loss=lambda module, batch: module.step(batch),
    )
