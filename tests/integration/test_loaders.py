"""Loaders of every make: what training drew is what is scored, and what can draw as it likes never stops a fit."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, classes, gradient_rows, mlp, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from lightning_source import SourceCallback, SourceScorer

DATA = classes(24)
QUERIES = classes(6, seed=2)
HALF = [21, 3, 4, 8, 10, 11, 15, 16, 17, 20, 22, 1]


def fit(path: Any, loader: Any, kind: Callable[[nn.Module], Classifier] = Classifier, **options: Any) -> Any:
    torch.manual_seed(0)
    mode = options.pop("mode", "fit")
    trainer = quiet_trainer(path, SourceCallback(str(path / "run"), mode=mode, overwrite=True), **options)
    trainer.fit(kind(mlp()), loader)
    return trainer


def stage_of(trainer: Any) -> Any:
    return trainer.callbacks[0]._session.store.manifest.stages[-1]


# ---------------------------------------------------------------- a part of the data


@pytest.fixture(scope="module")
def of_half(tmp_path_factory):
    """Trained on half of the data by a sampler, and on the same half as a dataset, in the same order."""
    path = tmp_path_factory.mktemp("half")
    sampled = fit(path / "sampled", DataLoader(DATA, 5, sampler=SubsetRandomSampler(HALF)))
    subset = Subset(DATA, sorted(HALF))
    return sampled, fit(path / "subset", DataLoader(subset, 5, sampler=Again(sorted(HALF))))


class Again(SubsetRandomSampler):
    """The order of the sampler of the half, as positions in the half."""

    def __init__(self, half: list[int]) -> None:
        super().__init__(range(len(half)))
        self.half = half

    def __iter__(self) -> Iterator[int]:
        return (self.half.index(index) for index in SubsetRandomSampler(HALF))


@pytest.mark.check("data", "SubsetRandomSampler", "scores of the same half as a dataset, 0 for the others")
@pytest.mark.parametrize("method", ["source", "influence", "trak", "grad-dot"])
def test_what_training_never_draws_has_no_score_and_no_weight(of_half, method):
    sampled, subset = (trainer.attribute(QUERIES, method=method) for trainer in of_half)
    assert sampled.values.shape == (6, 24)
    assert sampled.train_ids.tolist() == list(range(24))
    assert sampled.metadata["examples"] == 12
    assert torch.equal(sampled.values[:, sorted(HALF)], subset.values)
    assert not sampled.values[:, [i for i in range(24) if i not in HALF]].any()
    if method == "trak":
        assert torch.equal(sampled.kernel_weights[sorted(HALF)], subset.kernel_weights)


def test_some_of_a_part(of_half):
    trainer = of_half[0]
    whole = trainer.attribute(QUERIES).values
    some = trainer.attribute(QUERIES, train_ids=[0, 22, 3], per_segment=True, per_layer=True)
    torch.testing.assert_close(some.values, whole[:, [0, 22, 3]])
    for parts in (some.by_segment, some.by_layer):
        torch.testing.assert_close(parts.sum(0), some.values)
    assert not trainer.attribute(QUERIES, train_ids=[0, 2]).values.any()
    with trainer.callbacks[0].scorer(trainer) as scorer:
        own = scorer.self_influence()
        torch.testing.assert_close(own, trainer.attribute(DATA, removal="few").values.diagonal())
        assert not scorer.self_influence(train_ids=[0, 2]).any()


@pytest.mark.check("data", "SubsetRandomSampler", "from_run the same")
def test_a_part_is_known_in_another_process(of_half):
    trainer = of_half[0]
    expected = trainer.attribute(QUERIES)
    scorer = SourceScorer.from_run(trainer.callbacks[0].dirpath, Classifier(mlp()))
    for train in (DATA, DataLoader(DATA, 32, sampler=SubsetRandomSampler(HALF))):
        again = scorer.score(QUERIES, train)
        assert torch.equal(again.values, expected.values)
        assert torch.equal(again.train_ids, expected.train_ids)
    with pytest.raises(Exception, match="holds 23 examples"):
        scorer.score(QUERIES, Subset(DATA, range(23)))


def test_a_message_names_positions_in_the_dataset(tmp_path):
    inputs, targets = (x.clone() for x in DATA.tensors)
    trainer = fit(tmp_path, DataLoader(TensorDataset(inputs, targets), 4, sampler=SubsetRandomSampler(HALF)))
    inputs[17, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"examples \b17\b"):
        trainer.attribute(QUERIES, batch_size=1)


# name: (the query loader's options, the positions that are the queries, whether a warning says so)
QUERY_LOADERS = {
    "a part at random": (lambda: {"sampler": SubsetRandomSampler([4, 1, 3])}, [4, 1, 3], False),
    "a part in batches": (lambda: {"batch_sampler": BatchSampler(SubsetRandomSampler([4, 1]), 3, True)}, [4, 1], False),
    "a list": (lambda: {"sampler": [5, 0, 5], "batch_size": 2}, [5, 0, 5], False),
    "shuffled": (lambda: {"shuffle": True, "batch_size": 4}, list(range(6)), False),
    "weights": (lambda: {"sampler": WeightedRandomSampler([0.0, 1.0, 0, 0, 0, 0], 2)}, [1, 1], True),
    "batches of the user's own": (lambda: {"batch_sampler": OwnBatches()}, [2, 0, 5], True),
}


class OwnBatches(Sampler):
    def __iter__(self) -> Iterator[list[int]]:
        yield from ([2], [0, 5])


@pytest.mark.check("data", "query loader, {case}", "its own examples, in its order")
@pytest.mark.parametrize("case", QUERY_LOADERS)
def test_a_query_loader_is_obeyed(of_half, recwarn, case):
    options, positions, warned = QUERY_LOADERS[case]
    trainer = of_half[0]
    whole = trainer.attribute(QUERIES)
    recwarn.clear()
    state = torch.get_rng_state()
    scores = trainer.attribute(DataLoader(QUERIES, **options()))
    assert scores.query_ids.tolist() == positions
    torch.testing.assert_close(scores.values, whole.values[positions])
    assert sum("draws as it likes" in str(w.message) for w in recwarn) == warned
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- how items are made


class ByList(Dataset):
    """Reads a whole batch at once, and nothing else."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        assert isinstance(indices, list)
        inputs, targets = DATA.tensors
        return inputs[indices], targets[indices]


