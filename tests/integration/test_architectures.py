"""Whole networks as people train them: own ones, Hugging Face's from config, adapters. No attribution code in any."""

import codecs
import contextlib
import io
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning as L
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from checks import measured
from helpers import close, quiet_trainer
from safetensors import safe_open
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

from lightning_source import SourceCallback, SourceScorer
from lightning_source.capture.coverage import find_blocks
from lightning_source.capture.layer_gradients import GradientCapture
from lightning_source.capture.objective import Objective
from lightning_source.capture.probe import probe
from lightning_source.names import clean_name

BATCH, EXAMPLES, LENGTH = 4, 12, 12
# Share of an example's own gradient norm; see `singles.TOLERANCE`.
TOLERANCE = 1e-4


def zen():
    """The Zen of Python, which every interpreter carries, as lines."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13").splitlines()


LINES = [line for line in zen() if line]
CHARACTERS = sorted({character for line in LINES for character in line})
VOCABULARY = len(CHARACTERS) + 2  # and padding, 0, and the end, 1


def encode(line):
    return torch.tensor([2 + CHARACTERS.index(character) for character in line])


# ---------------------------------------------------------------- own networks


class Attention(nn.Module):
    """Causal self-attention over one projection."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """Attention and a perceptron, each behind a norm."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(L.LightningModule):
    """Two layers over characters."""

    def __init__(self, tied=True, width=16):
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(Decoder(width, 2), Decoder(width, 2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def training_step(self, batch, batch_idx):
        ids = batch["ids"]
        x = self.tokens(ids[:, :-1]) + self.places(torch.arange(ids.shape[1] - 1))
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Residual(nn.Module):
    """Two convolutions beside a shortcut, activations in place."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.relu(out)


@dataclass
class Images:
    """A batch that is neither tuple nor dictionary."""

    images: torch.Tensor
    labels: torch.Tensor


class ResNet(GPT):
    """Images as a dataclass."""

    def __init__(self):
        L.LightningModule.__init__(self)
        self.net = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            Residual(6, 6, 1),
            Residual(6, 8, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 10),
        )

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch.images), batch.labels)


class Wrapped(L.LightningModule):
    """A Hugging Face model, which computes its loss itself."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


# ---------------------------------------------------------------- data and models


def windows():
    text = torch.cat([encode(line) for line in LINES])
    return [{"ids": text[i : i + LENGTH + 1]} for i in range(0, EXAMPLES * LENGTH, LENGTH)]


def digits():
    images, labels = load_digits(return_X_y=True)
    return [
        Images(torch.tensor(x, dtype=torch.float32).view(1, 8, 8) / 16, torch.tensor(y))
        for x, y in zip(images[:EXAMPLES], labels[:EXAMPLES], strict=True)
    ]


def images(examples):
    return Images(torch.stack([x.images for x in examples]), torch.stack([x.labels for x in examples]))


def lines():
    return [encode(line)[: 4 + i % (LENGTH - 4)] for i, line in enumerate(LINES[:EXAMPLES])]


def padded(examples, side="right"):
    """As long as the batch's longest line; padding is masked, and -100 among the labels."""
    size = max(map(len, examples))

    def rows(fill, values):
        parts = [(value, torch.full((size - len(value),), fill)) for value in values]
        return torch.stack([torch.cat(part if side == "right" else part[::-1]) for part in parts])

    ones = [torch.ones_like(x) for x in examples]
    # A line's first character would be predicted from padding before it, if there is any: it is no label.
    labels = [torch.cat([x.new_full((1,), -100), x[1:]]) for x in examples]
    return transformers.BatchEncoding(
        {"input_ids": rows(0, examples), "attention_mask": rows(0, ones), "labels": rows(-100, labels)}
    )


def placed(examples):
    """Padded on the left, so that places are given: they begin at each line's first character."""
    batch = padded(examples, "left")
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return batch


def labelled(examples):
    """One label a line: whether it has an even number of characters."""
    batch = padded(examples)
    batch["labels"] = torch.tensor([len(x) % 2 for x in examples])
    return batch


def pixels(examples):
    batch = images(examples)
    return {"pixel_values": batch.images, "labels": batch.labels}


def hf(name, **settings):
    """A small model from its config."""
    config = getattr(transformers, f"{name.split('For')[0].removesuffix('LMHeadModel')}Config")
    return Wrapped(getattr(transformers, name)(config(**settings)))


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}


def gpt2(**settings):
    return hf(
        "GPT2LMHeadModel",
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        bos_token_id=1,
        eos_token_id=1,
        loss_type="ForCausalLMLoss",
        **settings,
    )


def llama():
    return hf("LlamaForCausalLM", **SMALL, num_key_value_heads=2, bos_token_id=1, eos_token_id=1, pad_token_id=0)


def checkpointed(module, reentrant):
    """Activations are dropped and computed again while training; passes are in eval mode, where they are kept."""
    module.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return module


def adapted(module, *targets):
    """LoRA on a frozen base."""
    config = peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)
    module.model = peft.get_peft_model(module.model, config)
    return module


