"""Lightning's smallest demo, whose loss ignores its data's labels, with the loader of its own."""

from __future__ import annotations

from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from setup import SetUp, seeded
from torch.utils.data import DataLoader

NAME = "Lightning demos: Boring"
REQUIREMENTS = ["scikit-learn", "requests"]


def build(seed: int) -> SetUp:
    """The module and its random data, which are drawn once so that two trainings are one."""
    seeded(seed)
    return SetUp(BoringModel(), DataLoader(RandomDataset(32, 64)))
