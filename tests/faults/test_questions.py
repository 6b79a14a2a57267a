"""Faults at disk events of scoring, saving and sweeps: the same numbers or one clear error, never anything else."""

import pytest
from faults.counts import verdicts_at
from faults.events import KINDS
from faults.scenarios import SCENARIOS, events_in

NAMES = [name for name in SCENARIOS if "fit" not in name]


@pytest.fixture(scope="module")
def events(tmp_path_factory, stops):
    return {name: events_in(name, tmp_path_factory.mktemp("unharmed"), stops) for name in NAMES}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_some_events(tmp_path, stops, events, name, kind):
    step = max(1, events[name] // 10)
    counts, bad = verdicts_at(name, kind, tmp_path, stops, range(1 + step // 2, events[name] + 1, step))
    assert not bad
    assert counts.total() >= min(10, events[name])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_many_events(tmp_path, stops, events, name, kind):
    assert not verdicts_at(name, kind, tmp_path, stops, range(1, events[name] + 1, 10))[1]