def per_line(batch):
    """Labels that a causal model counts: the first has nothing before it."""
    return (batch["labels"][:, 1:] != -100).sum(1)


class Case(NamedTuple):
    module: Any
    data: Any
    collate: Any = None
    count: Any = None  # elements of the loss by example, where they differ


CASES = {
    "GPT, tied head": Case(GPT, windows),
    "GPT, own head": Case(lambda: GPT(tied=False), windows),
    "ResNet": Case(ResNet, digits, images),
    "BertForSequenceClassification": Case(
        lambda: hf("BertForSequenceClassification", **SMALL, max_position_embeddings=16, num_labels=2), lines, labelled
    ),
    "GPT2LMHeadModel": Case(gpt2, lines, padded, per_line),
    "GPT2LMHeadModel, padded on the left": Case(gpt2, lines, placed, per_line),
    "GPT2LMHeadModel, checkpointed": Case(lambda: checkpointed(gpt2(), False), lines, padded, per_line),
    "GPT2LMHeadModel, checkpointed, reentrant": Case(lambda: checkpointed(gpt2(), True), lines, padded, per_line),
    "LlamaForCausalLM": Case(llama, lines, padded, per_line),
    "T5ForConditionalGeneration": Case(
        lambda: hf(
            "T5ForConditionalGeneration",
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        ),
        lines,
        padded,
        lambda batch: (batch["labels"] != -100).sum(1),
    ),
    "ViTForImageClassification": Case(
        lambda: hf(
            "ViTForImageClassification",
            **{name: value for name, value in SMALL.items() if name != "vocab_size"},
            image_size=8,
            patch_size=4,
            num_channels=1,
            num_labels=10,
        ),
        digits,
        pixels,
    ),
    "GPT2LMHeadModel, LoRA": Case(lambda: adapted(gpt2(), "c_attn"), lines, padded, per_line),
    "LlamaForCausalLM, LoRA": Case(lambda: adapted(llama(), "q_proj", "v_proj"), lines, padded, per_line),
}


def loader(case, size=BATCH, shuffle=False):
    return DataLoader(case.data(), size, shuffle, collate_fn=case.collate)


def one_of(batch, index):
    """A batch of one example, padded as it was."""
    if isinstance(batch, Images):
        return Images(batch.images[index : index + 1], batch.labels[index : index + 1])
    return {name: value[index : index + 1] for name, value in batch.items()}


# ---------------------------------------------------------------- tests


