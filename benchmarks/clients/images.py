"""Small images for the libraries that see."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset


def digits(count: int, first: int = 0, channels: int = 1, size: int = 8) -> TensorDataset:
    """scikit-learn's digits, ``[count, channels, size, size]`` within 0 to 1 with a little noise, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images[first : first + count], dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size, mode="bilinear").expand(-1, channels, -1, -1)
    images = images + 0.01 * torch.randn(images.shape)  # no ties, which pooling would break by the size of the batch
    return TensorDataset(images, torch.tensor(data.target[first : first + count]))


def views(count: int, size: int = 32) -> list[tuple[tuple[torch.Tensor, torch.Tensor], int, str]]:
    """Two views of each digit, its label and a file name, as lightly's data sets give them; drawn once."""
    rows = []
    for index, (image, label) in enumerate(digits(count, channels=3, size=size)):
        pair = tuple(
            (image + 0.1 * torch.randn_like(image)).roll(int(shift), -1) for shift in torch.randint(-3, 4, (2,))
        )
        rows.append((pair, int(label), f"{index}.png"))
    return rows
