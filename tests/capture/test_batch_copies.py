"""A copied batch can be written, popped and consumed while the original stays as it was."""

import threading
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_source.capture.batch_copies import copied


class Pair(NamedTuple):
    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Checked:
    inputs: Tensor
    sizes: list[int]

    def __post_init__(self) -> None:
        if self.inputs.sum() > 1e6:
            raise ValueError("checked once, when it is made")


class Graph:
    """Attributes and a method, as graph libraries have them."""

    def __init__(self) -> None:
        self.nodes = torch.arange(3.0)
        self.store = {"edges": torch.arange(2)}
        self.itself = self


class Slotted:
    __slots__ = ("inputs",)

    def __init__(self) -> None:
        self.inputs = torch.arange(3.0)


def leaves(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Graph):
        return [value.nodes, value.store["edges"]]
    if isinstance(value, (Checked, Slotted)):
        return [value.inputs]
    parts = value.values() if isinstance(value, (dict, UserDict)) else value
    return [leaf for part in parts for leaf in leaves(part)] if not isinstance(value, (str, int)) else []


def packed():
    return nn.utils.rnn.pack_padded_sequence(torch.arange(6.0).view(2, 3), torch.tensor([3, 2]), batch_first=True)


BATCHES = {
    "tensor": lambda: torch.arange(4.0),
    "list": lambda: [torch.arange(3.0), torch.arange(2)],
    "tuple": lambda: (torch.arange(3.0), "name", 7),
    "named tuple": lambda: Pair(torch.arange(3.0), torch.arange(2)),
    "dict": lambda: {"x": torch.arange(3.0), "more": [torch.arange(2)]},
    "ordered dict": lambda: OrderedDict(x=torch.arange(3.0)),
    "user dict": lambda: UserDict(x=torch.arange(3.0)),
    "frozen dataclass": lambda: Checked(torch.arange(3.0), [1, 2]),
    "object": Graph,
    "slots": Slotted,
    "packed sequence": lambda: packed().data,
}


@pytest.mark.parametrize("name", BATCHES)
def test_writes_stay_in_the_copy(name):
    original, untouched = BATCHES[name](), BATCHES[name]()
    copy = copied(original)
    assert type(copy) is type(original)
    for leaf in leaves(copy):
        leaf.add_(1)
    for kept, expected, written in zip(leaves(original), leaves(untouched), leaves(copy), strict=True):
        assert torch.equal(kept, expected)
        assert not torch.equal(written, expected)


def test_containers_are_apart():
    original = {"labels": torch.arange(2), "parts": [1, 2]}
    copy = copied(original)
    copy.pop("labels")
    copy["parts"].append(3)
    assert list(original) == ["labels", "parts"]
    assert original["parts"] == [1, 2]


def test_what_is_held_twice_is_held_twice():
    shared = torch.arange(3.0)
    first, second = copied([shared, shared])
    assert first is second


def test_an_object_that_holds_itself_is_copied_once():
    copy = copied(Graph())
    assert copy.nodes is not Graph().nodes


def test_a_checked_dataclass_is_not_checked_again():
    batch = Checked(torch.zeros(2), [1])
    batch.inputs.fill_(1e7)
    assert copied(batch).inputs[0] == 1e7


def test_gradients_are_asked_of_leaves_as_before():
    leaf = torch.zeros(2, requires_grad=True)
    assert copied(leaf).requires_grad
    assert not copied(leaf * 2).requires_grad


def test_inference_tensors_become_normal_ones():
    with torch.inference_mode():
        batch = {"x": torch.ones(2)}
    assert not copied(batch)["x"].is_inference()


def test_what_has_no_copy_is_shared():
    lock = threading.Lock()
    assert copied([lock])[0] is lock


def test_a_generator_is_refused_by_name():
    with pytest.raises(
        MisconfigurationException, match=r"a generator \(`halves`\), .* HINT: let `collate_fn` give a list"
    ):
        copied({"x": torch.ones(2), "parts": halves()})


def halves():
    yield torch.ones(1)
    yield torch.ones(1)


def test_packed_sequences_pack_the_same():
    original = packed()
    copy = copied(original)
    copy.data.zero_()
    assert torch.equal(original.data, packed().data)
    assert torch.equal(copy.batch_sizes, original.batch_sizes)


def test_a_batch_is_copied_under_vmap():
    values = torch.vmap(lambda rows: copied({"rows": rows})["rows"].mul_(2))(torch.arange(6.0).view(3, 2))
    assert torch.equal(values, 2 * torch.arange(6.0).view(3, 2))