@pytest.mark.check("architecture", "{name}", "gradients")
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_every_block(name):
    case = CASES[name]
    module = case.module().eval()
    batch = next(iter(loader(case)))
    objective = Objective(module)
    named = {clean_name(n): p for n, p in module.named_parameters() if p.requires_grad}
    coverage = probe(module, objective, find_blocks(module, [list(named.values())]), batch, BATCH)
    assert coverage.share >= 0.99, coverage.summary()
    recording = GradientCapture(module, coverage.blocks)
    captured = recording.captured(objective.evaluate(batch, BATCH, recording).each(), BATCH)
    counts = case.count(batch) if case.count else torch.ones(BATCH)
    singles = []
    for index, share in enumerate(counts / counts.sum()):
        loss = share * module.training_step(one_of(batch, index), 0)
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        singles.append(
            {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}
        )
    size = max(float(g.norm()) for one in singles for g in one.values())
    for block in coverage.blocks:
        expected = torch.stack([block.matrix(one) for one in singles])
        error = (captured[block.name].per_example().transpose(0, 1) - expected).flatten(1).norm(dim=1)
        norms = expected.flatten(1).norm(dim=1)
        # A softmax does not see its keys' bias: what is left of that gradient is round-off of the others.
        assert (error <= TOLERANCE * norms + 1e-6 * size).all(), (block.name, error / norms)
        measured((error / norms.clamp_min(1e-2 * size)).max())


def train(case, *callbacks, path):
    torch.manual_seed(0)
    L.seed_everything(0, verbose=False)
    module = case.module()
    trainer = quiet_trainer(path, *callbacks)
    trainer.fit(module, loader(case, shuffle=True))
    return trainer, module


@pytest.mark.check("architecture", "{name}", "parameters covered")
@pytest.mark.check("architecture", "{name}", "training bit-identical")
@pytest.mark.check("architecture", "{name}", "scores finite, the same for batches of 1")
@pytest.mark.parametrize("name", CASES)
def test_training_and_scores(name, tmp_path):
    case = CASES[name]
    source = SourceCallback(str(tmp_path / "run"), snapshots_per_segment=1)
    trainer, module = train(case, source, path=tmp_path)
    _, plain = train(case, path=tmp_path)
    for (key, one), other in zip(module.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, other), key
    query = next(iter(loader(case, 2)))
    together = trainer.attribute(query)
    assert together.metadata["coverage"] >= 0.99
    assert together.values.shape == (2, EXAMPLES)
    assert together.values.isfinite().all()
    assert (together.values != 0).any(1).all()
    single = trainer.attribute(query, batch_size=1).values
    close(single, together.values, 1e-4)
    assert trainer.attribute(query, method="influence").values.isfinite().all()


@pytest.mark.check("architecture", "{name}", "nothing kept of the base")
@pytest.mark.parametrize("name", [name for name in CASES if "LoRA" in name])
def test_nothing_is_kept_of_a_frozen_base(name, tmp_path):
    case = CASES[name]
    source = SourceCallback(str(tmp_path / "run"), snapshots_per_segment=1, keep="covariances")
    trainer, module = train(case, source, path=tmp_path)
    trainer.attribute(next(iter(loader(case, 2))))
    adapters = {n.removesuffix(".weight") for n, p in module.named_parameters() if p.requires_grad}
    assert adapters
    assert all("lora_" in adapter for adapter in adapters)
    files = sorted((tmp_path / "run").glob("segments/*.safetensors"))
    files += sorted((tmp_path / "run").glob("snapshots/*covariances.safetensors"))
    assert len(files) == 2
    for file in files:
        with safe_open(file, "pt") as opened:
            assert {key.split("/", 1)[1] for key in opened.keys()} == adapters  # noqa: SIM118


def test_another_process_gives_the_same_scores(tmp_path):
    case = CASES["GPT2LMHeadModel"]
    trainer, _ = train(case, SourceCallback(str(tmp_path / "run"), snapshots_per_segment=1), path=tmp_path)
    query = next(iter(loader(case, 2)))
    scorer = SourceScorer.from_run(tmp_path / "run", case.module())
    assert torch.equal(scorer.score(query, loader(case)).values, trainer.attribute(query).values)
