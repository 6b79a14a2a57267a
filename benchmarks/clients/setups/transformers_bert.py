"""BERT for sequence classification in a LightningModule, as in Lightning's tutorial on text transformers (GLUE)."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from setup import SetUp, seeded
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

NAME = "transformers: BERT"
REQUIREMENTS = ["transformers==5.24.0"]


class GLUETransformer(L.LightningModule):
    """The tutorial's module: the model makes its own loss, AdamW without decay for biases and norms, warm-up."""

    def __init__(self, learning_rate: float = 2e-4, weight_decay: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        config = BertConfig(
            vocab_size=100,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
        )
        self.model = BertForSequenceClassification(config)

    def forward(self, **inputs: torch.Tensor) -> Any:
        return self.model(**inputs)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self(**batch)[0]

    def configure_optimizers(self) -> Any:
        no_decay = ["bias", "LayerNorm.weight"]
        named = list(self.model.named_parameters())
        grouped = [
            {
                "params": [p for n, p in named if not any(nd in n for nd in no_decay)],
                "weight_decay": self.hparams.weight_decay,
            },
            {"params": [p for n, p in named if any(nd in n for nd in no_decay)], "weight_decay": 0.0},
        ]
        optimizer = AdamW(grouped, lr=self.hparams.learning_rate, eps=1e-8)
        scheduler = get_linear_schedule_with_warmup(
            optimizer, num_warmup_steps=2, num_training_steps=self.trainer.estimated_stepping_batches
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 1}]


def build(seed: int) -> SetUp:
    """Sentences of unequal length, padded and masked."""
    seeded(seed)
    length = torch.randint(4, 13, (48,))
    mask = (torch.arange(12) < length[:, None]).long()
    ids = torch.randint(1, 100, (48, 12)) * mask
    rows = [{"input_ids": ids[i], "attention_mask": mask[i], "labels": ids[i, 0] % 2} for i in range(48)]
    return SetUp(GLUETransformer(), DataLoader(rows, batch_size=8, shuffle=True), {"gradient_clip_val": 1.0})
