"""What a run takes on disk, by network and optimizer: ``python benchmarks/footprint.py`` prints the README's table.

The figures are foretold by ``lightning_source.recording.footprint``, which a test holds to the bytes of real runs
within a tenth. Six snapshots, one segment, float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from lightning_source.capture.coverage import find_blocks
from lightning_source.recording.footprint import expected_footprint, readable
from lightning_source.recording.manifest import Settings


def mlp() -> nn.Module:
    sides = (784, 512, 256, 128, 10)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sides)]
    return nn.Sequential(*layers)


def gpt(vocabulary: int) -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_positions=64, n_embd=128, n_layer=2, n_head=4))


def resnet() -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10
        )
    )


def lora() -> nn.Module:
    """Adapters on a BERT of 12 layers."""
    base = BertForSequenceClassification(BertConfig())
    return get_peft_model(base, LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS"))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP 784-512-256-128-10": mlp,
    "GPT, d = 128, 2 layers, V = 512": lambda: gpt(512),
    "GPT, d = 128, 2 layers, V = 50,257": lambda: gpt(50_257),
    "ResNet-18": resnet,
    "LoRA, r = 8, on BERT-base": lora,
}


def main() -> None:
    """Print the table."""
    print("| | trained | of the model | record, SGD | record, Adam | factors |")
    print("|---|---|---|---|---|---|")
    for name, make in NETWORKS.items():
        with torch.device("meta"):
            module = make()
        trained = {key: p for key, p in module.named_parameters() if p.requires_grad}
        coverage = find_blocks(module, [list(trained.values())])
        sizes = [expected_footprint(Settings(), module, set(trained), coverage, adaptive) for adaptive in (False, True)]
        whole = sum(p.numel() for p in module.parameters()) * 4
        own = sum(p.numel() for p in trained.values()) * 4
        cells = [readable(own), readable(whole), *(readable(size.record) for size in sizes), readable(sizes[0].factors)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
