"""Data sets of the tasks, read from a folder that ``docs/results.md`` describes; the digits come with scikit-learn."""

from __future__ import annotations

import gzip
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

SENTENCE_WORDS = 2000  # of SST-2
VOCABULARY, CONTEXT = 800, 16  # of WikiText-2


@dataclass(frozen=True)
class Data:
    """Tensors with the examples along the first dimension, one for each item of a batch."""

    train: list[Tensor]  # what queries are attributed to and subsets are drawn from
    query: list[Tensor]
    later: list[Tensor] = field(default_factory=list)  # of a second stage, which every retraining has in full


def digits(folder: Path, train: int = 1000, queries: int = 200) -> Data:
    """Scikit-learn's digits, every pixel standardised."""
    images, labels = digit_images()
    images = ((images - images.mean(0)) / (images.std(0) + 1e-2)).clamp(-5, 5)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: train + queries]
    return split([images[order], labels[order]], train)


def two_stage_digits(angle: float, folder: Path, train: int = 640, later: int = 640, queries: int = 150) -> Data:
    """Scikit-learn's digits, then others turned by 45 degrees; the queries are turned by ``angle``."""
    images, labels = digit_images()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    first, second, asked = order[: train + later + queries].split([train, later, queries])
    return Data(
        [images[first], labels[first]],
        [turned(images[asked], angle), labels[asked]],
        [turned(images[second], 45.0), labels[second]],
    )


def digit_images() -> tuple[Tensor, Tensor]:
    """Scikit-learn's digits ``[1797, 64]`` between 0 and 1, and their labels."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    return torch.tensor(raw.data, dtype=torch.float32) / 16, torch.tensor(raw.target)


def turned(images: Tensor, degrees: float) -> Tensor:
    """Digits ``[N, 64]`` turned about their centre, bilinear, zeros outside."""
    angle = torch.tensor(degrees).deg2rad()
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0]])
    grid = F.affine_grid(turn.expand(len(images), 2, 3), [len(images), 1, 8, 8], align_corners=False)
    return F.grid_sample(images.view(-1, 1, 8, 8), grid, align_corners=False).flatten(1)


def split(tensors: Sequence[Tensor], train: int) -> Data:
    return Data([t[:train] for t in tensors], [t[train:] for t in tensors])


def uci(name: str, train: int, queries: int, folder: Path) -> Data:
    """A UCI regression set, inputs and target standardised by the training examples; the last column is the target."""
    table = torch.tensor(read_table(folder / "uci" / name), dtype=torch.float32)
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    table = (table - table[:train].mean(0)) / table[:train].std(0)
    return split([table[: train + queries, :-1], table[: train + queries, -1]], train)


def read_table(folder: Path) -> np.ndarray[Any, Any]:
    """A UCI data set's numbers, float64, the target in the last column."""
    with gzip.open(folder / "data.csv.gz") as file:
        return np.loadtxt(file, delimiter=",")


def fashion(train: int, queries: int, folder: Path, noise: float = 0.0) -> Data:
    """Fashion-MNIST's first images at half the resolution, a share of the training labels drawn at random."""
    images, labels = [], []
    for part, count in (("train", train), ("t10k", queries)):
        images.append(idx(next(folder.rglob(f"{part}-images-idx3-ubyte.gz")))[:count])
        labels.append(idx(next(folder.rglob(f"{part}-labels-idx1-ubyte.gz")))[:count])
    pixels = [F.avg_pool2d(torch.tensor(i, dtype=torch.float32)[:, None], 2).flatten(1) / 255 for i in images]
    mean, deviation = pixels[0].mean(), pixels[0].std()
    inputs = [(p - mean) / deviation for p in pixels]
    targets = [torch.tensor(label, dtype=torch.int64) for label in labels]
    generator = torch.Generator().manual_seed(1)
    wrong = torch.rand(train, generator=generator) < noise
    targets[0] = torch.where(wrong, torch.randint(10, (train,), generator=generator), targets[0])
    return Data([inputs[0], targets[0]], [inputs[1], targets[1]])


def idx(path: Path) -> np.ndarray[Any, Any]:
    """An IDX file of bytes: a magic number whose last byte counts the dimensions, their sizes, the values."""
    raw = gzip.decompress(path.read_bytes())
    dimensions = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(dimensions).copy()


def cifar(train: int, queries: int, folder: Path) -> Data:
    found = load_file(folder / "cifar10_subset.safetensors")
    parts = [
        (found["train_images"][:train], found["train_labels"][:train]),
        (found["test_images"][:queries], found["test_labels"][:queries]),
    ]
    mean = parts[0][0].float().mean((0, 1, 2))
    deviation = parts[0][0].float().std((0, 1, 2))
    scaled = [((x.float() - mean) / deviation).permute(0, 3, 1, 2) for x, _ in parts]
    made = [[F.avg_pool2d(x, 2).contiguous(), y.long()] for x, (_, y) in zip(scaled, parts, strict=True)]
    return Data(*made)


def sentences(train: int, queries: int, folder: Path, length: int = 24) -> Data:
    """SST-2's first sentences as numbers of words; 0 pads, 1 stands for words that training has once only."""
    rows = [line.rsplit("\t", 1) for line in (folder / "sst2" / "train.tsv").read_text().splitlines()][:train]
    rows += [line.rsplit("\t", 1) for line in (folder / "sst2" / "dev.tsv").read_text().splitlines()][:queries]
    counts = Counter(word for text, _ in rows[:train] for word in text.split())
    number = {word: i + 2 for i, word in enumerate(w for w, c in counts.most_common(SENTENCE_WORDS - 2) if c > 1)}
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, (text, _) in enumerate(rows):
        words = [number.get(word, 1) for word in text.split()][:length]
        tokens[row, : len(words)] = torch.tensor(words)
    return split([tokens, torch.tensor([int(label) for _, label in rows])], train)


def wikitext(train: int, queries: int, folder: Path) -> Data:
    """Stretches of WikiText-2's valid and test articles, the most common words numbered and the others 0."""
    texts = [(folder / "wikitext2" / f"{part}.txt").read_text().split() for part in ("valid", "test")]
    common = Counter(texts[0]).most_common(VOCABULARY - 1)
    number = {word: i + 1 for i, (word, _) in enumerate(common)}
    parts = []
    for text, count in zip(texts, (train, queries), strict=True):
        stride = len(text) // count  # spread over the articles
        starts = range(0, stride * count, stride)
        parts.append([torch.tensor([[number.get(w, 0) for w in text[s : s + CONTEXT]] for s in starts])])
    return Data(*parts)
