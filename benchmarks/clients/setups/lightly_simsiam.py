"""SimSiam, as in lightly's example for Lightning: two views of an image, a predictor, no negatives."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
import torchvision
from images import views
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from setup import SetUp, seeded
from torch import nn
from torch.utils.data import DataLoader

NAME = "lightly: SimSiam"
REQUIREMENTS = ["torchvision==0.29.1", "segmentation-models-pytorch==0.6.0", "lightly==1.6.0", "scikit-learn"]


class SimSiam(L.LightningModule):
    """The example's module with the first blocks of its ResNet."""

    def __init__(self) -> None:
        super().__init__()
        resnet = torchvision.models.resnet18()
        self.backbone = nn.Sequential(*list(resnet.children())[:5], nn.AdaptiveAvgPool2d(1))
        self.projection_head = SimSiamProjectionHead(64, 32, 16)
        self.prediction_head = SimSiamPredictionHead(16, 8, 16)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        f = self.backbone(x).flatten(start_dim=1)
        z = self.projection_head(f)
        p = self.prediction_head(z)
        return z.detach(), p

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        (x0, x1) = batch[0]
        z0, p0 = self.forward(x0)
        z1, p1 = self.forward(x1)
        return 0.5 * (self.criterion(z0, p1) + self.criterion(z1, p0))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.06)


def build(seed: int) -> SetUp:
    """Views of scikit-learn's digits, drawn once."""
    seeded(seed)
    return SetUp(SimSiam(), DataLoader(views(48), batch_size=16, shuffle=True, drop_last=True))
