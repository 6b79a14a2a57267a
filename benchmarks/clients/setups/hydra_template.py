"""The module of lightning-hydra-template: batch normalisation, metrics, partial optimizer and scheduler."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as L
import torch
from images import digits
from setup import SetUp, seeded
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MaxMetric, MeanMetric
from torchmetrics.classification.accuracy import Accuracy

NAME = "lightning-hydra-template: MNISTLitModule"
REQUIREMENTS = ["scikit-learn", "requests"]


class SimpleDenseNet(nn.Module):
    """Linear layers with batch normalisation between them."""

    def __init__(self, input_size: int = 64, lin1: int = 32, lin2: int = 32, lin3: int = 16, output: int = 10) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(input_size, lin1),
            nn.BatchNorm1d(lin1),
            nn.ReLU(),
            nn.Linear(lin1, lin2),
            nn.BatchNorm1d(lin2),
            nn.ReLU(),
            nn.Linear(lin2, lin3),
            nn.BatchNorm1d(lin3),
            nn.ReLU(),
            nn.Linear(lin3, output),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.view(x.size(0), -1))


class MNISTLitModule(L.LightningModule):
    """The template's module."""

    def __init__(self, net: nn.Module, optimizer: Callable[..., Any], scheduler: Callable[..., Any]) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["net"])
        self.net = net
        self.criterion = nn.CrossEntropyLoss()
        self.train_acc = Accuracy(task="multiclass", num_classes=10)
        self.val_acc = Accuracy(task="multiclass", num_classes=10)
        self.train_loss = MeanMetric()
        self.val_loss = MeanMetric()
        self.val_acc_best = MaxMetric()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def on_train_start(self) -> None:
        self.val_loss.reset()
        self.val_acc.reset()
        self.val_acc_best.reset()

    def model_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, y = batch
        logits = self.forward(x)
        return self.criterion(logits, y), torch.argmax(logits, dim=1), y

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss, preds, targets = self.model_step(batch)
        self.train_loss(loss)
        self.train_acc(preds, targets)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        loss, preds, targets = self.model_step(batch)
        self.val_loss(loss)
        self.val_acc(preds, targets)
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("val/acc", self.val_acc, on_step=False, on_epoch=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        self.val_acc_best(self.val_acc.compute())
        self.log("val/acc_best", self.val_acc_best.compute(), sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
        scheduler = self.hparams.scheduler(optimizer=optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss", "interval": "epoch", "frequency": 1},
        }


class Digits(L.LightningDataModule):
    """Training and validation loaders of scikit-learn's digits."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(digits(96), batch_size=16, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(digits(32, first=96), batch_size=16)


def build(seed: int) -> SetUp:
    """The template's default configuration, smaller."""
    seeded(seed)
    module = MNISTLitModule(
        SimpleDenseNet(),
        partial(torch.optim.Adam, lr=0.001, weight_decay=0.0),
        partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode="min", factor=0.1, patience=10),
    )
    return SetUp(module, Digits())
