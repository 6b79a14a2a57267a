"""A batch that the user gives is cut into its examples where its layout says how."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_source.capture.splitting import split


class Pair(NamedTuple):
    inputs: Tensor
    targets: Tensor


@dataclass
class Record:
    inputs: Tensor
    names: list[str]
    scale: float


X, Y = torch.arange(6.0).view(3, 2), torch.arange(3)
BATCHES: dict[str, tuple[Any, Any]] = {
    "tensor": (X, X[1:2]),
    "pair": ([X, Y], [X[1:2], Y[1:2]]),
    "named": (Pair(X, Y), Pair(X[1:2], Y[1:2])),
    "dict": ({"x": X, "text": ["a", "b", "c"]}, {"x": X[1:2], "text": ["b"]}),
    "dataclass": (Record(X, ["a", "b", "c"], 0.5), Record(X[1:2], ["b"], 0.5)),
    "shared": ((X, torch.ones(7)), (X[1:2], torch.ones(7))),
    "as many parts as examples": ([X, Y, Y], [X[1:2], Y[1:2], Y[1:2]]),
    "tensors of any length": (
        [[torch.ones(2), torch.ones(4), torch.ones(1)], Y],
        [[torch.ones(4)], Y[1:2]],
    ),
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return same(vars(one), vars(other)) if hasattr(one, "__dict__") else one == other


@pytest.mark.parametrize("name", BATCHES)
def test_the_second_of_three(name):
    batch, second = BATCHES[name]
    pieces = split(batch, 3)
    assert pieces is not None
    assert len(pieces) == 3
    assert type(pieces[1]) is type(second)
    assert same(pieces[1], second)


def test_nothing_counts_the_examples():
    assert split({"x": torch.ones(5), "name": "a"}, 3) is None


class Graphs:
    """As PyTorch Geometric's batches are: rows of all nodes, and a list of graphs behind them."""

    def __init__(self, graphs: list[Tensor]) -> None:
        self.nodes = torch.cat(graphs)
        self._graphs = graphs

    def to_data_list(self) -> list[Tensor]:
        return self._graphs

    @classmethod
    def from_data_list(cls, graphs: list[Tensor]) -> "Graphs":
        return cls(graphs)


def test_graphs_are_cut_by_their_own_list():
    pieces = split(Graphs([torch.zeros(1, 2), torch.ones(3, 2)]), 2)
    assert pieces is not None
    assert torch.equal(pieces[1].nodes, torch.ones(3, 2))
