"""What a module holds outside its ``state_dict``: read, kept as differences, and given back."""

import torch
from helpers import Classifier, mlp
from torch import nn

from lightning_source.capture.attributes import Reading, attributes_at, attributes_seen, read_attributes, with_reading


class Helper:
    def __init__(self):
        self.rate = 1.5


def module():
    found = Classifier(mlp())
    found.beta, found.name, found.on, found.count = 0.1, "a", True, 3
    found.centre = torch.tensor([1.0, float("inf")], dtype=torch.float64)
    found.helper, found.weights = Helper(), {"kl": 0.25, "a.b": 1.0, 3: 4.0}
    found.large, found.queue = torch.zeros(10_000), [1.0]
    found.drop = nn.Dropout(0.5)
    return found


def test_plain_values_are_read_by_their_place_and_nothing_of_the_framework_is():
    assert read_attributes(module(), 7) == Reading(
        7,
        {
            "beta": "0.1",
            "name": '"a"',
            "on": "true",
            "count": "3",
            "centre": '{"dtype": "float64", "values": [1.0, Infinity]}',
            "helper.rate": "1.5",
            "weights[kl]": "0.25",
        },
    )


def test_values_are_set_inside_and_back_outside():
    found, other = module(), module()
    other.beta, other.name, other.on, other.count, other.helper.rate = 0.5, "b", False, 4, 2.5
    other.weights["kl"], other.centre, other.later = 0.75, torch.tensor([2.0]), 1
    with attributes_seen(found, {**read_attributes(other, 0).values, "no.such": "1", "no[such]": "1"}):
        assert (found.beta, found.name, found.on, found.count, found.helper.rate) == (0.5, "b", False, 4, 2.5)
        assert (found.weights["kl"], found.centre.tolist(), found.later) == (0.75, [2.0], 1)
    assert read_attributes(found, 0) == read_attributes(module(), 0)
    assert not hasattr(found, "later")
    assert set(found.weights) == {"kl", "a.b", 3}


def test_readings_that_go_hand_their_values_to_the_next_one():
    readings = (Reading(0, {"a": "0", "b": "0", "c": "0"}),)
    for step, values in {2: ("1", "0"), 4: ("2", "0"), 6: ("2", "5")}.items():
        whole = Reading(step, {"a": values[0], "b": values[1], "c": "0"})
        readings = with_reading(readings, whole, [4])
    assert [reading.step for reading in readings] == [0, 4, 6]
    assert [attributes_at(readings, step) for step in (0, 3, 4, 9)] == [
        {"a": "2", "b": "0"},
        {"a": "2", "b": "0"},
        {"a": "2", "b": "5"},
        {"a": "2", "b": "5"},
    ]


def test_nothing_changed_is_nothing_to_set():
    reading = read_attributes(module(), 0)
    assert attributes_at(with_reading((reading,), Reading(4, reading.values), [4]), 2) == {}
    assert attributes_at((), 3) == {}
