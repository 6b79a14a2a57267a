"""Losses, measurements and networks of the tasks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from task_data import CONTEXT, VOCABULARY
from torch import Tensor, nn


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