def of_plain_loader(path: Any) -> Tensor:
    return fit(path, DataLoader(DATA, 8)).attribute(QUERIES).values


@pytest.mark.check("data", "sampler=BatchSampler, batch_size=None", "scores of a plain loader")
def test_a_dataset_that_reads_batches(tmp_path):
    batches = BatchSampler(range(24), 8, False)
    trainer = fit(tmp_path / "by list", DataLoader(ByList(), sampler=batches, batch_size=None))
    assert stage_of(trainer).examples_per_batch == 8
    assert torch.equal(trainer.attribute(QUERIES).values, of_plain_loader(tmp_path))
    own = trainer.attribute(
        DataLoader(ByList(), sampler=BatchSampler(RandomSampler(ByList()), 5, False), batch_size=None)
    )
    torch.testing.assert_close(own.values, trainer.attribute(DATA).values)


class WholeBatches(Dataset):
    """Its items are batches already."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return DATA[8 * index : 8 * index + 8]


def test_a_dataset_of_batches_is_recorded_and_waits(tmp_path):
    loader = DataLoader(WholeBatches(), batch_size=None)
    with pytest.warns(UserWarning, match=r"yields whole batches.*train="):
        trainer = fit(tmp_path / "batches", loader)
    values = trainer.attribute(QUERIES, train=DataLoader(DATA, 8)).values
    assert torch.equal(values, of_plain_loader(tmp_path))
    queries = trainer.attribute(loader, train=DATA)
    torch.testing.assert_close(queries.values, trainer.attribute(DATA, train=DATA).values)


class Opened(Dataset):
    """Can be read only where a worker has opened it."""

    tensors: tuple[Tensor, ...] | None = None

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        assert self.tensors is not None
        return self.tensors[0][index], self.tensors[1][index]


def open_file(worker: int) -> None:
    get_worker_info().dataset.tensors = DATA.tensors


@pytest.mark.check("data", "worker_init_fn", "scores of a plain loader")
def test_a_dataset_that_workers_open(tmp_path):
    loader = DataLoader(Opened(), 8, num_workers=1, worker_init_fn=open_file)
    trainer = fit(tmp_path / "opened", loader)
    assert torch.equal(trainer.attribute(QUERIES).values, of_plain_loader(tmp_path))
    some = trainer.attribute(DataLoader(Opened(), 8, sampler=[7, 5], num_workers=1, worker_init_fn=open_file))
    torch.testing.assert_close(some.values, trainer.attribute(Subset(DATA, [7, 5])).values)


class ByName(Dataset):
    """Is asked by name."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        return DATA[int(name.removeprefix("example "))]


