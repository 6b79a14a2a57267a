"""Images without anomalies, in anomalib's own containers."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader


def normal_images(count: int, batch_size: int) -> DataLoader[Any]:
    """Items and batches of anomalib's own classes."""
    from anomalib.data import ImageItem
    from anomalib.data.dataclasses import ImageBatch

    images = 0.5 + 0.1 * torch.randn(count, 3, 32, 32)
    items = [ImageItem(image=image, gt_label=torch.tensor(False)) for image in images]
    return DataLoader(items, batch_size=batch_size, shuffle=True, collate_fn=ImageBatch.collate)
