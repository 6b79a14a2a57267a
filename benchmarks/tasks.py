"""The tasks of the studies: data, network, recipe and measurement of each, as close to SOURCE's as two cores allow.

Every task that needs more than scikit-learn's digits reads a folder (``--data``); ``docs/results.md`` says where the
files come from. ``note`` says where a recipe is smaller than the paper's.
"""

from __future__ import annotations

import gzip
import struct
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, TensorDataset

from lightning_source.evaluation.batched import retrain_batched


@dataclass(frozen=True)
class Data:
    """Tensors with the examples along the first dimension, one for each item of a batch."""

    train: list[Tensor]
    query: list[Tensor]


@dataclass(frozen=True)
class Task:
    """A training recipe and how it is retrained for ground truth (method §7)."""

    note: str
    load: Callable[[Path], Data]
    build: Callable[[], nn.Module]
    loss: Callable[..., Tensor]  # (network, *batch) -> scalar
    measurement: Callable[..., Tensor]  # (network, *query) -> [Q]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    epochs: int
    batch_size: int
    schedule: Callable[[torch.optim.Optimizer, int], LRScheduler] | None = None  # given the number of steps
    subsets: int = 100
    retrainings: int = 5
    steps_at_most: int = -1  # of the full model, where it shall stop early; -1: all
    tags: frozenset[str] = field(default_factory=frozenset)  # what a study may ask for: "mlp", "lm"

    def steps(self, examples: int) -> int:
        """Optimizer steps of a training on so many examples; each epoch's short last batch is left out."""
        return self.epochs * (examples // self.batch_size)


class Trained(L.LightningModule):
    """A task as any user would write it."""

    def __init__(self, task: Task, examples: int) -> None:
        super().__init__()
        self.net = task.build()
        self.task = task
        self.steps = task.steps(examples)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.task.loss(self.net, *batch)

    def configure_optimizers(self) -> Any:
        optimizer = self.task.optimizer(self.parameters())
        if self.task.schedule is None:
            return optimizer
        scheduler = self.task.schedule(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def measurement_of(task: Task, by_name: bool = True) -> str | Callable[[Trained, Sequence[Tensor]], Tensor]:
    """The task's measurement as ``attribute`` takes it: by name where the package has it."""
    named = {margin: "margin", sequence_loss: "loss"}
    if by_name and task.measurement in named:
        return named[task.measurement]
    return lambda module, batch: task.measurement(module.net, *batch)


def fit(
    task: Task, data: Data, seed: int, callback: L.Callback, kind: type[Trained] = Trained
) -> tuple[Trained, L.Trainer]:
    """Train one model on all examples."""
    L.seed_everything(seed, verbose=False)
    module = kind(task, len(data.train[0]))
    trainer = L.Trainer(
        max_epochs=task.epochs,
        max_steps=task.steps_at_most,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(*data.train), task.batch_size, shuffle=True, drop_last=True))
    return module, trainer


def retrain(task: Task, data: Data, kept: Tensor, seeds: Sequence[int], progress: bool = False) -> Tensor:
    """``[C, Q]``: the measurement after training on each row of ``kept``, by the task's own recipe."""
    steps = task.steps(int(kept[0].sum()))
    return retrain_batched(
        task.build,
        task.loss,
        task.measurement,
        data.train,
        data.query,
        kept,
        seeds,
        optimizer=task.optimizer,
        epochs=task.epochs,
        batch_size=task.batch_size,
        drop_last=True,
        schedule=None if task.schedule is None else lambda optimizer: task.schedule(optimizer, steps),
        progress=progress,
    )


def subsets(count: int, examples: int, share: float, seed: int = 0) -> Tensor:
    """``[count, examples]`` of 0 and 1, a share of them 1."""
    ranks = torch.rand(count, examples, generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
    return (ranks < round(share * examples)).to(torch.uint8)


def ground_truth(
    name: str, task: Task, data: Data, share: float = 0.5, cache: Path | None = None
) -> tuple[Tensor, Tensor]:
    """Subsets ``[S, N]`` and the measurement after every retraining on each, ``[R, S, Q]``; kept in ``cache``."""
    file = None if cache is None else cache / f"truth-{name}-{share:g}.safetensors"
    kept = subsets(task.subsets, len(data.train[0]), share)
    done = load_file(file)["measurement"] if file is not None and file.exists() else None
    rounds = [] if done is None else list(done[: task.retrainings])
    while len(rounds) < task.retrainings:
        first = 1000 + len(rounds) * task.subsets
        rounds.append(retrain(task, data, kept, range(first, first + task.subsets)))
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"kept": kept, "measurement": torch.stack(rounds)}, file)
        print(f"{name}: retraining {len(rounds)} of {task.retrainings}", file=sys.stderr, flush=True)
    return kept, torch.stack(rounds)