class Names(Sampler):
    def __len__(self) -> int:
        return 24

    def __iter__(self) -> Iterator[str]:
        return (f"example {index}" for index in range(24))


@pytest.mark.check("data", "samplers of keys", "scores of a plain loader, with train= where the sampler is one's own")
def test_samplers_of_keys(tmp_path):
    with pytest.warns(UserWarning, match=r"`Names`.*scoring needs `train=`"):
        trainer = fit(tmp_path / "own", DataLoader(ByName(), 8, sampler=Names()), mode="deferred")
    expected = of_plain_loader(tmp_path)
    assert torch.equal(trainer.attribute(QUERIES, train=DataLoader(DATA, 8)).values, expected)
    trainer = fit(tmp_path / "list", DataLoader(ByName(), 8, sampler=list(Names())))
    assert torch.equal(trainer.attribute(QUERIES).values, expected)
    loader = DataLoader(ByName(), 8, sampler=["example 3", "example 1"])
    scores = trainer.attribute(loader)
    assert scores.query_ids.tolist() == [0, 1]
    torch.testing.assert_close(scores.values, trainer.attribute(Subset(DATA, [3, 1])).values)


# ---------------------------------------------------------------- how many a batch holds


class Summed(Classifier):
    """A batch's first tensor is shared by all of its examples; the loss is a sum."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(batch["inputs"])
        return F.cross_entropy(logits, batch["targets"], weight=batch["weights"], reduction="sum") / 8


def shared_first(items: Any) -> dict[str, Tensor]:
    inputs, targets = (torch.stack(column) for column in zip(*items, strict=True))
    return {"weights": torch.ones(3), "inputs": inputs, "targets": targets}


class Unequal(Sampler):
    """Batches of 4, 8 and 12 examples."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(24).tolist()
        return iter((order[:4], order[4:12], order[12:]))


@pytest.mark.check("data", "first tensor shared, {how}", "examples counted by the loader")
@pytest.mark.parametrize(
    ("how", "options", "size"),
    [
        ("drop_last", {"batch_size": 7, "drop_last": True, "shuffle": True}, 7),
        ("a smaller last batch", {"batch_size": 16, "shuffle": True}, 12),
        ("unequal batches", {"batch_sampler": Unequal()}, 8),
    ],
)
def test_examples_are_counted_by_the_loader(tmp_path, how, options, size):
    trainer = fit(tmp_path, DataLoader(DATA, collate_fn=shared_first, **options), Summed)
    stage = stage_of(trainer)
    assert stage.examples_per_batch == size
    # What a sum over a batch is as a mean: grad-dot against autograd at single examples, times size / 8.
    values = trainer.attribute(DataLoader(QUERIES, 4, collate_fn=shared_first), method="grad-dot").values
    expected = products(trainer.lightning_module, DATA, QUERIES) * size * 0.1 * trainer.global_step / 24
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-7)


