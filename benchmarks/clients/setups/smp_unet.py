"""A U-Net of segmentation-models-pytorch with Dice loss, as in its example on binary segmentation with Lightning."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import segmentation_models_pytorch as smp
import torch
from setup import SetUp, seeded
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

NAME = "segmentation-models-pytorch: U-Net"
REQUIREMENTS = ["torchvision==0.29.1", "segmentation-models-pytorch==0.6.0", "lightly==1.6.0", "scikit-learn"]


class PetModel(L.LightningModule):
    """The example's module."""

    def __init__(self, arch: str, encoder_name: str, in_channels: int, out_classes: int, **kwargs: Any) -> None:
        super().__init__()
        self.model = smp.create_model(
            arch,
            encoder_name=encoder_name,
            encoder_weights=None,
            in_channels=in_channels,
            classes=out_classes,
            **kwargs,
        )
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1))
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1))
        self.loss_fn = smp.losses.DiceLoss(smp.losses.BINARY_MODE, from_logits=True)
        self.training_step_outputs: list[dict[str, torch.Tensor]] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.model((image - self.mean) / self.std)

    def shared_step(self, batch: dict[str, torch.Tensor], stage: str) -> dict[str, torch.Tensor]:
        image = batch["image"]
        assert image.ndim == 4
        h, w = image.shape[2:]
        assert h % 32 == 0
        assert w % 32 == 0
        mask = batch["mask"]
        logits_mask = self.forward(image)
        loss = self.loss_fn(logits_mask, mask)
        pred_mask = (logits_mask.sigmoid() > 0.5).float()
        tp, fp, fn, tn = smp.metrics.get_stats(pred_mask.long(), mask.long(), mode="binary")
        return {"loss": loss, "tp": tp, "fp": fp, "fn": fn, "tn": tn}

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> dict[str, torch.Tensor]:
        out = self.shared_step(batch, "train")
        self.training_step_outputs.append(out)
        return out

    def on_train_epoch_end(self) -> None:
        tp = torch.cat([x["tp"] for x in self.training_step_outputs])
        fp = torch.cat([x["fp"] for x in self.training_step_outputs])
        fn = torch.cat([x["fn"] for x in self.training_step_outputs])
        tn = torch.cat([x["tn"] for x in self.training_step_outputs])
        self.log("train_iou", smp.metrics.iou_score(tp, fp, fn, tn, reduction="micro"), prog_bar=True)
        self.training_step_outputs.clear()

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-4)
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=1e-5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1}}


def build(seed: int) -> SetUp:
    """Images with a bright disc each, and its mask."""
    seeded(seed)
    grid = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij"))
    rows = []
    for centre in 8 + 16 * torch.rand(24, 2):
        mask = ((grid - centre[:, None, None]).square().sum(0) < 49).float()[None]
        rows.append({"image": (0.6 * mask + 0.4 * torch.rand(3, 32, 32)), "mask": mask})
    module = PetModel("Unet", "mobilenet_v2", 3, 1, encoder_depth=3, decoder_channels=(16, 8, 8))
    return SetUp(module, DataLoader(rows, batch_size=8, shuffle=True))