# -------------------------------------------------------------------- losses and measurements


def classification(network: Callable[..., Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(network(inputs), labels)


def margin(network: Callable[..., Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
    """``log p - log(1 - p)`` of the true class."""
    output, target = network(inputs), labels.unsqueeze(-1)
    rest = output.scatter(-1, target, -torch.inf).logsumexp(-1)
    return output.gather(-1, target).squeeze(-1) - rest


def regression(network: Callable[..., Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(network(inputs).squeeze(-1), targets)


def absolute_error(network: Callable[..., Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
    return (network(inputs).squeeze(-1) - targets).abs()


def language_model(network: Callable[..., Any], tokens: Tensor) -> Tensor:
    logits = network(input_ids=tokens).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def sequence_loss(network: Callable[..., Any], tokens: Tensor) -> Tensor:
    """Mean loss of each sequence's tokens."""
    logits = network(input_ids=tokens).logits
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


# -------------------------------------------------------------------- networks


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class TextEncoder(nn.Module):
    """One transformer layer over words, the mean of its outputs, and a linear head."""

    def __init__(self, vocabulary: int, width: int = 32, length: int = 24) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width, padding_idx=0)
        self.positions = nn.Embedding(length, width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        empty = tokens == 0
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        states = self.layer(self.words(tokens) + self.positions(places), src_key_padding_mask=empty)
        present = (~empty).unsqueeze(-1).to(states.dtype)
        return self.head((states * present).sum(1) / present.sum(1))


class Residual(nn.Module):
    """Two convolutions with batch normalisation around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv(channels, channels), *conv(channels, channels))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.body(inputs)


def conv(before: int, after: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]


def resnet() -> nn.Sequential:
    return nn.Sequential(
        *conv(3, 8, 2),
        Residual(8),
        *conv(8, 16, 2),
        Residual(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


VOCABULARY, CONTEXT = 800, 16


def gpt() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        attn_implementation="eager",  # the fused kernels cannot be vectorised over copies
    )
    return GPT2LMHeadModel(config)


# -------------------------------------------------------------------- data


def digits(folder: Path, train: int = 1000, queries: int = 200) -> Data:
    """Scikit-learn's digits, every pixel standardised."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images, labels = torch.tensor(raw.data, dtype=torch.float32) / 16, torch.tensor(raw.target)
    images = ((images - images.mean(0)) / (images.std(0) + 1e-2)).clamp(-5, 5)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: train + queries]
    return split([images[order], labels[order]], train)


def split(tensors: Sequence[Tensor], train: int) -> Data:
    return Data([t[:train] for t in tensors], [t[train:] for t in tensors])


def uci(name: str, train: int, queries: int, folder: Path) -> Data:
    """A UCI regression set, inputs and target standardised by the training examples; the last column is the target."""
    with gzip.open(folder / "uci" / name / "data.csv.gz") as file:
        table = torch.tensor(np.loadtxt(file, delimiter=","), dtype=torch.float32)
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    table = (table - table[:train].mean(0)) / table[:train].std(0)
    return split([table[: train + queries, :-1], table[: train + queries, -1]], train)


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


SENTENCE_WORDS = 2000


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


# -------------------------------------------------------------------- the tasks


def sgd(rate: float, decay: float = 0.0) -> Callable[[Any], torch.optim.Optimizer]:
    return partial(torch.optim.SGD, lr=rate, momentum=0.9, weight_decay=decay)


def triangular(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Up to the optimizer's rate in the first fifth of training and down to 0 by its end."""
    peak = max(1, steps // 5)
    return LambdaLR(optimizer, lambda step: min((step + 1) / peak, max(0.0, (steps - step) / max(1, steps - peak))))


DIGITS = partial(mlp, 64, 64, 32, 10)
FASHION = partial(mlp, 196, 128, 64, 10)
_MLP = frozenset({"mlp"})

TASKS: dict[str, Task] = {
    "digits-20": Task(
        "1,000 digits (8 x 8), MLP 64-32, SGD 0.03, momentum 0.9, batch 32, 20 epochs",
        partial(digits, queries=100),
        *(DIGITS, classification, margin, sgd(0.03), 20, 32),
        retrainings=10,
        tags=_MLP,
    ),
    "digits-3": Task(
        "digits-20 after 3 epochs",
        *(digits, DIGITS, classification, margin, sgd(0.03), 3, 32),
        retrainings=20,
        tags=_MLP,
    ),
    "digits-adam": Task(
        "digits-20 with Adam 0.001",
        partial(digits, queries=100),
        *(DIGITS, classification, margin, partial(torch.optim.Adam, lr=1e-3), 20, 32),
        tags=_MLP,
    ),
    "digits-adamw": Task(
        "digits-20 with AdamW 0.003, weight decay 0.01",
        partial(digits, queries=100),
        *(DIGITS, classification, margin, partial(torch.optim.AdamW, lr=3e-3, weight_decay=1e-2), 20, 32),
        tags=_MLP,
    ),
    "concrete": Task(
        "Concrete as in the paper: 896 examples, MLP 3 x 128, SGD 0.03, momentum 0.9, decay 1e-5, batch 32, 20 epochs",
        partial(uci, "concrete", 896, 100),
        partial(mlp, 8, 128, 128, 128, 1),
        *(regression, absolute_error, sgd(3e-2, 1e-5), 20, 32),
        tags=_MLP,
    ),
    "parkinsons": Task(
        "Parkinsons, shrunk from 5,280 to 1,320 examples: MLP 3 x 128, SGD 0.01, momentum 0.9, decay 3e-5, batch 32,"
        " 20 epochs",
        partial(uci, "parkinsons", 1320, 100),
        partial(mlp, 20, 128, 128, 128, 1),
        *(regression, absolute_error, sgd(1e-2, 3e-5), 20, 32),
        retrainings=3,
        tags=_MLP,
    ),
    "fashion": Task(
        "Fashion-MNIST, shrunk from 6,144 images of 28 x 28 to 1,024 of 14 x 14 and from MLP 512-256-128 to 128-64: SGD"
        " 0.03, momentum 0.9, decay 1e-3, batch 64, 20 epochs",
        partial(fashion, 1024, 100),
        *(FASHION, classification, margin, sgd(3e-2, 1e-3), 20, 64),
        retrainings=5,
        tags=_MLP,
    ),
    "fashion-small": Task(
        "512 images of Fashion-MNIST at 14 x 14, MLP 64: SGD 0.03, momentum 0.9, decay 1e-3, batch 64, 15 epochs",
        partial(fashion, 512, 100),
        partial(mlp, 196, 64, 10),
        *(classification, margin, sgd(3e-2, 1e-3), 15, 64),
        tags=_MLP,
    ),
    "fashion-noisy": Task(
        "Fashion-MNIST with 30 % random labels, shrunk from 6,144 images of 28 x 28 to 2,048 of 14 x 14 and from MLP"
        " 512-256-128 to 128-64: SGD 0.01, momentum 0.9, decay 3e-5, batch 32, 3 epochs",
        partial(fashion, 2048, 100, noise=0.3),
        *(FASHION, classification, margin, sgd(1e-2, 3e-5), 3, 32),
        retrainings=10,
        tags=_MLP,
    ),
    "sst2": Task(
        "2,048 sentences of SST-2, a transformer encoder of one layer (width 32) trained from scratch in place of"
        " BERT: AdamW 0.003, decay 0.01, batch 32, 3 epochs",
        partial(sentences, 2048, 100),
        partial(TextEncoder, SENTENCE_WORDS),
        *(classification, margin, partial(torch.optim.AdamW, lr=3e-3, weight_decay=1e-2), 3, 32),
        subsets=60,
        retrainings=3,
    ),
    "wikitext": Task(
        "256 stretches of 16 words of WikiText-2, GPT-2 with 2 layers of width 32 trained from scratch in place of"
        " fine-tuning: AdamW 0.003, decay 0.01, batch 8, 6 epochs",
        partial(wikitext, 256, 60),
        gpt,
        *(language_model, sequence_loss, partial(torch.optim.AdamW, lr=3e-3, weight_decay=1e-2), 6, 8),
        subsets=60,
        retrainings=2,
        tags=frozenset({"lm"}),
    ),
    "cifar": Task(
        "512 images of CIFAR-10 at 16 x 16 and a ResNet of 8 and 16 channels with batch normalisation in place of"
        " 3,072 and ResNet-9: SGD up to 0.1 and down to 0, momentum 0.9, decay 1e-3, batch 64, 15 epochs",
        partial(cifar, 512, 60),
        *(resnet, classification, margin, sgd(0.1, 1e-3), 15, 64),
        schedule=triangular,
        subsets=60,
        retrainings=2,
    ),
    "quick": Task(
        "300 digits, MLP 32, SGD 0.03, momentum 0.9, batch 32, 8 epochs: only a check that the studies run",
        partial(digits, train=300, queries=40),
        partial(mlp, 64, 32, 10),
        *(classification, margin, sgd(0.03), 8, 32),
        subsets=60,
        retrainings=2,
        tags=_MLP,
    ),
}
