"""Graph classification with PyTorch Geometric's Lightning support, as in its example with GIN."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from setup import SetUp, seeded
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GIN, MLP, global_add_pool

NAME = "torch_geometric: graphs"
REQUIREMENTS = ["torch-geometric==2.8.1"]


class Model(L.LightningModule):
    """The example's module."""

    def __init__(self, in_channels: int, out_channels: int, hidden: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.gnn = GIN(in_channels, hidden, layers, dropout=0.5, jk="cat")
        self.classifier = MLP([hidden, hidden, out_channels], norm="batch_norm", dropout=0.5)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, batch: torch.Tensor, batch_size: int) -> torch.Tensor:
        x = self.gnn(x, edge_index)
        x = global_add_pool(x, batch, batch_size)
        return self.classifier(x)

    def training_step(self, data: Any, batch_idx: int) -> torch.Tensor:
        y_hat = self(data.x, data.edge_index, data.batch, data.num_graphs)
        loss = F.cross_entropy(y_hat, data.y)
        self.log("train_loss", loss, prog_bar=True, batch_size=data.num_graphs)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def build(seed: int) -> SetUp:
    """Rings and trees of random sizes."""
    seeded(seed)
    graphs = []
    for kind in torch.randint(0, 2, (64,)).tolist():
        nodes = int(torch.randint(5, 11, ()))
        child = torch.arange(1, nodes)
        parent = child - 1 if kind else (child - 1) // 2
        edges = torch.stack([torch.cat([child, parent]), torch.cat([parent, child])])
        if kind:
            edges = torch.cat([edges, torch.tensor([[0, nodes - 1], [nodes - 1, 0]])], 1)
        graphs.append(Data(x=torch.randn(nodes, 4), edge_index=edges, y=torch.tensor([kind])))
    return SetUp(Model(4, 2), DataLoader(graphs, batch_size=8, shuffle=True))
