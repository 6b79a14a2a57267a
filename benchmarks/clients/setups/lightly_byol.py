"""BYOL, as in lightly's example for Lightning: a momentum network that follows the trained one."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as L
import torch
import torchvision
from images import views
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils.scheduler import cosine_schedule
from setup import SetUp, seeded
from torch import nn
from torch.utils.data import DataLoader

NAME = "lightly: BYOL"
REQUIREMENTS = ["torchvision==0.29.1", "segmentation-models-pytorch==0.6.0", "lightly==1.6.0", "scikit-learn"]


class BYOL(L.LightningModule):
    """The example's module with the first blocks of its ResNet."""

    def __init__(self) -> None:
        super().__init__()
        resnet = torchvision.models.resnet18()
        self.backbone = nn.Sequential(*list(resnet.children())[:5], nn.AdaptiveAvgPool2d(1))
        self.projection_head = BYOLProjectionHead(64, 32, 16)
        self.prediction_head = BYOLPredictionHead(16, 32, 16)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.backbone(x).flatten(start_dim=1)
        z = self.projection_head(y)
        return self.prediction_head(z)

    def forward_momentum(self, x: torch.Tensor) -> torch.Tensor:
        y = self.backbone_momentum(x).flatten(start_dim=1)
        z = self.projection_head_momentum(y)
        return z.detach()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        momentum = cosine_schedule(self.current_epoch, 10, 0.996, 1)
        update_momentum(self.backbone, self.backbone_momentum, m=momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, m=momentum)
        (x0, x1) = batch[0]
        p0 = self.forward(x0)
        z0 = self.forward_momentum(x0)
        p1 = self.forward(x1)
        z1 = self.forward_momentum(x1)
        return 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.06)


def build(seed: int) -> SetUp:
    """Views of scikit-learn's digits, drawn once."""
    seeded(seed)
    return SetUp(BYOL(), DataLoader(views(48), batch_size=16, shuffle=True, drop_last=True))
