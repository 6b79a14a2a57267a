"""Lightning's example of fine-tuning: ``BackboneFinetuning`` thaws a torchvision network in mid-fit."""

from __future__ import annotations

import lightning.pytorch as L
import torch
from images import digits
from lightning.pytorch.callbacks.finetuning import BackboneFinetuning
from setup import SetUp, seeded
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader
from torchvision import models

NAME = "Lightning examples: BackboneFinetuning"
REQUIREMENTS = ["torchvision==0.29.1", "segmentation-models-pytorch==0.6.0", "lightly==1.6.0", "scikit-learn"]


class TransferLearningModel(L.LightningModule):
    """A backbone without its head, and a head of three linear layers, as in the example."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        backbone = models.squeezenet1_1(weights=None)
        self.backbone = nn.Sequential(*list(backbone.features.children())[:5], nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Sequential(nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.backbone(x).flatten(1))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        return F.binary_cross_entropy_with_logits(self(x), (y > 4).view((-1, 1)).type_as(x))

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[MultiStepLR]]:
        trainable = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trainable, lr=self.lr)
        return [optimizer], [MultiStepLR(optimizer, milestones=[2], gamma=0.5)]


def build(seed: int) -> SetUp:
    """The module on digits, three channels of 32 pixels; the backbone thaws after the first of three epochs."""
    seeded(seed)
    return SetUp(
        TransferLearningModel(),
        DataLoader(digits(48, channels=3, size=32), batch_size=8, shuffle=True),
        {"max_epochs": 3},
        own_callbacks=lambda: [
            BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-4, verbose=False)
        ],
    )
