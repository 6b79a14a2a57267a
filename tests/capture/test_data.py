"""Batches of every shape give the scores of a plain tuple; several loaders are recorded and wait for their examples."""

import copy
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, classes, mlp, quiet_trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate
from transformers import BatchEncoding

from lightning_source import SourceCallback
from lightning_source.capture.data import examples_of, query_of

DATA = classes(24)
Pair = namedtuple("Pair", ["inputs", "targets"])


@dataclass
class Batch:
    inputs: Tensor
    targets: Tensor


class Step(Classifier):
    """Takes apart what it is given."""

    def __init__(self, apart: Any) -> None:
        super().__init__(mlp())
        self.apart = apart

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = self.apart(batch)
        return F.cross_entropy(self.net(inputs), targets)


def fields(batch: Any) -> tuple[Tensor, Tensor]:
    return batch.inputs, batch.targets


def items(batch: Any) -> tuple[Tensor, Tensor]:
    return batch["inputs"], batch["targets"]


def nested(batch: Any) -> tuple[Tensor, Tensor]:
    return batch["data"][0], batch["data"][1]["targets"]


# kind: (what collate makes of inputs and targets, how the step takes it apart)
KINDS = {
    "list": (lambda x, y: [x, y], lambda batch: batch),
    "tuple": (lambda x, y: (x, y), lambda batch: batch),
    "named tuple": (Pair, fields),
    "dictionary": (lambda x, y: {"inputs": x, "targets": y}, items),
    "dataclass": (Batch, fields),
    "nested": (lambda x, y: {"data": (x, {"targets": y}), "note": "text"}, nested),
    "BatchEncoding": (lambda x, y: BatchEncoding({"inputs": x, "targets": y}), items),
}


def scores(tmp_path, kind, **options):
    make, apart = KINDS[kind]
    torch.manual_seed(0)
    module = Step(apart)
    trainer = quiet_trainer(tmp_path, SourceCallback(str(tmp_path / kind)))
    loader = DataLoader(DATA, 8, shuffle=True, collate_fn=lambda rows: make(*default_collate(rows)))
    trainer.fit(module, **({"train_dataloaders": loader} if not options else options["data"](loader)))
    return trainer.attribute(make(*(x[:3] for x in DATA.tensors))).values


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return scores(tmp_path_factory.mktemp("list"), "list")


@pytest.mark.check("data", "batch as {kind}, custom collate", "scores of a list")
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_every_kind(tmp_path, kind, expected):
    assert torch.equal(scores(tmp_path, kind), expected)


class Module(L.LightningDataModule):
    def __init__(self, loader):
        super().__init__()
        self.loader = loader

    def train_dataloader(self):
        return self.loader


class Shifts(Module):
    """Changes batches on their way to the device: what the model sees is what is attributed."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 1, batch[1]]


@pytest.mark.check("data", "LightningDataModule", "scores of a list")
def test_a_data_module(tmp_path, expected):
    assert torch.equal(scores(tmp_path, "list", data=lambda loader: {"datamodule": Module(loader)}), expected)


@pytest.mark.check("data", "LightningDataModule, transfer hooks", "scores of data so transformed")
def test_a_data_module_that_changes_batches(tmp_path):
    found = scores(tmp_path / "hooks", "list", data=lambda loader: {"datamodule": Shifts(loader)})
    shifted = copy.deepcopy(DATA)
    shifted.tensors = (shifted.tensors[0] + 1, shifted.tensors[1])
    torch.manual_seed(0)
    module = Step(lambda batch: batch)
    trainer = quiet_trainer(tmp_path, SourceCallback(str(tmp_path / "plain")))
    trainer.fit(module, DataLoader(shifted, 8, shuffle=True))
    torch.testing.assert_close(found, trainer.attribute([x[:3] for x in shifted.tensors]).values)


class FromIterator(Classifier):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return super().training_step(batch, 0)


def loader():
    return DataLoader(DATA, 8)


@pytest.mark.check("data", "dataloader_iter", "refused by name before the first step")
def test_a_step_that_takes_the_iterator_is_refused(tmp_path):
    trainer = quiet_trainer(tmp_path, SourceCallback(str(tmp_path / "run")))
    with pytest.raises((MisconfigurationException, ValueError), match="dataloader_iter"):
        trainer.fit(FromIterator(mlp()), loader())
    assert trainer.global_step == 0


class Keyed(Classifier):
    """Batches come by the names of their loaders."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["a"], batch_idx)


class First(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch[0], batch_idx)


class Of(Dataset):
    """The examples in the form that several loaders give."""

    def __init__(self, form: Any) -> None:
        self.form = form

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> Any:
        return self.form(DATA[index])


# what: (module, training data, an example as its batches hold it)
SEVERAL = {
    "several loaders, a dictionary": (Keyed, lambda: {"a": loader(), "b": loader()}, lambda item: {"a": item}),
    "several loaders, a list": (First, lambda: [loader(), loader()], lambda item: (item,)),
    "several loaders, CombinedLoader": (
        Keyed,
        lambda: CombinedLoader({"a": loader(), "b": loader()}, "max_size_cycle"),
        lambda item: {"a": item},
    ),
}


@pytest.mark.check("data", "{what}", "recorded, scored with train=, equal to one loader")
@pytest.mark.parametrize("what", SEVERAL)
def test_several_loaders_are_recorded(tmp_path, what):
    kind, data, form = SEVERAL[what]
    torch.manual_seed(0)
    trainer = quiet_trainer(tmp_path, SourceCallback(str(tmp_path / "run")))
    with pytest.warns(UserWarning, match=r"one training DataLoader.*train="):
        trainer.fit(kind(mlp()), data())
    with pytest.raises(MisconfigurationException, match="train="):
        trainer.attribute(Of(form))
    values = trainer.attribute(Of(form), train=DataLoader(Of(form), 8)).values
    torch.manual_seed(0)
    plain = quiet_trainer(tmp_path, SourceCallback(str(tmp_path / "plain")))
    plain.fit(Classifier(mlp()), loader())
    torch.testing.assert_close(values, plain.attribute(DATA).values)


def test_a_given_batch_is_counted_by_what_counts_training_examples():
    """Nodes of graphs, in two tensors of three, are not taken for examples."""
    sizes = [1, 3, 2, 2]

    def collate(items):
        nodes = [x.expand(sizes[int(i) % 4], 2) for x, _, i in items]
        owners = torch.arange(len(items)).repeat_interleave(torch.tensor([len(n) for n in nodes]))
        return [torch.stack([y for _, y, _ in items]), torch.cat(nodes), owners]

    dataset = TensorDataset(torch.randn(12, 2), torch.zeros(12), torch.arange(12))
    examples = examples_of(DataLoader(dataset, 4, collate_fn=collate))
    batch = collate([dataset[i] for i in range(4)])
    assert len(query_of(batch, examples)) == 4
    assert len(query_of(batch, None)) == 8  # nothing tells
    assert len(query_of([torch.zeros(3)], examples)) == 3  # a batch of another form
