"""GPT-2 with its own language-modelling loss in a LightningModule."""

from __future__ import annotations

import lightning.pytorch as L
import torch
from setup import SetUp, seeded
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

NAME = "transformers: GPT-2"
REQUIREMENTS = ["transformers==5.24.0"]


class Language(L.LightningModule):
    """The model's own loss, which shifts the labels; tied embeddings; AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2))

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def build(seed: int) -> SetUp:
    """Blocks of 16 tokens."""
    seeded(seed)
    ids = torch.randint(0, 64, (48, 16))
    return SetUp(Language(), DataLoader([{"input_ids": i, "labels": i} for i in ids], batch_size=8, shuffle=True))
