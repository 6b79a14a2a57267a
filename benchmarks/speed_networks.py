"""The networks and synthetic data whose costs are measured; nothing here depends on what values the data have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from task_networks import mlp
from torch import Tensor, nn
from torch.utils.data import TensorDataset

WIDTH, LENGTH, VOCABULARY, HEADS = 128, 64, 512, 4
Network = Callable[..., Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        title: as it is printed.
        network: makes an untrained network.
        train: training examples.
        query: queries.
        loss: ``(network, *batch)`` to the mean loss.
        each_loss: the same by example, whose mean it is.
        sampled_loss: ``(network, *batch)`` to the sum of losses with labels drawn from the network's own predictions.
        optimizer: made of parameters.
        epochs: of training.
        batch: examples at once in passes, on both sides.
        settings: of :class:`SourceCallback`.
        peer: whether the peer can run it: a head over 50,257 tokens has a covariance of 10 GB there.
    """

    title: str
    network: Callable[[], nn.Module]
    train: TensorDataset
    query: TensorDataset
    loss: Callable[..., Tensor]
    each_loss: Callable[..., Tensor]
    sampled_loss: Callable[..., Tensor]
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    epochs: int
    batch: int = 256
    settings: Mapping[str, Any] = field(default_factory=dict)
    peer: bool = True


def classified(network: Network, inputs: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(network(inputs), labels, reduction=reduction)


def classified_as_drawn(network: Network, inputs: Tensor, labels: Tensor) -> Tensor:
    logits = network(inputs)
    drawn = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
    return F.cross_entropy(logits, drawn, reduction="sum")


def next_token(network: Network, tokens: Tensor) -> Tensor:
    logits = network(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def next_token_of_each(network: Network, tokens: Tensor) -> Tensor:
    return F.cross_entropy(network(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def next_token_as_drawn(network: Network, tokens: Tensor) -> Tensor:
    logits = network(tokens[:, :-1]).flatten(0, 1)
    drawn = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
    return F.cross_entropy(logits, drawn, reduction="sum")


class Layer(nn.Module):
    """A pre-norm transformer layer of plain linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, states: Tensor) -> Tensor:
        normed = self.before(states)
        heads = (part(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        states = states + self.out(mixed.transpose(1, 2).flatten(2))
        return states + self.down(F.gelu(self.up(self.after(states))))


class GPT(nn.Module):
    """Two layers over tokens and positions.

    Args:
        vocabulary: number of tokens.
        bare: positions are a parameter that is added, not an embedding.
    """

    def __init__(self, vocabulary: int, bare: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH)) if bare else nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.Sequential(*(Layer(WIDTH) for _ in range(2)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if isinstance(self.positions, nn.Parameter):
            states = self.tokens(tokens) + self.positions[:length]
        else:
            states = self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))
        return self.head(self.norm(self.layers(states)))


def cnn() -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 9, 10))


def resnet() -> nn.Module:
    """ResNet-18 of transformers at 32 x 32, its logits alone."""
    from transformers import ResNetConfig, ResNetForImageClassification

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = ResNetForImageClassification(
                ResNetConfig(
                    embedding_size=64,
                    hidden_sizes=[64, 128, 256, 512],
                    depths=[2, 2, 2, 2],
                    layer_type="basic",
                    num_labels=10,
                )
            )

        def forward(self, images: Tensor) -> Tensor:
            return self.model(images).logits

    return Logits()


def images(count: int, seed: int, *shape: int) -> TensorDataset:
    """Noise around ten centres."""
    centres = torch.randn(10, *shape, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    return TensorDataset(0.3 * centres[labels] + torch.randn(count, *shape, generator=generator), labels)


def sentences(count: int, seed: int, vocabulary: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randint(vocabulary, (count, LENGTH), generator=generator))


def _classifier(title: str, network: Callable[[], nn.Module], train: int, query: int, *shape: int, **more: Any) -> Row:
    return Row(
        title,
        network,
        images(train, 1, *shape),
        images(query, 2, *shape),
        classified,
        partial(classified, reduction="none"),
        classified_as_drawn,
        partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        **({"epochs": 3} | more),
    )


def _gpt(vocabulary: int, train: int, query: int, bare: bool = False) -> Row:
    positions = ", positions a bare parameter" if bare else ""
    return Row(
        f"GPT, d = 128, 2 layers, T = 64, V = {vocabulary:,}{positions}, {train:,} × {query}",
        partial(GPT, vocabulary, bare),
        sentences(train, 1, vocabulary),
        sentences(query, 2, vocabulary),
        next_token,
        next_token_of_each,
        next_token_as_drawn,
        partial(torch.optim.AdamW, lr=1e-3),
        epochs=3,
        batch=32,
        peer=vocabulary < 10_000,
    )


ROWS: dict[str, Callable[[], Row]] = {
    "mlp": lambda: _classifier(
        "MLP 784-512-256-128-10, 2,000 × 100", partial(mlp, 784, 512, 256, 128, 10), 2000, 100, 784
    ),
    "cnn": lambda: _classifier("CNN, 3 convolutions, 28 × 28, 1,000 × 100", cnn, 1000, 100, 1, 28, 28),
    "gpt": lambda: _gpt(512, 512, 32),
    "gpt-bare": lambda: _gpt(512, 512, 32, bare=True),
    "gpt-vocabulary": lambda: _gpt(50_257, 64, 4),
    "resnet": lambda: _classifier("ResNet-18, 32 × 32, 256 × 16", resnet, 256, 16, 3, 32, 32, epochs=2, batch=32),
}
