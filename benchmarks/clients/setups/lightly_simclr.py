"""SimCLR, as in lightly's example for Lightning: every other example of the batch is a negative.

The loss of an example does not exist without the others of its batch, so that scores for examples would have no
meaning; a refusal that says so is right.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
import torchvision
from images import views
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from setup import SetUp, seeded
from torch import nn
from torch.utils.data import DataLoader

NAME = "lightly: SimCLR"
REQUIREMENTS = ["torchvision==0.29.1", "segmentation-models-pytorch==0.6.0", "lightly==1.6.0", "scikit-learn"]
REFUSED = "depends on the other examples of its batch"


class SimCLR(L.LightningModule):
    """The example's module with the first blocks of its ResNet."""

    def __init__(self) -> None:
        super().__init__()
        resnet = torchvision.models.resnet18()
        self.backbone = nn.Sequential(*list(resnet.children())[:5], nn.AdaptiveAvgPool2d(1))
        self.projection_head = SimCLRProjectionHead(64, 32, 16)
        self.criterion = NTXentLoss()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.backbone(x).flatten(start_dim=1)
        return self.projection_head(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        (x0, x1) = batch[0]
        return self.criterion(self.forward(x0), self.forward(x1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.06)


def build(seed: int) -> SetUp:
    """Views of scikit-learn's digits, drawn once."""
    seeded(seed)
    return SetUp(SimCLR(), DataLoader(views(48), batch_size=16, shuffle=True, drop_last=True))