def products(
    module: Classifier, train: TensorDataset, queries: TensorDataset, collate: Callable[[Any], Any] | None = None
) -> Tensor:
    """Gradient products of single examples as the step weights them, ``[Q, N]``."""
    parameters = list(module.parameters())

    def gradients(data: TensorDataset) -> Tensor:
        return gradient_rows((module.training_step((collate or shared_first)([item]), 0) for item in data), parameters)

    return gradients(queries) @ gradients(train).T


class Held:
    """A batch without a container that anybody knows; it can be moved, and that is all."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs = inputs
        self.targets = targets

    def to(self, *args: Any, **kwargs: Any) -> "Held":
        return Held(self.inputs.to(*args, **kwargs), self.targets.to(*args, **kwargs))


class OfHeld(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch.inputs, batch.targets), batch_idx)


def hold(items: Any) -> Held:
    return Held(*(torch.stack(column) for column in zip(*items, strict=True)))


@pytest.mark.check("data", "batches that are objects", "scores of a plain loader")
def test_batches_that_are_objects(tmp_path):
    trainer = fit(tmp_path / "held", DataLoader(DATA, 8, collate_fn=hold), OfHeld)
    assert stage_of(trainer).examples_per_batch == 8
    values = trainer.attribute(DataLoader(QUERIES, 3, collate_fn=hold)).values
    torch.testing.assert_close(values, of_plain_loader(tmp_path))


# ---------------------------------------------------------------- data that change


class Reloads(Classifier):
    """Another training set in every epoch, or the same again."""

    fresh = True

    def train_dataloader(self) -> DataLoader:
        epoch = self.trainer.current_epoch
        return DataLoader(classes(16 + 8 * epoch, seed=epoch), 8) if self.fresh else DataLoader(Subset(DATA, HALF), 8)


class ReloadsTheSame(Reloads):
    fresh = False


@pytest.mark.check("data", "reload_dataloaders_every_n_epochs", "recorded, one warning where the data are others")
@pytest.mark.parametrize("fresh", [True, False])
def test_data_that_are_loaded_anew(tmp_path, recwarn, fresh):
    trainer = fit(
        tmp_path, None, Reloads if fresh else ReloadsTheSame, max_epochs=3, reload_dataloaders_every_n_epochs=1
    )
    assert sum("loaded anew for epoch 1" in str(w.message) for w in recwarn) == fresh
    assert trainer.attribute(QUERIES).values.shape == (6, 16 if fresh else 12)
    assert stage_of(trainer).examples_per_batch == (8 if fresh else 6)


@pytest.mark.parametrize("fails", [True, False], ids=["a batch of none fails", "a batch of none is None"])
def test_examples_that_the_collate_function_drops_have_no_score(tmp_path, fails):
    kept = DATA.tensors[0][:, 0] > -1

    def collate(items):
        items = [item for item in items if item[0][0] > -1]
        if not items and not fails:
            return None
        return [torch.stack([item[side] for item in items]) for side in (0, 1)]

    trainer = fit(tmp_path, DataLoader(DATA, 8, collate_fn=collate), max_epochs=3)
    scores = trainer.attribute(QUERIES, method="grad-dot").values
    asked = QUERIES.tensors[0][:, 0] > -1  # queries go the same way
    expected = products(trainer.lightning_module, DATA, QUERIES, collate=default_collate) * kept * asked.unsqueeze(1)
    torch.testing.assert_close(scores / scores.norm(), expected / expected.norm(), rtol=0, atol=1e-5)
    assert not scores[:, ~kept].any()


def test_an_error_of_the_collate_function_is_the_users_own(tmp_path):
    """Only an example that a batch is the same without is dropped."""
    scores_now = False

    def collate(items):
        if scores_now and any(torch.equal(item[0], DATA[5][0]) for item in items):
            raise KeyError("a broken record")
        return [torch.stack(side) for side in zip(*items, strict=True)]

    trainer = fit(tmp_path, DataLoader(DATA, 8, collate_fn=collate), max_epochs=1)
    scores_now = True
    with pytest.raises(KeyError, match="a broken record"):
        trainer.attribute(QUERIES, method="grad-dot")
