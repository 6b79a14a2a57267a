"""Node classification with PyTorch Geometric's ``LightningNodeData``, the whole graph in a batch, as its example does.

The loader's data set is the one graph: it is the training example, and no score can tell its nodes apart.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from setup import SetUp, seeded
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.data.lightning import LightningNodeData
from torch_geometric.nn import GCNConv

NAME = "torch_geometric: nodes"
REQUIREMENTS = ["torch-geometric==2.8.1"]


class Model(L.LightningModule):
    """Two graph convolutions; the loss is over the training nodes."""

    def __init__(self, in_channels: int, out_channels: int, hidden: int = 16) -> None:
        super().__init__()
        self.conv1 = GCNConv(in_channels, hidden)
        self.conv2 = GCNConv(hidden, out_channels)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.conv1(x, edge_index).relu(), training=self.training)
        return self.conv2(x, edge_index)

    def training_step(self, data: Any, batch_idx: int) -> torch.Tensor:
        y_hat = self(data.x, data.edge_index)[data.train_mask]
        return F.cross_entropy(y_hat, data.y[data.train_mask])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01, weight_decay=5e-4)


def build(seed: int) -> SetUp:
    """A random graph of three communities."""
    seeded(seed)
    label = torch.randint(0, 3, (60,))
    close = (label[:, None] == label[None]) & (torch.rand(60, 60) < 0.2)
    edges = (close | close.T).nonzero().T.contiguous()
    data = Data(x=F.one_hot(label, 3) + torch.randn(60, 3), edge_index=edges, y=label, train_mask=torch.rand(60) < 0.5)
    return SetUp(Model(3, 3), LightningNodeData(data, loader="full"), {"max_epochs": 6})
