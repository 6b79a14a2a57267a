"""The image classifier of Lightning's basic examples: a backbone passed to the module, cross entropy, Adam."""

from __future__ import annotations

import lightning.pytorch as L
import torch
from images import digits
from setup import SetUp, seeded
from torch.nn import functional as F
from torch.utils.data import DataLoader

NAME = "Lightning examples: image classifier"
REQUIREMENTS = ["scikit-learn", "requests"]


class Backbone(torch.nn.Module):
    """Two linear layers on the flattened image, as in the example."""

    def __init__(self, hidden_dim: int = 32) -> None:
        super().__init__()
        self.l1 = torch.nn.Linear(64, hidden_dim)
        self.l2 = torch.nn.Linear(hidden_dim, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.l2(torch.relu(self.l1(x.view(x.size(0), -1)))))


class LitClassifier(L.LightningModule):
    """The module of the example."""

    def __init__(self, backbone: torch.nn.Module, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"])
        self.backbone = backbone

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone(x)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)


def build(seed: int) -> SetUp:
    """The module on scikit-learn's digits."""
    seeded(seed)
    return SetUp(LitClassifier(Backbone()), DataLoader(digits(96), batch_size=32, shuffle=True))
